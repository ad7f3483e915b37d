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
    """Fixed-point iteration: x <- x - damping * F(x, y), where F = x - T(x, y).

    With `damping=1` that is Picard's x <- T(x, y). With `memory` > 0 it is Anderson acceleration:
    the last `memory` differences of x and F give the combination of iterates whose linearised
    residual is smallest. On a minimum or a root, F is the gradient or the residual itself.

    Args:
      damping: the part of the step that is taken, above 0; above 1 over-relaxes.
      rtol: stop at ||F(x, y)|| <= max(rtol ||F(x0, y)||, atol).
      atol: see `rtol`; in the unit of F.
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

    damping: Any = 1.0
    rtol: Any = None
    atol: Any = None
    maxiter: Any = 1000
    _: dataclasses.KW_ONLY
    memory: int = dataclasses.field(default=0, metadata={"static": True})

    def __post_init__(self) -> None:
        base.check_stopping(self)
        checks.positive("damping", self.damping)
        checks.not_negative("memory", self.memory)

    def init(self, problem: Problem, x: PyTree, y: PyTree) -> base.Iterate:
        optimality = problem.optimality(x, y)
        if self.memory == 0:
            return base.Iterate(x, optimality)
        empty = jnp.zeros((self.memory, trees.dimension(x)), trees.dtype(x))
        return base.Iterate(x, optimality, _History(empty, empty, jnp.zeros((), jnp.int32)))

    def step(self, problem: Problem, iterate: base.Iterate, y: PyTree) -> base.Iterate:
        move = trees.scale(-jnp.asarray(self.damping), iterate.optimality)
        if self.memory > 0:
            move = self._accelerate(move, iterate)
        x = trees.add_scaled(iterate.x, 1, move)
        optimality = problem.optimality(x, y)
        if self.memory == 0:
            return base.Iterate(x, optimality)
        moves, changes, steps = iterate.state
        slot = steps % self.memory
        change = optax.tree.sub(optimality, iterate.optimality)
        history = _History(
            moves.at[slot].set(ravel_pytree(move)[0]),
            changes.at[slot].set(ravel_pytree(change)[0]),
            steps + 1,
        )
        return base.Iterate(x, optimality, history)

    def _accelerate(self, move: PyTree, iterate: base.Iterate) -> PyTree:
        # gamma minimises ||F - changes^T gamma||; the move is then that of the combined iterate,
        # -damping F - (moves - damping changes)^T gamma. The rows of changes are scaled to length
        # one, so that a ridge of the size of rounding keeps the small system regular, and rows
        # that are not in use yet (zero) get weight zero.
        moves, changes, _ = iterate.state
        flat, unravel = ravel_pytree(iterate.optimality)
        lengths = jnp.linalg.norm(changes, axis=1)
        lengths = jnp.where(lengths > 0, lengths, 1)
        rows = changes / lengths[:, None]
        ridge = 10 * jnp.finfo(flat.dtype).eps * jnp.eye(self.memory, dtype=flat.dtype)
        gamma = jnp.linalg.solve(rows @ rows.T + ridge, rows @ flat) / lengths
        correction = (moves - jnp.asarray(self.damping, flat.dtype) * changes).T @ gamma
        return trees.add_scaled(move, -1, unravel(correction))
