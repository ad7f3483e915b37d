"""Direct solves."""

import numpy as np
import pytest

import bilevax as bx
from bilevax import Status
from tests.linear.systems import (
    GENERAL,
    POSITIVE_DEFINITE,
    SIZE,
    count_products,
    relative_error,
    relative_residual,
    solve,
    vector,
    with_spectrum,
)

B = vector()
DEFINITE = with_spectrum(np.linspace(1.0, 10.0, SIZE))
INDEFINITE = with_spectrum(np.array([-3.0, -2, -1, 1, 2, 3, 4, 5]))
NONSYMMETRIC = 4 * np.eye(SIZE) + np.random.default_rng(0).normal(size=(SIZE, SIZE))
SINGULAR = np.diag([1.0, 2, 3, 4, 5, 6, 7, 0])


@pytest.mark.parametrize("structure", [POSITIVE_DEFINITE, GENERAL])
def test_float64(structure):
    v, report = solve(bx.Dense(), DEFINITE, B, structure=structure)
    assert report.status is Status.CONVERGED
    assert relative_error(v, np.linalg.solve(DEFINITE, B)) < 1e-14
    np.testing.assert_allclose(report.residual, relative_residual(DEFINITE, v, B), atol=1e-15)


def test_cholesky_of_an_indefinite_matrix():
    _, report = solve(bx.Dense(), INDEFINITE, B)
    assert report.status is Status.INDEFINITE


@pytest.mark.parametrize("matrix", [SINGULAR, np.zeros((SIZE, SIZE))], ids=["singular", "zero"])
def test_a_singular_matrix_breaks_down(matrix):
    _, report = solve(bx.Dense(), matrix, B, structure=GENERAL)
    assert report.status is Status.BREAKDOWN


def test_a_matrix_that_is_singular_to_rounding_breaks_down():
    matrix = with_spectrum(np.diag(SINGULAR))
    _, report = solve(bx.Dense(), matrix, B, structure=GENERAL)
    assert report.status is Status.BREAKDOWN


@pytest.mark.parametrize("structure", [POSITIVE_DEFINITE, GENERAL])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_operator_that_is_not_finite(structure, bad):
    matrix = DEFINITE.copy()
    matrix[1, 2] = bad
    _, report = solve(bx.Dense(), matrix, B, structure=structure)
    assert report.status is Status.NONFINITE


def test_right_hand_side_zero():
    v, report = solve(bx.Dense(), DEFINITE, np.zeros(SIZE))
    np.testing.assert_array_equal(v, 0)
    assert (report.status, report.residual) == (Status.CONVERGED, 0)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 256])
def test_the_batch_size_changes_nothing(batch_size):
    v, _ = solve(bx.Dense(batch_size=batch_size), NONSYMMETRIC, B, structure=GENERAL)
    assert relative_error(v, np.linalg.solve(NONSYMMETRIC, B)) < 1e-14


def test_damping_adds_a_multiple_of_the_identity():
    v, report = solve(bx.Dense(damping=0.5), SINGULAR, np.ones(SIZE))
    assert report.status is Status.CONVERGED
    np.testing.assert_allclose(v, 1 / (np.diag(SINGULAR) + 0.5), rtol=1e-14)


def test_products_are_counted_exactly():
    report, count = count_products(bx.Dense(), NONSYMMETRIC, B)
    assert report.products == count == SIZE + 3


@pytest.mark.parametrize("batch_size", [0, -1])
def test_needs_a_batch(batch_size):
    with pytest.raises(ValueError, match=f"`batch_size` must be positive, got {batch_size}"):
        bx.Dense(batch_size=batch_size)
