"""Table and figures of the study of hypergradient errors. The figures can be read in greyscale."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter, LogLocator, NullFormatter

from bilevax._frontend.axes import round_numbers

EPSILON = 2.0**-53  # zeros are drawn at this relative error
BAND = (25, 75)  # percent


class Style(NamedTuple):
    """How a rule is drawn: colours differ in brightness, and curves in marker and line too."""

    label: str
    color: str
    line: Any
    marker: str


STYLES = {
    "vanilla": Style("vanilla", "#1b1b3a", "-", "o"),
    "jacobi": Style("Jacobi step", "#2c6fbb", "--", "s"),
    "newton": Style("Newton step", "#e07b1a", "-.", "^"),
    "diagonal_change": Style("diagonal change", "#4f9d69", "--", "D"),
    "exp_change": Style("exponential change", "#e3a13b", ":", "v"),
    "ideal_change_affine": Style("ideal change", "#5b2a7a", (0, (5, 1, 1, 1, 1, 1)), "P"),
}
PRECONDITIONERS = ("vanilla", "jacobi", "newton")
CHANGES = ("vanilla", "diagonal_change", "exp_change", "ideal_change_affine")
PANELS = [  # number, inner problem, outer objective, rules
    ("1a", "ridge", "linear", PRECONDITIONERS),
    ("1b", "ridge", "quadratic", PRECONDITIONERS),
    ("2b", "logistic", "logistic", PRECONDITIONERS),
    ("3a", "ridge", "linear", CHANGES),
    ("3a", "ridge", "quadratic", CHANGES),
    ("3b", "logistic", "logistic", CHANGES),
]
COLUMNS = """\
Medians over {seeds} seeds, with the range over seeds where there is a second number.
  slope      of the error on log-log axes, over the last three decades but above rounding
  constant   error / distance^order there, and what efficiency_constant predicts along x_t - x*
  ratio      of the two, for all points: it should be 1
  norm       of d Omega/dx, the bound of first-order constants; 0 for rules of a higher order
  /vanilla   constant and norm over those of the vanilla rule: above 1 the rule does harm"""


def table(results: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of an aligned table."""
    yield COLUMNS.format(**results["run"])
    for case in results["cases"]:
        key = case["inner"], case["outer"]
        names = [f"figure {number}" for number, *panel, _ in PANELS if tuple(panel) == key]
        yield ""
        yield (
            f"{case['inner']} regression, {case['outer']} outer objective: {case['data']}, "
            f"{case['rows']} rows, {case['features']} features; {', '.join(names)}"
        )
        yield (
            f"  {'':18}{'slope':>19}{'constant':>11}{'predicted':>11}{'ratio':>14}{'norm':>10}"
            f"{'constant/vanilla':>22}{'norm/vanilla':>22}"
        )
        for name, curve in case["curves"].items():
            yield f"  {STYLES[name].label:18}{_row(curve)}"


def _row(curve: dict[str, Any]) -> str:
    missed = f"  missed: {', '.join(curve['missed'])}" if curve["missed"] else ""
    size = f"{np.median(curve['operator_norm']):10.1e}"
    if curve["expected_order"] == 0:
        error = f"exact, to {curve['largest_relative_error']:.0e} relatively"
        return f"{error:>55}{size}{missed}"
    low, high = curve["ratio"]
    numbers = f"{np.median(curve['constant']):11.2e}{np.median(curve['constant_predicted']):11.2e}"
    row = f"{_spread(curve['slope']):>19}{numbers}{f'{low:.3f}-{high:.3f}':>14}{size}"
    if curve["expected_order"] == 1:
        ratios = (_spread(curve[key], ".3g") for key in ("constant_to_vanilla", "norm_to_vanilla"))
        row += "".join(f"{ratio:>22}" for ratio in ratios)
    return row + missed


def _spread(values: np.ndarray, form: str = ".2f") -> str:
    return f"{np.median(values):{form}} ({np.min(values):{form}}-{np.max(values):{form}})"


def draw_all(cases: list[dict[str, Any]], folder: Path) -> None:
    found = {(case["inner"], case["outer"]): case for case in cases}
    for number, inner, outer, rules in PANELS:
        if (inner, outer) in found:
            kind = "preconditioners" if rules is PRECONDITIONERS else "changes"
            path = folder / f"figure-{number}-{inner}-{outer}-{kind}.png"
            draw(found[inner, outer], number, rules, path)


def draw(case: dict[str, Any], number: str, rules: tuple[str, ...], path: Path) -> None:
    """Draw the errors of some rules, and below how those of first order compare with vanilla."""
    figure = Figure(figsize=(7.5, 7), dpi=150, layout="constrained")
    axes, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    curves = {name: case["curves"][name] for name in rules if name in case["curves"]}
    grid = common_grid(curves["vanilla"]["distance"])
    floor = EPSILON * case["hypergradient_norm"][:, None]
    errors = {
        name: interpolate(curve["distance"], np.maximum(curve["error"], floor), grid)
        for name, curve in curves.items()
    }
    for place, (name, curve) in enumerate(curves.items()):
        style, order = STYLES[name], curve["expected_order"]
        is_exact = order == 0 and not curve["missed"]
        slope = "exact to rounding" if is_exact else f"slope {np.median(curve['slope']):.2f}"
        # Markers of one curve stand between those of the others, for curves may coincide.
        every = (place, len(curves))
        _draw_curve(axes, grid, errors[name], style, every, f"{style.label} ({slope})")
        if order == 1:
            _draw_curve(below, grid, errors[name] / errors["vanilla"], style, every)
    for part in (axes, below):
        part.spines[["top", "right"]].set_visible(False)
        part.grid(color="0.9", lw=0.8)
        part.set_axisbelow(True)
        part.set_yscale("log")
        part.set_xscale("log")
    axes.invert_xaxis()  # shared with the one below
    for order in {curve["expected_order"] for curve in curves.values()} - {0}:
        ends = [errors[name] for name in curves if curves[name]["expected_order"] == order]
        _draw_guide(axes, grid, np.median(ends, axis=1).min(axis=0), order)
    axes.yaxis.set_major_locator(LogLocator(numticks=12))
    axes.yaxis.set_minor_formatter(NullFormatter())
    below.yaxis.set_major_locator(FixedLocator(round_numbers(*below.get_ylim())))
    below.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    below.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(r"error $\|\Omega(x_t, y) - dh/dy\|$")
    below.set_ylabel("error / vanilla")
    below.set_xlabel(r"distance $\|x_t - x^*\|$, smaller to the right")
    seeds = len(case["hypergradient_norm"])
    axes.set_title(
        f"Figure {number}: {case['inner']} regression on {case['data'].replace('$', '')}, "
        f"{case['outer']} outer objective\n"
        f"lines: medians of {seeds} seeds; bands: quartiles",
        fontsize=11,
    )
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)


def common_grid(distance: np.ndarray) -> np.ndarray:
    """Return distances that lie within the range of every seed, evenly in their logarithm."""
    return np.geomspace(distance[:, 0].min(), distance[:, -1].max(), distance.shape[1])


def interpolate(distance: np.ndarray, error: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Return the errors of every seed at the same distances, interpolated on log-log axes."""
    rows = zip(np.log(distance[:, ::-1]), np.log(error[:, ::-1]), strict=True)
    return np.exp([np.interp(np.log(grid), *row) for row in rows])


def _draw_curve(
    axes: Axes,
    grid: np.ndarray,
    values: np.ndarray,
    style: Style,
    every: tuple[int, int],
    label: str | None = None,
) -> None:
    low, high = np.percentile(values, BAND, axis=0)
    axes.fill_between(grid, low, high, color=style.color, alpha=0.15, lw=0)
    axes.plot(
        grid,
        np.median(values, axis=0),
        color=style.color,
        ls=style.line,
        marker=style.marker,
        markevery=every,
        label=label,
    )


def _draw_guide(axes: Axes, grid: np.ndarray, lowest: np.ndarray, slope: int) -> None:
    """Draw a line of the slope that theory expects, a little below a curve."""
    middle = len(grid) // 2
    part = slice(middle, None)
    guide = 0.2 * lowest[middle] * (grid[part] / grid[middle]) ** slope
    axes.plot(grid[part], guide, color="0.5", lw=0.9, zorder=1)
    axes.annotate(
        f"slope {slope}",
        (grid[-1], guide[-1]),
        xytext=(0, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        color="0.35",
        fontsize=9,
    )
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.05 * guide[-1]), high)
