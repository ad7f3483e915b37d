"""The limit of `tuning.py`: penalties tuned by a program written for these data alone.

One function is compiled: Newton's method on all folds, and their adjoint systems, both by conjugate
gradients with the preconditioner of the command line. From the host it evaluates a grid of single
penalties, and then the steps of Adam until the projected gradient has fallen to the same part of
its first norm. There are no line searches, statuses, checkpoints or last fits.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevax.cli.choices import HIGHEST, LOWEST
from bilevax.cli.folds import Folds
from bilevax.cli.model import penalised_loss, row_losses, zero_weights
from bilevax.cli.preconditioner import curvatures, inverses
from bilevax.cli.rows import Rows
from bilevax.cli.search import GRID

# Norms of gradients of fits, and relative residuals of adjoint systems and of Newton directions.
TOLERANCE, GRID_TOLERANCE, ADJOINT_RTOL, FORCING = 1e-6, 1e-4, 1e-3, 0.1
NEWTON_STEPS, PRODUCTS = 20, 100  # at most, of a fit and of a solve
OPTIMIZER = optax.adam(0.5, b1=0.8)


class ByHand(NamedTuple):
    """Seconds of tracing and compiling, seconds of the run, outer steps, and the loss."""

    compiling: float
    running: float
    steps: int
    loss: float


def tune(rows: Rows, folds: Folds, accuracy: float, most_steps: int) -> ByHand:
    """Tune one penalty per feature of a multinomial model."""
    zero = jnp.asarray(zero_weights(len(folds.train), rows))
    y = np.full(len(rows.design) - 1, np.log(GRID[0]))
    began = time.perf_counter()
    curvature = curvatures(rows, folds, np.asarray(zero))
    lowered = jax.jit(_evaluation(rows, folds)).lower(
        zero, zero, y, curvature, TOLERANCE, ADJOINT_RTOL
    )
    evaluate = lowered.compile()
    compiling = time.perf_counter() - began

    began = time.perf_counter()
    weights, value, best = zero, np.inf, (np.inf, 0.0, zero)
    for log in np.log(GRID):
        found = evaluate(weights, zero, np.full_like(y, log), curvature, GRID_TOLERANCE, 1.0)
        weights, value = found[0], float(found[2])
        best = min(best, (value, log, weights), key=lambda entry: entry[0])
    _, log, weights = best
    curvature = curvatures(rows, folds, np.asarray(weights))
    lowest, highest = np.log(LOWEST), np.log(HIGHEST)
    y, adjoint, steps, first = np.full_like(y, log), zero, 0, np.inf
    memory, update = OPTIMIZER.init(y), jax.jit(OPTIMIZER.update)
    while steps < most_steps:
        found = evaluate(weights, adjoint, y, curvature, TOLERANCE, ADJOINT_RTOL)
        weights, adjoint, value, slope = found
        norm = np.linalg.norm(np.clip(y - slope, lowest, highest) - y)
        first, steps = norm if steps == 0 else first, steps + 1
        if norm <= accuracy * first:
            break
        move, memory = update(slope, memory)
        y = np.clip(y + move, lowest, highest)
    return ByHand(compiling, time.perf_counter() - began, steps, float(value))


def _evaluation(rows: Rows, folds: Folds) -> Callable[..., Any]:
    """Return the function that is compiled."""
    basis, variance = jnp.asarray(rows.basis), folds.variance.mean(axis=0)

    def inner(weights: jax.Array, y: jax.Array) -> jax.Array:
        penalties = jnp.exp(y) * folds.variance
        each = jax.vmap(lambda w, p, share: penalised_loss(w, p, rows, share))
        return jnp.sum(each(weights, penalties, jnp.asarray(folds.train)))

    def outer(weights: jax.Array) -> jax.Array:
        losses = jax.vmap(lambda w: row_losses(w, rows))(weights)
        return jnp.mean(jnp.sum(losses * folds.held_out, axis=1))

    gradient = jax.grad(inner)

    def evaluate(weights, adjoint, y, curvature, tolerance, adjoint_rtol):
        inverse = inverses(curvature + jnp.diag(jnp.append(jnp.exp(y) * variance, 0)))

        def precondition(r: jax.Array) -> jax.Array:
            each_class = jnp.einsum("ck,fki->fci", basis, r)
            return jnp.einsum("ck,fci,cij->fkj", basis, each_class, inverse)

        def newton_step(carry: Any) -> Any:
            weights, slope, count = carry
            _, product = jax.linearize(lambda w: gradient(w, y), weights)
            zero = jnp.zeros_like(weights)
            direction = _conjugate_gradients(product, precondition, slope, zero, FORCING)
            weights = weights - direction
            return weights, gradient(weights, y), count + 1

        def is_rough(carry: Any) -> jax.Array:
            _, slope, count = carry
            return jnp.any(_dot(slope, slope) > tolerance**2) & (count < NEWTON_STEPS)

        start = weights, gradient(weights, y), 0
        weights, _, _ = jax.lax.while_loop(is_rough, newton_step, start)
        _, product = jax.linearize(lambda w: gradient(w, y), weights)
        value, rhs = jax.value_and_grad(outer)(weights)
        adjoint = _conjugate_gradients(product, precondition, rhs, adjoint, adjoint_rtol)
        slope = -jax.grad(lambda y: jnp.sum(gradient(weights, y) * adjoint))(y)
        return weights, adjoint, value, slope

    return evaluate


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return inner products over the weights of a fold."""
    return jnp.sum(a * b, axis=(-1, -2), keepdims=True)


def _conjugate_gradients(
    product: Callable[[Any], Any],
    precondition: Callable[[Any], Any],
    rhs: jax.Array,
    start: jax.Array,
    rtol: Any,
) -> jax.Array:
    least = rtol**2 * _dot(rhs, rhs)

    def step(carry: Any) -> Any:
        x, r, p, rz, count = carry
        image = product(p)
        alpha = jnp.where(rz > 0, rz / _dot(p, image), 0)
        x, r = x + alpha * p, r - alpha * image
        z = precondition(r)
        following = _dot(r, z)
        return x, r, z + jnp.where(rz > 0, following / rz, 0) * p, following, count + 1

    def is_rough(carry: Any) -> jax.Array:
        return jnp.any(_dot(carry[1], carry[1]) > least) & (carry[-1] < PRODUCTS)

    residual = rhs - product(start)
    z = precondition(residual)
    return jax.lax.while_loop(is_rough, step, (start, residual, z, _dot(residual, z), 0))[0]
