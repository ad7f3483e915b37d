"""Nonlinear conjugate gradients."""

import numpy as np
import pytest

import bilevax as bx
from bilevax import Status
from tests.linear.systems import conjugate_gradients, with_spectrum
from tests.solvers.problems import ROSENBROCK, SIZE, B, exactly, solve

SPECTRA = {
    "one value": [2.0, 2, 2, 2],
    "two values": [1.0, 1, 5, 5],
    "spread": [1.0, 2, 3, 4],
    "far apart": [0.01, 1, 10, 100],
}
ZERO = np.zeros(SIZE)


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA.keys())
def test_ends_on_a_quadratic_in_as_many_steps_as_there_are_eigenvalues(spectrum):
    matrix = with_spectrum(np.array(spectrum))
    solver = bx.ConjugateGradient(rtol=1e-8, atol=0.0, maxiter=100)
    x, report = solve(solver, x0=ZERO, y=(matrix, B))
    assert report.status is Status.CONVERGED
    assert report.iterations == len(set(spectrum)) <= SIZE
    np.testing.assert_allclose(x, np.linalg.solve(matrix, B), rtol=1e-6)


@pytest.mark.parametrize("spectrum", [SPECTRA["spread"], SPECTRA["far apart"]])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_iterates_on_a_quadratic_are_those_of_the_linear_method(steps, spectrum):
    matrix = with_spectrum(np.array(spectrum))
    x, _ = solve(bx.ConjugateGradient(**exactly(steps)), x0=ZERO, y=(matrix, B))
    np.testing.assert_allclose(x, conjugate_gradients(matrix, B, steps)[-1], rtol=1e-8)


@pytest.mark.parametrize("start", [[-1.2, 1.0], [0.0, 2.0]])  # the second has negative curvature
def test_rosenbrock(start):
    solver = bx.ConjugateGradient(rtol=1e-10, atol=0.0, maxiter=1000)
    x, report = solve(solver, ROSENBROCK, np.array(start), 100.0)
    assert report.status is Status.CONVERGED
    np.testing.assert_allclose(x, [1.0, 1.0], atol=1e-6)
