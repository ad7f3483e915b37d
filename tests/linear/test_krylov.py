"""GMRES and BiCGStab on nonsymmetric systems."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import bilevax as bx
from bilevax import Status
from tests.everyday import slow
from tests.linear import systems
from tests.linear.systems import GENERAL, SIZE, relative_error, relative_residual, vector

A = 4 * np.eye(SIZE) + np.random.default_rng(0).normal(size=(SIZE, SIZE))
B = vector()
TRUTH = np.linalg.solve(A, B)
SINGULAR = np.diag([1.0, 2, 3, 4, 5, 6, 7, 0])

both = pytest.mark.parametrize("kind", [bx.GMRES, bx.BiCGStab])


def make(kind, rtol=1e-10, **changes):
    return kind(rtol=rtol, **{"maxiter": 1000, **changes})


def solve(solver, matrix, rhs, guess=None, **options):
    return systems.solve(solver, matrix, rhs, guess, structure=GENERAL, **options)


@both
@pytest.mark.parametrize("seed", range(5))
def test_solves_nonsymmetric_systems(kind, seed):
    generator = np.random.default_rng(seed)
    matrix = np.diag(generator.uniform(2, 6, SIZE)) + generator.normal(size=(SIZE, SIZE)) / 2
    b = generator.normal(size=SIZE)
    v, report = solve(make(kind), matrix, b)
    assert report.status is Status.CONVERGED
    assert relative_error(v, np.linalg.solve(matrix, b)) < 1e-9
    np.testing.assert_allclose(report.residual, relative_residual(matrix, v, b), atol=1e-14)


@pytest.mark.parametrize(("dtype", "condition"), [slow(np.float32, 1e4), (np.float64, 1e8)])
def test_gmres_does_not_square_the_condition_number(dtype, condition):
    """By default the tolerance is eps^(3/4), which rounding may miss by a small factor.

    Where the condition number is squared, the worst residual of these systems is 100 times that in
    float32 and 20 times in float64.
    """
    residuals = []
    for seed in range(40):
        generator = np.random.default_rng(seed)
        left, right = (np.linalg.qr(generator.normal(size=(SIZE, SIZE)))[0] for _ in range(2))
        matrix = left * np.geomspace(1, 1 / condition, SIZE) @ right
        b = matrix @ generator.normal(size=SIZE)
        _, report = solve(bx.GMRES(), matrix.astype(dtype), b.astype(dtype))
        assert report.status is Status.CONVERGED
        residuals.append(report.residual)
    assert max(residuals) < 10 * np.finfo(dtype).eps ** 0.75


@both
def test_converges_to_what_rounding_allows_when_more_is_asked_for(kind):
    v, report = solve(make(kind, 1e-12), A.astype(np.float32), B.astype(np.float32))
    assert report.status is Status.CONVERGED
    assert relative_error(v, TRUTH) < 1e-6


@both
def test_right_hand_side_zero(kind):
    v, report = solve(make(kind), A, np.zeros(SIZE))
    np.testing.assert_array_equal(v, 0)
    assert (report.status, report.residual) == (Status.CONVERGED, 0)


@both
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_a_singular_system_without_solution_breaks_down(kind, scale):
    v, report = solve(make(kind), scale * SINGULAR, np.ones(SIZE))
    assert report.status is Status.BREAKDOWN
    # The least-squares residual of a vector of ones is its last entry.
    assert report.residual >= 0.99 * np.sqrt(1 / SIZE)
    assert np.all(np.isnan(v)) or relative_residual(scale * SINGULAR, v, np.ones(SIZE)) < 1


@both
def test_the_zero_matrix_breaks_down(kind):
    v, report = solve(make(kind), np.zeros((SIZE, SIZE)), B)
    assert report.status is Status.BREAKDOWN
    assert np.all(np.isnan(v))


@both
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_operator_that_is_not_finite(kind, bad):
    matrix = A.copy()
    matrix[1, 2] = bad
    v, report = solve(make(kind), matrix, B)
    assert report.status is Status.NONFINITE
    assert np.all(np.isnan(v))


@both
def test_damping_adds_a_multiple_of_the_identity(kind):
    v, report = solve(make(kind, damping=2.5), A, B)
    assert report.status is Status.CONVERGED
    assert relative_error(v, np.linalg.solve(A + 2.5 * np.eye(SIZE), B)) < 1e-9


@both
@pytest.mark.parametrize("factor", [-1.0, 1e9, np.nan])
def test_a_bad_guess_is_dropped(kind, factor):
    v, report = solve(make(kind), A, B, factor * TRUTH)
    assert report.status is Status.CONVERGED
    assert relative_error(v, TRUTH) < 1e-9
    nothing, report = solve(make(kind, maxiter=0), A, B, factor * TRUTH)
    assert report.status >= Status.MAXITER
    assert np.all(np.isnan(nothing))
    np.testing.assert_allclose(report.residual, 1)


@both
def test_a_good_guess_is_kept(kind):
    guess = 0.9 * TRUTH
    v, report = solve(make(kind, maxiter=0), A, B, guess)
    assert report.status >= Status.MAXITER
    np.testing.assert_allclose(v, guess, rtol=1e-14)
    np.testing.assert_allclose(report.residual, 0.1, rtol=1e-10)
    v, report = solve(make(kind, maxiter=0), A, B, TRUTH)
    assert report.status is Status.CONVERGED
    np.testing.assert_allclose(v, TRUTH, rtol=1e-14)


@both
def test_without_a_step_there_is_no_solution(kind):
    v, report = solve(make(kind, maxiter=0), A, B)
    assert report.status is (Status.MAXITER if kind is bx.GMRES else Status.BREAKDOWN)
    assert np.all(np.isnan(v))


@both
@pytest.mark.parametrize("transpose", [slow(False), True])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_exact_preconditioner_takes_one_step(kind, scale, transpose):
    inverse = np.linalg.inv(A) / scale
    steps = {"restart": 1} if kind is bx.GMRES else {}
    solver = make(kind, 1e-5, maxiter=1, **steps)
    preconditioned = make(
        kind,
        1e-5,
        maxiter=1,
        preconditioner=Partial(jnp.matmul, inverse.astype(np.float32)),
        **steps,
    )
    matrix, b = (scale * A).astype(np.float32), B.astype(np.float32)
    _, plain = solve(solver, matrix, b, transpose=transpose)
    v, report = solve(preconditioned, matrix, b, transpose=transpose)
    assert plain.status is not Status.CONVERGED
    assert report.status is Status.CONVERGED
    assert relative_error(v, np.linalg.solve(A.T if transpose else A, B) / scale) < 1e-5


def krylov_minimum(matrix, b, dimension):
    """Return the x of smallest residual in the span of b, A b, ..."""
    basis = np.stack([np.linalg.matrix_power(matrix, k) @ b for k in range(dimension)], axis=1)
    basis, _ = np.linalg.qr(basis)
    return basis @ np.linalg.lstsq(matrix @ basis, b)[0]


@pytest.mark.parametrize("restart", [slow(1), 3])
def test_a_cycle_of_gmres_minimises_the_residual_over_the_krylov_space(restart):
    v, report = solve(make(bx.GMRES, 0.0, restart=restart, maxiter=1), A, B)
    expected = krylov_minimum(A, B, restart)
    assert (report.status, report.iterations) == (Status.TRUNCATED, 1)
    assert relative_error(v, expected) < 1e-10
    np.testing.assert_allclose(report.residual, relative_residual(A, expected, B))


def test_a_restart_of_gmres_goes_on_from_the_last_cycle():
    v, report = solve(make(bx.GMRES, 0.0, restart=3, maxiter=2), A, B)
    first = krylov_minimum(A, B, 3)
    expected = first + krylov_minimum(A, B - A @ first, 3)
    assert (report.status, report.iterations) == (Status.TRUNCATED, 2)
    assert relative_error(v, expected) < 1e-10


def test_restarted_gmres_that_stagnates_breaks_down():
    shift = np.roll(np.eye(SIZE), 1, axis=0)
    v, report = solve(make(bx.GMRES, restart=3), shift, np.eye(SIZE)[0])
    assert report.status is Status.BREAKDOWN
    assert np.all(np.isnan(v))
    v, report = solve(make(bx.GMRES), shift, np.eye(SIZE)[0])  # a full cycle solves it
    assert report.status is Status.CONVERGED
    np.testing.assert_allclose(v, np.eye(SIZE)[-1], atol=1e-14)


@pytest.mark.parametrize("guess", [None, vector(3)], ids=["no guess", "guess"])
def test_products_of_gmres_are_bounded_by_the_report(guess):
    report, count = systems.count_products(make(bx.GMRES, restart=3), A, B, guess)
    assert count <= report.products <= count + report.iterations


@pytest.mark.parametrize("restart", [0, -2])
def test_gmres_needs_a_krylov_space(restart):
    with pytest.raises(ValueError, match=f"`restart` must be positive, got {restart}"):
        bx.GMRES(restart=restart)


@pytest.mark.parametrize("maxiter", [50, 80, 88, 200])
def test_bicgstab_without_a_tolerance_keeps_what_it_has_found(maxiter):
    noise = np.random.default_rng(1).normal(size=(64, 64))
    matrix = np.eye(64) - 0.4 * noise / 16
    v, report = solve(bx.BiCGStab(rtol=0.0, maxiter=maxiter), matrix, np.ones(64))
    assert report.status is Status.CONVERGED
    assert relative_error(v, np.linalg.solve(matrix, np.ones(64))) < 1e-14
