"""The problems of `training.py`: functions, data, starts, and h without any of the libraries.

Both have one log-penalty per weight, and the outer objective is the loss on validation data with a
weak prior of the log-penalties. Without one there is no minimum, for what a useless weight costs
falls with its penalty for ever, and there are many ways to go there.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
from jax.scipy.sparse.linalg import cg
from sklearn.datasets import load_digits

START = -5.0  # all log-penalties
ACCURATE = 1e-10  # what the truth leaves of ||F(x0, y)||
POLISHING = 100  # steps of the accurate run


class Training(NamedTuple):
    """A bilevel problem, and how everybody minimises it.

    Attributes:
      name: of the problem.
      about: its sizes.
      objective: f(x, y).
      outer: g(x, y).
      x0: where inner solves start.
      y0: where the run starts.
      step: the length of gradient steps on h.
      is_quadratic: whether f is quadratic in x.
    """

    name: str
    about: str
    objective: Callable[[jax.Array, jax.Array], jax.Array]
    outer: Callable[[jax.Array, jax.Array], jax.Array]
    x0: jax.Array
    y0: jax.Array
    step: float
    is_quadratic: bool


def ridge() -> Training:
    """Return ridge regression on correlated features: the spectrum of their covariance falls."""
    rows, dim = 500, 200
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    root = basis * np.arange(1, dim + 1) ** -0.75 @ basis.T  # eigenvalues k^-1.5 of root^2
    features = rng.standard_normal((2 * rows, dim)) @ root
    features /= features[:rows].std(axis=0)
    useful = np.arange(dim) % 5 == 0
    signal = features @ np.where(useful, rng.standard_normal(dim), 0)
    targets = signal / signal.std() + rng.standard_normal(2 * rows)
    train, validation = _halves(features, targets, rows)
    return Training(
        "ridge",
        f"ridge regression, {dim} penalties, {rows} + {rows} rows",
        functools.partial(problems.ridge_objective, train=train),
        _with_prior(functools.partial(problems.least_squares, data=validation), -3.0, 0.01),
        jnp.zeros(dim),
        jnp.full(dim, START),
        300.0,
        True,
    )


def digits() -> Training:
    """Return multinomial logistic regression on the 8 x 8 digits of scikit-learn."""
    data: Any = load_digits()
    rows, classes = 400, 10
    order = np.random.default_rng(0).permutation(len(data.target))[: 2 * rows]
    train, validation = _halves(data.data[order] / 16, data.target[order], rows)
    dim = train[0].shape[1] * classes
    return Training(
        "digits",
        f"multinomial logistic regression, {dim} penalties, {rows} + {rows} rows",
        functools.partial(_penalised, train=train),
        _with_prior(functools.partial(_cross_entropy, data=validation), -4.0, 0.1),
        jnp.zeros(dim),
        jnp.full(dim, START),
        600.0,
        False,
    )


def _halves(features: np.ndarray, targets: np.ndarray, rows: int) -> tuple[Any, Any]:
    data = jnp.asarray(features), jnp.asarray(targets)
    return tuple(part[:rows] for part in data), tuple(part[rows:] for part in data)


def _with_prior(
    loss: Callable[[jax.Array], jax.Array], mean: float, weight: float
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    return lambda x, y: loss(x) + weight * jnp.mean((y - mean) ** 2) / 2


def _cross_entropy(w: jax.Array, data: Any) -> jax.Array:
    features, labels = data
    logits = features @ w.reshape(features.shape[1], -1)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def _penalised(w: jax.Array, log_penalty: jax.Array, train: Any) -> jax.Array:
    return _cross_entropy(w, train) + jnp.sum(jnp.exp(log_penalty) * w**2) / 2


def make_truth(problem: Training) -> Any:
    """Return jitted functions: (x near x*(y), y) -> (h(y), x*(y)), and the hypergradient at those.

    Newton's method with conjugate gradients from JAX, down to a residual that must be met.
    """
    gradient = jax.grad(problem.objective)
    target = ACCURATE * jnp.linalg.norm(gradient(problem.x0, problem.y0))

    def solve(x: jax.Array, y: jax.Array, b: jax.Array, tol: float) -> jax.Array:
        product = jax.linearize(lambda x: gradient(x, y), x)[1]
        return cg(product, b, tol=tol, maxiter=2000)[0]

    @jax.jit
    def value(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(carry: Any) -> Any:
            x, slope, count = carry
            x = x - solve(x, y, slope, 1e-4)
            return x, gradient(x, y), count + 1

        def is_far(carry: Any) -> jax.Array:
            return (jnp.linalg.norm(carry[1]) > target) & (carry[2] < 30)

        x, slope, _ = jax.lax.while_loop(is_far, step, (x, gradient(x, y), 0))
        return jnp.where(jnp.linalg.norm(slope) <= target, problem.outer(x, y), jnp.nan), x

    @jax.jit
    def hypergradient(x: jax.Array, y: jax.Array) -> jax.Array:
        direct_x, direct_y = jax.grad(problem.outer, argnums=(0, 1))(x, y)
        v = solve(x, y, direct_x, 1e-8)
        return direct_y - jax.grad(lambda y: jnp.vdot(gradient(x, y), v))(y)

    return value, hypergradient


def lowest(problem: Training, value: Any, hypergradient: Any) -> tuple[float, float]:
    """Return h at the start, and h*: that of a long run with accurate hypergradients.

    Resilient propagation goes by signs only, so it is not led astray by the many scales of y.
    """
    optimizer = optax.rprop(0.3, max_step_size=2.0)
    x, y, state = problem.x0, problem.y0, optimizer.init(problem.y0)
    values = []
    for _ in range(POLISHING):
        h, x = value(x, y)
        values.append(float(h))
        updates, state = optimizer.update(hypergradient(x, y), state)
        y = jnp.asarray(optax.apply_updates(y, updates))
    assert np.all(np.isfinite(values)), "the truth was not found"
    return values[0], min(values)
