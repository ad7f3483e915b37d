"""The order of the error of a hypergradient in ||x - x*||, and its first-order constant."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from tests.everyday import slow

RANDOM = np.random.default_rng(1)
X, X_VAL = jnp.array(RANDOM.normal(size=(2, 40, 5)))
T, T_VAL = jnp.array(np.sign(RANDOM.normal(size=(2, 40)) + np.asarray(X[:, 0])))
Y = jnp.array(RANDOM.normal(size=5) - 1)
DIRECTION = jnp.array(RANDOM.normal(size=5))
DIRECTION = DIRECTION / jnp.linalg.norm(DIRECTION)
DISTANCES = np.geomspace(1e-3, 1e-5, 7)


def penalty(x, y):
    return jnp.sum(jnp.exp(y) * x**2) / 2


def ridge(x, y):
    return jnp.mean((X @ x - T) ** 2) / 2 + penalty(x, y)


def robust(x, y):  # ridge regression with the log-cosh loss
    return jnp.mean(jnp.log(jnp.cosh(X @ x - T))) + penalty(x, y)


def logistic(x, y):
    return jnp.mean(jax.nn.softplus(-T * (X @ x))) + penalty(x, y)


def outer(x, y):
    return jnp.mean(jax.nn.softplus(-T_VAL * (X_VAL @ x))) + jnp.sum(y**2) / 100


CG = bx.CG(rtol=1e-15)
VANILLA = bx.Implicit(CG)
NEWTON = bx.Preconditioned(bx.Implicit(CG), step=bx.NewtonStep(CG))
JACOBI = bx.Preconditioned(bx.Implicit(CG), step=bx.JacobiStep())
DIAGONAL = bx.Reparameterized(bx.Implicit(bx.Dense()), change=bx.DiagonalChange())
EXPONENTIAL = bx.Reparameterized(bx.Implicit(bx.Dense()), change=bx.ExpChange())


def dense_estimate(objective, x):
    """Return the implicit estimate with dense derivatives."""
    hessian = jax.hessian(objective)(x, Y)
    mixed = jax.jacobian(jax.grad(objective), argnums=1)(x, Y)
    outer_x, outer_y = jax.grad(outer, (0, 1))(x, Y)
    return outer_y - mixed.T @ jnp.linalg.solve(hessian, outer_x)


@functools.cache
def solution(objective):
    """Return x*, and the exact hypergradient."""

    def step(_, x):
        return x - jnp.linalg.solve(jax.hessian(objective)(x, Y), jax.grad(objective)(x, Y))

    @jax.jit
    def solve():
        x = jax.lax.fori_loop(0, 20, step, jnp.zeros(5))
        return x, dense_estimate(objective, x)

    return solve()


def errors(objective, rule):
    """Return the errors of a rule at the given distances from the solution."""
    star, exact = solution(objective)
    problem = bx.minimum(objective)
    engine = bx.value_and_hypergradient(outer, problem, bx.GradientDescent(0.1, maxiter=0), rule)
    points = star + jnp.array(DISTANCES)[:, None] * DIRECTION
    estimates = jax.jit(jax.vmap(lambda x: engine(Y, bx.cold_start(x)).gradient))(points)
    return np.asarray(jnp.linalg.norm(estimates - exact, axis=1))


def slope(values):
    return np.polyfit(np.log(DISTANCES), np.log(values), 1)[0]


@pytest.mark.parametrize("objective", [slow(ridge), slow(robust), logistic])
def test_vanilla_is_first_order(objective):
    assert slope(errors(objective, VANILLA)) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("objective", [robust, slow(logistic)])
def test_newton_preconditioning_is_second_order(objective):
    assert slope(errors(objective, NEWTON)) == pytest.approx(2.0, abs=0.1)


def test_newton_preconditioning_is_exact_where_the_inner_problem_is_quadratic():
    assert np.max(errors(ridge, NEWTON)) < 1e-14


# The error of Jacobi's step is predicted below.
@pytest.mark.parametrize("rule", [slow(JACOBI), DIAGONAL, EXPONENTIAL])
def test_the_others_are_first_order(rule):
    assert slope(errors(logistic, rule)) == pytest.approx(1.0, abs=0.1)


def test_jacobi_multiplies_the_first_order_error_as_predicted():
    star, _ = solution(logistic)
    hessian = jax.jit(jax.hessian(logistic))(star, Y)
    sensitivity = jax.jit(jax.jacobian(lambda x: dense_estimate(logistic, x)))(star)
    left = jnp.eye(5) - hessian / jnp.diag(hessian)[:, None]
    predicted = {
        "vanilla": jnp.linalg.norm(sensitivity @ DIRECTION),
        "jacobi": jnp.linalg.norm(sensitivity @ left @ DIRECTION),
    }
    for name, rule in {"vanilla": VANILLA, "jacobi": JACOBI}.items():
        measured = errors(logistic, rule)[-1] / DISTANCES[-1]
        # What is left over is second order, and the last distance is 1e-5.
        assert measured == pytest.approx(float(predicted[name]), rel=1e-3)
