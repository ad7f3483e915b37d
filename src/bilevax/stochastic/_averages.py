"""Averages over batches, with the spread of the samples around them, in one pass."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax.tree

from bilevax import _mesh as mesh
from bilevax import _trees as trees

PyTree = Any


class Average(NamedTuple):
    """The average of some samples.

    Attributes:
      mean: a pytree like a sample.
      spread: per leaf of it, the sum of the squared deviations from the mean.
    """

    mean: PyTree
    spread: PyTree


def average(
    draw: Callable[[PyTree], tuple[PyTree, PyTree]], count: jax.Array, state: PyTree
) -> tuple[Average, PyTree]:
    """Average the samples of `draw`, which takes a state and returns a sample and the next state.

    Nothing is kept but the running average (Welford's algorithm), so the count may be traced.
    """

    def add(index: jax.Array, carry: tuple[Average, PyTree]) -> tuple[Average, PyTree]:
        (mean, spread), state = carry
        sample, state = draw(state)
        deviation = optax.tree.sub(sample, mean)
        # In this form of Welford's update, rounding cannot make a spread negative.
        share = 1 / jnp.asarray(index + 1, jnp.result_type(float))
        mean = trees.add_scaled(mean, share, deviation)
        spread = jax.tree.map(
            lambda s, d: s + jnp.asarray(1 - share, d.dtype) * jnp.sum(d**2), spread, deviation
        )
        return Average(mean, spread), state

    shape = jax.eval_shape(draw, state)[0]
    mean = jax.tree.map(lambda u: jnp.zeros(u.shape, u.dtype), shape)
    spread = jax.tree.map(lambda u: jnp.zeros((), u.dtype), shape)
    return mesh.fori_loop(count, add, (Average(mean, spread), state))


def squared_error(spread: PyTree, count: jax.Array) -> jax.Array:
    """Return the estimated square of ||mean - expectation||; infinite for a single sample."""
    total = sum(jax.tree.leaves(spread), jnp.zeros((), trees.dtype(spread)))
    pairs = jnp.asarray(count, total.dtype) * jnp.asarray(count - 1, total.dtype)
    return jnp.where(count > 1, total / jnp.where(count > 1, pairs, 1), jnp.inf)
