"""The estimator Omega(x, y) of a rule: from a point near x*(y) to value and hypergradient."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._closures import as_partial
from bilevax._problems import Problem
from bilevax._results import LinearReport, RuleReport
from bilevax._separable import not_separable
from bilevax.rules import Rule, Settings, correct_tasks, pull_tasks

PyTree = Any


class Estimate(NamedTuple):
    """What a rule makes of a point x.

    Attributes:
      value: g at `x`, a scalar.
      gradient: Omega, a pytree like y (float0 for integer and key leaves).
      x: the point at which both are evaluated, after a correction if the rule makes one.
      correction: the `LinearReport` of the correction, or None.
      rule: the `RuleReport` of the adjoint solve.
      aux: what the outer objective returns besides, or None.
    """

    value: jax.Array
    gradient: PyTree
    x: PyTree
    correction: LinearReport | None
    rule: RuleReport
    aux: Any


def checked_point(
    outer: Callable[..., Any], problem: Problem, rule: Rule, x: PyTree, y: PyTree
) -> tuple[Partial, PyTree, PyTree]:
    """Check what a user hands to a function that looks at a rule at (x, y).

    Returns:
      outer as a `Partial`, and the arrays x and y.
    """
    function = as_partial("outer", outer)
    checks.is_component("problem", problem, Problem, "minimum(objective)")
    checks.is_component("rule", rule, Rule, "Implicit()")
    not_separable(problem)
    checks.inner_variable(x)
    checks.outer_variable(y)
    x, y = trees.as_arrays(x), trees.as_arrays(y)
    if not any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(y)):
        raise TypeError(f"`y` must have floating entries, got {checks.describe(y)}.")
    rule.check_values(x, y)
    return function, problem.varying(x, y), y


def estimate(
    outer: Callable[..., Any],
    problem: Problem,
    rule: Rule,
    x: PyTree,
    y: PyTree,
    settings: Settings,
    *,
    guess: PyTree | None = None,
    has_aux: bool = False,
) -> Estimate:
    """Move x to the point of the rule and evaluate Omega there; see `evaluate`.

    It runs inside one trace and is differentiable in x, through the linear solves.
    """
    x, correction = correct_tasks(rule.correct, problem, x, y, settings)
    found = evaluate(outer, problem, rule, x, y, settings, guess=guess, has_aux=has_aux)
    return found._replace(correction=correction)


def evaluate(
    outer: Callable[..., Any],
    problem: Problem,
    rule: Rule,
    x: PyTree,
    y: PyTree,
    settings: Settings,
    *,
    guess: PyTree | None = None,
    has_aux: bool = False,
) -> Estimate:
    """Evaluate Omega = g_2 + (dx*/dy)^T g_1 at x as it is, without a correction."""
    value, pull_outer, aux = jax.vjp(
        lambda x, y: value_and_aux(outer, x, y, has_aux), x, y, has_aux=True
    )
    cotangent_x, explicit = pull_outer(jnp.ones_like(value))
    _, implicit, report = pull_tasks(rule.pull, problem, x, y, cotangent_x, guess, settings)
    gradient = trees.add_cotangents(explicit, implicit)
    return Estimate(value, gradient, x, None, report, aux)


def value_and_aux(
    outer: Callable[..., Any], x: PyTree, y: PyTree, has_aux: bool
) -> tuple[jax.Array, Any]:
    """Return g(x, y) and what the outer objective returns besides, or None; check it."""
    output = outer(x, y)
    if has_aux and not (isinstance(output, tuple | list) and len(output) == 2):
        raise TypeError(
            "`outer` must return a pair (value, aux) with `has_aux=True`, "
            f"got {checks.describe(output)}."
        )
    value, aux = output if has_aux else (output, None)
    checks.scalar_output("outer", jax.eval_shape(lambda: value))
    return jnp.asarray(value), aux
