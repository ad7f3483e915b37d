"""A loop over solver steps that JAX differentiates."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevax import _mesh as mesh
from bilevax import _trees as trees
from bilevax._loop import Progress, begin, is_running, report
from bilevax._problems import Problem
from bilevax._results import SolveReport
from bilevax._separable import per_task, spread
from bilevax.solvers import Solver

PyTree = Any


@trees.register
@dataclasses.dataclass(frozen=True)
class Sweep:
    """Which steps of a run are differentiated, and what is kept of it for that.

    Attributes:
      steps: of the longest run.
      last: only so many steps at the end are differentiated, what comes before them is a constant;
        None for all.
      checkpoints: how many iterates are kept, between which the others are computed anew; None
        keeps all.
      is_fixed: whether all steps are taken, but for failures: there is no tolerance to stop by.
    """

    steps: int = dataclasses.field(metadata={"static": True})
    last: int | None = dataclasses.field(default=None, metadata={"static": True})
    checkpoints: int | None = dataclasses.field(default=None, metadata={"static": True})
    is_fixed: bool = dataclasses.field(default=False, metadata={"static": True})


def unroll(
    sweep: Sweep, solver: Solver, problem: Problem, x0: PyTree, y: PyTree, scale: Any = 0.0
) -> tuple[PyTree, SolveReport]:
    """Iterate as `run` does, in a loop of bounded length that JAX differentiates in any mode.

    Of each step the iterate alone is kept: what happens inside is computed anew in the backward
    pass. So is whatever lies between two checkpoints. Steps that are not taken cost nothing, under
    `jax.vmap` once no lane takes any.
    """

    def one(problem: Problem, x0: PyTree, scale: jax.Array) -> tuple[PyTree, SolveReport]:
        return _unroll(sweep, solver, solver.posed(problem, x0, y), x0, y, scale)

    return per_task(problem, one, x0, spread(problem, scale))


def _unroll(
    sweep: Sweep, solver: Solver, problem: Problem, x0: PyTree, y: PyTree, scale: Any
) -> tuple[PyTree, SolveReport]:
    first, step = begin(solver, problem, x0, y, scale)
    if sweep.last is None:
        end = _iterate(step, is_running, first, sweep.steps, sweep)
    else:
        before, end = jax.lax.stop_gradient(_until_the_last(first, step, sweep.last))
        # What the solver knows at x depends on y; what it remembers is a constant. But a run that
        # is no longer than that depends on all that its start does.
        iterate = before.iterate
        evaluation = _as_function(iterate.evaluation, solver, problem, iterate.x, y)
        iterate = iterate._replace(evaluation=evaluation)
        is_whole = end.iterations <= sweep.last
        whole, part = jax.tree.map(jnp.asarray, (first, before._replace(iterate=iterate)))
        reached = _iterate(
            step,
            lambda progress: progress.iterations < end.iterations,
            trees.where(is_whole, whole, part),
            sweep.last,
            sweep,
        )
        end = end._replace(iterate=reached.iterate)
    x, summary = report(solver, problem, y, first, end)
    return x, jax.lax.stop_gradient(summary)


def _iterate(
    step: Callable[[Progress], Progress],
    is_due: Callable[[Progress], jax.Array],
    start: Progress,
    length: int,
    sweep: Sweep,
) -> Progress:
    """Take steps while they are due, at most `length`, in a loop that JAX differentiates."""

    # The backward pass of a `cond` copies what its branches read, such as the data. It pays where
    # many steps are not due.
    def when(due: jax.Array, steps: Callable[[Progress], Progress], start: Progress) -> Progress:
        if sweep.is_fixed:
            return steps(start)
        return mesh.cond(trees.in_any_lane(due), steps, lambda start: start, start)

    def one(progress: Progress, _: None) -> tuple[Progress, None]:
        due, progress = is_due(progress), _without_norm(progress)
        following = when(due, step, progress)
        return trees.where(due, _without_norm(following), progress), None

    def several(progress: Progress, _: None) -> tuple[Progress, None]:
        count = -(-length // segments)
        return when(is_due(progress), lambda start: scan(one, start, count), progress), None

    # What is kept of a body is its input and what it decided, and nothing that is read inside.
    kept = jax.checkpoint_policies.save_only_these_names(trees.DECISION)

    def scan(body: Callable[..., Any], start: Progress, count: int) -> Progress:
        body = jax.checkpoint(body, prevent_cse=False, policy=kept)
        return mesh.scan(body, start, None, length=count)[0]

    start = jax.tree.map(jnp.asarray, start)
    if sweep.checkpoints is None:
        return scan(one, start, length)
    segments = max(1, min(sweep.checkpoints, length))
    return scan(several, start, segments)


@jax.custom_jvp
def _as_function(
    evaluation: PyTree, solver: Solver, problem: Problem, x: PyTree, y: PyTree
) -> PyTree:
    """Return an evaluation that is known, with its derivative.

    Not what is evaluated anew: where F is near rounding, its last bits are other ones there than in
    the run, which may have gone on from an F that would be zero here.
    """
    return evaluation


@_as_function.defjvp
def _as_function_jvp(primals: Any, tangents: Any) -> tuple[PyTree, PyTree]:
    evaluation, *arguments = primals

    def evaluate(solver: Solver, problem: Problem, x: PyTree, y: PyTree) -> PyTree:
        return solver.evaluate(problem, x, y)[0]

    return evaluation, jax.jvp(evaluate, tuple(arguments), tuple(tangents[1:]))[1]


def _without_norm(progress: Progress) -> Progress:
    # ||F|| decides when to stop; its derivative, which nobody needs, is not finite at zero.
    iterate = progress.iterate
    residual = jax.lax.stop_gradient(iterate.residual)
    return progress._replace(iterate=iterate._replace(residual=residual))


def _until_the_last(
    first: Progress, step: Callable[[Progress], Progress], last: int
) -> tuple[Progress, Progress]:
    """Return a run before its last steps, and at its end.

    Snapshots are taken every `last` steps. The one before the latest is at most twice `last` steps
    from the end, and the run is repeated from there.
    """

    def onward(state: tuple[Progress, Progress, Progress]) -> tuple[Progress, Progress, Progress]:
        progress, older, newer = state
        due = progress.iterations % last == 0
        older, newer = trees.where(due, (newer, progress), (older, newer))
        return step(progress), older, newer

    first = jax.tree.map(jnp.asarray, first)
    end, older, _ = mesh.while_loop(
        lambda state: is_running(state[0]), onward, (first, first, first)
    )
    before = mesh.while_loop(
        lambda progress: progress.iterations < end.iterations - last, step, older
    )
    return before, end
