"""Figures that can be read in greyscale."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter, MaxNLocator, NullFormatter

from bilevax._frontend.words import clip

# Colours that differ in brightness too.
DARK, BLUE, ORANGE, GREEN, LIGHT = "#1b1b3a", "#2c6fbb", "#e07b1a", "#4f9d69", "#9aa5b1"


def blank(width: float, height: float) -> Figure:
    """Return an empty figure, its size in inches."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def one_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure with one set of axes."""
    figure = blank(width, height)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", lw=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def label_logarithm(axis: Axis) -> None:
    """Label a logarithmic axis, whose limits are final, by numbers such as 0.03."""
    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(FixedLocator(round_numbers(low, high)))
    axis.set_major_formatter(FormatStrFormatter("%.10g"))
    axis.set_minor_formatter(NullFormatter())


def round_numbers(low: float, high: float) -> list[float]:
    """Return about four to eight round numbers, or a few more, between two positive ones.

    Matplotlib's own choice is powers of ten, of which a narrow range has one or none.
    """
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        numbers = [digit * power for power in powers for digit in digits]
        numbers = [number for number in numbers if low <= number <= high]
        if len(numbers) >= 4:
            return numbers[:: -(-len(numbers) // 10)]
    evenly = MaxNLocator(5, min_n_ticks=3).tick_values(low, high)
    return [float(number) for number in evenly if low <= number <= high]


def plain(name: str) -> str:
    """Make a name from the data fit for a figure: not too long, and never a formula."""
    return clip(name).replace("$", r"\$")
