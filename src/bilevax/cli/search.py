"""The bilevel problem of all folds, and the loss of given penalties."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import bilevax as bx
from bilevax.cli.folds import Folds
from bilevax.cli.model import penalised_loss, row_losses, zero_weights
from bilevax.cli.preconditioner import curvatures, precondition
from bilevax.cli.rows import Rows

GRID = np.logspace(2, -5, 20)  # single penalties, from strong to weak
BATCH = 10  # penalties in one call of the compiled program


class Losses(NamedTuple):
    """What became of some penalties, one entry each.

    Attributes:
      folds: (penalties, folds), the mean loss of the held-out rows of the folds that choose.
      rows: (penalties, rows), the loss of each row by the last fit.
      status: the worst `Status` of the solves.
      weights: (penalties, folds + 1, columns, features + 1), those of each fold, and in the last
        place those of the last fit.
    """

    folds: np.ndarray
    rows: np.ndarray
    status: np.ndarray
    weights: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """The cross-validated losses, (penalties,)."""
        return self.folds.mean(axis=1)


def inner_problem(
    rows: Rows, folds: Folds, curvatures: np.ndarray | jax.Array, index: np.ndarray | jax.Array
) -> bx.Problem:
    """Return the inner problem: fit each fold, for given log-penalties.

    All arguments are leaves of it: it is compiled once for all data of the same shapes.

    Args:
      rows: all rows.
      folds: which rows train.
      curvatures: of the classes, for the preconditioner.
      index: (features,), the entry of the log-penalties that is that of a feature.
    """
    variance = folds.variance.mean(axis=0)
    preconditioner = Partial(_near_inverse, rows, curvatures, variance, index)
    problem = bx.minimum(Partial(_train_loss, rows, index), preconditioner=preconditioner)
    return bx.separable(problem, tasks=(folds.train, folds.variance))


def held_out_losses(weights: jax.Array, rows: Rows, folds: Folds) -> jax.Array:
    """Return the mean loss of the rows that each fold holds out."""
    losses = jax.vmap(lambda w: row_losses(w, rows))(weights)
    return jnp.sum(losses * folds.held_out, axis=1)


class Evaluator:
    """Losses of given penalties: one compiled program for all searches, their grids and last fits.

    Attributes:
      seconds: wall time by now, compilation included.
      compile_seconds: that of the compilation.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._program: Callable[..., Any] | None = None
        self.seconds = self.compile_seconds = 0.0

    def evaluate(
        self, folds: Folds, log_penalties: np.ndarray, rtol: float, start: np.ndarray | None = None
    ) -> Losses:
        """Return the losses of some log-penalties.

        Args:
          folds: the tasks of a search.
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
            start = zero_weights(len(folds.train), self._rows)
        curvature = curvatures(self._rows, folds, start)
        arguments = self._rows, folds, curvature, start, padded, rtol
        if self._program is None:
            self._program = jax.jit(_scan).lower(*arguments).compile()
            self.compile_seconds = time.perf_counter() - began
        found = jax.device_get(self._program(*arguments))
        self.seconds += time.perf_counter() - began
        return Losses(*(part[:count] for part in found))


def _scan(
    rows: Rows,
    folds: Folds,
    curvatures: jax.Array,
    start: jax.Array,
    log_penalties: jax.Array,
    rtol: jax.Array,
) -> tuple[jax.Array, ...]:
    """Return the entries of `Losses`."""
    problem = inner_problem(rows, folds, curvatures, np.arange(log_penalties.shape[1]))
    # Relative to the gradient at a warm start, which is small, solves would be far more accurate
    # than they need to be. At zero weights penalties do not matter.
    zero = zero_weights(len(folds.train), rows)
    squares = jnp.sum(problem.optimality(zero, log_penalties[0]) ** 2, axis=(1, 2))
    solver = bx.Newton(rtol=0.0, atol=rtol * jnp.sqrt(jnp.min(squares)))

    def step(weights: jax.Array, log_penalties: jax.Array) -> tuple[jax.Array, tuple]:
        weights, report = bx.solution_map(problem, solver).with_report(weights, log_penalties)
        losses = held_out_losses(weights, rows, folds)[:-1]
        last = row_losses(weights[-1], rows)
        return weights, (losses, last, report.status.max(), weights)

    return jax.lax.scan(step, start, log_penalties)[1]


def _train_loss(
    rows: Rows, index: jax.Array, weights: jax.Array, log_penalties: jax.Array, task: Any
) -> jax.Array:
    share, variance = task
    return penalised_loss(weights, jnp.exp(log_penalties[index]) * variance, rows, share)


def _near_inverse(
    rows: Rows,
    curvatures: jax.Array,
    variance: jax.Array,
    index: jax.Array,
    _: Any,
    log_penalties: jax.Array,
    vector: jax.Array,
    task: Any,
) -> jax.Array:
    return precondition(vector, curvatures, jnp.exp(log_penalties[index]) * variance, rows)
