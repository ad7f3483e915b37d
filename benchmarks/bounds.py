"""How loose are proven bounds, beside certificates that estimate?

    make bounds [ARGS="--sizes 5 12 --output DIR"]

Penalised ridge, logistic and Poisson regression of 5 to 30 unknowns, condition numbers from 1 to
1e6, whose constants `BoundConstants` derives. At points with relative errors of the hypergradient
from 1e-8 to 1 - cold starts, near x*, near stationary points of h, and in units of 1e-3 to 1e3 -
the bound and the certificate are compared with the true error, by dense matrices in NumPy. No bound
may be below the truth; one that is is listed as missed, and then the exit status is 1.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import outcome
import random_problems
from jax.tree_util import Partial
from tqdm import tqdm

import bilevax as bx

jax.config.update("jax_enable_x64", True)

OUTPUT = Path("benchmarks/output/bounds")
SIZES, COUNT = (5, 12, 30), 60  # problems of each family and size
SITUATIONS = ("cold", "near x*", "near a stationary point", "in other units")


class Family(NamedTuple):
    """A generalised linear model.

    Attributes:
      loss: (score, target) -> loss.
      targets: (generator, scores) -> targets.
      slopes: (score, target) -> its first two derivatives, by NumPy.
      constants: (train, validation) -> what `hypergradient_bound` takes.
    """

    loss: Callable
    targets: Callable
    slopes: Callable
    constants: Callable


def _logistic_slopes(score: np.ndarray, label: np.ndarray) -> Any:
    sigmoid = 1 / (1 + np.exp(label * score))
    return -label * sigmoid, sigmoid * (1 - sigmoid)


FAMILIES = {
    "ridge": Family(
        lambda s, b: (s - b) ** 2 / 2,
        lambda rng, s: s + rng.normal(size=s.shape),
        lambda s, b: (s - b, np.ones_like(s)),
        bx.BoundConstants.ridge,
    ),
    "logistic": Family(
        lambda s, b: jax.nn.softplus(-b * s),
        lambda rng, s: np.where(s + rng.logistic(size=s.shape) > 0, 1.0, -1.0),
        _logistic_slopes,
        bx.BoundConstants.logistic,
    ),
    "poisson": Family(
        lambda s, b: jnp.exp(s) - b * s,
        lambda rng, s: rng.poisson(np.exp(np.clip(s, -3, 2))).astype(float),
        lambda s, b: (np.exp(s) - b, np.exp(s)),
        bx.BoundConstants.poisson,
    ),
}


class Data(NamedTuple):
    rows: Any
    targets: Any
    others: Any
    other_targets: Any
    prior: Any  # g has prior . y besides


def inner(family: Family, data: Data, x: jax.Array, y: jax.Array) -> jax.Array:
    fit = jnp.mean(family.loss(data.rows @ x, data.targets))
    return fit + jnp.sum(jnp.exp(y) * x**2) / 2


def outer(family: Family, data: Data, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(family.loss(data.others @ x, data.other_targets)) + data.prior @ y


class Dense(NamedTuple):
    """Derivatives by NumPy."""

    optimality: np.ndarray
    jacobian: np.ndarray
    outer_x: np.ndarray

    @classmethod
    def at(cls, family: Family, data: Data, x: np.ndarray, y: np.ndarray) -> "Dense":
        first, second = family.slopes(data.rows @ x, data.targets)
        other, _ = family.slopes(data.others @ x, data.other_targets)
        count = len(first)
        return cls(
            data.rows.T @ first / count + np.exp(y) * x,
            data.rows.T @ (second[:, None] * data.rows) / count + np.diag(np.exp(y)),
            data.others.T @ other / len(other),
        )

    def solve(self, rhs: np.ndarray) -> np.ndarray:
        root = np.sqrt(np.diag(self.jacobian))  # so that units do not matter
        return np.linalg.solve(self.jacobian / root / root[:, None], rhs / root) / root

    def gradient(self, data: Data, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return data.prior - np.exp(y) * x * self.solve(self.outer_x)


def solution(family: Family, data: Data, y: np.ndarray) -> np.ndarray:
    x = np.zeros(y.shape)
    for _ in range(100):
        here = Dense.at(family, data, x, y)
        step = here.solve(here.optimality)
        before, shrink = here.optimality @ step, 1.0
        while shrink > 1e-9:
            there = Dense.at(family, data, x - shrink * step, y)
            if there.optimality @ there.solve(there.optimality) <= before or before < 1e-26:
                break
            shrink /= 2
        x = x - shrink * step
    return x


def draw(family: Family, size: int, seed: int) -> tuple[Any, list[str]]:
    """Return problems and points, stacked, with the true hypergradients; and the situations."""
    rng = np.random.default_rng([seed, size])
    drawn, situations = [], []
    for number in range(COUNT):
        situation = SITUATIONS[number % len(SITUATIONS)]
        conditioning = 10 ** rng.uniform(0, 6)
        rows = random_problems.features(rng, size, conditioning)
        others = rng.normal(size=(size + 5, size)) / np.sqrt(size)
        weights = rng.normal(size=size)
        y = random_problems.penalties(rng, size, conditioning)
        units = 10 ** rng.uniform(-3, 3, size) if situation == "in other units" else np.ones(size)
        data = Data(
            rows * units,
            family.targets(rng, rows @ weights),
            others * units,
            family.targets(rng, others @ weights),
            np.zeros(size),
        )
        y = y + 2 * np.log(units)
        x = solution(family, data, y)
        gradient = Dense.at(family, data, x, y).gradient(data, x, y)
        if situation == "near a stationary point":
            data = data._replace(prior=-(1 - 10 ** rng.uniform(-6, -1)) * gradient)
            gradient = Dense.at(family, data, x, y).gradient(data, x, y)
        point = x * (1 + 10 ** rng.uniform(-8, 0) * rng.normal(size=size))
        point = np.zeros(size) if situation == "cold" else point
        drawn.append((data, point, y, gradient))
        situations.append(situation)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *drawn), situations


def measure(family: Family, size: int, seed: int) -> dict[str, Any]:
    """Compare bounds and certificates with the truth."""

    objective, loss = functools.partial(inner, family), functools.partial(outer, family)

    @jax.jit
    @jax.vmap
    def judge(data: Data, x: jax.Array, y: jax.Array) -> Any:
        problem, g = bx.minimum(Partial(objective, data)), Partial(loss, data)
        rule = bx.Implicit()
        constants = family.constants((data.rows, data.targets), (data.others, data.other_targets))
        bound = bx.hypergradient_bound(g, problem, rule, x, y, constants)
        certificate = bx.hypergradient_error(g, problem, rule, x, y)
        direct, explicit = jax.grad(g, argnums=(0, 1))(x, y)
        gradient = explicit + rule.pullback(problem, x, y, direct)[0]
        return bound.absolute, certificate.absolute, gradient

    (data, x, y, gradient), situations = draw(family, size, seed)
    bound, certificate, got = map(np.asarray, judge(data, x, y))
    return {
        "situation": situations,
        "error": np.linalg.norm(got - gradient, axis=1),
        "size": np.linalg.norm(gradient, axis=1),
        "bound": bound,
        "certificate": certificate,
    }


def describe(name: str, found: dict[str, np.ndarray]) -> str:
    """Return a line: how much larger than the truth a bound is, and a certificate."""
    error, bound, certificate = (found[key] for key in ("error", "bound", "certificate"))
    finite = np.isfinite(bound) & (error > 0)
    loose = np.quantile(bound[finite] / error[finite], (0, 0.1, 0.5, 0.9))
    known = np.isfinite(certificate) & (error > 0)
    estimated = np.quantile(certificate[known] / error[known], (0, 0.1, 0.5, 0.9))
    below = int(np.sum(~(bound >= error)))
    return (
        f"{name:34} {len(error):5d} {below:6d} {np.mean(~np.isfinite(bound)):9.1%}  "
        + " ".join(f"{value:9.3g}" for value in loose)
        + "   "
        + " ".join(f"{value:9.3g}" for value in estimated)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    print("Over the true error, at the quantiles 0, 10, 50, 90 %: bounds, and certificates")
    print(f"{'':34} points  below  infinite  {'bounds':>37}   {'certificates':>37}")
    results, missed = {}, []
    for name, family in tqdm(FAMILIES.items(), disable=None, leave=False):
        parts = [measure(family, size, options.seed) for size in options.sizes]
        found = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        results[name] = found
        for situation in SITUATIONS:
            chosen = found["situation"] == situation
            part = {key: values[chosen] for key, values in found.items()}
            with tqdm.external_write_mode():
                print(describe(f"{name}, {situation}", part), flush=True)
        below = int(np.sum(~(found["bound"] >= found["error"])))
        if below:
            missed.append(f"{name}: {below} bounds are below the true error")
    outcome.write(results, options.output)
    outcome.tell(missed)
    print(f"\nall numbers are in {options.output}")
    if missed:
        parser.exit(1)


if __name__ == "__main__":
    main()
