"""The stochastic part of the study of rates: the mean squared error of SID on real digits.

    f(x, y) = mean over i of exp(y_c(i)) log(1 + exp(-t_i x . a_i)) + sum exp(y_k) x_k^2 / 2
    g(x, y) = the mean of log(1 + exp(-t_i x . a_i)) over validation digits

Logistic regression of odd against even digits (scikit-learn's, 8 x 8 pixels). y has one log-weight
for each of the two classes c, so that F_2 differs from batch to batch, and one log-penalty for each
pixel. The truth is computed with NumPy alone, by Newton's method.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import bilevax as bx

CLASSES = 2
BATCH_SIZE = 32
PENALTY = 1.0  # the smallest curvature, mu, is at least that
BETA = 2.0  # in the unit of 1 / mu; above 1 / 2 is needed
GAMMA = 20.0
CONSTANT = 0.02  # the constant step size
MANY = 4000  # adjoint steps, where those are not to be seen


class Rows(NamedTuple):
    features: Any
    labels: Any  # -1 or 1


class Problem(NamedTuple):
    train: Rows
    validation: Rows
    y: tuple[Any, Any]  # log-weights of the classes, log-penalties


class Truth(NamedTuple):
    x: np.ndarray
    gradient: np.ndarray  # flat


def digits() -> Problem:
    bunch: Any = load_digits()
    features = bunch.data[:, bunch.data.std(axis=0) > 0.5]
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    labels = np.where(bunch.target % 2, 1.0, -1.0)
    order = np.random.default_rng(0).permutation(len(labels))
    halves = [Rows(features[part], labels[part]) for part in np.array_split(order, 2)]
    spread = np.random.default_rng(1).uniform(0, 1, size=features.shape[1])
    return Problem(halves[0], halves[1], (np.array([-0.2, 0.2]), np.log(PENALTY) + spread))


def inner(x: jax.Array, y: Any, batch: Rows) -> jax.Array:
    weights, penalties = y
    losses = jnp.logaddexp(0.0, -batch.labels * (batch.features @ x))
    weight = jnp.where(batch.labels > 0, jnp.exp(weights[1]), jnp.exp(weights[0]))
    return jnp.mean(weight * losses) + jnp.sum(jnp.exp(penalties) * x**2) / 2


def outer(x: jax.Array, y: Any, batch: Rows) -> jax.Array:
    return jnp.mean(jnp.logaddexp(0.0, -batch.labels * (batch.features @ x)))


def truth(problem: Problem) -> Truth:
    (features, labels), (weights, penalties) = problem.train, problem.y
    weight = np.exp(weights[(labels > 0).astype(int)])
    ridge = np.exp(penalties)

    def slopes(rows: Rows, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the first and second derivative of each loss in its score."""
        wrong = 1 / (1 + np.exp(rows.labels * (rows.features @ x)))
        return -rows.labels * wrong, wrong * (1 - wrong)

    def hessian_at(x: np.ndarray) -> np.ndarray:
        _, second = slopes(problem.train, x)
        curvature = (features * (weight * second)[:, None]).T @ features / len(labels)
        return curvature + np.diag(ridge)

    x = np.zeros(features.shape[1])
    for _ in range(30):
        first, _ = slopes(problem.train, x)
        gradient = features.T @ (weight * first) / len(labels) + ridge * x
        x = x - np.linalg.solve(hessian_at(x), gradient)
    first, _ = slopes(problem.train, x)
    outer_first, _ = slopes(problem.validation, x)
    outer_x = problem.validation.features.T @ outer_first / len(outer_first)
    v = np.linalg.solve(hessian_at(x), outer_x)
    score = features @ v
    of_classes = [np.sum((weight * first * score)[labels == c]) / len(labels) for c in (-1, 1)]
    return Truth(x, -np.concatenate([of_classes, ridge * x * v]))


def engine(
    problem: Problem, step_sizes: tuple[str, str], sampled_outer: bool
) -> bx.StochasticEngine:
    mu = float(np.exp(problem.y[1]).min())
    sizes = {"decreasing": bx.decreasing(BETA / mu, GAMMA), "constant": CONSTANT}
    train, validation = jax.tree.map(jnp.asarray, (problem.train, problem.validation))
    return bx.stochastic_hypergradient(
        outer if sampled_outer else lambda x, y: outer(x, y, validation),
        bx.stochastic_minimum(inner),
        sampler=bx.UniformSampler(train, BATCH_SIZE),
        outer_sampler=bx.UniformSampler(validation, BATCH_SIZE) if sampled_outer else None,
        inner_steps=0,
        adjoint_steps=0,
        samples=1,
        inner_step_size=sizes[step_sizes[0]],
        adjoint_step_size=sizes[step_sizes[1]],
    )


class Run(NamedTuple):
    """How often each part is done, and how.

    Attributes:
      step_sizes: of x and v, "decreasing" or "constant".
      exact_x: whether x starts from the solution, and not from zero.
      sampled_outer: whether g_1 comes from samples; then the error is that of all entries, else of
        the penalties' only, in which F_2 has no noise.
    """

    t: int
    k: int
    samples: int = 1
    step_sizes: tuple[str, str] = ("decreasing", "decreasing")
    exact_x: bool = False
    sampled_outer: bool = False


class Study(NamedTuple):
    """What one of the numbers of steps does, with the errors of the others made small."""

    counts: list[int]
    first: int  # slopes are fitted from here on, past the start of the step sizes
    step_sizes: list[str]
    run: Callable[[int, str], Run]


STUDIES = {
    "t": Study(
        [30, 60, 120, 240, 500, 1000, 2000],
        120,
        ["decreasing", "constant"],
        lambda n, kind: Run(n, MANY, step_sizes=(kind, "decreasing")),
    ),
    "k": Study(
        [30, 60, 120, 240, 500, 1000, 2000, 4000],
        240,
        ["decreasing", "constant"],
        lambda n, kind: Run(0, n, step_sizes=("decreasing", kind), exact_x=True),
    ),
    # Few samples have an error of the order of 1/J^2 too, by the noise of F_2 times that of v.
    "J": Study(
        [10, 20, 40, 80, 160, 320, 640],
        10,
        ["decreasing"],
        lambda n, kind: Run(0, MANY, n, exact_x=True, sampled_outer=True),
    ),
}


class Estimator:
    """Squared errors of SID; each call runs all keys at once."""

    def __init__(self, problem: Problem, keys: int) -> None:
        self.problem, self.truth = problem, truth(problem)
        self.keys = jax.random.split(jax.random.key(0), keys)
        self.engines: dict[Any, bx.StochasticEngine] = {}
        self._run = jax.jit(self._errors)

    def _errors(
        self, engine: Any, counts: Any, start: Any, keys: Any
    ) -> tuple[jax.Array, jax.Array]:
        engine = dataclasses.replace(engine, **counts)

        def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            state = engine.init(start, key)
            gradient = engine(self.problem.y, state).gradient
            square = (jnp.concatenate(gradient) - self.truth.gradient) ** 2
            return jnp.sum(square[CLASSES:]), jnp.sum(square)

        return jax.vmap(one)(keys)

    def errors(self, run: Run) -> np.ndarray:
        """Return ||estimate - truth||^2 for every key."""
        kind = run.step_sizes, run.sampled_outer
        if kind not in self.engines:
            self.engines[kind] = engine(self.problem, *kind)
        counts = {"inner_steps": run.t, "adjoint_steps": run.k, "samples": run.samples}
        start = self.truth.x * run.exact_x
        penalties, all_of_it = self._run(self.engines[kind], counts, start, self.keys)
        return np.asarray(all_of_it if run.sampled_outer else penalties)
