"""A training run that saves its state every few steps: `kills.py` starts it, and ends it by force.

It prints the number of the step after each chunk and, if it comes to its end, its outcome.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevax as bx
from bilevax.checkpoints import Checkpoints

CHUNK = 5  # steps between two checkpoints
SECONDS = 0.01  # that a chunk lasts longer than it must, for a signal to fall into it
ROWS, FEATURES = 40, 8


def make_step() -> bx.OuterStep:
    """Return steps on the penalties of a ridge regression, with a random part of the data each."""
    keys = jax.random.split(jax.random.key(0), 3)
    data, validation = jax.random.normal(keys[0], (2, ROWS, FEATURES))
    weights = jnp.where(jnp.arange(FEATURES) < 3, 1.0, 0.0)
    target, validation_target = jnp.stack([data, validation]) @ weights + 0.5 * jax.random.normal(
        keys[1], (2, ROWS)
    )

    def inner(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((data @ x - target) ** 2) + jnp.sum(jnp.exp(y) * x**2)

    def engine(key: jax.Array) -> bx.Engine:
        part = jax.random.bernoulli(key, 0.5, (ROWS,))

        def outer(x: jax.Array, y: jax.Array) -> jax.Array:
            return jnp.mean(part * (validation @ x - validation_target) ** 2)

        return bx.value_and_hypergradient(outer, bx.minimum(inner), bx.GradientDescent(0.1))

    def projection(y: jax.Array) -> jax.Array:
        return jnp.clip(y, -5.0, 1.0)  # beyond it the inner solver would need a smaller rate

    return bx.make_step(engine, optax.adam(0.01), schedule=bx.Harmonic(0.1), projection=projection)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="of the checkpoints")
    parser.add_argument("result", type=Path, help="file for the last state")
    parser.add_argument("steps", type=int)
    options = parser.parse_args()

    def tell(state: bx.BilevelState) -> None:
        print(int(state.step), flush=True)
        time.sleep(SECONDS)

    result = bx.minimize(
        make_step(),
        jnp.zeros(FEATURES),
        jnp.zeros(FEATURES),
        options.steps,
        rtol=0.0,
        key=jax.random.key(1),
        history=100,
        chunk=CHUNK,
        callback=tell,
        checkpoint=Checkpoints(options.directory, every_steps=CHUNK, every_seconds=None),
        progress=False,
    )
    state = result.state._replace(key=jax.random.key_data(result.state.key))
    np.savez(options.result, *map(np.asarray, jax.tree.leaves(state)))
    print(result.outcome.name)


if __name__ == "__main__":
    main()
