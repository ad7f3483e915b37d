"""Points that come nearer to x*: a Newton step for x and a correction of the adjoint."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import _mesh as mesh
from bilevax import _trees as trees
from bilevax._estimator import Estimate, size_of_terms, value_and_aux
from bilevax._problems import Problem
from bilevax._results import LinearReport
from bilevax._status import Status, code, is_unsolved
from bilevax.linear import LinearSolver, default_rtol, linear_solve
from bilevax.rules import Rule, Settings, resolve_linear_solver

PyTree = Any

# What a correction leaves of the errors that it starts from, so that what it changes tells how
# wrong the point before it is. A tenth would do, were it not for directions that F_1 makes small:
# of their errors a loose solve sees nothing, and then both corrections leave them as they are.
REDUCTION = 1e-6
# Above this contraction, Newton's method is not where it converges fast.
LARGEST_CONTRACTION = 0.4
# The rounding error of a sum, over eps times the size of its terms.
_ROUNDING = 8


class Point(NamedTuple):
    """An approximation of x*, of the adjoint there, and what follows from the two.

    Attributes:
      x: the point.
      adjoint: v, near F_1^{-T} g_1 at x.
      value: g at x.
      gradient: the floating leaves of g_2 - F_2^T v, or of what a rule makes of x.
      terms: the size of the terms that cancel in it, ||g_2|| + ||F_2^T v||.
      optimality: F at x.
      solve: the `LinearReport` of the adjoint; its residual is relative to g_1.
      products: with F_1, spent on x, int32; -1 where a linear solver does not count them.
      status: CONVERGED, or the worst status of the linear solves.
      aux: what the outer objective returns besides, or None.
    """

    x: PyTree
    adjoint: PyTree
    value: jax.Array
    gradient: list[jax.Array]
    terms: jax.Array
    optimality: PyTree
    solve: LinearReport
    products: jax.Array
    status: jax.Array
    aux: Any


def point_of(problem: Problem, found: Estimate, adjoint: PyTree, y: PyTree) -> Point:
    """Return the point of an estimate, with an adjoint of its own."""
    solves = (
        [found.rule.solve] if found.correction is None else [found.rule.solve, found.correction]
    )
    return Point(
        found.x,
        adjoint,
        found.value,
        trees.floating(found.gradient),
        found.terms,
        problem.optimality(found.x, y),
        found.rule.solve,
        jnp.zeros((), jnp.int32),
        _worst(*solves),
        found.aux,
    )


def correct(
    outer: Callable[..., Any],
    problem: Problem,
    point: Point,
    y: PyTree,
    linear_solver: LinearSolver | None,
    reduction: Any,
    has_aux: bool,
) -> Point:
    """Return a better point: a Newton step for x, and the solution of what is left of the adjoint.

        x' = x - F_1(x, y)^{-1} F(x, y),   v' = v + F_1^{-T} (g_1 - F_1^T v) at x'

    Both solves leave at most the part `reduction` of the errors that there were before: a solve
    that only had to meet a tolerance could stop at once, and the error of the point before would
    cancel in the difference of the two. `CG` can tell its error; elsewhere residuals become tiny.
    """
    tightest = default_rtol(point.x)
    solver = resolve_linear_solver(linear_solver, problem, Settings()).reducing(
        jnp.maximum(reduction, tightest),
        jnp.maximum(reduction * trees.epsilon(point.x) ** 0.5, tightest),
    )
    _, jacobian = problem.linearize(point.x, y)
    step, newton = linear_solve(jacobian, point.optimality, solver)
    x = trees.add_scaled(point.x, -1, step)
    value, pull_outer, aux = jax.vjp(
        lambda x, y: value_and_aux(outer, x, y, has_aux), x, y, has_aux=True
    )
    cotangent, explicit = pull_outer(jnp.ones_like(value))
    optimality, jacobian = problem.linearize(x, y)
    transpose = jacobian.transpose
    residual = trees.add_scaled(cotangent, -1, transpose.matvec(point.adjoint))
    # A guess that is worse than zero, as one of another kind of variable, is of no use.
    size = transpose.norm(cotangent)
    useful = transpose.norm(residual) < size
    adjoint = trees.where(useful, point.adjoint, jax.tree.map(jnp.zeros_like, point.adjoint))
    residual = trees.where(useful, residual, cotangent)
    move, solve = linear_solve(jacobian, residual, solver, transpose=True)
    adjoint = trees.add_scaled(adjoint, 1, move)
    _, implicit = problem.pull_outer(x, y, trees.negative(adjoint))
    part = transpose.norm(residual) / jnp.where(size > 0, size, 1)
    return Point(
        x,
        adjoint,
        value,
        trees.floating(trees.add_cotangents(explicit, implicit)),
        size_of_terms(explicit, implicit),
        optimality,
        solve._replace(residual=solve.residual * part, products=plus_one(solve.products)),
        newton.products,
        _worst(newton, solve),
        aux,
    )


def correct_twice(
    outer: Callable[..., Any],
    problem: Problem,
    start: Point,
    y: PyTree,
    linear_solver: LinearSolver | None,
    reduction: Any,
    *,
    has_aux: bool = False,
) -> tuple[Point, Point, Point]:
    """Return a point and those after two corrections; the second one is only to tell of the first.

    Args:
      outer: g.
      problem: the inner problem.
      start: the point.
      y: the outer variable.
      linear_solver: of the corrections; None for the default.
      reduction: see `correct`, of the first correction; that of the second is `REDUCTION`.
      has_aux: whether `outer` returns a pair.
    """

    def onward(point: Point, reduction: jax.Array) -> tuple[Point, Point]:
        following = correct(outer, problem, point, y, linear_solver, reduction, has_aux)
        return following, following

    # A loop compiles the solves once.
    reductions = jnp.stack([jnp.asarray(reduction, start.terms.dtype), REDUCTION])
    second, points = mesh.scan(onward, start, reductions)
    return start, jax.tree.map(lambda leaf: leaf[0], points), second


def unlimited(rule: Rule, linear_solver: LinearSolver | None) -> LinearSolver | None:
    """Return the linear solver of corrections: what is given or the rule's, without limits."""
    linear_solver = rule.linear_solver if linear_solver is None else linear_solver
    return None if linear_solver is None else linear_solver.without_limits()


def rounding_floor(*terms: jax.Array, like: PyTree) -> jax.Array:
    """Return the error that rounding alone makes where terms cancel in a hypergradient."""
    return _ROUNDING * trees.epsilon(like) * jnp.max(jnp.stack(terms))


def judge(
    problem: Problem,
    points: tuple[Point, Point, Point],
    y: PyTree,
    change: jax.Array,
    floor: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return the contraction of two corrections, and whether it tells that they converge.

    Args:
      problem: the inner problem.
      points: before, between and after them.
      y: the outer variable.
      change: what the second one did to the hypergradient.
      floor: how much of that may be rounding.
    """
    start, first, second = points
    before, after = (
        jnp.abs(trees.ravel([u - w for u, w in zip(a.gradient, b.gradient, strict=True)])[0])
        for a, b in ((start, first), (first, second))
    )
    # Entries that are nearly exact must not hide one that converges slowly: what each would still
    # change by, at its own rate. An entry that did not change before has the rate 1.
    rates = jnp.minimum(after / jnp.where(before > 0, before, 1), 1)
    coming = trees.norm(jnp.where(before > 0, rates, 1) * after)
    size = trees.norm(before)
    contraction = jnp.maximum(
        coming / jnp.where(change > 0, change, 1), change / jnp.where(size > 0, size, 1)
    )
    contraction = jnp.where(change <= floor, 0, contraction)
    # What rounding leaves of F at a solution near x: no step can improve on that.
    noise = problem.rounding_error(start.x, y)
    norms = [problem.norm(point.optimality) for point in points]
    # Steps that leap to where Omega hardly changes do not contract F: the mean factor of the two.
    factor = jnp.sqrt(norms[2] / jnp.where(norms[0] > 0, norms[0], 1))
    contraction = jnp.where(norms[2] <= noise, contraction, jnp.maximum(contraction, factor))
    return contraction, (norms[1] <= noise) | (contraction <= LARGEST_CONTRACTION)


def distance(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
    """Return the norm of the difference of two gradients."""
    return trees.norm([u - w for u, w in zip(a, b, strict=True)])


def plus_one(count: jax.Array) -> jax.Array:
    """Return a count and one more; -1 if it is not known."""
    return jnp.where(count >= 0, count + 1, -1)


def total(*counts: jax.Array) -> jax.Array:
    """Return the sum of counts; -1 if one of them is not known."""
    known = jnp.stack(counts)
    return jnp.where(jnp.all(known >= 0), jnp.sum(known), -1).astype(jnp.int32)


def _worst(*solves: LinearReport) -> jax.Array:
    converged = code(Status.CONVERGED)
    statuses = [jnp.where(is_unsolved(solve.status), solve.status, converged) for solve in solves]
    return jnp.max(jnp.stack(statuses))
