"""Gradient descent, its accelerated form, and its line search."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import Status
from tests.solvers.problems import (
    AFFINE,
    CONTRACTION,
    MATRIX,
    QUADRATIC,
    ROSENBROCK,
    SIZE,
    SOLUTION,
    X0,
    B,
    exactly,
    quadratic,
    solve,
)

TO_THE_END = {"rtol": 1e-12, "atol": 0.0}


@pytest.mark.parametrize("steps", [0, 1, 2, 10])
@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_iterates_of_gradient_descent(rate, steps):
    x = X0.copy()
    for _ in range(steps):
        x = x - rate * (MATRIX @ x - B)
    for problem in (QUADRATIC, AFFINE):
        got, report = solve(bx.GradientDescent(rate, **exactly(steps)), problem)
        np.testing.assert_allclose(got, x, rtol=1e-12)
        assert (report.status, report.iterations) == (Status.TRUNCATED, steps)
        np.testing.assert_allclose(report.residual, np.linalg.norm(MATRIX @ x - B))
        np.testing.assert_allclose(report.initial_residual, np.linalg.norm(MATRIX @ X0 - B))


def test_on_a_fixed_point_it_is_the_damped_iteration():
    x = X0.copy()
    for _ in range(5):
        x = x + 0.5 * (MATRIX / 8 @ x + B - x)
    got, _ = solve(bx.GradientDescent(0.5, **exactly(5)), CONTRACTION, y=(MATRIX / 8, B))
    np.testing.assert_allclose(got, x, rtol=1e-12)


def nesterov(x0, rate, steps):
    """Return the extrapolated point after some steps, and how often momentum was dropped."""
    x, w, t, restarts = x0, x0, 1.0, 0
    for _ in range(steps):
        gradient = MATRIX @ x - B
        w_next = x - rate * gradient
        if gradient @ (w_next - w) > 0:
            t, restarts = 1.0, restarts + 1
        t_next = (1 + np.sqrt(1 + 4 * t * t)) / 2
        x = w_next + (t - 1) / t_next * (w_next - w)
        w, t = w_next, t_next
    return x, restarts


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 30])
def test_iterates_of_accelerated_gradient(steps):
    expected, restarts = nesterov(X0, 0.1, steps)
    assert (restarts > 0) == (steps == 30)  # momentum has been dropped by then
    got, report = solve(bx.AcceleratedGradient(0.1, **exactly(steps)))
    np.testing.assert_allclose(got, expected, rtol=1e-10)
    assert (report.status, report.iterations) == (Status.TRUNCATED, steps)


@pytest.mark.parametrize(
    "solver",
    [
        bx.GradientDescent(0.25, **TO_THE_END, maxiter=10_000),
        bx.AcceleratedGradient(0.25, **TO_THE_END, maxiter=10_000),
        bx.GradientDescent(bx.Backtracking(), **TO_THE_END, maxiter=300),
    ],
    ids=["constant", "accelerated", "backtracking"],
)
def test_reaches_the_solution_to_the_last_digits(solver):
    x, report = solve(solver)
    assert report.status is Status.CONVERGED
    np.testing.assert_allclose(x, SOLUTION, atol=1e-10)


@pytest.mark.parametrize("kind", [bx.GradientDescent, bx.AcceleratedGradient])
def test_learning_rates_in_a_batch(kind):
    rates = np.array([0.05, 0.1, 0.2])

    def one(rate):
        return bx.solution_map(QUADRATIC, kind(rate, **exactly(7))).with_report(X0, (MATRIX, B))[0]

    batch = jax.vmap(one)(rates)
    for rate, x in zip(rates, batch, strict=True):
        np.testing.assert_allclose(x, solve(kind(rate, **exactly(7)))[0], rtol=1e-12)


def armijo(x, first_step, decrease=1e-4, contraction=0.5):
    """Return the first step of the sequence that brings the decrease asked for."""

    def f(x):
        return 0.5 * x @ MATRIX @ x - B @ x

    gradient, t = MATRIX @ x - B, first_step
    while f(x - t * gradient) > f(x) - decrease * t * gradient @ gradient:
        t *= contraction
    return t


@pytest.mark.parametrize(
    "options", [{}, {"decrease": 0.45}, {"contraction": 0.3}, {"decrease": 0.4, "contraction": 0.8}]
)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_backtracking_takes_the_first_step_that_armijo_accepts(steps, options):
    x = X0.copy()
    gradient = MATRIX @ x - B  # the first trial is that of the curvature along it
    step_size = 0.5 * np.linalg.norm(gradient) / np.linalg.norm(MATRIX @ gradient)
    for _ in range(steps):
        step_size = armijo(x, 2 * step_size, **options)
        x = x - step_size * (MATRIX @ x - B)
    search = bx.Backtracking(**{"decrease": 1e-4, "contraction": 0.5, **options})
    got, _ = solve(bx.GradientDescent(search, **exactly(steps)))
    np.testing.assert_allclose(got, x, rtol=1e-12)


def test_backtracking_solves_where_no_constant_rate_is_known():
    solver = bx.GradientDescent(bx.Backtracking(), rtol=1e-6, maxiter=20_000)
    x, report = solve(solver, ROSENBROCK, np.array([-0.5, 1.0]), 10.0)
    assert report.status is Status.CONVERGED
    np.testing.assert_allclose(x, [1.0, 1.0], atol=1e-4)


def shifted(x, y):
    matrix, b, shift = y
    terms = 100 * jnp.sum(jnp.cosh(0.1 * (matrix @ x - b)))  # 100 SIZE at the minimum
    return terms + quadratic(x, (matrix, b)) - shift


SHIFTED = bx.minimum(shifted)


@pytest.mark.parametrize("left", [0.0, 1e-6, 1e6])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "solver",
    [bx.GradientDescent(bx.Backtracking()), bx.ConjugateGradient(), bx.Newton()],
    ids=["backtracking", "conjugate_gradient", "newton"],
)
def test_line_searches_bear_a_value_of_any_size_at_the_minimum(solver, dtype, left):
    """Where large terms cancel, the rounding error of f is far above eps |f|."""
    minimum = -B @ SOLUTION / 2
    shift = np.asarray(100 * SIZE + minimum - left)
    x0, y = jax.tree.map(lambda leaf: leaf.astype(dtype), (X0, (MATRIX, B, shift)))
    x, report = solve(solver, SHIFTED, x0, y)
    assert report.status is Status.CONVERGED
    np.testing.assert_allclose(x, SOLUTION, atol=100 * np.finfo(dtype).eps ** 0.75)


@pytest.mark.parametrize(
    "kind",
    [bx.GradientDescent, bx.AcceleratedGradient, functools.partial(bx.Optax, optax.identity())],
)
@pytest.mark.parametrize("bad", [0, 0.0, -0.1, float("nan")])
def test_rates_must_be_positive(kind, bad):
    with pytest.raises(ValueError, match=f"`learning_rate` must be positive, got {bad}"):
        kind(learning_rate=bad)


@pytest.mark.parametrize("field", ["rtol", "atol", "maxiter"])
@pytest.mark.parametrize(
    "make",
    [
        lambda **changes: bx.GradientDescent(0.1, **changes),
        lambda **changes: bx.AcceleratedGradient(0.1, **changes),
        bx.Newton,
        bx.ConjugateGradient,
        bx.FixedPointIteration,
    ],
    ids=["GradientDescent", "AcceleratedGradient", "Newton", "ConjugateGradient", "FixedPoint"],
)
def test_stopping_numbers_must_not_be_negative(make, field):
    with pytest.raises(ValueError, match=f"`{field}` must not be negative, got -1"):
        make(**{field: -1})


@pytest.mark.parametrize(("problem", "name"), [(AFFINE, "root"), (CONTRACTION, "fixed_point")])
@pytest.mark.parametrize(
    ("solver", "quoted"),
    [
        (bx.GradientDescent(bx.Backtracking()), "Backtracking"),
        (bx.ConjugateGradient(), "ConjugateGradient"),
    ],
)
def test_solvers_that_look_at_the_objective_need_one(solver, quoted, problem, name):
    message = rf"`{quoted}` evaluates an objective and needs `minimum\(...\)`, got `{name}\(...\)`"
    with pytest.raises(TypeError, match=message):
        solve(solver, problem)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decrease": 0.0}, "`decrease` must be positive, got 0.0"),
        ({"decrease": 0.5}, "`decrease` must be below 0.5, got 0.5"),
        ({"contraction": -1}, "`contraction` must be positive, got -1"),
        ({"contraction": 1.0}, "`contraction` must be below 1, got 1.0"),
        ({"maxiter": 0}, "`maxiter` must be positive, got 0"),
    ],
)
def test_ranges_of_backtracking(options, message):
    with pytest.raises(ValueError, match=message):
        bx.Backtracking(**options)


@pytest.mark.parametrize("kind", [bx.Newton, bx.ConjugateGradient])
def test_a_line_search_must_be_one(kind):
    with pytest.raises(TypeError, match=r"`line_search` must be a Backtracking.*got 0\.5"):
        kind(line_search=0.5)
    with pytest.raises(TypeError, match="Did you forget the parentheses"):
        kind(line_search=bx.Backtracking)
