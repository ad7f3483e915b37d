"""Units of x and F: a diagonal scaling that makes rows and columns of F_1 comparable."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import _mesh as mesh
from bilevax import _trees as trees
from bilevax._operator import LinearOperator, Scaling
from bilevax._problems import Problem
from bilevax._separable import per_task

PyTree = Any

# Vectors of random signs that sizes of rows are estimated with.
_PROBES = 3
# Sizes of rows that differ by no more than this are comparable. By the probes alone they differ by
# some 10 among a thousand rows.
_COMPARABLE = 100.0
# Where they are not, the scaling goes on until they differ by no more than that.
_EQUAL = 1.5
_MAX_ROUNDS = 12


def scaled(problem: Problem, x: PyTree, y: PyTree) -> Problem:
    """Return a problem with the scaling of F_1 at (x, y), unless it has one; per task.

    Rows R and columns C are found from products with vectors of random signs alone: the size of a
    row is that of its entry in the product. Both are divided by the roots of sizes until these are
    equal, and R = C where F_1 is symmetric. So whoever solves, stops and judges by R F_1 C does so
    in any units of x and F. Numbers are powers of two, and rounding does not change.

    Where sizes are comparable from the start, R and C are one: that costs three products.

    Source:
      A. M. Bradley, "Algorithms for the Equilibration of Matrices and Their Application to
      Limited-Memory Quasi-Newton Methods", 2010; D. Ruiz, "A Scaling Algorithm to Equilibrate Both
      Rows and Columns Norms in Matrices", 2001.
    """
    return problem if problem.scaling is not None else rescaled(problem, x, y)


def rescaled(problem: Problem, x: PyTree, y: PyTree) -> Problem:
    """Return a problem with the scaling of F_1 at (x, y), found from the one that it has.

    Three products, where that is still good: a scaling of one x need not be one of another.
    """
    if trees.dimension(x) < 2:
        return problem
    problem, x, y = jax.lax.stop_gradient((problem, x, y))
    found = per_task(problem, lambda problem, x: _find(problem, x, y), x)
    return dataclasses.replace(problem, scaling=found)


def without_scaling(problem: Problem) -> Problem:
    """Return a problem as a user poses it."""
    return dataclasses.replace(problem, scaling=None)


def _find(problem: Problem, x: PyTree, y: PyTree) -> Scaling:
    _, jacobian = problem.linearize(x, y)
    symmetric = jacobian.structure.is_symmetric
    flat, unravel_leaves = trees.ravel(x)
    ones = jnp.ones(flat.shape, trees.at_least_single(flat.dtype))  # squares need room
    probes = trees.signs(_PROBES, ones)

    def unravel(v: jax.Array) -> PyTree:
        return unravel_leaves(v.astype(flat.dtype))

    def sizes(operator: LinearOperator, left: jax.Array, right: jax.Array) -> jax.Array:
        def product(probe: jax.Array) -> jax.Array:
            return left * trees.ravel(operator.matvec(unravel(right * probe)))[0]

        return jnp.sqrt(jnp.mean(jax.vmap(product)(probes) ** 2, axis=0))

    # Rows, and columns after them where they are not the same.
    def measure(scales: jax.Array) -> jax.Array:
        if symmetric:
            return sizes(jacobian, scales, scales)
        rows, columns = jnp.split(scales, 2)
        of_columns = sizes(jacobian.transpose, columns, rows)
        return jnp.concatenate([sizes(jacobian, rows, columns), of_columns])

    def improve(state: _State) -> _State:
        found = measure(state.scales)
        usable = (found > 0) & jnp.isfinite(found)
        spread = jnp.max(found) / jnp.min(jnp.where(usable, found, jnp.inf))
        changes = (state.rounds > 0) | (spread > _COMPARABLE)
        factor = jnp.where(usable & changes, jax.lax.rsqrt(found), 1)
        return _State(state.scales * factor, jnp.where(changes, spread, 1), state.rounds + 1)

    def proceed(state: _State) -> jax.Array:
        return (state.spread > _EQUAL) & (state.rounds < _MAX_ROUNDS)

    scales = ones if symmetric else jnp.concatenate([ones, ones])
    if problem.scaling is not None:
        known = [problem.scaling.columns] if symmetric else list(problem.scaling)
        scales = jnp.concatenate([trees.ravel(part)[0].astype(ones.dtype) for part in known])
    scales = mesh.vary_like(scales, flat)
    start = _State(scales, jnp.full((), jnp.inf, ones.dtype), jnp.zeros((), jnp.int32))
    scales = _power_of_two(mesh.while_loop(proceed, improve, start).scales)
    rows, columns = (scales, scales) if symmetric else jnp.split(scales, 2)
    return Scaling(unravel(rows), unravel(columns))


class _State(NamedTuple):
    scales: jax.Array
    spread: jax.Array  # of the sizes, before the last round
    rounds: jax.Array


def _power_of_two(numbers: jax.Array) -> jax.Array:
    """Return the nearest powers of two."""
    exponent = jnp.round(jnp.log2(numbers)).astype(jnp.int32)
    return jnp.ldexp(jnp.ones_like(numbers), exponent)
