"""Samplers of data in memory: their laws, and that their states are pure."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx

DATA = {"index": np.arange(10), "square": np.arange(10.0)[:, None] ** 2}
KEY = jax.random.key(3)
SAMPLERS = {
    "epoch": bx.EpochSampler(DATA, 3),
    "uniform": bx.UniformSampler(DATA, 3),
    "without replacement": bx.UniformSampler(DATA, 3, replace=False),
}
every_sampler = pytest.mark.parametrize("name", SAMPLERS)


def draw(sampler, state, count):
    """Draw batches in a Python loop."""
    batches = []
    for _ in range(count):
        batch, state = sampler.next(state)
        batches.append(batch)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches), state


def scan(sampler, state, count):
    """Draw batches in a compiled loop."""

    def step(state, _):
        batch, state = sampler.next(state)
        return state, batch

    state, batches = jax.jit(lambda state: jax.lax.scan(step, state, length=count))(state)
    return batches, state


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.dtype == other.dtype
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_array_equal(one, other)


# What is drawn.


def test_an_epoch_has_every_example_once():
    batches, _ = scan(bx.EpochSampler(DATA, 5), bx.EpochSampler(DATA, 5).init(KEY), 60)
    epochs = np.asarray(batches["index"]).reshape(30, 10)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(10), (30, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 30  # a new order every time


def test_what_does_not_fill_a_batch_is_left_out():
    sampler = SAMPLERS["epoch"]  # 3 of 10
    batches, _ = scan(sampler, sampler.init(KEY), 3 * 600)
    epochs = np.asarray(batches["index"]).reshape(600, 9)
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    # Every example is left out in a tenth of all epochs: 60, within 4 standard deviations of 7.3.
    left_out = 45 - epochs.sum(axis=1)
    counts = np.bincount(left_out, minlength=10)
    assert np.max(np.abs(counts - 60)) < 30


def test_every_order_of_an_epoch_is_as_likely_as_any_other():
    sampler = bx.EpochSampler(np.arange(3), 3)
    batches, _ = scan(sampler, sampler.init(KEY), 1200)
    orders = np.asarray(batches) @ np.array([100, 10, 1])
    _, counts = np.unique(orders, return_counts=True)
    assert len(counts) == 6
    assert np.max(np.abs(counts - 200)) < 4 * np.sqrt(200 * 5 / 6)


def test_uniform_draws_are_uniform_and_independent():
    sampler = bx.UniformSampler(np.arange(4), 2)
    batches, _ = scan(sampler, sampler.init(KEY), 3200)
    first, second = np.asarray(batches).T
    for pair in (4 * first + second, 4 * first[:-1] + first[1:]):  # in a batch; batch to batch
        counts = np.bincount(pair, minlength=16)
        assert np.max(np.abs(counts - 200)) < 4 * np.sqrt(200 * 15 / 16)


@pytest.mark.parametrize("count", [3, 4, 5])  # more than half of all examples, half, fewer
def test_draws_without_replacement_have_no_duplicates_and_are_uniform(count):
    sampler = bx.UniformSampler(np.arange(count), 2, replace=False)
    pairs = count * (count - 1)
    batches, _ = scan(sampler, sampler.init(KEY), 200 * pairs)
    first, second = np.asarray(batches).T
    assert np.all(first != second)
    for one, other in ((first, second), (first[:-1], second[1:])):  # in a batch; batch to batch
        _, counts = np.unique(count * one + other, return_counts=True)
        cells = pairs if one is first else count**2
        mean = len(one) / cells
        assert len(counts) == cells
        assert np.max(np.abs(counts - mean)) < 4 * np.sqrt(mean)


def test_large_batches_without_replacement_have_no_duplicates():
    # By chance alone, 50 of 100 examples would have some in nearly every batch.
    sampler = bx.UniformSampler(np.arange(100), 50, replace=False)
    batches, _ = scan(sampler, sampler.init(KEY), 400)
    assert all(len(set(batch)) == 50 for batch in np.asarray(batches))
    # Every example in half of the batches: 200, within 4 standard deviations of 10.
    counts = np.bincount(np.asarray(batches).reshape(-1))
    assert np.max(np.abs(counts - 200)) < 40


@every_sampler
def test_leaves_of_a_batch_belong_together(name):
    batches, _ = scan(SAMPLERS[name], SAMPLERS[name].init(KEY), 20)
    assert batches["index"].shape == (20, 3) and batches["square"].shape == (20, 3, 1)
    assert batches["index"].dtype == jnp.int64 and batches["square"].dtype == jnp.float64
    np.testing.assert_array_equal(batches["square"][..., 0], batches["index"] ** 2.0)


def test_data_may_be_keys_and_of_any_dtype():
    data = (jax.random.split(KEY, 4), np.array([True, False, True, True]), np.ones(4, np.float32))
    batch, _ = bx.EpochSampler(data, 4).next(bx.EpochSampler(data, 4).init(KEY))
    for got, want in zip(batch, data, strict=True):
        assert got.dtype == want.dtype
    got, want = (np.sort(jax.random.key_data(keys)[:, 0]) for keys in (batch[0], data[0]))
    np.testing.assert_array_equal(got, want)


def test_data_in_double_precision_where_jax_has_single():
    data = np.linspace(0.0, 1.0, 6)
    with jax.enable_x64(False):
        sampler = bx.EpochSampler(data, 6)
        state = sampler.init(KEY)
        for same in (data, jnp.asarray(data)):
            batch, _ = bx.EpochSampler(same, 6).next(state)
            assert batch.dtype == jnp.float32
            np.testing.assert_array_equal(np.sort(batch), data.astype(np.float32))
        with pytest.raises(ValueError, match="other data of the same shapes"):
            bx.EpochSampler(data + 1e-3, 6).next(state)


# Purity.


@every_sampler
def test_compiled_loops_equal_python_loops(name):
    sampler = SAMPLERS[name]
    eager, compiled = (way(sampler, sampler.init(KEY), 8) for way in (draw, scan))
    assert_equal(compiled, eager)


@every_sampler
def test_the_same_state_gives_the_same_batch(name):
    sampler = SAMPLERS[name]
    _, state = draw(sampler, sampler.init(KEY), 2)
    assert_equal(sampler.next(state), sampler.next(state))
    other, _ = draw(sampler, sampler.init(jax.random.key(4)), 8)
    same, _ = draw(sampler, sampler.init(KEY), 8)
    assert np.any(other["index"] != same["index"])


@every_sampler
def test_vmap_over_keys_equals_one_by_one(name):
    sampler = SAMPLERS[name]
    keys = jax.random.split(KEY, 3)
    batches = jax.vmap(lambda key: scan(sampler, sampler.init(key), 5)[0])(keys)
    for lane in range(3):
        alone, _ = draw(sampler, sampler.init(keys[lane]), 5)
        np.testing.assert_array_equal(batches["index"][lane], alone["index"])


def test_samplers_are_pytrees_with_data_that_may_be_traced_and_batched():
    data = np.arange(12.0).reshape(2, 6)

    def mean_of_epoch(data):
        sampler = bx.EpochSampler(data, 6)
        return jnp.mean(sampler.next(sampler.init(KEY))[0])

    np.testing.assert_allclose(jax.jit(jax.vmap(mean_of_epoch))(data), [2.5, 8.5])
    shifted = jax.tree.map(lambda leaf: leaf + 1, bx.UniformSampler(data[0], 2, replace=False))
    assert shifted.replace is False and shifted.batch_size == 2
    np.testing.assert_array_equal(shifted.data, data[0] + 1)
    assert jax.tree.structure(SAMPLERS["uniform"]) != jax.tree.structure(SAMPLERS["epoch"])


def test_keys_of_the_old_kind():
    sampler = SAMPLERS["epoch"]
    old, new = sampler.init(jax.random.PRNGKey(3)), sampler.init(KEY)
    assert_equal(sampler.next(old), sampler.next(new))


def test_batch_sizes_may_be_numpy_integers():
    assert bx.EpochSampler(DATA, np.int64(3)).batch_size == 3


# States of other data.


@every_sampler
def test_states_of_other_data_are_refused(name):
    sampler = SAMPLERS[name]
    state = sampler.init(KEY)

    def with_data(data):
        return dataclasses.replace(sampler, data=data)

    again = jax.tree.map(np.array, DATA)
    assert_equal(with_data(again).next(state)[0], sampler.next(state)[0])
    on_device = jax.tree.map(jnp.asarray, DATA)
    assert_equal(with_data(on_device).next(state)[0], sampler.next(state)[0])

    changed = {"index": np.arange(10), "square": DATA["square"] + 1e-9}
    message = (
        "`state` must belong to the data of the sampler; got one that was made for other data of "
        "the same shapes, {index: int64[10], square: float64[10, 1]}. "
        "Make a new state with `init`."
    )
    shorter = jax.tree.map(lambda leaf: leaf[:9], DATA)
    longer = (
        "`state` must belong to the data of the sampler, {index: int64[9], square: float64[9, 1]}; "
        "got one that was made for {index: int64[10], square: float64[10, 1]}. "
    )
    for wrong, text in ((changed, message), (shorter, longer)):
        with pytest.raises(ValueError, match=re.escape(text)):
            with_data(wrong).next(state)
        with pytest.raises(ValueError, match=re.escape(text)):  # while tracing
            jax.jit(lambda state, wrong=wrong: with_data(wrong).next(state))(state)
    other_dtype = DATA | {"index": np.arange(10, dtype=np.int32)}
    with pytest.raises(ValueError, match=r"must belong to the data of the sampler, \{index: int32"):
        with_data(other_dtype).next(state)


def test_traced_data_are_told_apart_by_shapes_alone():
    sampler = SAMPLERS["epoch"]
    state = sampler.init(KEY)

    @jax.jit
    def first(data, state):
        return dataclasses.replace(sampler, data=data).next(state)[0]

    changed = DATA | {"square": DATA["square"] + 1}
    np.testing.assert_array_equal(first(changed, state)["index"], sampler.next(state)[0]["index"])
    with pytest.raises(ValueError, match="must belong to the data of the sampler, "):
        first(jax.tree.map(lambda leaf: leaf[:9], DATA), state)
    # A state that was made of traced data fits concrete ones.
    made = jax.jit(lambda data: dataclasses.replace(sampler, data=data).init(KEY))(DATA)
    assert_equal(sampler.next(made)[0], sampler.next(state)[0])


def test_states_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="`EpochSampler`; got one of `UniformSampler`"):
        SAMPLERS["epoch"].next(SAMPLERS["uniform"].init(KEY))


@pytest.mark.parametrize("shape", [(5000,), (1000, 8), (64, 10, 10), (3, 1000)])
def test_large_data_are_told_apart_by_any_of_their_columns(shape):
    data = np.zeros(shape)
    row = int(np.prod(shape[1:]))
    state = bx.UniformSampler(data, 2).init(KEY)
    for column in range(0, row, max(1, row // 8)):
        changed = data.copy()
        changed.reshape(shape[0], row)[:, column] = 1.0
        if shape[0] == 3:  # three entries of many
            changed.reshape(shape[0], row)[:, column:] = 1.0
        with pytest.raises(ValueError, match="other data of the same shapes"):
            bx.UniformSampler(changed, 2).next(state)
