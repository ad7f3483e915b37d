"""The bilevel problem of all folds, and the loss of given penalties."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bilevax as bx
from bilevax.cli.coordinates import curvatures, to_point, to_weights, zero_points
from bilevax.cli.folds import Folds
from bilevax.cli.model import Rows, Weights, penalised_loss, row_losses, zero_weights

GRID = np.logspace(2, -5, 20)  # single penalties, from strong to weak
BATCH = 10  # penalties in one call of the compiled program


class Losses(NamedTuple):
    """What became of some penalties, one entry each.

    Attributes:
      folds: (penalties, folds), the mean loss of the held-out rows.
      status: the worst `Status` of the solves.
      weights: those of each fold, and of all training rows in the last place.
    """

    folds: np.ndarray
    status: np.ndarray
    weights: Weights

    @property
    def mean(self) -> np.ndarray:
        """The cross-validated losses, (penalties,)."""
        return self.folds.mean(axis=1)


def inner_problem(
    rows: Rows, folds: Folds, curvatures: np.ndarray | jax.Array, index: np.ndarray
) -> bx.Problem:
    """Return the inner problem: fit each fold, for given log-penalties.

    Args:
      rows: all rows.
      folds: which rows train.
      curvatures: of each fold, for the coordinates of the inner variable.
      index: (features,), the entry of the log-penalties that is that of a feature.
    """

    def train_loss(point: jax.Array, log_penalties: jax.Array, task: Any) -> jax.Array:
        share, variance, curvature = task
        penalties = jnp.exp(log_penalties[index]) * variance
        weights = to_weights(point, curvature, penalties)
        return penalised_loss(weights, penalties, rows, share)

    tasks = (folds.train, folds.variance, curvatures)
    return bx.separable(bx.minimum(train_loss), tasks=tasks)


def all_weights(
    points: jax.Array, log_penalties: jax.Array, folds: Folds, curvatures: np.ndarray | jax.Array
) -> Weights:
    """Return the weights of all folds; there is one log-penalty for each feature."""
    penalties = jnp.exp(log_penalties) * folds.variance
    return jax.vmap(to_weights)(points, jnp.asarray(curvatures), penalties)


def held_out_losses(weights: Weights, rows: Rows, folds: Folds) -> jax.Array:
    """Return the mean loss of the rows that each fold holds out."""
    losses = jax.vmap(lambda w: row_losses(w, rows))(weights)
    return jnp.sum(losses * folds.held_out, axis=1)


class Evaluator:
    """Losses of given penalties: one compiled program for the grids and for the last fit.

    Attributes:
      seconds: wall time by now, compilation included.
      compile_seconds: that of the compilation.
    """

    def __init__(self, rows: Rows, folds: Folds, everything: Folds) -> None:
        self._rows, self._folds = rows, folds
        self._all = Folds(*(np.concatenate(pair) for pair in zip(folds, everything, strict=True)))
        self._program: Callable[..., Any] | None = None
        self.seconds = self.compile_seconds = 0.0

    def evaluate(
        self, log_penalties: np.ndarray, rtol: float, start: Weights | None = None
    ) -> Losses:
        """Return the losses of some log-penalties.

        Args:
          log_penalties: (penalties, features), at most `BATCH` of them. Each solve starts from the
            solution before, so they should be in an order in which solutions are near each other.
          rtol: a solve ends at this part of the gradient at zero weights.
          start: of the first solve; None for zero weights.
        """
        began = time.perf_counter()
        count = len(log_penalties)
        # The last penalties are repeated: there each solve ends at once.
        padded = np.concatenate([log_penalties, np.repeat(log_penalties[-1:], BATCH - count, 0)])
        if start is None:
            start = zero_weights(len(self._all.train), self._rows)
        arguments = start, curvatures(self._rows, self._all, start), padded, rtol
        if self._program is None:
            self._program = jax.jit(self._scan).lower(*arguments).compile()
            self.compile_seconds = time.perf_counter() - began
        folds, status, weights = jax.device_get(self._program(*arguments))
        self.seconds += time.perf_counter() - began
        kept = Weights(*(leaf[:count] for leaf in weights))
        return Losses(folds[:count, :-1], status[:count], kept)

    def _scan(
        self, start: Weights, curvatures: jax.Array, log_penalties: jax.Array, rtol: jax.Array
    ) -> Any:
        features = self._rows.features.shape[1]
        problem = inner_problem(self._rows, self._all, curvatures, np.arange(features))
        zero = zero_points(len(self._all.train), self._rows)

        def step(weights: Weights, log_penalties: jax.Array) -> Any:
            # Relative to the gradient at a warm start, which is small, solves would be far more
            # accurate than they need to be.
            squares = jnp.sum(problem.optimality(zero, log_penalties) ** 2, axis=(1, 2))
            solver = bx.Newton(rtol=0.0, atol=rtol * jnp.sqrt(jnp.min(squares)))
            penalties = jnp.exp(log_penalties) * self._all.variance
            points = jax.vmap(to_point)(weights, curvatures, penalties)
            points, report = bx.solution_map(problem, solver).with_report(points, log_penalties)
            weights = all_weights(points, log_penalties, self._all, curvatures)
            losses = held_out_losses(weights, self._rows, self._all)
            return weights, (losses, report.status.max(), weights)

        return jax.lax.scan(step, start, log_penalties)[1]
