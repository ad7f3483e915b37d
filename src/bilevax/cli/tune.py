"""The command `bilevax tune`."""

import argparse
import contextlib
import json
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import bilevax as bx
from bilevax._frontend.words import DataError, quote, shorten
from bilevax.cli import folds as splits
from bilevax.cli import report, tuning
from bilevax.cli.data import (
    Data,
    Scaling,
    as_rows,
    feature_names,
    prepare,
    prepare_validation,
    standardise,
)
from bilevax.cli.files import read_table
from bilevax.cli.fitted import make_fitted, to_json
from bilevax.cli.model import Kind, Rows, Weights
from bilevax.cli.page import write_page
from bilevax.cli.penalties import Penalties, read_penalties
from bilevax.cli.search import Evaluator

_INTERRUPTED = 130


class _Task(NamedTuple):
    """What is read and checked.

    Attributes:
      kind: of the model.
      data: all rows, those of a validation file last.
      training: how many of them are in DATA.
      scaling: of the rows in DATA.
      rows: standardised.
      folds: which rows train and which are held out.
      penalties: which are tuned.
    """

    kind: Kind
    data: Data
    training: int
    scaling: Scaling
    rows: Rows
    folds: splits.Folds
    penalties: Penalties


def tune(options: argparse.Namespace) -> int:
    """Tune, write the results and print a table; return the exit code.

    Raises:
      DataError: if the data or an option cannot be used; nothing is written then.
    """
    # Only here, for a library must not decide this: penalties that differ by a factor of 1e9 make
    # systems that float32 cannot solve.
    jax.config.update("jax_enable_x64", True)
    began = time.perf_counter()
    task = _read(options)
    _check_folder(options.out, options.resume)
    if task.data.dropped:
        names = shorten([quote(name) for name in task.data.dropped])
        _tell(f"left out, for they are constant: {names}")
    try:
        with _terminated_like_interrupted():
            study = _run(options, task, began)
    except KeyboardInterrupt:
        study = None
    if study is None:
        has_state = _has_checkpoints(options.out)
        _tell(
            f"interrupted; go on with the same command and --resume, the state is in {options.out}"
            if has_state
            else "interrupted before the first step; nothing is saved"
        )
        return _INTERRUPTED
    _write(options.out, study)
    print(report.tabulate(study))
    print(f"\n{report.conclude(study)}")
    print(f"Written to {options.out}: model.json, report.json, report.html")
    if study.is_accurate:
        shutil.rmtree(_checkpoints(options.out))  # nothing is left to go on with
        return 0
    _tell(
        f"{study.tuned.run.message}. The accuracy of {options.accuracy:g} was not reached: "
        f"go on with --resume and more than {study.tuned.run.steps} --steps"
    )
    return 3


def _read(options: argparse.Namespace) -> _Task:
    kind = Kind(options.model)
    table = read_table(options.data)
    names = feature_names(table, options.target)
    data = prepare(table, options.target, kind)
    penalties = read_penalties(options.penalty, names, data.names)
    scaling = standardise(data)
    training = len(data.target)
    if options.validation is not None:
        extra = prepare_validation(read_table(options.validation), options.target, data)
        data = data._replace(
            features=np.concatenate([data.features, extra.features]),
            target=np.concatenate([data.target, extra.target]),
        )
    rows = as_rows(data, scaling, kind)
    features = np.asarray(rows.features)
    if options.validation is not None:
        folds = splits.one_split(features, training)
    else:
        _check_folds(options.data, data, options.cv)
        labels = None if data.classes is None else data.target
        held_out = splits.split(options.cv, labels, training, options.seed)
        folds = splits.cross_validation(features, held_out)
    return _Task(kind, data, training, scaling, rows, folds, penalties)


def _check_folds(path: Path, data: Data, count: int) -> None:
    if len(data.target) < count:
        raise DataError(f"{path} has {len(data.target)} rows, fewer than the {count} folds of --cv")
    if data.classes is not None:
        sizes = Counter(data.target.tolist())
        few = [
            f"{quote(name)} ({sizes[i]})" for i, name in enumerate(data.classes) if sizes[i] < count
        ]
        if few:
            raise DataError(
                f"{path} has classes with fewer rows than the {count} folds of --cv: {shorten(few)}"
            )


def _checkpoints(out: Path) -> Path:
    return out / "checkpoints"


def _has_checkpoints(out: Path) -> bool:
    return any(_checkpoints(out).glob("save_*"))


def _check_folder(out: Path, resume: bool) -> None:
    """Raise if the folder cannot be written to, or has an unfinished run and should not."""
    if resume and not _has_checkpoints(out):
        raise DataError(f"there is nothing to --resume in {out}: it has no checkpoints")
    if not resume and _has_checkpoints(out):
        raise DataError(
            f"{out} has a run that is not finished: go on with --resume, choose another --out, "
            f"or remove {_checkpoints(out)}"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # fails now, not after all the work
            pass
    except OSError as error:
        raise DataError(f"cannot write to the folder {out}: {error.strerror}") from None


def _run(options: argparse.Namespace, task: _Task, began: float) -> report.Study | None:
    """Search, tune and fit; return None if a signal ended it."""
    everything = splits.everything(np.asarray(task.rows.features), task.training)
    evaluator = Evaluator(task.rows, task.folds, everything)
    index = task.penalties.positions
    grid = tuning.search_grid(evaluator, len(index))
    if not options.resume:  # what a run has left that ended before its first checkpoint
        shutil.rmtree(_checkpoints(options.out), ignore_errors=True)
    try:
        run = tuning.tune(
            task.rows,
            task.folds,
            index,
            grid=grid,
            rule=options.rule,
            accuracy=options.accuracy,
            steps=options.steps,
            checkpoints=_checkpoints(options.out),
        )
    except (ValueError, OSError) as error:  # of the checkpoints
        raise DataError(f"cannot use {_checkpoints(options.out)}: {error}") from error
    if run.outcome is bx.Outcome.INTERRUPTED:
        return None
    tuned = tuning.finish(evaluator, index, grid, run)
    last = Weights(*(leaf[1, -1] for leaf in tuned.losses.weights))
    penalties = tuned.penalties[index]
    model = make_fitted(
        task.kind, options.target, task.data, task.scaling, task.rows, penalties, last
    )
    return report.Study(
        name=options.data.stem,
        settings=_settings(options),
        data=task.data,
        training_rows=task.training,
        folds=len(task.folds.train),
        penalties=task.penalties,
        grid=grid,
        tuned=tuned,
        model=model,
        seconds=report.wall_times(evaluator, run, time.perf_counter() - began),
        unit=report.loss_unit(task.kind, task.scaling),
    )


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name != "command"
    }
    return settings | {"cv": None if options.validation else options.cv, "precision": "float64"}


def _write(out: Path, study: report.Study) -> None:
    texts = {
        "model.json": json.dumps(to_json(study.model), indent=1, allow_nan=False),
        "report.json": json.dumps(report.to_json(study), indent=1, allow_nan=False),
        "report.html": write_page(study),
    }
    try:
        for name, text in texts.items():
            draft = out / f"{name}.tmp"  # so that no file is ever half written
            draft.write_text(text + "\n", encoding="utf-8")
            draft.replace(out / name)
    except OSError as error:
        raise DataError(f"cannot write to the folder {out}: {error.strerror}") from None


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt, as SIGINT does, where no run is watching for it."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(message: str) -> None:
    print(f"bilevax tune: {message}", file=sys.stderr, flush=True)
