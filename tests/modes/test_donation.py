"""States share no memory: with one another, or with what the user gave. So they can be donated."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx

X0, Y, DATA = jnp.arange(4.0), jnp.array([0.5, 1.0, 1.5, 2.0]), jnp.arange(6.0)
KEY = jax.random.key(3)
ENGINE = bx.value_and_hypergradient(
    lambda x, y: jnp.sum((x - 3) ** 2),
    bx.minimum(lambda x, y: jnp.sum((x - y) ** 2) / 2),
    bx.GradientDescent(0.5, rtol=1e-3),
)
STOCHASTIC = bx.stochastic_hypergradient(
    lambda x, y, batch: jnp.mean((x - batch) ** 2),
    bx.stochastic_minimum(lambda x, y, batch: jnp.mean((x - batch) ** 2) + jnp.sum(y * x**2)),
    sampler=bx.EpochSampler(DATA, 2),
    outer_sampler=bx.UniformSampler(DATA, 2),
    inner_steps=2,
    adjoint_steps=2,
    inner_step_size=0.1,
    adjoint_step_size=0.1,
)
STEP = bx.make_step(ENGINE, optax.adam(0.1))
MAKERS = {
    "cold_start": lambda: bx.cold_start(X0),
    "step.init": lambda: STEP.init(Y, X0, key=KEY, history=2),
    "step.init projected": lambda: bx.make_step(
        ENGINE, optax.sgd(0.1, momentum=0.9), projection=lambda y: y
    ).init(Y, X0, history=2),
    "hoag.init": lambda: bx.hoag(ENGINE).init(Y, X0, history=2),
    "adaptive.init": lambda: bx.make_step(ENGINE, optax.adam(0.1), schedule=bx.Adaptive()).init(
        Y, X0, history=2
    ),
    "stochastic.init": lambda: STOCHASTIC.init(X0[0], KEY),
    "stochastic cold": lambda: STOCHASTIC.init(X0[0], KEY).cold(),
    "EpochSampler.init": lambda: bx.EpochSampler(DATA, 2).init(KEY),
    "UniformSampler.init": lambda: bx.UniformSampler(DATA, 2).init(KEY),
    "HostSampler.init": lambda: bx.HostSampler(iter([np.zeros(2)]), np.zeros(2)).init(KEY),
}


def addresses(tree):
    leaves = jax.tree.leaves(tree)
    keys = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    data = [jax.random.key_data(u) if k else u for u, k in zip(leaves, keys, strict=True)]
    return [leaf.unsafe_buffer_pointer() for leaf in data]


@pytest.mark.parametrize("maker", MAKERS)
def test_no_two_arrays_of_a_fresh_state_share_memory(maker):
    state = MAKERS[maker]()
    given = addresses((X0, Y, DATA, KEY))
    found = addresses(state)
    assert len({*found, *given}) == len(found) + len(given)


def test_a_shared_buffer_is_seen():
    assert len(set(addresses((X0, X0)))) == 1


@pytest.mark.parametrize("maker", ["cold_start", "step.init", "stochastic.init"])
def test_a_donated_state_gives_what_another_one_does_and_takes_nothing_from_the_user(maker):
    take = {
        "cold_start": lambda state: ENGINE(Y, state).warm,
        "step.init": STEP,
        "stochastic.init": lambda state: STOCHASTIC(1.0, state).state,
    }[maker]
    donating, state, kept = jax.jit(take, donate_argnums=0), MAKERS[maker](), MAKERS[maker]()
    for _ in range(2):
        given, state = state, donating(state)
        # The runtime of the CPU takes donations since JAX 0.9.
        assert any(leaf.is_deleted() for leaf in jax.tree.leaves(given))
        kept = take(kept)
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(kept), strict=True):
        if not jnp.issubdtype(got.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(got, want, rtol=1e-14)
    for array in (X0, Y, DATA, KEY):
        assert not array.is_deleted()
