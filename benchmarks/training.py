"""What a whole training run costs, with and without warm starts: `make training`.

Two problems, in float64: ridge regression with 200 penalties and multinomial logistic regression
on digits with 640, tuned on validation data. Each contender takes the same outer steps, gradient
descent with Nesterov's momentum, until

    h(y) - h* <= 1e-4 (h(y0) - h*)

where h is measured at every y by a solve of its own, that counts for nobody. h* comes from a long
run with accurate hypergradients. Contenders of bilevax differ by starts (cold, warm x, warm x and
v), by schedules, and by rules; HOAG takes its own steps. Peers are used as their users do: a cold
start at a fixed tight tolerance, 1e-8, differentiated by `jax.value_and_grad`; their loop is one in
Python or a compiled one, whichever is faster. For each contender:

  steps      outer steps to the target
  gradients  of f, of everything in these steps: a product with the Hessian is two; a gradient of g,
             and what is spent on scales, the safeguard and certificates is in there; what XLA may
             share is counted each time
  products   with the Hessian
  time       of the compiled run: medians of interleaved runs; of slow ones, of a single run
  compile    tracing and compiling, without a compilation cache

What is claimed: `Adaptive` with warm x and v needs at least 4 times fewer gradients than the cold
start, and at least 3 times less time than the fastest recipe of each peer. Whatever is not so is
listed as missed, and then the exit status is 1.
"""

import argparse
import logging
import random
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import outcome
import training_figures as figures
import training_problems
from tqdm import tqdm
from training_contenders import ADAPTIVE, ADAPTIVE_NEWTON, COLD, Contender, contenders

OUTPUT = Path(__file__).parent / "output" / "training"
TARGET = 1e-4  # of h(y0) - h*
STEPS = 150  # outer steps at most
STRIDE = 5  # steps between two looks at h
SLOW = 4.0  # seconds; beyond, a run that is not a finalist is timed once
FEWER_GRADIENTS, LESS_TIME = 4.0, 3.0


class Run(NamedTuple):
    """A contender's run to the target."""

    contender: Contender
    advance: Callable[[Any, int], Any]
    compile_seconds: float
    seconds: float
    path: list[tuple[int, float]]  # steps, suboptimality
    steps: int | None  # to the target
    gradients: np.ndarray | None  # of each step
    products: np.ndarray | None


def build(contender: Contender) -> tuple[Callable[[Any, int], Any], float]:
    """Return the compiled function (carry, number of steps) -> carry, and what compiling took."""

    def advance(carry: Any, count: Any) -> Any:
        return jax.lax.fori_loop(0, count, lambda _, carry: contender.step(carry), carry)

    carry = contender.start()
    began = time.perf_counter()
    compiled = jax.jit(advance).lower(carry, np.int64(1)).compile()
    seconds = time.perf_counter() - began
    return lambda carry, count: compiled(carry, np.int64(count)), seconds


def follow(contender: Contender, gap_at: Callable[[Any], float]) -> Run:
    """Run a contender until it reaches the target, and measure h at each y that matters.

    A run ends where a step fails, as a peer's may.
    """
    advance, compile_seconds = build(contender)
    jax.block_until_ready(advance(contender.start(), 0))
    carry, taken, seconds, path = contender.start(), 0, 0.0, []
    path.append((0, gap_at(contender.read(carry))))
    reached = None
    while taken < STEPS and reached is None:
        before, began = carry, time.perf_counter()
        try:
            carry = jax.block_until_ready(advance(carry, STRIDE))
        except jax.errors.JaxRuntimeError:  # that of Optimistix, in a callback
            break
        seconds += time.perf_counter() - began
        taken += STRIDE
        if gap_at(contender.read(carry)) <= TARGET:  # some step since then is the first one
            carry, taken = advance(before, 1), taken - STRIDE + 1
            while gap_at(contender.read(carry)) > TARGET and taken < STEPS:
                carry, taken = advance(carry, 1), taken + 1
            reached = taken
        if contender.tally is not None and len(contender.tally(carry).gradients) < taken:
            break  # it has failed, and stays where it was
        path.append((taken, gap_at(contender.read(carry))))
    counts = None if contender.tally is None else contender.tally(carry)
    gradients, products = (None, None) if counts is None else counts
    return Run(contender, advance, compile_seconds, seconds, path, reached, gradients, products)


def measure(runs: list[Run], rounds: int, step: Callable[[str], None]) -> list[Run]:
    """Time runs in rounds of random order."""
    best = finalists(runs)
    again = [run for run in runs if run.steps and (run in best.values() or run.seconds < SLOW)]
    samples: dict[int, list[float]] = {id(run): [] for run in again}
    for _ in range(rounds):
        for run in random.sample(again, len(again)):
            step(f"timing {run.contender.library}, {run.contender.name}")
            samples[id(run)].append(_seconds(run))
    return [
        run._replace(seconds=float(np.median(samples[id(run)]))) if id(run) in samples else run
        for run in runs
    ]


def _seconds(run: Run) -> float:
    """Return the time of a run to the target; a peer may also take its steps one by one."""
    assert run.steps is not None
    began = time.perf_counter()
    jax.block_until_ready(run.advance(run.contender.start(), run.steps))
    compiled = time.perf_counter() - began
    if run.contender.library == "bilevax" or compiled > SLOW:
        return compiled
    carry, began = run.contender.start(), time.perf_counter()
    for _ in range(run.steps):
        carry = run.advance(carry, 1)
    jax.block_until_ready(carry)
    return min(compiled, time.perf_counter() - began)


def finalists(runs: list[Run]) -> dict[str, Run]:
    """Return the runs that claims are about: the fastest of each peer, and of bilevax by name."""
    best: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: run.seconds):
        library, name = run.contender.library, run.contender.name
        name = ADAPTIVE if name == ADAPTIVE_NEWTON else name
        key = name if library == "bilevax" else library
        if run.steps is not None and (library != "bilevax" or name in (COLD, ADAPTIVE)):
            best.setdefault(key, run)
    return best


def judge(runs: list[Run]) -> list[dict[str, Any]]:
    """Hold the claims against what was measured."""
    best = finalists(runs)
    cost = {
        name: min(
            (
                float(run.gradients.sum())
                for run in runs
                if run.contender.name == name and run.steps and run.gradients is not None
            ),
            default=float("nan"),
        )
        for name in (COLD, ADAPTIVE)
    }
    claims = [("gradients", "bilevax, cold", cost[COLD] / cost[ADAPTIVE], FEWER_GRADIENTS)]
    for peer in ("JAXopt", "Optimistix"):
        pair = [best[key].seconds if key in best else float("nan") for key in (peer, ADAPTIVE)]
        claims.append(("time", peer, pair[0] / pair[1], LESS_TIME))
    return [
        {"what": what, "over": over, "ratio": ratio, "goal": goal, "met": bool(ratio >= goal)}
        for what, over, ratio, goal in claims
    ]


def run_case(
    problem: training_problems.Training, rounds: int, step: Callable[[str], None]
) -> dict[str, Any]:
    step(f"{problem.name}: h*")
    value, hypergradient = training_problems.make_truth(problem)
    first, least = training_problems.lowest(problem, value, hypergradient)

    def gap_at(point: tuple[jax.Array, jax.Array]) -> float:
        y, x = point
        gap = (float(value(x, y)[0]) - least) / (first - least)
        return gap if np.isfinite(gap) else float("inf")

    runs = []
    for contender in contenders(problem):
        step(f"{problem.name}: {contender.library}, {contender.name}")
        runs.append(follow(contender, gap_at))
    runs = measure(runs, rounds, step)
    return {
        "name": problem.name,
        "about": problem.about,
        "h": [first, least],
        "contenders": [_for_json(run) for run in runs],
        "claims": judge(runs),
    }


def _for_json(run: Run) -> dict[str, Any]:
    contender, known = run.contender, run.gradients is not None
    spent = np.append(0, np.cumsum(run.gradients)) if known else None  # type: ignore[arg-type]
    return {
        "library": contender.library,
        "name": contender.name,
        "rule": contender.rule,
        "steps": run.steps,
        "gradients": spent[-1] if spent is not None else None,
        "products": run.products.sum() if run.products is not None else None,
        "seconds": run.seconds,
        "compile_seconds": run.compile_seconds,
        "gap": run.path[-1][1],
        "path": [
            {"step": step, "gap": gap, "gradients": None if spent is None else spent[step]}
            for step, gap in run.path
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="of timing (default %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, metavar="DIR", help="default: %(default)s"
    )
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_enable_compilation_cache", False)
    # Contenders may fail; the table tells.
    logging.getLogger("jax._src.callback").setLevel(logging.CRITICAL)
    random.seed(0)
    began = time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").touch()  # fails now, not after all the work
    with tqdm(disable=None, leave=False) as bar:

        def step(what: str) -> None:
            bar.set_description(what)
            bar.update()

        makers = (training_problems.ridge, training_problems.digits)
        cases = []
        for make in makers:
            cases.append(run_case(make(), options.rounds, step))
            with bar.external_write_mode():
                print(*figures.table(cases[-1]), sep="\n", flush=True)
    run = {
        "target": TARGET,
        "rounds": options.rounds,
        "seconds": time.perf_counter() - began,
        **{name: metadata.version(name) for name in ("jax", "bilevax", "jaxopt", "optimistix")},
    }
    outcome.write({"run": run, "cases": cases}, options.output)
    figures.draw(cases, TARGET, options.output / "training.png")
    missed = [
        f"{case['name']}: {claim['what']} of {claim['over']} over those of Adaptive is "
        f"{claim['ratio']:.2f}, at least {claim['goal']:g} claimed"
        for case in cases
        for claim in case["claims"]
        if not claim["met"]
    ]
    outcome.tell(missed)
    print(f"\n{run['seconds']:.0f} seconds; figure and all numbers are in {options.output}")
    if missed:
        parser.exit(1)


if __name__ == "__main__":
    main()
