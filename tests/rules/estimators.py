"""A problem of each kind at a point that does not solve it, and all estimators in dense form there.

x = {"left": (2,), "right": (2, 1)} has 4 entries; y = {"gain": (2,), "shift": (), "steps": ()} has
3 floating entries and, last, an integer. The formulas here know neither: they are written for flat
vectors u and w, of which w ends with the integer as a number.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevax as bx

PyTree = Any

SIZE, FLOATING = 4, 3
X = {"left": np.array([0.9, -1.4]), "right": np.array([[0.6], [1.7]])}
Y = {"gain": np.array([0.4, -0.7]), "shift": np.array(0.3), "steps": np.array(2, np.int32)}
COTANGENT = {"left": np.array([0.3, 1.2]), "right": np.array([[-0.8], [0.5]])}
TANGENT = {
    "gain": np.array([0.5, 1.0]),
    "shift": np.array(-0.8),
    "steps": np.zeros((), jax.dtypes.float0),
}

_RANDOM = np.random.default_rng(0)
_MIXING = _RANDOM.normal(size=(SIZE, SIZE)) / 2
_COUPLING = _RANDOM.normal(size=(SIZE, FLOATING))
_CENTRE = np.array([0.5, -0.8, 0.2, 1.1])


def flat_x(x):
    return jnp.concatenate([x["left"], x["right"].reshape(2)])


def like_x(u):
    return {"left": u[:2], "right": u[2:].reshape(2, 1)}


def flat_y(y):
    """Return all of y, the integer last; of a cotangent, the floating entries."""
    floating = jnp.concatenate([y["gain"], y["shift"].reshape(1)])
    if y["steps"].dtype == jax.dtypes.float0:
        return floating
    return jnp.concatenate([floating, y["steps"].reshape(1).astype(floating.dtype)])


U, W = flat_x(X), flat_y(Y)


# The problems. Constants take the dtype of u, so that float32 is not computed in float64.


def objective(u, w):
    mixing, coupling, centre = (jnp.asarray(c, u.dtype) for c in (_MIXING, _COUPLING, _CENTRE))
    misfit = mixing @ u - jnp.tanh(coupling @ w[:FLOATING])
    return (
        0.5 * jnp.sum(jnp.exp(w[0] * centre) * (u - w[2] * centre) ** 2)
        + jnp.sum(jnp.log(jnp.cosh(misfit)))
        + 0.1 * w[3] * w[1] * jnp.sum(jnp.sin(u))
    )


def residual(u, w):
    mixing, coupling, centre = (jnp.asarray(c, u.dtype) for c in (_MIXING, _COUPLING, _CENTRE))
    bend = jnp.tanh(jnp.exp(0.5 * w[0]) * mixing @ u + coupling @ w[:FLOATING])
    return 1.5 * u - centre * w[1] + bend + 0.05 * w[3] * w[2] * u**3


def image(u, w):
    mixing, coupling, centre = (jnp.asarray(c, u.dtype) for c in (_MIXING, _COUPLING, _CENTRE))
    bend = jnp.tanh(mixing @ u + 0.2 * w[3] * w[0] * u[::-1] + coupling @ w[:FLOATING])
    return centre * jnp.exp(w[2]) + 0.6 * bend - 0.1 * jnp.cos(w[1] * u)


def outer(u, w):
    """Return g, which depends on both arguments nonlinearly."""
    return jnp.sum(jnp.sin(u) * jnp.asarray(_CENTRE, u.dtype)) * (1 + w[0]) + w[1] ** 2 * u[3]


def outer_on_trees(x, y):
    return outer(flat_x(x), flat_y(y))


@dataclasses.dataclass(frozen=True)
class Kind:
    name: str
    problem: bx.Problem
    optimality: Callable[[jax.Array, jax.Array], jax.Array]  # F on flat vectors, written out


KINDS = [
    Kind(
        "minimum",
        bx.minimum(lambda x, y: objective(flat_x(x), flat_y(y))),
        jax.grad(objective),
    ),
    Kind("root", bx.root(lambda x, y: like_x(residual(flat_x(x), flat_y(y)))), residual),
    Kind(
        "fixed_point",
        bx.fixed_point(lambda x, y: like_x(image(flat_x(x), flat_y(y)))),
        lambda u, w: u - image(u, w),
    ),
]
MINIMUM, ROOT, FIXED_POINT = KINDS


# The estimators. Each returns NumPy arrays; derivatives with respect to w are to its floating
# entries.


@functools.partial(jax.jit, static_argnums=0)
def _partials(function, u, w):
    first, second = jax.jacobian(function, (0, 1))(u, w)
    return function(u, w), first, second


def partials(function, u, w=W):
    """Return F, F_1 and F_2."""
    value, first, second = _partials(function, u, w)
    return np.asarray(value), np.asarray(first), np.asarray(second)[..., :FLOATING]


def implicit(optimality, u, w=W):
    """Return dx/dw = -F_1^{-1} F_2."""
    _, first, second = partials(optimality, u, w)
    return -np.linalg.solve(first, second)


def corrected(optimality, preconditioner, u, w=W):
    """Return u - P^{-1} F, with P = F_1 for None."""
    value, first, _ = partials(optimality, u, w)
    return u - np.linalg.solve(first if preconditioner is None else preconditioner, value)


@dataclasses.dataclass(frozen=True)
class FlatChange:
    """A change of variables on flat vectors, with what it takes from the current point bound."""

    phi: Callable[[jax.Array, jax.Array], jax.Array]
    phi_inverse: Callable[[jax.Array, jax.Array], jax.Array]

    def optimality(self, kind):
        """Return G(z, w) = phi_1^T F(phi(z, w), w)."""
        return _in_new_variable(kind.optimality, self.phi)


@functools.cache
def _in_new_variable(optimality, phi):
    def function(z, w):
        return jax.jacobian(phi)(z, w).T @ optimality(phi(z, w), w)

    return function


def changed(kind, change, u, w=W):
    """Return dx/dw = phi_1 dz/dw + phi_2, with dz/dw from G."""
    z = change.phi_inverse(u, w)
    _, phi_1, phi_2 = partials(change.phi, z, w)
    return phi_1 @ implicit(change.optimality(kind), z, w) + phi_2


def newton_in_new_variable(kind, change, u, w=W):
    """Return phi(z - G_1^{-1} G, w)."""
    z = corrected(change.optimality(kind), None, change.phi_inverse(u, w), w)
    return np.asarray(change.phi(z, w))


def hypergradient(derivative, u, w=W):
    """Return g_2 + (dx/dw)^T g_1."""
    _, outer_x, outer_y = partials(outer, u, w)
    return outer_y + derivative.T @ outer_x


@functools.cache
def solution(kind):
    """Return the u where F = 0 to rounding."""
    u = U
    for _ in range(30):
        u = corrected(kind.optimality, None, u)
    return u


def assert_close(got, wanted, tolerance):
    """Compare two vectors (or matrices) relative to the norm of the second."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape
    assert np.linalg.norm(wanted) > 0
    assert np.linalg.norm(got - wanted) <= tolerance * np.linalg.norm(wanted)
