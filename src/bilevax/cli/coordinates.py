"""Coordinates in which fits are easy: there the Hessian of an inner objective is near the identity.

Weights w of a column of scores and the point u that solvers move are related by

    L^T w = u,   L L^T = C + diag(penalties),   C = sum_i share_i c_i x_i x_i^T

where x_i is a row with a one for the intercept, and c_i the mean curvature of its loss in the
scores, at weights that are given once. For ridge C + diag(penalties) is the Hessian itself. C is a
constant and L moves with the penalties, so conjugate gradients need few steps for all of them. The
bilevel problem is the same in any coordinates.
"""

import jax
import jax.numpy as jnp
import numpy as np

from bilevax.cli.folds import Folds
from bilevax.cli.model import Rows, Weights, score_curvatures

# Of rows that the given weights are sure of: at other weights they may not be.
_LEAST_CURVATURE = 1e-4


def curvatures(rows: Rows, folds: Folds, weights: Weights) -> np.ndarray:
    """Return C of each fold, (folds, features + 1, features + 1), at the weights of each fold."""
    features = np.asarray(rows.features)
    extended = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    found = []
    for k, share in enumerate(folds.train):
        one = Weights(weights.coefficients[k], weights.intercepts[k])
        curvature = np.maximum(score_curvatures(one, rows), _LEAST_CURVATURE)
        found.append((extended * (share * curvature)[:, None]).T @ extended)
    return np.stack(found)


def to_weights(point: jax.Array, curvature: jax.Array, penalties: jax.Array) -> Weights:
    """Return the weights at u, (features + 1, columns), of one fold."""
    upper = _upper_factor(curvature, penalties)

    def substitute(found: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
        rest = point[row] - upper[row] @ found
        return found.at[row].set(rest / upper[row, row]), None

    rows = jnp.arange(len(curvature))
    extended, _ = jax.lax.scan(substitute, jnp.zeros_like(point), rows, reverse=True)
    return Weights(extended[:-1], extended[-1])


def to_point(weights: Weights, curvature: jax.Array, penalties: jax.Array) -> jax.Array:
    """Return u of the weights of one fold."""
    extended = jnp.concatenate([weights.coefficients, weights.intercepts[None]])
    return _upper_factor(curvature, penalties) @ extended


def zero_points(tasks: int, rows: Rows) -> jax.Array:
    """Return u of zero weights, for some tasks."""
    features, columns = rows.features.shape[1], rows.target.shape[1]
    return jnp.zeros((tasks, features + 1, columns))


def _upper_factor(curvature: jax.Array, penalties: jax.Array) -> jax.Array:
    """Return L^T, row by row.

    Not by LAPACK: a program that called it in batches some ten thousand times was seen to wait for
    ever (jaxlib 0.10.2, on two cores).
    """
    matrix = curvature + jnp.diag(jnp.append(penalties, 0))
    columns = jnp.arange(len(matrix))

    def add_row(upper: jax.Array, k: jax.Array) -> tuple[jax.Array, None]:
        row = matrix[k] - upper[:, k] @ upper
        row = jnp.where(columns >= k, row / jnp.sqrt(row[k]), 0)
        return upper.at[k].set(row), None

    return jax.lax.scan(add_row, jnp.zeros_like(matrix), columns)[0]
