"""One table over all linear solvers: what each must do on both sides of the transpose."""

import dataclasses

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest

import bilevax as bx
from bilevax import Status
from bilevax.linear import transposable_solve
from tests.everyday import slow
from tests.linear.systems import (
    GENERAL,
    POSITIVE_DEFINITE,
    SIZE,
    SYMMETRIC,
    relative_error,
    solve,
    vector,
    with_spectrum,
)

# Every matrix is within 0.6 of the identity, so that the Neumann series of 1 / A converges.
DEFINITE = with_spectrum(np.array([0.6, 1.0, 1.5]))
NONSYMMETRIC = np.array([[1.1, 0.3, 0.0], [-0.4, 0.9, 0.2], [0.1, -0.3, 1.2]])
INDEFINITE = with_spectrum(np.array([-1.0, 0.7, 1.3]))

ROWS = {
    "CG": (bx.CG(rtol=1e-13, damping=0.3), POSITIVE_DEFINITE, DEFINITE),
    "NormalCG": (bx.NormalCG(rtol=1e-13), GENERAL, NONSYMMETRIC),
    "Neumann": (bx.Neumann(200, step_size=1.0), GENERAL, NONSYMMETRIC),
    "GMRES": (bx.GMRES(rtol=1e-13), GENERAL, NONSYMMETRIC),
    "BiCGStab": (bx.BiCGStab(rtol=1e-13), GENERAL, NONSYMMETRIC),
    "Dense, LU": (bx.Dense(damping=0.3), GENERAL, NONSYMMETRIC),
    "Dense, symmetric": (bx.Dense(), SYMMETRIC, INDEFINITE),
    "Dense, Cholesky": (bx.Dense(), POSITIVE_DEFINITE, DEFINITE),
    "Lineax": (bx.LineaxSolver(lineax.LU()), GENERAL, NONSYMMETRIC),
}
BAD = {  # multiples of the matrix, and their status; the other solvers get a singular matrix
    "CG": (-3.0, Status.INDEFINITE),
    "Neumann": (-0.1, Status.DIVERGED),
    "Dense, Cholesky": (-3.0, Status.INDEFINITE),
}

LARGER = with_spectrum(np.linspace(1.0, 10.0, SIZE))  # and not near the identity
SCALED = {
    bx.CG(rtol=1e-5, maxiter=1000): POSITIVE_DEFINITE,
    bx.NormalCG(rtol=1e-5, maxiter=1000): GENERAL,
    bx.GMRES(rtol=1e-5, maxiter=1000): GENERAL,
    bx.BiCGStab(rtol=1e-5, maxiter=1000): GENERAL,
    bx.Dense(): GENERAL,
}

rows = pytest.mark.parametrize("name", ROWS)
some = pytest.mark.parametrize("name", ["CG", "NormalCG", "Dense, LU"])


def like_tree(flat):
    return {"a": flat[:2].reshape(2, 1), "b": (flat[2],)}


def like_vector(tree):
    return jnp.concatenate([tree["a"].reshape(2), tree["b"][0].reshape(1)])


def operator_of(matrix, structure, rhs):
    return bx.LinearOperator(lambda v: like_tree(matrix @ like_vector(v)), structure, rhs)


def damped(solver, matrix):
    return matrix + (solver.damping or 0) * np.eye(3)


def vectors(*seeds):
    return np.stack([np.random.default_rng(seed).normal(size=3) for seed in seeds])


def symmetrised(matrix, structure):
    """A solver may use the matrix or its transpose where they are declared equal."""
    return matrix if structure is GENERAL else (matrix + matrix.T) / 2


@rows
def test_solutions_and_first_derivatives(name):
    """A v = b and v' = A^{-1} (b' - A' v), also for A^T, against NumPy."""
    solver, structure, matrix = ROWS[name]
    b, cotangent = vectors(0, 1)

    def solve(matrix, flat, transpose):
        rhs = like_tree(flat)
        operator = operator_of(matrix, structure, rhs)
        v, report = bx.linear_solve(operator, rhs, solver, transpose=transpose)
        assert jax.tree.structure(v) == jax.tree.structure(rhs)
        assert jax.tree.map(jnp.shape, v) == jax.tree.map(jnp.shape, rhs)
        return cotangent @ like_vector(v), (like_vector(v), report)

    @jax.jit
    def run(matrix, b):
        differentiate = jax.value_and_grad(solve, argnums=(0, 1), has_aux=True)
        (_, transposed), gradients = differentiate(matrix, b, True)
        return solve(matrix, b, False)[1], transposed, gradients

    plain, transposed, (gradient_matrix, gradient_rhs) = jax.tree.map(np.asarray, run(matrix, b))
    system = damped(solver, matrix)
    for actual, (v, report) in [(system, plain), (system.T, transposed)]:
        np.testing.assert_allclose(v, np.linalg.solve(actual, b), rtol=1e-10)
        exact_terms = isinstance(solver, bx.Neumann)
        assert report.status == (Status.TRUNCATED if exact_terms else Status.CONVERGED)
        assert report.residual < 1e-12
    # Differentiated was A^T v = b: the adjoint is A w = cotangent, the derivative in A is -v w^T.
    adjoint = np.linalg.solve(system, cotangent)
    expected = -np.outer(np.linalg.solve(system.T, b), adjoint)
    np.testing.assert_allclose(gradient_rhs, adjoint, rtol=1e-10)
    np.testing.assert_allclose(
        symmetrised(gradient_matrix, structure), symmetrised(expected, structure), rtol=1e-9
    )


@pytest.mark.parametrize("name", ["CG", slow("Dense, LU")])
def test_second_derivatives_in_either_mode(name):
    """With A(s) and b(s): A v'' = b'' - 2 A' v' - A'' v."""
    solver, structure, matrix = ROWS[name]
    first, second = with_spectrum(np.array([0.1, 0.2, -0.3])), with_spectrum(np.full(3, 0.2))
    b, cotangent = vectors(0, 1)

    def along(s):
        rhs = like_tree((1 + s**2) * b)
        operator = operator_of(matrix + s * first + s**2 * second, structure, rhs)
        return cotangent @ like_vector(bx.linear_solve(operator, rhs, solver)[0])

    derivatives = [jax.grad(along), jax.grad(jax.grad(along)), jax.jacfwd(jax.grad(along))]
    got = jax.jit(lambda s: [derivative(s) for derivative in derivatives])(0.0)

    system = damped(solver, matrix)
    v = np.linalg.solve(system, b)
    v1 = np.linalg.solve(system, -first @ v)
    v2 = np.linalg.solve(system, 2 * b - 2 * first @ v1 - 2 * second @ v)
    expected = [cotangent @ part for part in (v1, v2, v2)]
    np.testing.assert_allclose(got, expected, rtol=1e-9)


@some
def test_transposable_solve_is_linear_and_has_a_transpose(name):
    solver, structure, matrix = ROWS[name]
    b, cotangent = vectors(0, 1)

    def solve(rhs):
        return transposable_solve(operator_of(matrix, structure, rhs), rhs, solver)

    @jax.jit
    def run(b, cotangent):
        b, cotangent = like_tree(b), like_tree(cotangent)
        v, tangent = jax.jvp(solve, (b,), (cotangent,))
        (transposed,) = jax.linear_transpose(solve, b)(cotangent)
        return [like_vector(tree) for tree in (v, tangent, transposed)]

    v, tangent, transposed = run(b, cotangent)
    system = damped(solver, matrix)
    np.testing.assert_allclose(v, np.linalg.solve(system, b), rtol=1e-10)
    np.testing.assert_allclose(tangent, np.linalg.solve(system, cotangent), rtol=1e-10)
    np.testing.assert_allclose(transposed, np.linalg.solve(system.T, cotangent), rtol=1e-10)


@rows
def test_a_bad_lane_does_not_spoil_its_neighbours(name):
    """Four lanes in float32: fine, unsolvable, fine at another scale, not a number."""
    solver, structure, matrix = ROWS[name]
    if hasattr(solver, "rtol"):
        solver = dataclasses.replace(solver, rtol=1e-5)
    singular = np.diag([1.0, 0.8, 0.0]) - (solver.damping or 0) * np.eye(3)
    factor, bad = BAD.get(name, (None, Status.BREAKDOWN))
    unsolvable = singular if factor is None else factor * matrix
    matrices = np.stack([matrix, unsolvable, matrix, matrix * np.nan]).astype(np.float32)
    rhs = np.array([[1], [1], [1e-20], [1]]) * vectors(0, 1, 2, 3)

    @jax.jit
    @jax.vmap
    def solve(matrix, flat):
        rhs = like_tree(flat)
        operator = operator_of(matrix, structure, rhs)
        v, report = bx.linear_solve(operator, rhs, solver, on_failure=bx.OnFailure.NAN)
        return like_vector(v), report.status

    v, statuses = solve(matrices, rhs.astype(np.float32))
    statuses = [Status(int(status)) for status in statuses]
    assert v.dtype == np.float32
    fine = Status.TRUNCATED if name == "Neumann" else Status.CONVERGED
    assert statuses == [fine, bad, fine, Status.NONFINITE]
    for lane in (0, 2):
        expected = np.linalg.solve(damped(solver, matrix), rhs[lane])
        np.testing.assert_allclose(v[lane], expected, rtol=1e-4)
    assert np.all(np.isnan(v[np.array([1, 3])]))


@pytest.mark.parametrize("scale_of_b", [2.0**-66, 2.0**66])
@pytest.mark.parametrize("scale_of_a", [2.0**-40, 1.0, 2.0**40])
@pytest.mark.parametrize("transpose", [False, slow(True)])
@pytest.mark.parametrize("solver", SCALED, ids=lambda solver: type(solver).__name__)
def test_scaling_by_powers_of_two_changes_no_bit(solver, transpose, scale_of_a, scale_of_b):
    """Solutions and reports in float32: A times 1e12 and b times 1e20, or their inverses."""
    options = {"structure": SCALED[solver], "transpose": transpose}
    matrix, b = LARGER.astype(np.float32), vector().astype(np.float32)
    v, report = solve(solver, matrix, b, **options)
    assert report.status is Status.CONVERGED
    truth = np.linalg.solve(LARGER.T if transpose else LARGER, vector())
    assert relative_error(v, truth) < 1e-5
    v_scaled, report_scaled = solve(
        solver, matrix * np.float32(scale_of_a), b * np.float32(scale_of_b), **options
    )
    np.testing.assert_array_equal(v_scaled, v * np.float32(scale_of_b / scale_of_a))
    assert report_scaled == report


# What is no better than zero is no iterate.

CANNOT = {  # solvers that break down on a right-hand side that A never reaches
    "CG": bx.CG(),
    "NormalCG": bx.NormalCG(),
    "GMRES": bx.GMRES(),
    "BiCGStab": bx.BiCGStab(),
    "Lineax, CG": bx.LineaxSolver(lineax.CG(rtol=1e-8, atol=0.0)),
    "Lineax, least squares": bx.LineaxSolver(lineax.SVD()),
}
GUESSES = {"none": None, "zero": 0.0, "tiny": 1e-300, "small": 1e-12, "worse": 1e6, "NaN": np.nan}


@pytest.mark.parametrize("guess", GUESSES)
@pytest.mark.parametrize("name", ["CG", "NormalCG", "GMRES", slow("BiCGStab"), slow("Lineax, CG")])
def test_a_guess_that_is_no_better_than_zero_is_not_returned(name, guess):
    """A v = b has no solution: b is the one direction that A does not reach."""
    random = np.random.default_rng(3)
    frame = np.linalg.qr(random.normal(size=(SIZE, SIZE)))[0]
    matrix = frame @ np.diag([3.0, 2.0, 1.0, 1.0, 0.5, 2.0, 0.7, 0.0]) @ frame.T
    b, number = frame[:, -1], GUESSES[guess]
    if name == "CG":  # which is told that the matrix is definite
        matrix = -np.eye(SIZE)
    start = None if number is None else number * frame[:, 0]
    v, report = solve(CANNOT[name], matrix, b, start)
    assert report.status in (Status.BREAKDOWN, Status.INDEFINITE)
    assert np.all(np.isnan(v))


def test_a_least_squares_solution_of_zero_is_not_returned():
    matrix, b = np.diag(np.arange(SIZE, dtype=float)), np.eye(SIZE)[0]
    v, report = solve(CANNOT["Lineax, least squares"], matrix, b, structure=GENERAL)
    assert report.status is Status.BREAKDOWN and np.all(np.isnan(v))


@pytest.mark.parametrize("name", ["CG", "GMRES", slow("BiCGStab")])
def test_a_guess_that_is_better_than_zero_is_returned(name):
    """Here the solvers may not take a step; half of the solution is a guess to go on with."""
    solver = dataclasses.replace(CANNOT[name], maxiter=0)
    truth = vector()
    v, report = solve(solver, LARGER, LARGER @ truth, 0.5 * truth)
    np.testing.assert_allclose(v, 0.5 * truth, rtol=1e-14)
    np.testing.assert_allclose(report.residual, 0.5, rtol=1e-12)
