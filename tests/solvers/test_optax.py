"""Optax optimisers as inner solvers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import Status
from tests.solvers.problems import (
    AFFINE,
    MATRIX,
    QUADRATIC,
    ROSENBROCK,
    SOLUTION,
    X0,
    B,
    exactly,
    solve,
)

BARE_ADAM = optax.scale_by_adam()  # one object, so that it is compiled once


def adam(x, rate, steps, b1=0.9, b2=0.999, epsilon=1e-8):
    """Return the iterate of Kingma and Ba's algorithm 1."""
    m = v = np.zeros_like(x)
    for t in range(1, steps + 1):
        gradient = MATRIX @ x - B
        m = b1 * m + (1 - b1) * gradient
        v = b2 * v + (1 - b2) * gradient**2
        x = x - rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + epsilon)
    return x


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("rate", [0.1, 0.02])
def test_a_learning_rate_scales_a_bare_direction(rate, steps):
    x, report = solve(bx.Optax(BARE_ADAM, rate, **exactly(steps)))
    np.testing.assert_allclose(x, adam(X0, rate, steps), rtol=1e-9)
    assert (report.status, report.iterations) == (Status.TRUNCATED, steps)


def test_an_optimizer_with_its_own_rate():
    x, _ = solve(bx.Optax(optax.adam(0.1), **exactly(5)))
    np.testing.assert_allclose(x, adam(X0, 0.1, 5), rtol=1e-9)


def test_rates_are_leaves_that_may_be_batched():
    rates = np.array([0.1, 0.02])

    def one(rate):
        solver = bx.Optax(BARE_ADAM, rate, **exactly(5))
        return bx.solution_map(QUADRATIC, solver).with_report(X0, (MATRIX, B))[0]

    expected = [adam(X0, rate, 5) for rate in rates]
    np.testing.assert_allclose(jax.vmap(one)(rates), expected, rtol=1e-9)
    assert jax.tree.leaves(bx.Optax(BARE_ADAM, 0.1, 1e-3, 1e-6, 7)) == [0.1, 1e-3, 1e-6, 7]


def test_heavy_ball_on_a_root():
    x, velocity = X0.copy(), np.zeros_like(X0)
    for _ in range(6):
        velocity = 0.5 * velocity + (MATRIX @ x - B)
        x = x - 0.1 * velocity
    got, _ = solve(bx.Optax(optax.sgd(0.1, momentum=0.5), **exactly(6)), AFFINE)
    np.testing.assert_allclose(got, x, rtol=1e-11)


def test_lbfgs_gets_the_objective_for_its_line_search():
    solver = bx.Optax(optax.lbfgs(), rtol=1e-9, atol=0.0, maxiter=200)
    x, report = solve(solver, ROSENBROCK, np.array([-1.2, 1.0]), 100.0)
    assert report.status is Status.CONVERGED
    np.testing.assert_allclose(x, [1.0, 1.0], atol=1e-6)


def test_converges_to_the_solution():
    x, report = solve(bx.Optax(optax.sgd(0.4), rtol=1e-10, atol=0.0))
    assert report.status is Status.CONVERGED
    np.testing.assert_allclose(x, SOLUTION, rtol=1e-8)


def test_pytrees_keep_their_dtypes():
    x0 = {"a": jnp.zeros(2, jnp.float32), "b": jnp.zeros((), jnp.float32)}
    problem = bx.minimum(lambda x, y: jnp.sum((x["a"] - y) ** 2) + (x["b"] + y) ** 2)
    solver = bx.Optax(optax.sgd(0.25), **exactly(40))
    x, _ = bx.solution_map(problem, solver).with_report(x0, jnp.float32(3.0))
    assert x["a"].dtype == x["b"].dtype == jnp.float32
    np.testing.assert_allclose(x["a"], 3.0, rtol=1e-6)
    np.testing.assert_allclose(x["b"], -3.0, rtol=1e-6)


@pytest.mark.parametrize("bad", ["adam", None, optax.adam], ids=["string", "none", "function"])
def test_a_transformation_must_be_one(bad):
    with pytest.raises(TypeError, match="`transformation` must be a GradientTransformation"):
        bx.Optax(bad)


@pytest.mark.parametrize("field", ["rtol", "atol", "maxiter"])
def test_stopping_numbers_must_not_be_negative(field):
    with pytest.raises(ValueError, match=f"`{field}` must not be negative, got -1"):
        bx.Optax(BARE_ADAM, **{field: -1})
