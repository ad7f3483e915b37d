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
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from dense_truth import Truth, solve_exactly
from random_problems import Batch, batches, outer
from tqdm import tqdm

import bilevax as bx

jax.config.update("jax_enable_x64", True)

ACCURACIES = np.logspace(-1, -6, 6)
IMPLICIT = bx.Implicit()
NEWTON = bx.Preconditioned(bx.Implicit(), step=bx.NewtonStep())
RULES = {"implicit": IMPLICIT, "Newton step": NEWTON}
SMALLEST, LARGEST = 1e-6, 0.3  # relative errors of hypergradients in the first part
MAXITER = 200_000


# First part: the ratio of estimated and true error.


def point_of_error(
    truth: Truth, estimate: Callable[[np.ndarray], np.ndarray], direction: np.ndarray, target: float
) -> np.ndarray:
    """Return x on a ray from x* at which an estimator has about the error that is aimed at."""
    unit = direction * np.linalg.norm(truth.x) / np.linalg.norm(direction)
    low, high = -10.0, 3.0  # of the logarithm of the distance
    for _ in range(25):
        middle = (low + high) / 2
        if truth.error(estimate(truth.x + 10**middle * unit)) < target:
            low = middle
        else:
            high = middle
    return truth.x + 10**low * unit


def draw_points(truths: list[Truth], name: str, rng: np.random.Generator) -> np.ndarray:
    """Return inexact solutions with errors of all kinds and sizes."""
    points = []
    for truth in truths:
        rough = rng.normal(size=truth.x.shape)
        smooth = np.linalg.solve(truth.derivatives(truth.x).jacobian, rough)  # as solvers leave it
        direction = (rough, smooth, truth.x)[rng.integers(3)]
        target = 10 ** rng.uniform(np.log10(SMALLEST), np.log10(LARGEST))
        points.append(point_of_error(truth, dense_estimator(truth, name), direction, target))
    return np.stack(points)


def dense_estimator(truth: Truth, name: str) -> Callable[[np.ndarray], np.ndarray]:
    if name == "implicit":
        return truth.implicit
    return lambda x: truth.implicit(truth.newton_step(x))


def measure_ratios(batch: Batch, truths: list[Truth], name: str) -> dict[str, np.ndarray]:
    """Return true errors, and estimated over true errors, one entry per problem."""

    @jax.jit
    @jax.vmap
    def certify(data: Any, validation: Any, x: jax.Array, y: jax.Array) -> bx.Certificate:
        problem, g = batch.problem(data), Partial(outer, validation)
        return bx.hypergradient_error(g, problem, RULES[name], x, y)

    points = draw_points(truths, name, np.random.default_rng(batch.size))
    certificate = certify(batch.data, batch.validation, points, batch.y)
    pairs = list(zip(truths, points, strict=True))
    gradients = [dense_estimator(truth, name)(x) for truth, x in pairs]
    errors = [np.linalg.norm(g - t.gradient) for g, t in zip(gradients, truths, strict=True)]
    return {
        "true": np.array([t.error(g) for t, g in zip(truths, gradients, strict=True)]),
        "ratio": np.asarray(certificate.absolute) / np.array(errors),
        "contraction": np.asarray(certificate.contraction),
        "status": np.asarray(certificate.status),
        "conditioning": np.array([truth.conditioning for truth in truths]),
    }


# Second part: the cost of a requested accuracy.


def inner_solver(batch: Batch, truths: list[Truth]) -> bx.Solver:
    """Return a first-order solver for each problem: a batch of numbers in one solver."""
    largest = [np.linalg.norm(t.derivatives(np.zeros(t.x.shape)).jacobian, 2) for t in truths]
    steps = 1 / jnp.array(largest)
    if batch.family == "contraction":
        return bx.FixedPointIteration(jnp.ones_like(steps), maxiter=MAXITER, memory=5)
    if batch.family == "root":
        return bx.FixedPointIteration(steps, maxiter=MAXITER, memory=5)
    # The curvature of the cross entropy of many classes can be larger elsewhere than at zero.
    return bx.AcceleratedGradient(steps / (2.5 if batch.family == "multinomial" else 1))


def linear_solver(batch: Batch) -> bx.LinearSolver:
    if batch.family in ("root", "contraction"):
        return bx.GMRES(restart=batch.size)
    return bx.CG()
