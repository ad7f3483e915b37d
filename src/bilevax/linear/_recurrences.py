"""The loops inside of GMRES and BiCGStab, on flat vectors.

They do what those of `jax.scipy.sparse.linalg` do, whose carries start as constants: under
`jax.shard_map` they do not keep their types.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg

from bilevax import _mesh as mesh
from bilevax import _trees as trees

Product = Callable[[jax.Array], jax.Array]
_multiply = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class _Arnoldi(NamedTuple):
    basis: jax.Array  # (steps + 1, dim): orthonormal rows, zero where there are none yet
    rotation: (
        jax.Array
    )  # (steps + 1, steps + 1): orthogonal, makes the Hessenberg matrix triangular
    triangle: jax.Array  # (steps, steps): what it makes of that; the identity where nothing is yet
    residual: jax.Array
    taken: jax.Array


def minimal_residual(product: Product, b: jax.Array, enough: jax.Array, steps: int) -> jax.Array:
    """Return the u of the smallest ||b - A u|| in a Krylov space of b; a cycle of GMRES from zero.

    Args:
      product: v -> A v.
      b: a vector of unit length.
      enough: the residual, as the recurrence knows it, at which the space grows no further.
      steps: its dimension at most.

    Source:
      Y. Saad and M. H. Schultz, "GMRES: A Generalized Minimal Residual Algorithm for Solving
      Nonsymmetric Linear Systems", 1986.
    """
    epsilon = jnp.finfo(b.dtype).eps

    def proceed(state: _Arnoldi) -> jax.Array:
        return (state.taken < steps) & (state.residual > enough)

    def step(state: _Arnoldi) -> _Arnoldi:
        basis, rotation, triangle, _, k = state
        image = product(basis[k])
        size = trees.norm(image)
        overlaps = jnp.zeros_like(image, shape=steps + 1)
        for _ in range(2):  # Gram-Schmidt; twice is enough
            overlap = _multiply(basis, image)
            image, overlaps = image - _multiply(overlap, basis), overlaps + overlap
        length = trees.norm(image)
        length = jnp.where(length > epsilon * size, length, 0)  # else the space is invariant
        unit = jnp.where(length > 0, image / jnp.where(length > 0, length, 1), 0)
        column = _multiply(rotation, overlaps.at[k + 1].set(length))
        # A rotation of the last two entries, after which the second one is zero.
        a, c = column[k], column[k + 1]
        radius = jnp.hypot(a, c)
        cosine, sine = jnp.where(
            radius > 0, jnp.stack([a, c]) / radius, jnp.eye(2, 1, dtype=b.dtype)[:, 0]
        )
        upper, lower = rotation[k], rotation[k + 1]
        rotation = rotation.at[k].set(cosine * upper + sine * lower)
        rotation = rotation.at[k + 1].set(cosine * lower - sine * upper)
        column = column.at[k].set(radius)[:steps]
        column = jnp.where(jnp.arange(steps, dtype=jnp.int32) <= k, column, 0)
        return _Arnoldi(
            basis.at[k + 1].set(unit),
            rotation,
            triangle.at[:, k].set(column),
            jnp.abs(rotation[k + 1, 0]),
            k + 1,
        )

    start = _Arnoldi(
        jnp.zeros((steps + 1, b.size), b.dtype).at[0].set(b),
        jnp.eye(steps + 1, dtype=b.dtype),
        jnp.eye(steps, dtype=b.dtype),
        jnp.ones((), b.dtype),
        jnp.zeros((), jnp.int32),
    )
    end = mesh.while_loop(proceed, step, start)
    diagonal = jnp.abs(jnp.diagonal(end.triangle))
    # A direction whose image is of rounding size, as in a singular system, tells nothing.
    seen = diagonal > 10 * epsilon * jnp.max(jnp.abs(end.triangle))
    due = seen & (jnp.arange(steps, dtype=jnp.int32) < end.taken)
    triangle = end.triangle + jnp.diag(jnp.where(seen, 0, 1).astype(b.dtype))
    weights = jax.scipy.linalg.solve_triangular(
        triangle, jnp.where(due, end.rotation[:steps, 0], 0)
    )
    return _multiply(weights, end.basis[:steps])


class _Stabilised(NamedTuple):
    x: jax.Array
    r: jax.Array  # b - A x
    p: jax.Array
    q: jax.Array  # A M p
    alpha: jax.Array
    omega: jax.Array
    rho: jax.Array
    taken: jax.Array
    stuck: jax.Array


def stabilised_bicg(
    product: Product,
    b: jax.Array,
    start: jax.Array,
    target: jax.Array,
    maxiter: jax.Array | int,
    precondition: Product,
) -> jax.Array:
    """Return what BiCGStab makes of a start until ||b - A x|| <= target, by its recurrence.

    Source:
      H. A. van der Vorst, "Bi-CGSTAB: A Fast and Smoothly Converging Variant of Bi-CG for the
      Solution of Nonsymmetric Linear Systems", 1992.
    """
    first = b - product(start)

    def proceed(state: _Stabilised) -> jax.Array:
        far = trees.inner(state.r, state.r) > target**2
        return far & (state.taken < maxiter) & ~state.stuck

    def step(state: _Stabilised) -> _Stabilised:
        rho = trees.inner(first, state.r)
        beta = rho / state.rho * state.alpha / state.omega
        p = state.r + beta * (state.p - state.omega * state.q)
        direction = precondition(p)
        q = product(direction)
        alpha = rho / trees.inner(first, q)
        s = state.r - alpha * q
        is_small = trees.inner(s, s) < target**2
        second = precondition(s)
        t = product(second)
        omega = trees.inner(t, s) / trees.inner(t, t)
        # Where the first half has come to the target, the second would divide zero by zero.
        half = jnp.where(is_small, 0, omega * second)
        x = state.x + alpha * direction + half
        r = jnp.where(is_small, s, s - omega * t)
        stuck = (omega == 0) | (alpha == 0) | (rho == 0)
        return _Stabilised(x, r, p, q, alpha, omega, rho, state.taken + 1, stuck)

    one, none = jnp.ones((), b.dtype), jnp.zeros((), jnp.int32)
    stuck = jnp.zeros((), bool)
    begin = _Stabilised(start, first, first, first, one, one, one, none, stuck)
    return mesh.while_loop(proceed, step, begin).x
