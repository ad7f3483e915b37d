"""Rules on separable problems: each task by itself, cotangents of what they share added up.

On other problems the three functions below do what the methods of a rule do that they are given.

Where tasks may be dropped, `dropped` tells which are: they are constants, and the derivatives of
the others are what they would be without them. It is None where no task may be.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from bilevax import _trees as trees
from bilevax._problems import Problem
from bilevax._results import LinearReport, RuleReport
from bilevax._separable import Separable, choose, nothing_for, per_task, without
from bilevax._status import is_failure, is_unsolved

PyTree = Any


def correct_tasks(
    correct: Callable[..., Any],
    problem: Problem,
    x: PyTree,
    y: PyTree,
    settings: Any,
    dropped: jax.Array | None = None,
) -> tuple[PyTree, LinearReport | None, jax.Array | None]:
    """Return what `Rule.correct` makes of each task, and which are dropped now: they stay at x."""

    def one(problem: Problem, x: PyTree) -> tuple[PyTree, LinearReport | None]:
        return correct(problem, x, y, settings)

    corrected, report = per_task(problem, one, x)
    if dropped is None or report is None:
        return corrected, report, dropped
    dropped = dropped | is_failure(report.status)
    return choose(problem, dropped, x, corrected), report, dropped


def pull_tasks(
    pull: Callable[..., Any],
    problem: Problem,
    x: PyTree,
    y: PyTree,
    cotangent: PyTree,
    guess: PyTree | None,
    settings: Any,
    dropped: jax.Array | None = None,
) -> tuple[Problem, PyTree, RuleReport]:
    """Return what `Rule.pull` makes of each task, with the sum over tasks as the cotangent of y.

    Tasks whose adjoint solve fails are dropped too; see `with_failed`.
    """
    if not isinstance(problem, Separable):
        return pull(problem, x, y, cotangent, guess, settings)
    tasks_of = problem
    if dropped is not None:
        cotangent = nothing_for(problem, dropped, cotangent)
        tasks_of, (x,) = without(problem, dropped, x)

    def one(problem: Problem, x: PyTree, cotangent: PyTree, guess: PyTree | None) -> Any:
        cotangent_problem, cotangent_y, report = pull(problem, x, y, cotangent, guess, settings)
        function, data = cotangent_problem.function.args
        return jax.tree.map(_without_float0, (function, data, cotangent_y)), report

    (functions, tasks, ys), report = per_task(tasks_of, one, x, cotangent, guess)
    if dropped is not None:
        dropped = with_failed(dropped, report)
        functions, tasks, ys = nothing_for(problem, dropped, (functions, tasks, ys))
    # XLA fuses the sum with what is summed: nothing is kept per task.
    total = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), (functions, ys))
    function, cotangent_y = jax.tree.map(_with_float0, total, (problem.function, y))
    tasks = jax.tree.map(_with_float0, tasks, problem.tasks)
    cotangents = dataclasses.replace(
        problem,
        function=function,
        tasks=tasks,
        preconditioner=_without_effect(problem.preconditioner),
        scaling=_without_effect(problem.scaling),
    )
    return cotangents, cotangent_y, report


def push_tasks(
    push: Callable[..., Any],
    problem: Problem,
    x: PyTree,
    y: PyTree,
    tangent: tuple[Problem, PyTree],
    settings: Any,
    dropped: jax.Array | None = None,
) -> PyTree:
    """Return what `Rule.push` makes of each task."""
    if not isinstance(problem, Separable):
        return push(problem, x, y, tangent, settings)
    tangent_problem, tangent_y = tangent
    assert isinstance(tangent_problem, Separable)
    function = tangent_problem.function
    tangent_tasks = jax.tree.map(_without_float0, tangent_problem.tasks)

    def one(problem: Problem, x: PyTree, tangent_data: PyTree) -> PyTree:
        _, data = problem.function.args
        tangent_data = jax.tree.map(_with_float0, tangent_data, data)
        tangent_function = Partial(problem.function.func, function, tangent_data)
        tangent_problem = dataclasses.replace(
            problem,
            function=tangent_function,
            preconditioner=_without_effect(problem.preconditioner),
            scaling=_without_effect(problem.scaling),
        )
        return push(problem, x, y, (tangent_problem, tangent_y), settings)

    if dropped is None:
        return per_task(problem, one, x, tangent_tasks)
    kept, (x, tangent_tasks) = without(problem, dropped, x, tangent_tasks)
    pushed = per_task(kept, one, x, tangent_tasks)
    return nothing_for(problem, dropped, pushed)


def with_failed(dropped: jax.Array, report: RuleReport) -> jax.Array:
    """Return which tasks are dropped, with those whose adjoint solve failed."""
    return dropped | is_unsolved(report.solve.status)


def _without_effect(part: PyTree) -> PyTree:
    """Return zeros like a part of a problem on which no solution depends."""
    return jax.tree.map(jax.custom_derivatives.zero_from_primal, part)


# Batched arrays of float0 are beyond `jax.vmap`.


def _without_float0(leaf: Any) -> jax.Array:
    return jnp.zeros(leaf.shape) if trees.is_float0(leaf) else leaf


def _with_float0(leaf: jax.Array, like: jax.Array) -> Any:
    if jnp.issubdtype(like.dtype, jnp.floating):
        return leaf
    return jax.custom_derivatives.zero_from_primal(like)
