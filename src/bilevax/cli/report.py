"""report.json, and the table on the terminal."""

import contextlib
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np

import bilevax as bx
from bilevax._frontend.json import plain
from bilevax._frontend.words import clip, counted
from bilevax.cli.choices import HIGHEST, LOWEST, Kind
from bilevax.cli.data import Data
from bilevax.cli.fitted import Fitted
from bilevax.cli.honest import Honest
from bilevax.cli.penalties import Penalties
from bilevax.cli.rows import Scaling
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
      scores: the honest ones; None if they were skipped.
      shrink: the pull towards the best single penalty, as a part of its loss.
      tuned: where tuning ended.
      is_tuned: whether the model is that of the tuned penalties, not of the best single one.
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
    scores: Honest | None
    shrink: float
    tuned: Tuned
    is_tuned: bool
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


class Clock:
    """Where the wall time goes, by the names of parts."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._parts: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure a part."""
        began = time.perf_counter()
        yield
        self._parts[name] = time.perf_counter() - began

    def parts(self, evaluator: Evaluator, run: bx.MinimizeResult) -> dict[str, float]:
        """Return the seconds of all parts, which sum up to the total."""
        total, compiling = time.perf_counter() - self._began, evaluator.compile_seconds
        parts = {"grid_and_fit_compilation": compiling} | self._parts
        parts["grid"] -= compiling
        parts["first_step_with_compilation"] = run.seconds.first
        parts["further_steps"] = run.seconds.total
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
        "shrink": study.shrink,
        "honest": None if study.scores is None else _honest_json(study.scores, unit),
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
            "written": "tuned" if study.is_tuned else "best_single",
        },
        "seconds": study.seconds,
    }
    return plain(content)


def tabulate(study: Study) -> str:
    """Return the table for the terminal."""
    names, loss, grid = study.penalties.names, study.model.kind.loss_name, study.grid
    how = f"{study.folds} folds" if study.folds > 1 else "validation file"
    single, tuned = study.tuned.losses.mean
    pull = f", shrink {study.shrink:g}" if study.shrink else ""
    strong, one = f"all penalties {GRID[0]:g}", f"best single penalty, {grid.best:.3g}"
    many = f"tuned, {counted(len(names), 'penalty', 'penalties')}{pull}"
    losses = {strong: [grid.losses[0]], one: [single], many: [tuned]}
    heads = [loss]
    if study.scores is None:
        notes = ["", _compare(single, grid.losses[0], strong)]
        notes.append(_compare(tuned, single, "the best single penalty"))
    else:
        heads, notes = ["minimised", "honest"], ["", "", ""]
        losses[one].append(study.scores.single)
        losses[many].append(study.scores.tuned[study.scores.best])
    width = max(map(len, losses))
    lines = [
        f"{clip(study.name)}: {counted(study.training_rows, 'row')}, "
        f"{counted(len(study.data.names), 'feature')}, {study.model.kind} model, {how}",
        "",
        f"{'' if study.scores is None else loss:{width}}  {_columns(heads)}",
    ]
    for (name, values), note in zip(losses.items(), notes, strict=True):
        cells = _columns([f"{study.unit * value:.6g}" for value in values])
        lines.append(f"{name:{width}}  {cells}  {note}")
    return "\n".join(line.rstrip() for line in lines)


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
    if study.scores is not None:
        lines.append(_judge(study.scores, study.is_tuned))
    elif study.tuned.is_better:
        lines.append(_flattery(len(study.penalties.names), study.training_rows))
    return "\n".join(lines)


def _judge(scores: Honest, is_tuned: bool) -> str:
    """Say which model is written, and why."""
    change = 100 * (scores.tuned[scores.best] / scores.single - 1)
    spread = 100 * scores.spreads[scores.best] / scores.single
    digits = max(0, 1 - int(np.floor(np.log10(spread)))) if spread > 0 else 2
    how = f"{abs(change):.{digits}f} % {'lower' if change < 0 else 'higher'}"
    found = (
        f"On rows that had no part in the choice, the loss of the tuned penalties is {how} than "
        f"that of the best single one, give or take {spread:.{digits}f} %"
    )
    if is_tuned:
        return f"{found}: the model with the tuned penalties is written."
    why = "not surely better, so " if change < 0 else ""
    return f"{found}: {why}the model with the best single penalty is written."


def _honest_json(scores: Honest, unit: float) -> dict[str, Any]:
    return {
        "best_single": unit * scores.single,
        "tuned": unit * scores.tuned[scores.best],
        "spread": unit * scores.spreads[scores.best],
        "shrinks": scores.shrinks,
        "tuned_by_shrink": unit * scores.tuned,
        "spread_by_shrink": unit * scores.spreads,
    }


def _columns(cells: list[str]) -> str:
    return "  ".join(f"{cell:<13}" for cell in cells)


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
