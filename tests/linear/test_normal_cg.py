"""Conjugate gradients on the normal equations."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import bilevax as bx
from bilevax import Status
from tests.linear import systems
from tests.linear.systems import GENERAL, SIZE, conjugate_gradients, relative_error, vector

A = 4 * np.eye(SIZE) + np.random.default_rng(0).normal(size=(SIZE, SIZE))
B = vector()
ROTATION = np.kron(np.eye(SIZE // 2), [[0.0, 1.0], [-1.0, 0.0]])
SHIFT = np.roll(np.eye(SIZE), 1, axis=0)


def normal_cg(rtol=1e-10, **changes):
    return bx.NormalCG(rtol=rtol, **{"maxiter": 1000, **changes})


def solve(solver, matrix, rhs, guess=None, **options):
    return systems.solve(solver, matrix, rhs, guess, structure=GENERAL, **options)


@pytest.mark.parametrize("steps", range(1, SIZE))
def test_iterates_are_those_of_conjugate_gradients_on_the_normal_equations(steps):
    v, report = solve(normal_cg(0.0, maxiter=steps), A, B)
    expected = conjugate_gradients(A.T @ A, A.T @ B, steps)[-1]
    assert relative_error(v, expected) < 1e-11
    assert (report.status, report.iterations) == (Status.TRUNCATED, steps)
    np.testing.assert_allclose(
        report.residual, np.linalg.norm(B - A @ expected) / np.linalg.norm(B)
    )


def test_preconditioned_iterates_are_the_published_ones():
    preconditioner = np.linalg.inv(A.T @ A + np.eye(SIZE))
    solver = normal_cg(0.0, maxiter=3, preconditioner=Partial(jnp.matmul, preconditioner))
    v, report = solve(solver, A, B)
    expected = conjugate_gradients(A.T @ A, A.T @ B, 3, preconditioner)[-1]
    assert relative_error(v, expected) < 1e-11
    assert (report.status, report.iterations) == (Status.TRUNCATED, 3)


@pytest.mark.parametrize("scale_of_a", [1e-12, 1.0, 1e12])
def test_the_exact_preconditioner_takes_one_step_at_any_scale(scale_of_a):
    matrix = (scale_of_a * A).astype(np.float32)
    inverse = np.linalg.inv(A.T @ A) / scale_of_a**2
    solver = normal_cg(1e-5, preconditioner=Partial(jnp.matmul, inverse.astype(np.float32)))
    v, report = solve(solver, matrix, B.astype(np.float32))
    assert report.status is Status.CONVERGED
    assert report.iterations <= 2
    assert relative_error(v, np.linalg.solve(scale_of_a * A, B)) < 1e-5


@pytest.mark.parametrize(
    "matrix", [ROTATION, np.roll(np.eye(SIZE), 1, axis=0)], ids=["rotation", "shift"]
)
def test_an_orthogonal_matrix_takes_one_step(matrix):
    v, report = solve(normal_cg(), matrix, B)
    np.testing.assert_allclose(v, matrix.T @ B, rtol=1e-14)
    assert (report.status, report.iterations) == (Status.CONVERGED, 1)


def test_an_indefinite_symmetric_matrix_is_no_trouble():
    matrix = systems.with_spectrum(np.array([-3.0, -2, -1, 1, 2, 3, 4, 5]))
    v, report = solve(normal_cg(), matrix, B)
    assert report.status is Status.CONVERGED
    assert relative_error(v, np.linalg.solve(matrix, B)) < 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_a_singular_system_breaks_down_at_the_least_squares_solution(seed):
    generator = np.random.default_rng(seed)
    matrix = A.copy()
    matrix[:, -1] = matrix[:, 0]  # two equal columns
    b = generator.normal(size=SIZE)
    v, report = solve(normal_cg(), matrix, b)
    expected = np.linalg.lstsq(matrix, b, rcond=1e-10)[0]
    assert report.status is Status.BREAKDOWN
    assert report.iterations <= 2 * SIZE
    assert relative_error(v, expected) < 1e-8
    np.testing.assert_allclose(report.residual, systems.relative_residual(matrix, expected, b))


def test_the_zero_matrix_breaks_down():
    v, report = solve(normal_cg(), np.zeros((SIZE, SIZE)), B)
    assert (report.status, report.iterations) == (Status.BREAKDOWN, 0)
    assert np.all(np.isnan(v))


def test_right_hand_side_zero():
    v, report = solve(normal_cg(), A, np.zeros(SIZE))
    np.testing.assert_array_equal(v, 0)
    assert (report.status, report.iterations, report.residual) == (Status.CONVERGED, 0, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_operator_that_is_not_finite(bad):
    matrix = A.copy()
    matrix[1, 2] = bad
    v, report = solve(normal_cg(), matrix, B)
    assert report.status is Status.NONFINITE
    assert np.all(np.isnan(v))


@pytest.mark.parametrize("rtol", [0.0, 1e-10])
def test_no_steps_give_no_solution(rtol):
    v, report = solve(normal_cg(rtol, maxiter=0), A, B)
    assert (report.status, report.iterations) == (
        Status.TRUNCATED if rtol == 0 else Status.MAXITER,
        0,
    )
    assert np.all(np.isnan(v))


def test_absolute_tolerance():
    _, report = solve(normal_cg(0.0, atol=0.3), A, B)
    distances = [np.linalg.norm(B - A @ x) for x in conjugate_gradients(A.T @ A, A.T @ B, SIZE)]
    assert report.status is Status.CONVERGED
    assert report.iterations == 1 + np.argmax(np.array(distances) <= 0.3)


def test_damping_adds_a_multiple_of_the_identity():
    v, report = solve(normal_cg(damping=2.5), A, B)
    assert report.status is Status.CONVERGED
    assert relative_error(v, np.linalg.solve(A + 2.5 * np.eye(SIZE), B)) < 1e-9


def test_guesses():
    truth = np.linalg.solve(A, B)
    cold, cold_report = solve(normal_cg(), A, B)
    for bad in (1e9 * truth, np.full(SIZE, np.nan), -truth):
        v, report = solve(normal_cg(), A, B, bad)
        assert (report.status, report.iterations) == (Status.CONVERGED, cold_report.iterations)
        assert relative_error(v, cold) < 1e-12
        nothing, report = solve(normal_cg(maxiter=0), A, B, bad)
        assert report.status is Status.MAXITER
        assert np.all(np.isnan(nothing))
    near = truth * (1 + 1e-8 * vector(7))
    v, report = solve(normal_cg(1e-9), A, B, near)
    assert report.status is Status.CONVERGED
    assert report.iterations < cold_report.iterations
    assert systems.relative_residual(A, v, B) <= 1e-9
    same, report = solve(normal_cg(maxiter=0), A, B, near)
    assert report.status is Status.MAXITER
    np.testing.assert_allclose(same, near, rtol=1e-14)


@pytest.mark.parametrize("guess", [None, vector(3)], ids=["no guess", "guess"])
@pytest.mark.parametrize("changes", [{}, {"maxiter": 3}, {"maxiter": 0}], ids=str)
def test_products_are_counted_exactly(changes, guess):
    report, count = systems.count_products(normal_cg(**changes), A, B, guess)
    assert report.products == count
