"""What does descent without a step size cost, beside one whose step is tuned by hand?

    make maid [ARGS="--output DIR"]

The two problems of `make training`, and logistic and Poisson regression with 50 penalties. Both
sides use the same inner solver and warm starts. By hand: `Adaptive` with Nesterov's momentum, whose
step is tuned with exact hypergradients. `maid`: from first steps of 1e-3, 1, and 1e3. A run ends at
the first point where

    ||dh/dy|| <= 1e-2 (its first value)

with dh/dy, and h, by solves of their own that count for nobody. Costs are in gradients of f, of
everything on the way, trials that were not accepted included; whatever XLA may share is counted
each time, and a product with the Hessian is two.

What is claimed: `maid` ends within 1.5 times the cost by hand, from every first step, and every
accepted step decreased the true h. Whatever is not so is listed as missed, and then the exit status
is 1.
"""

import argparse
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import outcome
import training_contenders
import training_problems
from tqdm import tqdm
from training_problems import Training

import bilevax as bx

OUTPUT = Path("benchmarks/output/maid")
TARGET, STEPS, RATIO = 1e-2, 120, 1.5
FIRST_STEPS = (1e-3, 1.0, 1e3)
ROWS, DIM = 200, 50
# Of `maid`, without the solves: the distance of a trial (2), the scale (1), F at the start and its
# rounding error (4), the hypergradient (4), two linearisations (4), g and its gradient twice (2),
# a residual (2), two mixed derivatives (4), two rounding errors (6).
MAID_FIXED = 29


def _counts(x: jax.Array, data: Any) -> jax.Array:
    features, counts = data
    scores = features @ x
    return jnp.mean(jnp.exp(scores) - counts * scores)


def _signs(x: jax.Array, data: Any) -> jax.Array:
    features, labels = data
    return jnp.mean(jax.nn.softplus(-labels * (features @ x)))


def glm(name: str, step: float) -> Training:
    """Return logistic or Poisson regression with one log-penalty per feature."""
    rng = np.random.default_rng(1)
    root = np.arange(1, DIM + 1) ** -0.5
    features = rng.standard_normal((2 * ROWS, DIM)) * root / np.linalg.norm(root) * 2
    scores = features @ np.where(np.arange(DIM) % 5 == 0, rng.standard_normal(DIM), 0)
    if name == "logistic":
        loss, targets = _signs, np.where(scores + rng.logistic(size=2 * ROWS) > 0, 1.0, -1.0)
    else:
        loss, targets = _counts, rng.poisson(np.exp(np.clip(scores, -3, 3))).astype(float)
    data = jnp.asarray(features), jnp.asarray(targets)
    train, validation = (
        tuple(part[half] for part in data) for half in (slice(ROWS), slice(ROWS, None))
    )

    def objective(x: jax.Array, y: jax.Array) -> jax.Array:
        return loss(x, train) + jnp.sum(jnp.exp(y) * x**2) / 2

    def outer(x: jax.Array, y: jax.Array) -> jax.Array:
        return loss(x, validation) + 0.01 * jnp.mean((y + 3.0) ** 2) / 2

    about = f"{name} regression, {DIM} penalties, {ROWS} + {ROWS} rows"
    x0, y0 = jnp.zeros(DIM), jnp.full(DIM, -4.0)
    return Training(name, about, objective, outer, x0, y0, step, False)


PROBLEMS = (
    training_problems.ridge,
    training_problems.digits,
    functools.partial(glm, "logistic", 200.0),
    functools.partial(glm, "poisson", 100.0),
)


class Run(NamedTuple):
    """One run.

    Attributes:
      name: of the way.
      evaluations: hypergradients to the target; None if it was not met.
      gradients: the cost so far, or of all steps.
      value: the true h there.
      rises: accepted steps at which the true h rose; by hand, steps at which it did.
    """

    name: str
    evaluations: int | None
    gradients: int
    value: float
    rises: int


def follow(name: str, step: Any, problem: Training, truth: Any) -> Run:
    """Take steps, and look at the true h and its gradient at every point that counts."""
    is_maid = isinstance(step, bx.MaidStep)

    @jax.jit
    def run(state: bx.BilevelState) -> Any:
        def one(state: bx.BilevelState, _: None) -> Any:
            following = step(state)
            # By hand the point that was evaluated; that of `maid` is the last accepted one.
            return following, following.optimizer.y if is_maid else state.y

        return jax.lax.scan(one, state, length=STEPS)

    end, points = run(step.init(problem.y0, problem.x0, history=STEPS))
    if is_maid:
        history = jax.tree.map(np.asarray, end.history)
        products = history.products + history.inner_iterations
        gradients = MAID_FIXED + 2 * history.inner_iterations + 2 * products
    else:
        gradients = training_contenders._counts(step, False, end).gradients
    cost = np.cumsum(gradients)
    value, hypergradient = truth
    x, last, first, heights = problem.x0, None, None, []
    for index, y in enumerate(np.asarray(points)):
        if last is not None and np.array_equal(y, last):
            continue
        h, x = value(x, y)
        last, norm = y, float(jnp.linalg.norm(hypergradient(x, y)))
        heights.append(float(h))
        first = norm if first is None else first
        if norm <= TARGET * first:
            return Run(name, index + 1, int(cost[index]), heights[-1], _rises(heights))
    return Run(name, None, int(cost[-1]), heights[-1], _rises(heights))


def _rises(heights: list[float]) -> int:
    return int(np.sum(np.diff(heights) >= 0))


def run_case(problem: Training) -> list[Run]:
    truth = training_problems.make_truth(problem)
    engine = bx.value_and_hypergradient(
        problem.outer, bx.minimum(problem.objective), training_contenders.SOLVER, bx.Implicit()
    )
    optimizer = training_contenders.outer_optimizer(problem)
    steps: dict[str, Any] = {"by hand": bx.make_step(engine, optimizer, schedule=bx.Adaptive())}
    for first_step in FIRST_STEPS:
        steps[f"maid from {first_step:g}"] = bx.maid(engine, first_step=first_step)
    return [follow(name, step, problem, truth) for name, step in steps.items()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    options.output.mkdir(parents=True, exist_ok=True)
    results, missed = {}, []
    for make in tqdm(PROBLEMS, disable=None, leave=False):
        problem = make()
        runs = run_case(problem)
        results[problem.name] = [run._asdict() for run in runs]
        by_hand, others = runs[0], runs[1:]
        lines = [
            f"\n{problem.about}",
            f"  {'':16} {'evaluations':>11} {'gradients':>10} {'ratio':>6} {'h':>10} {'rises':>6}",
        ]
        for run in runs:
            ratio = run.gradients / by_hand.gradients
            count = "-" if run.evaluations is None else str(run.evaluations)
            lines.append(
                f"  {run.name:16} {count:>11} {run.gradients:>10} {ratio:>6.2f} {run.value:>10.6f} "
                f"{run.rises:>6}"
            )
        with tqdm.external_write_mode():
            print("\n".join(lines), flush=True)
        for run in others:
            where = f"{problem.name}, {run.name}"
            if run.evaluations is None or run.gradients > RATIO * by_hand.gradients:
                missed.append(f"{where}: {run.gradients} gradients, {by_hand.gradients} by hand")
            if run.rises:
                missed.append(f"{where}: h rose in {run.rises} accepted steps")
    outcome.write(results, options.output)
    outcome.tell(missed)
    print(f"\nall numbers are in {options.output}")
    if missed:
        parser.exit(1)


if __name__ == "__main__":
    main()
