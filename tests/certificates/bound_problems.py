"""Random strongly convex problems, and their hypergradients by NumPy in long double."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevax as bx

ROWS, SIZE, OTHERS = 9, 4, 7
SMOOTH = 0.7699  # the largest third derivative of log(cosh(x)), 4 / (3 sqrt(3)), rounded up


@dataclasses.dataclass(frozen=True)
class Family:
    """f and g of (data, x, y); the same derivatives by NumPy; data by a random generator."""

    inner: Callable
    outer: Callable
    constants: Callable  # data -> what `hypergradient_bound` takes
    draw: Callable  # (generator, count, units per entry of x) -> data
    derivatives: Callable  # (data, x, y) -> F, F_1, F_2, g, g_1, g_2 in the dtype of the data


# Generalised linear models.


def _glm(loss: Callable, numpy_loss: Callable, targets: Callable, constants: Callable) -> Family:
    def inner(data, x, y):
        return jnp.mean(loss(data["A"] @ x, data["b"])) + jnp.sum(jnp.exp(y) * x**2) / 2

    def outer(data, x, y):
        return jnp.mean(loss(data["C"] @ x, data["d"])) + data["prior"] @ y

    def draw(rng, count, units):
        A = rng.normal(size=(count, ROWS, SIZE)) * 10 ** rng.uniform(-1, 0, (count, 1, SIZE))
        C = rng.normal(size=(count, OTHERS, SIZE))
        weights = rng.normal(size=(count, SIZE, 1))
        scores = [np.squeeze(features @ weights, -1) for features in (A, C)]
        b, d = (targets(rng, score / 2) for score in scores)
        y = rng.uniform(-4, 2, (count, SIZE)) + 2 * np.log(units)
        zero = np.zeros((count, SIZE))
        return {"A": A * units[:, None], "b": b, "C": C * units[:, None], "d": d, "prior": zero}, y

    def derivatives(data, x, y):
        A, C = data["A"], data["C"]
        (_, first, second), (other, other_first, _) = (
            numpy_loss(np.einsum("kij,kj->ki", features, x), labels)
            for features, labels in ((A, data["b"]), (C, data["d"]))
        )
        penalty = np.exp(y)
        F = np.einsum("kij,ki->kj", A, first) / ROWS + penalty * x
        F_1 = np.einsum("kij,ki,kil->kjl", A, second, A) / ROWS + _diagonal(penalty)
        g = np.mean(other, axis=1) + np.sum(data["prior"] * y, axis=1)
        g_1 = np.einsum("kij,ki->kj", C, other_first) / OTHERS
        return F, F_1, _diagonal(penalty * x), g, g_1, data["prior"]

    def constants_of(data):
        return constants((data["A"], data["b"]), (data["C"], data["d"]))

    return Family(inner, outer, constants_of, draw, derivatives)


def _softplus(score, label):
    sigmoid = 1 / (1 + np.exp(label * score))
    return np.logaddexp(0, -label * score), -label * sigmoid, sigmoid * (1 - sigmoid)


RIDGE = _glm(
    lambda score, target: (score - target) ** 2 / 2,
    lambda score, target: ((score - target) ** 2 / 2, score - target, np.ones_like(score)),
    lambda rng, score: score + rng.normal(size=score.shape),
    bx.BoundConstants.ridge,
)
LOGISTIC = _glm(
    lambda score, label: jax.nn.softplus(-label * score),
    _softplus,
    lambda rng, score: np.where(score + rng.logistic(size=score.shape) > 0, 1.0, -1.0),
    bx.BoundConstants.logistic,
)
POISSON = _glm(
    lambda score, count: jnp.exp(score) - count * score,
    lambda score, count: (np.exp(score) - count * score, np.exp(score) - count, np.exp(score)),
    lambda rng, score: rng.poisson(np.exp(np.clip(score, -3, 2))).astype(float),
    bx.BoundConstants.poisson,
)


# Quadratics and what is nearly quadratic, with constants by hand.


def _convex_inner(data, x, y):
    z = data["units"] * x
    curved = data["curved"] * jnp.sum(jnp.logaddexp(z, -z))  # log(cosh(z)) and a number
    return z @ data["H"] @ z / 2 - jnp.sin(y) @ data["B"] @ z + curved


def _convex_outer(data, x, y):
    z = data["units"] * x
    value = data["c"] @ z + jnp.sum((data["E"] @ z) ** 2) / 2 + y @ data["D"] @ z
    return data["scale"] * (value + data["prior"] @ y)


def _convex_constants(data):
    def constants(x, y):
        mu, units = data["mu"], data["units"]
        root = jnp.sqrt(mu)
        z = jnp.abs(units * x)

        def frobenius(matrix):
            return jnp.sqrt(jnp.sum((matrix / root) ** 2))

        def dual(w):  # of what is like F in z
            return jnp.sqrt(jnp.sum((w / root) ** 2))

        H, B, D, E = (jnp.abs(data[name]) for name in "HBDE")
        scale, least = data["scale"], jnp.min(root)
        weighted = data["curved"] + jnp.sqrt(jnp.sum((H / root / root[:, None]) ** 2))
        return bx.BoundConstants(
            strong_convexity=mu * units**2,
            jacobian=data["curved"] * SMOOTH / least**3,
            mixed=frobenius(B),
            mixed_change=0.0,
            outer_x=scale * frobenius(E) ** 2,
            outer_y=scale * frobenius(D),
            smoothness=weighted + data["curved"] / least**2,
            optimality_terms=dual(H @ z + B.sum(0) + 3 * data["curved"]),
            outer_terms=scale * (dual(jnp.abs(data["c"]) + E.T @ (E @ z)) + dual(D.T @ jnp.abs(y))),
            roundings=6 * SIZE,
        )

    return constants


def _convex_draw(rng, count, units):
    root = rng.normal(size=(count, SIZE, SIZE))
    mu = 10 ** rng.uniform(-3, 1, (count, SIZE))
    turned = np.einsum("kij,kil->kjl", root, root) * 10 ** rng.uniform(-2, 2, (count, 1, 1))
    data = {
        "H": turned + _diagonal(mu),
        # What rounding takes from the smallest curvature is less than a part in a thousand.
        "mu": 0.999 * mu,
        "B": rng.normal(size=(count, SIZE, SIZE)),
        "D": rng.normal(size=(count, SIZE, SIZE)),
        "E": rng.normal(size=(count, SIZE, SIZE)),
        "c": rng.normal(size=(count, SIZE)),
        "curved": rng.choice([0.0, 0.1, 1.0], count),
        "scale": 10 ** rng.uniform(-6, 6, count),
        "units": units,
        "prior": np.zeros((count, SIZE)),
    }
    return data, rng.normal(size=(count, SIZE))


def _convex_derivatives(data, x, y):
    def times(matrix, vector):
        return np.einsum("kij,kj->ki", matrix, vector)

    units, scale, curved = data["units"], data["scale"][:, None], data["curved"][:, None]
    z = units * x
    F = times(data["H"], z) - np.einsum("ki,kij->kj", np.sin(y), data["B"]) + curved * np.tanh(z)
    F_1 = data["H"] + _diagonal(curved / np.cosh(z) ** 2)
    F_1 = units[:, :, None] * F_1 * units[:, None]
    F_2 = -(np.cos(y)[:, :, None] * data["B"]).transpose(0, 2, 1) * units[:, :, None]
    Ez = times(data["E"], z)
    linear = data["c"] + np.einsum("ki,kij->kj", y, data["D"])
    value = np.sum(linear * z, 1) + np.sum(Ez**2, 1) / 2 + np.sum(data["prior"] * y, 1)
    g_1 = scale * units * (linear + np.einsum("kij,ki->kj", data["E"], Ez))
    g_2 = scale * (times(data["D"], z) + data["prior"])
    return units * F, F_1, F_2, data["scale"] * value, g_1, g_2


def _diagonal(entries: np.ndarray) -> np.ndarray:
    return entries[..., None] * np.eye(entries.shape[-1])


CONVEX = Family(_convex_inner, _convex_outer, _convex_constants, _convex_draw, _convex_derivatives)
FAMILIES = {"ridge": RIDGE, "logistic": LOGISTIC, "poisson": POISSON, "convex": CONVEX}


# The truth.


def _solve(matrix: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    """Solve many systems: in the precision of double, refined in that of what is given."""
    root = np.sqrt(np.abs(np.einsum("kii->ki", matrix)))
    scaled = (matrix / root[:, :, None] / root[:, None]).astype(float)
    solution = np.zeros_like(rhs)
    for _ in range(3 if rhs.dtype == np.longdouble else 1):
        left = (rhs - np.einsum("kij,kj->ki", matrix, solution)) / root
        step = np.linalg.solve(scaled, left.astype(float)[..., None])[..., 0]
        solution = solution + step / root
    return solution


def truth(family: Family, data: Any, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return x*, h and dh/dy of every problem of a batch, in long double."""
    x = np.zeros(y.shape)
    for dtype, steps in ((float, 40), (np.longdouble, 4)):
        data = {name: np.asarray(leaf, dtype) for name, leaf in data.items()}
        x, y = x.astype(dtype), np.asarray(y, dtype)
        for _ in range(steps):
            x = _newton(family, data, x, y)
    _, F_1, F_2, g, g_1, g_2 = family.derivatives(data, x, y)
    return x, g, g_2 - np.einsum("kij,ki->kj", F_2, _solve(F_1, g_1))


def _newton(family: Family, data: Any, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Take a damped step: F falls in a norm that knows no units, unless it is rounding."""
    F, F_1, *_ = family.derivatives(data, x, y)
    step, shrink = _solve(F_1, F), np.ones(len(x))

    def size(F):
        return np.sqrt(np.sum(F**2 / np.einsum("kii->ki", F_1), axis=1))

    before = size(F)
    for _ in range(20):
        after = size(family.derivatives(data, x - shrink[:, None] * step, y)[0])
        rises = ~(after <= before) & (before > 1e-10)
        if not rises.any():
            break
        shrink = np.where(rises, shrink / 2, shrink)
    return x - shrink[:, None] * step
