"""Requested accuracies where they are hard to keep: is CONVERGED ever said of a wrong gradient?

    make hard [ARGS="--count 400 --output DIR"]

Thousands of random problems of kinds that have fooled certificates: near a stationary point of h,
where the hypergradient is a small difference of large terms; in random units of x, y, f, g and of
equations; with a nonlinear block that ||F|| and g hardly feel; with directions that F_1 makes small
and that are most of x, its derivative and the adjoint; from warm starts after y has leapt; most of
that in float32 too. The truth is computed with dense matrices in NumPy. Of a request that ends
CONVERGED, the error must be what was asked for, up to a factor of three at the very worst.
"""

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from tqdm import tqdm

import bilevax as bx

jax.config.update("jax_enable_x64", True)

DIMENSION = 8
ROWS = 30
ACCURACIES = (1e-1, 1e-2, 1e-3)
WORST, RARE = 3.0, 0.01  # errors over accuracies: never above the first, above one in 1 % at most
NEAR = 0.8, 1.25  # where certified errors over true ones are to be, in 95 %


class Lanes(NamedTuple):
    """Problems of one kind; arrays have one row per problem.

    Attributes:
      data: of the inner problem.
      outer_data: of g.
      units: of x, y, f and g: numbers that a problem in common units is rescaled with.
      y: the outer variable, in its units.
      start: where y was when the warm start was made; None for cold starts.
      truth: the gradient of h, in its units.
      accuracy: what is asked for.
    """

    data: Any
    outer_data: Any
    units: Any
    y: np.ndarray
    start: np.ndarray | None
    truth: np.ndarray
    accuracy: np.ndarray


class Units(NamedTuple):
    x: np.ndarray
    y: np.ndarray
    f: np.ndarray
    g: np.ndarray


# Inner problems in common units: objectives or residuals of (data, x, y).


def ridge(data: Any, x: Any, y: Any) -> Any:
    rows, targets = data
    return jnp.mean((rows @ x - targets) ** 2) / 2 + jnp.sum(jnp.exp(y) * x**2) / 2


def logistic(data: Any, x: Any, y: Any) -> Any:
    rows, targets = data
    fit = jnp.mean(jnp.logaddexp(0.0, -jnp.sign(targets) * (rows @ x)))
    return fit + jnp.sum(jnp.exp(y) * x**2) / 2


def tanh_root(data: Any, x: Any, y: Any) -> Any:
    rows, targets = data
    matrix = rows[:DIMENSION] / jnp.sqrt(DIMENSION)
    skew = matrix - matrix.T
    return (rows.T @ rows / ROWS + skew) @ x + jnp.exp(y) * jnp.tanh(x) - targets[:DIMENSION]


def hidden_block(data: Any, x: Any, y: Any) -> Any:
    """A stiff quadratic, and a soft block of high order that alone depends on y."""
    _, targets = data
    delta, power = 10.0 ** -(1 + jnp.abs(targets[0])), jnp.where(targets[1] > 0, 4.0, 6.0)
    half = DIMENSION // 2
    u = x[half:] - jnp.sinh(y[half:])
    soft = jnp.sum(jnp.abs(u) ** power) / power + 1e-2 * jnp.sum(u**2) / 2
    return jnp.sum((x[:half] - 3) ** 2) / 2 + delta * soft + 1e-3 * jnp.sum(x[:half] * y[:half])


def linear_root(data: Any, x: Any, y: Any) -> Any:
    matrix, mixing, targets = data
    return matrix @ x - mixing @ y - targets


def quadratic(data: Any, x: Any, y: Any) -> Any:
    matrix, mixing, targets = data
    return x @ matrix @ x / 2 - x @ (mixing @ y + targets)


def outer(outer_data: Any, x: Any, y: Any) -> Any:
    """Return a validation loss, and a linear term that moves the stationary point of h."""
    (rows, targets), slope = outer_data
    return jnp.mean((rows @ x - targets) ** 2) / 2 + slope @ y


FAMILIES: dict[str, tuple[Callable, Callable]] = {
    "ridge": (ridge, bx.minimum),
    "logistic": (logistic, bx.minimum),
    "root": (tanh_root, bx.root),
    "hidden": (hidden_block, bx.minimum),
    "linear root": (linear_root, bx.root),
    "quadratic": (quadratic, bx.minimum),
}


def in_units(function: Callable, is_root: bool, data: Any, units: Units, x: Any, y: Any) -> Any:
    value = function(data, x / units.x, y / units.y)
    return value * (units.f if not is_root else units.f * units.x)


def outer_in_units(outer_data: Any, units: Units, x: Any, y: Any) -> Any:
    return units.g * outer(outer_data, x / units.x, y / units.y)


# The truth.


@functools.partial(jax.jit, static_argnums=0)
def _derivatives(family: str, data: Any, outer_data: Any, x: Any, y: Any) -> Any:
    function, pose = FAMILIES[family]
    residual = function if pose is bx.root else jax.grad(function, argnums=1)

    def one(data: Any, outer_data: Any, x: Any, y: Any) -> Any:
        first, second = jax.jacfwd(residual, argnums=(1, 2))(data, x, y)
        slopes = jax.grad(outer, argnums=(1, 2))(outer_data, x, y)
        return residual(data, x, y), first, second, *slopes

    return jax.vmap(one)(data, outer_data, x, y)


def solve_exactly(
    family: str, data: Any, outer_data: Any, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return x* and the gradient of h, by damped Newton steps with dense matrices."""
    x = np.zeros(y.shape)
    for _ in range(200):
        F, F_1, *_ = map(np.asarray, _derivatives(family, data, outer_data, x, y))
        move = np.linalg.solve(F_1, F[..., None])[..., 0]
        x = x - move / np.maximum(1, np.linalg.norm(move, axis=1, keepdims=True) / 2)
    _, F_1, F_2, g_1, g_2 = map(np.asarray, _derivatives(family, data, outer_data, x, y))
    adjoint = np.linalg.solve(np.swapaxes(F_1, 1, 2), g_1[..., None])
    return x, g_2 - (np.swapaxes(F_2, 1, 2) @ adjoint)[..., 0]


# Kinds of hard requests.


def draw(rng: np.random.Generator, count: int) -> tuple[Any, Any, np.ndarray]:
    """Return data, outer data and y of ordinary problems of condition 1 to 1e4."""
    spectrum = 10.0 ** -(
        rng.uniform(0, 2, (count, 1)) * np.linspace(0, 1, DIMENSION)
    )  # of singular values
    basis = np.linalg.qr(rng.normal(size=(count, ROWS, DIMENSION)))[0] * np.sqrt(ROWS)
    turn = np.linalg.qr(rng.normal(size=(count, DIMENSION, DIMENSION)))[0]
    rows = basis * spectrum[:, None, :] @ turn
    targets = rng.normal(size=(count, ROWS))
    validation = rng.normal(size=(count, ROWS, DIMENSION)), rng.normal(size=(count, ROWS))
    y = rng.uniform(-5, 0, size=(count, DIMENSION))
    return (rows, targets), (validation, np.zeros((count, DIMENSION))), y


def common(count: int) -> Units:
    one = np.ones((count, DIMENSION))
    return Units(one, one, np.ones(count), np.ones(count))


def stationary(rng: np.random.Generator, family: str, count: int) -> Lanes:
    """Return problems with a hypergradient of 1e-1 to 1e-6 of its terms."""
    data, (validation, slope), y = draw(rng, count)
    _, gradient = solve_exactly(family, data, (validation, slope), y)
    gap = 10 ** rng.uniform(-6, -1, size=(count, 1))
    outer_data = validation, -(1 - gap) * gradient
    accuracy = rng.choice(ACCURACIES, size=count)
    return Lanes(data, outer_data, common(count), y, None, gap * gradient, accuracy)


def random_units(rng: np.random.Generator, family: str, count: int, decades: int = 6) -> Lanes:
    data, outer_data, y = draw(rng, count)
    _, gradient = solve_exactly(family, data, outer_data, y)
    entries = (count, DIMENSION)
    x_unit, y_unit = (10.0 ** rng.integers(-decades, decades + 1, entries) for _ in range(2))
    f_unit, g_unit = (10.0 ** rng.integers(-decades, decades + 1, count) for _ in range(2))
    if family == "root":  # each equation in a unit of its own; that of x is not part of it
        f_unit = 10.0 ** rng.integers(-decades, decades + 1, entries) / x_unit
    units = Units(x_unit, y_unit, f_unit, g_unit)
    truth = g_unit[:, None] * gradient / y_unit
    return Lanes(
        data, outer_data, units, y * y_unit, None, truth, rng.choice(ACCURACIES, size=count)
    )


def leaps(rng: np.random.Generator, family: str, count: int) -> Lanes:
    """Return requests from the warm start of another y, up to sixteen away."""
    data, outer_data, y = draw(rng, count)
    y = rng.uniform(-8, 8, size=y.shape)
    start = np.where(rng.uniform(size=(count, 1)) < 0.5, -y, rng.uniform(-8, 8, size=y.shape))
    _, gradient = solve_exactly(family, data, outer_data, y)
    return Lanes(
        data, outer_data, common(count), y, start, gradient, rng.choice(ACCURACIES, size=count)
    )


def ordinary(rng: np.random.Generator, family: str, count: int) -> Lanes:
    data, outer_data, y = draw(rng, count)
    if family == "hidden":
        y = rng.uniform(-1.5, 1.5, size=y.shape)
    _, gradient = solve_exactly(family, data, outer_data, y)
    accuracy = rng.choice((0.3, *ACCURACIES), size=count)
    return Lanes(data, outer_data, common(count), y, None, gradient, accuracy)


def soft(rng: np.random.Generator, family: str, count: int, size: int = 20) -> Lanes:
    """Return linear problems with two singular values of 1e-2 to 1e-6, and others near one.

    Residuals feel what is soft by so little; x, its derivative and the adjoint consist of it.
    """
    left, right = (np.linalg.qr(rng.normal(size=(count, size, size)))[0] for _ in range(2))
    if family == "quadratic":
        right = left
    values = 10.0 ** rng.uniform(-0.3, 0.3, size=(count, size))
    values[:, -2:] = 10.0 ** -rng.uniform(2, 6, size=(count, 2))
    matrix = left * values[:, None, :] @ np.swapaxes(right, 1, 2)
    mixing = left * np.sqrt(values)[:, None, :] @ rng.normal(size=(count, size, size))
    targets = (matrix @ rng.normal(size=(count, size, 1)))[..., 0]
    y = 0.01 * np.sqrt(values[:, -2:].min(axis=1, keepdims=True)) * rng.normal(size=(count, size))
    data, ones = (matrix, mixing, targets), np.ones((count, size))
    validation = rng.normal(size=(count, ROWS, size)), rng.normal(size=(count, ROWS))
    outer_data = validation, np.zeros((count, size))
    _, gradient = solve_exactly(family, data, outer_data, y)
    units = Units(ones, ones, np.ones(count), np.ones(count))
    accuracy = rng.choice((0.3, *ACCURACIES), size=count)
    return Lanes(data, outer_data, units, y, None, gradient, accuracy)


class Kind(NamedTuple):
    name: str
    family: str
    lanes: Callable[[np.random.Generator, str, int], Lanes]
    solver: bx.Solver
    dtype: Any
    rule: bx.Rule = bx.Implicit()


NEWTON = bx.Newton()
GRADIENT = bx.GradientDescent(bx.Backtracking(), maxiter=3000)


def few_decades(rng: np.random.Generator, family: str, count: int) -> Lanes:
    return random_units(rng, family, count, decades=2)


def kinds() -> Iterator[Kind]:
    for dtype in (np.float64, np.float32):
        units = random_units if dtype is np.float64 else few_decades
        for solver in (NEWTON, GRADIENT):
            for family in ("ridge", "logistic"):
                yield Kind("stationary", family, stationary, solver, dtype)
                yield Kind("units", family, units, solver, dtype)
                yield Kind("leap", family, leaps, solver, dtype)
            yield Kind("hidden", "hidden", ordinary, solver, dtype)
        yield Kind("units", "root", units, NEWTON, dtype)
        yield Kind("stationary", "root", stationary, NEWTON, dtype)
    for rule in (bx.Implicit(), bx.Implicit(bx.BiCGStab()), bx.Implicit(bx.NormalCG())):
        yield Kind("soft", "linear root", soft, NEWTON, np.float64, rule)
    yield Kind("soft", "quadratic", soft, NEWTON, np.float64)
    yield Kind("soft", "quadratic", soft, GRADIENT, np.float64)


class Found(NamedTuple):
    """One entry per request.

    Attributes:
      error: true relative errors over the accuracy asked for.
      ratio: certified over true errors.
      estimated: whether what is certified is an estimate, and rounding a tenth of it at most.
      status: of the request.
      allowed: whether the precision allows that accuracy at all.
    """

    error: np.ndarray
    ratio: np.ndarray
    estimated: np.ndarray
    status: np.ndarray
    allowed: np.ndarray


def ask(kind: Kind, lanes: Lanes) -> Found:
    function, pose = FAMILIES[kind.family]
    is_root = pose is bx.root

    def one(data: Any, outer_data: Any, units: Units, y: Any, start: Any, accuracy: Any) -> Any:
        engine = bx.value_and_hypergradient(
            Partial(outer_in_units, outer_data, units),
            pose(Partial(functools.partial(in_units, function, is_root), data, units)),
            kind.solver,
            kind.rule,
            accuracy=bx.RelativeAccuracy(accuracy),
        )
        warm = bx.cold_start(jnp.zeros_like(y))
        if start is not None:
            warm = engine(start, warm).warm
        result = engine(y, warm)
        certificate = result.report.certificate
        assert certificate is not None
        change = jnp.linalg.norm(certificate.error)
        return result.gradient, result.report.inner.status, certificate.absolute, change

    arrays = jax.tree.map(lambda leaf: leaf.astype(kind.dtype), lanes)
    batched = jax.jit(jax.vmap(one, in_axes=(0, 0, 0, 0, None if lanes.start is None else 0, 0)))
    found = batched(
        arrays.data, arrays.outer_data, arrays.units, arrays.y, arrays.start, arrays.accuracy
    )
    gradient, status, certified, change = (np.asarray(part, float) for part in found)
    size = np.linalg.norm(lanes.truth, axis=1)
    error = np.linalg.norm(gradient - lanes.truth, axis=1)
    # Rounding of the data alone changes a hypergradient by so much of its terms.
    explicit = np.linalg.norm(lanes.outer_data[1] / lanes.units.y, axis=1) * lanes.units.g
    floor = 1e3 * np.finfo(kind.dtype).eps * (size + 2 * explicit) / size
    return Found(
        error / size / lanes.accuracy,
        certified / np.maximum(error, 1e-300),
        certified < 1.1 * change,
        status,
        floor < lanes.accuracy,
    )


def describe(kind: Kind, found: Found) -> str:
    converged = found.status == bx.Status.CONVERGED
    errors = found.error[converged] if converged.any() else np.zeros(1)
    meant = found.allowed
    name = f"{kind.name} {kind.family} {type(kind.solver).__name__} {np.dtype(kind.dtype).name}"
    if kind.rule.linear_solver is not None:
        name += f" {type(kind.rule.linear_solver).__name__}"
    return (
        f"{name:50} {len(converged):>5} {np.mean(converged[meant]) if meant.any() else 1:>7.1%} "
        f"{np.sum(errors > 1):>6} {np.sum(errors > WORST):>6} {errors.max():>9.3g}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--count", type=int, default=250, help="problems of each kind")
    parser.add_argument("--only", nargs="*", help="kinds whose names contain one of these")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/output/hard_requests"))
    options = parser.parse_args()
    chosen = [
        kind
        for kind in kinds()
        if not options.only or any(word in " ".join(map(str, kind)) for word in options.only)
    ]
    print(f"{'kind':50} {'count':>5} {'said':>7} {'> eps':>6} {'> 3':>6} {'worst':>9}")
    everything: dict[str, Found] = {}
    for number, kind in enumerate(tqdm(chosen, disable=None)):
        lanes = kind.lanes(np.random.default_rng([0, number]), kind.family, options.count)
        found = ask(kind, lanes)
        tqdm.write(describe(kind, found))
        everything[describe(kind, found)[:50].strip()] = found
    total = Found(*map(np.concatenate, zip(*everything.values(), strict=True)))
    converged = total.status == bx.Status.CONVERGED
    wrong = total.error[converged]
    said = np.mean(converged[total.allowed])
    ratios = total.ratio[converged & total.estimated]
    near = np.mean((ratios >= NEAR[0]) & (ratios <= NEAR[1]))
    verdicts = {
        f"{np.sum(wrong > WORST)} of {len(wrong)} CONVERGED requests above {WORST:g} eps": bool(
            np.all(wrong <= WORST)
        ),
        f"{np.mean(wrong > 1):.2%} above eps (1 % at most)": bool(np.mean(wrong > 1) <= RARE),
        f"{near:.1%} of {len(ratios)} certificates within {NEAR} of the true error (95 %)": bool(
            near >= 0.95
        ),
        f"{said:.1%} of the requests that precision allows end CONVERGED (90 %)": bool(said >= 0.9),
    }
    for text, met in verdicts.items():
        print(f"{'MET   ' if met else 'MISSED'} {text}")
    options.output.mkdir(parents=True, exist_ok=True)
    results = {
        name: {field: values.tolist() for field, values in found._asdict().items()}
        for name, found in everything.items()
    }
    (options.output / "results.json").write_text(json.dumps(results))
    return 0 if all(verdicts.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
