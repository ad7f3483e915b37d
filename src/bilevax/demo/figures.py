"""The figures. They can be read in greyscale: curves differ in marker and line style."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from bilevax._frontend.axes import (
    BLUE,
    DARK,
    GREEN,
    LIGHT,
    ORANGE,
    blank,
    label_logarithm,
    one_axes,
    plain,
)
from bilevax.demo.data import Task
from bilevax.demo.study import Study
from bilevax.demo.tuning import START, Run

MAX_NAMES = 40  # features that are shown by name


def plot_losses(task: Task, grid: Run, tuned: Run, path: Path) -> None:
    """Draw the loss of the three parts, step by step, next to the best single penalty."""
    figure, axes = one_axes(7, 5)
    steps = np.arange(len(tuned.status))
    every = max(1, len(steps) // 10)
    styles = {"train": (LIGHT, "o"), "validation": (DARK, "s"), "test": (ORANGE, "^")}
    for part, (color, marker) in styles.items():
        label = {"train": "training", "validation": "validation (minimised)"}.get(part, part)
        loss = tuned.loss[part]
        axes.plot(steps, loss, color=color, marker=marker, markevery=every, label=label)
    for part, line in {"validation": "--", "test": ":"}.items():
        level = grid.loss[part][grid.best]
        label = f"best single penalty, {part}"
        axes.axhline(level, color=styles[part][0], ls=line, lw=1.6, label=label)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("outer step (one inner solve each)")
    axes.set_ylabel("cross entropy (nats per row)")
    axes.set_title(f"{plain(task.name)}: {tuned.penalties[0].size} penalties tuned at once")
    axes.margins(x=0.02, y=0.08)
    label_logarithm(axes.yaxis)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)


def plot_errors(task: Task, study: Study, path: Path) -> None:
    """Draw the error of each rule against the distance to the inner solution."""
    figure, axes = one_axes(7, 5)
    styles = [(DARK, "o-"), (BLUE, "s--"), (ORANGE, "^-"), (GREEN, "D:"), (LIGHT, "v-.")]
    for (name, error), (color, style) in zip(study.error.items(), styles, strict=True):
        axes.plot(study.distance, error, style, color=color, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.invert_xaxis()
    label_logarithm(axes.xaxis)
    label_logarithm(axes.yaxis)
    ends = {name: error[-1] for name, error in study.error.items()}
    _draw_guide(axes, study.distance, ends.pop("Newton step"), slope=2)
    _draw_guide(axes, study.distance, min(ends.values()), slope=1)
    distance = r"$\|x - x^*\| \, / \, \|x^*\|$"
    axes.set_xlabel(f"distance to the inner solution, {distance}, smaller to the right")
    axes.set_ylabel("relative error of the hypergradient")
    axes.set_title(f"{plain(task.name)}: hypergradients at inexact inner solutions")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)


def _draw_guide(axes: Axes, distance: np.ndarray, end: float, slope: int) -> None:
    """Draw a line of the slope that theory expects, a little below the end of a curve."""
    if not (np.isfinite(end) and end > 0):
        return
    low, high = axes.get_ylim()
    guide = 0.4 * end * (distance / distance[-1]) ** slope
    axes.plot(distance, guide, color="0.5", lw=0.8, zorder=1)
    axes.annotate(
        f"slope {slope}",
        (distance[-1], guide[-1]),
        xytext=(0, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        color="0.4",
        fontsize=9,
    )
    axes.set_ylim(low / 2, high)


def plot_penalties(task: Task, tuned: Run, path: Path) -> None:
    """Draw the tuned penalties: as images of pixels, as bars, or as a map."""
    penalties = np.array(tuned.penalties[tuned.best])
    # Nothing was tuned where a feature is constant: its weight is zero whatever the penalty is.
    penalties[task.constant] = np.nan
    if task.image_shape is not None:
        figure = _draw_images(task, penalties, task.image_shape)
    elif penalties.shape[1] == 1:
        figure = _draw_bars(task, penalties[:, 0])
    else:
        figure = _draw_map(task, penalties)
    figure.savefig(path)


def _draw_images(task: Task, penalties: np.ndarray, shape: tuple[int, int]) -> Figure:
    columns = min(penalties.shape[1], 5)
    rows = -(-penalties.shape[1] // columns)
    figure = blank(2 * columns + 1.2, 2.2 * rows + 0.9)
    grid = figure.subplots(rows, columns, squeeze=False)
    scale = _color_scale(penalties)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, name, values in zip(grid.flat, task.class_names, penalties.T, strict=False):
        axes.imshow(values.reshape(shape), **scale)
        axes.set_title(plain(name))
        axes.set_axis_on()
        axes.set_xticks([])
        axes.set_yticks([])
    figure.suptitle(f"{plain(task.name)}: tuned penalty of each pixel, for each class")
    figure.supxlabel("white: pixels that do not vary in the training rows", fontsize=9)
    label = "penalty (dark: the weight is free, bright: held near zero)"
    bar = figure.colorbar(ScalarMappable(**scale), ax=grid, label=label, aspect=30)
    label_logarithm(bar.ax.yaxis)
    return figure


def _draw_bars(task: Task, penalties: np.ndarray) -> Figure:
    title = f"{plain(task.name)}: tuned penalty of each feature"
    order = np.argsort(penalties)
    order = order[np.isfinite(penalties[order])]
    if len(order) > MAX_NAMES:
        half = MAX_NAMES // 2
        title += f"\n(the {half} lowest and the {half} highest of {len(order)})"
        order = np.concatenate([order[:half], order[-half:]])
    values, rows = penalties[order], np.arange(len(order))
    figure, axes = one_axes(7, 1.6 + 0.2 * len(order))
    # Bars begin at the start penalty.
    colors = np.where(values < START, DARK, LIGHT)
    axes.barh(rows, values - START, left=START, color=colors, height=0.75)
    axes.axvline(START, color="black", lw=1)
    axes.set_xscale("log")
    axes.set_xlim(min(values.min(), START) / 1.2, max(values.max(), START) * 1.2)
    label_logarithm(axes.xaxis)
    axes.set_yticks(rows, [plain(task.feature_names[i]) for i in order], fontsize=8)
    axes.set_ylim(-0.7, len(order) - 0.3)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("penalty")
    figure.suptitle(title)
    handles = [
        Patch(color=DARK, label=f"weaker than the start of {START:g}"),
        Patch(color=LIGHT, label=f"stronger than the start of {START:g}"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draw_map(task: Task, penalties: np.ndarray) -> Figure:
    features, classes = penalties.shape
    figure, axes = one_axes(4 + 0.4 * classes, 3.5 + 0.2 * min(features, MAX_NAMES))
    scale = _color_scale(penalties)
    axes.imshow(penalties, aspect="auto", interpolation="nearest", **scale)
    axes.grid(visible=False)
    axes.set_xticks(range(classes), [plain(name) for name in task.class_names], rotation=90)
    if features <= MAX_NAMES:
        axes.set_yticks(range(features), [plain(name) for name in task.feature_names], fontsize=8)
    axes.set_xlabel("class")
    axes.set_ylabel("feature")
    figure.suptitle(f"{plain(task.name)}: tuned penalties")
    figure.supxlabel("dark: the weight is free, bright: held near zero", fontsize=9)
    bar = figure.colorbar(ScalarMappable(**scale), ax=axes, label="penalty")
    label_logarithm(bar.ax.yaxis)
    return figure


def _color_scale(penalties: np.ndarray) -> dict[str, Any]:
    """Return one logarithmic scale for all classes, brighter for stronger penalties."""
    colors = matplotlib.colormaps["cividis"].with_extremes(bad="white")
    low, high = np.nanmin(penalties), np.nanmax(penalties)
    if high < 1.1 * low:  # differences too small to tell: not the whole scale for them
        low, high = low / 1.1, high * 1.1
    return {"norm": LogNorm(low, high), "cmap": colors}
