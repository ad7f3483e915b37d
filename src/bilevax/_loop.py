"""The loop over solver steps: when to stop, and why it stopped."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._problems import Problem
from bilevax._results import SolveReport
from bilevax._separable import per_task, spread
from bilevax._status import Status, code, out_of_steps
from bilevax.linear import default_rtol
from bilevax.solvers import Iterate, Solver

PyTree = Any
_RUNNING = np.int32(-1)


class Progress(NamedTuple):
    """How far a run is."""

    iterate: Iterate
    iterations: jax.Array
    status: jax.Array


def run(
    solver: Solver, problem: Problem, x0: PyTree, y: PyTree, scale: Any = 0.0
) -> tuple[PyTree, SolveReport]:
    """Iterate a solver from x0 until ||F(x, y)|| <= max(rtol ||F(x0, y)||, atol); per task.

    An `atol` of None is ten times the rounding error of F at a solution near x0, which a relative
    tolerance must not undercut where x0 is a solution already.

    Where x0 is a warm start, `scale` is ||F|| at the cold one and stands in for ||F(x0, y)||:
    relative to what is small already, no tolerance could be met, and relative to what a leap of y
    has made large, any. One that is zero or not finite is no scale.

    Ends with CONVERGED; MAXITER (TRUNCATED if both tolerances are zero); STALLED where the solver
    cannot improve its iterate; DIVERGED where ||F|| has grown by 1 / eps; NONFINITE.

    Returns:
      The last iterate and a `SolveReport`.
    """

    def one(problem: Problem, x0: PyTree, scale: jax.Array) -> tuple[PyTree, SolveReport]:
        first, step = begin(solver, solver.posed(problem, x0, y), x0, y, scale)
        return report(first, jax.lax.while_loop(is_running, step, first))

    return per_task(problem, one, x0, spread(problem, scale))


def begin(
    solver: Solver, problem: Problem, x0: PyTree, y: PyTree, scale: Any
) -> tuple[Progress, Callable[[Progress], Progress]]:
    """Return the start of a run, and its step."""
    first = solver.init(problem, x0, y)
    initial_norm = first.residual
    rtol = jnp.asarray(stopping_rtol(solver, x0), initial_norm.dtype)
    atol = smallest_target(solver, problem, x0, y, initial_norm)
    scale = scale_of(scale, initial_norm)
    target = jnp.maximum(rtol * scale, atol)
    first = solver.toward(first, scale, target)
    judge, step = _stepper(
        solver,
        problem,
        y,
        lambda iterate, _: iterate.residual <= target,
        initial_norm,
        out_of_steps(solver.rtol, solver.atol),
    )
    none = jnp.zeros((), jnp.int32)
    return Progress(first, none, judge(first, none)), step


def scale_of(cold: Any, initial_norm: jax.Array) -> jax.Array:
    """Return what a relative tolerance refers to: ||F|| at the cold start, if that is a scale."""
    cold = jnp.asarray(cold, initial_norm.dtype)
    return trees.where(jnp.isfinite(cold) & (cold > 0), cold, initial_norm)


def is_running(progress: Progress) -> jax.Array:
    """Tell whether a run goes on."""
    return progress.status == _RUNNING


def report(first: Progress, end: Progress) -> tuple[PyTree, SolveReport]:
    """Return the last iterate and the report of a run."""
    norms = end.iterate.residual, first.iterate.residual
    return end.iterate.x, SolveReport(end.status, end.iterations, *norms)


def smallest_target(
    solver: Solver, problem: Problem, x0: PyTree, y: PyTree, like: jax.Array
) -> jax.Array:
    """Return `atol`, or in its place ten times the rounding error of F at a solution near x0.

    Where steps at a solution have no derivative, it is that at least.
    """
    checks.single_numbers(solver)
    if solver.atol is not None and solver.is_smooth is True:
        return jnp.asarray(solver.atol, like.dtype)
    size = problem.terms_norm(x0, y)
    rounding = 10 * trees.epsilon(x0) * jnp.where(jnp.isfinite(size), size, 0)
    if solver.atol is None:
        return rounding
    atol = jnp.asarray(solver.atol, like.dtype)
    return jnp.where(solver.is_smooth, atol, jnp.maximum(atol, rounding))


def advance(
    solver: Solver,
    problem: Problem,
    y: PyTree,
    start: tuple[Iterate, jax.Array],
    reached: Callable[[Iterate, jax.Array], jax.Array],
    initial_norm: jax.Array,
    exhausted: jax.Array,
) -> Progress:
    """Run on from an iterate and a count of iterations until `reached` holds of the two.

    Ends with CONVERGED; `exhausted` where the count has come to `maxiter`; STALLED; DIVERGED where
    ||F|| has grown from `initial_norm` by 1 / eps; NONFINITE.
    """
    judge, step = _stepper(solver, problem, y, reached, initial_norm, exhausted)
    return jax.lax.while_loop(is_running, step, Progress(*start, judge(*start)))


def _stepper(
    solver: Solver,
    problem: Problem,
    y: PyTree,
    reached: Callable[[Iterate, jax.Array], jax.Array],
    initial_norm: jax.Array,
    exhausted: jax.Array,
) -> tuple[Callable[[Iterate, jax.Array], jax.Array], Callable[[Progress], Progress]]:
    """Return what judges an iterate, and what takes a step and judges its result."""

    def judge(iterate: Iterate, iterations: jax.Array) -> jax.Array:
        norm, epsilon = iterate.residual, trees.epsilon(iterate.x)
        status = trees.where(iterations >= solver.maxiter, exhausted, _RUNNING)
        status = trees.where(iterate.stalled, code(Status.STALLED), status)
        diverged = norm * epsilon - 1 > initial_norm
        status = trees.where(diverged, code(Status.DIVERGED), status)
        status = trees.where(reached(iterate, iterations), code(Status.CONVERGED), status)
        return trees.where(jnp.isfinite(norm), status, code(Status.NONFINITE))

    def step(progress: Progress) -> Progress:
        iterate = solver.step(problem, progress.iterate, y)
        iterations = progress.iterations + 1
        return Progress(iterate, iterations, judge(iterate, iterations))

    return judge, step


def stopping_rtol(solver: Solver, x: PyTree) -> Any:
    """Return the relative tolerance a solver stops at: its own, or the default of the dtype."""
    return default_rtol(x) if solver.rtol is None else solver.rtol
