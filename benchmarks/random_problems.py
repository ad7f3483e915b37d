"""Two hundred random bilevel problems: five families, five sizes, eight problems of each.

Every family is one function of (data, x, y), so that the eight problems of a size are one batch.
The Jacobian F_1 has condition numbers of about 1 to 1e6.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import bilevax as bx

PyTree = Any
SIZES = (5, 12, 30, 80, 200)
COUNT = 8


class Family(NamedTuple):
    """A kind of inner problem.

    Attributes:
      function: objective, residual or map, of (data, x, y).
      pose: makes a problem of it.
      draw: (random generator, size, conditioning) -> data and y; x has as many entries as y.
    """

    function: Callable[[PyTree, jax.Array, jax.Array], jax.Array]
    pose: Callable[[Partial], bx.Problem]
    draw: Callable[[np.random.Generator, int, float], tuple[PyTree, np.ndarray]]

    def problem(self, data: PyTree) -> bx.Problem:
        return self.pose(Partial(self.function, data))


class Batch(NamedTuple):
    """Problems of one family and size; arrays have the problem as their leading axis."""

    family: str
    size: int
    conditioning: np.ndarray
    data: PyTree
    validation: PyTree
    y: jax.Array

    def problem(self, data: PyTree) -> bx.Problem:
        return FAMILIES[self.family].problem(data)


def outer(validation: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
    """g(x, y): half the mean square error on validation rows, and a little of y itself."""
    features, targets, weight = validation
    return jnp.mean((features @ x - targets) ** 2) / 2 + weight * jnp.sum(y**2)


def spectrum(rng: np.random.Generator, size: int, conditioning: float) -> np.ndarray:
    """Return eigenvalues from 1 / conditioning to 1, evenly spaced in their logarithm or nearly."""
    middle = rng.uniform(0, 1, size - 2)
    return conditioning ** -np.concatenate([[0.0, 1.0], middle])


def rotation(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def penalties(rng: np.random.Generator, size: int, conditioning: float) -> np.ndarray:
    """Return log-penalties about the smallest curvature of the data."""
    return np.log(10.0 ** rng.uniform(-1, 1, size) / conditioning)


def features(rng: np.random.Generator, size: int, conditioning: float) -> np.ndarray:
    """Return 2 d + 5 rows whose second moments have the eigenvalues of `spectrum`."""
    rows = 2 * size + 5
    basis = np.linalg.qr(rng.normal(size=(rows, size)))[0] * np.sqrt(rows)
    return basis * np.sqrt(spectrum(rng, size, conditioning)) @ rotation(rng, size).T


def ridge(data: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
    rows, targets = data
    return jnp.mean((rows @ x - targets) ** 2) / 2 + jnp.sum(jnp.exp(y) * x**2) / 2


def draw_ridge(rng: np.random.Generator, size: int, conditioning: float) -> Any:
    rows = features(rng, size, conditioning)
    targets = rows @ rng.normal(size=size) + 0.3 * rng.normal(size=len(rows))
    return (rows, targets), penalties(rng, size, conditioning)


def logistic(data: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
    rows, labels = data
    return jnp.mean(jax.nn.softplus(-labels * (rows @ x))) + jnp.sum(jnp.exp(y) * x**2) / 2


def draw_logistic(rng: np.random.Generator, size: int, conditioning: float) -> Any:
    rows = 2 * features(rng, size, conditioning)
    labels = np.sign(rows @ rng.normal(size=size) + rng.normal(size=len(rows)))
    return (rows, labels), penalties(rng, size, conditioning)


def multinomial(data: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
    rows, classes = data
    weights = x.reshape(rows.shape[1], -1)
    scores = jax.nn.log_softmax(rows @ weights)
    fit = -jnp.mean(jnp.take_along_axis(scores, classes[:, None], axis=1))
    return fit + jnp.sum(jnp.exp(y) * x**2) / 2


def draw_multinomial(rng: np.random.Generator, size: int, conditioning: float) -> Any:
    count = 5 if size % 5 == 0 else 3
    width = size // count
    rows = 2 * features(rng, max(width, 2), conditioning)[:, :width]
    scores = rows @ rng.normal(size=(width, count)) + rng.gumbel(size=(len(rows), count))
    return (rows, np.argmax(scores, axis=1)), penalties(rng, size, conditioning)


def nonlinear(data: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
    matrix, shift = data
    return matrix @ x + jnp.exp(y) * jnp.tanh(x) - shift


def draw_nonlinear(rng: np.random.Generator, size: int, conditioning: float) -> Any:
    # A non-symmetric matrix whose symmetric part is positive definite.
    root = rotation(rng, size) * np.sqrt(spectrum(rng, size, conditioning))
    skew = rng.normal(size=(size, size))
    skew = skew - skew.T
    skew = skew / np.linalg.norm(skew, 2)
    matrix = root @ (np.eye(size) + skew) @ root.T
    return (matrix, matrix @ rng.normal(size=size)), penalties(rng, size, conditioning)


def contraction(data: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
    matrix, shift = data
    return jnp.tanh(matrix @ x + y * shift)


def draw_contraction(rng: np.random.Generator, size: int, conditioning: float) -> Any:
    # Symmetric up to a change of basis; its largest singular value is 1 - 1 / conditioning.
    values = 1 - spectrum(rng, size, conditioning)
    skew = rng.normal(size=(size, size))
    basis = rotation(rng, size)
    matrix = basis * values @ basis.T + 0.3 * (skew - skew.T) / np.sqrt(size)
    matrix = matrix * (1 - 1 / conditioning) / max(np.linalg.norm(matrix, 2), 1e-12)
    return (matrix, rng.normal(size=size)), rng.normal(size=size) / np.sqrt(conditioning)


FAMILIES = {
    "ridge": Family(ridge, bx.minimum, draw_ridge),
    "logistic": Family(logistic, bx.minimum, draw_logistic),
    "multinomial": Family(multinomial, bx.minimum, draw_multinomial),
    "root": Family(nonlinear, bx.root, draw_nonlinear),
    "contraction": Family(contraction, bx.fixed_point, draw_contraction),
}


def batches(seed: int = 0) -> Iterator[Batch]:
    """Yield all problems, a batch of eight at a time."""
    for number, name in enumerate(FAMILIES):
        for size in SIZES:
            rng = np.random.default_rng([seed, number, size])
            conditioning = 10.0 ** rng.uniform(0, 6, COUNT)
            draws = [FAMILIES[name].draw(rng, size, value) for value in conditioning]
            rows = rng.normal(size=(COUNT, size + 5, size)) / np.sqrt(size)
            targets = rng.normal(size=(COUNT, size + 5))
            weight = np.full(COUNT, 1e-3)
            data, y = jax.tree.map(lambda *leaves: jnp.array(np.stack(leaves)), *draws)
            yield Batch(name, size, conditioning, data, (rows, targets, weight), y)
