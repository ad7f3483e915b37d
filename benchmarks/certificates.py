"""How true are certificates, and what does a requested accuracy cost?

    make certificates [ARGS="--sizes 5 12 30 --output DIR"]

Two hundred random problems: ridge, logistic and multinomial regression, a nonlinear root and a
contraction, of 5 to 200 unknowns, with Jacobians F_1 of condition numbers from 1 to 1e6. First, the
certificate of a hypergradient of known error, between 1e-6 and 0.3 relatively, is compared with
that error. Second, hypergradients are asked for with relative accuracies of 1e-1 to 1e-6; their
true error and their cost are compared with those of an oracle (see `requested_accuracy.py`). The
truth is computed with dense matrices in NumPy.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from dense_truth import Truth, solve_exactly
from jax.tree_util import Partial
from matplotlib.figure import Figure
from random_problems import SIZES, Batch, batches, outer
from requested_accuracy import ACCURACIES, Costs, measure_costs
from tqdm import tqdm

import bilevax as bx

jax.config.update("jax_enable_x64", True)

RULES = ("implicit", "Newton step")
SMALLEST, LARGEST = 1e-6, 0.3  # relative errors of hypergradients in the first part


class Ratios(NamedTuple):
    """One entry per problem.

    Attributes:
      true: relative errors.
      ratio: estimated over true errors.
      contraction: of the certificates.
      status: of the certificates.
    """

    true: np.ndarray
    ratio: np.ndarray
    contraction: np.ndarray
    status: np.ndarray


def make_rule(name: str, linear_solver: bx.LinearSolver) -> bx.Rule:
    rule = bx.Implicit(linear_solver)
    if name == "implicit":
        return rule
    return bx.Preconditioned(rule, step=bx.NewtonStep(linear_solver))


def linear_solver(batch: Batch) -> bx.LinearSolver:
    # The default of 30 vectors is too few for condition numbers of 1e6.
    general = batch.family in ("root", "contraction")
    return bx.GMRES(restart=batch.size) if general else bx.CG()


def point_of_error(
    truth: Truth, estimate: Callable[[np.ndarray], np.ndarray], direction: np.ndarray, target: float
) -> np.ndarray:
    """Return x on a ray from x* at which an estimator has about the error that is aimed at."""
    unit = direction * np.linalg.norm(truth.x) / np.linalg.norm(direction)
    low, high = -10.0, 3.0  # of the logarithm of the distance
    for _ in range(25):
        middle = (low + high) / 2
        if truth.error(estimate(truth.x + 10**middle * unit)) < target:
            low = middle
        else:
            high = middle
    return truth.x + 10**low * unit


def draw_points(truths: list[Truth], name: str, rng: np.random.Generator) -> np.ndarray:
    """Return inexact solutions with errors of all kinds and sizes."""
    points = []
    for truth in truths:
        rough = rng.normal(size=truth.x.shape)
        smooth = np.linalg.solve(truth.derivatives(truth.x).jacobian, rough)  # as solvers leave it
        direction = (rough, smooth, truth.x)[rng.integers(3)]
        target = 10 ** rng.uniform(np.log10(SMALLEST), np.log10(LARGEST))
        points.append(point_of_error(truth, dense_estimator(truth, name), direction, target))
    return np.stack(points)


def dense_estimator(truth: Truth, name: str) -> Callable[[np.ndarray], np.ndarray]:
    if name == "implicit":
        return truth.implicit
    return lambda x: truth.implicit(truth.newton_step(x))


def measure_ratios(batch: Batch, truths: list[Truth], name: str) -> Ratios:
    """Compare estimated and true errors at one inexact solution of every problem."""
    rule = make_rule(name, linear_solver(batch))

    @jax.jit
    @jax.vmap
    def certify(data: Any, validation: Any, x: jax.Array, y: jax.Array) -> bx.Certificate:
        problem, g = batch.problem(data), Partial(outer, validation)
        return bx.hypergradient_error(g, problem, rule, x, y)

    points = draw_points(truths, name, np.random.default_rng([batch.size, *map(ord, batch.family)]))
    certificate = certify(batch.data, batch.validation, points, batch.y)
    pairs = list(zip(truths, points, strict=True))
    gradients = [dense_estimator(truth, name)(x) for truth, x in pairs]
    errors = [np.linalg.norm(g - t.gradient) for g, t in zip(gradients, truths, strict=True)]
    return Ratios(
        true=np.array([t.error(g) for t, g in zip(truths, gradients, strict=True)]),
        ratio=np.asarray(certificate.absolute) / np.array(errors),
        contraction=np.asarray(certificate.contraction),
        status=np.asarray(certificate.status),
    )


def stack(parts: Sequence[tuple[Any, ...]]) -> Any:
    return type(parts[0])(*map(np.concatenate, zip(*parts, strict=True)))


def describe_ratios(name: str, found: Ratios) -> list[str]:
    """Return lines that tell how estimated errors compare with true ones."""
    ratio = found.ratio
    quantiles = np.quantile(ratio, (0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1))
    near = np.mean((ratio >= 0.8) & (ratio <= 1.25))
    far = np.sum((ratio < 0.5) | (ratio > 2))
    worst = int(np.argmax(np.abs(np.log(ratio))))
    return [
        f"{name}: {len(ratio)} hypergradients with relative errors of "
        f"{found.true.min():.1e} to {found.true.max():.1e}",
        "  quantiles 0, 1, 5, 25, 50, 75, 95, 99, 100 % of the ratio:",
        "  " + "  ".join(f"{quantile:.4f}" for quantile in quantiles),
        f"  in [0.8, 1.25]: {near:.1%}; outside of [0.5, 2]: {far}",
        f"  worst: {ratio[worst]:.4f} at an error of {found.true[worst]:.1e}, contraction "
        f"{found.contraction[worst]:.1e}, status {bx.Status(int(found.status[worst])).name}",
        f"  not CONVERGED: {np.sum(found.status != bx.Status.CONVERGED)}",
    ]


def describe_costs(name: str, found: Costs) -> list[str]:
    """Return a table of true errors and costs, one row per accuracy."""
    lines = [
        f"{name}: {len(found.error)} problems, errors over the accuracy asked for, costs over "
        "those of the oracle",
        f"  {'accuracy':>8} {'reached':>8} {'largest error':>14} {'CONVERGED':>10} "
        f"{'cost, all':>10} {'median':>7} {'largest':>8}",
    ]
    columns = [*range(len(ACCURACIES)), slice(None)]
    for column in columns:
        error, status, cost, oracle = (
            np.ravel(values[:, column])
            for values in (found.error, found.status, found.cost, found.oracle)
        )
        known = np.isfinite(oracle)
        ratio = cost[known] / oracle[known]
        label = "all" if isinstance(column, slice) else f"{ACCURACIES[column]:.0e}"
        total = cost[known].sum() / oracle[known].sum()
        lines.append(
            f"  {label:>8} {np.mean(error <= 1):>8.1%} {error.max():>14.3f} "
            f"{np.mean(status == bx.Status.CONVERGED):>10.1%} {total:>10.2f} "
            f"{np.median(ratio):>7.2f} {ratio.max():>8.1f}"
        )
    if not np.all(np.isfinite(found.oracle)):
        lines.append(f"  without an oracle: {np.sum(~np.isfinite(found.oracle))}")
    return lines


def plot(ratios: dict[str, list[Ratios]], costs: dict[str, list[Costs]], path: Path) -> None:
    """Draw estimated against true errors, and true errors against the accuracy asked for."""
    figure = Figure(figsize=(11, 5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = {"implicit": ("#1b1b3a", "o"), "Newton step": ("#e07b1a", "^")}
    for shift, (name, (color, marker)) in zip((0.87, 1.15), styles.items(), strict=True):
        found, asked = stack(ratios[name]), stack(costs[name])
        left.plot(found.true, found.ratio * found.true, marker, color=color, ms=4, label=name)
        accuracy = np.broadcast_to(ACCURACIES * shift, asked.error.shape)
        error = np.maximum(asked.error * ACCURACIES, 1e-12)
        right.plot(
            accuracy.ravel(), error.ravel(), marker, color=color, ms=3, alpha=0.4, label=name
        )
    for axes, text in ((left, "estimate = truth"), (right, "error = accuracy asked for")):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.axline((1e-3, 1e-3), (1e-2, 1e-2), color="0.4", lw=1, label=text)
        axes.grid(color="0.9", lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    left.set_xlabel("true relative error of the hypergradient")
    left.set_ylabel("estimated relative error")
    left.set_title("Certificates on random problems")
    right.set_xlabel("relative accuracy asked for")
    right.set_ylabel("true relative error (1e-12 or less at the bottom)")
    right.set_title("Hypergradients of a requested accuracy")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/output/certificates"))
    options = parser.parse_args()
    ratios: dict[str, list[Ratios]] = {name: [] for name in RULES}
    costs: dict[str, list[Costs]] = {name: [] for name in RULES}
    chosen = [batch for batch in batches() if batch.size in options.sizes]
    for batch in tqdm(chosen, disable=None):
        truths = solve_exactly(batch)
        for name in RULES:
            if name == "Newton step" and batch.family == "ridge":
                continue  # which it solves to rounding
            ratios[name].append(measure_ratios(batch, truths, name))
            solver = linear_solver(batch)
            costs[name].append(measure_costs(batch, truths, make_rule(name, solver), solver))
    results: dict[str, Any] = {"accuracies": ACCURACIES.tolist()}
    print("Estimated over true errors of hypergradients")
    for name in RULES:
        found = stack(ratios[name])
        print("\n".join(describe_ratios(name, found)))
        results[f"ratios, {name}"] = {k: v.tolist() for k, v in found._asdict().items()}
    print("\nHypergradients of a requested accuracy")
    for name in RULES:
        found = stack(costs[name])
        print("\n".join(describe_costs(name, found)))
        results[f"costs, {name}"] = {k: v.tolist() for k, v in found._asdict().items()}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(results))
    plot(ratios, costs, options.output / "certificates.png")
    print(f"\nwritten to {options.output}: results.json, certificates.png")


if __name__ == "__main__":
    main()
