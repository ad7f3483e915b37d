"""What `training.py` prints and draws."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLORS = {
    "cold, tight": "0.35",
    "warm x, tight": "#e07b1a",
    "warm x and v, tight": "#c0392b",
    "warm x and v, Geometric": "#4f9d69",
    "warm x and v, Harmonic": "#8fbf6b",
    "warm x and v, Logarithmic": "#b08ac2",
    "warm x and v, Adaptive": "#2c6fbb",
    "HOAG, with its own steps": "#d4a017",
}


def table(case: dict[str, Any]) -> Iterator[str]:
    first, least = case["h"]
    yield f"\n{case['about']}: h from {first:.4f} to {least:.4f}"
    yield (
        f"  {'':12}{'':34}{'rule':10}{'steps':>6}{'gradients':>11}{'products':>10}"
        f"{'time, s':>9}{'compile, s':>12}"
    )
    for entry in case["contenders"]:
        yield _row(entry)
    for claim in case["claims"]:
        verdict = "" if claim["met"] else "  missed"
        yield (
            f"  {claim['what']} of {claim['over']} over those of Adaptive: "
            f"{claim['ratio']:.2f}, claimed >= {claim['goal']:g}{verdict}"
        )


def _row(entry: dict[str, Any]) -> str:
    def cell(name: str, width: int) -> str:
        return f"{'' if entry[name] is None else int(entry[name]):>{width}}"

    steps = cell("steps", 6) if entry["steps"] else f"{'-':>6}"
    remark = "" if entry["steps"] else f"  ends at {entry['gap']:.1e}"
    return (
        f"  {entry['library']:12}{entry['name']:34}{entry['rule']:10}{steps}"
        f"{cell('gradients', 11)}{cell('products', 10)}{entry['seconds']:9.2f}"
        f"{entry['compile_seconds']:12.1f}{remark}"
    )


def draw(cases: list[dict[str, Any]], target: float, path: Path) -> None:
    """Draw suboptimality against gradients spent, one panel per problem."""
    figure = Figure(figsize=(12, 5), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    for axes, case in zip(panels, cases, strict=True):
        for entry in case["contenders"]:
            if entry["gradients"] is None:
                continue
            points = [p for p in entry["path"] if p["gap"] > 0]
            is_newton = entry["rule"] == "Newton"
            axes.plot(
                [max(p["gradients"], 1) for p in points],
                [p["gap"] for p in points],
                color=COLORS[entry["name"]],
                ls="--" if is_newton else "-",
                lw=2.4 if entry["name"].endswith("Adaptive") else 1.3,
                label=None if is_newton else entry["name"],
            )
            if entry["steps"]:
                last = points[-1]
                axes.plot(last["gradients"], last["gap"], "o", ms=5, color=COLORS[entry["name"]])
        axes.axhline(target, color="0.8", lw=1, zorder=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(left=30)
        axes.set_ylim(target / 3, 2)
        axes.set_xlabel("gradients of f")
        axes.set_title(case["about"], fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.93", lw=0.8)
        axes.set_axisbelow(True)
    panels[0].set_ylabel("(h - h*) / (h at the start - h*)")
    panels[0].plot([], [], "k--", lw=1.3, label="dashed: the same, Newton-preconditioned")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path)
