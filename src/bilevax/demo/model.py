"""Logistic regression with one L2 penalty per weight: the inner and the outer objective."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevax.demo.data import Split, Task


class Weights(NamedTuple):
    """The inner variable.

    Two classes need one column of coefficients, the log-odds of class 1. More classes have one
    column each. The intercept of class 0 is fixed at zero, for only differences count.

    Attributes:
      coefficients: (features, columns).
      intercepts: (classes - 1,), without penalty.
    """

    coefficients: jax.Array
    intercepts: jax.Array


def zero_weights(task: Task) -> Weights:
    """Return the start of a first inner solve."""
    return Weights(jnp.zeros(task.penalty_shape), jnp.zeros(len(task.class_names) - 1))


def logits(weights: Weights, features: jax.Array) -> jax.Array:
    """Return the unnormalised log-probabilities, (rows, classes)."""
    scores = features @ weights.coefficients
    if scores.shape[1] == 1:
        scores = jnp.pad(scores, ((0, 0), (1, 0)))
    return scores + jnp.pad(weights.intercepts, (1, 0))


def cross_entropy(weights: Weights, split: Split) -> jax.Array:
    """Return the mean negative log-likelihood: the outer objective, on the validation rows."""
    scores = logits(weights, split.features)
    return optax.softmax_cross_entropy_with_integer_labels(scores, split.labels).mean()


def penalised_loss(weights: Weights, log_penalties: jax.Array, split: Split) -> jax.Array:
    """Return the inner objective, on the training rows.

        f(w, y) = cross_entropy(w) + 1/2 sum_jk exp(y_jk) w_jk^2

    The outer variable y is the logarithm of the penalties, so that they stay positive.
    """
    squares = weights.coefficients**2
    return cross_entropy(weights, split) + 0.5 * jnp.sum(jnp.exp(log_penalties) * squares)


def accuracy(weights: Weights, split: Split) -> jax.Array:
    """Return the share of rows whose most likely class is the true one."""
    guess = jnp.argmax(logits(weights, split.features), axis=1)
    return jnp.mean(guess == split.labels, dtype=float)
