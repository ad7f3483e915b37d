"""SciPy drives an engine: values, gradients and Hessian-vector products, and where it leads."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import bilevax as bx
from tests.outer.example import (
    EXACT,
    LARGEST,
    X0,
    A,
    Y,
    inner,
    make_engine,
    minimiser,
    outer,
    truth,
)

FORWARD = make_engine(rule=bx.Implicit(bx.Dense(), mode="forward"))


def joined(y):
    return jnp.stack([y["a"], *y["rest"]])


TREE = bx.value_and_hypergradient(
    lambda x, y: (outer(x, joined(y)), {"aux": x}),
    bx.minimum(lambda x, y: inner(x, joined(y))),
    EXACT,
    bx.Implicit(bx.Dense(), mode="forward"),
    has_aux=True,
)
TREE_Y = {"a": Y[0], "rest": Y[1:]}


@pytest.fixture(scope="module")
def objective():
    return bx.scipy_objective(TREE, TREE_Y, X0)


def test_values_and_gradients_are_those_of_the_closed_form(objective):
    np.testing.assert_array_equal(objective.start, Y)
    assert objective.start.dtype == np.float64
    for y in (Y, -Y, Y + 0.7):
        value, gradient = objective(y)
        assert isinstance(value, float) and isinstance(gradient, np.ndarray)
        np.testing.assert_allclose(value, truth(y)[2], rtol=1e-11)
        np.testing.assert_allclose(gradient, truth(y)[3], atol=1e-10)
        np.testing.assert_allclose(objective.solution(y), truth(y)[0], atol=1e-10)
        shift = 1e-4 * np.eye(3)
        differences = [(objective(y + s)[0] - objective(y - s)[0]) / 2e-4 for s in shift]
        np.testing.assert_allclose(gradient, differences, atol=1e-7)
    tree = objective.unflatten(Y)
    assert tree.keys() == TREE_Y.keys() and tree["a"] == Y[0]
    np.testing.assert_array_equal(tree["rest"], Y[1:])


def test_products_with_the_hessian_are_those_of_central_differences(objective):
    for y in (Y, Y + 0.7):
        shift = 1e-5 * np.eye(3)
        hessian = np.array([(truth(y + s)[3] - truth(y - s)[3]) / 2e-5 for s in shift])
        got = np.array([objective.hessian_product(y, d) for d in np.eye(3)])
        np.testing.assert_allclose(got, hessian, atol=1e-8)
        np.testing.assert_allclose(got, got.T, atol=1e-11)


@pytest.mark.parametrize(("method", "tol"), [("L-BFGS-B", 1e-13), ("trust-ncg", 1e-9)])
def test_scipy_reaches_the_minimiser(objective, method, tol):
    before = objective.evaluations
    options = {"hessp": objective.hessian_product} if method == "trust-ncg" else {}
    found = scipy.optimize.minimize(
        objective, objective.start, jac=True, method=method, tol=tol, **options
    )
    assert found.success
    np.testing.assert_allclose(found.x, minimiser(), atol=2e-6)
    assert objective.evaluations - before == found.nfev


def test_bounds_are_kept(objective):
    found = scipy.optimize.minimize(
        objective, np.zeros(3), jac=True, method="L-BFGS-B", bounds=[(-0.2, 0.2)] * 3, tol=1e-12
    )
    np.testing.assert_allclose(found.x, minimiser(bounds=[(-0.2, 0.2)] * 3), atol=1e-6)
    assert np.any(np.abs(found.x) == 0.2)


def test_solves_start_from_the_last_solution():
    objective = bx.scipy_objective(FORWARD, Y, X0)
    first = FORWARD(Y, bx.cold_start(X0))
    objective(Y)
    np.testing.assert_array_equal(objective._warm.x, first.x)
    value, _ = objective(Y)  # which is solved already
    assert value == float(FORWARD(Y, first.warm).value)
    assert FORWARD(Y, first.warm).report.inner.iterations == 0


def test_single_precision_is_told_in_double_precision():
    y, x0 = jnp.asarray(Y, jnp.float32), jnp.asarray(X0, jnp.float32)
    engine = make_engine(bx.GradientDescent(LARGEST / 2), bx.Implicit(bx.Dense(), mode="forward"))
    objective = bx.scipy_objective(engine, y, x0)
    value, gradient = objective(objective.start)
    assert gradient.dtype == objective.start.dtype == np.float64
    assert objective.unflatten(objective.start).dtype == jnp.float32
    np.testing.assert_allclose(value, truth(Y)[2], rtol=1e-4)
    np.testing.assert_allclose(gradient, truth(Y)[3], atol=1e-4)


def test_after_a_solve_that_failed_the_next_one_is_good():
    """Far out, descent diverges: the error says so, and the warm start is none that is ruined."""
    objective = bx.scipy_objective(FORWARD, Y, X0)
    objective(Y)
    with pytest.raises(
        bx.SolveError, match="the inner solve ended DIVERGED in evaluation 2: lower"
    ):
        objective(Y + 9.0)
    value, gradient = objective(Y)
    np.testing.assert_allclose(value, truth(Y)[2], rtol=1e-11)
    np.testing.assert_allclose(gradient, truth(Y)[3], atol=1e-10)
    assert LARGEST / 2 * (np.exp(Y + 9.0).max() + np.linalg.norm(A, 2) ** 2) > 2


@pytest.mark.parametrize(
    ("solver", "rule", "message"),
    [
        (
            bx.GradientDescent(LARGEST / 2, maxiter=5),
            bx.Implicit(),
            "the inner solve ended MAXITER",
        ),
        (bx.Newton(), bx.Implicit(bx.CG(maxiter=1)), "the adjoint ended MAXITER"),
    ],
)
def test_a_solve_short_of_its_tolerance_is_an_error(solver, rule, message):
    """Line searches would compare values of whatever there is."""
    objective = bx.scipy_objective(make_engine(solver, rule), Y, X0)
    with pytest.raises(bx.SolveError, match=f"{message} in evaluation 1: raise `maxiter`"):
        objective(Y)
