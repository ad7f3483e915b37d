"""Stochastic inexact hypergradient descent, on a problem whose optimum is known."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from tests.everyday import slow

# x*(y) = M y / s with the means M and s of the examples, and h(y) = |x*(y) - t|^2 / 2 + |y|^2 / 10.
RNG = np.random.default_rng(4)
DATA = {"m": RNG.normal(size=(20, 3, 2)) + np.array([[1.0, 0], [0, 1], [1, 1]]),
        "s": RNG.uniform(0.5, 1.5, size=(20, 3))}  # fmt: skip
TARGETS = np.array([1.0, -1.0, 0.5]) + 0.3 * RNG.normal(size=(10, 3))
KEY = jax.random.key(6)
Y = np.zeros(2)
SGD = optax.sgd(0.2)


def objective(x, y, batch):
    matrix, scale = (jnp.mean(batch[name], axis=0) for name in ("m", "s"))
    return jnp.sum(scale * x**2) / 2 - x @ matrix @ y


def outer(x, y, batch):
    return jnp.mean(jnp.sum((x - batch) ** 2, axis=1)) / 2 + jnp.sum(y**2) / 10


def solution_matrix():
    return DATA["m"].mean(axis=0) / DATA["s"].mean(axis=0)[:, None]


def optimum():
    solve, target = solution_matrix(), TARGETS.mean(axis=0)
    return np.linalg.solve(solve.T @ solve + 0.2 * np.eye(2), solve.T @ target)


def make(**options):
    numbers = {
        "sampler": bx.UniformSampler(DATA, 4),
        "outer_sampler": bx.UniformSampler(TARGETS, 4),
        "inner_steps": 5,
        "adjoint_steps": 5,
        "samples": 4,
        "inner_step_size": bx.decreasing(2.0, 4.0),
        "adjoint_step_size": bx.decreasing(2.0, 4.0),
    }
    return bx.stochastic_hypergradient(
        outer, bx.stochastic_minimum(objective), **(numbers | options)
    )


def by_python_loop(engine, optimizer, y, state, steps, growth=None, projection=lambda y: y):
    optimizer_state, history = optimizer.init(y), []
    for number in range(1, steps + 1):
        if growth is not None:
            count = math.ceil(growth * number)
            engine = dataclasses.replace(
                engine, inner_steps=count, adjoint_steps=count, samples=count
            )
            state = state.cold()
        result = engine(y, state)
        updates, optimizer_state = optimizer.update(result.gradient, optimizer_state, y)
        y, state = projection(optax.apply_updates(y, updates)), result.state
        history.append((result.value, np.linalg.norm(result.gradient)))
    return y, state, history


# The steps.


def positive_part(y):
    return jnp.maximum(y, 0.0)


@pytest.mark.parametrize(
    ("growth", "projection"),
    [(None, None), (1.5, positive_part), slow(1.5, None), slow(None, positive_part)],
)
def test_it_equals_a_python_loop(growth, projection):
    engine, optimizer = make(), optax.adam(0.3)
    state = engine.init(np.zeros(3), KEY)
    options = {} if projection is None else {"projection": projection}
    result = bx.sihd(engine, optimizer, jnp.asarray(Y), state, 5, growth=growth, **options)
    y, last, history = by_python_loop(
        engine, optimizer, jnp.asarray(Y), state, 5, growth, **options
    )
    np.testing.assert_allclose(result.y, y, rtol=1e-11)
    np.testing.assert_allclose(result.state.x, last.x, rtol=1e-11)
    np.testing.assert_allclose(result.state.adjoint, last.adjoint, rtol=1e-11)
    assert result.state.sampler.source == last.sampler.source
    values, norms = zip(*history, strict=True)
    np.testing.assert_allclose(result.history.value, values, rtol=1e-11)
    np.testing.assert_allclose(result.history.gradient_norm, norms, rtol=1e-11)
    np.testing.assert_array_equal(result.history.status, bx.Status.TRUNCATED)
    assert np.all(result.history.standard_error[1:] > 0)
    np.testing.assert_array_equal(np.any(result.y < 0), projection is None)


@pytest.mark.parametrize("growth", [0.1, 0.7, 1.0, 2.2])
def test_counts_are_the_growth_times_the_step_rounded_up(growth):
    engine = make()
    result = bx.sihd(engine, SGD, Y, engine.init(np.zeros(3), KEY), 40, growth=growth)
    tenths = round(10 * growth)  # in whole numbers, where nothing is rounded
    want = [-(-tenths * number // 10) for number in range(1, 41)]
    for counts in (
        result.history.inner_steps,
        result.history.adjoint_steps,
        result.history.samples,
    ):
        np.testing.assert_array_equal(counts, want)
        assert counts.dtype == jnp.int32


def test_without_growth_the_counts_are_those_of_the_engine():
    engine = make(inner_steps=3, adjoint_steps=2, samples=6)
    history = bx.sihd(engine, SGD, Y, engine.init(np.zeros(3), KEY), 4).history
    np.testing.assert_array_equal(history.inner_steps, [3, 3, 3, 3])
    np.testing.assert_array_equal(history.adjoint_steps, [2, 2, 2, 2])
    np.testing.assert_array_equal(history.samples, [6, 6, 6, 6])


# Where it leads.


def test_growing_counts_reach_the_optimum():
    engine, keys = make(), jax.random.split(KEY, 4)

    def distances(growth):
        def run(key):
            return bx.sihd(engine, SGD, Y, engine.init(np.zeros(3), key), 80, growth=growth).y

        return np.linalg.norm(jax.vmap(run)(keys) - optimum(), axis=1)

    assert np.linalg.norm(optimum()) > 0.5  # how far it is from the start
    growing = distances(2.0)
    assert np.max(growing) < 0.05
    # With few samples and the same outer steps, it ends further away.
    assert np.mean(distances(None)) > 2 * np.mean(growing)


def test_warm_starts_reach_the_optimum_with_full_batches():
    # One step each on x and v: only from warm starts do they keep up with y.
    engine = make(
        sampler=bx.EpochSampler(DATA, 20),
        outer_sampler=bx.EpochSampler(TARGETS, 10),
        inner_steps=1,
        adjoint_steps=1,
        samples=1,
        inner_step_size=0.5,
        adjoint_step_size=0.5,
    )
    state = engine.init(np.zeros(3), KEY)
    result = bx.sihd(engine, SGD, Y, state, 400)
    np.testing.assert_allclose(result.y, optimum(), rtol=1e-8)
    np.testing.assert_allclose(result.state.x, solution_matrix() @ optimum(), rtol=1e-8)
    cold = bx.sihd(engine, SGD, Y, state, 400, growth=1 / 400)  # one step each, from x0
    assert np.linalg.norm(cold.y - optimum()) > 0.1


def test_a_projection_is_obeyed_at_the_optimum():
    engine = make(
        sampler=bx.EpochSampler(DATA, 20),
        outer_sampler=bx.EpochSampler(TARGETS, 10),
        inner_step_size=0.5,
        adjoint_step_size=0.5,
    )
    upper = optimum() - np.array([0.2, -1.0])  # the first entry is held back
    result = bx.sihd(
        engine,
        SGD,
        Y,
        engine.init(np.zeros(3), KEY),
        400,
        projection=lambda y: jnp.minimum(y, upper),
    )
    solve, target = solution_matrix(), TARGETS.mean(axis=0)
    matrix, right = solve.T @ solve + 0.2 * np.eye(2), solve.T @ target
    second = (right[1] - matrix[1, 0] * upper[0]) / matrix[1, 1]
    np.testing.assert_allclose(result.y, [upper[0], second], rtol=1e-7)


# Failures.


def test_a_failed_step_leaves_y_as_it_is():
    def fails_beyond(x, y, batch):  # the value is NaN where y has gone too far
        return outer(x, y, batch) + 0 * jnp.sqrt(0.3 - y[0])

    engine = bx.stochastic_hypergradient(
        fails_beyond, bx.stochastic_minimum(objective), sampler=bx.EpochSampler(DATA, 20),
        outer_sampler=bx.EpochSampler(TARGETS, 10), inner_steps=20, adjoint_steps=20,
        inner_step_size=0.5, adjoint_step_size=0.5,
    )  # fmt: skip
    result = bx.sihd(engine, optax.sgd(0.5), Y, engine.init(np.zeros(3), KEY), 6)
    failed = np.asarray(result.history.status) == bx.Status.NONFINITE
    first = int(np.argmax(failed))
    assert 0 < first < 6 and np.all(failed[first:]) and not np.any(failed[:first])
    before = bx.sihd(engine, optax.sgd(0.5), Y, engine.init(np.zeros(3), KEY), first)
    assert np.all(np.isfinite(result.y))
    np.testing.assert_allclose(result.y, before.y, rtol=1e-12)
    np.testing.assert_array_equal(result.state.x, np.zeros(3))  # cold


# Kinds of y and optimisers.


def test_pytrees_float32_and_optimisers_with_keys():
    def as_pair(function):
        return lambda x, y, batch: function(x, jnp.stack([y["a"], y["b"]]), batch)

    data, targets = (
        jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree) for tree in (DATA, TARGETS)
    )
    engine = bx.stochastic_hypergradient(
        as_pair(outer),
        bx.stochastic_minimum(as_pair(objective)),
        sampler=bx.EpochSampler(data, 20),
        outer_sampler=bx.EpochSampler(targets, 10),
        inner_steps=20,
        adjoint_steps=20,
        inner_step_size=0.5,
        adjoint_step_size=0.5,
    )
    y = {"a": jnp.float32(0), "b": jnp.float32(0)}
    optimizer = optax.chain(optax.add_noise(1e-12, 0.0, jax.random.key(0)), SGD)
    result = bx.sihd(engine, optimizer, y, engine.init(jnp.zeros(3, jnp.float32), KEY), 200)
    assert result.y["a"].dtype == result.history.value.dtype == jnp.float32
    np.testing.assert_allclose([result.y["a"], result.y["b"]], optimum(), rtol=1e-4)


def test_numbers_compile_nothing():
    calls = []

    def counted(x, y, batch):
        calls.append(None)
        return objective(x, y, batch)

    problem = bx.stochastic_minimum(counted)

    def run(growth, scale):
        engine = bx.stochastic_hypergradient(
            outer,
            problem,
            sampler=bx.UniformSampler(jax.tree.map(lambda leaf: scale * leaf, DATA), 4),
            outer_sampler=bx.UniformSampler(TARGETS, 4),
            inner_steps=1,
            adjoint_steps=1,
            inner_step_size=0.1 * scale,
            adjoint_step_size=0.1,
        )
        return bx.sihd(engine, SGD, Y, engine.init(np.zeros(3), KEY), 3, growth=growth).y

    first = run(1.0, 1.0)
    count = len(calls)
    assert count > 0
    assert np.all(run(2.0, 1.1) != first) and len(calls) == count


@pytest.mark.slow  # test_host_sampler.py has the engine with batches from the host
def test_batches_from_the_host():
    stored = bx.UniformSampler(DATA, 4)
    engine = make()
    state = engine.init(np.zeros(3), KEY)
    want = bx.sihd(engine, SGD, Y, state, 3)
    batches, sampling = [], stored.init(jax.random.split(KEY)[0])
    for _ in range(3 * (5 + 5 + 4)):
        batch, sampling = stored.next(sampling)
        batches.append(jax.tree.map(np.array, batch))
    engine = make(sampler=bx.HostSampler(iter(batches), batches[0]))
    got = bx.sihd(engine, SGD, Y, engine.init(np.zeros(3), KEY), 3)
    np.testing.assert_allclose(got.y, want.y, rtol=1e-12)
    np.testing.assert_allclose(got.history.value, want.history.value, rtol=1e-12)
