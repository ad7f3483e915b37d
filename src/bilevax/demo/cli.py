"""The command line of the demo."""

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from bilevax._frontend.options import at_least, folder
from bilevax._frontend.words import DataError
from bilevax.demo import figures, report
from bilevax.demo.data import Table, Task, breast_cancer, digits, prepare
from bilevax.demo.files import read_table
from bilevax.demo.study import MAX_WEIGHTS, is_small, measure_errors
from bilevax.demo.tuning import search_grid, tune

_DESCRIPTION = """\
Tune one L2 penalty for every weight of a logistic regression, all at once, with
hypergradients; compare with the best single penalty; measure how accurate the
hypergradients are. Without --data on two data sets that come with scikit-learn."""

_EPILOG = """\
examples:
  python -m bilevax.demo
  python -m bilevax.demo --data wine.csv --target quality --steps 100
  python -m bilevax.demo --data data.svmlight

A CSV file needs a first line with the names of its columns, commas between the columns,
and numbers in every column but the target. The output folder gets results.json and,
for each data set, PNG figures. Exit code: 0, or 2 if the data or an option is wrong."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
      arguments: of the command line; None for those of the process.

    Returns:
      The exit code.
    """
    options = _parser().parse_args(arguments)
    # Float64: the study measures errors far below what float32 resolves, and on problems of this
    # size a processor takes little longer for it. Only here, for a library must not decide this.
    jax.config.update("jax_enable_x64", True)
    try:
        tables = _read(options.data, options.target)
        tasks = [prepare(table, options.seed) for table in tables]
        _make_folder(options.output)
    except DataError as error:
        print(f"bilevax.demo: {error}", file=sys.stderr)
        return 2
    began = time.perf_counter()
    print(report.INTRODUCTION, flush=True)
    data = [_run(task, options.steps, options.output) for task in tasks]
    results = {"seed": options.seed, "steps": options.steps, "precision": "float64", "data": data}
    text = json.dumps(results, indent=1, allow_nan=False)
    (options.output / "results.json").write_text(text + "\n", encoding="utf-8")
    seconds = time.perf_counter() - began
    print(f"\n\nDone in {seconds:.0f} seconds. All numbers are in {options.output}/results.json,")
    print("the figures next to it: *-losses.png, *-penalties.png, *-errors.png.")
    return 0


def _read(path: Path | None, target: str | None) -> list[Table]:
    if path is not None:
        return [read_table(path, target)]
    if target is not None:
        raise DataError("--target names a column of a CSV file: give the file with --data")
    return [breast_cancer(), digits()]


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = path / "results.json"
        with file.open("a"):  # fails now, not after all the work
            pass
        if not file.stat().st_size:
            file.unlink()  # nothing is left behind if the work fails
    except OSError as error:
        raise DataError(f"cannot write to the folder {path}: {error.strerror}") from None


def _run(task: Task, steps: int, folder: Path) -> dict[str, Any]:
    """Tune, study, print and draw one data set; return its numbers."""
    print(f"\n\n{report.describe(task)}\n", flush=True)
    grid, tuned = search_grid(task), tune(task, steps)
    print(report.compare(task, grid, tuned), flush=True)
    slug = re.sub(r"\W+", "-", task.name).strip("-").lower() or "data"
    figures.plot_losses(task, grid, tuned, folder / f"{slug}-losses.png")
    figures.plot_penalties(task, tuned, folder / f"{slug}-penalties.png")
    study = measure_errors(task) if is_small(task) else None
    if study is None:
        print(f"No study of hypergradient errors here: it takes at most {MAX_WEIGHTS} weights.")
    else:
        print(f"\n{report.tabulate(study)}", flush=True)
        figures.plot_errors(task, study, folder / f"{slug}-errors.png")
    return report.summarise(task, grid, tuned, study)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bilevax.demo",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="your own data: a CSV or svmlight (LIBSVM) file"
    )
    parser.add_argument(
        "--target", metavar="COLUMN", help="the column of the CSV file that holds the classes"
    )
    parser.add_argument(
        "--steps",
        type=at_least(2),
        default=40,
        metavar="N",
        help="outer steps, one inner solve each, the first at the start (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=at_least(0),
        default=0,
        metavar="N",
        help="of the split into thirds, the only random choice (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=folder,
        default=Path("demo-output"),
        metavar="FOLDER",
        help="where the figures and numbers go (default: %(default)s)",
    )
    return parser
