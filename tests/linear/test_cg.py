"""Conjugate gradients: steps, products, statuses and scales."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import bilevax as bx
from bilevax import Status
from tests.linear.systems import (
    POSITIVE_DEFINITE,
    SIZE,
    conjugate_gradients,
    count_products,
    relative_error,
    relative_residual,
    solve,
    vector,
    with_spectrum,
)

MODERATE = with_spectrum(np.linspace(1.0, 10.0, SIZE))


def cg(rtol=1e-10, **changes):
    """Return a solver of which every number is given, so that changing one compiles nothing."""
    return bx.CG(rtol=rtol, **{"maxiter": 1000, **changes})


def test_the_identity_takes_one_step():
    b = vector()
    v, report = solve(cg(), np.eye(SIZE), b)
    np.testing.assert_allclose(v, b, rtol=1e-15)
    assert (report.status, report.iterations, report.products) == (Status.CONVERGED, 1, 2)


@pytest.mark.parametrize("distinct", [1, 2, 3, 5, 8])
def test_takes_as_many_steps_as_there_are_distinct_eigenvalues(distinct):
    eigenvalues = np.resize(np.arange(1.0, distinct + 1), SIZE)
    v, report = solve(cg(), with_spectrum(eigenvalues), vector())
    assert report.status is Status.CONVERGED
    assert report.iterations == distinct
    assert relative_error(v, np.linalg.solve(with_spectrum(eigenvalues), vector())) < 1e-10


@pytest.mark.parametrize("seed", range(5))
def test_takes_at_most_as_many_steps_as_there_are_unknowns(seed):
    matrix = with_spectrum(np.random.default_rng(seed).uniform(1.0, 5.0, SIZE), seed)
    b = vector(seed)
    v, report = solve(cg(), matrix, b)
    assert report.status is Status.CONVERGED
    assert report.iterations <= SIZE
    assert relative_error(v, np.linalg.solve(matrix, b)) < 1e-9


@pytest.mark.parametrize("steps", range(1, SIZE))
def test_iterates_are_those_of_hestenes_and_stiefel(steps):
    b = vector()
    v, report = solve(cg(rtol=0.0, maxiter=steps), MODERATE, b)
    iterates = conjugate_gradients(MODERATE, b, steps)
    residuals = [relative_residual(MODERATE, x, b) for x in iterates]
    assert np.argmin(residuals) == steps - 1  # here the last iterate is the best one
    assert relative_error(v, iterates[-1]) < 1e-12
    assert (report.status, report.iterations) == (Status.TRUNCATED, steps)
    np.testing.assert_allclose(report.residual, residuals[-1], rtol=1e-8)


def test_returns_the_best_iterate_when_the_last_one_is_worse():
    matrix, b = with_spectrum(np.logspace(0, 4, SIZE)), vector()
    for steps in range(1, SIZE):
        iterates = conjugate_gradients(matrix, b, steps)
        residuals = [relative_residual(matrix, x, b) for x in iterates]
        if np.argmin(residuals) < steps - 1:
            break
    assert np.argmin(residuals) < steps - 1
    v, report = solve(cg(rtol=0.0, maxiter=steps), matrix, b)
    assert (report.status, report.iterations) == (Status.TRUNCATED, steps)
    assert relative_error(v, iterates[np.argmin(residuals)]) < 1e-8
    np.testing.assert_allclose(report.residual, min(residuals), rtol=1e-6)


@pytest.mark.parametrize("scale_of_b", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("scale_of_a", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize(
    ("dtype", "rtol", "accuracy"), [(np.float32, 1e-5, 1e-4), (np.float64, 1e-10, 1e-9)]
)
def test_neither_the_scale_of_a_nor_that_of_b_matters(
    dtype, rtol, accuracy, scale_of_a, scale_of_b
):
    b = vector()
    _, reference = solve(cg(rtol), MODERATE.astype(dtype), b.astype(dtype))
    matrix = (scale_of_a * MODERATE).astype(dtype)
    rhs = (scale_of_b * b).astype(dtype)
    v, report = solve(cg(rtol), matrix, rhs)
    truth = np.linalg.solve(MODERATE, b) * (scale_of_b / scale_of_a)
    assert v.dtype == dtype
    assert report.status is Status.CONVERGED
    assert report.iterations == reference.iterations
    assert report.residual <= rtol
    assert relative_error(v, truth) < accuracy


def test_default_tolerance_follows_the_dtype():
    b = vector()
    for dtype, rtol in [(np.float32, 6.4e-6), (np.float64, 1.9e-12)]:
        _, report = solve(bx.CG(), MODERATE.astype(dtype), b.astype(dtype))
        assert report.status is Status.CONVERGED
        assert report.residual <= rtol


def test_right_hand_side_with_zero_entries():
    b = np.zeros(SIZE)
    b[[0, 3]] = 1.0
    v, report = solve(cg(), np.diag(np.arange(1.0, SIZE + 1)), b)
    assert (report.status, report.iterations) == (Status.CONVERGED, 2)
    np.testing.assert_allclose(v, b / np.arange(1.0, SIZE + 1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("matrix", [MODERATE, np.zeros((SIZE, SIZE))], ids=["regular", "zero"])
def test_right_hand_side_zero(matrix):
    v, report = solve(cg(), matrix, np.zeros(SIZE))
    np.testing.assert_array_equal(v, 0)
    assert report == (Status.CONVERGED, 0, 2, 0, 0)  # a step that leads nowhere, and the check


def test_condition_number_1e8():
    matrix = with_spectrum(np.logspace(0, 8, SIZE))
    truth = vector()
    b = matrix @ truth
    v, report = solve(cg(rtol=1e-12), matrix, b)
    assert report.status is Status.CONVERGED
    assert relative_residual(matrix, v, b) <= 1e-12
    # ||v - truth|| <= ||A^{-1}|| ||r||, and here ||A^{-1}|| = 1.
    assert np.linalg.norm(v - truth) <= 1.01 * 1e-12 * np.linalg.norm(b)


def test_converges_to_what_rounding_allows_when_more_is_asked_for():
    b = vector().astype(np.float32)
    v, report = solve(cg(rtol=1e-12), MODERATE.astype(np.float32), b)
    assert report.status is Status.CONVERGED
    assert relative_error(v, np.linalg.solve(MODERATE, b)) < 1e-6


def test_absolute_tolerance():
    b = vector()
    v, report = solve(cg(rtol=0.0, atol=0.3), MODERATE, b)
    distances = [np.linalg.norm(b - MODERATE @ x) for x in conjugate_gradients(MODERATE, b, SIZE)]
    assert report.status is Status.CONVERGED
    assert report.iterations == 1 + np.argmax(np.array(distances) <= 0.3)
    np.testing.assert_allclose(
        np.linalg.norm(b - MODERATE @ v), report.residual * np.linalg.norm(b)
    )


@pytest.mark.parametrize("eigenvalues", [[-1.0] * SIZE, [1.0] * 7 + [-1.0], [-3.0, *range(1, 8)]])
def test_negative_curvature_is_indefinite(eigenvalues):
    _, report = solve(cg(), with_spectrum(np.array(eigenvalues)), vector())
    assert report.status is Status.INDEFINITE


def test_no_iterate_at_all_is_nan():
    v, report = solve(cg(), -np.eye(SIZE), vector())
    assert (report.status, report.iterations) == (Status.INDEFINITE, 0)
    assert np.all(np.isnan(v))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_singular_system_without_solution_breaks_down(dtype, scale):
    matrix = scale * np.diag([1.0, 2, 3, 4, 5, 6, 7, 0])
    _, report = solve(cg(1e-5), matrix.astype(dtype), np.ones(SIZE, dtype))
    assert report.status is Status.BREAKDOWN


def test_the_zero_matrix_breaks_down():
    v, report = solve(cg(), np.zeros((SIZE, SIZE)), vector())
    assert report.status is Status.BREAKDOWN
    assert np.all(np.isnan(v))


def test_a_singular_system_with_solutions_gives_the_smallest_one():
    matrix = with_spectrum(np.array([1.0, 2, 3, 4, 5, 6, 0, 0]))
    b = matrix @ vector()
    v, report = solve(cg(), matrix, b)
    assert report.status is Status.CONVERGED
    assert relative_error(v, np.linalg.pinv(matrix, rcond=1e-10) @ b) < 1e-9


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_operator_that_is_not_finite(bad):
    matrix = MODERATE.copy()
    matrix[2, 2] = bad
    v, report = solve(cg(), matrix, vector())
    assert (report.status, report.iterations) == (Status.NONFINITE, 0)
    assert np.all(np.isnan(v))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_right_hand_side_that_is_not_finite(bad):
    b = vector()
    b[2] = bad
    v, report = solve(cg(), MODERATE, b)
    assert report.status is Status.NONFINITE
    assert np.all(np.isnan(v))


@pytest.mark.parametrize("rtol", [0.0, 1e-10])
def test_no_steps_give_no_solution(rtol):
    v, report = solve(cg(rtol, maxiter=0), MODERATE, vector())
    assert report.status is (Status.TRUNCATED if rtol == 0 else Status.MAXITER)
    assert (report.iterations, report.products) == (0, 0)
    assert np.all(np.isnan(v))
    assert report.residual == 1


def test_one_step_is_the_steepest_descent_step():
    b = vector()
    v, report = solve(cg(maxiter=1), MODERATE, b)
    assert (report.status, report.iterations) == (Status.MAXITER, 1)
    np.testing.assert_allclose(v, (b @ b) / (b @ MODERATE @ b) * b, rtol=1e-13)


def test_a_near_guess_takes_fewer_steps():
    b = vector()
    truth = np.linalg.solve(MODERATE, b)
    cold, cold_report = solve(cg(), MODERATE, b, np.zeros(SIZE))
    near = truth * (1 + 1e-8 * vector(7))
    warm, warm_report = solve(cg(), MODERATE, b, near)
    exact, exact_report = solve(cg(), MODERATE, b, truth)
    for v, report in [(cold, cold_report), (warm, warm_report), (exact, exact_report)]:
        assert report.status is Status.CONVERGED
        assert relative_residual(MODERATE, v, b) <= 1e-10
    assert warm_report.iterations < cold_report.iterations
    assert (exact_report.iterations, exact_report.products) == (0, 1)
    np.testing.assert_allclose(exact, truth, rtol=1e-15)


@pytest.mark.parametrize("bad", [-5.0, 1e12, 1e280, np.nan, np.inf])
@pytest.mark.parametrize("scale_of_b", [1e-20, 1.0, 1e20])
def test_a_bad_guess_costs_one_product_and_nothing_else(bad, scale_of_b):
    b = scale_of_b * vector()
    without, cold = solve(cg(), MODERATE, b)
    v, report = solve(cg(), MODERATE, b, np.full(SIZE, bad * scale_of_b))
    assert report[:3] == cold._replace(products=cold.products + 1)[:3]
    np.testing.assert_allclose(report.residual, cold.residual, atol=1e-14)
    np.testing.assert_allclose(report.rounding, cold.rounding, rtol=1e-12)
    assert relative_error(v, without) < 1e-14


def test_no_steps_return_the_guess():
    b = vector()
    guess = 0.9 * np.linalg.solve(MODERATE, b)
    v, report = solve(cg(maxiter=0), MODERATE, b, guess)
    assert (report.status, report.iterations, report.products) == (Status.MAXITER, 0, 1)
    np.testing.assert_allclose(v, guess, rtol=1e-15)
    np.testing.assert_allclose(report.residual, 0.1, rtol=1e-12)


@pytest.mark.parametrize("bad", [1e6, np.nan])
def test_no_steps_and_a_bad_guess_give_no_solution(bad):
    v, report = solve(cg(maxiter=0), MODERATE, vector(), np.full(SIZE, bad))
    assert (report.status, report.iterations) == (Status.MAXITER, 0)
    assert np.all(np.isnan(v))


@pytest.mark.parametrize("damping", [0.0, 0.3, 1e3])
def test_damping_adds_a_multiple_of_the_identity(damping):
    b = vector()
    v, report = solve(cg(damping=damping), MODERATE, b)
    assert report.status is Status.CONVERGED
    assert relative_error(v, np.linalg.solve(MODERATE + damping * np.eye(SIZE), b)) < 1e-9


def test_damping_makes_a_singular_system_regular():
    matrix, b = np.diag([1.0, 2, 3, 4, 5, 6, 7, 0]), np.ones(SIZE)
    v, report = solve(cg(damping=0.5), matrix, b)
    assert report.status is Status.CONVERGED
    np.testing.assert_allclose(v, b / (np.diag(matrix) + 0.5), rtol=1e-9)


def preconditioned(diagonal, **changes):
    return cg(preconditioner=Partial(operator.mul, diagonal), **changes)


def test_a_perfect_preconditioner_takes_one_step():
    diagonal, b = np.logspace(0, 6, SIZE), vector()
    v, report = solve(preconditioned(1 / diagonal), np.diag(diagonal), b)
    assert (report.status, report.iterations) == (Status.CONVERGED, 1)
    np.testing.assert_allclose(v, b / diagonal, rtol=1e-12)


def test_a_jacobi_preconditioner_cuts_the_steps_on_a_badly_scaled_matrix():
    scaling = np.diag(np.logspace(0, 3, SIZE))
    matrix = scaling @ with_spectrum(np.linspace(1.0, 1.5, SIZE)) @ scaling
    b = vector()
    plain, plain_report = solve(preconditioned(np.ones(SIZE), rtol=1e-6), matrix, b)
    jacobi, jacobi_report = solve(preconditioned(1 / np.diag(matrix), rtol=1e-6), matrix, b)
    assert plain_report.status is jacobi_report.status is Status.CONVERGED
    assert jacobi_report.iterations <= SIZE < plain_report.iterations
    assert relative_residual(matrix, jacobi, b) <= 1e-6
    assert relative_residual(matrix, plain, b) <= 1e-6


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_preconditioned_iterates_are_the_published_ones(steps):
    b = vector()
    preconditioner = with_spectrum(np.linspace(0.5, 2.0, SIZE), seed=3)
    solver = cg(0.0, maxiter=steps, preconditioner=Partial(jnp.matmul, preconditioner))
    v, report = solve(solver, MODERATE, b)
    iterates = conjugate_gradients(MODERATE, b, steps, preconditioner)
    residuals = [relative_residual(MODERATE, x, b) for x in iterates]
    assert (report.status, report.iterations) == (Status.TRUNCATED, steps)
    assert relative_error(v, iterates[np.argmin(residuals)]) < 1e-12


def test_an_indefinite_preconditioner_does_not_pass_unnoticed():
    diagonal = np.ones(SIZE)
    diagonal[0] = -1.0
    _, report = solve(preconditioned(diagonal), MODERATE, np.eye(SIZE)[0])
    assert report.status in (Status.BREAKDOWN, Status.INDEFINITE)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_vectors_that_are_pytrees(dtype):
    matrix, b = MODERATE[:4, :4].astype(dtype), vector()[:4].astype(dtype)
    rhs = {"a": b[:2], "b": (b[2].reshape(()), b[3:].reshape(1, 1))}

    def product(v):
        flat = jnp.concatenate([v["a"], v["b"][0].reshape(1), v["b"][1].reshape(1)])
        image = matrix @ flat
        return {"a": image[:2], "b": (image[2], image[3:].reshape(1, 1))}

    like = jax.tree.map(jnp.asarray, rhs)
    v, report = jax.jit(
        lambda rhs: bx.linear_solve(bx.LinearOperator(product, POSITIVE_DEFINITE, like), rhs, cg())
    )(rhs)
    assert jax.tree.structure(v) == jax.tree.structure(rhs)
    assert jax.tree.map(jnp.shape, v) == jax.tree.map(jnp.shape, rhs)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(v))
    assert report.status == Status.CONVERGED
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(v)])
    accuracy = {np.float32: 1e-5, np.float64: 1e-12}[dtype]
    assert relative_error(flat, np.linalg.solve(MODERATE[:4, :4], vector()[:4])) < accuracy


@pytest.mark.parametrize("guess", [None, vector(3), np.full(SIZE, np.nan)], ids=["no", "ok", "bad"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"maxiter": 3}, {"maxiter": 0}, {"rtol": 0.0, "maxiter": 5}, {"rtol": 1e-300}],
    ids=str,
)
def test_products_are_counted_exactly(changes, guess):
    report, count = count_products(cg(**changes), MODERATE, vector(), guess)
    assert report.products == count


def energy_error(matrix, b, v):
    x = np.linalg.solve(matrix, b)
    return np.sqrt((x - v) @ matrix @ (x - v) / (x @ matrix @ x))


def test_the_energy_norm_feels_what_residuals_do_not():
    # The residual of the second entry is 1e-4, its part of the energy norm 1e-4 / sqrt(1e-6).
    matrix = with_spectrum(np.r_[1e-6, np.linspace(1.0, 2.0, SIZE - 1)])
    soft, stiff = np.linalg.eigh(matrix)[1][:, [0, -1]].T
    b = stiff + 1e-4 * soft
    coarse, report = solve(cg(rtol=0.01), matrix, b)
    assert report.status is Status.CONVERGED
    assert energy_error(matrix, b, coarse) > 0.05
    fine, report = solve(cg(rtol=0.01, energy_rtol=0.01), matrix, b)
    assert report.status is Status.CONVERGED
    assert energy_error(matrix, b, fine) < 0.01


@pytest.mark.parametrize("part", [0.3, 0.01])
def test_the_energy_norm_of_the_error_is_estimated(part):
    ratios = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        matrix = with_spectrum(10.0 ** -rng.uniform(0, 4, SIZE), seed)
        b = matrix @ rng.normal(size=SIZE)
        v, report = solve(cg(rtol=part, energy_rtol=part), matrix, b)
        assert report.status is Status.CONVERGED
        ratios.append(energy_error(matrix, b, v) / part)
    # The sum of the last gains is a lower bound, and rarely a bad one.
    assert np.median(ratios) < 1 and np.max(ratios) < 10


def test_a_tolerance_in_energy_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="`energy_rtol` must not be negative"):
        bx.CG(energy_rtol=-0.1)
