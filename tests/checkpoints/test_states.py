"""States come back as they were, and the right ones are kept."""

import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevax.checkpoints import _orbax as checkpoints
from tests.checkpoints.example import Y, bits, opened, restored_step, saved, state_of, steps_on_disk

# What is saved comes back.


def odd_floats(dtype):
    """Return NaN with bits of its own, both infinities, both zeros, and a denormal number."""
    bits_of_nan = {4: np.uint32(0x7FC01234), 8: np.uint64(0x7FF8000000001234)}[dtype(0).nbytes]
    tiny = np.finfo(dtype).smallest_subnormal
    return jnp.asarray(np.array([bits_of_nan.view(dtype), np.inf, -np.inf, 0.0, -0.0, tiny], dtype))


STATES = {
    "dtypes": {
        "float64": odd_floats(np.float64),
        "float32": odd_floats(np.float32),
        "bfloat16": jnp.array([[1.1, jnp.nan], [jnp.inf, -0.0]], jnp.bfloat16),
        "float16": jnp.float16(0.1),
        "int32": jnp.arange(-2, 2, dtype=jnp.int32),
        "uint8": jnp.uint8(255),
        "bool": jnp.array([True, False]),
        "weak": jnp.asarray(2.0),
        "scalars": (jnp.float64(jnp.nan), jnp.bfloat16(3.0), jnp.asarray(False)),
    },
    "keys": (
        jax.random.key(3),
        jax.random.split(jax.random.key(4), (2, 3)),
        jax.random.key(5, impl="rbg"),
    ),
    "empty": (jnp.zeros((0, 3)), None, (), {"a": {}}, optax.EmptyState()),
    "nothing": (),
    "one array": jnp.arange(3.0),
    "Adam": optax.chain(optax.clip(1.0), optax.adam(0.1)).init(Y),
    "scheduled": optax.inject_hyperparams(optax.adamw)(optax.constant_schedule(0.1)).init(Y),
    "names": {"a/b": jnp.ones(2), "../c": jnp.zeros(2), "file": jnp.ones(()), "": jnp.zeros(1)},
}


@pytest.mark.parametrize("name", STATES)
def test_a_round_trip_keeps_structure_dtypes_and_bits(tmp_path, name):
    state = STATES[name]
    with opened(tmp_path, state) as run:
        assert run.restore() is None
        run.save(1, state, 0.0)
    with opened(tmp_path, jax.tree.map(jnp.zeros_like, state)) as run:
        assert bits(run.restore()) == bits(state)


def test_what_is_being_written_does_not_change_with_the_memory_of_the_state(tmp_path, monkeypatch):
    add_one = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    may_begin, write = threading.Event(), checkpoints._write

    def late(path, arrays):
        may_begin.wait()
        write(path, arrays)

    monkeypatch.setattr(checkpoints, "_write", late)
    state = state_of(1)
    with opened(tmp_path) as run:
        run.save(1, state, 0.0)
        jax.block_until_ready(add_one(state))  # in place, were it not for the checkpoint
        may_begin.set()
    assert restored_step(tmp_path) == 1


def test_leaves_return_to_their_places(tmp_path):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    state = (
        jnp.ones(2),
        jax.device_put(jnp.ones(2), sharding),
        jax.device_put(jax.random.split(jax.random.key(0)), sharding),
    )
    with opened(tmp_path, state) as run:
        run.save(1, state, 0.0)
    with opened(tmp_path, state) as run:
        restored = run.restore()
    # A leaf that JAX may move must stay one, or whoever takes it would be compiled anew.
    assert [leaf.committed for leaf in restored] == [False, True, True]
    assert [leaf.sharding for leaf in restored] == [leaf.sharding for leaf in state]


def test_the_last_state_of_a_step_counts(tmp_path):
    # A step may be saved in its turn, and again with the outcome of the run.
    with opened(tmp_path) as run:
        run.save(7, state_of(7), 1.0)
        run.save(7, state_of(8), 1.0)
    assert restored_step(tmp_path) == 8


# Which ones are kept.

KEPT = {
    "the last and the best": ([3.0, 1.0, 2.0, 4.0, 5.0], [2, 4, 5]),
    "the best is among the last": ([3.0, 2.0, 1.0, 0.0], [3, 4]),
    "NaN is never the best": ([np.nan, 2.0, np.nan, np.nan, np.nan], [2, 4, 5]),
    "nothing but NaN": ([np.nan] * 4, [3, 4]),
    "infinite values": ([np.inf, -np.inf, 0.0, 1.0], [2, 3, 4]),
    "of equal ones the first": ([1.0, 1.0, 1.0, 1.0, 1.0], [1, 4, 5]),
}


@pytest.mark.parametrize("name", KEPT)
def test_the_last_and_the_best_are_kept(tmp_path, name):
    values, expected = KEPT[name]
    saved(tmp_path, values, keep=2)
    assert steps_on_disk(tmp_path) == expected
    assert restored_step(tmp_path) == len(values)


def test_the_best_of_an_earlier_run_is_kept_and_a_smaller_keep_counts(tmp_path):
    saved(tmp_path, [3.0, 1.0, 2.0, 4.0, 5.0], keep=3)
    assert steps_on_disk(tmp_path) == [2, 3, 4, 5]
    with opened(tmp_path, keep=1) as run:
        run.save(6, state_of(6), 1.5)
    assert steps_on_disk(tmp_path) == [2, 6]


# When it is time.


def test_due_by_steps(tmp_path):
    with opened(tmp_path, every_steps=10, every_seconds=None) as run:
        assert [run.steps_until_due(step) for step in (0, 3, 10, 19)] == [10, 7, 10, 1]
        assert [step for step in range(15) if run.is_due(step)] == [10, 11, 12, 13, 14]
        run.save(13, state_of(13), 0.0)  # late, as long chunks are
        assert [step for step in (13, 19, 20, 35) if run.is_due(step)] == [20, 35]
    with opened(tmp_path, every_steps=10, every_seconds=None) as run:
        run.restore()
        assert [step for step in (13, 19, 20) if run.is_due(step)] == [20]


def test_due_by_seconds_unless_the_last_one_is_still_being_written(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(checkpoints, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    may_end, write = threading.Event(), checkpoints._write

    def slow(path, arrays):
        may_end.wait()
        write(path, arrays)

    monkeypatch.setattr(checkpoints, "_write", slow)
    with opened(tmp_path, every_seconds=5.0) as run:
        assert run.steps_until_due(3) is None
        now[0] += 4.9
        assert not run.is_due(1)
        now[0] += 0.2
        assert run.is_due(1)
        run.save(1, state_of(1), 0.0)  # returns, although nothing is written
        assert not run.is_due(2)
        now[0] += 6.0
        assert not run.is_due(2) and not steps_on_disk(tmp_path)
        may_end.set()
        run._finish()
        assert run.is_due(2)
