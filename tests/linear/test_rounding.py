"""What CONVERGED means: the tolerance that was asked for, or the rounding error of the system."""

import lineax
import numpy as np
import pytest

import bilevax as bx
from bilevax import Status
from tests.everyday import slow
from tests.linear.systems import GENERAL, POSITIVE_DEFINITE, SIZE, solve, vector, with_spectrum

SOLVERS = {
    "CG": (bx.CG, POSITIVE_DEFINITE),
    "GMRES": (bx.GMRES, GENERAL),
    "NormalCG": (bx.NormalCG, GENERAL),
    "BiCGStab": (bx.BiCGStab, GENERAL),
    "Cholesky": (None, POSITIVE_DEFINITE),
    "LU": (None, GENERAL),
}
# The error of a product is at most SIZE eps || |A| || ||v||, || |A| || <= sqrt(SIZE) ||A||. The
# report has ten times a difference of two, each with the error of v and of a scaling besides.
MULTIPLE = 20 * (SIZE + 2) * np.sqrt(SIZE)


def make(name, rtol):
    kind, structure = SOLVERS[name]
    if kind is None:
        return bx.Dense(), structure
    return kind(rtol=rtol, maxiter=100 if kind is bx.GMRES else 1000), structure


def random_matrix(structure, condition, seed):
    spectrum = np.geomspace(1.0, 1 / condition, SIZE)
    if structure is POSITIVE_DEFINITE:
        return with_spectrum(spectrum, seed)
    generator = np.random.default_rng(seed)
    left, right = (np.linalg.qr(generator.normal(size=(SIZE, SIZE)))[0] for _ in range(2))
    return left @ np.diag(spectrum) @ right


def level(matrix, v, rhs, epsilon):
    """Return eps ||A|| ||v|| / ||b||."""
    return epsilon * np.linalg.norm(matrix, 2) * np.linalg.norm(v) / np.linalg.norm(rhs)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [np.float64, slow(np.float32)])
def test_converged_is_the_tolerance_or_rounding_and_the_report_says_which(name, dtype):
    epsilon = float(np.finfo(dtype).eps)
    generator = np.random.default_rng(5)
    statuses = []
    for seed in range(60):
        condition = epsilon ** -generator.uniform(0, 0.9)
        rtol = epsilon ** generator.uniform(0.2, 1.2)
        solver, structure = make(name, dtype(rtol))
        matrix = random_matrix(structure, condition, seed).astype(dtype)
        right = vector(seed)
        rhs = (matrix @ right if generator.uniform() < 0.5 else right).astype(dtype)
        v, report = solve(solver, matrix, rhs, structure=structure)
        statuses.append(report.status)
        if not np.all(np.isfinite(v)):
            assert report.status is not Status.CONVERGED
            continue
        exact = [part.astype(np.longdouble) for part in (matrix, v, rhs)]
        residual = float(np.linalg.norm(exact[2] - exact[0] @ exact[1]))
        residual /= np.linalg.norm(rhs)
        limit = level(matrix, v, rhs, epsilon)
        # What a product in this precision may add to the residual that was measured.
        np.testing.assert_allclose(report.residual, residual, rtol=1e-3, atol=MULTIPLE * limit)
        assert 0 <= report.rounding <= MULTIPLE * limit * (1 + 1e-6)
        met = report.residual <= rtol * (1 + 1e-6) and SOLVERS[name][0] is not None
        assert (report.status is Status.CONVERGED) == (met or report.residual <= report.rounding)
    assert statuses.count(Status.CONVERGED) >= 30


@pytest.mark.parametrize("name", ["Cholesky", "LU"])
@pytest.mark.parametrize("condition", [1e8, 1e9, 1e10])
def test_a_stable_solve_of_an_ill_conditioned_system_is_a_solution(name, condition):
    solver, structure = make(name, None)
    for seed in range(10):
        matrix = random_matrix(structure, condition, seed)
        truth = vector(seed)
        v, report = solve(solver, matrix, matrix @ truth, structure=structure)
        assert report.status is Status.CONVERGED
        # ||dv|| / ||v|| <= cond (error of the matrix + of b + of the solve): some SIZE eps each.
        error = np.linalg.norm(v - truth) / np.linalg.norm(truth)
        assert error <= 10 * SIZE**1.5 * condition * 2.0**-52


@pytest.mark.parametrize("name", ["CG", "GMRES", "NormalCG", "BiCGStab"])
@pytest.mark.parametrize("part", [1e-9, 1e-11])
def test_a_solve_that_stalls_above_the_tolerance_is_not_converged(name, part):
    """The last equation is 0 = part: no v leaves less than that."""
    matrix, b = np.diag([1.0, 2, 3, 4, 5, 6, 7, 0]), np.ones(SIZE)
    b[-1] = part
    least = part / np.linalg.norm(b)
    for rtol, status in [(1e-13, Status.STALLED), (2 * least, Status.CONVERGED)]:
        solver, structure = make(name, rtol)
        _, report = solve(solver, matrix, b, structure=structure)
        if name == "BiCGStab" and status is Status.STALLED:  # it divides by zero, and knows
            assert report.status is Status.BREAKDOWN
            continue
        assert report.status is status
        assert 0.99 * least <= report.residual <= 2 * least
        assert report.rounding < report.residual


def test_a_solver_of_lineax_is_held_to_its_own_tolerance():
    matrix, b = with_spectrum(np.linspace(1.0, 10.0, SIZE)), vector()
    for rtol in (1e-3, 1e-10):
        solver = bx.LineaxSolver(lineax.CG(rtol, 0.0))
        _, report = solve(solver, matrix, b)
        assert report.status is Status.CONVERGED
        assert report.residual <= rtol and report.rounding < 1e-13
    few = bx.LineaxSolver(lineax.CG(1e-10, 0.0, max_steps=4))
    assert solve(few, matrix, b)[1].status is Status.BREAKDOWN


@pytest.mark.parametrize("power", [-100, -80, 80])
def test_conjugate_gradients_in_float32_in_any_unit_of_the_matrix(power):
    """Squares of its products are out of range; powers of two change no digit."""
    matrix, b = with_spectrum(np.geomspace(1.0, 100.0, SIZE)), vector()
    truth = np.linalg.solve(matrix, b)
    solver, unit = bx.CG(rtol=1e-5, maxiter=1000), np.float32(2.0**power)
    matrix, b = matrix.astype(np.float32), b.astype(np.float32)
    expected, reference = solve(solver, matrix, b)
    v, report = solve(solver, unit * matrix, b)
    assert report == reference and report.status is Status.CONVERGED
    np.testing.assert_array_equal(v * unit, expected)
    assert np.linalg.norm(expected - truth) <= 1e-3 * np.linalg.norm(truth)  # condition 100
