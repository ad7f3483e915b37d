"""Value, hypergradient, warm start and report in one pure function."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax.tree
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax import _loop as loop
from bilevax import _trees as trees
from bilevax._closures import as_partial
from bilevax._estimator import estimate, value_and_aux
from bilevax._failure import OnFailure, guard
from bilevax._iterative import IterativeRule
from bilevax._problems import Problem
from bilevax._results import LinearReport, SolveReport
from bilevax._separable import not_separable, per_task, representative
from bilevax._status import is_failure
from bilevax.certificates import Accuracy, Certificate, Reference, solve_accurately
from bilevax.rules import Implicit, Rule, Settings
from bilevax.solvers import Solver

PyTree = Any


class WarmStart(NamedTuple):
    """Where the next inner and adjoint solves start.

    Attributes:
      x: the inner variable.
      adjoint: v of the adjoint system, a pytree like x (for a `Reparameterized` rule the entries
        are those of its z).
      start: the cold start x0. The relative tolerance of the inner solver refers to ||F(x0, y)||,
        for relative to what is small already no tolerance could be met; and after a failed inner
        solve the next one starts here.
    """

    x: PyTree
    adjoint: PyTree
    start: PyTree


class HypergradientReport(NamedTuple):
    """How the solves behind a hypergradient ended.

    Attributes:
      inner: the `SolveReport` of the inner solve, with the correction of a `Preconditioned` rule.
      adjoint: the `LinearReport` of the adjoint solve; None for rules without one (`Unrolled`).
      identity_entries: see `RuleReport`; None for rules without an adjoint solve.
      certificate: with `accuracy=`, the `Certificate` of this very gradient, at the point and with
        the adjoint behind it; else None.

    With `accuracy=` the inner solver stops by the certificate, so `inner.status` tells whether the
    accuracy was reached: CONVERGED; MAXITER; STALLED where this precision allows no more. Costs are
    those of all rounds together. For a `separable` problem, reports have one entry per task.
    """

    inner: SolveReport
    adjoint: LinearReport | None
    identity_entries: jax.Array | None
    certificate: Certificate | None = None


class Hypergradient(NamedTuple):
    """The result of an engine.

    Attributes:
      value: g(x, y), a scalar.
      gradient: Omega(x, y), a pytree like y (float0 for integer and key leaves).
      x: the point at which both are evaluated, after a correction if the rule makes one.
      warm: the `WarmStart` for a nearby y.
      report: a `HypergradientReport`.
      aux: what the outer objective returns besides, with `has_aux=True`; else None.
    """

    value: jax.Array
    gradient: PyTree
    x: PyTree
    warm: WarmStart
    report: HypergradientReport
    aux: Any


def cold_start(x0: PyTree) -> WarmStart:
    """Return the warm start of a first call: x0, and zero for the adjoint.

    Args:
      x0: where the inner solver starts, a pytree of floating arrays.

    Returns:
      A `WarmStart`.

    Raises:
      TypeError: if x0 has leaves that are not real floating arrays.

    Example:
      >>> import bilevax as bx
      >>> warm = bx.cold_start(1.0)
      >>> float(warm.x), float(warm.adjoint)
      (1.0, 0.0)
    """
    checks.inner_variable(x0, "x0")
    x0 = trees.as_arrays(x0)
    return WarmStart(x0, optax.tree.zeros_like(x0), x0)


@dataclasses.dataclass(frozen=True)
class Engine:
    """A pure function (y, warm) -> `Hypergradient`; made by `value_and_hypergradient`."""

    outer: Partial
    problem: Problem
    solver: Solver
    rule: Rule | IterativeRule
    accuracy: Accuracy | None
    has_aux: bool
    on_failure: OnFailure

    def __call__(self, y: PyTree, warm: WarmStart) -> Hypergradient:
        """Return value, hypergradient, next warm start and report at y."""
        if not isinstance(warm, WarmStart):
            raise TypeError(
                f"`warm` must be a WarmStart, for example `cold_start(x0)`; got {warm!r}."
            )
        checks.inner_variable(warm.x, "warm.x")
        checks.outer_variable(y)
        warm, y = trees.as_arrays(warm), trees.as_arrays(y)
        for name in ("adjoint", "start"):
            checks.same_structure(
                f"warm.{name}", getattr(warm, name), warm.x, expected="warm.x", argument=True
            )
        if isinstance(self.rule, IterativeRule):
            return _evaluate_run(
                self.outer,
                self.problem,
                self.rule.bind(self.solver),
                y,
                warm,
                forward=self.rule.mode == "forward",
                has_aux=self.has_aux,
                on_failure=self.on_failure,
            )
        self.rule.check_values(representative(self.problem, warm.x)[1], y)
        return _evaluate(
            self.outer,
            self.problem,
            self.solver,
            self.rule,
            self.accuracy,
            y,
            warm,
            has_aux=self.has_aux,
            on_failure=self.on_failure,
        )


def value_and_hypergradient(
    outer: Callable[..., Any],
    problem: Problem,
    solver: Solver,
    rule: Rule | IterativeRule | None = None,
    *,
    accuracy: Accuracy | None = None,
    has_aux: bool = False,
    on_failure: OnFailure = OnFailure.RETURN,
) -> Engine:
    """Make the explicit engine: value and hypergradient of h(y) = g(x*(y), y).

        engine = value_and_hypergradient(outer, problem, solver=..., rule=...)
        result = engine(y, cold_start(x0))
        result = engine(y, result.warm)

    The gradient is Omega(x, y) = g_2 + (dx*/dy)^T g_1 at the point x of the rule. Unlike `jax.grad`
    through a `solution_map`, the engine starts both solves from the last ones and reports on both.
    It is pure and compiled once per shape; `jit`, `vmap` and `scan` go through it. For derivatives
    of the gradient use a `solution_map`.

    Args:
      outer: g, a function of (x, y) that returns a real scalar; with `has_aux=True` a pair of it
        and any pytree.
      problem: `minimum(f)`, `root(F)` or `fixed_point(T)`.
      solver: the inner `Solver`.
      rule: how the derivative is formed; None is `Implicit()`. `Unrolled()` differentiates the run
        from the warm start on, which is a constant.
      accuracy: `RelativeAccuracy(value)` or `AbsoluteAccuracy(value)`. In place of its `rtol`, the
        inner solver then runs on until a certificate says that the hypergradient is that accurate;
        `maxiter` and `atol` still bound it. Linear solves without a tolerance of their own follow
        the accuracy.
      has_aux: whether `outer` returns a pair.
      on_failure: by default results are returned as they are and the report tells; see
        `solution_map`.

    Returns:
      An `Engine`, called as engine(y, warm), which returns a `Hypergradient`.

    Raises:
      TypeError: for a wrong kind of argument; for an accuracy where there are no certificates; and,
        at the first call, if `outer` does not return a scalar or the problem does not fit x.

    Example:
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: 0.5 * y * x**2 - x)  # x*(y) = 1 / y
      >>> engine = bx.value_and_hypergradient(lambda x, y: x, problem, solver=bx.Newton())
      >>> result = engine(2.0, bx.cold_start(0.0))
      >>> float(result.value), float(result.gradient)
      (0.5, -0.25)
    """
    rule = Implicit() if rule is None else rule
    outer = as_partial("outer", outer)
    checks.is_component("problem", problem, Problem, "minimum(objective)")
    checks.is_component("solver", solver, Solver, "Newton()")
    if not isinstance(rule, IterativeRule):
        checks.is_component("rule", rule, Rule, "Implicit()")
    if accuracy is not None:
        checks.is_component("accuracy", accuracy, Accuracy, "RelativeAccuracy(1e-2)")
        if isinstance(rule, IterativeRule):
            raise TypeError(
                f"`accuracy` needs a rule with certificates, such as `Implicit()`; got {rule!r}."
            )
        not_separable("accuracy", problem)
    checks.is_component("on_failure", on_failure, OnFailure, "OnFailure.RETURN")
    return Engine(outer, problem, solver, rule, accuracy, has_aux, on_failure)


@functools.partial(jax.jit, static_argnames=("has_aux", "on_failure"))
def _evaluate(
    outer: Partial,
    problem: Problem,
    solver: Solver,
    rule: Rule,
    accuracy: Accuracy | None,
    y: PyTree,
    warm: WarmStart,
    has_aux: bool,
    on_failure: OnFailure,
) -> Hypergradient:
    problem.check(warm.x, y)
    rule.check(*representative(problem, warm.x), y)
    scale = _scale(problem, warm, y)
    if accuracy is None:
        x, inner = loop.run(solver, problem, warm.x, y, scale)
        settings = Settings.following(solver.rtol, x, on_failure)
        found = estimate(outer, problem, rule, x, y, settings, guess=warm.adjoint, has_aux=has_aux)
        inner = inner._replace(correction=found.correction)
        certificate = None
    else:
        found, inner, certificate = solve_accurately(
            outer,
            problem,
            solver,
            rule,
            accuracy,
            Reference(warm.x, warm.adjoint),
            y,
            scale,
            on_failure,
            has_aux=has_aux,
        )
    report = HypergradientReport(inner, found.rule.solve, found.rule.identity_entries, certificate)
    statuses = {"inner solve": inner.status}
    if found.correction is not None:
        statuses["correction of x"] = found.correction.status
    result = found.value, found.gradient, found.x
    (value, gradient, x), warm_x = _guarded(problem, statuses, result, warm, on_failure)
    # The adjoint of a `Reparameterized` rule is like z; a carry of `scan` must stay like x.
    flat, unravel = ravel_pytree(x)
    adjoint = unravel(ravel_pytree(found.rule.adjoint)[0].astype(flat.dtype))
    following = WarmStart(warm_x, adjoint, warm.start)
    return Hypergradient(value, gradient, x, following, report, found.aux)


@functools.partial(jax.jit, static_argnames=("forward", "has_aux", "on_failure"))
def _evaluate_run(
    outer: Partial,
    problem: Problem,
    run: Partial,
    y: PyTree,
    warm: WarmStart,
    forward: bool,
    has_aux: bool,
    on_failure: OnFailure,
) -> Hypergradient:
    """Differentiate the run itself."""
    problem.check(warm.x, y)
    scale = jax.lax.stop_gradient(_scale(problem, warm, y))

    def value_at(y: PyTree) -> tuple[jax.Array, tuple[PyTree, SolveReport, Any]]:
        x, inner = run(problem, warm.x, y, scale)
        value, aux = value_and_aux(outer, x, y, has_aux)
        return value, (x, inner, aux)

    differentiated = _value_and_forward_gradient if forward else _value_and_reverse_gradient
    (value, (x, inner, aux)), gradient = differentiated(value_at, y)
    result, statuses = (value, gradient, x), {"inner solve": inner.status}
    (value, gradient, x), warm_x = _guarded(problem, statuses, result, warm, on_failure)
    report = HypergradientReport(inner, None, None)
    return Hypergradient(value, gradient, x, warm._replace(x=warm_x), report, aux)


def _value_and_reverse_gradient(function: Callable[[PyTree], Any], y: PyTree) -> Any:
    """Return ((value, aux), gradient) of a function that returns (value, aux)."""
    return jax.value_and_grad(function, has_aux=True, allow_int=True)(y)


def _value_and_forward_gradient(function: Callable[[PyTree], Any], y: PyTree) -> Any:
    """Return the same, by one forward derivative for each floating entry of y."""
    leaves, structure = jax.tree.flatten(y)
    moving = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
    flat, unravel = ravel_pytree([leaf for leaf, m in zip(leaves, moving, strict=True) if m])

    def fill(values: list[Any], others: list[Any]) -> PyTree:
        rest, pairs = iter(values), zip(others, moving, strict=True)
        return jax.tree.unflatten(structure, [next(rest) if m else u for u, m in pairs])

    def of_moving(flat: jax.Array) -> Any:
        value, aux = function(fill(unravel(flat), leaves))
        return value, (value, aux)

    gradient, (value, aux) = jax.jacfwd(of_moving, has_aux=True)(flat)
    still = [jax.custom_derivatives.zero_from_primal(leaf) for leaf in leaves]
    return (value, aux), fill(unravel(gradient.astype(flat.dtype)), still)


def _scale(problem: Problem, warm: WarmStart, y: PyTree) -> jax.Array:
    """Return ||F|| at the cold start, per task."""
    return per_task(problem, lambda problem, x: trees.norm(problem.optimality(x, y)), warm.start)


def _guarded(
    problem: Problem,
    statuses: dict[str, jax.Array],
    result: tuple[jax.Array, PyTree, PyTree],
    warm: WarmStart,
    on_failure: OnFailure,
) -> tuple[tuple[jax.Array, PyTree, PyTree], PyTree]:
    """Return the result with the policy applied, and where the next inner solve starts."""
    warm_x = result[2]
    for what, status in statuses.items():
        failed = is_failure(status)
        warm_x = per_task(
            problem, lambda _, failed, a, b: trees.where(failed, a, b), failed, warm.start, warm_x
        )
        # One task that failed spoils what is summed over all.
        worst = jnp.max(status)
        result = guard(on_failure, what, is_failure(worst), worst, result)
    return result, warm_x
