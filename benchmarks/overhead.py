"""What bilevax costs over the same algorithm written by hand: `make bench`.

One hypergradient of three problems goes through `solution_map` and through `by_hand.py`, which
takes the same iterations and products, but for one that rounding decides about; the counts and the
results are compared first. Then:

  flops, bytes   XLA's cost analysis of the compiled programs, with the body of every loop times the
                 trips that it makes
  time           of a compiled call: median of paired ratios, calls interleaved
  first call     tracing and compiling functions that are made anew, without a compilation cache
  memory         temporaries and outputs of the compiled programs

Last, 32 hyperparameter vectors under `vmap` against 32 calls one after the other.
"""

import argparse
import functools
import json
import os
import platform
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import by_hand
import jax
import jax.numpy as jnp
import measure
import problems
import with_bilevax
from tqdm import tqdm

OUTPUT = Path(__file__).parent / "output" / "overhead.json"
GOALS = {"flops": 1.02, "bytes": 1.02, "time": 1.10, "first_call": 1.50}  # at most
VMAP_GOAL = 4.0  # times faster, at least
LANES = 32
TERMS = 20  # of the Neumann series


class Case(NamedTuple):
    name: str
    sizes: str
    algorithm: str
    ours: Callable[..., Any]
    hand: Callable[..., Any]
    make_args: Callable[[], tuple[Any, ...]]
    trips: Callable[[by_hand.Counts], tuple[measure.Trips, measure.Trips]]


def first_order_trips(counts: by_hand.Counts) -> tuple[measure.Trips, measure.Trips]:
    # CG of bilevax makes its check in the loop; by hand it stands after the loop.
    return [counts.inner, counts.adjoint + 1], [counts.inner, counts.adjoint]


def newton_trips(counts: by_hand.Counts) -> tuple[measure.Trips, measure.Trips]:
    steps, trials = counts.inner, counts.trials / counts.inner
    return (
        [(steps, [(counts.inner_cg + steps) / steps, trials]), counts.adjoint + 1],
        [(steps, [counts.inner_cg / steps, trials]), counts.adjoint],
    )


def equilibrium_trips(counts: by_hand.Counts) -> tuple[measure.Trips, measure.Trips]:
    return [counts.inner, counts.adjoint], [counts.inner, counts.adjoint]


def ridge_args() -> tuple[Any, ...]:
    return jnp.full(200, -2.0), *problems.regression_data(2000, 200, binary=False)


def logistic_args() -> tuple[Any, ...]:
    return jnp.full(2000, -5.0), *problems.regression_data(20000, 2000, binary=True)


CASES = [
    Case(
        "ridge",
        "n = 2000, d = 200, a penalty per feature",
        "gradient descent; CG adjoint",
        with_bilevax.ridge,
        by_hand.ridge,
        ridge_args,
        first_order_trips,
    ),
    Case(
        "logistic",
        "n = 20000, d = 2000, a penalty per feature",
        "Newton-CG with backtracking; CG adjoint",
        with_bilevax.logistic,
        by_hand.logistic,
        logistic_args,
        newton_trips,
    ),
    Case(
        "equilibrium",
        "tanh layer of size 200, 100 inputs, batch 64",
        f"fixed-point iteration; {TERMS} Neumann terms",
        functools.partial(with_bilevax.equilibrium, terms=TERMS),
        functools.partial(by_hand.equilibrium, terms=TERMS),
        lambda: problems.layer_data(200, 100, 10, 64),
        equilibrium_trips,
    ),
]


def anew(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return an equal function that JAX has not seen yet."""
    return lambda *args: function(*args)


def gradient_by_hand(case: Case) -> Callable[..., Any]:
    """Return the function by hand without its counts."""
    return lambda *args: case.hand(*args)[0]


def check_same_work(
    case: Case, args: tuple[Any, ...]
) -> tuple[by_hand.Counts, by_hand.Counts, float]:
    """Return the iterations of both and the distance of the results; raise if they differ.

    Iterations may differ by one: rounding decides about the last one. A report counts no products
    and trials inside of iterations; those are taken to be as many in each.
    """
    gradient, counts = jax.jit(anew(case.hand))(*args)
    hand = by_hand.Counts(*map(int, counts))
    report = jax.jit(functools.partial(case.ours, report=True))(*args)
    inner, adjoint = int(report.inner.iterations), int(report.adjoint.iterations)
    if max(abs(inner - hand.inner), abs(adjoint - hand.adjoint)) > 1:
        found = f"{(inner, adjoint)} iterations with bilevax, by hand {hand}"
        raise RuntimeError(f"{case.name}: {found}")
    per_step = inner / hand.inner
    ours = by_hand.Counts(inner, hand.inner_cg * per_step, hand.trials * per_step, adjoint)
    distance = problems.distance(jax.jit(anew(case.ours))(*args), gradient)
    if not distance < 1e-5:
        raise RuntimeError(f"{case.name}: the results differ by {distance:.1e}")
    return ours, hand, distance


def run_case(case: Case, repeats: int, step: Callable[[str], None]) -> dict[str, Any]:
    step(f"{case.name}: results")
    args = case.make_args()
    our_counts, hand_counts, distance = check_same_work(case, args)
    ours = jax.jit(anew(case.ours)).lower(*args).compile()
    hand = jax.jit(gradient_by_hand(case)).lower(*args).compile()
    our_trips, hand_trips = case.trips(our_counts)[0], case.trips(hand_counts)[1]
    work = [measure.executed_work(ours, our_trips), measure.executed_work(hand, hand_trips)]
    program = [measure.program_work(ours), measure.program_work(hand)]
    step(f"{case.name}: time")
    time = measure.paired(lambda: ours(*args), lambda: hand(*args), repeats)
    step(f"{case.name}: first call")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), args)
    first_call = measure.paired_compilations(
        lambda: anew(case.ours), lambda: gradient_by_hand(case), shapes, repeats
    )
    measured = {
        "flops": (*(w.flops for w in work), work[0].flops / work[1].flops),
        "bytes": (*(w.bytes for w in work), work[0].bytes / work[1].bytes),
        "time": time,
        "first_call": first_call,
    }
    memory = [measure.memory(ours), measure.memory(hand)]
    return {
        "name": case.name,
        "sizes": case.sizes,
        "algorithm": case.algorithm,
        "counts": {"bilevax": our_counts._asdict(), "by_hand": hand_counts._asdict()},
        "relative_distance_of_results": distance,
        **{
            key: {
                "bilevax": a,
                "by_hand": b,
                "ratio": ratio,
                "goal": GOALS[key],
                "met": ratio <= GOALS[key],
            }
            for key, (a, b, ratio) in measured.items()
        },
        "memory": {"bilevax": memory[0], "by_hand": memory[1], "ratio": memory[0] / memory[1]},
        "loop_bodies_once": {
            "flops_ratio": program[0].flops / program[1].flops,
            "bytes_ratio": program[0].bytes / program[1].bytes,
        },
    }


def run_vmap(repeats: int, step: Callable[[str], None]) -> dict[str, Any]:
    """Time 32 hypergradients of ridge under `vmap` against 32 calls, with bilevax and by hand."""
    _, *data = ridge_args()
    lanes = -2 + 0.5 * jax.random.normal(jax.random.key(1), (LANES, 200))
    single = [jnp.array(lane) for lane in lanes]
    result: dict[str, Any] = {"lanes": LANES, "goal": VMAP_GOAL}
    for name, function in [("bilevax", CASES[0].ours), ("by_hand", gradient_by_hand(CASES[0]))]:
        step(f"vmap: {name}")
        one = jax.jit(anew(function))
        batched = jax.jit(jax.vmap(anew(function), in_axes=(0, None, None)))

        def sequential(one: Any = one) -> Any:
            return [one(lane, *data) for lane in single]

        def together(batched: Any = batched) -> Any:
            return batched(lanes, *data)

        distance = problems.distance(together(), jnp.stack(sequential()))
        if not distance < 1e-3:  # lanes may end an iteration apart, within the tolerance
            raise RuntimeError(f"vmap: the results differ by {distance:.1e}")
        a, b, ratio = measure.paired(sequential, together, repeats)
        result[name] = {"sequential": a, "vmap": b, "ratio": ratio, "distance": distance}
    result["met"] = result["bilevax"]["ratio"] >= VMAP_GOAL
    return result


def describe_run(repeats: int) -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "device": f"{device.platform} ({device.device_kind}), {os.cpu_count()} cores",
        "python": platform.python_version(),
        "jax": jax.__version__,
        **{name: metadata.version(name) for name in ("jaxlib", "bilevax")},
        "dtype": str(jnp.zeros(()).dtype),
        "rtol": problems.RTOL,
        "repeats": repeats,
    }


def table(results: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of an aligned table."""
    yield "  ".join(f"{key} {value}" for key, value in results["run"].items())
    units = {"flops": (1e-6, "Mflop"), "bytes": (1e-6, "MB"), "time": (1e3, "ms")}
    units |= {"first_call": (1.0, "s"), "memory": (1e-3, "kB")}
    for case in results["cases"]:
        yield ""
        yield f"{case['name']}: {case['sizes']}; {case['algorithm']}"
        yield f"  {'':14}{'bilevax':>14}{'by hand':>14}{'ratio':>9}{'goal':>9}"
        for key, (scale, unit) in units.items():
            entry = case[key]
            label = f"{key.replace('_', ' ')}, {unit}"
            numbers = f"{scale * entry['bilevax']:14.3f}{scale * entry['by_hand']:14.3f}"
            goal = f"<={entry['goal']:.2f}" if "goal" in entry else ""
            verdict = "" if entry.get("met", True) else "  missed"
            yield f"  {label:14}{numbers}{entry['ratio']:9.3f}{goal:>9}{verdict}"
    vmap = results["vmap"]
    yield ""
    yield f"vmap over {vmap['lanes']} hyperparameter vectors of ridge, against as many calls"
    yield f"  {'':14}{'calls, ms':>14}{'vmap, ms':>14}{'ratio':>9}{'goal':>9}"
    for name in ("bilevax", "by_hand"):
        entry = vmap[name]
        numbers = f"{1e3 * entry['sequential']:14.3f}{1e3 * entry['vmap']:14.3f}"
        goal = f">={vmap['goal']:.2f}" if name == "bilevax" else ""
        verdict = "  missed" if name == "bilevax" and not vmap["met"] else ""
        yield f"  {name.replace('_', ' '):14}{numbers}{entry['ratio']:9.3f}{goal:>9}{verdict}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15, help="paired measurements (default 15)")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    jax.config.update("jax_enable_compilation_cache", False)

    with tqdm(total=3 * len(CASES) + 2, disable=None, leave=False) as bar:

        def step(what: str) -> None:
            bar.set_description(what)
            bar.update()

        results: dict[str, Any] = {
            "run": describe_run(options.repeats),
            "cases": [run_case(case, options.repeats, step) for case in CASES],
            "vmap": run_vmap(options.repeats, step),
        }
    print(*table(results), sep="\n")
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
