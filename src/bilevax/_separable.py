"""Separable inner problems: many independent ones that share y, as one vmapped program."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax import _mesh as mesh
from bilevax import _trees as trees
from bilevax._failure import OnFailure
from bilevax._operator import Scaling
from bilevax._problems import Problem

PyTree = Any


@trees.register
@dataclasses.dataclass(frozen=True)
class Separable(Problem):
    """Independent inner problems F_i(x_i, y) = 0; made by `separable`.

    Attributes:
      function: the user's function of (x_i, y, task_i).
      structure: what is declared of the Jacobian of each task.
      tasks: the data of all tasks, with a leading axis.
      kind: the class of the problem of one task.
      preconditioner: the user's function of (x_i, y, v_i, task_i), or None.
      scaling: of the rows and columns of F_1, one per task; or None.
    """

    tasks: PyTree
    kind: type[Problem] = dataclasses.field(metadata={"static": True})

    def task(self, data: PyTree) -> Problem:
        """Return the inner problem of one task."""
        preconditioner = self.preconditioner
        if preconditioner is not None:
            preconditioner = Partial(_on_task, preconditioner, data)
        function = Partial(_on_task, self.function, data)
        return self.kind(function, self.structure, preconditioner=preconditioner)

    def optimality(self, x: PyTree, y: PyTree) -> PyTree:
        return per_task(self, lambda problem, x: problem.optimality(x, y), x)

    def near_inverse(self, x: PyTree, y: PyTree, v: PyTree) -> PyTree:
        return per_task(self, lambda problem, x, v: problem.near_inverse(x, y, v), x, v)

    def varying(self, x: PyTree, y: PyTree) -> PyTree:
        def values(x: PyTree) -> PyTree:
            return per_task(self, lambda problem, x: problem.function(x, y), x)

        return mesh.vary_with(x, values)

    def hoisted(self, x: PyTree, y: PyTree, *task: PyTree) -> Problem:
        self._check_axis(x)
        return super().hoisted(_first(x), y, _first(self.tasks))

    def check(self, x: PyTree, y: PyTree) -> None:
        checks.inner_variable(x)
        self._check_axis(x)
        problem, x = representative(self, x)
        problem.check(x, y)

    def _check_axis(self, x: PyTree) -> None:
        count = _count(self.tasks)
        for path, leaf in jax.tree_util.tree_leaves_with_path(x):
            if jnp.shape(leaf)[:1] != (count,):
                raise TypeError(
                    f"`x{jax.tree_util.keystr(path)}` must have a leading axis of {count}, one "
                    f"entry per task; got {checks.describe(leaf)}."
                )


def separable(problem: Problem, tasks: PyTree) -> Separable:
    """Pose many independent inner problems that share y: tasks, cross-validation folds, examples.

        x*_i(y) solves F(x_i, y, task_i) = 0 for i = 1 ... n;   x = (x_1, ..., x_n)

    Each task has its own stopping and its own adjoint system, all in one vmapped program: no task
    waits for tolerances of another, and no stacked system is ever solved. The result equals that of
    a loop over tasks. Reports have one entry per task.

    In g(x, y), x has the leading axis: whether tasks are summed, averaged or weighted is up to g.
    To start all tasks at one point, use `jnp.broadcast_to`.

    Args:
      problem: `minimum(f)`, `root(F)` or `fixed_point(T)` of a function of three arguments,
        (x_i, y, task_i); a preconditioner takes (x_i, y, v_i, task_i).
      tasks: the data of all tasks, a pytree of arrays with a common leading axis. Gradients through
        a `solution_map` reach it, as they reach whatever a function closes over; that of an engine
        is with respect to y alone.

    Returns:
      A `Separable`, a problem for `solution_map` and engines whose x has the leading axis too.

    Raises:
      TypeError: if `problem` is no problem of a single task, or `tasks` has no leading axis; and,
        once it meets x, if x does not have it.
      ValueError: if leading axes differ, or there are no tasks.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import bilevax as bx
      >>> means = bx.minimum(lambda x, y, data: 0.5 * y * (x - data) ** 2 + 0.5 * x**2)
      >>> problem = bx.separable(means, tasks=jnp.array([1.0, 2.0, 3.0]))
      >>> solve = bx.solution_map(problem, solver=bx.Newton())
      >>> [float(x) for x in solve(jnp.zeros(3), 1.0)]
      [0.5, 1.0, 1.5]
      >>> float(jax.grad(lambda y: jnp.mean(solve(jnp.zeros(3), y)))(1.0))
      0.5
    """
    checks.is_component("problem", problem, Problem, "minimum(objective)")
    if isinstance(problem, Separable):
        raise TypeError("`problem` must be the problem of a single task, got a separable one.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(tasks):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            raise TypeError(
                f"`tasks{jax.tree_util.keystr(path)}` is complex; only real arrays are supported. "
                "Pass the real and imaginary parts as two leaves."
            )
        if jnp.ndim(leaf) == 0:
            raise TypeError(
                f"`tasks{jax.tree_util.keystr(path)}` must have a leading axis, one entry per "
                f"task; got {checks.describe(leaf)}."
            )
    counts = {jnp.shape(leaf)[0] for leaf in jax.tree.leaves(tasks)}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            "`tasks` must have arrays with one common leading axis that is not empty, "
            f"got {checks.describe(tasks)}."
        )
    tasks = trees.as_arrays(tasks)
    return Separable(
        problem.function,
        problem.structure,
        tasks,
        type(problem),
        preconditioner=problem.preconditioner,
    )


def per_task(problem: Problem, function: Callable[..., PyTree], *stacked: PyTree) -> PyTree:
    """Return function(problem, *stacked), for each task by itself where there are several."""
    if not isinstance(problem, Separable):
        return function(problem, *stacked)

    def one(data: PyTree, scaling: Scaling | None, *arguments: PyTree) -> PyTree:
        task = dataclasses.replace(problem.task(data), scaling=scaling)
        return function(task, *arguments)

    return mesh.vmap(one)(problem.tasks, problem.scaling, *stacked)


def representative(problem: Problem, x: PyTree) -> tuple[Problem, PyTree]:
    """Return the problem of the first task and its x, or what is given if there are no tasks."""
    if not isinstance(problem, Separable):
        return problem, x
    problem._check_axis(x)
    return problem.task(_first(problem.tasks)), _first(x)


def spread(problem: Problem, value: Any) -> jax.Array:
    """Return a number once per task, unless it is that already."""
    if not isinstance(problem, Separable):
        return value
    return jnp.broadcast_to(value, (_count(problem.tasks),))


def choose(problem: Problem, condition: jax.Array, a: PyTree, b: PyTree) -> PyTree:
    """Return a for the tasks for which a condition holds, and b for the others."""
    return per_task(problem, lambda _, *arguments: trees.where(*arguments), condition, a, b)


def without(problem: Separable, dropped: jax.Array, *stacked: PyTree) -> tuple[Problem, PyTree]:
    """Return the problem, and what else there is per task, with one that is kept for each dropped.

    What comes of the substitutes is to be multiplied by zero, or replaced: unlike the tasks that
    they stand for, they are finite, to any order of derivatives. Integers and keys have no
    derivative, and go along.
    """
    kept = jnp.argmin(dropped)  # the first

    def substitute(leaf: jax.Array) -> jax.Array:
        condition = dropped.reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.where(condition, leaf[kept], leaf)

    tasks, *others = jax.tree.map(substitute, (problem.tasks, *stacked))
    return dataclasses.replace(problem, tasks=tasks), others


def nothing_for(problem: Problem, dropped: jax.Array, derivative: PyTree) -> PyTree:
    """Return a derivative per task, with zero for dropped ones; NaN if nothing is left of it."""
    unknown = all_of(dropped)
    factor = jnp.where(unknown, jnp.nan, 0)

    # A product, so that what JAX makes of it by transposition is NaN too.
    def nothing(leaf: jax.Array) -> jax.Array:
        return jnp.where(unknown, factor.astype(leaf.dtype) * leaf, 0)

    return choose(problem, dropped, jax.tree.map(nothing, derivative), derivative)


def all_of(dropped: jax.Array) -> jax.Array:
    """Tell whether nothing is left."""
    return jnp.sum(~dropped) == 0  # unlike `all`, a sum may stand where JAX differentiates


def check_policy(problem: Problem, on_failure: OnFailure) -> None:
    """Raise if there are no tasks, but they are to be dropped where they fail."""
    if on_failure is OnFailure.DROP and not isinstance(problem, Separable):
        raise TypeError(
            "`on_failure=OnFailure.DROP` drops tasks of a `separable(problem, tasks)`; a single "
            "problem has nothing beside it to go on with. Take `OnFailure.NAN` or `RETURN`."
        )


def not_separable(problem: Problem) -> None:
    """Raise where there are no certificates of many tasks."""
    if isinstance(problem, Separable):
        raise TypeError(
            "`problem` must not be separable here: certificates judge one inner problem. "
            "Certify single tasks: `minimum(lambda x, y: f(x, y, task))`."
        )


def _on_task(function: Partial, data: PyTree, *arguments: PyTree) -> PyTree:
    return function(*arguments, data)


def _count(tasks: PyTree) -> int:
    return jax.tree.leaves(tasks)[0].shape[0]


def _first(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: mesh.take(leaf, jnp.zeros(1, int))[0], tree)
