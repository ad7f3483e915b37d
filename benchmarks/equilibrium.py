"""What the hypergradient of an equilibrium model costs, by library: `make equilibrium`.

The model is a tanh layer z = tanh(W z + U u + b) of width 512 with a linear read-out, a batch of
256 in float32; wanted is the gradient of the loss in (W, U, b). For each contender of
`equilibrium_contenders.py` there is a ladder of tolerances, or of numbers of steps:

  error     of the gradient, relative to one computed in float64 without any of the libraries
  time      of a compiled call: medians of interleaved calls
  compile   tracing and compiling, without a compilation cache

The time to an error of 1e-4 is that of the fastest rung that reaches it. Ladders are walked once to
find errors and candidates, which are then timed again, together, and the winners once more. Ratios
are to the fastest contender of bilevax; those of the goals come from many more rounds in which only
the fastest of each library run. "defaults" are what a library does untold; by hand
is the same algorithm without a library, and "user's own Neumann" one that JAXopt does not have.
In float32 the BiCGStab of Lineax takes negative coefficients, which are
to be expected where T_1 - I is the matrix, for a breakdown.
"""

import argparse
import itertools
import json
import logging
import os
import platform
import random
import re
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import equilibrium_figures as figures
import jax
import numpy as np
from equilibrium_contenders import BATCH, DIM, Contender, Data, contenders, make_data, true_gradient
from tqdm import tqdm

OUTPUT = Path(__file__).parent / "output" / "equilibrium"
MATRICES = ["gaussian", "orthogonal"]
TARGET = 1e-4
GOALS = {"tuned": 1.0, "default": 1.5}  # time of the best peer over ours, at least
MEMORY = 8e9  # bytes of temporaries at most
CURVE = 6  # points of a curve that are timed again
NEAR = 3  # candidates for the fastest one that is accurate
SLOW = 0.3  # seconds; beyond, a call is timed in the first round only


class Program(NamedTuple):
    """A compiled contender; `call` is None where it cannot run, and `remark` says why."""

    contender: Contender
    compile_seconds: float | None
    call: Callable[[Any, Data], Any] | None
    remark: str = ""


class Point(NamedTuple):
    """A rung of a ladder on one model."""

    program: Program
    numbers: tuple[Any, ...]
    error: float
    seconds: float


def build(contender: Contender, data: Data) -> Program:
    """Compile a contender for all rungs of its ladder: their numbers are arguments."""
    numbers = _typed(contender.ladder[0])
    began = time.perf_counter()
    try:
        compiled = jax.jit(contender.gradient).lower(numbers, data).compile()
    except Exception as error:
        return Program(contender, None, None, f"does not compile: {_message(error)}")
    seconds = time.perf_counter() - began
    analysis: Any = compiled.memory_analysis()
    if analysis.temp_size_in_bytes > MEMORY:
        remark = f"not run: needs {analysis.temp_size_in_bytes / 1e9:.0f} GB"
        return Program(contender, seconds, None, remark)
    return Program(contender, seconds, compiled)


def walk(program: Program, data: Data, truth: Sequence[np.ndarray]) -> tuple[list[Point], str]:
    """Run the rungs of a ladder; return the points, and what failed if all of them did.

    The numbers get tighter along a ladder, the last one first. What is tighter than needed, or than
    the other number allows, is left out.
    """
    points, remark = [], program.remark
    for _, rungs in itertools.groupby(program.contender.ladder if program.call else (), _inner):
        errors = [float("inf")] * 3
        for numbers in rungs:
            try:
                gradient, seconds = _call(program, numbers, data)
            except Exception as error:
                remark = f"fails: {_message(error)}"
                continue
            errors.append(_distance(gradient, truth))
            points.append(Point(program, numbers, errors[-1], seconds))
            if errors[-1] < TARGET / 30 or errors[-1] > 0.8 * errors[-4]:
                break
        if len(errors) == 4 and errors[-1] < TARGET / 30:
            break
    return points, "" if points else remark


def candidates(points: list[Point]) -> list[Point]:
    """Return the points that no other one beats in both error and time, and near-winners."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: point.seconds):
        if not front or point.error < 0.8 * front[-1].error:
            front.append(point)
    accurate = sorted((p for p in points if p.error <= TARGET), key=lambda point: point.seconds)
    near = accurate[:NEAR]
    spread = np.unique(np.linspace(0, len(front) - 1, CURVE).round().astype(int)) if front else []
    return near + [front[index] for index in spread if front[index] not in near]


def timed(points: list[Point], data: Data, rounds: int) -> list[Point]:
    """Time points in rounds of random order.

    Times are relative to the median of their round, so that a slow round slows everyone alike.
    """
    seconds = np.full((rounds, len(points)), np.nan)
    for number, row in enumerate(seconds):
        order = [i for i, p in enumerate(points) if number == 0 or p.seconds < SLOW]
        random.shuffle(order)
        for index in order:
            row[index] = _call(points[index].program, points[index].numbers, data)[1]
    typical = np.nanmedian(seconds[:, [p.seconds < SLOW for p in points]], axis=1)
    medians = np.median(typical) * np.nanmedian(seconds / typical[:, None], axis=0)
    return [p._replace(seconds=float(m)) for p, m in zip(points, medians, strict=True)]


def run_case(
    matrix: str, norm: float, programs: list[Program], rounds: int, step: Callable[[str], None]
) -> dict[str, Any]:
    host = make_data(matrix, norm)
    truth = true_gradient(host)
    data = jax.device_put(host)
    found, remarks = [], []
    for program in programs:
        step(f"{matrix} {norm:g}: {program.contender.library}, {program.contender.name}")
        points, remark = walk(program, data, truth)
        found.append(candidates(points))
        remarks.append(remark)
    step(f"{matrix} {norm:g}: candidates")
    again = iter(timed([point for points in found for point in points], data, rounds))
    found = [list(itertools.islice(again, len(points))) for points in found]
    step(f"{matrix} {norm:g}: time to {TARGET:g}")
    winners = {place: w for place, points in enumerate(found) if (w := fastest(points))}
    racing = timed(list(winners.values()), data, 3 * rounds)
    ours = min(point.seconds for point in racing if _is(point, "bilevax", "tuned"))
    best = {
        place: _for_json(point) | {"ratio": point.seconds / ours}
        for place, point in zip(winners, racing, strict=True)
    }
    entries = [
        {
            "library": program.contender.library,
            "name": program.contender.name,
            "kind": program.contender.kind,
            "fields": program.contender.fields,
            "compile_seconds": program.compile_seconds,
            "remark": remark,
            "points": [_for_json(point) for point in points],
            "best": best.get(place),
        }
        for place, (program, points, remark) in enumerate(
            zip(programs, found, remarks, strict=True)
        )
    ]
    step(f"{matrix} {norm:g}: goals")
    goals = judge(racing, data, 10 * rounds)
    return {"matrix": matrix, "norm": norm, "contenders": entries, "goals": goals}


def judge(racing: list[Point], data: Data, rounds: int) -> list[dict[str, Any]]:
    """Compare the fastest configurations of the peers with ours."""
    finalists: dict[tuple[str, str], Point] = {}
    for point in sorted(racing, key=lambda point: point.seconds):
        finalists.setdefault((point.program.contender.library, point.program.contender.kind), point)
    final = dict(zip(finalists, timed(list(finalists.values()), data, rounds), strict=True))
    ours = final["bilevax", "tuned"].seconds
    goals = []
    for library in ("JAXopt", "Optimistix"):
        for kind, goal in GOALS.items():
            peer = final.get((library, kind))
            ratio = None if peer is None else peer.seconds / ours
            met = ratio is None or ratio >= goal
            goals.append(
                {"library": library, "kind": kind, "ratio": ratio, "goal": goal, "met": met}
            )
    return goals


def fastest(points: list[Point]) -> Point | None:
    accurate = [point for point in points if point.error <= TARGET]
    return min(accurate, key=lambda point: point.seconds, default=None)


def _inner(numbers: tuple[Any, ...]) -> Any:
    return numbers[:1]


def _typed(numbers: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(np.int32(n) if isinstance(n, int) else np.float32(n) for n in numbers)


def _call(program: Program, numbers: tuple[Any, ...], data: Data) -> tuple[Any, float]:
    assert program.call is not None
    arguments = _typed(numbers)
    began = time.perf_counter()
    gradient = jax.block_until_ready(program.call(arguments, data))
    return gradient, time.perf_counter() - began


def _distance(gradient: Any, truth: Sequence[np.ndarray]) -> float:
    pairs = zip(map(np.float64, gradient), truth, strict=True)
    difference = sum(np.sum((a - b) ** 2) for a, b in pairs)
    distance = float(np.sqrt(difference / sum(np.sum(b**2) for b in truth)))
    return distance if np.isfinite(distance) else float("inf")


def _for_json(point: Point) -> dict[str, Any]:
    return {"numbers": point.numbers, "error": point.error, "seconds": point.seconds}


def _is(point: Point, library: str, kind: str) -> bool:
    return (point.program.contender.library, point.program.contender.kind) == (library, kind)


def _message(error: Exception) -> str:
    told = re.search(r"EquinoxRuntimeError: (.*)", str(error))  # by Lineax, from a callback
    return told[1] if told else f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def describe_run(rounds: int) -> dict[str, Any]:
    device = jax.devices()[0]
    libraries = ("jaxlib", "bilevax", "jaxopt", "optimistix", "lineax")
    return {
        "device": f"{device.platform} ({device.device_kind}), {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in libraries},
        "width": DIM,
        "batch": BATCH,
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4, help="of timing (default %(default)s)")
    parser.add_argument(
        "--matrix", nargs="+", choices=MATRICES, default=MATRICES, help="W (default: both)"
    )
    parser.add_argument("--norm", type=float, default=0.9, help="of W (default %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, metavar="DIR", help="default: %(default)s"
    )
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if not 0 < options.norm < 1:
        parser.error("--norm must be between 0 and 1: the layer must be a contraction")
    cases = [(matrix, options.norm) for matrix in options.matrix]
    jax.config.update("jax_enable_compilation_cache", False)
    # Contenders may fail; the table tells.
    logging.getLogger("jax._src.callback").setLevel(logging.CRITICAL)
    random.seed(0)
    options.output.mkdir(parents=True, exist_ok=True)
    everyone = contenders()
    with tqdm(
        total=len(everyone) * (1 + len(cases)) + 3 * len(cases), disable=None, leave=False
    ) as bar:

        def step(what: str) -> None:
            bar.set_description(what)
            bar.update()

        programs = []
        for contender in everyone:
            step(f"compiling {contender.library}, {contender.name}")
            programs.append(build(contender, make_data(*cases[0])))
        measured = [run_case(*case, programs, options.rounds, step) for case in cases]
    results = {"run": describe_run(options.rounds), "target": TARGET, "cases": measured}
    print(*figures.table(results), sep="\n")
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    figures.draw(measured, TARGET, options.output / "error-against-time.png")


if __name__ == "__main__":
    main()
