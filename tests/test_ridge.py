"""Ridge regression with one log-penalty per feature: gradient and Hessian in closed form.

w(y) = argmin ||X w - t||^2 / (2 n) + sum(exp(y) w^2) / 2,   h(y) = ||X' w(y) - t'||^2 / (2 n')
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from tests.everyday import slow

RANDOM = np.random.default_rng(0)
X, X_VAL = RANDOM.normal(size=(2, 30, 6)) * np.array([1.0, 2.0, 0.5, 1.0, 3.0, 1.0])
T, T_VAL = RANDOM.normal(size=(2, 30)) + X[:, 0]
Y = RANDOM.normal(size=6) - 1
HESSIAN_INNER = X.T @ X / 30 + np.diag(np.exp(Y))


def closed_form():
    """Return the gradient and the Hessian of h at Y, by matrix calculus.

    H w = c with H_i = p_i e_i e_i^T, p = exp(y). So H w_i = -H_i w, and
    H w_ij = -(delta_ij H_i w + H_i w_j + H_j w_i). With a = H^{-1} g_1 the sum of g_1 w_ij follows.
    """
    penalty = np.exp(Y)
    w = np.linalg.solve(HESSIAN_INNER, X.T @ T / 30)
    jacobian = -np.linalg.solve(HESSIAN_INNER, np.diag(penalty * w))
    outer_gradient = X_VAL.T @ (X_VAL @ w - T_VAL) / 30
    a = np.linalg.solve(HESSIAN_INNER, outer_gradient)
    cross = (a * penalty)[:, None] * jacobian
    second = -(np.diag(a * penalty * w) + cross + cross.T)
    hessian = jacobian.T @ (X_VAL.T @ X_VAL / 30) @ jacobian + second
    return jacobian.T @ outer_gradient, hessian


GRADIENT, HESSIAN = closed_form()


def outer_loss(rule, dtype):
    x, t, x_val, t_val = (jnp.asarray(part, dtype) for part in (X, T, X_VAL, T_VAL))

    def train(w, y):
        return jnp.sum((x @ w - t) ** 2) / 60 + jnp.sum(jnp.exp(y) * w**2) / 2

    solve = bx.solution_map(bx.minimum(train), bx.Newton(), rule)
    return lambda y: jnp.sum((x_val @ solve(jnp.zeros(6, dtype), y) - t_val) ** 2) / 60


def relative_error(actual, expected):
    assert np.shape(actual) == np.shape(expected)
    return np.linalg.norm(np.asarray(actual, float) - expected) / np.linalg.norm(expected)


RULES = {
    "implicit": lambda mode: bx.Implicit(mode=mode),
    "newton": lambda mode: bx.Preconditioned(bx.Implicit(mode=mode), step=bx.NewtonStep()),
}
# In float32 every solve ends at a relative residual of eps^(3/4), which the inverse of H turns into
# an error of at most cond(H) times that.
FLOAT32 = np.linalg.cond(HESSIAN_INNER) * float(np.finfo(np.float32).eps) ** 0.75


@pytest.mark.parametrize(
    ("rule", "dtype", "tolerance"),
    [
        ("implicit", jnp.float64, 1e-9),
        slow("implicit", jnp.float32, FLOAT32),
        slow("newton", jnp.float64, 1e-9),
        ("newton", jnp.float32, FLOAT32),
    ],
)
def test_gradient_and_hessian_equal_closed_form(rule, dtype, tolerance):
    y = jnp.asarray(Y, dtype)
    reverse = outer_loss(RULES[rule]("reverse"), dtype)
    forward = outer_loss(RULES[rule]("forward"), dtype)
    gradient, twice_reverse = jax.jit(
        lambda y: (jax.grad(reverse)(y), jax.jacrev(jax.grad(reverse))(y))
    )(y)
    hessian = jax.jit(jax.hessian(forward))(y)
    assert gradient.dtype == twice_reverse.dtype == hessian.dtype == dtype
    assert relative_error(gradient, GRADIENT) < tolerance
    assert relative_error(twice_reverse, HESSIAN) < tolerance
    assert relative_error(hessian, HESSIAN) < tolerance
    assert relative_error(jax.grad(reverse)(y), GRADIENT) < tolerance  # without jit


def test_closed_form_equals_central_differences():
    def h(y):
        w = np.linalg.solve(X.T @ X / 30 + np.diag(np.exp(y)), X.T @ T / 30)
        return np.sum((X_VAL @ w - T_VAL) ** 2) / 60

    steps = 1e-5 * np.eye(6)
    differences = [(h(Y + step) - h(Y - step)) / 2e-5 for step in steps]
    np.testing.assert_allclose(GRADIENT, differences, rtol=1e-7, atol=1e-9)
    curvatures = [
        [
            (
                h(Y + 10 * a + 10 * b)
                - h(Y + 10 * a - 10 * b)
                - h(Y - 10 * a + 10 * b)
                + h(Y - 10 * a - 10 * b)
            )
            / 4e-8
            for b in steps
        ]
        for a in steps
    ]
    np.testing.assert_allclose(HESSIAN, curvatures, rtol=1e-5, atol=1e-6)
