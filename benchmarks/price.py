"""What a requested accuracy costs, beside the plain tolerance that is best in hindsight.

    make price [ARGS="--rounds 7"]

Ridge regression (2000 rows, 200 features, condition 1e4, one penalty per feature) and multinomial
regression of the digits (650 unknowns), with `Newton` and with `AcceleratedGradient`, at relative
accuracies of 1e-2, 1e-4 and 1e-6. The plain engine has the largest `rtol` of a grid whose
hypergradient is as accurate as asked for, which nobody knows beforehand; of that and the next one
the faster counts. Both run in this process, in turns; times are medians. Products are those of
adjoint systems, corrections and certificates; those inside of Newton's inner solves, which no
report counts, are in the seconds.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from tqdm import tqdm

import bilevax as bx

jax.config.update("jax_enable_x64", True)

ACCURACIES = (1e-2, 1e-4, 1e-6)
TOLERANCES = 10.0 ** -np.arange(0.5, 10, 0.5)
LARGEST, MEAN = 2.0, 1.6  # what each ratio and their geometric mean may be


class Problem(NamedTuple):
    name: str
    f: Callable[..., jax.Array]
    g: Callable[..., jax.Array]
    x0: jax.Array
    y: jax.Array
    rate: float  # of gradient steps


def ridge() -> Problem:
    rng = np.random.default_rng(0)
    rows, size = 2000, 200
    left = np.linalg.qr(rng.normal(size=(rows, size)))[0] * np.sqrt(rows)
    right = np.linalg.qr(rng.normal(size=(size, size)))[0]
    features = left * np.logspace(0, -2, size) @ right
    targets = features @ rng.normal(size=size) + 0.3 * rng.normal(size=rows)
    unseen = rng.normal(size=(rows, size)) / np.sqrt(size)
    unseen_targets = unseen @ rng.normal(size=size)

    def f(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((features @ x - targets) ** 2) / 2 + jnp.sum(jnp.exp(y) * x**2) / 2

    def g(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((unseen @ x - unseen_targets) ** 2) / 2 + 1e-3 * jnp.sum(y**2)

    return Problem("ridge", f, g, jnp.zeros(size), jnp.full(size, np.log(1e-4)), 0.999)


def digits() -> Problem:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    features = np.c_[np.asarray(images) / 16, np.ones(len(images))][order]
    classes = np.asarray(labels)[order]

    def loss(x: jax.Array, rows: slice) -> jax.Array:
        scores = jax.nn.log_softmax(features[rows] @ x.reshape(65, 10))
        return -jnp.mean(jnp.take_along_axis(scores, classes[rows, None], 1))

    def f(x: jax.Array, y: jax.Array) -> jax.Array:
        return loss(x, slice(1000)) + jnp.sum(jnp.exp(y) * x**2) / 2

    def g(x: jax.Array, y: jax.Array) -> jax.Array:
        return loss(x, slice(1000, None))

    return Problem("digits", f, g, jnp.zeros(650), jnp.full(650, np.log(1e-3)), 1 / 6)


class Row(NamedTuple):
    problem: str
    solver: str
    accuracy: float
    error: float
    plain_rtol: float
    seconds: float
    plain_seconds: float
    products: int
    plain_products: int

    @property
    def ratio(self) -> float:
        return self.seconds / self.plain_seconds


def interleaved(calls: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Return the median seconds of each call, after one that compiles."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 1):
        for call, taken in zip(calls, times, strict=True):
            began = time.perf_counter()
            jax.block_until_ready(call())
            if number:
                taken.append(time.perf_counter() - began)
    return [float(np.median(taken)) for taken in times]


def measure(problem: Problem, rounds: int) -> Iterator[Row]:
    inner, warm = bx.minimum(problem.f), bx.cold_start(problem.x0)
    solvers: dict[str, Callable[..., bx.Solver]] = {
        "Newton": bx.Newton,
        "AcceleratedGradient": lambda rtol: bx.AcceleratedGradient(
            problem.rate, rtol=rtol, maxiter=100_000
        ),
    }
    tight = bx.Implicit(bx.CG(rtol=1e-13))
    truth = bx.value_and_hypergradient(problem.g, inner, bx.Newton(rtol=1e-13), tight)
    exact = truth(problem.y, warm).gradient

    def error(gradient: jax.Array) -> float:
        return float(jnp.linalg.norm(gradient - exact) / jnp.linalg.norm(exact))

    for name, solver in solvers.items():
        plain = [
            bx.value_and_hypergradient(problem.g, inner, solver(rtol=rtol)) for rtol in TOLERANCES
        ]
        errors = [error(engine(problem.y, warm).gradient) for engine in plain]
        for accuracy in ACCURACIES:
            good = [k for k, value in enumerate(errors) if value <= accuracy][:2]
            asked = bx.value_and_hypergradient(
                problem.g, inner, solver(rtol=None), accuracy=bx.RelativeAccuracy(accuracy)
            )
            engines = [asked, *(plain[k] for k in good)]
            calls = [lambda engine=engine: engine(problem.y, warm) for engine in engines]
            seconds, *others = interleaved(calls, rounds)
            best = good[int(np.argmin(others))]
            result, reference = asked(problem.y, warm), plain[best](problem.y, warm)
            assert result.report.adjoint is not None and reference.report.adjoint is not None
            assert result.report.certificate is not None
            assert result.report.inner.status == bx.Status.CONVERGED
            products = result.report.adjoint.products + result.report.certificate.products
            yield Row(
                problem.name,
                name,
                accuracy,
                error(result.gradient),
                float(TOLERANCES[best]),
                seconds,
                min(others),
                int(products),
                int(reference.report.adjoint.products),
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/output/price"))
    options = parser.parse_args()
    rows = []
    bar = tqdm(total=12, disable=None)
    for problem in (ridge(), digits()):
        for row in measure(problem, options.rounds):
            rows.append(row)
            bar.update()
    bar.close()
    print(
        f"{'problem':8} {'solver':20} {'asked':>7} {'error':>8} {'products':>14} "
        f"{'milliseconds':>17} {'ratio':>6}"
    )
    for row in rows:
        print(
            f"{row.problem:8} {row.solver:20} {row.accuracy:>7.0e} {row.error:>8.1e} "
            f"{row.products:>6} / {row.plain_products:>5} "
            f"{1e3 * row.seconds:>8.1f} / {1e3 * row.plain_seconds:>6.1f} {row.ratio:>6.2f}"
        )
    ratios = np.array([row.ratio for row in rows])
    mean = float(np.exp(np.mean(np.log(ratios))))
    verdicts = {
        f"largest ratio {ratios.max():.2f}, {LARGEST:g} at most": bool(ratios.max() <= LARGEST),
        f"geometric mean {mean:.2f}, {MEAN:g} at most": mean <= MEAN,
        "all errors as small as asked for": all(row.error <= row.accuracy for row in rows),
    }
    for text, met in verdicts.items():
        print(f"{'MET   ' if met else 'MISSED'} {text}")
    options.output.mkdir(parents=True, exist_ok=True)
    results = [row._asdict() | {"ratio": row.ratio} for row in rows]
    (options.output / "results.json").write_text(json.dumps(results))
    return 0 if all(verdicts.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
