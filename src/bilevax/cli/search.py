"""The bilevel problem of all folds, and the loss of given penalties."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bilevax as bx
from bilevax.cli.folds import Folds
from bilevax.cli.model import Rows, Weights, penalised_loss, row_losses, zero_weights

# Up to so many inner unknowns a direct solve is the faster one, and it compiles faster.
_DENSE = 150
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


def linear_solver(rows: Rows) -> bx.LinearSolver | None:
    """Return the linear solver for an inner problem; None for the default, conjugate gradients."""
    unknowns = (rows.features.shape[1] + 1) * rows.target.shape[1]
    return bx.Dense() if unknowns <= _DENSE else None


def inner_problem(rows: Rows, folds: Folds, index: np.ndarray) -> bx.Problem:
    """Return the inner problem: fit each fold, for given log-penalties.

    Args:
      rows: the data.
      folds: which rows train.
      index: (features,), the entry of the log-penalties that is that of a feature.
    """

    def train_loss(weights: Weights, log_penalties: jax.Array, task: Any) -> jax.Array:
        share, variance = task
        return penalised_loss(weights, log_penalties[index], rows, share, variance)

    return bx.separable(bx.minimum(train_loss), tasks=(folds.train, folds.variance))


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
        if self._program is None:
            self._program = jax.jit(self._scan).lower(start, padded, rtol).compile()
            self.compile_seconds = time.perf_counter() - began
        folds, status, weights = jax.device_get(self._program(start, padded, rtol))
        self.seconds += time.perf_counter() - began
        kept = Weights(*(leaf[:count] for leaf in weights))
        return Losses(folds[:count, :-1], status[:count], kept)

    def _scan(self, start: Weights, log_penalties: jax.Array, rtol: jax.Array) -> Any:
        features = self._rows.features.shape[1]
        problem = inner_problem(self._rows, self._all, np.arange(features))
        # At zero weights the penalties do not count. Relative to the gradient at a warm start,
        # which is small, solves would be far more accurate than they need to be.
        zero = zero_weights(len(self._all.train), self._rows)
        gradient = problem.optimality(zero, log_penalties[0])
        squares = [jnp.sum(leaf**2, axis=range(1, leaf.ndim)) for leaf in gradient]
        atol = rtol * jnp.sqrt(jnp.min(sum(squares)))
        solver = bx.Newton(linear_solver(self._rows), rtol=0.0, atol=atol)
        solve = bx.solution_map(problem, solver)

        def step(weights: Weights, log_penalties: jax.Array) -> Any:
            weights, report = solve.with_report(weights, log_penalties)
            losses = held_out_losses(weights, self._rows, self._all)
            return weights, (losses, report.status.max(), weights)

        return jax.lax.scan(step, start, log_penalties)[1]
