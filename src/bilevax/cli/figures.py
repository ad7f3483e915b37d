"""The figures of the report."""

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bilevax._frontend.axes import BLUE, DARK, LIGHT, ORANGE, label_logarithm, one_axes, plain
from bilevax.cli.report import Study

MAX_NAMES = 40  # features that are shown by name


def plot_losses(study: Study) -> Figure:
    """Draw the loss against the steps, next to the best single penalty."""
    figure, axes = one_axes(7, 4)
    losses = study.unit * study.tuned.run.history.value
    every = max(1, len(losses) // 10)
    label = "tuned penalties"
    axes.plot(study.steps, losses, color=DARK, marker="s", ms=4, markevery=every, label=label)
    single = study.unit * study.tuned.losses.mean[0]
    axes.axhline(single, color=ORANGE, ls="--", label="best single penalty")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.ticklabel_format(useOffset=False)  # the losses, not what they have above 2973.5
    axes.set_xlabel("step")
    axes.set_ylabel(study.model.kind.loss_name)
    axes.margins(x=0.02, y=0.08)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def plot_penalties(study: Study) -> Figure:
    """Draw the penalties as bars from the best single one, sorted."""
    values, start = study.tuned.penalties, study.grid.best
    order = np.argsort(values)
    named = _ends(order)
    figure, axes = one_axes(7, 1.4 + 0.2 * len(named))
    shown, rows = values[named], np.arange(len(named))
    colors = np.where(shown < start, DARK, LIGHT)
    axes.set_xscale("log")
    # First, for bars that are all of no length have no limits of their own.
    axes.set_xlim(min(shown.min(), start) / 1.5, max(shown.max(), start) * 1.5)
    axes.barh(rows, shown - start, left=start, color=colors, height=0.75)
    axes.axvline(start, color=ORANGE, lw=1.5, label="best single penalty")
    label_logarithm(axes.xaxis)
    axes.set_yticks(rows, [plain(study.penalties.names[i]) for i in named], fontsize=8)
    axes.set_ylim(-0.7, len(named) - 0.3)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("penalty (dark: weaker, bright: stronger than the best single one)")
    figure.legend(loc="outside lower center", frameon=False)
    return figure


def plot_coefficients(study: Study) -> Figure:
    """Draw the coefficients of standardised features: as bars, or for many classes as a map."""
    values = study.model.coefficients
    return _draw_bars(study, values[0]) if len(values) == 1 else _draw_map(study, values)


def _draw_bars(study: Study, values: np.ndarray) -> Figure:
    largest = np.argsort(-np.abs(values))[:MAX_NAMES][::-1]
    figure, axes = one_axes(7, 1.2 + 0.2 * len(largest))
    rows = np.arange(len(largest))
    colors = np.where(values[largest] < 0, BLUE, ORANGE)
    axes.barh(rows, values[largest], color=colors, height=0.75)
    axes.axvline(0, color="black", lw=0.8)
    names = study.model.features
    axes.set_yticks(rows, [plain(names[i]) for i in largest], fontsize=8)
    axes.set_ylim(-0.7, len(largest) - 0.3)
    axes.grid(visible=False, axis="y")
    more = f", the {MAX_NAMES} largest of {len(values)}" if len(values) > MAX_NAMES else ""
    axes.set_xlabel(f"coefficient of the standardised feature{more}")
    return figure


def _draw_map(study: Study, values: np.ndarray) -> Figure:
    classes, features = values.shape
    figure, axes = one_axes(3 + 0.4 * classes, 2.5 + 0.2 * min(features, MAX_NAMES))
    largest = np.abs(values).max() or 1.0
    scale = {"norm": Normalize(-largest, largest), "cmap": matplotlib.colormaps["PuOr"]}
    axes.imshow(values.T, aspect="auto", interpolation="nearest", **scale)
    axes.grid(visible=False)
    names = [plain(name) for name in study.model.classes or []]
    axes.set_xticks(range(classes), names, rotation=90 if max(map(len, names)) > 3 else 0)
    if features <= MAX_NAMES:
        labels = [plain(name) for name in study.model.features]
        axes.set_yticks(range(features), labels, fontsize=8)
    axes.set_xlabel("class")
    axes.set_ylabel("feature, in the order of the data")
    label = "coefficient of the standardised feature"
    figure.colorbar(ScalarMappable(**scale), ax=axes, label=label)
    return figure


def _ends(order: np.ndarray) -> np.ndarray:
    """Return the first and the last of many."""
    half = MAX_NAMES // 2
    return order if len(order) <= MAX_NAMES else np.concatenate([order[:half], order[-half:]])
