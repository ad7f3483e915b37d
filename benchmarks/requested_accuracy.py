"""What a requested accuracy costs, beside an oracle that knows when to stop.

The oracle knows the first iterate of the inner solver whose hypergradient is accurate enough; it
stops there and solves the adjoint system (for a Newton-preconditioned rule, the correction too) to
the loosest tolerance that will do. Costs are gradient-equivalents: an evaluation of F is one, a
product with F_1 or its transpose two. `GMRES` says only how many products a cycle has at most, so
costs of roots and contractions are too high, on both sides.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from dense_truth import Truth
from jax.tree_util import Partial
from random_problems import Batch, outer

import bilevax as bx

ACCURACIES = np.logspace(-1, -6, 6)
TOLERANCES = 10.0 ** -np.arange(0.5, 12.5, 0.5)  # that the oracle tries
MAXITER = 200_000
SPACING = 1.03  # of the iterates that the oracle looks at, after the first fifty


class Costs(NamedTuple):
    """Arrays of shape (problems, accuracies).

    Attributes:
      error: the true relative error, over the accuracy asked for.
      certified: the same as the certificate has it.
      status: of the inner solve.
      cost: gradient-equivalents spent.
      inner: of these, the steps of the inner solver.
      oracle: gradient-equivalents that the oracle spends.
    """

    error: np.ndarray
    certified: np.ndarray
    status: np.ndarray
    cost: np.ndarray
    inner: np.ndarray
    oracle: np.ndarray


def inner_solver(batch: Batch, truths: list[Truth]) -> bx.Solver:
    """Return a first-order solver, with one number for every problem in its fields."""
    largest = [np.linalg.norm(t.derivatives(np.zeros(t.x.shape)).jacobian, 2) for t in truths]
    step, maxiter = 1 / jnp.array(largest), jnp.full(len(truths), MAXITER)
    if batch.family == "contraction":
        return bx.FixedPointIteration(jnp.ones_like(step), maxiter=maxiter, memory=5)
    if batch.family == "root":
        return bx.FixedPointIteration(step / 2, maxiter=maxiter, memory=5)
    # The curvature of the cross entropy of many classes can be larger elsewhere than at zero.
    step = step / 2.5 if batch.family == "multinomial" else step
    return bx.AcceleratedGradient(step, maxiter=maxiter)


def measure_costs(
    batch: Batch, truths: list[Truth], rule: bx.Rule, linear_solver: bx.LinearSolver
) -> Costs:
    """Ask for every accuracy on every problem of a batch, and compare with the oracle."""
    solver = inner_solver(batch, truths)

    def run(data: Any, validation: Any, y: jax.Array, solver: bx.Solver, value: jax.Array) -> Any:
        engine = bx.value_and_hypergradient(
            Partial(outer, validation),
            batch.problem(data),
            solver,
            rule,
            accuracy=bx.RelativeAccuracy(value),
        )
        result = engine(y, bx.cold_start(jnp.zeros_like(y)))
        return result.gradient, result.report

    every_accuracy = jax.vmap(run, (None, None, None, None, 0))
    every_problem = jax.jit(jax.vmap(every_accuracy, (0, 0, 0, 0, None)))
    arguments = (batch.data, batch.validation, batch.y, solver, jnp.array(ACCURACIES))
    gradients, report = jax.tree.map(np.asarray, every_problem(*arguments))
    errors = np.array([[t.error(g) for g in row] for t, row in zip(truths, gradients, strict=True)])
    products = report.adjoint.products + report.certificate.products
    if report.inner.correction is not None:
        products = products + report.inner.correction.products
    inner = report.inner.iterations
    return Costs(
        error=errors / ACCURACIES,
        certified=report.certificate.relative / ACCURACIES,
        status=report.inner.status,
        cost=inner + 2 * products,
        inner=inner,
        oracle=_oracle(batch, truths, solver, rule, linear_solver, int(inner.max())),
    )


def _oracle(
    batch: Batch,
    truths: list[Truth],
    solver: bx.Solver,
    rule: bx.Rule,
    linear_solver: bx.LinearSolver,
    last: int,
) -> np.ndarray:
    """Return the gradient-equivalents of the oracle; NaN where no iterate up to `last` will do."""
    corrects = isinstance(rule, bx.Preconditioned)
    counts = [*range(min(last, 50) + 1)]
    while counts[-1] < last:
        counts.append(min(last, int(np.ceil(SPACING * counts[-1]))))

    @jax.jit
    @jax.vmap
    def trajectory(data: Any, y: jax.Array, solver: bx.Solver) -> jax.Array:
        problem = batch.problem(data)

        def advance(iterate: bx.Iterate, steps: jax.Array) -> tuple[bx.Iterate, jax.Array]:
            def step(_: int, iterate: bx.Iterate) -> bx.Iterate:
                return solver.step(problem, iterate, y)

            iterate = jax.lax.fori_loop(0, steps, step, iterate)
            return iterate, iterate.x

        start = solver.init(problem, jnp.zeros_like(y), y)
        return jax.lax.scan(advance, start, jnp.diff(jnp.array(counts), prepend=0))[1]

    iterates = np.asarray(trajectory(batch.data, batch.y, solver))
    chosen = np.zeros((len(truths), len(ACCURACIES)), int)
    for row, truth, points in zip(chosen, truths, iterates, strict=True):
        row[:] = -1
        for index, x in enumerate(points):
            error = truth.error(truth.implicit(truth.newton_step(x) if corrects else x))
            row[(row < 0) & (error <= ACCURACIES)] = index
            if np.all(row >= 0):
                break

    def solve(data: Any, validation: Any, y: jax.Array, x: jax.Array, rtol: jax.Array) -> Any:
        problem, g = batch.problem(data), Partial(outer, validation)
        loose = dataclasses.replace(linear_solver, rtol=rtol)  # type: ignore[type-var]
        products = jnp.zeros((), jnp.int32)
        adjoint = bx.Implicit(loose)
        if corrects:
            x, correction = bx.Preconditioned(adjoint, bx.NewtonStep(loose)).refine(problem, x, y)
            products = correction.products  # type: ignore[union-attr]
        g_1, g_2 = jax.grad(g, (0, 1))(x, y)
        pulled, report = adjoint.pullback(problem, x, y, g_1)
        return g_2 + pulled, products + report.solve.products

    every_tolerance = jax.vmap(solve, (None, None, None, None, 0))
    every_accuracy = jax.vmap(every_tolerance, (None, None, None, 0, None))
    every_problem = jax.jit(jax.vmap(every_accuracy, (0, 0, 0, 0, None)))
    points = np.stack([points[row] for points, row in zip(iterates, chosen, strict=True)])
    arguments = (batch.data, batch.validation, batch.y, points, jnp.array(TOLERANCES))
    gradients, products = map(np.asarray, every_problem(*arguments))
    costs = np.full(chosen.shape, np.nan)
    for (i, j), index in np.ndenumerate(chosen):
        good = [truths[i].error(gradient) <= ACCURACIES[j] for gradient in gradients[i, j]]
        # Where rounding of the adjoint is all that is missing, the tightest one counts.
        tolerance = int(np.argmax(good)) if any(good) else -1
        if index >= 0:
            costs[i, j] = counts[index] + 2 * products[i, j, tolerance]
    return costs
