"""Fixed-point iteration: Picard, damped, Anderson."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax.tree
from jax.flatten_util import ravel_pytree

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._problems import Problem
from bilevax.solvers import _base as base

PyTree = Any


class _History(NamedTuple):
    moves: jax.Array  # (memory, dim): differences of successive iterates
    changes: jax.Array  # (memory, dim): differences of successive F
    steps: jax.Array


@trees.register
@dataclasses.dataclass(frozen=True)
class FixedPointIteration(base.Solver):
    """Fixed-point iteration: Picard's x <- T(x, y), damped, or accelerated.

        x <- x - damping * F(x, y),   F = x - T(x, y)

    With `memory` > 0 it is Anderson acceleration: the last `memory` differences of x and F give
    the combination of iterates whose linearised residual is smallest. On a minimum or a root, F is
    the gradient or the residual itself, and T = x - F.

    Args:
      damping: the part of the step that is taken, above 0; above 1 over-relaxes. None takes the
        whole step.
      rtol: stop at ||F(x, y)|| <= max(rtol ||F(x0, y)||, atol).
      atol: see `rtol`; in the unit of F. None is the rounding error of F, see `Solver`.
      maxiter: steps at most.
      memory: differences kept (static); 0 for none. Memory use is 2 * memory vectors.

    Raises:
      ValueError: for a damping that is not positive, a negative tolerance, `maxiter` or `memory`.

    Example:
      >>> import jax.numpy as jnp
      >>> import bilevax as bx
      >>> problem = bx.fixed_point(lambda x, y: jnp.cos(y * x))
      >>> solve = bx.solution_map(problem, solver=bx.FixedPointIteration(memory=2))
      >>> round(float(solve(0.5, 1.0)), 4)
      0.7391

    Source:
      D. G. Anderson, "Iterative Procedures for Nonlinear Integral Equations", 1965.
    """

    damping: Any = None
    rtol: Any = None
    atol: Any = None
    maxiter: Any = 1000
    _: dataclasses.KW_ONLY
    memory: int = dataclasses.field(default=0, metadata={"static": True})

    def __post_init__(self) -> None:
        base.check_stopping(self)
        if self.damping is not None:
            checks.positive("damping", self.damping)
        checks.not_negative("memory", self.memory, whole=True)

    def evaluate(self, problem: Problem, x: PyTree, y: PyTree) -> tuple[PyTree, jax.Array]:
        image = problem.image(x, y)
        return image, problem.norm(optax.tree.sub(x, image))

    def init(self, problem: Problem, x: PyTree, y: PyTree) -> base.Iterate:
        evaluation = self.evaluate(problem, x, y)
        if self.memory == 0:
            return base.Iterate(x, *evaluation)
        empty = jnp.zeros((self.memory, trees.dimension(x)), trees.dtype(x))
        return base.Iterate(x, *evaluation, _History(empty, empty, jnp.zeros((), jnp.int32)))

    def step(self, problem: Problem, iterate: base.Iterate, y: PyTree) -> base.Iterate:
        if self.memory == 0:
            x = iterate.evaluation
            if self.damping is not None:
                move = optax.tree.sub(iterate.evaluation, iterate.x)
                x = trees.add_scaled(iterate.x, self.damping, move)
            return base.Iterate(x, *self.evaluate(problem, x, y))
        moves, changes, steps = iterate.state
        optimality = optax.tree.sub(iterate.x, iterate.evaluation)
        move = self._accelerate(optimality, moves, changes)
        x = optax.tree.add(iterate.x, move)
        image, norm = self.evaluate(problem, x, y)
        following = optax.tree.sub(x, image)
        slot = steps % self.memory
        history = _History(
            moves.at[slot].set(ravel_pytree(move)[0]),
            changes.at[slot].set(ravel_pytree(optax.tree.sub(following, optimality))[0]),
            steps + 1,
        )
        return base.Iterate(x, image, norm, history)

    def _accelerate(self, optimality: PyTree, moves: jax.Array, changes: jax.Array) -> PyTree:
        # gamma minimises ||F - changes^T gamma||; the move is then that of the combined iterate,
        # -damping F - (moves - damping changes)^T gamma. The rows of changes are scaled to length
        # one, so that a ridge of the size of rounding keeps the small system regular, and rows
        # that are not in use yet (zero) get weight zero. The scaling cancels, and a derivative of a
        # length has no value at zero.
        flat, unravel = ravel_pytree(optimality)
        damping = jnp.asarray(1 if self.damping is None else self.damping, flat.dtype)
        lengths = jnp.linalg.norm(jax.lax.stop_gradient(changes), axis=1)
        lengths = jax.lax.stop_gradient(jnp.where(lengths > 0, lengths, 1))
        rows = changes / lengths[:, None]
        ridge = 10 * jnp.finfo(flat.dtype).eps * jnp.eye(self.memory, dtype=flat.dtype)
        gamma = jnp.linalg.solve(rows @ rows.T + ridge, rows @ flat) / lengths
        return unravel(-damping * flat - (moves - damping * changes).T @ gamma)
