"""Newton's method."""

import itertools

import jax.numpy as jnp
import numpy as np
import optimistix
import pytest
import scipy.optimize

import bilevax as bx
from bilevax import Status
from tests.solvers.problems import (
    AFFINE,
    MATRIX,
    QUADRATIC,
    ROSENBROCK,
    SIZE,
    SOLUTION,
    X0,
    B,
    exactly,
    rosenbrock,
    solve,
)

STRICT = {"rtol": 1e-12, "atol": 0.0, "maxiter": 100}


def test_an_exact_step_solves_a_quadratic():
    x, report = solve(bx.Newton(bx.Dense(), **STRICT))
    assert (report.status, report.iterations) == (Status.CONVERGED, 1)
    np.testing.assert_allclose(x, SOLUTION, rtol=1e-12)


def bowl(x, y):
    return jnp.sum(jnp.cosh(x)) + 0.5 * jnp.sum((x - y) ** 2)


BOWL = bx.minimum(bowl)
CENTRE = np.array([1.0, -0.5])


def newton_on_the_bowl(x, steps):
    for _ in range(steps):
        x = x - (np.sinh(x) + x - CENTRE) / (np.cosh(x) + 1)
    return x


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_iterates_are_newtons(steps):
    start = np.array([0.7, -0.6])
    x, _ = solve(bx.Newton(bx.Dense(), **exactly(steps)), BOWL, start, CENTRE)
    np.testing.assert_allclose(x, newton_on_the_bowl(start, steps), rtol=1e-12)


def test_the_inexact_method_converges_superlinearly():
    start = np.array([2.0, -2.0])
    truth = newton_on_the_bowl(start, 50)
    errors = []
    for steps in range(7):
        x, _ = solve(bx.Newton(**exactly(steps)), BOWL, start, CENTRE)
        errors.append(np.linalg.norm(x - truth))
    # The forcing term is the root of the residual: the order is 3/2 at least, down to rounding.
    for error, following in itertools.pairwise(errors):
        if error < 0.5:
            assert following <= max(5 * error**1.5, 1e-14)
    assert errors[-1] < 1e-12


def test_the_inexact_method_comes_to_a_loose_tolerance_in_one_step(monkeypatch):
    """Of a quadratic, from a warm start; where it does not know the tolerance, in two."""
    cold = np.linalg.norm(MATRIX @ (np.zeros(SIZE) - SOLUTION))
    near = SOLUTION + 0.01 * np.random.default_rng(0).normal(size=SIZE)
    start = bx.WarmStart(near, np.zeros(SIZE), np.zeros(SIZE))

    def outer(x, y):
        return jnp.sum(x)

    def steps(part, outer):
        target = part * np.linalg.norm(MATRIX @ (near - SOLUTION))
        solver = bx.Newton(rtol=target / cold, atol=0.0)
        engine = bx.value_and_hypergradient(outer, QUADRATIC, solver)
        report = engine((MATRIX, B), start).report.inner
        assert report.status == Status.CONVERGED and report.residual <= target
        return int(report.iterations)

    assert [steps(part, outer) for part in (0.9, 0.1, 0.03)] == [1, 1, 1]
    monkeypatch.setattr(bx.Newton, "toward", lambda self, iterate, scale, target: iterate)
    assert steps(0.03, lambda x, y: jnp.sum(x)) == 2  # another function is compiled anew


@pytest.mark.parametrize("linear_solver", [None, bx.Dense()], ids=["inexact", "dense"])
def test_rosenbrock_agrees_with_scipy(linear_solver):
    start = np.array([-1.2, 1.0])
    x, report = solve(bx.Newton(linear_solver, **STRICT), ROSENBROCK, start, 100.0)
    truth = scipy.optimize.minimize(lambda x: float(rosenbrock(x, 100.0)), start, tol=1e-12).x
    assert report.status is Status.CONVERGED
    np.testing.assert_allclose(x, truth, atol=1e-5)
    np.testing.assert_allclose(x, [1.0, 1.0], atol=1e-10)


def double_well(x, y):
    return 0.25 * x[0] ** 4 - 0.5 * x[0] ** 2 + 0.5 * (x[1] - y) ** 2


@pytest.mark.parametrize("start", [[0.1, 0.0], [-0.3, 5.0], [0.5, -1.0]])
def test_negative_curvature_does_not_lead_to_a_saddle(start):
    x, report = solve(bx.Newton(**STRICT), bx.minimum(double_well), np.array(start), 2.0)
    assert report.status is Status.CONVERGED
    np.testing.assert_allclose(np.abs(x), [1.0, 2.0], rtol=1e-9)
    assert np.sign(x[0]) == np.sign(start[0])


def test_a_root_whose_jacobian_is_a_rotation():
    rotation = np.kron(np.eye(SIZE // 2), [[0.0, 1.0], [-1.0, 0.0]])
    x, report = solve(bx.Newton(**STRICT), AFFINE, y=(rotation, B))
    assert report.status is Status.CONVERGED
    np.testing.assert_allclose(x, rotation.T @ B, rtol=1e-10)


def circle(x, y):
    return jnp.array([x[0] ** 2 + x[1] ** 2 - y, x[0] - x[1]])


def test_a_root_agrees_with_optimistix_and_the_closed_form():
    start = jnp.array([2.0, 0.5])
    x, report = solve(bx.Newton(**STRICT), bx.root(circle), np.asarray(start), 2.0)
    theirs = optimistix.root_find(
        circle, optimistix.Newton(rtol=1e-12, atol=1e-12), start, args=2.0
    ).value
    assert report.status is Status.CONVERGED
    np.testing.assert_allclose(x, theirs, rtol=1e-9)
    np.testing.assert_allclose(x, [1.0, 1.0], rtol=1e-9)


def test_a_fixed_point():
    problem = bx.fixed_point(lambda x, y: jnp.cos(y * x))
    x, report = solve(bx.Newton(**STRICT), problem, 0.5, 1.0)
    assert report.status is Status.CONVERGED
    np.testing.assert_allclose(x, scipy.optimize.brentq(lambda x: np.cos(x) - x, 0, 1), rtol=1e-11)


def test_float32_with_default_tolerances():
    y = (MATRIX.astype(np.float32), B.astype(np.float32))
    x, report = solve(bx.Newton(), x0=X0.astype(np.float32), y=y)
    assert x.dtype == np.float32
    assert report.status is Status.CONVERGED
    assert report.residual <= 6.5e-6 * report.initial_residual
    np.testing.assert_allclose(x, SOLUTION, rtol=1e-4)


def test_a_linear_solver_must_be_one():
    with pytest.raises(TypeError, match=r"`linear_solver` must be a LinearSolver.*got 'dense'"):
        bx.Newton("dense")
    with pytest.raises(TypeError, match="Did you forget the parentheses"):
        bx.Newton(bx.Dense)
