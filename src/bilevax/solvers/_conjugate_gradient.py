"""Nonlinear conjugate gradients with a curvature step."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._problems import Problem
from bilevax.solvers import _base as base
from bilevax.solvers._line_search import (
    Backtracking,
    backtrack,
    evaluate,
    longest_step,
    no_single_step,
)

PyTree = Any


class _State(NamedTuple):
    direction: PyTree
    length: jax.Array  # of the last step


@trees.register
@dataclasses.dataclass(frozen=True)
class ConjugateGradient(base.Solver):
    """Nonlinear conjugate gradients (Polak-Ribiere+) with the exact step of the local quadratic.

        x' = x + t d,  t = -<F, d> / <d, F_1 d>,  d' = -F' + max(0, <F', F' - F> / <F, F>) d

    One Hessian-vector product and one gradient a step, no tuning. On a quadratic objective it is
    the linear method and ends in at most dim(x) steps. Where the curvature is not positive, the
    line search starts from twice the length of the last step, or from what the same curvature
    with the other sign suggests if that is more.

    Args:
      rtol: stop at ||F(x, y)|| <= max(rtol ||F(x0, y)||, atol).
      atol: see `rtol`; in the unit of F. None is the rounding error of F, see `Solver`.
      maxiter: steps at most.
      line_search: how a step that is too long is shrunk.

    Raises:
      TypeError: on a problem that is not a `minimum(...)`.
      ValueError: for a negative tolerance or `maxiter`.

    Example:
      >>> import jax.numpy as jnp
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: jnp.sum(y * x**2 - x))
      >>> solve = bx.solution_map(problem, solver=bx.ConjugateGradient())
      >>> w, report = solve.with_report(jnp.zeros(3), jnp.array([1.0, 2.0, 4.0]))
      >>> int(report.iterations)
      3

    Source:
      E. Polak and G. Ribiere, "Note sur la convergence de methodes de directions conjuguees",
      1969.
    """

    rtol: Any = None
    atol: Any = None
    maxiter: Any = 1000
    _: dataclasses.KW_ONLY
    line_search: Backtracking = Backtracking()

    def __post_init__(self) -> None:
        base.check_stopping(self)
        checks.is_component("line_search", self.line_search, Backtracking, "Backtracking()")

    def evaluate(self, problem: Problem, x: PyTree, y: PyTree) -> tuple[PyTree, jax.Array]:
        return evaluate(base.require_minimum(problem, "ConjugateGradient"), x, y)

    def init(self, problem: Problem, x: PyTree, y: PyTree) -> base.Iterate:
        evaluation, norm = self.evaluate(problem, x, y)
        state = _State(trees.negative(evaluation.optimality), jnp.zeros_like(norm))
        return base.Iterate(x, evaluation, norm, state, jnp.zeros((), bool))

    def one_step(self, problem: Problem, x: PyTree, y: PyTree) -> PyTree:
        raise no_single_step("ConjugateGradient")

    def step(self, problem: Problem, iterate: base.Iterate, y: PyTree) -> base.Iterate:
        optimality = iterate.evaluation.optimality
        direction, last_length = iterate.state
        _, jacobian = problem.linearize(iterate.x, y)
        # Squares of F may be out of range, so all products are with vectors of unit size.
        unit = _unit_sized(direction, trees.norm(direction))
        curvature = trees.inner(unit, jacobian.matvec(unit))
        steepness = jnp.abs(curvature)
        exact = -trees.inner(optimality, unit) / jnp.where(steepness > 0, steepness, 1)
        exact = jnp.where(steepness > 0, exact, longest_step(iterate.x))
        curved = trees.decided(curvature > 0)
        length = jnp.where(curved, exact, jnp.maximum(2 * last_length, exact))
        found = backtrack(self.line_search, problem, iterate, y, unit, length)

        following, size = found.evaluation.optimality, iterate.residual
        optimality, following_unit = _unit_sized(optimality, size), _unit_sized(following, size)
        change = trees.add_scaled(following_unit, -1, optimality)
        square = trees.inner(optimality, optimality)
        beta = trees.inner(following_unit, change) / jnp.where(square > 0, square, 1)
        beta = jnp.where(trees.decided(beta > 0), beta, 0)
        steepest = trees.negative(following)
        direction = trees.add_scaled(steepest, beta, direction)
        slope = trees.inner(following_unit, _unit_sized(direction, size))
        descends = trees.decided(slope < 0)
        direction = trees.where(descends, direction, steepest)
        return found._replace(state=_State(direction, found.state))


def _unit_sized(tree: PyTree, size: jax.Array) -> PyTree:
    return trees.scale(1 / jnp.where(size > 0, size, 1), tree)
