"""A preconditioner of fits: the Hessian of the inner objective as if each class were by itself.

    P^{-1} v = B^T (A_1^{-1} (B v)_1, ..., A_k^{-1} (B v)_k)
    A_c = C_c + diag(penalties),   C_c = sum_i s_i p_ic (1 - p_ic) x_i x_i^T

where B is the basis of the scores, x_i a row with a one for the intercept, s_i its share, and p_ic
the probability of class c in it, at weights that are given once (for ridge the curvature is 1). For
ridge and two classes P is the Hessian there. C_c is a constant and the penalties move, so conjugate
gradients take few steps for all of them. Folds share the mean of their C_c, for these differ little
and inverses take time.
"""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import softmax

from bilevax.cli.folds import Folds
from bilevax.cli.rows import Rows

# Of rows that the given weights are sure of: at other weights they may not be.
_LEAST_CURVATURE = 1e-4
_BLOCK = 16  # rows that are swept at once


def curvatures(rows: Rows, folds: Folds, weights: np.ndarray) -> np.ndarray:
    """Return C_c, (classes, features + 1, features + 1): the mean over folds, at their weights."""
    total = 0.0
    for one, share in zip(weights, folds.train, strict=True):
        curvature = share * np.maximum(_class_curvatures(one, rows), _LEAST_CURVATURE)
        total = total + np.stack([(rows.design * row) @ rows.design.T for row in curvature])
    return np.asarray(total) / len(weights)


def precondition(
    vector: jax.Array, curvatures: np.ndarray | jax.Array, penalties: jax.Array, rows: Rows
) -> jax.Array:
    """Return P^{-1} v for v like the weights, (columns, features + 1)."""
    diagonal = jnp.diag(jnp.append(penalties, 0))
    inverse = inverses(jnp.asarray(curvatures) + diagonal)
    basis = jnp.ones((1, 1)) if rows.basis is None else jnp.asarray(rows.basis)
    return basis.T @ jnp.einsum("ci,cij->cj", basis @ vector, inverse)


def inverses(matrices: jax.Array, block: int = _BLOCK) -> jax.Array:
    """Return the inverses of symmetric positive definite matrices, (..., size, size).

    By sweeps of so many rows at once. A sweep of the rows K, with A_K their columns, E_K those of
    the identity and A_KK where they cross, is

        A <- A - (A_K - E_K) A_KK^{-1} (A_K^T + E_K^T)

    and after those of all rows A is the inverse. Not by LAPACK: a program that called it in batches
    some ten thousand times was seen to wait for ever (jaxlib 0.10.2, on two cores).

    Source:
      J. H. Goodnight, "A Tutorial on the SWEEP Operator", 1979.
    """
    size = matrices.shape[-1]
    # With a diagonal of ones: numbers of different sizes cancel in sweeps.
    units = 1 / jnp.sqrt(jnp.diagonal(matrices, axis1=-2, axis2=-1))
    units = units[..., :, None] * units[..., None, :]
    identity = jnp.eye(size + -size % block, dtype=matrices.dtype)
    padded = jnp.broadcast_to(identity, matrices.shape[:-2] + identity.shape)
    padded = padded.at[..., :size, :size].set(units * matrices)

    def sweep(k: jax.Array, swept: jax.Array) -> jax.Array:
        def part(array: jax.Array, axis: int) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(array, k * block, block, axis)

        columns, rows = part(swept, -1), part(swept, -2)
        crossing = part(columns, -2)
        inverse = 1 / crossing if block == 1 else inverses(crossing, 1)
        return swept - (columns - part(identity, 1)) @ (inverse @ (rows + part(identity, 0)))

    swept = jax.lax.fori_loop(0, len(identity) // block, sweep, padded)
    return units * swept[..., :size, :size]


def _class_curvatures(weights: np.ndarray, rows: Rows) -> np.ndarray:
    """Return the second derivative of the loss of each row in the logit of each class."""
    if rows.basis is None:
        return np.ones_like(rows.target)
    probabilities = softmax(rows.basis @ weights @ rows.design, axis=0)
    return probabilities * (1 - probabilities)
