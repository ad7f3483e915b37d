"""Peak memory of one hypergradient against the number T of inner steps, by rule: `make memory`.

The inner problem is logistic regression with an l2 penalty exp(y) in float32, 64 rows of 20 000
features, solved by exactly T steps of gradient descent. Each rule, and two peers, is compiled and
run for T from 10 to 10 000, each point in a process of its own:

  XLA        temporaries of the program, by XLA's own analysis
  resident   growth of the peak resident memory of the process during the first call; only up to
             1000 steps and where XLA predicts less than 700 MB
  fixed      what does not depend on T: temporaries at T = 1
  slope      on log-log axes of what comes on top of it, from T = 100 on
  per step   temporaries per step, in vectors of the size of x, between the two largest T

Peers: `scan` differentiated by hand, and JAXopt with `implicit_diff=False, unroll=True`, which
keeps the data for every step. What theory says:

  rules at a point, OneStep(), last=K, mode="forward"   constant in T, to 5 %
  Unrolled()                       slope 1: two vectors per step, x and F(x, y), and never the data
  Unrolled(checkpoints="sqrt")     slope 1/2, in at most twice the time of Unrolled()

In what is fixed there may be copies of the data: one with Unrolled(), two with checkpoints.

Whatever is not so is listed as missed, and then the exit status is 1.
"""

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path
from typing import Any

import memory_points as points
import numpy as np
import outcome
from matplotlib.figure import Figure
from measure import paired
from memory_points import DIM, MEGABYTE, ROWS, Point
from tqdm import tqdm

OUTPUT = Path(__file__).parent / "output" / "memory"
STEPS = [10, 30, 100, 300, 1000, 3000, 10_000]
FEW_STEPS = [10, 100, 1000, 10_000]  # of peers, and in the table
END_STEPS = [10, 1000, 10_000]  # of what should not depend on them
MOST_STEPS, MOST_BYTES = 1000, 700e6  # of what is run
CONSTANT = [*points.CONTENDERS][:6]
SQRT, PLAIN, HAND, JAXOPT = [*points.CONTENDERS][6:]
GRIDS = {
    **{name: END_STEPS for name in CONSTANT},
    **{name: [1, *STEPS] for name in (SQRT, PLAIN)},
    **{name: [1, *FEW_STEPS] for name in (HAND, JAXOPT)},
}
ASYMPTOTIC = 100  # steps
VECTOR = 4 * DIM  # bytes
NOISE = 20e6  # bytes of resident memory that have nothing to do with the program
TIMED_STEPS = 400
STYLES = {
    "Implicit()": ("#1b1b3a", "-", "o"),
    "Preconditioned(Newton)": ("#1b1b3a", "--", "v"),
    "Reparameterized(exp)": ("#5b2a7a", "-", "P"),
    "OneStep()": ("#5b2a7a", ":", "x"),
    'Unrolled(mode="forward")': ("#4f9d69", "--", "D"),
    f"Unrolled(last={points.LAST})": ("#4f9d69", ":", "^"),
    SQRT: ("#2c6fbb", "-.", "s"),
    PLAIN: ("#2c6fbb", "-", "o"),
    HAND: ("0.5", "-", "d"),
    JAXOPT: ("#e07b1a", "-", "s"),
}


def measure_all(workers: int, bar: Any) -> dict[str, list[Point]]:
    """Measure every point in a fresh process; their parent has imported JAX, but not started it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["memory_points"])
    found: dict[str, list[Point]] = {name: [] for name in points.CONTENDERS}
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        jobs = []
        for name in points.CONTENDERS:
            for steps in GRIDS[name]:
                job = pool.submit(points.measure, name, steps, MOST_STEPS, MOST_BYTES)
                jobs.append(job)
        for job in as_completed(jobs):
            point = job.result()
            found[point.name].append(point)
            bar.set_description(f"{point.name}, {point.steps} steps")
            bar.update()
    return {name: sorted(row, key=lambda point: point.steps) for name, row in found.items()}


def summarise(row: list[Point]) -> dict[str, Any]:
    """Compare the points of a contender with one another."""
    fixed = row[0].predicted  # of one step, or of any number where it is constant
    rest = [point for point in row if point.steps > 1]
    steps = np.array([point.steps for point in rest])
    sizes = np.array([point.predicted for point in rest])
    growing = np.maximum(sizes - fixed, 1)
    inside = steps >= ASYMPTOTIC
    slope = np.polyfit(np.log(steps[inside]), np.log(growing[inside]), 1)[0]
    measured = [point.measured for point in rest if point.measured is not None]
    return {
        "fixed": fixed,
        "steps": steps,
        "predicted": sizes,
        "measured": [point.measured for point in rest],
        "gradient": [point.gradient for point in rest],
        "spread": sizes.max() / sizes.min() - 1,
        "measured_spread": max(measured) - min(measured) if measured else None,
        "slope": slope,
        "per_step": (sizes[-1] - sizes[-2]) / (steps[-1] - steps[-2]) / VECTOR,
    }


def judge(rows: dict[str, dict[str, Any]], ratio: float) -> None:
    """Name what is not as theory has it."""
    for name, row in rows.items():
        claims: dict[str, bool] = {}
        if name in CONSTANT:
            claims["constant"] = row["spread"] <= 0.05
            if row["measured_spread"] is not None:
                claims["resident"] = row["measured_spread"] <= NOISE
        elif name == PLAIN:
            claims["slope"] = abs(row["slope"] - 1) <= 0.1
            claims["two vectors per step"] = abs(row["per_step"] - 2) <= 0.2
        elif name == SQRT:
            claims["slope"] = abs(row["slope"] - 0.5) <= 0.1
            claims["time"] = ratio <= 2
        if name in (PLAIN, SQRT, HAND, JAXOPT):
            pairs = zip(row["predicted"], row["measured"], strict=True)
            claims["resident"] = all(
                measured is None or abs(measured - predicted) <= NOISE + 0.2 * predicted
                for predicted, measured in pairs
            )
        row["missed"] = [claim for claim, is_met in claims.items() if not is_met]


def times() -> tuple[float, float, float]:
    """Return seconds of checkpointed and plain reverse mode, and their ratio."""
    arguments = points.make_arguments()
    programs = [points.compiled(name, TIMED_STEPS, arguments) for name in (SQRT, PLAIN)]
    first, second = (lambda program=program: program(*arguments) for program in programs)
    return paired(first, second, repeats=7)


def table(rows: dict[str, dict[str, Any]], timed: tuple[float, float, float]) -> list[str]:
    lines = [
        f"Megabytes of temporaries by XLA, and of resident memory in brackets; x has "
        f"{VECTOR / MEGABYTE:.2f} MB, the data {ROWS * VECTOR / MEGABYTE:.1f} MB",
        "",
        f"{'':30}"
        + "".join(f"{f'T = {steps}':>16}" for steps in FEW_STEPS)
        + f"{'fixed':>9}{'slope':>7}{'per step':>10}",
    ]
    for name, row in rows.items():
        cells = dict.fromkeys(FEW_STEPS, "")
        entries = zip(row["steps"], row["predicted"], row["measured"], strict=True)
        for steps, predicted, measured in entries:
            if steps in cells:
                resident = "" if measured is None else f" ({measured / MEGABYTE:.0f})"
                cells[steps] = f"{predicted / MEGABYTE:.1f}{resident}"
        is_constant = row["spread"] <= 0.05
        slope = "0" if is_constant else f"{row['slope']:.2f}"
        remark = f"  missed: {', '.join(row['missed'])}" if row["missed"] else ""
        lines.append(
            f"{name:30}"
            + "".join(f"{cell:>16}" for cell in cells.values())
            + f"{row['fixed'] / MEGABYTE:9.1f}{slope:>7}{row['per_step']:10.2f}{remark}"
        )
    sqrt, plain, ratio = timed
    lines += [
        "",
        f"Time of {TIMED_STEPS} steps, forward and back: {plain:.3f} s with Unrolled(), "
        f"{sqrt:.3f} s with checkpoints; ratio {ratio:.2f}, at most 2 in theory",
    ]
    return lines


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(10, 5.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    for name, row in rows.items():
        color, line, marker = STYLES[name]
        sizes = row["predicted"] / MEGABYTE
        axes.plot(row["steps"], sizes, color=color, ls=line, marker=marker, ms=5, label=name)
        run = [(t, m / MEGABYTE) for t, m in zip(row["steps"], row["measured"], strict=True) if m]
        large = [(t, m) for t, m in run if m > NOISE / MEGABYTE]
        if large:
            axes.scatter(*zip(*large, strict=True), s=90, facecolors="none", edgecolors=color)
    steps = np.geomspace(10, 10_000, 50)
    for name, vectors in ((PLAIN, 2 * steps), (SQRT, 4 * np.sqrt(steps))):
        # That of one step, of which the vectors are in it, and what theory has on top of it.
        sizes = rows[name]["fixed"] + (vectors - vectors[0] / steps[0]) * VECTOR
        label = "theory: 2 T and 4 sqrt(T) vectors" if name == PLAIN else None
        axes.plot(steps, sizes / MEGABYTE, color="0.85", lw=6, zorder=0, label=label)
    axes.axhline(ROWS * VECTOR / MEGABYTE, color="0.8", lw=1, zorder=0)
    axes.annotate(
        "the data",
        (10, ROWS * VECTOR / MEGABYTE),
        xytext=(0, -3),
        textcoords="offset points",
        va="top",
        color="0.4",
        fontsize=9,
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("inner steps T")
    axes.set_ylabel("memory besides arguments [MB]")
    axes.set_title("Lines: temporaries by XLA; circles: growth of the peak resident memory")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", lw=0.8)
    axes.set_axisbelow(True)
    figure.legend(loc="outside right center", frameon=False, reverse=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR")
    parser.add_argument("--workers", type=int, default=2, help="processes; default: %(default)s")
    options = parser.parse_args()
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    began = time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").touch()  # fails now, not after all the work
    total = sum(map(len, GRIDS.values()))
    with tqdm(total=total, disable=None, leave=False) as bar:
        found = measure_all(options.workers, bar)
    timed = times()
    rows = {name: summarise(row) for name, row in found.items()}
    judge(rows, timed[2])
    draw(rows, options.output / "memory.png")
    print(*table(rows, timed), sep="\n")
    run = {
        "features": DIM,
        "rows": ROWS,
        "seconds": time.perf_counter() - began,
        "seconds_checkpointed_plain_ratio": timed,
        **{name: metadata.version(name) for name in ("jax", "bilevax", "jaxopt")},
    }
    outcome.write({"run": run, "contenders": rows}, options.output)
    failures = [
        f"{name}: {', '.join(row['missed'])}" for name, row in rows.items() if row["missed"]
    ]
    outcome.tell(failures)
    print(f"\n{run['seconds']:.0f} seconds; figure and all numbers are in {options.output}")
    if failures:
        parser.exit(1)


if __name__ == "__main__":
    main()
