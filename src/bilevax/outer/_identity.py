"""What tells one bilevel problem from another: numbers at the start of a run."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevax import _checks as checks
from bilevax.outer._checkpointing import Identity
from bilevax.outer._maid import MaidStep
from bilevax.outer._state import BilevelState
from bilevax.outer._step import OuterStep

PyTree = Any

# What the numbers are called in messages. The first that differs is named, so y stands before what
# changes with it.
_NAMES = (
    "y, along a fixed direction,",
    "the outer objective",
    "its gradient, along a fixed direction,",
    "F, along a fixed direction,",
    "F near x0, along a fixed direction,",
)


def identify(step: OuterStep | MaidStep, state: BilevelState, batched: bool) -> Identity:
    """Return what tells this problem from others: numbers at its start, and shapes."""
    numbers = zip(_NAMES, _numbers(step, state, batched=batched), strict=True)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    shapes = {jax.tree_util.keystr(path): checks.describe(leaf) for path, leaf in leaves}
    return Identity({name: np.ravel(number).tolist() for name, number in numbers}, shapes)


@functools.partial(jax.jit, static_argnames="batched")
def _numbers(step: OuterStep | MaidStep, state: BilevelState, batched: bool) -> list[jax.Array]:
    """Return what a problem has at its start."""

    def one(state: BilevelState) -> list[jax.Array]:
        engine = step.engine_for(state.key)
        x, y = state.warm.start, state.y
        value_at_start, slopes = jax.value_and_grad(engine.value, argnums=(0, 1))(x, y)
        # At x0 = 0, a frequent start, F does not see all of a problem.
        flat, unravel = ravel_pytree(x)
        moved = flat + 0.01 * (1 + jnp.abs(flat)) * _direction(flat)
        nearby = unravel(moved.astype(flat.dtype))
        optimality = [engine.problem.optimality(point, y) for point in (x, nearby)]
        return [_along(y), value_at_start, _along(slopes), *map(_along, optimality)]

    return (jax.vmap(one) if batched else one)(state)


def _along(tree: PyTree) -> jax.Array:
    flat, _ = ravel_pytree(tree)
    return _direction(flat) @ flat


def _direction(flat: jax.Array) -> jax.Array:
    """Return a vector that sees signs and order; random numbers would take long to compile.

    Its mean is far from zero, for what is constant must not vanish along it.
    """
    dtype = jnp.promote_types(flat.dtype, jnp.float32)
    return 2 + jnp.cos(jnp.arange(flat.size, dtype=dtype))
