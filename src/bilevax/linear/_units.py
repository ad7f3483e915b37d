"""Systems of unit size, for methods that square numbers or compare them with absolute constants."""

from typing import Any

import jax
import jax.numpy as jnp
import optax.tree

from bilevax import _trees as trees
from bilevax._operator import LinearOperator
from bilevax.linear import _base as base

PyTree = Any


def unit_sized(operator: LinearOperator, rhs: PyTree) -> tuple[LinearOperator, jax.Array]:
    """Return A / size and size = ||A b|| / ||b|| (1 where that is zero), at the price of A b."""
    rhs_norm = trees.norm(rhs)
    image = operator.matvec(rhs)
    largest = trees.max_abs(image)
    largest = jnp.where(largest == 0, 1, largest)
    size = largest * trees.norm(rescale(image, largest)) / jnp.where(rhs_norm > 0, rhs_norm, 1)
    size = jnp.where(size == 0, 1, size)
    return operator.with_matvec(lambda v: rescale(operator.matvec(v), size)), size


def rescale(tree: PyTree, size: jax.Array) -> PyTree:
    """Return a tree divided by a number."""
    return jax.tree.map(lambda leaf: leaf / size.astype(leaf.dtype), tree)


def first_iterate(
    operator: LinearOperator, rhs: PyTree, guess: PyTree | None
) -> tuple[PyTree, PyTree, jax.Array]:
    """Return where to start, at the guess if it is better than zero; b - A x there; which it is."""
    zero = optax.tree.zeros_like(rhs)
    if guess is None:
        return zero, rhs, jnp.zeros((), bool)
    residual = trees.add_scaled(rhs, -1, operator.matvec(guess))
    better = trees.norm(residual) < base.no_better(operator) * trees.norm(rhs)
    return trees.where(better, guess, zero), trees.where(better, residual, rhs), better
