"""The models: a loss per row, and the inner objective with its penalties."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevax.cli.choices import Kind


class Weights(NamedTuple):
    """The inner variable, in units of standardised features.

    Attributes:
      coefficients: (features, columns).
      intercepts: (columns,), without penalty.
    """

    coefficients: jax.Array
    intercepts: jax.Array


class Rows(NamedTuple):
    """All rows, as the losses take them.

    Attributes:
      features: (rows, features), standardised.
      target: (rows, columns). For ridge the standardised target. For classes the direction in which
        the scores raise the right one, basis[class].
      basis: (classes, columns), by which scores become logits; None for ridge.
    """

    features: jax.Array | np.ndarray
    target: jax.Array | np.ndarray
    basis: jax.Array | np.ndarray | None


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


def row_losses(weights: Weights, rows: Rows) -> jax.Array:
    """Return the loss of each row: half the squared error, or the cross entropy."""
    scores = rows.features @ weights.coefficients + weights.intercepts
    if rows.basis is None:
        return 0.5 * jnp.sum((scores - rows.target) ** 2, axis=1)
    logits = scores @ rows.basis.T
    return jax.nn.logsumexp(logits, axis=1) - jnp.sum(scores * rows.target, axis=1)


def score_curvatures(weights: Weights, rows: Rows) -> np.ndarray:
    """Return the second derivative of the loss of each row in its scores, the mean over columns."""
    if rows.basis is None:
        return np.ones(len(rows.features))
    logits = (rows.features @ weights.coefficients + weights.intercepts) @ rows.basis.T
    probabilities = np.exp(logits - np.max(logits, axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    variances = probabilities @ rows.basis**2 - (probabilities @ rows.basis) ** 2
    return variances.mean(axis=1)


def penalised_loss(
    weights: Weights, penalties: jax.Array, rows: Rows, share: jax.Array
) -> jax.Array:
    """Return the inner objective of one fold.

        f(w) = sum_i share_i loss_i(w) + 1/2 sum_jk penalty_j w_jk^2

    Args:
      weights: w.
      penalties: (features,), each times the variance of its feature in the training rows. To
        standardise by those rows would be to shift the features, which the intercept undoes, and
        to scale them, which is to scale the penalty.
      rows: all rows; which of them train is in the shares, so that all folds have one shape.
      share: (rows,), one over the number of training rows, or zero.
    """
    return share @ row_losses(weights, rows) + 0.5 * penalties @ jnp.sum(weights.coefficients**2, 1)


def zero_weights(tasks: int, rows: Rows) -> Weights:
    """Return where first inner solves start, for some tasks."""
    features, columns = rows.features.shape[1], rows.target.shape[1]
    return Weights(np.zeros((tasks, features, columns)), np.zeros((tasks, columns)))  # type: ignore[arg-type]
