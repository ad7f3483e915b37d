"""What the demo says: the text on the terminal, and the numbers for the JSON file."""

import math
from collections import Counter
from typing import Any

import numpy as np

import bilevax as bx
from bilevax._frontend.json import plain
from bilevax.demo.data import Task
from bilevax.demo.study import Study
from bilevax.demo.tuning import START, Run

INTRODUCTION = """\
One L2 penalty for every weight of a logistic regression, all tuned at once.

Inner problem: fit the weights to the training rows, for given penalties.
Outer problem: choose the penalties by the loss on the validation rows, with Adam on
hypergradients. For comparison: the best of 50 single penalties, one for all weights.
The test rows take no part in either."""

_PARTS = ("train", "validation", "test")


def describe(task: Task) -> str:
    """Return the lines that introduce a data set."""
    rows = ", ".join(f"{len(part.labels)} {name}" for name, part in task.parts.items())
    return (
        f"{task.name}: {len(task.feature_names)} features, {len(task.class_names)} classes, "
        f"{math.prod(task.penalty_shape)} penalties\nrows: {rows}"
    )


def compare(task: Task, grid: Run, tuned: Run) -> str:
    """Return the table of before and after, and what to make of it."""
    single = f"best single penalty, {_common(grid):.2g}"
    rows = [
        _row(f"start, every penalty {START:g}", tuned, 0, cost=False),
        _row(single, grid, grid.best),
        _row("tuned, one penalty each", tuned, tuned.best),
    ]
    heads = [
        f"{'':29}{'loss':^24}{'accuracy, %':^24}{'inner':>8}{'seconds':>10}",
        f"{'':28}{'train':>8}{'valid.':>8}{'test':>8} {'train':>8}{'valid.':>8}{'test':>8}"
        f"{'solves':>8}{'run + compile':>15}",
    ]
    return "\n".join([*heads, *rows, "", *_conclusions(task, grid, tuned)])


def _row(name: str, run: Run, entry: int, *, cost: bool = True) -> str:
    losses = "".join(_loss(run.loss[part][entry]) for part in _PARTS)
    shares = "".join(f"{100 * run.accuracy[part][entry]:8.1f}" for part in _PARTS)
    seconds = f"{run.run_seconds:.2f} + {run.compile_seconds:.1f}"
    costs = f"{len(run.status):8}{seconds:>15}" if cost else ""
    return f"{name:28}{losses} {shares}{costs}"


def _loss(value: float) -> str:
    """Fill eight characters, whatever the value is."""
    if value < 99:
        return f"{value:8.4f}"
    return f"{value:8.1f}" if value < 9e4 else f"{value:8.0e}"


def _conclusions(task: Task, grid: Run, tuned: Run) -> list[str]:
    ratios = {part: tuned.loss[part][tuned.best] / grid.loss[part][grid.best] for part in _PARTS}
    points = 100 * (tuned.accuracy["test"][tuned.best] - grid.accuracy["test"][grid.best])
    lines = [
        f"Against the best single penalty, the validation loss is {_change(ratios['validation'])},",
        f"the test loss {_change(ratios['test'])}, and the test accuracy {_difference(points)}.",
    ]
    if ratios["validation"] > 1:
        lines.append("Tuning has not caught up with the single penalty: give it more --steps.")
    elif ratios["test"] > 1:
        lines += [
            f"The tuning has overfitted: {math.prod(task.penalty_shape)} penalties were fitted to "
            f"{len(task.validation.labels)} validation rows.",
            "Fewer --steps or more rows help.",
        ]
    else:
        lines.append("The validation loss flatters, for it is what was minimised: trust the test.")
    lines.append(
        "One split of few rows says little about the test loss: compare with other --seed."
    )
    for name, run in {"grid": grid, "tuning": tuned}.items():
        for status, count in Counter(map(bx.Status, run.status.tolist())).items():
            if status >= bx.Status.MAXITER:
                of = f"{count} of {len(run.status)} solves of the {name}"
                lines += [f"Warning: {of} ended with {status.name}:", f"{status.remedy}."]
    return lines


def tabulate(study: Study) -> str:
    """Return the table of errors, and what to make of it."""
    shown = slice(0, None, 2)
    lines = [
        "Relative error of the hypergradient at the start, where gradient descent stops early",
        "",
        _cells("gradient norm, relative", study.rtol[shown], ".0e"),
        _cells("gradient descent steps", study.iterations[shown], "d"),
        _cells("distance ||x - x*|| / ||x*||", study.distance[shown], ".1e"),
        *(_cells(f"  {name}", error[shown], ".1e") for name, error in study.error.items()),
        "",
        "With a Newton step the error is quadratic in the distance. The other rules keep it linear",
        "and change its factor; weights near zero are what the exponential change cannot bear.",
    ]
    return "\n".join(lines)


def _cells(name: str, values: np.ndarray, form: str) -> str:
    return f"{name:29}" + "".join(f"{value:>10{form}}" for value in values)


def summarise(task: Task, grid: Run, tuned: Run, study: Study | None) -> dict[str, Any]:
    """Return all numbers of a data set, for JSON."""
    return {
        "name": task.name,
        "rows": {name: len(part.labels) for name, part in task.parts.items()},
        "features": task.feature_names,
        "classes": task.class_names,
        "start": {"penalty": START, **_entry(tuned, 0)},
        "best_single": {"penalty": _common(grid), **_entry(grid, grid.best)},
        "tuned": {
            "step": tuned.best,
            "penalties": plain(tuned.penalties[tuned.best]),
            **_entry(tuned, tuned.best),
        },
        "grid": {"penalties": plain(grid.penalties[:, 0, 0]), **_history(grid)},
        "tuning": _history(tuned),
        "study": None if study is None else {k: plain(v) for k, v in study._asdict().items()},
    }


def _entry(run: Run, entry: int) -> dict[str, Any]:
    return {
        "loss": {part: plain(run.loss[part][entry]) for part in _PARTS},
        "accuracy": {part: plain(run.accuracy[part][entry]) for part in _PARTS},
    }


def _history(run: Run) -> dict[str, Any]:
    return {
        "inner_solves": len(run.status),
        "newton_steps": plain(run.iterations),
        "status": [bx.Status(status).name for status in run.status.tolist()],
        "loss": {part: plain(run.loss[part]) for part in _PARTS},
        "accuracy": {part: plain(run.accuracy[part]) for part in _PARTS},
        "run_seconds": run.run_seconds,
        "compile_seconds": run.compile_seconds,
    }


def _common(grid: Run) -> float:
    return float(grid.penalties[grid.best, 0, 0])


def _change(ratio: float) -> str:
    if not ratio < 10:  # NaN too
        return f"{ratio:.2g} times as high"
    percent = round(100 * abs(ratio - 1))
    return f"{percent} % {'lower' if ratio < 1 else 'higher'}" if percent else "the same"


def _difference(points: float) -> str:
    if abs(points) < 0.05:
        return "the same"
    return f"{abs(points):.1f} points {'higher' if points > 0 else 'lower'}"
