"""The hypergradients written by hand in JAX, without bilevax.

Each is what one would write for this one problem: the same iterations, products and tests as the
package makes, and nothing else (no status, no report, no fallback, no iterate but the last).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import problems

Vector = jax.Array
Function = Callable[[Vector], Any]


class Counts(NamedTuple):
    """Iterations taken: the outer ones of the inner solver, those inside, those of the adjoint."""

    inner: Any
    inner_cg: Any
    trials: Any
    adjoint: Any


def gradient_descent(
    gradient: Function, x: Vector, learning_rate: float, rtol: float, maxiter: int
) -> tuple[Vector, jax.Array]:
    def proceed(state: Any) -> jax.Array:
        _, _, norm, steps = state
        return (norm > target) & (steps < maxiter)

    def step(state: Any) -> Any:
        x, g, _, steps = state
        x = x - learning_rate * g
        g = gradient(x)
        return x, g, jnp.linalg.norm(g), steps + 1

    g = gradient(x)
    norm = jnp.linalg.norm(g)
    target = rtol * norm
    x, _, _, steps = jax.lax.while_loop(proceed, step, (x, g, norm, 0))
    return x, steps


def conjugate_gradient(
    product: Function, b: Vector, rtol: Any, maxiter: int
) -> tuple[Vector, jax.Array]:
    """Solve A v = b; NaN if the residual, measured at the end, is not what it should be."""

    def proceed(state: Any) -> jax.Array:
        _, _, _, rr, steps = state
        return (rr > target) & (steps < maxiter)

    def step(state: Any) -> Any:
        v, r, p, rr, steps = state
        image = product(p)
        alpha = rr / jnp.vdot(p, image)
        v = v + alpha * p
        r = r - alpha * image
        new = jnp.vdot(r, r)
        return v, r, r + (new / rr) * p, new, steps + 1

    bb = jnp.vdot(b, b)
    target = rtol**2 * bb
    v, _, _, _, steps = jax.lax.while_loop(proceed, step, (jnp.zeros_like(b), b, b, bb, 0))
    # bilevax spends this product too. It would go on from here if the residual were too large,
    # which does not happen at these tolerances.
    residual = b - product(v)
    return jnp.where(jnp.vdot(residual, residual) <= 1.1 * target, v, jnp.nan), steps


def newton(
    objective: Function, x: Vector, rtol: float, maxiter: int
) -> tuple[Vector, jax.Array, jax.Array, jax.Array]:
    """Minimise by inexact Newton steps with backtracking."""
    evaluate = jax.value_and_grad(objective)

    def proceed(state: Any) -> jax.Array:
        _, _, _, norm, steps, _, _ = state
        return (norm > target) & (steps < maxiter)

    def step(state: Any) -> Any:
        x, value, g, norm, steps, cg_steps, trials = state
        _, product = jax.linearize(jax.grad(objective), x)
        forcing = jnp.minimum(0.1, jnp.sqrt(norm / first_norm))
        solution, more = conjugate_gradient(product, g, forcing, 10 * x.size)
        slope = -jnp.vdot(g, solution)

        def search(trial: Any) -> Any:
            rate, _, _, _, tried = trial
            rate = jnp.where(tried > 0, rate / 2, rate)
            point = x - rate * solution
            return rate, point, *evaluate(point), tried + 1

        def rejected(trial: Any) -> jax.Array:
            rate, _, new, _, tried = trial
            accepted = new <= value + 1e-4 * rate * slope
            return (tried == 0) | (~accepted & (tried < 40))

        _, x, value, g, tried = jax.lax.while_loop(rejected, search, (1.0, x, value, g, 0))
        return x, value, g, jnp.linalg.norm(g), steps + 1, cg_steps + more, trials + tried

    value, g = evaluate(x)
    first_norm = jnp.linalg.norm(g)
    target = rtol * first_norm
    end = jax.lax.while_loop(proceed, step, (x, value, g, first_norm, 0, 0, 0))
    return end[0], end[4], end[5], end[6]


def adjoint_gradient(
    objective: Callable[[Vector, Vector], jax.Array],
    outer: Function,
    x: Vector,
    y: Vector,
    rtol: float,
) -> tuple[Vector, jax.Array]:
    """Return -F_2^T v with F_1 v = g_1, at x."""
    _, product = jax.linearize(lambda x: jax.grad(objective)(x, y), x)
    v, steps = conjugate_gradient(product, jax.grad(outer)(x), rtol, 10 * x.size)
    # F_2^T v is the gradient in y of the derivative of f along v.
    along = jax.grad(lambda y: jax.jvp(lambda x: objective(x, y), (x,), (v,))[1])
    return -along(y), steps


def ridge(log_penalty: Vector, train: problems.Data, validation: problems.Data) -> Any:
    def objective(w: Vector, log_penalty: Vector) -> jax.Array:
        return problems.ridge_objective(w, log_penalty, train)

    w, inner = gradient_descent(
        lambda w: jax.grad(objective)(w, log_penalty),
        jnp.zeros_like(log_penalty),
        learning_rate=0.5,
        rtol=problems.RTOL,
        maxiter=10_000,
    )
    gradient, adjoint = adjoint_gradient(
        objective,
        lambda w: problems.least_squares(w, validation),
        w,
        log_penalty,
        problems.RTOL,
    )
    return gradient, Counts(inner, 0, 0, adjoint)


def logistic(log_penalty: Vector, train: problems.Data, validation: problems.Data) -> Any:
    def objective(w: Vector, log_penalty: Vector) -> jax.Array:
        return problems.logistic_objective(w, log_penalty, train)

    w, inner, inner_cg, trials = newton(
        lambda w: objective(w, log_penalty),
        jnp.zeros_like(log_penalty),
        rtol=problems.RTOL,
        maxiter=100,
    )
    gradient, adjoint = adjoint_gradient(
        objective, lambda w: problems.logistic(w, validation), w, log_penalty, problems.RTOL
    )
    return gradient, Counts(inner, inner_cg, trials, adjoint)


def equilibrium(
    layer: problems.Layer, inputs: jax.Array, readout: jax.Array, targets: jax.Array, terms: int
) -> Any:
    def proceed(state: Any) -> jax.Array:
        _, _, norm, steps = state
        return (norm > target) & (steps < 1000)

    def step(state: Any) -> Any:
        _, z, _, steps = state
        image = problems.apply_layer(z, layer, inputs)
        return z, image, jnp.linalg.norm(z - image), steps + 1

    start = jnp.zeros((inputs.shape[0], layer.bias.size))
    image = problems.apply_layer(start, layer, inputs)
    norm = jnp.linalg.norm(start - image)
    target = problems.RTOL * norm
    z, _, _, steps = jax.lax.while_loop(proceed, step, (start, image, norm, 0))

    g = jax.grad(problems.readout_loss)(z, readout, targets)
    _, pull_z = jax.vjp(lambda z: problems.apply_layer(z, layer, inputs), z)

    def add_term(_: Any, state: Any) -> Any:
        v, term = state
        return v + term, pull_z(term)[0]

    # As in bilevax the last term costs no product, and the result is NaN if the series diverges.
    products = terms - 1
    v, term = jax.lax.fori_loop(0, products, add_term, (jnp.zeros_like(g), g))
    v = v + term
    v = jnp.where(jnp.vdot(term, term) < jnp.vdot(g, g), v, jnp.nan)
    _, pull_layer = jax.vjp(lambda layer: problems.apply_layer(z, layer, inputs), layer)
    return pull_layer(v)[0], Counts(steps, 0, 0, products)
