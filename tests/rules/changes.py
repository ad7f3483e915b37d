"""Changes of variables twice: for the package on pytrees, and for the formulas on flat vectors."""

import jax
import jax.numpy as jnp
import numpy as np

import bilevax as bx
from tests.rules.estimators import SIZE, FlatChange, W, flat_x, flat_y, like_x

SKEW = np.random.default_rng(3).normal(size=(SIZE, SIZE)) / 3


def sinh(z, w):
    return jnp.exp(0.5 * w[0] - w[2]) * jnp.sinh(z) + w[1] * jnp.flip(w[:1])


def sinh_inverse(u, w):
    return jnp.arcsinh((u - w[1] * jnp.flip(w[:1])) / jnp.exp(0.5 * w[0] - w[2]))


def matrix_of(w):
    return (2 + w[0]) * jnp.eye(SIZE) + jnp.sin(w[1]) * jnp.asarray(SKEW) + w[2] * jnp.tri(SIZE)


def linear(z, w):
    return matrix_of(w).T @ z


def linear_inverse(u, w):
    return jnp.linalg.solve(matrix_of(w).T, u)


# Here z has another pytree structure than x, and leaves of other shapes.
def like_z(v):
    return (v[:3].reshape(3, 1), {"last": v[3]})


def flat_z(z):
    return jnp.append(z[0].reshape(3), z[1]["last"])


SINH = bx.ChangeOfVariables(
    lambda z, y: like_x(sinh(flat_x(z), flat_y(y))),
    lambda x, y: like_x(sinh_inverse(flat_x(x), flat_y(y))),
)
LINEAR = bx.ChangeOfVariables(
    lambda z, y: like_x(linear(flat_z(z), flat_y(y))),
    lambda x, y: like_z(linear_inverse(flat_x(x), flat_y(y))),
)


def exponential(at):
    """Return the exponential change, but the identity where `at` is zero."""
    at, one = np.asarray(at), np.where(np.asarray(at) == 0, 1, at)
    return FlatChange(
        lambda z, w: jnp.where(at == 0, z, np.sign(at) * jnp.exp(z)),
        lambda u, w: jnp.where(at == 0, u, jnp.log(jnp.abs(jnp.where(at == 0, one, u)))),
    )


def diagonal(optimality, at):
    def divisor(w):
        return jnp.diag(jax.jacobian(optimality)(at, w))

    return FlatChange(lambda z, w: z / divisor(w), lambda u, w: u * divisor(w))


def diagonal_in_exponential(kind, at):
    """Return the change to log |u| and, with the diagonal of the problem in that, once more."""
    first = exponential(at)
    second = diagonal(first.optimality(kind), first.phi_inverse(at, W))
    return FlatChange(
        lambda z, w: first.phi(second.phi(z, w), w),
        lambda u, w: second.phi_inverse(first.phi_inverse(u, w), w),
    )


FLAT_SINH = FlatChange(sinh, sinh_inverse)
FLAT_LINEAR = FlatChange(linear, linear_inverse)
