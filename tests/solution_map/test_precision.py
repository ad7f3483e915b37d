"""Shapes, sizes, budgets, scales and precisions of a solution map."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from tests.everyday import params, slow
from tests.solution_map.example import SOLVER, TARGET, C, H, Y, objective, truth

# Shapes, sizes and budgets.


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_a_scalar_x(mode):
    problem = bx.minimum(lambda x, y: y * x**2 / 2 - x)
    solve = bx.solution_map(problem, SOLVER, bx.Implicit(mode=mode))
    value, gradient = jax.value_and_grad(lambda y: solve(0.0, y))(2.0)
    assert solve(0.0, 2.0).shape == ()
    np.testing.assert_allclose([value, gradient], [0.5, -0.25], rtol=1e-10)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("x0", [{}, np.zeros(0), {"none": np.zeros((2, 0)), "some": np.ones(1)}])
def test_an_x_without_entries(x0, mode):
    def total(x):
        return sum((jnp.sum(leaf) for leaf in jax.tree.leaves(x)), jnp.zeros(()))

    problem = bx.minimum(lambda x, y: total(jax.tree.map(lambda leaf: y * leaf**2 / 2 - leaf, x)))
    solve = bx.solution_map(problem, SOLVER, bx.Implicit(mode=mode))
    x, report = jax.jit(solve.with_report)(x0, 2.0)
    assert jax.tree.structure(x) == jax.tree.structure(x0)
    assert [leaf.shape for leaf in jax.tree.leaves(x)] == [
        leaf.shape for leaf in jax.tree.leaves(x0)
    ]
    assert report.status == bx.Status.CONVERGED
    entries = sum(leaf.size for leaf in jax.tree.leaves(x0))
    gradient = jax.jit(jax.grad(lambda y: total(solve(x0, y)) + 3 * y))(2.0)
    np.testing.assert_allclose(gradient, 3 - 0.25 * entries, rtol=1e-10)


def test_a_pytree_x_with_a_single_leaf():
    solve = bx.solution_map(bx.minimum(lambda x, y: objective(x["w"], y)), SOLVER)
    x, pull = jax.vjp(lambda y: solve({"w": jnp.zeros(2)}, y), Y)
    np.testing.assert_allclose(x["w"], truth()[0], rtol=1e-10)
    np.testing.assert_allclose(pull({"w": jnp.asarray(C)})[0], truth()[1], rtol=1e-10)


@pytest.mark.parametrize("mode", ["reverse", slow("forward")])
def test_budgets_of_zero_and_one(mode):
    x0 = np.array([0.3, -0.7])
    one_step = x0 - 0.4 * ((H + np.diag(Y)) @ x0 - TARGET)
    v = truth()[2]
    for maxiter, want in ((0, x0), (1, one_step)):
        solver = bx.GradientDescent(0.4, maxiter=maxiter)
        solve = bx.solution_map(bx.minimum(objective), solver, bx.Implicit(mode=mode))
        x, report = solve.with_report(x0, Y)
        np.testing.assert_allclose(x, want, rtol=1e-14)
        assert (report.status, report.iterations) == (bx.Status.MAXITER, maxiter)
        # The implicit formula at the point reached: -F_2^T v with F_2 = diag(x).
        gradient = jax.grad(lambda y, solve=solve: C @ solve(x0, y))(Y)
        np.testing.assert_allclose(gradient, -v * want, rtol=1e-10)


def test_an_adjoint_that_one_iteration_solves():
    problem = bx.minimum(lambda x, y: jnp.sum((x - y) ** 2) / 2)  # the Hessian is the identity
    _, report = bx.Implicit().pullback(problem, jnp.ones(2), jnp.ones(2), C)
    assert (report.solve.status, report.solve.iterations) == (bx.Status.CONVERGED, 1)
    solve = bx.solution_map(problem, SOLVER)
    jacobian = jax.jit(jax.jacrev(lambda y: solve(jnp.zeros(2), y)))(Y)
    np.testing.assert_allclose(jacobian, np.eye(2), atol=1e-15)


# Scales and precision.


RULES = {
    "CG": bx.Implicit(),
    "NormalCG": bx.Implicit(bx.NormalCG()),
    "Dense": bx.Implicit(bx.Dense()),
    "forward": bx.Implicit(mode="forward"),
    "preconditioned": bx.Preconditioned(bx.Implicit(), step=bx.NewtonStep()),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    params(
        itertools.product(RULES, [np.float32, np.float64]),
        lambda name, dtype: dtype is np.float32 or name == "CG",
        lambda part: getattr(part, "__name__", part),
    ),
)
def test_cotangents_of_any_size_give_the_same_relative_accuracy(name, dtype):
    rule = RULES[name]
    solve = bx.solution_map(bx.minimum(objective), bx.GradientDescent(dtype(0.4)), rule)
    x, pull = jax.vjp(lambda y: solve(jnp.zeros(2, dtype), y), jnp.asarray(Y, dtype))
    want = -truth()[2] * np.asarray(x, np.float64)  # the implicit formula at the point reached

    def error(size):
        (got,) = pull(jnp.asarray(size * C, dtype))
        assert got.dtype == dtype
        return np.linalg.norm(np.asarray(got, np.float64) / size - want) / np.linalg.norm(want)

    epsilon = np.finfo(dtype).eps
    assert error(1.0) < 8 * epsilon
    assert error(1e-20) < 8 * epsilon
    assert error(1e20) < 8 * epsilon


def test_memory_of_a_gradient_does_not_depend_on_the_number_of_iterations():
    size = 1000
    problem = bx.minimum(lambda x, y: jnp.sum(x**4 + y * (x - 1) ** 2))

    def temporary_memory(maxiter):
        solve = bx.solution_map(problem, bx.GradientDescent(0.1, rtol=0, atol=0, maxiter=maxiter))
        gradient = jax.jit(jax.grad(lambda y: jnp.sum(solve(jnp.zeros(size), y) ** 3)))
        compiled = gradient.lower(jnp.ones(size)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporary_memory(10), temporary_memory(10_000)
    assert many == few > 0


def assert_is_float32(tree):
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert leaf.dtype == jnp.float32
            assert not leaf.weak_type


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_float32_stays_float32_with_double_precision_at_hand(mode):
    solve = bx.solution_map(bx.minimum(objective), SOLVER, bx.Implicit(mode=mode))
    x0, y = jnp.zeros(2, jnp.float32), jnp.asarray(Y, jnp.float32)
    x, report = solve.with_report(x0, y)
    gradient = jax.grad(lambda y: jnp.sum(jnp.asarray(C, x.dtype) * solve(x0, y)))(y)
    assert_is_float32((x, report, gradient))
    assert report.status == bx.Status.CONVERGED
    # rtol is 6.4e-6 and the condition number is below 3.
    np.testing.assert_allclose(x, truth()[0], rtol=2e-5)
    np.testing.assert_allclose(gradient, truth()[1], rtol=4e-5)


def test_float32_is_the_default_without_double_precision():
    with jax.enable_x64(False):
        solve = bx.solution_map(bx.minimum(lambda x, y: y * x**2 / 2 - x), SOLVER)
        x, report = solve.with_report(0.0, 2.0)
        gradient = jax.grad(solve, argnums=1)(0.0, 2.0)
        assert_is_float32((x, report))
        assert gradient.dtype == jnp.float32
        assert report.status == bx.Status.CONVERGED
        np.testing.assert_allclose([x, gradient], [0.5, -0.25], rtol=1e-5)


def test_python_numbers_are_arrays_of_the_default_dtype():
    solve = bx.solution_map(bx.minimum(lambda x, y: y * x**2 / 2 - x), SOLVER)
    x = solve(0.0, 2.0)
    assert x.dtype == jnp.float64 and not x.weak_type
    # A weakly typed y does not widen x.
    x, gradient = jax.value_and_grad(solve, argnums=1)(jnp.float32(0), 2.0)
    assert_is_float32(x)
    np.testing.assert_allclose([x, gradient], [0.5, -0.25], rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_converges_to_its_own_accuracy(dtype):
    solve = bx.solution_map(bx.minimum(lambda x, y: jnp.sum(y * x**2 / 2 - x)), SOLVER)
    y = jnp.array([1.0, 1.5, 2.0], dtype)
    x, report = solve.with_report(jnp.zeros(3, dtype), y)
    gradient = jax.grad(lambda y: jnp.sum(solve(jnp.zeros(3, dtype), y)))(y)
    assert x.dtype == gradient.dtype == dtype
    assert report.status == bx.Status.CONVERGED
    want = 1 / np.asarray(y, np.float64)
    rtol = 3 * float(jnp.finfo(dtype).eps) ** 0.75  # ||F|| <= eps^(3/4) ||F(x0)||
    np.testing.assert_allclose(np.asarray(x, np.float64), want, rtol=rtol)
    np.testing.assert_allclose(np.asarray(gradient, np.float64), -(want**2), rtol=2 * rtol)
