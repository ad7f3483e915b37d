"""The solution map y -> x*(y) as a differentiable function: the one home of custom derivatives."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax import _loop as loop
from bilevax import _trees as trees
from bilevax._closures import as_partial, has_functions, hoist
from bilevax._failure import OnFailure, guard
from bilevax._iterative import IterativeRule, run_dropping
from bilevax._problems import Problem
from bilevax._results import SolveReport
from bilevax._scaling import scaled, without_scaling
from bilevax._separable import check_policy, choose, per_task, representative, spread
from bilevax._status import Status, code, is_failure
from bilevax.rules import (
    Implicit,
    Rule,
    Settings,
    correct_tasks,
    pull_tasks,
    push_tasks,
    with_failed,
)
from bilevax.solvers import Solver

PyTree = Any


@dataclasses.dataclass(frozen=True)
class SolutionMap:
    """A differentiable function (x0, y) -> x*(y); made by `solution_map` or `implicit_function`."""

    problem: Problem
    solve: Partial  # (problem, x0, y) -> (x, SolveReport)
    rule: Rule | IterativeRule
    rtol: Any
    on_failure: OnFailure

    def __call__(self, x0: PyTree, y: PyTree) -> PyTree:
        """Return x*(y) from the start x0, with the map's `on_failure` applied."""
        return self._evaluate(x0, y, self.on_failure)[0]

    def with_report(self, x0: PyTree, y: PyTree) -> tuple[PyTree, SolveReport]:
        """Return x*(y) as the solver left it, and a `SolveReport` with its status.

        The numbers of a report are constants: no gradient flows through them.
        Under `jax.grad` the adjoint solve cannot add to the report; there `on_failure` applies.
        Tasks that are dropped are so here too.
        """
        drops = self.on_failure is OnFailure.DROP
        return self._evaluate(x0, y, OnFailure.DROP if drops else OnFailure.RETURN)

    def _evaluate(self, x0: PyTree, y: PyTree, forward: OnFailure) -> tuple[PyTree, SolveReport]:
        checks.inner_variable(x0, "x0")
        checks.outer_variable(y)
        x0 = trees.as_arrays(x0)
        y = trees.as_arrays(y)
        x0 = self.problem.varying(x0, y)
        problem = self.problem.hoisted(x0, y)
        if isinstance(self.rule, IterativeRule):
            solve = Partial(_iterate, self.solve, Settings(on_failure=forward))
            if has_functions(self.solve.args):
                solve = hoist(solve, problem, x0, y)
            return solve(problem, x0, y)
        self.rule.check_values(representative(problem, x0)[1], y)
        drops = self.on_failure is OnFailure.DROP
        settings = Settings.following(self.rtol, x0, OnFailure.NAN if drops else self.on_failure)
        dropped = spread(problem, False) if drops else None  # what it is like
        solve = Partial(
            _solve, self.solve, self.rule, dataclasses.replace(settings, on_failure=forward)
        )
        if self.rule.mode == "forward":
            push = Partial(_push, self.rule, settings)
            if has_functions((self.solve.args, self.rule)):
                solve = hoist(solve, problem, x0, y)
                push = hoist(push, problem, x0, y, _zero_tangent((problem, y)), dropped)
            return _forward_mode(solve, push, problem, x0, y)
        pull = Partial(_pull, self.rule, settings)
        if has_functions((self.solve.args, self.rule)):
            solve = hoist(solve, problem, x0, y)
            pull = hoist(pull, problem, x0, y, x0, dropped)
        return _reverse_mode(solve, pull, problem, x0, y)


def solution_map(
    problem: Problem,
    solver: Solver,
    rule: Rule | IterativeRule | None = None,
    *,
    on_failure: OnFailure = OnFailure.NAN,
) -> SolutionMap:
    """Make y -> x*(y) a differentiable function, solved by iteration.

        solve = solution_map(problem, solver=..., rule=...)
        x = solve(x0, y)

    `jax.grad`, `vjp`, `jacrev`, `vmap`, `jit` and `scan` go through `solve`, in any nesting, and
    reverse mode to any order. With `Implicit(mode="forward")` so do `jvp`, `jacfwd` and `hessian`.
    Gradients reach y and every traced value that the problem's function closes over. They are zero
    with respect to x0 and to the numbers in `solver` and `rule`: at the solution x* depends on
    none of them. The memory of a gradient does not depend on the number of iterations. All this is
    different with `Unrolled()`, which see.

    Functions must be pure, as under `jax.jit`, and are compiled once per shape. A function that is
    made anew for every call (a lambda over traced values) is compiled anew outside of `jax.jit`;
    to avoid that, write `minimum(jax.tree_util.Partial(f, values))`.

    Args:
      problem: `minimum(f)`, `root(F)` or `fixed_point(T)`.
      solver: a `Solver`, such as `Newton()` or `GradientDescent(0.1)`. A tolerance of it that is
        not set defaults to that of the dtype of x.
      rule: how the derivative is formed at the inexact solution; None is `Implicit()`. Linear
        solvers in it without a tolerance follow the solver's `rtol`. `Unrolled()` differentiates
        the iterations instead.
      on_failure: what happens when a solve fails. The inner solve fails by divergence, NaN or
        breakdown; running out of `maxiter` is no failure there, for an inexact x is an estimate
        that `with_report` judges. The adjoint solve, which has no report under `jax.grad`, also
        fails by `maxiter`. By default a failure is NaN, never a zero. `OnFailure.DROP`, for tasks
        of a `separable` problem, warns of adjoint solves that fail (through a callback to the
        host); in forward mode a tangent that cannot be computed is NaN.

    Returns:
      A `SolutionMap`: call it, or its `with_report`. x has the structure and dtypes of x0.

    Raises:
      TypeError: for a wrong kind of argument, such as `OnFailure.DROP` for a problem without tasks;
        and, at the first call, if the problem does not fit x0, with what was got and what was
        expected.
      ValueError: at the first call, for a change of variables whose inverse does not invert it.

    Example:
      >>> import jax
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: 0.5 * y * x**2 - x)  # x*(y) = 1 / y
      >>> solve = bx.solution_map(problem, solver=bx.Newton())
      >>> float(jax.grad(lambda y: solve(0.0, y))(2.0))
      -0.25

    Source:
      M. Blondel et al., "Efficient and Modular Implicit Differentiation", 2022; Z. Ye, G. Peyre,
      D. Cremers, P. Ablin, "Enhancing Hypergradients Estimation", 2024.
    """
    checks.is_component("solver", solver, Solver, "Newton()")
    if isinstance(rule, IterativeRule):
        return _make(problem, rule.bind(solver), rule, solver.rtol, on_failure)
    return _make(problem, Partial(loop.run, solver), rule, solver.rtol, on_failure)


def implicit_function(
    problem: Problem,
    solve_fn: Callable[[PyTree, PyTree], PyTree],
    rule: Rule | None = None,
    *,
    on_failure: OnFailure = OnFailure.NAN,
) -> SolutionMap:
    """Make y -> x*(y) a differentiable function, solved by anyone.

    Like `solution_map`, but x comes from `solve_fn(x0, y)`, a black box that is never
    differentiated: a closed form, Optimistix, or SciPy and scikit-learn by way of
    `jax.pure_callback`.

    Args:
      problem: what `solve_fn` solves; it alone determines the derivative.
      solve_fn: (x0, y) -> x, traceable by JAX, which returns a pytree like x0.
      rule: see `solution_map`.
      on_failure: see `solution_map`. The status of the black box is TRUNCATED, or NONFINITE; the
        report holds ||F(x, y)||, which tells how good x is.

    Returns:
      A `SolutionMap`.

    Raises:
      TypeError: if `solve_fn` is not a function, or does not return something like x0.

    Example:
      >>> import jax
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: 0.5 * y * x**2 - x)
      >>> solve = bx.implicit_function(problem, lambda x0, y: 1 / y)
      >>> float(jax.grad(lambda y: solve(0.0, y))(2.0))
      -0.25
    """
    if rule is not None:
        checks.is_component("rule", rule, Rule, "Implicit()")
    solve = Partial(_run_black_box, as_partial("solve_fn", solve_fn))
    return _make(problem, solve, rule, None, on_failure)


def _make(
    problem: Problem,
    solve: Partial,
    rule: Rule | IterativeRule | None,
    rtol: Any,
    on_failure: OnFailure,
) -> SolutionMap:
    rule = Implicit() if rule is None else rule
    checks.is_component("problem", problem, Problem, "minimum(objective)")
    if not isinstance(rule, IterativeRule):
        checks.is_component("rule", rule, Rule, "Implicit()")
    checks.is_component("on_failure", on_failure, OnFailure, "OnFailure.NAN")
    check_policy(problem, on_failure)
    return SolutionMap(problem, solve, rule, rtol, on_failure)


def _run_black_box(
    solve_fn: Partial, problem: Problem, x0: PyTree, y: PyTree
) -> tuple[PyTree, SolveReport]:
    x = trees.as_arrays(solve_fn(x0, y))
    checks.same_structure("solve_fn", x, x0, expected="x0")

    def report(problem: Problem, x: PyTree, x0: PyTree) -> SolveReport:
        norm = trees.norm(problem.optimality(x, y))
        initial_norm = trees.norm(problem.optimality(x0, y))
        status = jnp.where(jnp.isfinite(norm), code(Status.TRUNCATED), code(Status.NONFINITE))
        return SolveReport(status, jnp.ones((), jnp.int32), norm, initial_norm)

    return x, per_task(problem, report, x, x0)


# The pieces below are compiled once per shape, in eager mode too. They take everything they
# depend on as arguments, so that it can be traced, batched and differentiated.


@jax.jit
def _solve(
    solve: Partial, rule: Rule, settings: Settings, problem: Problem, x0: PyTree, y: PyTree
) -> tuple[PyTree, SolveReport]:
    """Solve, then move to the point at which the rule is evaluated."""
    problem.check(x0, y)
    rule.check(*representative(problem, x0), y)
    x, report = solve(problem, x0, y)
    if settings.on_failure is OnFailure.DROP:
        dropped = is_failure(report.status)
        x = choose(problem, dropped, x0, x)
        x, correction, dropped = correct_tasks(rule.correct, problem, x, y, settings, dropped)
        return x, report._replace(correction=correction, dropped=dropped)
    x, correction, _ = correct_tasks(rule.correct, problem, x, y, settings)
    report = report._replace(correction=correction)
    x = _guarded(settings, "inner solve", problem, report.status, x)
    if correction is not None:
        x = _guarded(settings, "correction of x", problem, correction.status, x)
    return x, report


@jax.jit
def _iterate(
    run: Partial, settings: Settings, problem: Problem, x0: PyTree, y: PyTree
) -> tuple[PyTree, SolveReport]:
    """Solve, in a loop that JAX differentiates."""
    problem.check(x0, y)
    if settings.on_failure is OnFailure.DROP:
        return run_dropping(run, problem, x0, y)  # type: ignore[arg-type]
    x, report = run(problem, x0, y, 0.0)
    return _guarded(settings, "inner solve", problem, report.status, x), report


def _guarded(
    settings: Settings, what: str, problem: Problem, status: jax.Array, x: PyTree
) -> PyTree:
    def guarded(_: Problem, status: jax.Array, x: PyTree) -> PyTree:
        return guard(settings.on_failure, what, is_failure(status), status, x)

    return per_task(problem, guarded, status, x)


@jax.jit
def _pull(
    rule: Rule,
    settings: Settings,
    problem: Problem,
    x: PyTree,
    y: PyTree,
    cotangent: PyTree,
    dropped: jax.Array | None,
) -> tuple[Problem, PyTree]:
    """Return cotangents of (problem, y)."""
    cotangent_problem, cotangent_y, report = pull_tasks(
        rule.pull, scaled(problem, x, y), x, y, cotangent, None, settings, dropped
    )
    if dropped is not None:
        # No report tells of these.
        failed = with_failed(dropped, report) & ~dropped
        worst = jnp.max(jnp.where(failed, report.solve.status, 0))
        jax.debug.callback(_warn_of_dropped, jnp.sum(failed), worst)
    return without_scaling(cotangent_problem), cotangent_y


def _warn_of_dropped(count: Any, worst: Any) -> None:
    if count > 0:
        status = Status(int(worst))
        warnings.warn(
            f"The adjoint solves of {count} tasks failed ({status.name}: {status.remedy}), and "
            "`OnFailure.DROP` left these tasks out of a gradient. An engine reports which.",
            RuntimeWarning,
            stacklevel=2,
        )


@jax.jit
def _push(
    rule: Rule,
    settings: Settings,
    problem: Problem,
    x: PyTree,
    y: PyTree,
    tangent: tuple[Problem, PyTree],
    dropped: jax.Array | None,
) -> PyTree:
    """Return the tangent of x for a tangent of (problem, y)."""
    problem, (tangent_problem, tangent_y) = scaled(problem, x, y), tangent
    tangent_problem = dataclasses.replace(tangent_problem, scaling=_zero_tangent(problem.scaling))
    return push_tasks(rule.push, problem, x, y, (tangent_problem, tangent_y), settings, dropped)


@jax.custom_vjp
def _reverse_mode(
    solve: Partial, pull: Partial, problem: Problem, x0: PyTree, y: PyTree
) -> tuple[PyTree, SolveReport]:
    return solve(problem, x0, y)


def _reverse_mode_fwd(
    solve: Partial, pull: Partial, problem: Problem, x0: PyTree, y: PyTree
) -> tuple[tuple[PyTree, SolveReport], Any]:
    # Calling the function itself, not its body, is what makes higher orders work: the residual x
    # then depends on y by this very rule.
    x, report = _reverse_mode(solve, pull, problem, x0, y)
    return (x, report), (pull, problem, x, y, report.dropped)


def _reverse_mode_bwd(residuals: Any, cotangent: tuple[PyTree, SolveReport]) -> Any:
    pull, problem, x, y, dropped = residuals
    cotangent_problem, cotangent_y = pull(problem, x, y, cotangent[0], dropped)
    return None, None, cotangent_problem, None, cotangent_y


_reverse_mode.defvjp(_reverse_mode_fwd, _reverse_mode_bwd)


@jax.custom_jvp
def _forward_mode(
    solve: Partial, push: Partial, problem: Problem, x0: PyTree, y: PyTree
) -> tuple[PyTree, SolveReport]:
    return solve(problem, x0, y)


@_forward_mode.defjvp
def _forward_mode_jvp(primals: Any, tangents: Any) -> Any:
    _, push, problem, _, y = primals
    x, report = _forward_mode(*primals)
    _, _, tangent_problem, _, tangent_y = tangents
    tangent_x = push(problem, x, y, (tangent_problem, tangent_y), report.dropped)
    return (x, report), (tangent_x, _zero_tangent(report))


def _zero_tangent(tree: PyTree) -> PyTree:
    return jax.tree.map(jax.custom_derivatives.zero_from_primal, tree)
