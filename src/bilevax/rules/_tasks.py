"""Rules on separable problems: each task by itself, cotangents of what they share added up.

On other problems the three functions below do what the methods of a rule do that they are given.
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
from bilevax._separable import Separable, per_task

PyTree = Any


def correct_tasks(
    correct: Callable[..., Any], problem: Problem, x: PyTree, y: PyTree, settings: Any
) -> tuple[PyTree, LinearReport | None]:
    """Return what `Rule.correct` makes of each task."""
    return per_task(problem, lambda problem, x: correct(problem, x, y, settings), x)


def pull_tasks(
    pull: Callable[..., Any],
    problem: Problem,
    x: PyTree,
    y: PyTree,
    cotangent: PyTree,
    guess: PyTree | None,
    settings: Any,
) -> tuple[Problem, PyTree, RuleReport]:
    """Return what `Rule.pull` makes of each task, with the sum over tasks as the cotangent of y."""
    if not isinstance(problem, Separable):
        return pull(problem, x, y, cotangent, guess, settings)

    def one(problem: Problem, x: PyTree, cotangent: PyTree, guess: PyTree | None) -> Any:
        cotangent_problem, cotangent_y, report = pull(problem, x, y, cotangent, guess, settings)
        function, data = cotangent_problem.function.args
        return jax.tree.map(_without_float0, (function, data, cotangent_y)), report

    (functions, tasks, ys), report = per_task(problem, one, x, cotangent, guess)
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

    return per_task(problem, one, x, tangent_tasks)


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
