"""Tuning: a grid over one penalty, then steps on hypergradients of all of them."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.projections
from jax.tree_util import Partial

import bilevax as bx
from bilevax.checkpoints import Checkpoints
from bilevax.cli.choices import HIGHEST, LOWEST
from bilevax.cli.folds import Folds
from bilevax.cli.model import zero_weights
from bilevax.cli.preconditioner import curvatures
from bilevax.cli.rows import Rows
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
_OPTIMIZER = optax.adam(0.5, b1=0.8)
_HISTORY = 1000  # steps; not as many as asked for, which may be more in a run that goes on


class Settings(NamedTuple):
    """How penalties are tuned.

    Attributes:
      rule: one of `choices.RULES`.
      accuracy: steps end where the projected gradient has fallen to this part of its first norm.
      steps: how many there are at most.
    """

    rule: str
    accuracy: float
    steps: int


class Grid(NamedTuple):
    """Single penalties and their cross-validated losses, in the order of evaluation.

    Attributes:
      penalties: strong ones first; then those between the neighbours of the best.
      losses: one per penalty.
      weights: of all tasks, near the solution at the best penalty.
    """

    penalties: np.ndarray
    losses: np.ndarray
    weights: np.ndarray

    @property
    def best(self) -> float:
        """The penalty with the lowest loss."""
        return float(self.penalties[np.nanargmin(self.losses)])

    @property
    def lowest(self) -> float:
        """The lowest loss."""
        return float(np.nanmin(self.losses))


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


def search_grid(evaluator: Evaluator, folds: Folds, features: int) -> Grid:
    """Evaluate single penalties: a coarse grid, then a finer one around the best."""

    def evaluate(logs: np.ndarray, start: np.ndarray | None) -> Losses:
        log_penalties = np.repeat(logs[:, None], features, axis=1)
        return evaluator.evaluate(folds, log_penalties, _RTOL, start)

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
    return Grid(np.exp(logs), losses, found.weights[np.nanargmin(found.mean)])


def make_engine(
    rows: Rows,
    folds: Folds,
    curvatures: np.ndarray,
    index: np.ndarray,
    rule: str,
    pull: float = 0.0,
    centre: float = 0.0,
    rtol: float = _RTOL,
    adjoint_rtol: float = _ADJOINT_RTOL,
) -> bx.Engine:
    """Return the function from log-penalties y to what is minimised and its gradient.

        cross-validated loss + pull / 2 * mean over j of (y_j - centre)^2

    Args:
      rows: the data.
      folds: which rows train and which are held out.
      curvatures: of the classes, for the preconditioner.
      index: (features,), which log-penalty is that of a feature.
      rule: one of `choices.RULES`.
      pull: see above.
      centre: see above.
      rtol: where inner solves end.
      adjoint_rtol: where adjoint solves end.
    """
    steps = {"newton": bx.NewtonStep(), "jacobi": bx.JacobiStep()}
    formula: bx.Rule = bx.Implicit(bx.CG(rtol=adjoint_rtol))
    if rule in steps:
        formula = bx.Preconditioned(formula, step=steps[rule])
    problem = inner_problem(rows, folds, curvatures, index)
    loss = Partial(_pulled_loss, rows, folds, pull, centre)
    return bx.value_and_hypergradient(loss, problem, bx.Newton(rtol=rtol, atol=_ATOL), formula)


def tune(
    rows: Rows,
    folds: Folds,
    index: np.ndarray,
    grid: Grid,
    settings: Settings,
    shrink: float = 0.0,
    checkpoints: Path | None = None,
    after: bx.MinimizeResult | None = None,
) -> bx.MinimizeResult:
    """Minimise the cross-validated loss, with a pull, over the penalties.

    Args:
      rows: the data.
      folds: the tasks of a search, whose last has no part in it.
      index: (features,), which log-penalty is that of a feature.
      grid: of single penalties; the best is where the pull goes to.
      settings: how.
      shrink: the pull, as a part of the loss of the best single penalty.
      checkpoints: where states are saved; None saves nothing and shows no progress.
      after: the same with another pull, from where this one goes on; None starts from the best
        single penalty.
    """
    folds, weights = folds.choosing, grid.weights[:-1]
    centre = np.log(grid.best)
    matrices = curvatures(rows, folds, weights)
    pull = shrink * grid.lowest
    engine = make_engine(rows, folds, matrices, index, settings.rule, pull, centre)
    step = bx.make_step(engine, _OPTIMIZER, projection=_into_box)
    first = None if after is None else float(after.state.first_stationarity)
    return bx.minimize(
        step,
        np.full(index.max() + 1, centre) if after is None else after.y,
        zero_weights(len(folds.train), rows),
        settings.steps,
        rtol=settings.accuracy if first is None else 0.0,
        atol=0.0 if first is None else settings.accuracy * first,
        history=_HISTORY,
        checkpoint=None if checkpoints is None else Checkpoints(checkpoints),
        progress=checkpoints is not None,
    )


def finish(
    evaluator: Evaluator, folds: Folds, index: np.ndarray, grid: Grid, run: bx.MinimizeResult
) -> Tuned:
    """Fit the best single penalty and the tuned ones accurately, and take the better."""
    losses = fit(evaluator, folds, index, grid, [np.asarray(run.y)])
    is_better = bool(losses.mean[1] <= losses.mean[0])
    tuned = np.exp(np.asarray(run.y))
    if not is_better:
        losses = jax.tree.map(lambda leaf: leaf[[0, 0]], losses)
        tuned = np.full_like(tuned, grid.best)
    return Tuned(tuned, run, losses, is_better)


def fit(
    evaluator: Evaluator, folds: Folds, index: np.ndarray, grid: Grid, tuned: list[np.ndarray]
) -> Losses:
    """Fit the best single penalty, and then tuned ones, accurately."""
    logs = np.stack([np.full(len(index), np.log(grid.best)), *(y[index] for y in tuned)])
    return evaluator.evaluate(folds, logs, _FIT_RTOL, grid.weights)


def _pulled_loss(
    rows: Rows, folds: Folds, pull: Any, centre: Any, weights: jax.Array, log_penalties: jax.Array
) -> jax.Array:
    loss = jnp.mean(held_out_losses(weights, rows, folds))
    return loss + pull / 2 * jnp.mean((log_penalties - centre) ** 2)


def _into_box(log_penalties: jax.Array) -> jax.Array:
    lowest, highest = np.log(LOWEST), np.log(HIGHEST)
    return optax.projections.projection_box(log_penalties, lowest, highest)
