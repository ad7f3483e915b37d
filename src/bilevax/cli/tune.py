"""The command `bilevax tune`."""

import argparse
import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import bilevax as bx
from bilevax._frontend.words import DataError, quote, shorten
from bilevax.cli import honest, output, report, tuning
from bilevax.cli.choices import SHRINKS
from bilevax.cli.fitted import make_fitted, to_json
from bilevax.cli.folds import make_folds
from bilevax.cli.identity import check_same, identify
from bilevax.cli.page import write_page
from bilevax.cli.search import Evaluator
from bilevax.cli.task import Task


def tune(options: argparse.Namespace, task: Task) -> int:
    """Tune, write the results and print a table; return the exit code.

    Raises:
      DataError: if the folder OUT cannot be used; nothing is written then.
      KeyboardInterrupt: if a signal ended the run; it says whether the run can go on.
    """
    # Only here, for a library must not decide this: penalties that differ by a factor of 1e9 make
    # systems that float32 cannot solve.
    jax.config.update("jax_enable_x64", True)
    clock = report.Clock()
    identity = identify(options, task.data, task.training, task.penalties)
    output.check_folder(options.out, options.resume)
    if options.resume:
        check_same(output.checkpoints(options.out), identity, options)
    if task.data.dropped:
        names = shorten([quote(name) for name in task.data.dropped])
        _tell(f"left out, for they are constant: {names}")
    try:
        study = _run(options, task, json.dumps(identity, indent=1), clock)
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


def _run(
    options: argparse.Namespace, task: Task, identity: str, clock: report.Clock
) -> report.Study:
    """Search, score, tune and fit.

    Raises:
      DataError: if the folder cannot be used.
      KeyboardInterrupt: if a signal ended it.
    """
    rows, index = task.rows, task.penalties.positions
    evaluator, folds = Evaluator(rows), make_folds(rows, task.plan.search)
    settings = tuning.Settings(options.rule, options.accuracy, options.steps)
    with clock.part("grid"):
        grid = tuning.search_grid(evaluator, folds, len(index))
    checkpoints = output.checkpoints(options.out)
    if not options.resume:
        output.begin(options.out, identity)
    scores = None
    if options.honest_score:
        with clock.part("honest_score"):
            scores = _score(options, task, evaluator, settings)
    shrink = (options.shrink or 0.0) if scores is None else float(scores.shrinks[scores.best])
    try:
        run = tuning.tune(rows, folds, index, grid, settings, shrink, checkpoints)
    except (ValueError, OSError) as error:  # of the checkpoints
        raise DataError(f"cannot use {checkpoints}: {error}") from error
    if run.outcome is bx.Outcome.INTERRUPTED:
        raise KeyboardInterrupt
    with clock.part("fit"):
        tuned = tuning.finish(evaluator, folds, index, grid, run)
    is_tuned = tuned.is_better and (scores is None or scores.is_better)
    penalties = tuned.penalties if is_tuned else np.full_like(tuned.penalties, grid.best)
    weights = tuned.losses.weights[int(is_tuned), -1]
    return report.Study(
        name=options.data.stem,
        settings=_settings(options),
        data=task.data,
        training_rows=task.training,
        folds=len(folds.choosing.train),
        penalties=task.penalties,
        grid=grid,
        scores=scores,
        shrink=shrink,
        tuned=tuned,
        is_tuned=is_tuned,
        model=make_fitted(
            task.kind, options.target, task.data, task.scaling, rows, penalties[index], weights
        ),
        seconds=clock.parts(evaluator, run),
        unit=report.loss_unit(task.kind, task.scaling),
    )


def _score(
    options: argparse.Namespace, task: Task, evaluator: Evaluator, settings: tuning.Settings
) -> honest.Honest:
    """Return the honest scores; a run that goes on has written them down."""
    record = output.checkpoints(options.out) / output.SCORES
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return honest.Honest.from_json(json.loads(record.read_text(encoding="utf-8")))
    if task.penalties.is_single:
        shrinks = (0.0,)  # one penalty is where it would be pulled to
    else:
        shrinks = SHRINKS if options.shrink is None else (options.shrink,)
    index = task.penalties.positions
    scores = honest.score(evaluator, task.rows, task.plan, index, settings, shrinks)
    output.write(record, json.dumps(scores.to_json()))
    return scores


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name != "command"
    }
    settings["shrink"] = "auto" if options.shrink is None else options.shrink
    return settings | {"cv": None if options.validation else options.cv, "precision": "float64"}


def _results(study: report.Study) -> dict[str, str]:
    return {
        "model.json": json.dumps(to_json(study.model), indent=1, allow_nan=False),
        "report.json": json.dumps(report.to_json(study), indent=1, allow_nan=False),
        "report.html": write_page(study),
    }


def _tell(message: str) -> None:
    print(f"bilevax tune: {message}", file=sys.stderr, flush=True)
