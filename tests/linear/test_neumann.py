"""The truncated Neumann series."""

import numpy as np
import pytest

import bilevax as bx
from bilevax import Status
from tests.linear import systems
from tests.linear.systems import GENERAL, SIZE, vector

T = np.random.default_rng(0).normal(size=(SIZE, SIZE)) / 12
A = np.eye(SIZE) - T
B = vector()


def solve(solver, matrix, rhs, guess=None, **options):
    return systems.solve(solver, matrix, rhs, guess, structure=GENERAL, **options)


def series(matrix, b, steps, step_size):
    """Return the sum of the first terms, from powers of the iteration matrix."""
    iteration = np.eye(SIZE) - step_size * matrix
    powers = [np.linalg.matrix_power(iteration, k) for k in range(steps)]
    return step_size * sum(powers) @ b


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("step_size", [1.0, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_is_the_sum_of_the_first_terms(steps, step_size, transpose):
    matrix = A.T if transpose else A
    v, report = solve(bx.Neumann(steps, step_size=step_size), A, B, transpose=transpose)
    expected = series(matrix, B, steps, step_size)
    np.testing.assert_allclose(v, expected, rtol=1e-12)
    assert (report.status, report.iterations) == (Status.TRUNCATED, steps)
    np.testing.assert_allclose(report.residual, systems.relative_residual(matrix, expected, B))


def test_many_terms_solve_the_system():
    v, report = solve(bx.Neumann(200, step_size=1.0), A, B)
    assert report.residual < 1e-14
    np.testing.assert_allclose(v, np.linalg.solve(A, B), rtol=1e-12)


def test_is_the_recursion_of_the_fixed_point_method():
    v = np.zeros(SIZE)
    for _ in range(5):
        v = T.T @ v + B
    got, _ = solve(bx.Neumann(5, step_size=1.0), A, B, transpose=True)
    np.testing.assert_allclose(got, v, rtol=1e-13)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_step_size_has_the_unit_of_the_inverse(scale):
    v, report = solve(bx.Neumann(7, step_size=0.5 / scale), scale * A, 1e-20 * B)
    np.testing.assert_allclose(v, 1e-20 / scale * series(A, B, 7, 0.5), rtol=1e-12)
    assert report.status is Status.TRUNCATED


def test_damping_sums_the_series_of_the_damped_matrix():
    v, _ = solve(bx.Neumann(7, step_size=0.5, damping=0.7), A, B)
    np.testing.assert_allclose(v, series(A + 0.7 * np.eye(SIZE), B, 7, 0.5), rtol=1e-12)


def test_guesses_are_not_used():
    v, _ = solve(bx.Neumann(3, step_size=1.0), A, B, np.full(SIZE, np.nan))
    np.testing.assert_allclose(v, series(A, B, 3, 1.0), rtol=1e-13)


@pytest.mark.parametrize(("radius", "status"), [(0.99, Status.TRUNCATED), (1.01, Status.DIVERGED)])
def test_diverges_where_the_spectral_radius_exceeds_one(radius, status):
    matrix = np.eye(SIZE) - radius * systems.with_spectrum(np.linspace(-1, 1, SIZE))
    _, report = solve(bx.Neumann(200, step_size=1.0), matrix, B)
    assert report.status is status


def test_overflow_is_not_finite():
    _, report = solve(bx.Neumann(2000, step_size=1.0), -9 * np.eye(SIZE), B)
    assert report.status is Status.NONFINITE


def test_right_hand_side_zero():
    v, report = solve(bx.Neumann(3, step_size=1.0), A, np.zeros(SIZE))
    np.testing.assert_array_equal(v, 0)
    assert (report.status, report.residual) == (Status.TRUNCATED, 0)


def test_products_are_counted_exactly():
    report, count = systems.count_products(bx.Neumann(6, step_size=1.0), A, B)
    assert report.products == count == 6


@pytest.mark.parametrize("steps", [0, -1])
def test_needs_a_term(steps):
    with pytest.raises(ValueError, match=f"`steps` must be positive, got {steps}"):
        bx.Neumann(steps)


@pytest.mark.parametrize("step_size", [0, 0.0, -0.5, float("nan")])
def test_needs_a_positive_step_size(step_size):
    with pytest.raises(ValueError, match=f"`step_size` must be positive, got {step_size}"):
        bx.Neumann(3, step_size=step_size)
