"""A value and a hypergradient with what is known of their errors, by a reference or by bounds."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax.tree

from bilevax import _trees as trees
from bilevax.certificates import BoundConstants, bound
from bilevax.hypergradient import Engine, Hypergradient
from bilevax.linear import linear_solve
from bilevax.rules import Settings, resolve_linear_solver

PyTree = Any

# Tolerance of the two solves of a reference: what they leave is a tenth of the error, by their
# residuals, and the gradient is taken to be as far off as the second number.
_REFERENCE_RTOL, _LEFT = 0.1, 0.3
# Above this factor a step towards the reference is not one of Newton's method near a solution.
_LARGEST_CONTRACTION = 0.5


class Judged(NamedTuple):
    """What is known at a point y.

    Attributes:
      value: the best estimate of h(y).
      value_error: how far it may be from h(y); infinite where nothing is known.
      gradient: the best estimate of dh/dy.
      gradient_error: how far it may be from that; infinite where nothing is known.
      inner: the part of `gradient_error` that the inexact x causes.
      adjoint: the part that the inexact adjoint causes.
      x: the best estimate of x*(y).
      v: that of the adjoint.
      products: with F_1 or F_1^T, spent on this.
    """

    value: jax.Array
    value_error: jax.Array
    gradient: PyTree
    gradient_error: jax.Array
    inner: jax.Array
    adjoint: jax.Array
    x: PyTree
    v: PyTree
    products: jax.Array


def by_bounds(engine: Engine, y: PyTree, result: Hypergradient, constants: Any) -> Judged:
    """Judge a result by proofs; see `hypergradient_bound`."""
    x, v = result.x, result.warm.adjoint
    known: BoundConstants | Any = constants
    found = bound(engine.value, engine.problem, x, y, result.gradient, v, known)
    none = jnp.zeros((), jnp.int32)
    return Judged(
        found.corrected_value,
        found.corrected,
        result.gradient,
        found.absolute,
        found.inner,
        found.adjoint,
        x,
        v,
        none,
    )


def by_reference(engine: Engine, y: PyTree, result: Hypergradient) -> Judged:
    """Judge a result by how far it is from a better one, which takes its place.

    The reference is at a Newton point x_N, with the adjoint there. Values are corrected to second
    order: h(y) = g(x, y) - <v, F(x, y)> + O(||x - x*|| (||x - x*|| + ||r||)), r = g_1 - F_1^T v.
    What is handed on is the reference. The error of its value is taken to be as large as the whole
    difference, which is about the error of what the engine returned; that of its gradient, which
    proves nothing, a part of it.
    """
    problem, x, v = engine.problem, result.x, result.warm.adjoint
    rule: Any = engine.rule
    solver = resolve_linear_solver(rule.linear_solver, problem, Settings(_REFERENCE_RTOL))
    optimality, jacobian = problem.linearize(x, y)
    step, to_newton = linear_solve(jacobian, optimality, solver)
    newton = optax.tree.sub(x, step)
    left, jacobian = problem.linearize(newton, y)
    value, (slope_x, slope_y) = jax.value_and_grad(engine.value, argnums=(0, 1))(newton, y)
    residual = optax.tree.sub(slope_x, jacobian.transpose.matvec(v))
    change, to_adjoint = linear_solve(jacobian, residual, solver, transpose=True)
    adjoint = optax.tree.add(v, change)
    gradient = trees.difference(slope_y, problem.pull_outer(newton, y, adjoint)[1])
    by_adjoint = problem.pull_outer(newton, y, change)[1]
    moved = trees.difference(result.gradient, gradient)

    # moved = (Omega(x, v) - Omega(x_N, v)) + F_2^T change
    before = result.value - trees.inner(v, optimality)
    after = value - trees.inner(adjoint, left)
    rounding = 10 * trees.epsilon(x)
    noise = jnp.abs(value) + trees.norm(adjoint) * problem.terms_norm(newton, y)
    terms = trees.norm(slope_y) + trees.norm(trees.difference(slope_y, gradient))
    # <step, F> = F^T F_1^{-1} F at x, a size that knows no units; a Newton step takes it away.
    decrement = jnp.abs(trees.inner(step, optimality))
    contraction = jnp.abs(trees.inner(step, left)) / jnp.where(decrement > 0, decrement, 1)
    at_noise = problem.norm(optimality) <= rounding * problem.terms_norm(x, y)
    is_known = (contraction <= _LARGEST_CONTRACTION) | at_noise

    def known(error: jax.Array) -> jax.Array:
        return jnp.where(is_known & ~jnp.isnan(error), error, jnp.inf)

    counts = jnp.stack([to_newton.products, to_adjoint.products])
    return Judged(
        after.astype(result.value.dtype),
        known(jnp.abs(before - after) + rounding * noise).astype(result.value.dtype),
        gradient,
        known(_LEFT * trees.norm(moved) + rounding * terms),
        known(_LEFT * trees.norm(trees.difference(moved, by_adjoint))),
        known(_LEFT * trees.norm(by_adjoint)),
        newton,
        adjoint,
        jnp.where(jnp.all(counts >= 0), jnp.sum(counts), -1).astype(jnp.int32),
    )
