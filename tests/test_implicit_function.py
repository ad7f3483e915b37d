"""Derivatives through solvers that JAX cannot look into."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest
import scipy.optimize
import sklearn.linear_model

import bilevax as bx

C = np.array([1.0, -2.0])
RNG = np.random.default_rng(0)
FEATURES, TARGETS = RNG.normal(size=(12, 2)), RNG.normal(size=12)
LABELS = np.where(TARGETS + FEATURES[:, 0] > 0, 1.0, -1.0)


def on_host(function):
    """Return a black box of JAX's from a NumPy function (x0, y) -> x."""

    def solve(x0, y):
        return jax.pure_callback(
            lambda x0, y: np.asarray(function(np.asarray(x0), np.asarray(y)), x0.dtype),
            jax.ShapeDtypeStruct(x0.shape, x0.dtype),
            x0,
            y,
            vmap_method="sequential",
        )

    return solve


def everywhere(h, y, lanes):
    """Return gradients of h: eager and jitted at y, and over lanes by vmap."""
    gradient = jax.grad(h)
    return gradient(y), jax.jit(gradient)(y), jax.jit(jax.vmap(gradient))(lanes)


# A closed form: x* = 1 / y.


@pytest.mark.parametrize(
    "problem",
    [
        bx.minimum(lambda x, y: jnp.sum(y * x**2 / 2 - x)),
        bx.root(lambda x, y: y * x - 1),
        bx.fixed_point(lambda x, y: x - 0.3 * (y * x - 1)),
    ],
    ids=["minimum", "root", "fixed_point"],
)
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_a_closed_form(problem, mode):
    solve = bx.implicit_function(problem, lambda x0, y: 1 / y, bx.Implicit(bx.Dense(), mode))
    y = np.array([0.5, 2.0])
    np.testing.assert_array_equal(solve(np.zeros(2), y), 1 / y)
    gradient = jax.jit(jax.grad(lambda y: C @ solve(np.zeros(2), y)))(y)
    np.testing.assert_allclose(gradient, -C / y**2, rtol=1e-12)
    if mode == "forward":
        _, tangent = jax.jvp(lambda y: solve(np.zeros(2), y), (y,), (np.ones(2),))
        np.testing.assert_allclose(tangent, -1 / y**2, rtol=1e-12)


def test_what_the_report_says():
    problem = bx.minimum(lambda x, y: jnp.sum(y * x**2 / 2 - x))
    y = np.array([0.5, 2.0])
    solve = bx.implicit_function(problem, lambda x0, y: 1 / y + 0.1)
    x, report = solve.with_report(np.zeros(2), y)
    assert (report.status, report.iterations) == (bx.Status.TRUNCATED, 1)
    np.testing.assert_allclose(x, 1 / y + 0.1)
    np.testing.assert_allclose(report.residual, np.linalg.norm(0.1 * y), rtol=1e-12)
    np.testing.assert_allclose(report.initial_residual, np.sqrt(2), rtol=1e-12)
    _, report = bx.implicit_function(problem, lambda x0, y: y / 0).with_report(np.zeros(2), y)
    assert report.status == bx.Status.NONFINITE


def test_the_black_box_is_never_differentiated():
    @jax.custom_jvp
    def opaque(y):
        return 1 / y

    @opaque.defjvp
    def refuse(primals, tangents):
        raise AssertionError("differentiated")

    problem = bx.minimum(lambda x, y: y * x**2 / 2 - x)
    for mode in ("reverse", "forward"):
        rule = bx.Implicit(mode=mode)
        solve = bx.implicit_function(problem, lambda x0, y: opaque(y), rule)
        second = jax.jit(jax.grad(jax.grad(lambda y, solve=solve: solve(0.0, y))))(2.0)
        np.testing.assert_allclose(second, 2 / 2.0**3, rtol=1e-12)


def test_a_black_box_that_closes_over_traced_values():
    def h(y, scale):
        problem = bx.minimum(lambda x, y: y * scale * x**2 / 2 - x)
        return bx.implicit_function(problem, lambda x0, y: 1 / (y * scale))(0.0, y)

    for gradient in (jax.grad(h, (0, 1)), jax.jit(jax.grad(h, (0, 1)))):
        np.testing.assert_allclose(gradient(2.0, 4.0), [-1 / 16, -1 / 32], rtol=1e-12)
    lanes = jax.vmap(jax.grad(h, (0, 1)), in_axes=(None, 0))(2.0, np.array([4.0, 1.0]))
    np.testing.assert_allclose(lanes, [[-1 / 16, -1 / 4], [-1 / 32, -1 / 2]], rtol=1e-12)


def test_a_correction_repairs_a_rough_black_box():
    problem = bx.minimum(lambda x, y: jnp.sum(y * x**2 / 2 - x))
    rule = bx.Preconditioned(bx.Implicit(), bx.NewtonStep())
    solve = bx.implicit_function(problem, lambda x0, y: 1 / y + 0.1, rule)
    y = np.array([0.5, 2.0])
    x, report = solve.with_report(np.zeros(2), y)
    np.testing.assert_allclose(x, 1 / y, rtol=1e-12)  # Newton is exact on a quadratic
    assert report.correction.status == bx.Status.CONVERGED
    gradient = jax.grad(lambda y: C @ solve(np.zeros(2), y))(y)
    np.testing.assert_allclose(gradient, -C / y**2, rtol=1e-12)


# SciPy: logistic regression with one penalty per weight, against central differences.


def logistic_loss(w, y):
    margins = LABELS * (FEATURES @ w)
    return jnp.sum(jnp.logaddexp(0, -margins)) + jnp.sum(jnp.exp(y) * w**2) / 2


def logistic_by_scipy(w0, y):
    def value_and_gradient(w):
        margins = LABELS * (FEATURES @ w)
        value = np.sum(np.logaddexp(0, -margins)) + np.sum(np.exp(y) * w**2) / 2
        odds = 1 / (1 + np.exp(margins))
        return value, -FEATURES.T @ (LABELS * odds) + np.exp(y) * w

    def hessian(w):
        odds = 1 / (1 + np.exp(LABELS * (FEATURES @ w)))
        return FEATURES.T @ (FEATURES * (odds * (1 - odds))[:, None]) + np.diag(np.exp(y))

    options = {"xtol": 1e-14}
    result = scipy.optimize.minimize(
        value_and_gradient, w0, jac=True, hess=hessian, method="Newton-CG", options=options
    )
    return result.x


def difference_quotients(solve, y, step=1e-5):
    shifts = step * np.eye(len(y))
    return np.array([C @ (solve(y + s) - solve(y - s)) / (2 * step) for s in shifts])


def test_scipy():
    solve = bx.implicit_function(bx.minimum(logistic_loss), on_host(logistic_by_scipy))
    y = np.array([-1.0, 0.5])
    lanes = np.stack([y, y + 1, y - 0.5])
    eager, jitted, batched = everywhere(lambda y: C @ solve(np.zeros(2), y), y, lanes)
    want = [difference_quotients(lambda y: logistic_by_scipy(np.zeros(2), y), y) for y in lanes]
    np.testing.assert_allclose(eager, want[0], rtol=1e-7)
    np.testing.assert_allclose(jitted, want[0], rtol=1e-7)
    np.testing.assert_allclose(batched, want, rtol=1e-7)


# Scikit-learn: ridge regression, against the closed form.


def test_scikit_learn():
    def ridge_by_sklearn(w0, y):
        model = sklearn.linear_model.Ridge(alpha=np.exp(y), fit_intercept=False, solver="cholesky")
        return model.fit(FEATURES, TARGETS).coef_

    def ridge_loss(w, y):
        return jnp.sum((FEATURES @ w - TARGETS) ** 2) / 2 + jnp.exp(y) * jnp.sum(w**2) / 2

    def truth(y):
        matrix = FEATURES.T @ FEATURES + np.exp(y) * np.eye(2)
        w = np.linalg.solve(matrix, FEATURES.T @ TARGETS)
        return w, -np.linalg.solve(matrix, C) @ w * np.exp(y)

    solve = bx.implicit_function(bx.minimum(ridge_loss), on_host(ridge_by_sklearn))
    lanes = np.array([0.3, -1.0, 2.0])
    np.testing.assert_allclose(solve(np.zeros(2), 0.3), truth(0.3)[0], rtol=1e-10)
    eager, jitted, batched = everywhere(lambda y: C @ solve(np.zeros(2), y), 0.3, lanes)
    np.testing.assert_allclose([eager, jitted], [truth(0.3)[1]] * 2, rtol=1e-10)
    np.testing.assert_allclose(batched, [truth(y)[1] for y in lanes], rtol=1e-10)


# Optimistix: a nonlinear root, against its own implicit differentiation and the closed form.


def test_optimistix():
    def residual(x, y):
        return x**3 + x - y  # x*'(y) = 1 / (3 x^2 + 1)

    def by_optimistix(x0, y):
        solver = optimistix.Newton(rtol=1e-12, atol=1e-12)
        return optimistix.root_find(residual, solver, x0, y).value

    rule = bx.Implicit(bx.Dense())
    solve = bx.implicit_function(bx.root(residual), by_optimistix, rule)
    y = np.array([2.0, 10.0])  # x* = 1, 2
    lanes = np.stack([y, 1.5 * y])
    np.testing.assert_allclose(solve(np.ones(2), y), [1.0, 2.0], rtol=1e-10)
    eager, jitted, batched = everywhere(lambda y: C @ solve(np.ones(2), y), y, lanes)
    want = C / np.array([4.0, 13.0])
    np.testing.assert_allclose(eager, want, rtol=1e-10)
    np.testing.assert_allclose(jitted, want, rtol=1e-10)
    theirs = jax.vmap(jax.grad(lambda y: C @ by_optimistix(jnp.ones(2), y)))(lanes)
    np.testing.assert_allclose(batched, theirs, rtol=1e-10)
