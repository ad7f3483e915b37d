"""The truncated Neumann series."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from bilevax import Status
from tests.linear import systems
from tests.linear.systems import GENERAL, POSITIVE_DEFINITE, SIZE, SYMMETRIC, vector

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
    assert (report.status, report.iterations) == (Status.TRUNCATED, steps - 1)
    # The last term costs no product, and the residual is that of the sum before it.
    before = series(matrix, B, steps - 1, step_size) if steps > 1 else np.zeros(SIZE)
    np.testing.assert_allclose(report.residual, systems.relative_residual(matrix, before, B))


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


def test_divergence_ends_early_and_is_finite():
    """The residual grows tenfold a step, and the series ends at 1 / eps, long before overflow."""
    v, report = solve(bx.Neumann(2000, step_size=1.0), -9 * np.eye(SIZE), B)
    assert report.status is Status.DIVERGED
    assert report.iterations == report.products == 16  # 10^15 < 1 / eps < 10^16
    np.testing.assert_allclose(report.residual, 1e16, rtol=1e-10)
    np.testing.assert_allclose(v, B * (10**17 - 1) / 9, rtol=1e-10)  # 17 terms


def test_a_product_that_is_not_finite():
    matrix = A.copy()
    matrix[0, 0] = np.nan
    for step_size in (None, 1.0):
        _, report = solve(bx.Neumann(5, step_size=step_size), matrix, B)
        assert report.status is Status.NONFINITE


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("radius", [1.3, 1.02, 0.7])
def test_contraction_is_the_spectral_radius_of_the_iteration(radius, dtype):
    spectrum = radius * np.array([-0.5, -0.3, 0.1, 0.2, 0.3, 0.4, 0.6, 1.0])
    matrix = (np.eye(SIZE) - systems.with_spectrum(spectrum)).astype(dtype)
    _, report = solve(bx.Neumann(400, step_size=1.0), matrix, B.astype(dtype))
    diverges = radius > 1
    assert report.status is (Status.DIVERGED if diverges else Status.TRUNCATED)
    if diverges:
        np.testing.assert_allclose(report.contraction, radius, rtol=0.05)
        if radius == 1.3:  # ended by 1 / eps, and not by the number of steps
            limit = np.log(1 / np.finfo(dtype).eps) / np.log(radius)
            assert 0.8 * limit < report.iterations < 1.2 * limit
    else:
        assert report.contraction < 1


def test_lanes_of_a_batch_diverge_by_themselves():
    radii = np.array([1.3, 0.5, 3.0])
    basis = systems.with_spectrum(np.linspace(0.1, 1.0, SIZE))

    def one(radius):
        operator = bx.LinearOperator(lambda v: v - radius * (basis @ v), GENERAL, B)
        return bx.linear_solve(operator, jnp.asarray(B), bx.Neumann(100, step_size=1.0))

    v, report = jax.jit(jax.vmap(one))(radii)
    assert report.status.tolist() == [Status.DIVERGED, Status.TRUNCATED, Status.DIVERGED]
    assert report.iterations[1] == 99 > report.iterations[2] and report.iterations[2] < 40
    np.testing.assert_allclose(report.contraction[np.array([0, 2])], [1.3, 3.0], rtol=0.08)
    np.testing.assert_allclose(v[1], np.linalg.solve(np.eye(SIZE) - 0.5 * basis, B), rtol=1e-12)
    for lane, radius in enumerate(radii):
        _, alone = solve(bx.Neumann(100, step_size=1.0), np.eye(SIZE) - radius * basis, B)
        assert (alone.status, alone.iterations) == (report.status[lane], report.iterations[lane])


def test_growth_that_passes_is_no_divergence():
    """Far from normal, the residual grows by 10^4 before it falls; what counts is the end."""
    matrix = np.eye(SIZE) - 0.5 * np.eye(SIZE) - 5 * np.eye(SIZE, k=1)
    right = np.zeros(SIZE)
    right[-1] = 1.0
    _, report = solve(bx.Neumann(12, step_size=1.0), matrix, right)
    assert report.status is Status.DIVERGED and report.residual > 1e3
    v, report = solve(bx.Neumann(200, step_size=1.0), matrix, right)
    assert report.status is Status.TRUNCATED
    np.testing.assert_allclose(v, np.linalg.solve(matrix, right), rtol=1e-9)


# The default step size.

SPECTRUM = np.array([0.3, 0.5, 0.6, 0.8, 0.9, 1.1, 1.4, 4.0])


@pytest.mark.parametrize("structure", [POSITIVE_DEFINITE, SYMMETRIC])
@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(1.0, np.float64), (1e-12, np.float64), (1e12, np.float64), (1e-8, np.float32),
     (1e8, np.float32)],
)  # fmt: skip
def test_the_default_step_size_is_that_of_the_largest_eigenvalue(scale, dtype, structure):
    matrix = systems.with_spectrum(SPECTRUM)
    got, report = systems.solve(
        bx.Neumann(4), (scale * matrix).astype(dtype), B.astype(dtype), structure=structure
    )
    # Twenty power iterations: (1.4 / 4)^40 = 1e-18.
    wanted = series(matrix, B, 4, 1 / 4.0) / scale
    np.testing.assert_allclose(got, wanted, rtol=1e-10 if dtype is np.float64 else 1e-5)
    assert report.status is Status.TRUNCATED
    long, report = systems.solve(
        bx.Neumann(600), (scale * matrix).astype(dtype), B.astype(dtype), structure=structure
    )
    wanted = np.linalg.solve(matrix, B) / scale
    np.testing.assert_allclose(long, wanted, rtol=1e-10 if dtype is np.float64 else 1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_the_default_step_size_converges_where_eigenvalues_are_close(seed):
    """Power iterations are far from the end here, and the estimate is below ||A|| by little."""
    matrix = systems.with_spectrum(np.linspace(0.95, 1.0, SIZE), seed)
    _, report = systems.solve(bx.Neumann(60), matrix, vector(seed))
    assert report.residual < 1e-12


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(1.0, np.float64), (1e-12, np.float64), (1e12, np.float64), (1e-12, np.float32),
     (1e12, np.float32)],
)  # fmt: skip
@pytest.mark.parametrize("transpose", [False, True])
def test_the_default_step_size_without_symmetry_is_that_of_the_norm(scale, dtype, transpose):
    # Singular values 4, 1, 0.9 ...
    left, right = (np.linalg.qr(np.random.default_rng(k).normal(size=(SIZE, SIZE)))[0]
                   for k in (1, 2))  # fmt: skip
    singular = np.array([4.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    matrix = left @ np.diag(singular) @ right
    got, report = solve(
        bx.Neumann(4), (scale * matrix).astype(dtype), B.astype(dtype), transpose=transpose
    )
    wanted = series(matrix.T if transpose else matrix, B, 4, 1 / 4.0) / scale
    np.testing.assert_allclose(
        got, wanted, rtol=1e-9 if dtype is np.float64 else 1e-4, atol=1e-5 / scale
    )
    assert report.products == 3 + 40


def test_the_default_step_size_per_lane():
    scales = np.array([1e-3, 1.0, 1e3])
    matrix = systems.with_spectrum(SPECTRUM)

    def one(scale):
        operator = bx.LinearOperator(lambda v: scale * (matrix @ v), POSITIVE_DEFINITE, B)
        return bx.linear_solve(operator, jnp.asarray(B), bx.Neumann(4))[0]

    wanted = series(matrix, B, 4, 0.25) / scales[:, None]
    np.testing.assert_allclose(jax.jit(jax.vmap(one))(scales), wanted, rtol=1e-10)


# By rules: on a minimum, on a root that is not symmetric, on a fixed point.


def test_default_step_sizes_of_rules():
    matrix, b = systems.with_spectrum(SPECTRUM), vector(3)
    x, y, rule = np.linalg.solve(matrix, b), 0.0, bx.Implicit(bx.Neumann(5))
    problem = bx.minimum(lambda x, y: jnp.exp(y) * (x @ matrix @ x / 2) - b @ x)
    got, report = rule.pullback(problem, x, y, B)
    np.testing.assert_allclose(got, -series(matrix, B, 5, 0.25) @ matrix @ x, rtol=1e-10)
    assert report.solve.products == 4 + 20
    # A root.
    general = np.diag(SPECTRUM) + 0.1 * np.triu(np.ones((SIZE, SIZE)), 1)
    size = np.linalg.svd(general)[1]
    x = np.linalg.solve(general, b)
    problem = bx.root(lambda x, y: jnp.exp(y) * (general @ x) - b)
    got, report = rule.pullback(problem, x, y, B)
    wanted = -series(general.T, B, 5, 1 / size[0]) @ general @ x
    assert (size[1] / size[0]) ** 40 < 1e-14  # how far the power iterations are from the end
    np.testing.assert_allclose(got, wanted, rtol=1e-10)
    assert report.solve.products == 4 + 40


@pytest.mark.parametrize("transpose", [False, True])
def test_on_a_fixed_point_it_is_the_recursion(transpose):
    """v <- T_1^T v + c with a step of one, one product a term, and also forward."""
    problem = bx.fixed_point(lambda x, y: T @ x + jnp.sin(y))
    y = vector(4)
    x = np.linalg.solve(A, np.sin(y))
    matrix = T if transpose else T.T
    v = np.zeros(SIZE)
    for _ in range(5):
        v = matrix @ v + (np.cos(y) * B if transpose else B)
    rule = bx.Implicit(bx.Neumann(5))
    if transpose:
        np.testing.assert_allclose(rule.pushforward(problem, x, y, B), v, rtol=1e-13)
        return
    got, report = rule.pullback(problem, x, y, B)
    np.testing.assert_allclose(got, np.cos(y) * v, rtol=1e-13)
    assert (report.solve.products, report.solve.status) == (4, Status.TRUNCATED)


def test_a_fixed_point_whose_series_diverges_says_by_how_much():
    """T_1 has the spectral radius 1.3: Anderson finds the solution, Neumann has no adjoint."""
    steep = 1.3 * systems.with_spectrum(np.linspace(-1, 0.5, SIZE))
    problem = bx.fixed_point(lambda x, y: steep @ x + y)
    y = vector(4)
    x = np.linalg.solve(np.eye(SIZE) - steep, y)
    _, report = bx.Implicit(bx.Neumann(1000)).pullback(problem, x, y, B)
    assert report.solve.status == Status.DIVERGED
    np.testing.assert_allclose(report.solve.contraction, 1.3, rtol=0.05)
    solve_map = bx.solution_map(problem, bx.Newton(bx.Dense()), bx.Implicit(bx.Neumann(1000)))
    gradient = jax.grad(lambda y: B @ solve_map(np.zeros(SIZE), y))(y)
    assert np.all(np.isnan(gradient))  # never what a series that diverges has summed up


def test_damping_on_a_fixed_point_keeps_the_step_of_one():
    problem = bx.fixed_point(lambda x, y: T @ x + y)
    rule = bx.Implicit(bx.Neumann(5, damping=0.2))
    got, report = rule.pullback(problem, vector(3), vector(4), B)
    np.testing.assert_allclose(got, series(A.T + 0.2 * np.eye(SIZE), B, 5, 1.0), rtol=1e-12)
    assert report.solve.products == 4


def test_a_residual_that_does_not_fall_is_no_solution():
    """A direction that A does not see: every term of the series is the same."""
    matrix = np.diag([0.0, *np.ones(SIZE - 1)])
    right = np.eye(SIZE)[0]
    for rhs in (right, right.astype(np.float32)):
        _, report = solve(bx.Neumann(30, step_size=1.0), matrix.astype(rhs.dtype), rhs)
        assert (report.status, report.residual) == (Status.DIVERGED, 1)


def test_right_hand_side_zero():
    v, report = solve(bx.Neumann(3, step_size=1.0), A, np.zeros(SIZE))
    np.testing.assert_array_equal(v, 0)
    assert (report.status, report.residual) == (Status.TRUNCATED, 0)


def test_products_are_counted_exactly():
    report, count = systems.count_products(bx.Neumann(6, step_size=1.0), A, B)
    assert report.products == count == 5
    report, count = systems.count_products(bx.Neumann(6), A, B)
    assert report.products == count == 5 + 2 * 20  # power iterations on A^T A
    report, count = systems.count_products(bx.Neumann(500, step_size=3.0), A, B)
    assert report.products == count == report.iterations < 500  # it diverges


@pytest.mark.parametrize("steps", [0, -1])
def test_needs_a_term(steps):
    with pytest.raises(ValueError, match=f"`steps` must be positive, got {steps}"):
        bx.Neumann(steps)


@pytest.mark.parametrize("step_size", [0, 0.0, -0.5, float("nan")])
def test_needs_a_positive_step_size(step_size):
    with pytest.raises(ValueError, match=f"`step_size` must be positive, got {step_size}"):
        bx.Neumann(3, step_size=step_size)
