"""Honest scores: the loss of rows that had no part in the choice of the penalties.

The whole search, its grid and its steps, is made anew without some rows, which then judge what it
has found; each row is held out by one of these nested searches. What two choices of penalties
differ by in the loss of each row, d_i, is a paired difference. Its mean over rows says which is
better, and two standard errors of that mean, 2 std(d) / sqrt(rows), are its spread: one choice is
surely worse than another if its mean loss is higher by more than that.

Many penalties on few rows run away to what suits the folds by chance. So log penalties are pulled
towards the best single one, and of some pulls the strongest is taken that is not surely worse than
the one with the lowest loss. The tuned penalties are better than the best single one, which an
infinite pull would give, only if that is surely worse.

All searches run the same two compiled programs, one after the other: each ends with its own last
step, where one vmapped run would have all folds wait for the slowest.

Source:
  M. Stone, "Cross-validatory choice and assessment of statistical predictions", 1974; L. Breiman,
  J. Friedman, R. Olshen, C. Stone, "Classification and regression trees", 1984 (the simplest model
  within a standard error of the best).
"""

from typing import Any, NamedTuple

import numpy as np
import tqdm

import bilevax as bx
from bilevax.cli import tuning
from bilevax.cli.folds import Plan, make_folds
from bilevax.cli.rows import Rows
from bilevax.cli.search import Evaluator

_STANDARD_ERRORS = 2.0


class Honest(NamedTuple):
    """Honest scores of the best single penalty, and of tuned ones for some pulls.

    Attributes:
      shrinks: the pulls, as parts of the loss of the best single penalty; strong ones first.
      single: the mean loss of the rows by the best single penalty.
      tuned: (shrinks,), by tuned ones.
      spreads: (shrinks,), of the difference between the two.
      best: the place of the pull that is taken.
    """

    shrinks: np.ndarray
    single: float
    tuned: np.ndarray
    spreads: np.ndarray
    best: int

    @property
    def is_better(self) -> bool:
        """Whether the best single penalty is surely worse than the tuned ones."""
        return bool(self.single - self.tuned[self.best] > self.spreads[self.best])

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        parts = (part.tolist() if isinstance(part, np.ndarray) else part for part in self)
        return dict(zip(self._fields, parts, strict=True))

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Honest":
        """Return what `to_json` has written down."""
        shrinks, single, tuned, spreads, best = (content[name] for name in cls._fields)
        return cls(np.array(shrinks), float(single), np.array(tuned), np.array(spreads), int(best))


def score(
    evaluator: Evaluator,
    rows: Rows,
    plan: Plan,
    index: np.ndarray,
    settings: tuning.Settings,
    shrinks: tuple[float, ...],
) -> Honest:
    """Score the best single penalty, and tuned ones for some pulls.

    Raises:
      KeyboardInterrupt: if a signal ended one of the runs.
    """
    losses = np.zeros((1 + len(shrinks), rows.design.shape[1]))
    total = len(plan.nested) * (1 + len(shrinks))
    with tqdm.tqdm(total=total, desc="honest score", disable=None, leave=False) as bar:
        for masks in plan.nested:
            folds = make_folds(rows, masks)
            grid = tuning.search_grid(evaluator, folds, len(index))
            bar.update()
            run, tuned = None, []
            for shrink in shrinks:
                run = tuning.tune(rows, folds, index, grid, settings, shrink, after=run)
                if run.outcome is bx.Outcome.INTERRUPTED:
                    raise KeyboardInterrupt
                tuned.append(np.asarray(run.y))
                bar.update()
            found = tuning.fit(evaluator, folds, index, grid, tuned)
            scored = masks.held_out[-1]
            losses[:, scored] = found.rows[:, scored]
    return summarise(losses[:, plan.scored], np.array(shrinks))


def summarise(losses: np.ndarray, shrinks: np.ndarray) -> Honest:
    """Return the scores of losses of rows, (1 + shrinks, rows), the first by a single penalty."""
    single, tuned = losses[0], losses[1:]
    means = tuned.mean(axis=1)
    lowest = np.nanargmin(means)
    best = int(np.argmax(means - means[lowest] <= _spreads(tuned - tuned[lowest])))
    return Honest(shrinks, float(single.mean()), means, _spreads(tuned - single), best)


def _spreads(differences: np.ndarray) -> np.ndarray:
    errors = differences.std(axis=-1, ddof=1) / np.sqrt(differences.shape[-1])
    return _STANDARD_ERRORS * errors
