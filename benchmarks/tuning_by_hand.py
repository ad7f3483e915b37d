"""The limit of `tuning.py`: a bare loop in JAX that tunes as many penalties on the same folds.

Each step takes a Newton step on all folds, an adjoint solve from the last one, and moves each
log-penalty by the sign of its slope. Both solves are conjugate gradients with a fixed number of
products, without tolerances, statuses, checkpoints, or a grid to start from.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevax.cli.folds import Folds
from bilevax.cli.model import Rows, penalised_loss, row_losses, zero_weights

PRODUCTS = 20, 10  # in an inner and in an adjoint solve
MOVE = 0.3


def seconds(rows: Rows, folds: Folds, steps: int) -> tuple[float, float]:
    """Return the time of tracing and compiling, and that of so many steps."""
    zero = jnp.asarray(zero_weights(len(folds.train), rows))

    def inner(weights: jax.Array, y: jax.Array) -> jax.Array:
        penalties = jnp.exp(y) * folds.variance
        each = jax.vmap(lambda w, p, share: penalised_loss(w, p, rows, share))
        return jnp.sum(each(weights, penalties, jnp.asarray(folds.train)))

    def outer(weights: jax.Array) -> jax.Array:
        losses = jax.vmap(lambda w: row_losses(w, rows))(weights)
        return jnp.mean(jnp.sum(losses * folds.held_out, axis=1))

    gradient = jax.grad(inner)

    def step(carry: Any) -> Any:
        weights, adjoint, y = carry
        slope, product = jax.linearize(lambda w: gradient(w, y), weights)
        direction = _conjugate_gradients(product, slope, zero, PRODUCTS[0])
        weights = jax.tree.map(jnp.subtract, weights, direction)
        _, product = jax.linearize(lambda w: gradient(w, y), weights)
        adjoint = _conjugate_gradients(product, jax.grad(outer)(weights), adjoint, PRODUCTS[1])
        slope = jax.grad(lambda y: _dot(gradient(weights, y), adjoint))(y)
        return weights, adjoint, y + MOVE * jnp.sign(slope)

    start = zero, zero, jnp.full(len(rows.design) - 1, -7.0)
    began = time.perf_counter()
    run = jax.jit(lambda carry, count: jax.lax.fori_loop(0, count, lambda _, c: step(c), carry))
    compiled = run.lower(start, np.int64(1)).compile()
    compiling = time.perf_counter() - began
    jax.block_until_ready(compiled(start, np.int64(1)))
    began = time.perf_counter()
    jax.block_until_ready(compiled(start, np.int64(steps)))
    return compiling, time.perf_counter() - began


def _dot(a: Any, b: Any) -> jax.Array:
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)), jnp.zeros(()))


def _conjugate_gradients(product: Callable[[Any], Any], rhs: Any, start: Any, count: int) -> Any:
    def add(a: Any, scalar: jax.Array, b: Any) -> Any:
        return jax.tree.map(lambda u, w: u + scalar * w, a, b)

    def step(_: int, carry: Any) -> Any:
        x, r, p, square = carry
        image = product(p)
        alpha = square / _dot(p, image)
        x, r = add(x, alpha, p), add(r, -alpha, image)
        following = _dot(r, r)
        return x, r, add(r, following / square, p), following

    r = add(rhs, jnp.asarray(-1.0), product(start))
    return jax.lax.fori_loop(0, count, step, (start, r, r, _dot(r, r)))[0]
