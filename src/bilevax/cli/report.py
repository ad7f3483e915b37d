"""report.json, and the table on the terminal."""

from importlib import metadata
from typing import Any, NamedTuple

import numpy as np

import bilevax as bx
from bilevax._frontend.json import plain
from bilevax._frontend.words import clip, counted
from bilevax.cli.choices import HIGHEST, LOWEST, Kind
from bilevax.cli.data import Data, Scaling
from bilevax.cli.fitted import Fitted
from bilevax.cli.penalties import Penalties
from bilevax.cli.search import GRID, Evaluator
from bilevax.cli.tuning import Grid, Tuned

_ROUNDING = 1e-9  # losses that differ by no more than this part are the same


class Study(NamedTuple):
    """All that a run of `tune` leaves behind.

    Attributes:
      name: of the data, for titles.
      settings: the options.
      data: as fitted.
      training_rows: how many rows train; the others of the data are those of a validation file.
      folds: how many there are; 1 with a validation file.
      penalties: which are tuned.
      grid: of single penalties.
      tuned: where tuning ended.
      model: the last fit.
      seconds: wall times by name.
      unit: what turns losses into those of the user's units.
    """

    name: str
    settings: dict[str, Any]
    data: Data
    training_rows: int
    folds: int
    penalties: Penalties
    grid: Grid
    tuned: Tuned
    model: Fitted
    seconds: dict[str, float]
    unit: float

    @property
    def relative(self) -> np.ndarray:
        """The norms of the projected gradient, as parts of the first one."""
        run = self.tuned.run
        norms, first = np.asarray(run.history.stationarity), float(run.state.first_stationarity)
        return norms / first if first > 0 else np.zeros_like(norms)

    @property
    def steps(self) -> np.ndarray:
        """Which steps are in the history."""
        run = self.tuned.run
        return np.arange(run.steps - len(run.history.value), run.steps)

    @property
    def is_accurate(self) -> bool:
        """Whether the accuracy that was asked for is reached."""
        return self.tuned.run.outcome is bx.Outcome.CONVERGED


def loss_unit(kind: Kind, scaling: Scaling) -> float:
    """Return what turns a loss into the user's unit: half a square into a square."""
    return 2 * scaling.target_scale**2 if kind is Kind.RIDGE else 1.0


def wall_times(evaluator: Evaluator, run: bx.MinimizeResult, total: float) -> dict[str, float]:
    """Return where the time went, in seconds: parts that sum up to the total."""
    parts = {
        "grid_and_fit_compilation": evaluator.compile_seconds,
        "grid_and_fit": evaluator.seconds - evaluator.compile_seconds,
        "first_step_with_compilation": run.seconds.first,
        "further_steps": run.seconds.total,
    }
    return parts | {"other": total - sum(parts.values()), "total": total}


def to_json(study: Study) -> dict[str, Any]:
    """Return what report.json holds."""
    tuned, grid, unit = study.tuned, study.grid, study.unit
    history = tuned.run.history
    single, best = (unit * folds for folds in tuned.losses.folds)
    content = {
        "format": "bilevax report 1",
        "version": metadata.version("bilevax"),
        "settings": study.settings,
        "data": {
            "rows": study.training_rows,
            "validation_rows": len(study.data.target) - study.training_rows,
            "folds": study.folds,
            "features": study.data.names,
            "constant_features": study.data.dropped,
            "classes": study.data.classes,
        },
        "losses": {
            "loss": study.model.kind.loss_name,
            "start": {"penalty": GRID[0], "mean": unit * grid.losses[0]},
            "best_single": {"penalty": grid.best, "mean": single.mean(), "folds": single},
            "tuned": {"mean": best.mean(), "folds": best},
        },
        "grid": {"penalties": grid.penalties, "losses": unit * grid.losses},
        "penalties": dict(zip(study.penalties.names, tuned.penalties, strict=True)),
        "history": {
            "step": study.steps,
            "loss": unit * history.value,
            "projected_gradient": study.relative,
            "inner_iterations": history.inner_iterations,
            "adjoint_iterations": history.adjoint_iterations,
            "status": [bx.Status(int(code)).name for code in history.status],
        },
        "outcome": {
            "name": tuned.run.outcome.name,
            "message": tuned.run.message,
            "steps": tuned.run.steps,
            "accuracy_reached": study.is_accurate,
            "better_than_single": tuned.is_better,
        },
        "seconds": study.seconds,
    }
    return plain(content)


def tabulate(study: Study) -> str:
    """Return the table for the terminal."""
    count, loss = len(study.penalties.names), study.model.kind.loss_name
    how = f"{study.folds} folds" if study.folds > 1 else "validation file"
    single, tuned = study.unit * study.tuned.losses.mean
    start = study.unit * study.grid.losses[0]
    strong = f"all penalties {GRID[0]:g}"
    rows = {
        strong: (start, ""),
        f"best single penalty, {study.grid.best:.3g}": (single, _compare(single, start, strong)),
        f"tuned, {counted(count, 'penalty', 'penalties')}": (
            tuned,
            _compare(tuned, single, "the best single penalty"),
        ),
    }
    width = max(map(len, rows))
    lines = [
        f"{clip(study.name)}: {counted(study.training_rows, 'row')}, "
        f"{counted(len(study.data.names), 'feature')}, {study.model.kind} model, {how}",
        "",
        f"{'':{width}}  {loss}",
        *(
            f"{name:{width}}  {value:<13.6g}  {note}".rstrip()
            for name, (value, note) in rows.items()
        ),
    ]
    return "\n".join(lines)


def conclude(study: Study) -> str:
    """Return how the run ended, a sentence on each line."""
    part = study.relative.min()
    how = f"fell to {part:.2g} of its first norm" if part < 0.995 else "did not fall"
    steps = counted(study.tuned.run.steps, "step")
    lines = [f"The projected gradient {how} in {steps}, {study.seconds['total']:.1f} s."]
    bounds = np.isclose(study.tuned.penalties[:, None], [LOWEST, HIGHEST], rtol=1e-9, atol=0)
    if bounds.any():
        number = counted(bounds.sum(), "penalty", "penalties")
        lines.append(f"{number} ended on a bound, {LOWEST:g} or {HIGHEST:g}.")
    if study.tuned.is_better:
        lines.append(_flattery(len(study.penalties.names), study.training_rows))
    return "\n".join(lines)


def _flattery(penalties: int, rows: int) -> str:
    many = f", the more so with {counted(penalties, 'penalty', 'penalties')} and {rows} rows"
    return (
        "The tuned loss flatters, for it is what was minimised"
        f"{many if 10 * penalties > rows else ''}: judge the model by rows not in the data."
    )


def _compare(value: float, reference: float, name: str) -> str:
    if abs(value - reference) <= _ROUNDING * reference:
        return f"the same as {name}"
    percent = 100 * (value / reference - 1)
    return f"{abs(percent):.3g} % {'lower' if percent < 0 else 'higher'} than {name}"
