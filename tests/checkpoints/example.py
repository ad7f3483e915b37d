"""A small state, and what reads and writes it."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np

from bilevax.checkpoints import Checkpoints
from bilevax.outer import Identity

Y = {"w": jnp.arange(3.0), "b": jnp.float32(2.0)}
IDENTITY = Identity(
    {"the outer objective": [1.5, 1e3], "the norm of F": [2.0, 0.0]},
    {".y['b']": "float32[]", ".y['w']": "float64[3]"},
)
NO_SPACE = OSError(28, "No space left on device")


@contextlib.contextmanager
def opened(directory, like=Y, identity=IDENTITY, **settings):
    run = Checkpoints(directory, **settings).open(identity, like)
    try:
        yield run
    finally:
        run.close()


def state_of(step):
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, step), Y)


def saved(directory, values, **settings):
    """Save states whose numbers are all the step: 1, 2, ..."""
    with opened(directory, **settings) as run:
        for step, value in enumerate(values, 1):
            run.save(step, state_of(step), value)


def steps_on_disk(directory):
    return sorted(int(np.load(file)["step"]) for file in directory.glob("save_*/*/state.npz"))


def restored_step(directory):
    with opened(directory) as run:
        state = run.restore()
    return None if state is None else step_of(state)


def step_of(state):
    (step,) = np.unique(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state)]))
    return int(step)


def bits(tree):
    leaves = [
        (jax.random.key_impl(leaf), jax.random.key_data(leaf))
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else (None, leaf)
        for leaf in jax.tree.leaves(tree)
    ]
    return jax.tree.structure(tree), [
        (key, leaf.shape, leaf.dtype, np.asarray(leaf).tobytes()) for key, leaf in leaves
    ]
