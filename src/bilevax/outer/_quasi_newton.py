"""Directions of limited-memory BFGS, from pairs of moves and changes of the gradient."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_LENGTH = 10


class Pairs(NamedTuple):
    """The last pairs, the newest at the end; a weight of zero is none.

    Attributes:
      moves: differences of y, one in each row.
      changes: those of the gradient.
      weights: one over their inner product, which is positive.
    """

    moves: jax.Array
    changes: jax.Array
    weights: jax.Array

    @property
    def is_empty(self) -> jax.Array:
        """Whether there is no pair yet."""
        return self.weights[-1] == 0


def no_pairs(like: jax.Array) -> Pairs:
    """Return an empty memory, of moves like a vector."""
    rows = jnp.zeros((_LENGTH, like.size), like.dtype)
    return Pairs(rows, rows, rows[:, 0] if like.size else jnp.zeros(_LENGTH, like.dtype))


def remember(pairs: Pairs, move: jax.Array, change: jax.Array) -> Pairs:
    """Return the memory with one more pair, of positive inner product."""
    newest = Pairs(move, change, 1 / (move @ change))
    return jax.tree.map(lambda old, new: jnp.roll(old, -1, axis=0).at[-1].set(new), pairs, newest)


def times_inverse(pairs: Pairs, gradient: jax.Array, *, diagonal: bool) -> jax.Array:
    """Return about (d^2 h/dy^2)^{-1} gradient; with `diagonal`, a multiple of the gradient.

    The multiple goes by the last move alone, for the gradient also changes along what a projection
    holds back.

    Source:
      J. Nocedal, "Updating Quasi-Newton Matrices with Limited Storage", 1980;
      J. Barzilai, J. M. Borwein, "Two-Point Step Size Gradient Methods", 1988.
    """
    move, change, weight = pairs.moves[-1], pairs.changes[-1], pairs.weights[-1]
    if diagonal:
        return jnp.where(pairs.is_empty, 1, weight * (move @ move)) * gradient
    scale = 1 / jnp.where(pairs.is_empty, 1, weight * (change @ change))

    def forget(q: jax.Array, pair: Pairs) -> tuple[jax.Array, jax.Array]:
        part = pair.weights * (pair.moves @ q)
        return q - part * pair.changes, part

    def recall(q: jax.Array, pair_and_part: tuple[Pairs, jax.Array]) -> tuple[jax.Array, None]:
        pair, part = pair_and_part
        return q + (part - pair.weights * (pair.changes @ q)) * pair.moves, None

    q, parts = jax.lax.scan(forget, gradient, pairs, reverse=True)
    return jax.lax.scan(recall, scale * q, (pairs, parts))[0]
