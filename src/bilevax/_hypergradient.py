"""Value, hypergradient, warm start and report in one pure function."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax.tree
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax import _loop as loop
from bilevax import _trees as trees
from bilevax._closures import as_partial
from bilevax._estimator import estimate
from bilevax._failure import OnFailure, guard
from bilevax._problems import Problem
from bilevax._results import LinearReport, SolveReport
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
      adjoint: the `LinearReport` of the adjoint solve.
      identity_entries: see `RuleReport`.
      certificate: with `accuracy=`, the `Certificate` of this very gradient, at the point and with
        the adjoint behind it; else None.

    With `accuracy=` the inner solver stops by the certificate, so `inner.status` tells whether the
    accuracy was reached: CONVERGED; MAXITER; STALLED where this precision allows no more. Costs are
    those of all rounds together.
    """

    inner: SolveReport
    adjoint: LinearReport
    identity_entries: jax.Array
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
    rule: Rule
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
        self.rule.check_values(warm.x, y)
        for name in ("adjoint", "start"):
            checks.same_structure(
                f"warm.{name}", getattr(warm, name), warm.x, expected="warm.x", argument=True
            )
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
    rule: Rule | None = None,
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
      rule: how the derivative is formed; None is `Implicit()`.
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
      TypeError: for a wrong kind of argument; and, at the first call, if `outer` does not return a
        scalar or the problem does not fit x.

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
    checks.is_component("rule", rule, Rule, "Implicit()")
    if accuracy is not None:
        checks.is_component("accuracy", accuracy, Accuracy, "RelativeAccuracy(1e-2)")
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
    rule.check(problem, warm.x, y)
    scale = trees.norm(problem.optimality(warm.start, y))
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
    warm_x, (x, value, gradient) = found.x, (found.x, found.value, found.gradient)
    for what, status in statuses.items():
        failed = is_failure(status)
        warm_x = trees.where(failed, warm.start, warm_x)
        x, value, gradient = guard(on_failure, what, failed, status, (x, value, gradient))
    # The adjoint of a `Reparameterized` rule is like z; a carry of `scan` must stay like x.
    flat, unravel = ravel_pytree(x)
    adjoint = unravel(ravel_pytree(found.rule.adjoint)[0].astype(flat.dtype))
    following = WarmStart(warm_x, adjoint, warm.start)
    return Hypergradient(value, gradient, x, following, report, found.aux)
