"""Units of x and F: a diagonal scaling that makes rows and columns of F_1 comparable."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax.tree
from jax.flatten_util import ravel_pytree

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
    equal, and R = C up to a number where F_1 is symmetric. So whoever solves, stops and judges by
    R A C does so in any units of x and F. Numbers are powers of two, and rounding does not change.

    Where sizes are comparable from the start, R and C are one: that costs three products. ||R F||
    is as large as ||F|| at (x, y), within a factor of two.

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


class _State(NamedTuple):
    rows: jax.Array
    columns: jax.Array
    spread: jax.Array  # of the sizes, before the last round
    rounds: jax.Array


def _find(problem: Problem, x: PyTree, y: PyTree) -> Scaling:
    optimality, jacobian = problem.linearize(x, y)
    flat, unravel_leaves = ravel_pytree(x)
    ones = jnp.ones(flat.shape, jnp.promote_types(flat.dtype, jnp.float32))  # room for squares
    probes = trees.signs(_PROBES, ones)

    def unravel(v: jax.Array) -> PyTree:
        return unravel_leaves(v.astype(flat.dtype))

    def sizes(operator: LinearOperator, left: jax.Array, right: jax.Array) -> jax.Array:
        def product(probe: jax.Array) -> jax.Array:
            return left * ravel_pytree(operator.matvec(unravel(right * probe)))[0]

        return jnp.sqrt(jnp.mean(jax.vmap(product)(probes) ** 2, axis=0))

    def improve(state: _State) -> _State:
        rows, columns, _, rounds = state
        of_rows = of_columns = sizes(jacobian, rows, columns)
        if not jacobian.structure.is_symmetric:
            of_columns = sizes(jacobian.transpose, columns, rows)
        spread = jnp.maximum(_spread(of_rows), _spread(of_columns))
        changes = (rounds > 0) | (spread > _COMPARABLE)
        following = rows / _root(of_rows), columns / _root(of_columns)
        rows, columns = trees.where(changes, following, (rows, columns))
        return _State(rows, columns, jnp.where(changes, spread, 1), rounds + 1)

    def proceed(state: _State) -> jax.Array:
        return (state.spread > _EQUAL) & (state.rounds < _MAX_ROUNDS)

    rows = columns = ones
    if problem.scaling is not None:
        known = problem.scaling.rows, problem.scaling.columns
        rows, columns = (ravel_pytree(diagonal)[0].astype(ones.dtype) for diagonal in known)
    start = _State(rows, columns, jnp.full((), jnp.inf, ones.dtype), jnp.zeros((), jnp.int32))
    end = jax.lax.while_loop(proceed, improve, start)
    rows, columns = unravel(_power_of_two(end.rows)), unravel(_power_of_two(end.columns))
    unit = trees.scaled_norm(optimality) / trees.scaled_norm(optax.tree.mul(rows, optimality))
    return Scaling(trees.scale(_power_of_two(unit), rows), columns)


def _spread(sizes: jax.Array) -> jax.Array:
    """Return the largest over the smallest size that is not zero."""
    return jnp.max(sizes) / jnp.min(jnp.where(sizes > 0, sizes, jnp.inf))


def _root(sizes: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.where((sizes > 0) & jnp.isfinite(sizes), sizes, 1))


def _power_of_two(numbers: jax.Array) -> jax.Array:
    """Return the nearest powers of two; 1 for what has none."""
    usable = (numbers > 0) & jnp.isfinite(numbers)
    exponent = jnp.round(jnp.log2(jnp.where(usable, numbers, 1))).astype(jnp.int32)
    return jnp.ldexp(jnp.ones_like(numbers), exponent)
