"""The stochastic engine under JAX's transformations, and what is compiled for it."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.tree_util import Partial

import bilevax as bx
from tests.stochastic import example
from tests.stochastic.example import (
    TRAIN,
    VALIDATION,
    X0,
    Y,
    exact_outer,
    make,
    objective,
)

KEY = jax.random.key(11)


# Transformations.


def assert_same(got, want):
    for name in ("value", "gradient", "x", "report"):
        leaves = (jax.tree.leaves(getattr(result, name)) for result in (got, want))
        for one, other in zip(*leaves, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12)


def test_jit_scan_and_python_loops_agree():
    engine = make()
    start = engine.init(X0, KEY)

    def call(state, y):
        result = engine(y, state)
        return result.state, result

    ys = np.stack([Y, Y + 0.1, Y - 0.1])
    end, results = jax.jit(lambda start: jax.lax.scan(call, start, ys))(start)
    state = start
    for index, y in enumerate(ys):
        eager, jitted = engine(y, state), jax.jit(engine)(y, state)
        assert jax.tree.structure(jitted) == jax.tree.structure(eager)
        scanned = jax.tree.map(lambda leaf, index=index: leaf[index], results)
        assert_same(jitted, eager)
        assert_same(scanned, eager)
        state = eager.state
    assert jax.tree.structure(end) == jax.tree.structure(start)
    np.testing.assert_array_equal(end.x, state.x)


def test_vmap_over_keys_and_y_equals_one_by_one():
    engine = make()
    keys, ys = jax.random.split(KEY, 3), np.stack([Y, Y + 0.3, Y - 0.2])

    def run(key, y):
        return engine(y, engine.init(X0, key))

    lanes = jax.vmap(run)(keys, ys)
    for lane in range(3):
        alone = run(keys[lane], ys[lane])
        lane_of = jax.tree.map(lambda leaf, lane=lane: leaf[lane], lanes)
        assert_same(lane_of, alone)
    assert len(np.unique(lanes.value)) == 3


def test_counts_and_step_sizes_may_be_batched():
    engine = make(exact_outer, outer_sampler=None, samples=2)

    def run(steps, size):
        return dataclasses.replace(
            engine, inner_steps=steps, adjoint_steps=2 * steps, inner_step_size=size
        )(Y, engine.init(X0, KEY))

    steps, sizes = np.array([1, 4, 0]), np.array([0.1, 0.2, 0.3])
    lanes = jax.vmap(run)(steps, sizes)
    for lane in range(3):
        alone = run(int(steps[lane]), float(sizes[lane]))
        np.testing.assert_allclose(lanes.x[lane], alone.x, rtol=1e-13)
        np.testing.assert_allclose(lanes.gradient[lane], alone.gradient, rtol=1e-12)


def test_traced_values_that_are_closed_over():
    def run(shift, factor):
        problem = bx.stochastic_minimum(lambda x, y, batch: objective(x - shift, y, batch))
        engine = make(lambda x, y, batch: factor * example.outer(x - shift, y, batch), problem)
        result = engine(Y, engine.init(shift, KEY))
        return result.gradient

    # A shift of x and of its start moves nothing.
    plain = make()
    want = plain(Y, plain.init(X0, KEY)).gradient
    shifts, factors = np.stack([X0, X0 + 1.0]), np.array([1.0, 2.0])
    got = jax.jit(jax.vmap(run))(shifts, factors)
    np.testing.assert_allclose(got[0], want, rtol=1e-12)
    np.testing.assert_allclose(got[1], 2 * want, rtol=1e-10)


# Compilation.


class Counted:
    """A function that counts how often Python runs it, which is how often it is traced."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.function(*arguments)


def test_other_numbers_and_other_data_compile_nothing():
    counted = Counted(objective)
    problem = bx.stochastic_minimum(counted)

    def run(scale, t, k, samples, size, gamma):
        data = jax.tree.map(lambda leaf: scale * leaf, TRAIN)
        engine = make(
            problem=problem,
            sampler=bx.UniformSampler(data, 2),
            inner_steps=t,
            adjoint_steps=k,
            samples=samples,
            inner_step_size=size,
            adjoint_step_size=bx.decreasing(1.0, gamma),
        )
        return engine(Y, engine.init(X0, KEY))

    first = run(1.0, 4, 5, 3, 0.1, 5.0)
    calls = counted.calls
    assert calls > 0
    second = run(1.1, 7, 2, 4, 0.2, 6.0)
    assert counted.calls == calls
    assert np.all(first.gradient != second.gradient)


def test_data_in_functions_are_leaves():
    def scaled(factor, x, y, batch):
        return factor * objective(x, y, batch)

    problem = bx.stochastic_minimum(Partial(scaled, 2.0))
    engine = make(problem=problem, inner_step_size=0.05, adjoint_step_size=0.1)
    plain = make(inner_step_size=0.1)
    # Half the step size on twice the objective; v is halved, and F_2 doubled.
    got = engine(Y, engine.init(X0, KEY))
    want = plain(Y, plain.init(X0, KEY))
    np.testing.assert_allclose(got.x, want.x, rtol=1e-13)
    np.testing.assert_allclose(got.gradient, want.gradient, rtol=1e-12)


def test_states_belong_to_their_data():
    engine = make()
    state = engine.init(X0, KEY)
    assert engine(Y, state).state.sampler.source == state.sampler.source
    changed = jax.tree.map(lambda leaf: leaf + 1, TRAIN)
    other = dataclasses.replace(engine, sampler=bx.UniformSampler(changed, 2))
    for run in (other, jax.jit(other)):
        with pytest.raises(ValueError, match=r"`state\.sampler` must belong to the data"):
            run(Y, state)
    changed = jax.tree.map(lambda leaf: leaf + 1, VALIDATION)
    other = dataclasses.replace(engine, outer_sampler=bx.UniformSampler(changed, 2))
    with pytest.raises(ValueError, match=r"`state\.outer_sampler` must belong to the data"):
        other(Y, state)
    again = make(sampler=bx.UniformSampler(jax.tree.map(np.array, TRAIN), 2))
    np.testing.assert_array_equal(again(Y, state).gradient, engine(Y, state).gradient)
