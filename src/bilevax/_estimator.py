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
from bilevax.rules import Rule, Settings, correct_tasks, pull_tasks, with_failed

PyTree = Any


class Estimate(NamedTuple):
    """What a rule makes of a point x.

    Attributes:
      value: g at `x`, a scalar.
      gradient: Omega, a pytree like y (float0 for integer and key leaves).
      x: the point at which both are evaluated, after a correction if the rule makes one.
      terms: the size of the terms that cancel in `gradient`: ||g_2|| + ||(dx*/dy)^T g_1||.
      correction: the `LinearReport` of the correction, or None.
      rule: the `RuleReport` of the adjoint solve.
      aux: what the outer objective returns besides, or None.
      dropped: which tasks are dropped, those included for which anything here failed; None where
        none may be.
    """

    value: jax.Array
    gradient: PyTree
    x: PyTree
    terms: jax.Array
    correction: LinearReport | None
    rule: RuleReport
    aux: Any
    dropped: jax.Array | None = None


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
    return function, x, y


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
    dropped: jax.Array | None = None,
) -> Estimate:
    """Move x to the point of the rule and evaluate Omega there; see `evaluate`.

    It runs inside one trace and is differentiable in x, through the linear solves.
    """
    x, correction, dropped = correct_tasks(rule.correct, problem, x, y, settings, dropped)
    found = evaluate(
        outer, problem, rule, x, y, settings, guess=guess, has_aux=has_aux, dropped=dropped
    )
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
    dropped: jax.Array | None = None,
) -> Estimate:
    """Evaluate Omega = g_2 + (dx*/dy)^T g_1 at x as it is, without a correction."""
    value, pull_outer, aux = jax.vjp(
        lambda x, y: value_and_aux(outer, x, y, has_aux), x, y, has_aux=True
    )
    cotangent_x, explicit = pull_outer(jnp.ones_like(value))
    _, implicit, report = pull_tasks(
        rule.pull, problem, x, y, cotangent_x, guess, settings, dropped
    )
    gradient = trees.add_cotangents(explicit, implicit)
    if dropped is not None:
        dropped = with_failed(dropped, report)
    terms = size_of_terms(explicit, implicit)
    return Estimate(value, gradient, x, terms, None, report, aux, dropped)


def size_of_terms(explicit: PyTree, implicit: PyTree) -> jax.Array:
    """Return the size of the terms that cancel in the sum of two cotangents of y."""
    return trees.scaled_norm(trees.floating(explicit)) + trees.scaled_norm(trees.floating(implicit))


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
