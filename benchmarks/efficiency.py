"""How fast the error of a hypergradient falls as the inner iterates converge: `make study`.

Figures 1a, 1b, 2b, 3a and 3b of Z. Ye, G. Peyre, D. Cremers, P. Ablin, "Enhancing Hypergradients
Estimation: A Study of Preconditioning and Reparameterization", AISTATS 2024, made with bilevax:

  figure-1a-ridge-linear-preconditioners        vanilla, Jacobi and Newton preconditioning
  figure-1b-ridge-quadratic-preconditioners     the same with a quadratic outer objective
  figure-2b-logistic-logistic-preconditioners   the same for logistic regression
  figure-3a-ridge-linear-changes                vanilla, diagonal, exponential and ideal change
  figure-3a-ridge-quadratic-changes             the same, where the ideal change is first order
  figure-3b-logistic-logistic-changes           vanilla, diagonal and exponential change

The first word after the number is the inner problem, ridge or logistic regression with one penalty
exp(y_k) per feature; the second is the outer objective. Each figure shows ||Omega(x_t, y) - dh/dy||
against ||x_t - x*|| along gradient descent with step 1 / L. A seed decides y, the start, the split
into training and validation rows and the outer objective.

The table compares the slope of each curve on log-log axes with theory, and its constant, error /
distance^order, with what `efficiency_constant` predicts along x_t - x*. For a Newton step that is
||J r|| / ||x_t - x*||^2 where r = F_1^{-1} F_11[d, d] / 2, d = x_t - x*, is what the step leaves of
d, and J = d Omega/dx is that of the vanilla rule. "missed" names what is not as theory has it, such
as the constant of the exponential change where a weight is so close to zero that the last iterates
are not yet closer to the solution than that.
"""

import argparse
import functools
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import efficiency_figures as figures
import efficiency_problems as problems
import jax
import jax.numpy as jnp
import numpy as np
import outcome
from efficiency_problems import Data, DataError, Draw
from jax.numpy.linalg import norm
from tqdm import tqdm

import bilevax as bx

OUTPUT = Path(__file__).parent / "output" / "efficiency"
CASES = [("ridge", "linear"), ("ridge", "quadratic"), ("logistic", "logistic")]
LEVELS = np.geomspace(1, 1e-7, 20)  # ||x_t - x*|| / ||x_0 - x*||
MAX_STEPS = 300_000  # of gradient descent
# Slopes and constants are those of points below this level, with relative errors above `ROUNDING`.
ASYMPTOTIC = 1e-4
ROUNDING = 1e-12
EXACT = 1e-11  # relative errors that stay below it are rounding
TOLERANCE = 0.1  # how far a slope may be off, and a constant relatively
NORM_RTOL = 1e-2  # of the operator norm
ZERO = 1e-8  # an operator norm below this part of the vanilla rule's is rounding


class Descent(NamedTuple):
    """Iterates of gradient descent, and what they tend to."""

    x_star: jax.Array
    hypergradient: jax.Array
    iterates: jax.Array  # (levels, features)
    steps: jax.Array


class Errors(NamedTuple):
    """What is measured of one rule along one descent; a row per seed once they are stacked."""

    distance: Any
    error: Any
    predicted: Any  # the constant along x_t - x*, of second order for a Newton step
    operator_norm: Any
    status: Any  # of the operator norm


@functools.partial(jax.jit, static_argnames=("inner", "outer"))
def descend(inner: str, outer: str, draw: Draw) -> Descent:
    """Solve the inner problem to rounding, and approach the solution by gradient descent."""
    problem, objective = problems.problems(inner, outer, draw)
    (features, _), y = draw.train, draw.y
    x_star = bx.solution_map(problem, bx.Newton())(draw.x0, y)
    x_star, _ = problems.NEWTON.refine(problem, x_star, y)
    exact = problems.hypergradient(objective, problem, problems.VANILLA, x_star, y)
    largest = problems.CURVATURE[inner] * norm(features, 2) ** 2 / len(features)
    solver = bx.GradientDescent(1 / (largest + jnp.exp(y).max() / y.size))

    def approach(state: tuple[Any, jax.Array], distance: jax.Array) -> Any:
        def is_far(state: tuple[Any, jax.Array]) -> jax.Array:
            iterate, steps = state
            return (norm(iterate.x - x_star) > distance) & (steps < MAX_STEPS)

        def step(state: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            return solver.step(problem, state[0], y), state[1] + 1

        state = jax.lax.while_loop(is_far, step, state)
        return state, state[0].x

    state = (solver.init(problem, draw.x0, y), jnp.zeros((), jnp.int32))
    levels = norm(draw.x0 - x_star) * jnp.asarray(LEVELS)
    (_, steps), iterates = jax.lax.scan(approach, state, levels)
    return Descent(x_star, exact, iterates, steps)


@functools.partial(jax.jit, static_argnames=("inner", "outer", "name"))
def measure(inner: str, outer: str, name: str, draw: Draw, descent: Descent) -> Errors:
    """Compare a rule with the exact hypergradient, and predict its error."""
    problem, objective = problems.problems(inner, outer, draw)
    y, x_star, rule = draw.y, descent.x_star, problems.RULES[name](draw.y)
    constant = functools.partial(bx.efficiency_constant, objective, problem, x=x_star, y=y)

    def predict(d: jax.Array) -> jax.Array:
        if name != "newton":
            return constant(rule=rule, direction=d).value
        r = newton_remainder(problem, x_star, y, d)
        return constant(rule=problems.VANILLA, direction=r).value * norm(r) / norm(d) ** 2

    directions = descent.iterates - x_star
    estimate = functools.partial(problems.hypergradient, objective, problem, rule, y=y)
    errors = norm(
        jax.vmap(lambda x: estimate(x=x))(descent.iterates) - descent.hypergradient, axis=1
    )
    size = constant(rule=rule, rtol=NORM_RTOL)
    predicted = jax.vmap(predict)(directions)
    return Errors(norm(directions, axis=1), errors, predicted, size.value, size.status)


def newton_remainder(problem: bx.Problem, x: jax.Array, y: jax.Array, d: jax.Array) -> jax.Array:
    """Return F_1^{-1} F_11[d, d] / 2: what a Newton step from x + d leaves, x being the solution.

    With F(x + d) = F_1 d + F_11[d, d] / 2 and F_1(x + d) = F_1 + F_11[d], up to higher orders, the
    step ends at x + d - F_1(x + d)^{-1} F(x + d) = x + F_1^{-1} (F_11[d, d] - F_11[d, d] / 2).
    """

    def slope(x: jax.Array) -> jax.Array:
        return jax.jvp(lambda x: problem.optimality(x, y), (x,), (d,))[1]

    curvature = jax.jvp(slope, (x,), (d,))[1]
    _, jacobian = problem.linearize(x, y)
    return bx.linear_solve(jacobian, curvature / 2, problems.TIGHT)[0]


def expected_order(inner: str, outer: str, name: str) -> int:
    """Return the order of the error in theory; 0 where the rule is exact."""
    exact = {("newton", "linear"), ("newton", "quadratic"), ("ideal_change_affine", "linear")}
    if (name, outer) in exact and inner == "ridge":
        return 0
    return 2 if name == "newton" else 1


def run_case(data: Data, outer: str, seeds: int, step: Callable[[str], None]) -> dict[str, Any]:
    step(f"{data.inner}, {outer}: gradient descent")
    draws = [problems.draw(data, outer, seed) for seed in range(seeds)]
    descents = [descend(data.inner, outer, draw) for draw in draws]
    steps = np.array([descent.steps for descent in descents])
    if steps.max() >= MAX_STEPS:
        raise DataError(
            f"{data.name}: {MAX_STEPS} steps of gradient descent do not bring the distance to the "
            f"solution down to {LEVELS[-1]:g} of the first; the features are too ill-conditioned"
        )
    sizes = np.array([norm(descent.hypergradient) for descent in descents])
    curves: dict[str, Any] = {}
    for name in rule_names(data.inner):
        step(f"{data.inner}, {outer}: {name}")
        pairs = zip(draws, descents, strict=True)
        runs = [measure(data.inner, outer, name, draw, descent) for draw, descent in pairs]
        errors = Errors(*(np.stack(column) for column in zip(*runs, strict=True)))
        order = expected_order(data.inner, outer, name)
        curves[name] = summarise(errors, sizes, order, curves.get("vanilla"))
    return {
        "inner": data.inner,
        "outer": outer,
        "data": data.name,
        "rows": data.features.shape[0],
        "features": data.features.shape[1],
        "steps": steps,
        "hypergradient_norm": sizes,
        "curves": curves,
    }


def rule_names(inner: str) -> list[str]:
    return [name for name in problems.RULES if inner == "ridge" or "ideal" not in name]


def summarise(
    errors: Errors, sizes: np.ndarray, order: int, vanilla: dict[str, Any] | None
) -> dict[str, Any]:
    """Fit slope and constant of every seed, and compare them with theory."""
    distance, error, predicted, operator_norm, status = errors
    relative = error / sizes[:, None]
    inside = (distance <= ASYMPTOTIC * distance[:, :1]) & (relative >= ROUNDING)
    constant = np.where(inside, error / distance ** max(order, 1), np.nan)
    ratio = np.where(inside, constant / np.where(inside, predicted, 1), 1)
    # The fits of exact rules, where nothing is inside, mean nothing.
    slope = np.array([fit_slope(*row) for row in zip(distance, error, inside, strict=True)])
    # The first rule is its own reference.
    reference = {"constant": by_seed(constant), "operator_norm": operator_norm, **(vanilla or {})}
    bound = (1 + NORM_RTOL) * operator_norm if order == 1 else ZERO * reference["operator_norm"]
    is_met = {
        "slope": order == 0 or np.all(np.abs(slope - order) <= TOLERANCE),
        "constant": order == 0 or np.all(np.abs(ratio - 1) <= TOLERANCE),
        "exact": order > 0 or relative.max() <= EXACT,
        "norm": np.all((predicted.T if order == 1 else operator_norm) <= bound)
        and np.all(status == bx.Status.CONVERGED),
    }
    return {
        "expected_order": order,  # 0: exact
        "largest_relative_error": relative.max(),
        "slope": slope,
        "constant": by_seed(constant),
        "constant_predicted": by_seed(np.where(inside, predicted, np.nan)),
        "ratio": (ratio.min(), ratio.max()),
        "constant_to_vanilla": by_seed(constant) / reference["constant"],
        "norm_to_vanilla": operator_norm / reference["operator_norm"],
        "missed": [name for name, met in is_met.items() if not met],
        **errors._asdict(),
    }


def fit_slope(distance: np.ndarray, error: np.ndarray, inside: np.ndarray) -> float:
    """Return the least-squares slope on log-log axes, or NaN for less than three points."""
    if inside.sum() < 3:
        return np.nan
    return np.polyfit(np.log(distance[inside]), np.log(error[inside]), 1)[0]


def by_seed(values: np.ndarray) -> np.ndarray:
    """Return the median of each row without its NaNs."""
    rows = [row[np.isfinite(row)] for row in values]
    return np.array([np.median(row) if row.size else np.nan for row in rows])


def read(paths: list[Path]) -> list[Data]:
    if not paths:
        return [problems.diabetes(), problems.breast_cancer()]
    data = [problems.read_libsvm(path) for path in paths]
    if len({part.inner for part in data}) < len(data):
        kind = "regression data" if data[0].inner == "ridge" else "data of two classes"
        raise DataError(f"both files are {kind}: one file for each inner problem at most")
    return data


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="one or two LIBSVM files: real targets are for ridge, two classes for logistic "
        "regression (default: both, on scikit-learn's diabetes and breast cancer data)",
    )
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--seeds", type=int, default=10, help="default: %(default)s")
    options = parser.parse_args()
    if len(options.data) > 2:
        parser.error("--data takes two files at most")
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    began = time.perf_counter()
    jax.config.update("jax_enable_x64", True)
    # Each program runs once per seed only.
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        data = {part.inner: part for part in read(options.data)}
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "results.json").touch()  # fails now, not after all the work
        cases = [(inner, outer) for inner, outer in CASES if inner in data]
        total = sum(1 + len(rule_names(inner)) for inner, _ in cases)
        with tqdm(total=total, disable=None, leave=False) as bar:

            def step(what: str) -> None:
                bar.set_description(what)
                bar.update()

            results = [run_case(data[inner], outer, options.seeds, step) for inner, outer in cases]
    except (DataError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    figures.draw_all(results, options.output)
    run = {
        "seeds": options.seeds,
        "levels": LEVELS,
        "seconds": time.perf_counter() - began,
        **{name: metadata.version(name) for name in ("jax", "bilevax")},
    }
    written = {"run": run, "cases": results}
    print(*figures.table(written), sep="\n")
    outcome.write(written, options.output)
    print(f"\n{run['seconds']:.0f} seconds; figures and all numbers are in {options.output}")


if __name__ == "__main__":
    main()
