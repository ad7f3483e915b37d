"""All modes and orders of derivatives, and what they flow through."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from tests.everyday import slow
from tests.iterative.example import (
    DECOUPLED,
    NOISY_Y,
    X0,
    C,
    Y,
    assert_close,
    curved,
    decoupled,
    descend,
    exactly,
    noisy,
)

# All modes and orders.


def closed_form(x0, y, rate, steps):
    """Return x_T = x* + (1 - rate exp(y))^T (x0 - x*)."""
    return np.exp(-y) + (1 - rate * np.exp(y)) ** steps * (x0 - np.exp(-y))


def second_derivative(x0, y, rate, steps, step=1e-3):
    """Return d2x_T/dy2 entry by entry, by differences of the recursion's derivative."""

    def first(y):
        return descend(x0, y, rate, steps)[1][1]

    near, far = (first(y + k * step) - first(y - k * step) for k in (1, 2))
    return (8 * near - far) / (12 * step)


@pytest.mark.parametrize(
    "rule",
    [bx.Unrolled(checkpoints=3), slow(bx.Unrolled())],
    ids=["three", "all"],
)
def test_modes_and_orders(rule):
    def solve(y):
        return bx.solution_map(DECOUPLED, bx.GradientDescent(0.3, **exactly(7)), rule)(X0, y)

    def value(y):
        return C @ solve(y)

    @jax.jit
    def everything(y):
        return {
            "x": solve(y),
            "jvp": jax.jvp(solve, (y,), (jnp.ones(3),))[1],
            "jacfwd": jax.jacfwd(solve)(y),
            "jacrev": jax.jacrev(solve)(y),
            "hessian": jax.hessian(value)(y),
            "reverse over reverse": jax.jacrev(jax.grad(value))(y),
            "grad of grad": jax.grad(lambda y: jnp.sum(jax.grad(value)(y)))(y),
        }

    got = everything(Y)
    np.testing.assert_allclose(got["x"], closed_form(X0, Y, 0.3, 7), rtol=1e-13)
    by_y = descend(X0, Y, 0.3, 7)[1][1]
    for name in ("jacfwd", "jacrev"):
        np.testing.assert_allclose(got[name], np.diag(by_y), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(got["jvp"], by_y, rtol=1e-12)
    second = C * second_derivative(X0, Y, 0.3, 7)
    for name in ("hessian", "reverse over reverse"):
        np.testing.assert_allclose(got[name], np.diag(second), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(got["grad of grad"], second, rtol=1e-9)


def test_forward_mode_with_a_traced_number_of_steps():
    rule = bx.Unrolled(mode="forward")

    @jax.jit
    def tangent(steps, x0, y):
        solver = bx.GradientDescent(0.3, 0.0, 0.0, steps)
        solve = bx.solution_map(DECOUPLED, solver, rule)
        push_y = jax.jvp(lambda y: solve(x0, y), (y,), (jnp.ones(3),))[1]
        return push_y, jax.jacfwd(lambda x0: solve(x0, y))(x0)

    for steps in (0, 1, 6):
        by_x0, by_y, _ = descend(X0, Y, 0.3, steps)[1]
        got = tangent(steps, X0, Y)
        assert_close(got, (by_y, np.diag(by_x0)), 1e-12)


def test_forward_mode_of_the_last_steps():
    solver = bx.GradientDescent(0.3, **exactly(7))
    solve = bx.solution_map(DECOUPLED, solver, bx.Unrolled(3, mode="forward"))
    by_y = descend(X0, Y, 0.3, 7, last=3)[1][1]
    by_x0, got = jax.jit(jax.jacfwd(solve, (0, 1)))(X0, Y)
    np.testing.assert_allclose(got, np.diag(by_y), rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(by_x0, np.zeros((3, 3)))


@pytest.mark.slow
def test_an_optimiser_with_while_loops_goes_in_forward_mode():
    """The line search of L-BFGS is a `while_loop`; at the solution the start is forgotten."""
    solver = bx.Optax(optax.lbfgs(), maxiter=50)
    solve = bx.solution_map(DECOUPLED, solver, bx.Unrolled(mode="forward"))
    with pytest.warns(UserWarning, match="until the run has converged"):
        jacobian = jax.jit(jax.jacfwd(lambda y: solve(X0, y)))(Y)
    np.testing.assert_allclose(jacobian, np.diag(-np.exp(-Y)), rtol=1e-5, atol=1e-5)


# What flows where.


def test_closed_over_traced_values_get_gradients():
    def value(shift, rate):
        problem = bx.minimum(lambda x, y: decoupled(x, y + shift))
        solver = bx.GradientDescent(rate, **exactly(5))
        return C @ bx.solution_map(problem, solver, bx.Unrolled())(X0, Y)

    _, (_, by_y, by_rate) = descend(X0, Y + 0.2, 0.3, 5)
    for transform in (lambda f: f, jax.jit):
        by_shift, got = transform(jax.grad(value, (0, 1)))(jnp.full(3, 0.2), 0.3)
        np.testing.assert_allclose(by_shift, C * by_y, rtol=1e-12)
        np.testing.assert_allclose(got, C @ by_rate, rtol=1e-12)


def test_rates_that_depend_on_y():
    def value(y):
        solver = bx.GradientDescent(0.3 * jnp.exp(y[0]), **exactly(5))
        return C @ bx.solution_map(DECOUPLED, solver, bx.Unrolled())(X0, y)

    rate = 0.3 * np.exp(Y[0])
    _, (_, by_y, by_rate) = descend(X0, Y, rate, 5)
    wanted = C * by_y + np.array([C @ by_rate * rate, 0, 0])
    np.testing.assert_allclose(jax.jit(jax.grad(value))(Y), wanted, rtol=1e-12)


@pytest.mark.parametrize(
    "rule", [bx.Unrolled(), bx.Unrolled(2, checkpoints=1), bx.OneStep()], ids=["all", "last", "one"]
)
def test_integer_and_key_leaves_of_y(rule):
    solver = bx.GradientDescent(0.3, **exactly(4))
    solve = bx.solution_map(bx.minimum(noisy), solver, rule)
    gradient = jax.jit(jax.grad(lambda y: jnp.sum(solve(jnp.ones(2), y)), allow_int=True))(NOISY_Y)
    noise = 1e-3 * np.asarray(jax.random.normal(NOISY_Y["key"], (2,)))
    # The noise shifts F by a constant; a recursion in NumPy once more.
    x, w, by_w = np.ones(2), np.array([-0.3, 0.1]), np.zeros(2)
    one_step = isinstance(rule, bx.OneStep)
    for k in range(5 if one_step else 4):
        if (one_step and k == 4) or (not one_step and rule.last and k == 4 - rule.last):
            by_w = np.zeros(2)
        by_w = (1 - 0.3 * np.exp(w)) * by_w - 0.3 * np.exp(w) * x
        x = x - 0.3 * (np.exp(w) * x - 1 + noise)
    np.testing.assert_allclose(gradient["w"], [by_w[1], 0, by_w[0]], rtol=1e-12)
    for name in ("index", "key"):
        assert gradient[name].dtype == jax.dtypes.float0


def test_an_optimiser_that_remembers_a_random_key():
    solver = bx.Optax(optax.noisy_sgd(0.2, eta=1e-4, gamma=0.5, key=0), **exactly(6))

    def value(rule, x0, y):
        return C @ bx.solution_map(DECOUPLED, solver, rule)(x0, y)

    # The noise is additive: it changes the iterates, but the derivative with respect to x0 not.
    got = jax.jit(jax.grad(lambda x0: value(bx.Unrolled(checkpoints=2), x0, Y)))(X0)
    np.testing.assert_allclose(got, C * descend(X0, Y, 0.2, 6)[1][0], rtol=1e-12)
    last = jax.jit(jax.grad(lambda y: value(bx.Unrolled(2), X0, y)))(Y)
    assert np.all(np.isfinite(last)) and np.all(last != 0)


@pytest.mark.parametrize("rule", [slow(bx.Unrolled()), bx.Unrolled(3), bx.OneStep()], ids=repr)
def test_float32_stays_float32(rule):
    solver = bx.Optax(optax.sgd(0.3, momentum=0.2), **exactly(6))
    x0, y = jnp.asarray(X0, jnp.float32), jnp.asarray(Y, jnp.float32)

    def value(x0, y):
        x, report = bx.solution_map(DECOUPLED, solver, rule).with_report(x0, y)
        return jnp.sum(x * jnp.asarray(C, x.dtype)), (x, report)

    derivative = jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))
    got, wanted = derivative(x0, y), derivative(X0, Y)
    for leaf in jax.tree.leaves(got):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    assert_close(got[1], wanted[1], 2e-6, 2e-6)
    assert_close(got[0][1][0], wanted[0][1][0], 2e-6)


def test_custom_derivatives_inside_the_problem():
    """A user's `custom_vjp` allows reverse mode alone, and the run before the last steps too."""

    @jax.custom_vjp
    def half_cosine(x, y):
        return 0.5 * jnp.cos(x * y)

    def forward(x, y):
        return half_cosine(x, y), (x, y)

    def backward(saved, cotangent):
        x, y = saved
        return -0.5 * jnp.sin(x * y) * y * cotangent, -0.5 * jnp.sin(x * y) * x * cotangent

    half_cosine.defvjp(forward, backward)
    x, by_y, y = 0.3, 0.0, 1.2
    for k in range(9):
        by_y = 0.0 if k == 6 else by_y
        slope = -0.5 * np.sin(x * y)
        x, by_y = 0.5 * np.cos(x * y), slope * y * by_y + slope * x
    solver = bx.FixedPointIteration(**exactly(9))
    solve = bx.solution_map(bx.fixed_point(half_cosine), solver, bx.Unrolled(3))
    np.testing.assert_allclose(jax.jit(jax.grad(lambda y: solve(0.3, y)))(y), by_y, rtol=1e-12)


def test_a_solution_map_inside_of_an_unrolled_one():
    """The inner map has x*(z) = 1 / z, so the outer equation is z = 0.3 / (y + z^2)."""
    inner = bx.solution_map(bx.minimum(curved), bx.Newton(), bx.Implicit(mode="forward"))
    unrolled = bx.solution_map(
        bx.minimum(curved), bx.GradientDescent(0.4, maxiter=60), bx.Unrolled()
    )

    def value(solve, y):
        outside = bx.root(lambda z, y: z - 0.3 * solve(0.5, y + z**2))
        return bx.solution_map(outside, bx.GradientDescent(0.9, maxiter=40), bx.Unrolled())(0.2, y)

    z = 0.14
    for _ in range(60):
        z = 0.3 / (2.0 + z**2)
    # dz = -0.3 / (y + z^2)^2 (dy + 2 z dz)
    slope = -0.3 / (2.0 + z**2) ** 2
    for solve in (inner, unrolled):
        value_at_2, got = jax.jit(jax.value_and_grad(lambda y, s=solve: value(s, y)))(2.0)
        np.testing.assert_allclose(value_at_2, z, rtol=1e-9)
        np.testing.assert_allclose(got, slope / (1 - 2 * z * slope), rtol=1e-8)
