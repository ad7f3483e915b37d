"""Batches from an iterator on the host equal those in memory, and its failures are told."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from tests.stochastic.example import TRAIN, VALIDATION, X0, Y, make

KEY = jax.random.key(3)
EXAMPLE = jax.tree.map(lambda leaf: leaf[:2], TRAIN)


def batches_of(sampler, key, count):
    """Draw batches in memory, beforehand: a callback must not call JAX."""
    batches, state = [], sampler.init(key)
    for _ in range(count):
        batch, state = sampler.next(state)
        batches.append(jax.tree.map(np.array, batch))
    return iter(batches)


def numbers(count=1000):
    return (np.full(2, float(number)) for number in range(count))


def total(sampler, count):
    """Add up batches in a compiled loop."""

    def add(_, carry):
        sum_, state = carry
        batch, state = sampler.next(state)
        return sum_ + batch, state

    def run():
        return jax.lax.fori_loop(0, count, add, (jnp.zeros(2), sampler.init(KEY)))

    return jax.jit(run)()[0]


def test_batches_come_in_order_under_jit_scan_and_fori_loop():
    np.testing.assert_array_equal(total(bx.HostSampler(numbers(), np.zeros(2)), 5), [10.0, 10.0])
    sampler = bx.HostSampler(numbers(), np.zeros(2))

    def step(state, _):
        batch, state = sampler.next(state)
        return state, batch

    state, batches = jax.jit(lambda s: jax.lax.scan(step, s, length=4))(sampler.init(KEY))
    np.testing.assert_array_equal(batches[:, 0], [0, 1, 2, 3])
    np.testing.assert_array_equal(sampler.next(state)[0], [4, 4])


def test_the_engine_on_a_host_iterator_equals_the_one_in_memory():
    stored = bx.UniformSampler(TRAIN, 2)
    in_memory = make(sampler=stored)
    start = in_memory.init(X0, KEY)
    inner_key, _ = jax.random.split(KEY)
    iterator = batches_of(stored, inner_key, 3 * (4 + 5 + 3))
    on_host = make(sampler=bx.HostSampler(iterator, EXAMPLE))

    def three_calls(engine, state):
        def call(state, _):
            result = engine(Y, state)
            return result.state, (result.value, result.gradient, result.report)

        return jax.jit(lambda state: jax.lax.scan(call, state, length=3))(state)[1]

    want = three_calls(in_memory, start)
    got = three_calls(on_host, on_host.init(X0, KEY))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_both_samplers_may_be_on_the_host():
    def engine():
        inner = batches_of(bx.UniformSampler(TRAIN, 2), KEY, 12)
        outer = batches_of(bx.UniformSampler(VALIDATION, 4), KEY, 3)
        example = jax.tree.map(lambda leaf: leaf[:4], VALIDATION)
        return make(
            sampler=bx.HostSampler(inner, EXAMPLE), outer_sampler=bx.HostSampler(outer, example)
        )

    first, second = engine(), engine()
    result = first(Y, first.init(X0, KEY))
    again = second(Y, second.init(X0, jax.random.key(9)))  # the key does not matter
    np.testing.assert_array_equal(again.gradient, result.gradient)
    assert np.all(np.isfinite(result.gradient)) and np.any(result.gradient != 0)


def test_dtypes_are_those_of_the_example():
    given = iter([(np.float32(1.5), np.arange(2, dtype=np.int32))])
    shapes = (jax.ShapeDtypeStruct((), jnp.float32), np.zeros(2, np.int32))
    sampler = bx.HostSampler(given, shapes)
    batch, _ = sampler.next(sampler.init(KEY))
    assert batch[0] == 1.5 and batch[0].dtype == jnp.float32 and batch[1].dtype == jnp.int32


def test_double_precision_where_jax_has_single():
    with jax.enable_x64(False):
        sampler = bx.HostSampler(numbers(), np.zeros(2))
        batch, state = sampler.next(sampler.init(KEY))
        batch, _ = sampler.next(state)
        assert batch.dtype == jnp.float32
        np.testing.assert_array_equal(batch, [1, 1])
        single = bx.HostSampler(iter([np.zeros(2, np.float32)]), np.zeros(2))
        assert single.next(single.init(KEY))[0].dtype == jnp.float32


def test_a_loop_over_y_takes_one_batch_after_the_other():
    sampler = bx.HostSampler(numbers(), np.zeros(2))

    def once(y):  # the way around `jax.vmap`: a state of its own for each y
        batch, _ = sampler.next(sampler.init(KEY))
        return y * batch[0]

    got = jax.lax.map(once, jnp.array([1.0, 10.0, 100.0]))
    np.testing.assert_array_equal(got, [0, 10, 200])


# Failures.


def raising():
    yield np.zeros(2)
    raise KeyError("lost file")


FAILURES = {
    "ends": (
        lambda: numbers(3),
        "The iterator of a `HostSampler` ended: it had given 3 batches.",
    ),
    "raises": (
        raising,
        "The iterator of a `HostSampler` raised KeyError: 'lost file'; it had given 1 batches.",
    ),
    "another shape": (
        lambda: iter([np.zeros(2), np.zeros(3)]),
        "must give batches like `example`, float64[2]; got float64[3] after 1 batches.",
    ),
    "another dtype": (
        lambda: iter([np.zeros(2), np.zeros(2), np.zeros(2, np.float32)]),
        "must give batches like `example`, float64[2]; got float32[2] after 2 batches.",
    ),
    "another structure": (
        lambda: iter([[np.zeros(2)]]),
        "must give batches like `example`, float64[2]; got [float64[2]] after 0 batches.",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_of_the_iterator_name_the_cause_and_the_number_of_batches(name):
    make_iterator, message = FAILURES[name]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        total(bx.HostSampler(make_iterator(), np.zeros(2)), 5).block_until_ready()
    # What comes after a failure is not spoilt by it.
    np.testing.assert_array_equal(total(bx.HostSampler(numbers(), np.zeros(2)), 3), [3.0, 3.0])


def test_failures_reach_the_caller_of_an_engine_and_outside_of_jit():
    engine = make(sampler=bx.HostSampler(batches_of(bx.UniformSampler(TRAIN, 2), KEY, 6), EXAMPLE))
    with pytest.raises(RuntimeError, match="ended: it had given 6 batches"):
        engine(Y, engine.init(X0, KEY)).gradient.block_until_ready()
    sampler = bx.HostSampler(iter([]), np.zeros(2))
    with pytest.raises(RuntimeError, match="ended: it had given 0 batches"):
        sampler.next(sampler.init(KEY))[0].block_until_ready()


def test_a_state_cannot_be_used_twice():
    sampler = bx.HostSampler(numbers(), np.zeros(2))
    state = sampler.init(KEY)
    _, later = sampler.next(state)
    message = (
        "This state of a `HostSampler` stands after 0 batches, but its iterator has given 1 and "
        "cannot go back. Use every state once, or make a new one with `init`."
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        sampler.next(state)[0].block_until_ready()
    np.testing.assert_array_equal(sampler.next(later)[0], [1, 1])
    # A new state goes on where the iterator is.
    np.testing.assert_array_equal(sampler.next(sampler.init(KEY))[0], [2, 2])


def test_one_sampler_cannot_serve_for_both_objectives():
    sampler = bx.HostSampler(batches_of(bx.UniformSampler(TRAIN, 2), KEY, 40), EXAMPLE)
    with pytest.raises(ValueError, match="must have iterators of their own, got one for both"):
        make(lambda x, y, batch: jnp.sum(x), sampler=sampler, outer_sampler=sampler)


VMAPPED = {
    "over keys": lambda engine: jax.vmap(lambda key: engine.init(X0, key)),
    "over y": lambda engine: jax.vmap(lambda y: engine(y, engine.init(X0, KEY)).gradient),
    "over y and compiled": lambda engine: jax.vmap(
        jax.jit(lambda y: engine(y, engine.init(X0, KEY)).gradient)
    ),
}


@pytest.mark.parametrize("name", VMAPPED)
@pytest.mark.parametrize("side", ["sampler", "outer_sampler"])
def test_vmap_is_refused(name, side):
    sampler = bx.HostSampler(iter([]), EXAMPLE if side == "sampler" else VALIDATION)
    call = VMAPPED[name](make(**{side: sampler}))
    argument = jax.random.split(KEY, 2) if name == "over keys" else np.stack([Y, Y])
    message = (
        "A `HostSampler` cannot be batched by `jax.vmap`: its iterator gives one batch at a time. "
        "Use `jax.lax.map`, or an `EpochSampler` or `UniformSampler` of data in memory."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        call(argument)


def test_vmap_of_the_sampler_itself_is_refused():
    sampler = bx.HostSampler(numbers(), np.zeros(2))
    states = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), sampler.init(KEY))
    with pytest.raises(ValueError, match=r"cannot be batched by `jax.vmap`"):
        jax.vmap(sampler.next)(states)
