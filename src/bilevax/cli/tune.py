"""The command `bilevax tune`."""

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import bilevax as bx
from bilevax._frontend.words import DataError, counted, quote, shorten
from bilevax.cli import folds as splits
from bilevax.cli import output, report, tuning
from bilevax.cli.choices import Kind
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
from bilevax.cli.identity import check_same, identify
from bilevax.cli.model import Rows
from bilevax.cli.page import write_page
from bilevax.cli.penalties import Penalties, read_penalties
from bilevax.cli.search import Evaluator


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
      KeyboardInterrupt: if a signal ended the run; it says whether the run can go on.
    """
    # Only here, for a library must not decide this: penalties that differ by a factor of 1e9 make
    # systems that float32 cannot solve.
    jax.config.update("jax_enable_x64", True)
    began = time.perf_counter()
    task = _read(options)
    identity = identify(options, task.data, task.training, task.penalties)
    output.check_folder(options.out, options.resume)
    if options.resume:
        check_same(output.checkpoints(options.out), identity, options)
    if task.data.dropped:
        names = shorten([quote(name) for name in task.data.dropped])
        _tell(f"left out, for they are constant: {names}")
    try:
        study = _run(options, task, json.dumps(identity, indent=1), began)
        output.finish(options.out, _results(study))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"go on with the same command and --resume, the state is in {options.out}"
            if output.is_unfinished(options.out)
            else "no step had been taken, nothing is saved"
        ) from None
    finally:
        output.clear(options.out)
    print(report.tabulate(study))
    print(f"\n{report.conclude(study)}")
    print(f"Written to {options.out}: {', '.join(output.RESULTS)}")
    if study.is_accurate:
        shutil.rmtree(output.checkpoints(options.out))  # nothing is left to go on with
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
    features = rows.features
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
        rows = counted(len(data.target), "row")
        raise DataError(f"{path} has {rows}, fewer than the {count} folds of --cv")
    if data.classes is not None:
        sizes = Counter(data.target.tolist())
        few = [
            f"{quote(name)} ({sizes[i]})" for i, name in enumerate(data.classes) if sizes[i] < count
        ]
        if few:
            raise DataError(
                f"{path} has classes with fewer rows than the {count} folds of --cv: {shorten(few)}"
            )


def _run(options: argparse.Namespace, task: _Task, identity: str, began: float) -> report.Study:
    """Search, tune and fit.

    Raises:
      DataError: if the folder cannot be used.
      KeyboardInterrupt: if a signal ended it.
    """
    everything = splits.everything(task.rows.features, task.training)
    evaluator = Evaluator(task.rows, task.folds, everything)
    index = task.penalties.positions
    grid = tuning.search_grid(evaluator, len(index))
    checkpoints = output.checkpoints(options.out)
    if not options.resume:
        output.begin(options.out, identity)
    try:
        run = tuning.tune(
            task.rows,
            task.folds,
            index,
            grid=grid,
            rule=options.rule,
            accuracy=options.accuracy,
            steps=options.steps,
            checkpoints=checkpoints,
        )
    except (ValueError, OSError) as error:  # of the checkpoints
        raise DataError(f"cannot use {checkpoints}: {error}") from error
    if run.outcome is bx.Outcome.INTERRUPTED:
        raise KeyboardInterrupt
    tuned = tuning.finish(evaluator, index, grid, run)
    last, penalties = tuned.losses.weights[1, -1], tuned.penalties[index]
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


def _results(study: report.Study) -> dict[str, str]:
    return {
        "model.json": json.dumps(to_json(study.model), indent=1, allow_nan=False),
        "report.json": json.dumps(report.to_json(study), indent=1, allow_nan=False),
        "report.html": write_page(study),
    }


def _tell(message: str) -> None:
    print(f"bilevax tune: {message}", file=sys.stderr, flush=True)
