"""Every estimator equals double-precision numbers from independent code, at the stored iterates.

The numbers come from dense Jacobians and inverses; see the keys of the files: inner problem, outer
objectives, iterates x and the estimates at them.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx

DATA = pathlib.Path(__file__).parent / "reference"
CG = bx.CG(rtol=1e-14, maxiter=100)
RULES = {
    "vanilla": bx.Implicit(CG),
    "newton": bx.Preconditioned(bx.Implicit(CG), step=bx.NewtonStep(CG)),
    "jacobi": bx.Preconditioned(bx.Implicit(CG), step=bx.JacobiStep()),
    "diagonal_change": bx.Reparameterized(bx.Implicit(bx.Dense()), change=bx.DiagonalChange()),
    "exp_change": bx.Reparameterized(bx.Implicit(bx.Dense()), change=bx.ExpChange()),
}
DEFAULTS = {
    "vanilla": bx.Implicit(),
    "newton": bx.Preconditioned(bx.Implicit(), step=bx.NewtonStep()),
    "jacobi": bx.Preconditioned(bx.Implicit(), step=bx.JacobiStep()),
    "diagonal_change": bx.Reparameterized(bx.Implicit(), change=bx.DiagonalChange()),
}
CASES = [
    ("diabetes_ridge", "linear"),
    ("diabetes_ridge", "quadratic"),
    ("synthetic_logistic", "logistic"),
]


@functools.cache
def load(name):
    return json.loads((DATA / f"{name}.json").read_text())


@functools.cache
def inner_problem(name):
    data = load(name)
    features, targets = jnp.array(data["X"]), jnp.array(data["t"])
    n, d = features.shape

    def ridge(x, y):
        return jnp.sum((features @ x - targets) ** 2) / (2 * n) + jnp.sum(jnp.exp(y) * x**2) / (
            2 * d
        )

    def logistic(x, y):
        loss = jnp.mean(jax.nn.softplus(-targets * (features @ x)))
        return loss + jnp.mean(jnp.exp(y) * x**2) / 2

    return bx.minimum({"ridge_regression": ridge, "logistic_regression": logistic}[data["inner"]])


@functools.cache
def outer_objective(name, outer):
    data = load(name)
    if outer == "logistic":
        features, targets = jnp.array(data["X_val"]), jnp.array(data["t_val"])
        return lambda x, y: jnp.mean(jax.nn.softplus(-targets * (features @ x)))
    matrix, vector = jnp.array(data["A_out"]), jnp.array(data["b_out"])
    if outer == "linear":
        return lambda x, y: vector @ x + jnp.sum(y**2)
    return lambda x, y: jnp.sum((matrix @ x - vector) ** 2) / 2


def stored(name, outer, estimate):
    """Return y, the iterates (count, d) and the numbers of one estimator (count, d)."""
    data = load(name)
    (case,) = (case for case in data["cases"] if case["outer"] == outer)
    iterates = jnp.array([iterate["x"] for iterate in case["iterates"]])
    numbers = np.array([iterate["estimates"][estimate] for iterate in case["iterates"]])
    return jnp.array(data["y"]), iterates, numbers


def assert_equal_to_rounding(actual, expected, tolerance=1e-8):
    """Compare hypergradients by norm, iterate by iterate, and by entry, relative to the norm."""
    size = np.linalg.norm(expected, axis=-1, keepdims=True)
    error = np.abs(np.asarray(actual) - expected)
    assert np.all(np.linalg.norm(error, axis=-1, keepdims=True) <= tolerance * size)
    assert np.all(error <= tolerance * np.maximum(np.abs(expected), 1e-3 * size))


def by_pullback(problem, outer, rule, y):
    def estimate(x):
        x, _ = rule.refine(problem, x, y)
        outer_x, outer_y = jax.grad(outer, (0, 1))(x, y)
        cotangent, _ = rule.pullback(problem, x, y, outer_x)
        return outer_y + cotangent

    return estimate


def by_grad(problem, outer, rule, y):
    # A solver without steps returns its start, so that the estimate is that at the iterate.
    solve = bx.solution_map(problem, bx.GradientDescent(0.1, maxiter=0), rule)
    return lambda x: jax.grad(lambda y: outer(solve(x, y), y))(y)


def by_engine(problem, outer, rule, y):
    solver = bx.GradientDescent(0.1, maxiter=0)
    engine = bx.value_and_hypergradient(outer, problem, solver, rule)
    return lambda x: engine(y, bx.cold_start(x)).gradient


@pytest.mark.parametrize("way", [by_pullback, by_grad, by_engine])
@pytest.mark.parametrize("estimate", RULES)
@pytest.mark.parametrize(("name", "outer"), CASES)
def test_estimator_equals_reference(name, outer, estimate, way):
    y, iterates, numbers = stored(name, outer, estimate)
    function = way(inner_problem(name), outer_objective(name, outer), RULES[estimate], y)
    assert_equal_to_rounding(jax.jit(jax.vmap(function))(iterates), numbers)


@pytest.mark.parametrize("estimate", DEFAULTS)
def test_default_linear_solvers_are_accurate_enough(estimate):
    name, outer = "synthetic_logistic", "logistic"
    y, iterates, numbers = stored(name, outer, estimate)
    function = by_grad(inner_problem(name), outer_objective(name, outer), DEFAULTS[estimate], y)
    assert_equal_to_rounding(jax.jit(jax.vmap(function))(iterates), numbers)


@pytest.mark.parametrize(("name", "outer"), CASES)
def test_converged_solution_gives_the_exact_hypergradient(name, outer):
    data = load(name)
    (case,) = (case for case in data["cases"] if case["outer"] == outer)
    engine = bx.value_and_hypergradient(
        outer_objective(name, outer), inner_problem(name), bx.Newton()
    )
    result = engine(jnp.array(data["y"]), bx.cold_start(jnp.zeros(len(data["x_star"]))))
    np.testing.assert_allclose(result.x, data["x_star"], rtol=1e-8, atol=1e-10)
    assert_equal_to_rounding(result.gradient, np.array(case["exact"]))
