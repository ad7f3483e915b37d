"""The models: a loss per row, and the inner objective with its penalties.

The inner variable are weights, (columns, features + 1): a row for each score, with the coefficients
of standardised features and, in the last place, the intercept.
"""

import jax
import jax.numpy as jnp
import numpy as np

from bilevax.cli.rows import Rows


def row_losses(weights: jax.Array, rows: Rows) -> jax.Array:
    """Return the loss of each row: half the squared error, or the cross entropy."""
    if rows.basis is None:
        return 0.5 * jnp.sum((weights @ rows.design - rows.target) ** 2, axis=0)
    logits = (rows.basis @ weights) @ rows.design
    return jax.nn.logsumexp(logits, axis=0) - jnp.sum(logits * rows.target, axis=0)


def penalised_loss(
    weights: jax.Array, penalties: jax.Array, rows: Rows, share: jax.Array
) -> jax.Array:
    """Return the inner objective of one fold.

        f(w) = sum_i share_i loss_i(w) + 1/2 sum_kj penalty_j w_kj^2

    Args:
      weights: w; the intercepts have no penalty.
      penalties: (features,), each times the variance of its feature in the training rows. To
        standardise by those rows would be to shift the features, which the intercept undoes, and
        to scale them, which is to scale the penalty.
      rows: all rows; which of them train is in the shares, so that all folds have one shape.
      share: (rows,), one over the number of training rows, or zero.
    """
    coefficients = weights[:, :-1]
    return share @ row_losses(weights, rows) + 0.5 * jnp.sum(coefficients**2 @ penalties)


def zero_weights(tasks: int, rows: Rows) -> np.ndarray:
    """Return where first inner solves start, for some tasks."""
    columns = 1 if rows.basis is None else rows.basis.shape[1]
    return np.zeros((tasks, columns, len(rows.design)))
