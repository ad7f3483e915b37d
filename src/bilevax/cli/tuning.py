"""Tuning: a grid over one penalty, then steps on hypergradients of all of them."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.projections

import bilevax as bx
from bilevax.checkpoints import Checkpoints
from bilevax.cli.choices import HIGHEST, LOWEST
from bilevax.cli.folds import Folds
from bilevax.cli.model import Rows, zero_weights
from bilevax.cli.preconditioner import curvatures
from bilevax.cli.search import (
    BATCH,
    GRID,
    Evaluator,
    Losses,
    held_out_losses,
    inner_problem,
)

# Inner solves end at such a part of the gradient at zero weights; the last fits are more accurate.
# With more features than rows and small penalties, a part of 1e-5 is still far from the solution.
_RTOL, _FIT_RTOL = 3e-8, 1e-10
_ADJOINT_RTOL = 1e-3
_ATOL = 1e-12  # gradients of standardised data are of the order of one, and rounding below this
# Adam suits penalties, whose slopes differ by orders of magnitude, and needs no line search. Its
# memory is short: a step changes the landscape for the next ones.
_STEP_SIZE, _MOMENTUM = 0.5, 0.8
_HISTORY = 1000  # steps; not as many as asked for, which may be more in a run that goes on


class Grid(NamedTuple):
    """Single penalties and their cross-validated losses, in the order of evaluation.

    Attributes:
      penalties: strong ones first; then those between the neighbours of the best.
      losses: one per penalty.
      best: the penalty with the lowest loss.
      weights: of all folds, near the solution at the best penalty.
    """

    penalties: np.ndarray
    losses: np.ndarray
    best: float
    weights: np.ndarray


class Tuned(NamedTuple):
    """Where tuning ended.

    Attributes:
      penalties: those that were tuned.
      run: of the outer loop.
      losses: two entries: of the best single penalty, and of the tuned ones.
      is_better: whether tuning found a lower loss than the best single penalty has; if not, the
        second entry of the losses is that of the single one too.
    """

    penalties: np.ndarray
    run: bx.MinimizeResult
    losses: Losses
    is_better: bool


def search_grid(evaluator: Evaluator, features: int) -> Grid:
    """Evaluate single penalties: a coarse grid, then a finer one around the best."""

    def evaluate(logs: np.ndarray, start: np.ndarray | None) -> Losses:
        log_penalties = np.repeat(logs[:, None], features, axis=1)
        return evaluator.evaluate(log_penalties, _RTOL, start)

    logs, losses, weights = np.log(GRID), [], []
    for k in range(0, len(logs), BATCH):
        found = evaluate(logs[k : k + BATCH], weights[-1] if weights else None)
        losses.extend(found.mean)
        weights.extend(found.weights)
    best = int(np.nanargmin(losses))
    strong, weak = max(best - 1, 0), min(best + 1, len(logs) - 1)
    fine = np.linspace(logs[strong], logs[weak], BATCH)
    found = evaluate(fine, weights[strong])
    losses, logs = np.concatenate([losses, found.mean]), np.concatenate([logs, fine])
    nearest = found.weights[np.nanargmin(found.mean)]
    return Grid(np.exp(logs), losses, float(np.exp(logs[np.nanargmin(losses)])), nearest)


def make_engine(
    rows: Rows,
    folds: Folds,
    curvatures: np.ndarray,
    index: np.ndarray,
    rule: str,
    rtol: float = _RTOL,
    adjoint_rtol: float = _ADJOINT_RTOL,
) -> bx.Engine:
    """Return the function from log-penalties to the cross-validated loss and its gradient.

    Args:
      rows: the data.
      folds: which rows train and which are held out.
      curvatures: of the classes, for the preconditioner.
      index: (features,), which log-penalty is that of a feature.
      rule: one of `choices.RULES`.
      rtol: where inner solves end.
      adjoint_rtol: where adjoint solves end.
    """

    def loss(weights: jax.Array, _: Any) -> jax.Array:
        return jnp.mean(held_out_losses(weights, rows, folds))

    steps = {"newton": bx.NewtonStep(), "jacobi": bx.JacobiStep()}
    formula: bx.Rule = bx.Implicit(bx.CG(rtol=adjoint_rtol))
    if rule in steps:
        formula = bx.Preconditioned(formula, step=steps[rule])
    problem = inner_problem(rows, folds, curvatures, index)
    return bx.value_and_hypergradient(loss, problem, bx.Newton(rtol=rtol, atol=_ATOL), formula)


def tune(
    rows: Rows,
    folds: Folds,
    index: np.ndarray,
    grid: Grid,
    rule: str,
    accuracy: float,
    steps: int,
    checkpoints: Path,
) -> bx.MinimizeResult:
    """Minimise the cross-validated loss over the penalties, from a single one on."""
    count = len(folds.train)
    weights = grid.weights[:count]  # the last are those of all rows
    engine = make_engine(rows, folds, curvatures(rows, folds, weights), index, rule)
    optimizer = optax.adam(_STEP_SIZE, b1=_MOMENTUM)
    step = bx.make_step(engine, optimizer, projection=_into_box)
    return bx.minimize(
        step,
        np.full(index.max() + 1, np.log(grid.best)),
        zero_weights(count, rows),
        steps,
        rtol=accuracy,
        history=_HISTORY,
        checkpoint=Checkpoints(checkpoints),
    )


def finish(evaluator: Evaluator, index: np.ndarray, grid: Grid, run: bx.MinimizeResult) -> Tuned:
    """Fit the best single penalty and the tuned ones accurately, and take the better."""
    logs = np.stack([np.full(len(index), np.log(grid.best)), np.asarray(run.y)[index]])
    losses = evaluator.evaluate(logs, _FIT_RTOL, grid.weights)
    is_better = bool(losses.mean[1] <= losses.mean[0])
    tuned = np.exp(np.asarray(run.y))
    if not is_better:
        losses = jax.tree.map(lambda leaf: leaf[[0, 0]], losses)
        tuned = np.full_like(tuned, grid.best)
    return Tuned(tuned, run, losses, is_better)


def _into_box(log_penalties: jax.Array) -> jax.Array:
    lowest, highest = np.log(LOWEST), np.log(HIGHEST)
    return optax.projections.projection_box(log_penalties, lowest, highest)
