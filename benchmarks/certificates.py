"""How true are certificates, and what does a requested accuracy cost?

    python benchmarks/certificates.py [--quick] [--output DIR]

Two hundred random problems (see `random_problems.py`). First, the certificate of a hypergradient of
known error, between 1e-6 and 0.3 relatively, is compared with that error. Second, hypergradients
are asked for with a relative accuracy of 1e-1 to 1e-6, and their true error and their cost are
compared with those of an oracle: one that knows when the error first falls below the accuracy,
stops the inner solver there, and solves the adjoint system to the loosest tolerance that will do.

Costs are counted in gradient-equivalents: an evaluation of F is one, a product with F_1 or its
transpose two.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from random_problems import Batch, batches, outer
from tqdm import tqdm

import bilevax as bx

jax.config.update("jax_enable_x64", True)

ACCURACIES = np.logspace(-1, -6, 6)
IMPLICIT = bx.Implicit()
NEWTON = bx.Preconditioned(bx.Implicit(), step=bx.NewtonStep())
RULES = {"implicit": IMPLICIT, "Newton step": NEWTON}
MAXITER = 200_000


# The truth, by dense matrices.


def dense_hypergradient(problem: bx.Problem, g: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    jacobian, mixed = jax.jacobian(problem.optimality, (0, 1))(x, y)
    g_1, g_2 = jax.grad(g, (0, 1))(x, y)
    return g_2 - mixed.T @ jnp.linalg.solve(jacobian.T, g_1)


def newton_step(problem: bx.Problem, x: jax.Array, y: jax.Array) -> jax.Array:
    jacobian = jax.jacobian(problem.optimality)(x, y)
    return x - jnp.linalg.solve(jacobian, problem.optimality(x, y))


class Truth(NamedTuple):
    x: jax.Array
    gradient: jax.Array
    conditioning: jax.Array
    largest: jax.Array  # singular value of F_1


@jax.jit
@jax.vmap
def solve_exactly(problem: bx.Problem, validation: Any, y: jax.Array) -> Truth:
    shrink = 0.5 ** jnp.arange(12)

    def step(_: int, x: jax.Array) -> jax.Array:
        move = newton_step(problem, x, y) - x
        trials = x + shrink[:, None] * move
        norms = jax.vmap(lambda x: jnp.linalg.norm(problem.optimality(x, y)))(trials)
        return trials[jnp.nanargmin(norms)]

    x = jax.lax.fori_loop(0, 40, step, jnp.zeros_like(y))
    gradient = dense_hypergradient(problem, Partial(outer, validation), x, y)
    values = jnp.linalg.svd(jax.jacobian(problem.optimality)(x, y), compute_uv=False)
    return Truth(x, gradient, values[0] / values[-1], values[0])


def relative(gradient: jax.Array, truth: Truth) -> jax.Array:
    return jnp.linalg.norm(gradient - truth.gradient) / jnp.linalg.norm(truth.gradient)


# First part: the ratio of estimated and true error.


def point_of_error(
    estimate: Any, truth: Truth, direction: jax.Array, target: jax.Array
) -> jax.Array:
    """Return x on a ray from x* at which an estimator has about the error that is aimed at."""
    unit = direction / jnp.linalg.norm(direction) * jnp.linalg.norm(truth.x)

    def halve(_: int, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        middle = jnp.sqrt(low * high)
        below = relative(estimate(truth.x + middle * unit), truth) < target
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    bracket = (jnp.asarray(1e-10), jnp.asarray(1e3))
    low, _ = jax.lax.fori_loop(0, 25, halve, bracket)
    return truth.x + low * unit


def measure_ratios(batch: Batch, name: str) -> dict[str, np.ndarray]:
    """Return true and estimated errors, one entry per problem."""
    corrections = {"implicit": lambda problem, x, y: x, "Newton step": newton_step}

    @jax.jit
    @jax.vmap
    def compare(data: Any, validation: Any, y: jax.Array, truth: Truth, key: jax.Array) -> Any:
        problem, g = batch.problem(data), Partial(outer, validation)

        def estimate(x: jax.Array) -> jax.Array:
            return dense_hypergradient(problem, g, corrections[name](problem, x, y), y)

        # Errors of all kinds: rough ones; smooth ones, as solvers leave them; that of the start.
        key_target, key_kind, key_rough = jax.random.split(key, 3)
        target = 10 ** jax.random.uniform(key_target, minval=-6, maxval=jnp.log10(0.3))
        rough = jax.random.normal(key_rough, y.shape)
        smooth = jnp.linalg.solve(jax.jacobian(problem.optimality)(truth.x, y), rough)
        directions = jnp.stack([rough, smooth, truth.x])
        direction = directions[jax.random.randint(key_kind, (), 0, len(directions))]
        x = point_of_error(estimate, truth, direction, target)
        certificate = bx.hypergradient_error(g, problem, RULES[name], x, y)
        gradient = estimate(x)
        return {
            "true": relative(gradient, truth),
            "estimated": certificate.relative,
            "ratio": certificate.absolute / jnp.linalg.norm(gradient - truth.gradient),
            "contraction": certificate.contraction,
            "status": certificate.status,
        }

    truth = solve_exactly(batch.problem(batch.data), batch.validation, batch.y)
    keys = jax.random.split(jax.random.key(batch.size), len(batch.y))
    found = compare(batch.data, batch.validation, batch.y, truth, keys)
    return {**jax.tree.map(np.asarray, found), "conditioning": np.asarray(truth.conditioning)}
