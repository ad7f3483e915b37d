"""Tables and figures of the study of rates. The figures can be read in greyscale."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

LOWEST = 1e-16  # of the axes


class Style(NamedTuple):
    color: str
    line: Any
    marker: str


STYLES = {
    "ITD": Style("#e07b1a", "--", "s"),
    "AID-FP": Style("#2c6fbb", "-", "o"),
    "AID-CG": Style("#1b1b3a", "-.", "^"),
    "AID-NormalCG": Style("#5b2a7a", (0, (5, 1, 1, 1)), "P"),
    "AID-BiCGStab": Style("#4f9d69", ":", "D"),
    "AID-GMRES": Style("#1b1b3a", "-.", "^"),
    "decreasing": Style("#2c6fbb", "-", "o"),
    "constant": Style("#e07b1a", "--", "s"),
}
GUIDE = {"color": "0.55", "lw": 1.2, "zorder": 1}


def table(results: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of aligned tables."""
    yield "1. Symmetric T_1: fitted factors, medians over seeds with the range over seeds"
    for case in results["settings"]:
        yield ""
        yield (
            f"  {case['title']}: q = {spread(case['q'])}, cond(I - T_1) = "
            f"{spread(case['condition'], '.3g')}; ITD is not below AID-FP at "
            f"{100 * case['itd_above']:.0f} % of points (in theory: {case['order']})"
        )
        yield f"    {'':20}{'factor':>24}{'speed: log(fitted) / log(q)':>32}"
        for part, curves in (("t = k", case["curves"]), ("k alone", case["alone"])):
            for name, curve in curves.items():
                numbers = f"{spread(curve['factor']):>24}{spread(curve['speed']):>32}"
                yield f"    {name:10}{part:10}{numbers}{remark(curve)}"
    yield ""
    yield "2. Equilibrium models z = tanh(W z + U u + b), at t = k"
    for case in results["equilibrium"]:
        yield ""
        yield (
            f"  ||W|| = {case['norm']}: q, the spectral radius of T_1, {spread(case['q'])}; "
            f"||T_1|| {spread(case['size'])}"
        )
        for name, curve in case["curves"].items():
            ratio = spread(curve["factor"] / case["q"])
            factor = f"factor {spread(curve['factor'])}"
            yield f"    {name:14}{factor:>31}   over q {ratio}{remark(curve)}"
    part = results["stochastic"]
    yield ""
    yield f"3. SID: slope of the mean squared error over {part['keys']} keys, on log-log axes"
    yield ""
    for name, study in part["studies"].items():
        for kind, curve in study["curves"].items():
            expected = "-1" if kind == "decreasing" else "0"
            what = "average" if name == "J" else f"{kind} steps"
            yield (
                f"    {name}, {what:18}{curve['slope']:7.3f}   in theory {expected:>2}; error "
                f"{curve['mean'][0]:.1e} to {curve['mean'][-1]:.1e}{remark(curve)}"
            )


def remark(curve: dict[str, Any]) -> str:
    return f"  missed: {', '.join(curve['missed'])}" if curve["missed"] else ""


def spread(values: np.ndarray, form: str = ".3f") -> str:
    if not np.isfinite(values).any():
        return "-"
    low, middle, high = np.nanmin(values), np.nanmedian(values), np.nanmax(values)
    return f"{middle:{form}} ({low:{form}}-{high:{form}})"


def draw_all(results: dict[str, Any], folder: Path) -> None:
    settings = results["settings"]
    draw_settings(settings, "curves", folder / "rates-t-and-k.png")
    draw_settings(settings, "alone", folder / "rates-k-alone.png")
    draw_equilibrium(results["equilibrium"], folder / "rates-equilibrium.png")
    draw_stochastic(results["stochastic"], folder / "rates-stochastic.png")


def draw_settings(cases: list[dict[str, Any]], kind: str, path: Path) -> None:
    """Draw the errors of the first seed, and the rates that theory predicts."""
    figure = Figure(figsize=(10, 7.5), dpi=130, layout="constrained")
    together = kind == "curves"
    for axes, case in zip(figure.subplots(2, 2, sharey=True).flat, cases, strict=True):
        steps = np.array(case["steps" if together else "adjoint_steps"])
        bound = case["bound" if together else "bound_alone"][0]
        q = case["q"][0]
        for name, curve in case[kind].items():
            _curve(axes, steps, curve["error"][0], name)
        fixed_point = case[kind]["AID-FP"]["error"][0]
        _guide(axes, steps, fixed_point, q, 0, "-", r"$q^k$")
        if together and not case["affine"]:
            _guide(axes, steps, case[kind]["ITD"]["error"][0], q, 1, "--", r"$t\,q^t$")
        label = r"bound of AID-CG, $c_1 q^t + c_2 p^k$" if together else "bound of AID-CG"
        axes.plot(steps[bound >= LOWEST], bound[bound >= LOWEST], ls=":", label=label, **GUIDE)
        root = np.sqrt(case["condition"][0])
        p = (root - 1) / (root + 1)
        axes.set_title(f"{case['title']}: q = {q:.3f}, p = {p:.3f}", fontsize=11)
        _finish(axes)
    for axes in figure.axes[::2]:
        axes.set_ylabel("error relative to the hypergradient")
    for axes in figure.axes[2:]:
        axes.set_xlabel("t = k" if together else "k")
    if together:
        title = "t inner steps and k = t adjoint steps"
    else:
        title = "k adjoint steps at the inner solution"
    figure.suptitle(f"{title} (first seed; grey: theory)")
    _legend(figure, figure.axes[0])
    figure.savefig(path)


def draw_equilibrium(cases: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(10, 5), dpi=130, layout="constrained")
    for axes, case in zip(figure.subplots(1, 2, sharey=True), cases, strict=True):
        q, size = case["q"][0], case["size"][0]
        for name, curve in case["curves"].items():
            _curve(axes, np.array(curve["steps"]), curve["error"][0], name)
        for name, power, line, label in (
            ("AID-FP", 0, "-", r"$q^k$"),
            ("ITD", 1, "--", r"$t\,q^t$"),
        ):
            curve = case["curves"][name]
            _guide(axes, np.array(curve["steps"]), curve["error"][0], q, power, line, label)
        axes.set_title(
            rf"$\|W\|$ = {case['norm']}: q = {q:.3f}, $\|T_1\|$ = {size:.3f}", fontsize=11
        )
        axes.set_xlabel("t = k")
        _finish(axes)
    figure.axes[0].set_ylabel("error relative to the hypergradient")
    figure.suptitle("Equilibrium models z = tanh(W z + U u + b) (first seed; grey: theory)")
    _legend(figure, figure.axes[0])
    figure.savefig(path)


def draw_stochastic(part: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(11, 4.6), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(part["studies"]))
    labels = {"t": "inner steps t", "k": "adjoint steps k", "J": "samples J"}
    for axes, (name, study) in zip(panels, part["studies"].items(), strict=True):
        counts = np.array(study["counts"])
        for kind, curve in study["curves"].items():
            style = STYLES[kind]
            mean, deviation = curve["mean"], curve["deviation"]
            axes.fill_between(
                counts,
                mean - 2 * deviation,
                mean + 2 * deviation,
                color=style.color,
                alpha=0.2,
                lw=0,
            )
            axes.plot(
                counts,
                mean,
                color=style.color,
                ls=style.line,
                marker=style.marker,
                ms=5,
                label=f"{kind} step sizes",
            )
        mean = study["curves"]["decreasing"]["mean"]
        inside = counts >= study["first"]
        guide = 0.5 * mean[inside][0] * counts[inside][0] / counts[inside]
        axes.plot(counts[inside], guide, label="slope -1", **GUIDE)
        slopes = ", ".join(f"{kind} {c['slope']:.2f}" for kind, c in study["curves"].items())
        title = (
            slopes if len(study["curves"]) > 1 else f"{study['curves']['decreasing']['slope']:.2f}"
        )
        axes.set_title(f"slope: {title}", fontsize=11)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(labels[name])
        _clean(axes)
    panels[0].set_ylabel("mean squared error")
    figure.suptitle(f"SID on real digits: {part['keys']} keys; bands: two standard errors")
    _legend(figure, panels[0])
    figure.savefig(path)


def _curve(axes: Axes, steps: np.ndarray, errors: np.ndarray, name: str) -> None:
    style = STYLES[name]
    axes.plot(
        steps,
        np.maximum(errors, LOWEST),
        color=style.color,
        ls=style.line,
        marker=style.marker,
        ms=4.5,
        label=name,
    )


def _guide(
    axes: Axes,
    steps: np.ndarray,
    errors: np.ndarray,
    q: float,
    power: int,
    line: str,
    label: str,
) -> None:
    """Draw the predicted fall a little above a curve, which it meets where errors are 1e-8."""
    place = int(np.argmin(np.abs(np.log(errors / 1e-8))))
    fine = np.linspace(1, steps[-1], 300)
    values = fine**power * q**fine
    values *= 3 * errors[place] / (steps[place] ** power * q ** steps[place])
    inside = (values <= 3) & (values >= 1e-15)
    axes.plot(fine[inside], values[inside], ls=line, label=label, **GUIDE)


def _finish(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.set_ylim(LOWEST / 2, 30)
    axes.yaxis.set_major_locator(LogLocator(numticks=10))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _clean(axes)


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", lw=0.8)
    axes.set_axisbelow(True)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 7), frameon=False
    )
