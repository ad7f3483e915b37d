"""Units of f and x change nothing, and a minimiser at infinity is no solution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from bilevax import Status
from bilevax import _loop as loop
from tests.everyday import slow

MATRIX = np.array([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]])
B = np.array([1.0, 2.0, -1.0])
SOLUTION = np.linalg.solve(MATRIX, B)
SOLVERS = {
    "newton": bx.Newton(bx.Dense()),
    "conjugate_gradient": bx.ConjugateGradient(),
    "backtracking": bx.GradientDescent(bx.Backtracking()),
}
UNITS = {  # of f and of x; the norms of F and of x have squares out of range in most
    np.float64: [
        (1.0, 1.0),
        (1e-170, 1.0),
        (1e-30, 1.0),
        (1e120, 1.0),
        (1.0, 1e-60),
        (1.0, 1e60),
        (1e-100, 1e80),
        (1e-200, 1e-30),
    ],
    np.float32: [(1.0, 1.0), (1e-24, 1.0), (1e-30, 1.0), (1e20, 1.0), (1.0, 1e-12), (1.0, 1e12)],
}


def objective(x, y):
    """Minimal at the solution, where both terms are: a quadratic and one that is none."""
    unit, unit_of_x, matrix, solution = y
    z = x / unit_of_x - solution
    return unit * (0.5 * z @ matrix @ z + 0.1 * jnp.sum(jnp.cosh(z) - 1))


PROBLEM = bx.minimum(objective)


@functools.partial(jax.jit, static_argnames="name")
def run(name, units, matrix, solution):
    def one(unit, unit_of_x):
        return loop.run(
            SOLVERS[name], PROBLEM, jnp.zeros_like(solution), (unit, unit_of_x, matrix, solution)
        )

    return jax.vmap(one)(*units)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [np.float64, slow(np.float32)])
def test_a_run_does_not_depend_on_units(name, dtype):
    units = tuple(np.array(UNITS[dtype], dtype).T)
    x, report = run(name, units, MATRIX.astype(dtype), SOLUTION.astype(dtype))
    np.testing.assert_array_equal(report.status, Status.CONVERGED)
    # The same steps; rounding may shift the last one.
    assert np.ptp(report.iterations) <= 1 and report.iterations[0] >= 2
    # ||dx|| <= ||A^{-1}|| ||F|| <= rtol cond ||x||: the condition number is 5.
    error = np.asarray(x, np.float64) / np.array(UNITS[dtype])[:, 1:] - SOLUTION
    assert np.abs(error).max() <= 20 * np.finfo(dtype).eps ** 0.75 * np.linalg.norm(SOLUTION)


def logistic(x, y):
    features, labels, penalty, unit = y
    margins = labels * (features @ x)
    return unit * (jnp.mean(jnp.logaddexp(0, -margins)) + 0.5 * penalty * jnp.sum(x**2))


def separable_data(lanes, seed=0):
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(lanes, 30, 3))
    labels = np.sign(features @ generator.normal(size=(lanes, 3, 1)))[..., 0]
    return features, labels


@functools.partial(jax.jit, static_argnames="name")
def classify(name, x0, y):
    def one(x0, y):
        return loop.run(SOLVERS[name], bx.minimum(logistic), x0, y)

    return jax.vmap(one)(x0, y)


@pytest.mark.parametrize("name", SOLVERS)
def test_separable_data_without_a_penalty_have_no_minimiser(name):
    lanes = 8
    features, labels = separable_data(lanes)
    unit = np.logspace(-6, 6, lanes)
    unit_of_x = np.logspace(6, -6, lanes)[:, None]
    features = features / unit_of_x[..., None]
    penalty = np.zeros(lanes)
    x, report = classify(name, np.zeros((lanes, 3)), (features, labels, penalty, unit))
    np.testing.assert_array_equal(report.status, Status.UNBOUNDED)
    # Every margin is so large that F is below the tolerance, and it would go on to grow.
    margins = labels * (features @ x[..., None])[..., 0]
    assert np.all(margins.min(axis=1) > 10)
    assert bool(jnp.all(report.residual < 1e-11 * report.initial_residual))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_penalty_however_weak_has_a_minimiser(name):
    """The same data: x is far from the start, and CONVERGED is never taken back."""
    lanes = 8
    features, labels = separable_data(lanes, seed=1)
    unit = np.logspace(6, -6, lanes)
    penalty = np.logspace(-7, 1, lanes)
    x0 = np.random.default_rng(2).normal(size=(lanes, 3)) * (np.arange(lanes)[:, None] % 2)
    x, report = classify(name, x0, (features, labels, penalty, unit))
    allowed = {Status.CONVERGED} if name == "newton" else {Status.CONVERGED, Status.MAXITER}
    assert set(report.status.tolist()) <= allowed
    for lane in np.flatnonzero(report.status == Status.CONVERGED):
        # F = 0 in NumPy: mean of -labels features / (1 + exp(margin)) + penalty x.
        margins = labels[lane] * (features[lane] @ x[lane])
        weights = labels[lane] / (1 + np.exp(margins))
        left = penalty[lane] * x[lane] - features[lane].T @ weights / len(weights)
        assert np.linalg.norm(left) <= 1e-9 * penalty[lane] * np.linalg.norm(x[lane]) + 1e-11


def flat_minimum(x, y):
    """Nothing is flatter than a high power, whose minimum is attained all the same."""
    power, unit = y
    return unit * jnp.sum(jnp.abs(x - 1) ** power)


@pytest.mark.parametrize("power", [2.0, 4.0, 6.0, 10.0, 20.0])
def test_a_flat_minimum_is_one(power):
    for unit in (1e-6, 1.0, 1e6):
        x, report = flat(np.zeros(2), (power, unit))
        assert report.status == Status.CONVERGED
        assert np.abs(x - 1).max() < 0.3


@jax.jit
def flat(x0, y):
    return loop.run(SOLVERS["newton"], bx.minimum(flat_minimum), x0, y)


def test_a_map_of_what_is_not_attained_is_nan_and_says_why():
    features, labels = separable_data(1)
    y = (features[0], labels[0], 0.0, 1.0)
    solve = bx.solution_map(bx.minimum(logistic), SOLVERS["newton"])
    assert np.all(np.isnan(solve(np.zeros(3), y)))
    assert solve.with_report(np.zeros(3), y)[1].status == Status.UNBOUNDED
    assert "penalty" in Status.UNBOUNDED.remedy


def test_a_stall_at_rounding_level_is_a_solution_and_the_report_says_so():
    """No step brings F below its rounding error, whatever tolerance is asked for."""
    y = (1.0, 1.0, MATRIX, SOLUTION)
    solver = bx.Newton(bx.Dense(), rtol=1e-30)
    x, report = jax.jit(loop.run)(solver, PROBLEM, np.zeros(3), y)
    assert report.status == Status.CONVERGED
    assert report.residual <= report.rounding <= 1e-13
    np.testing.assert_allclose(x, SOLUTION, rtol=1e-14)
