"""Table and figure of the equilibrium benchmark. The figure can be read in greyscale."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLORS = {"by hand": "0.5", "bilevax": "#1b1b3a", "JAXopt": "#e07b1a", "Optimistix": "#4f9d69"}
MARKERS = {"by hand": "D", "bilevax": "o", "JAXopt": "s", "Optimistix": "^"}
ORDER = {"reference": 0, "tuned": 1, "default": 2}


def table(results: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of an aligned table."""
    yield "  ".join(f"{key} {value}" for key, value in results["run"].items())
    for case in results["cases"]:
        yield ""
        yield (
            f"W {case['matrix']}, of spectral norm {case['norm']:g}: "
            f"time to an error of {results['target']:g}"
        )
        yield (
            f"  {'':51}{'time, ms':>9}{'ratio':>8}{'error':>10}{'compile, s':>12}"
            "  with (or the smallest error)"
        )
        entries = case["contenders"]
        for entry in sorted(entries, key=lambda entry: (ORDER[entry["kind"]], entry["library"])):
            yield f"  {entry['library']:11}{entry['name']:40}{_row(entry)}"
        yield f"  {'the best of a peer over the best of bilevax':60}{'ratio':>8}{'goal':>10}"
        for goal in case["goals"]:
            ratio = f"{goal['ratio']:8.2f}" if goal["ratio"] else f"{'none':>8}"
            verdict = "" if goal["met"] else "  missed"
            least = f">={goal['goal']:.2f}"
            yield f"  {goal['library']:11}{goal['kind']:49}{ratio}{least:>10}{verdict}"


def _row(entry: dict[str, Any]) -> str:
    compile_time = f"{entry['compile_seconds'] or float('nan'):12.2f}"
    if entry["remark"]:
        return f"{'':27}{compile_time}  {entry['remark'][:70]}"
    best = entry["best"]
    if best is None:
        error = min(point["error"] for point in entry["points"])
        return f"{'':27}{compile_time}  {error:.1e}"
    pairs = zip(entry["fields"], best["numbers"], strict=True)
    numbers = ", ".join(f"{name} {value:.2g}" for name, value in pairs)
    measured = f"{1e3 * best['seconds']:9.2f}{best['ratio']:8.2f}{best['error']:10.1e}"
    return f"{measured}{compile_time}  {numbers}"


def draw(cases: list[dict[str, Any]], target: float, path: Path) -> None:
    """Draw error against time: the fastest contender of each library, and what is the default."""
    figure = Figure(figsize=(5.5 * len(cases), 5.5), dpi=150, layout="constrained")
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        for library, color in COLORS.items():
            style: dict[str, Any] = {"color": color, "marker": MARKERS[library]}
            kind = "reference" if library == "by hand" else "tuned"
            entries = [entry for entry in case["contenders"] if entry["library"] == library]
            rivals = [e for e in entries if e["best"] and e["kind"] == kind]
            if rivals:
                entry = min(rivals, key=lambda entry: entry["best"]["ratio"])
                times, errors = zip(*_frontier(entry["points"]), strict=True)
                axes.plot(times, errors, label=f"{library}: {entry['name']}", **style)
            untold = [e for e in entries if e["kind"] == "default" and e["points"]]
            untold = [entry["best"] or entry["points"][0] for entry in untold]
            times = [1e3 * point["seconds"] for point in untold]
            errors = [point["error"] for point in untold]
            if untold:
                label = f"{library}: defaults"
                axes.plot(times, errors, ls="", mfc="none", ms=9, label=label, **style)
        axes.axhline(target, color="0.7", lw=0.9, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("time of a hypergradient, ms")
        axes.set_ylabel("relative error of the hypergradient")
        axes.set_title(f"W {case['matrix']}, of spectral norm {case['norm']:g}", fontsize=11)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _frontier(points: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Return (ms, error) of the points that no other one beats in both."""
    front: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: point["seconds"]):
        if not front or point["error"] < front[-1][1]:
            front.append((1e3 * point["seconds"], point["error"]))
    return front
