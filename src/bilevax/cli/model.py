"""The models: a loss per row, and the inner objective with its penalties.

The inner variable are weights, (columns, features + 1): a row for each score, with the coefficients
of standardised features and, in the last place, the intercept. Rows of data are the last axis of
all arrays here, which makes products with them fast.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevax.cli.choices import Kind


class Rows(NamedTuple):
    """All rows, as the losses take them.

    Attributes:
      design: (features + 1, rows), standardised features, and ones for the intercept.
      target: (1, rows), the standardised target of ridge; (classes, rows), one for the class of a
        row, elsewhere zero.
      basis: (classes, columns), by which scores become logits; None for ridge.
    """

    design: np.ndarray
    target: np.ndarray
    basis: np.ndarray | None

    @property
    def features(self) -> np.ndarray:
        """The standardised features, (rows, features)."""
        return self.design[:-1].T


def score_basis(kind: Kind, classes: int) -> np.ndarray:
    """Return what turns scores into logits, (classes, columns).

    Two classes of a logistic regression have one column, the log-odds of the second. The logits of
    a multinomial one count up to a constant, and a penalty shared by all classes makes their
    coefficients sum to zero. So there is an orthonormal basis of what sums to zero: the penalty is
    the same in it, and the Hessian has no null space.
    """
    if kind is Kind.LOGISTIC:
        return np.array([[0.0], [1.0]])
    spanning = np.hstack([np.ones((classes, 1)), np.eye(classes)[:, 1:]])
    return np.linalg.qr(spanning)[0][:, 1:]


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
