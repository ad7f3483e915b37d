"""Differences of h(y) = g(x*(y), y): samples by inner solves anew, and Ridders' extrapolation."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from bilevax import _trees as trees
from bilevax._problems import Problem
from bilevax._status import Status, code
from bilevax.linear import default_rtol
from bilevax.solvers import Solver

PyTree = Any
_MARGIN = 4  # times the noise over the step; tolerances bias solves, about twice what noise shows
_MAXITER = 10_000  # of a re-solve, where the solver's own is smaller


def moves(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size > 0


def as_numpy(leaf: Any) -> np.ndarray:
    return np.asarray(leaf).astype(np.float64)


@np.errstate(all="ignore")
def random_directions(y: PyTree, count: int, seed: int) -> tuple[list[np.ndarray | None], float]:
    """Return random unit vectors, stacked per leaf of y (None if it does not move), and ||y||.

    Each leaf moves in proportion to its size, lest a step be too long for one and too short for
    another. One that is zero counts as of size 1.
    """
    random = np.random.default_rng(seed)
    vectors, norms, square = [], np.zeros(count), 0.0
    for leaf in jax.tree.leaves(y):
        vectors.append(None)
        if moves(leaf):
            size = np.sqrt(np.mean(as_numpy(leaf) ** 2))
            size = 1.0 if size == 0 else size
            vectors[-1] = size * random.normal(size=(count, *leaf.shape))
            norms = np.hypot(norms, np.linalg.norm(vectors[-1].reshape(count, -1), axis=1))
            square += size**2 * leaf.size
    units = [
        None if v is None else (v.T / norms).T.astype(leaf.dtype)
        for v, leaf in zip(vectors, jax.tree.leaves(y), strict=True)
    ]
    return units, np.sqrt(square)


def tightened(solver: Solver, x: PyTree) -> Solver:
    """Return the solver with tolerances of the size of rounding; for `atol=None` see `Solver`."""
    maxiter = max(solver.maxiter, _MAXITER)
    changes = {"rtol": 10 * trees.epsilon(x), "atol": None, "maxiter": maxiter}
    return dataclasses.replace(solver, **changes)  # type: ignore[type-var]


@jax.jit
def call(g: Partial, x: PyTree, y: PyTree) -> jax.Array:
    return g(x, y)


@functools.partial(jax.jit, static_argnames="warm")
def sample(
    g: Partial,
    problem: Problem,
    run: Partial,
    x0: PyTree,
    y: PyTree,
    units: list[jax.Array | None],
    points: tuple[jax.Array, jax.Array],
    warm: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return h, status and ||F|| at each y + step * units[which], where (which, step) = points."""
    scale = trees.norm(problem.optimality(x0, y))
    leaves, structure = jax.tree.flatten(y)

    def solve_anew(carry: Any, point: Any) -> Any:
        start, is_first = carry
        which, step = point
        moved = [
            u if d is None else u + step.astype(u.dtype) * d[which]
            for u, d in zip(leaves, units, strict=True)
        ]
        moved = jax.tree.unflatten(structure, moved)
        x, report = run(problem, start, moved)
        # Where rounding leaves nothing to gain, a solver stalls or goes on in vain.
        enough = default_rtol(x) * jnp.maximum(scale, report.initial_residual)
        in_vain = (report.status == Status.STALLED) | (report.status == Status.MAXITER)
        solved = in_vain & (report.residual <= enough)
        status = jnp.where(solved, code(Status.CONVERGED), report.status)
        start = trees.where(is_first & warm, x, start)
        # Of separable tasks the worst counts.
        worst = jnp.max(status), jnp.max(report.residual)
        return (start, jnp.zeros((), bool)), (g(x, moved), *worst)

    return jax.lax.scan(solve_anew, (x0, jnp.ones((), bool)), points)[1]


def extrapolate(
    steps: np.ndarray, values: np.ndarray, status: np.ndarray, residual: np.ndarray, epsilon: float
) -> tuple[float, float, float, float, float]:
    """Return the best entry of Ridders' table, its error, and what the solves behind it were like.

    Entry (i, j) is made of the steps i - j to i and free of the powers 2, 4, ..., 2 j of the step:

        T[i, 0] = (h(y + t_i d) - h(y - t_i d)) / (2 t_i)
        T[i, j] = (4^j T[i, j - 1] - T[i - 1, j - 1]) / (4^j - 1)
    """
    count = len(steps)
    table = np.full((count, count), np.nan)
    error = np.full_like(table, np.inf)
    solved = np.zeros(table.shape, bool)
    table[:, 0] = (values[:, 0] - values[:, 1]) / (2 * steps)
    for i in range(1, count):
        for j in range(1, i + 1):
            parents = table[i, j - 1], table[i - 1, j - 1]
            table[i, j] = (4**j * parents[0] - parents[1]) / (4**j - 1)
            error[i, j] = np.max(np.abs(table[i, j] - parents))
            solved[i, j] = np.all(status[i - j : i + 1] < Status.MAXITER)
    # Noisy entries may agree by chance, so no error is below the noise of h over the step. The
    # noise is what still changes at the smallest steps, in the column where that is least: in lower
    # columns the powers of the step may hide it.
    changes = np.abs(np.diff(table[-4:, 1:6], axis=0)) * steps[-3:, None]
    noise = np.min(np.where(np.isfinite(changes), changes, np.inf).max(axis=0))
    noise = noise if np.isfinite(noise) else 0.0
    rounding = epsilon * np.max(np.abs(values), axis=1)
    error = np.maximum(error, _MARGIN * ((noise + rounding) / steps)[:, None])
    error = np.where(np.isfinite(error), error, np.inf)
    # Solves that did not converge, at steps too long for the problem perhaps, are a last resort.
    preferred = np.where(solved, error, np.inf)
    error = preferred if np.isfinite(np.min(preferred)) else error
    i, j = np.unravel_index(np.argmin(error), error.shape)
    rows = slice(i - j, i + 1) if np.isfinite(error[i, j]) else slice(None)
    return table[i, j], error[i, j], steps[i], np.max(status[rows]), np.max(residual[rows])
