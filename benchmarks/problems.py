"""The problems that are measured: data, and functions that both sides call."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Data = tuple[jax.Array, jax.Array]
RTOL = 1e-4  # of the inner and of the adjoint solve


def least_squares(w: jax.Array, data: Data) -> jax.Array:
    features, targets = data
    return jnp.mean((features @ w - targets) ** 2) / 2


def logistic(w: jax.Array, data: Data) -> jax.Array:
    features, labels = data  # labels are -1 or 1
    return jnp.mean(jax.nn.softplus(-labels * (features @ w)))


def ridge_objective(w: jax.Array, log_penalty: jax.Array, train: Data) -> jax.Array:
    return least_squares(w, train) + jnp.sum(jnp.exp(log_penalty) * w**2) / 2


def logistic_objective(w: jax.Array, log_penalty: jax.Array, train: Data) -> jax.Array:
    return logistic(w, train) + jnp.sum(jnp.exp(log_penalty) * w**2) / 2


class Layer(NamedTuple):
    """Parameters of z = tanh(W z + U x + b), with a batch of states z and inputs x in rows."""

    recurrent: jax.Array  # W
    input: jax.Array  # U
    bias: jax.Array  # b


def apply_layer(z: jax.Array, layer: Layer, inputs: jax.Array) -> jax.Array:
    return jnp.tanh(z @ layer.recurrent.T + inputs @ layer.input.T + layer.bias)


def readout_loss(z: jax.Array, readout: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.mean((z @ readout - targets) ** 2) / 2


def regression_data(samples: int, features: int, *, binary: bool) -> tuple[Data, Data]:
    """Return training and validation data of a linear model; a fifth of its weights are not 0."""
    keys = jax.random.split(jax.random.key(0), 4)
    useful = jnp.arange(features) < features // 5
    weights = jnp.where(useful, jax.random.normal(keys[0], (features,)), 0)
    weights = weights * jnp.sqrt(10 / jnp.sum(weights**2))

    def draw(key: jax.Array) -> Data:
        key_x, key_t = jax.random.split(key)
        x = jax.random.normal(key_x, (samples, features))
        noisy = x @ weights + jax.random.normal(key_t, (samples,))
        return x, jnp.sign(noisy) if binary else noisy

    return draw(keys[1]), draw(keys[2])


def layer_data(
    size: int, inputs: int, outputs: int, batch: int
) -> tuple[Layer, jax.Array, jax.Array, jax.Array]:
    """Return parameters (W of spectral radius 0.8, about), inputs, readout and targets."""
    keys = jax.random.split(jax.random.key(0), 5)
    layer = Layer(
        0.8 * jax.random.normal(keys[0], (size, size)) / jnp.sqrt(size),
        jax.random.normal(keys[1], (size, inputs)) / jnp.sqrt(inputs),
        jnp.zeros(size),
    )
    readout = jax.random.normal(keys[2], (size, outputs)) / jnp.sqrt(size)
    x = jax.random.normal(keys[3], (batch, inputs))
    targets = jax.random.normal(keys[4], (batch, outputs))
    return layer, x, readout, targets


def distance(a: Any, b: Any) -> float:
    """Return ||a - b|| / ||b|| over all leaves."""
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    difference = sum(float(jnp.sum((u - v) ** 2)) for u, v in leaves)
    return (difference / sum(float(jnp.sum(v**2)) for v in jax.tree.leaves(b))) ** 0.5
