"""The stochastic engine: its formulas, its limits, and its failures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from tests.stochastic import example
from tests.stochastic.example import (
    ALL,
    ALL_OUTER,
    TRAIN,
    VALIDATION,
    X0,
    Y,
    exact_outer,
    jacobian,
    make,
    objective,
    optimality,
    outer_terms,
    pullback,
    truth,
)

KEY = jax.random.key(11)


# Against NumPy, with the same batches.


class Recorded:
    """The indices that a sampler draws, one batch after the other."""

    def __init__(self, sampler, state, count):
        self.sampler = dataclasses.replace(sampler, data=np.arange(count))
        self.state = dataclasses.replace(state, source=self.sampler.source)

    def next(self):
        indices, self.state = self.sampler.next(self.state)
        return np.asarray(indices)


def by_numpy(state, inner, outer, t, k, samples, inner_size, adjoint_size):
    """Return x, v, value, gradient, both residuals and the standard error."""
    x, v = np.asarray(state.x), np.asarray(state.adjoint)
    for index in range(t):
        residual = optimality(x, Y, inner.next())
        x = x - inner_size(index) * residual
    inner_residual = np.linalg.norm(residual)
    terms = [outer_terms(x, Y, outer.next()) for _ in range(samples)]
    value, cotangent_x, cotangent_y = (np.mean(part, axis=0) for part in zip(*terms, strict=True))
    for index in range(k):
        residual = jacobian(Y, inner.next()) @ v - cotangent_x
        v = v - adjoint_size(index) * residual
    adjoint_residual = np.linalg.norm(residual) / np.linalg.norm(cotangent_x)
    pulled = [pullback(x, Y, v, inner.next()) for _ in range(samples)]
    variance = np.var(pulled, axis=0, ddof=1).sum()
    variance += np.var([part[2] for part in terms], axis=0, ddof=1).sum()
    gradient = cotangent_y - np.mean(pulled, axis=0)
    return x, v, value, gradient, inner_residual, adjoint_residual, np.sqrt(variance / samples)


def assert_result(result, want):
    x, v, value, gradient, inner_residual, adjoint_residual, standard_error = want
    np.testing.assert_allclose(result.x, x, rtol=1e-12)
    np.testing.assert_allclose(result.state.adjoint, v, rtol=1e-12)
    np.testing.assert_allclose(result.value, value, rtol=1e-12)
    np.testing.assert_allclose(result.gradient, gradient, rtol=1e-12)
    np.testing.assert_allclose(result.report.inner_residual, inner_residual, rtol=1e-12)
    np.testing.assert_allclose(result.report.adjoint_residual, adjoint_residual, rtol=1e-12)
    np.testing.assert_allclose(result.report.standard_error, standard_error, rtol=1e-12)
    assert result.report.status == bx.Status.TRUNCATED


SIZES = {
    "constant": (0.1, 0.2, lambda index: 0.1, lambda index: 0.2),
    "decreasing": (
        bx.decreasing(1.0, 4.0),
        bx.decreasing(2.0, 8.0),
        lambda index: 1 / (4 + index),
        lambda index: 2 / (8 + index),
    ),
}


@pytest.mark.parametrize("size", SIZES)
def test_the_steps_are_those_of_the_formulas(size):
    inner_step_size, adjoint_step_size, inner_size, adjoint_size = SIZES[size]
    engine = make(inner_step_size=inner_step_size, adjoint_step_size=adjoint_step_size)
    state = engine.init(X0 + 0.5, KEY)
    inner = Recorded(engine.sampler, state.sampler, 12)
    outer = Recorded(engine.outer_sampler, state.outer_sampler, 8)
    for _ in range(2):  # the second call is warm, and its step sizes start again
        want = by_numpy(state, inner, outer, 4, 5, 3, inner_size, adjoint_size)
        result = engine(Y, state)
        assert_result(result, want)
        state = result.state
        np.testing.assert_array_equal(state.x, result.x)
        np.testing.assert_array_equal(state.start, X0 + 0.5)


def test_an_exact_outer_objective_has_no_error_of_its_own():
    engine = make(exact_outer, outer_sampler=None)
    state = engine.init(X0, KEY)
    inner = Recorded(engine.sampler, state.sampler, 12)

    class Everything:
        def next(self):
            return ALL_OUTER

    want = by_numpy(state, inner, Everything(), 4, 5, 3, lambda _: 0.1, lambda _: 0.2)
    result = engine(Y, state)
    assert_result(result, want)
    assert result.state.outer_sampler is None


# Limits.


def test_full_batches_and_many_steps_give_the_hypergradient_of_ridge_regression():
    sampler, outer_sampler = bx.EpochSampler(TRAIN, 12), bx.EpochSampler(VALIDATION, 8)
    options = {"inner_steps": 400, "adjoint_steps": 400, "inner_step_size": 0.3}
    options |= {"adjoint_step_size": 0.3, "sampler": sampler}
    for engine in (
        make(outer_sampler=outer_sampler, **options),
        make(exact_outer, outer_sampler=None, **options),
    ):
        result = engine(Y, engine.init(X0, KEY))
        x, v, value, gradient = truth(Y)
        np.testing.assert_allclose(result.x, x, rtol=1e-10)
        np.testing.assert_allclose(result.state.adjoint, v, rtol=1e-10)
        np.testing.assert_allclose(result.value, value, rtol=1e-10)
        np.testing.assert_allclose(result.gradient, gradient, rtol=1e-10)
        assert result.report.inner_residual < 1e-12
        assert result.report.adjoint_residual < 1e-12
        assert result.report.standard_error < 1e-12
    h = 1e-5
    differences = [(truth(Y + h * e)[2] - truth(Y - h * e)[2]) / (2 * h) for e in np.eye(3)]
    np.testing.assert_allclose(result.gradient, differences, rtol=1e-8)


def test_fixed_points_whose_jacobian_is_not_symmetric():
    rng = np.random.default_rng(2)
    matrices, b = 0.3 * rng.normal(size=(6, 3, 3)), rng.normal(size=(6, 3))
    c = np.array([1.0, -2.0, 0.5])
    problem = bx.stochastic_fixed_point(
        lambda x, y, batch: jnp.mean(batch[0], axis=0) @ x + y * jnp.mean(batch[1], axis=0)
    )
    for steps, size in ((60, 1.0), (200, 0.5)):  # plain, and damped
        engine = make(
            lambda x, y: c @ x,
            problem,
            bx.EpochSampler((matrices, b), 6),
            outer_sampler=None,
            inner_steps=steps,
            adjoint_steps=steps,
            inner_step_size=size,
            adjoint_step_size=size,
        )
        result = engine(Y, engine.init(X0, KEY))
        jacobian = np.eye(3) - matrices.mean(axis=0)
        x = np.linalg.solve(jacobian, Y * b.mean(axis=0))
        np.testing.assert_allclose(result.x, x, rtol=1e-10)
        gradient = np.linalg.solve(jacobian.T, c) * b.mean(axis=0)
        np.testing.assert_allclose(result.gradient, gradient, rtol=1e-10)
        wrong = np.linalg.solve(jacobian, c) * b.mean(axis=0)
        assert np.linalg.norm(wrong - gradient) > 1e-2


def test_without_steps_x_and_v_stay_where_they_are():
    engine = make(inner_steps=0, adjoint_steps=0, samples=1)
    state = engine.init(X0 + 1.0, KEY)
    result = engine(Y, state)
    np.testing.assert_array_equal(result.x, X0 + 1)
    np.testing.assert_array_equal(result.state.adjoint, np.zeros(3))
    for residual in (result.report.inner_residual, result.report.adjoint_residual):
        assert np.isinf(residual)
    assert np.isinf(result.report.standard_error)  # one sample has no scatter
    assert result.report.status == bx.Status.TRUNCATED


def test_a_cold_start_keeps_the_samplers_going():
    engine = make()
    first = engine.init(X0, KEY)
    warm = engine(Y, first).state
    cold = warm.cold()
    np.testing.assert_array_equal(cold.x, X0)
    np.testing.assert_array_equal(cold.adjoint, np.zeros(3))
    assert np.any(warm.x != X0) and np.any(warm.adjoint != 0)
    assert np.any(engine(Y, cold).gradient != engine(Y, first).gradient)
    fresh = warm._replace(x=first.x, adjoint=first.adjoint)
    np.testing.assert_array_equal(engine(Y, cold).gradient, engine(Y, fresh).gradient)


# Failures.


def test_divergence_is_told_and_the_next_call_starts_cold():
    for name, count in (("inner", 60), ("adjoint", 60)):
        engine = make(**{f"{name}_step_size": 30.0, f"{name}_steps": count}, samples=2)
        result = engine(Y, engine.init(X0, KEY))
        assert result.report.status == bx.Status.DIVERGED, name
        assert np.all(np.isfinite(result.gradient))
        np.testing.assert_array_equal(result.state.x, X0)
        np.testing.assert_array_equal(result.state.adjoint, np.zeros(3))
        mild = dataclasses.replace(engine, inner_step_size=0.1, adjoint_step_size=0.1)
        assert mild(Y, result.state).report.status == bx.Status.TRUNCATED


def test_values_that_are_not_finite_are_told():
    overflow = make(inner_step_size=1e6, inner_steps=400)
    result = overflow(Y, overflow.init(X0, KEY))
    assert result.report.status == bx.Status.NONFINITE
    np.testing.assert_array_equal(result.state.x, X0)
    engine = make(lambda x, y, batch: jnp.sqrt(y[0]) + jnp.sum(x))
    result = engine(Y, engine.init(X0, KEY))  # the root of a negative number
    assert result.report.status == bx.Status.NONFINITE and np.isnan(result.value)
    assert engine(-Y, result.state).report.status == bx.Status.TRUNCATED


# Kinds of x and y.


def test_pytrees_numbers_and_integer_and_key_leaves():
    def shifted(x, y, batch):
        noise = jax.random.normal(y["key"], ())
        return jnp.mean((x["a"] - y["w"][y["index"]] * batch) ** 2) / 2 + (x["b"] - noise) ** 2 / 2

    y = {"w": jnp.arange(3.0), "index": jnp.array(2), "key": jax.random.key(0)}
    engine = make(
        lambda x, y: x["a"] ** 2 + x["b"] + jnp.sum(y["w"]),
        bx.stochastic_minimum(shifted),
        bx.EpochSampler(np.array([1.0, 3.0]), 2),
        outer_sampler=None,
        inner_steps=60,
        adjoint_steps=60,
        inner_step_size=0.5,
        adjoint_step_size=0.5,
    )
    state = engine.init({"a": 0.0, "b": 1.0}, KEY)  # x* = 2 w[index], so h = 4 w[index]^2 + ...
    for run in (engine, jax.jit(engine)):
        result = run(y, state)
        np.testing.assert_allclose(result.gradient["w"], [1.0, 1.0, 1 + 8 * 2.0], rtol=1e-12)
        for name in ("index", "key"):
            assert result.gradient[name].dtype == jax.dtypes.float0
            assert result.gradient[name].shape == y[name].shape
        np.testing.assert_allclose(result.x["b"], jax.random.normal(y["key"], ()), rtol=1e-12)
    plain = make(
        lambda x, y: x * y,
        bx.stochastic_minimum(lambda x, y, batch: jnp.mean((x - y * batch) ** 2) / 2),
        engine.sampler,
        outer_sampler=None,
        inner_steps=60,
        adjoint_steps=60,
        inner_step_size=0.5,
        adjoint_step_size=0.5,
    )
    np.testing.assert_allclose(plain(3.0, plain.init(0.0, KEY)).gradient, 12.0, rtol=1e-12)


def test_float32_stays_float32():
    train, validation = (
        jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), data)
        for data in (TRAIN, VALIDATION)
    )
    engine = make(
        sampler=bx.EpochSampler(train, 12),
        outer_sampler=bx.EpochSampler(validation, 8),
        inner_steps=200,
        adjoint_steps=200,
        inner_step_size=bx.decreasing(30.0, 100.0),
    )
    result = engine(jnp.asarray(Y, jnp.float32), engine.init(jnp.zeros(3, jnp.float32), KEY))
    for leaf in jax.tree.leaves((result.value, result.gradient, result.x, result.report)):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    np.testing.assert_allclose(result.gradient, truth(Y)[3], rtol=1e-5)


def test_examples_by_numpy_are_the_functions_of_the_engine():
    """The oracles of these tests and the functions under test are the same problem."""
    x = np.array([0.3, -0.2, 0.9])
    got = jax.grad(objective)(x, Y, jax.tree.map(lambda leaf: leaf[:5], TRAIN))
    np.testing.assert_allclose(got, optimality(x, Y, ALL[:5]), rtol=1e-13)
    got = jax.value_and_grad(example.outer, argnums=(0, 1))(x, Y, VALIDATION)
    for one, two in zip(jax.tree.leaves(got), outer_terms(x, Y, ALL_OUTER), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-13)
