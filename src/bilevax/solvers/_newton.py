"""Newton's method, matrix-free."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._failure import OnFailure
from bilevax._operator import LinearOperator, Structure
from bilevax._problems import Minimum, Problem
from bilevax.linear import CG, GMRES, LinearSolver, linear_solve
from bilevax.solvers import _base as base
from bilevax.solvers._line_search import Backtracking, backtrack, evaluate

PyTree = Any


_LOOSEST = 0.3  # relative residual of a linear solve


class _Run(NamedTuple):
    scale: jax.Array  # ||F|| at the cold start
    target: jax.Array  # where the run ends


@trees.register
@dataclasses.dataclass(frozen=True)
class Newton(base.Solver):
    """Newton's method with a line search: x <- x - t F_1(x, y)^{-1} F(x, y).

    By default the linear system is solved inexactly and matrix-free, by CG where F_1 is declared
    positive definite and by GMRES elsewhere, to a relative residual of
    min(0.1, sqrt(||F(x, y)|| / ||F(x0, y)||)): loosely far from the solution, and tightly enough
    near it for superlinear convergence. Where an exact step would come to a tolerance that is above
    sqrt(eps), the system is solved as accurately as that needs. For a minimum, a direction that
    does not descend is replaced by the steepest one, so negative curvature slows Newton down but
    does not fool it.

    Units do not matter: ||F|| is that of scaled rows where entries of x or F have sizes that differ
    widely, and so are the residuals of its linear systems; see `minimum`.

    Args:
      linear_solver: a `LinearSolver` that is used with its own tolerances, such as `Dense()`;
        None for the inexact solve above.
      rtol: stop at ||F(x, y)|| <= max(rtol ||F(x0, y)||, atol).
      atol: see `rtol`; in the unit of F. None is the rounding error of F, see `Solver`.
      maxiter: steps at most.
      line_search: how a step that is too long is shrunk.

    Raises:
      TypeError: if `linear_solver` is not a `LinearSolver`.
      ValueError: for a negative tolerance or `maxiter`.

    Example:
      >>> import jax.numpy as jnp
      >>> import bilevax as bx
      >>> solve = bx.solution_map(bx.root(lambda x, y: x**3 - y), solver=bx.Newton())
      >>> round(float(solve(1.0, 8.0)), 4)
      2.0

    Source:
      R. Dembo, S. Eisenstat, T. Steihaug, "Inexact Newton Methods", 1982.
    """

    linear_solver: LinearSolver | None = None
    rtol: Any = None
    atol: Any = None
    maxiter: Any = 100
    _: dataclasses.KW_ONLY
    line_search: Backtracking = Backtracking()

    takes_scaling = True

    def __post_init__(self) -> None:
        base.check_stopping(self)
        if self.linear_solver is not None:
            checks.is_component("linear_solver", self.linear_solver, LinearSolver, "Dense()")
        checks.is_component("line_search", self.line_search, Backtracking, "Backtracking()")

    def evaluate(self, problem: Problem, x: PyTree, y: PyTree) -> tuple[PyTree, jax.Array]:
        return evaluate(problem, x, y)

    def init(self, problem: Problem, x: PyTree, y: PyTree) -> base.Iterate:
        evaluation, norm = self.evaluate(problem, x, y)
        scale = jax.lax.stop_gradient(norm)
        return base.Iterate(
            x, evaluation, norm, _Run(scale, jnp.zeros_like(scale)), jnp.zeros((), bool)
        )

    def toward(self, iterate: base.Iterate, scale: jax.Array, target: jax.Array) -> base.Iterate:
        return iterate._replace(state=_Run(scale, target))

    def differentiable(self, problem: Problem, x: PyTree) -> "Newton":
        # The derivative of an inexact solve is not that of an exact one, far from the solution.
        solver = self._linear_solver(problem, None)
        return dataclasses.replace(self, linear_solver=solver)

    def one_step(self, problem: Problem, x: PyTree, y: PyTree) -> PyTree:
        # A whole step, for at a solution rounding alone decides the line search.
        optimality, jacobian = problem.linearize(x, y)
        solver = self._linear_solver(problem, None)
        return trees.add_scaled(x, -1, _solve(jacobian, optimality, solver))

    def _linear_solver(self, problem: Problem, rtol: Any) -> LinearSolver:
        if self.linear_solver is not None:
            return self.linear_solver
        return CG(rtol) if problem.structure is Structure.POSITIVE_DEFINITE else GMRES(rtol)

    def step(self, problem: Problem, iterate: base.Iterate, y: PyTree) -> base.Iterate:
        optimality = iterate.evaluation.optimality
        norm, run = iterate.residual, iterate.state
        part = norm / run.scale
        forcing = jnp.minimum(jnp.sqrt(part), 0.1)
        # To the tolerance and no further, but for one near rounding: more digits cost little then.
        last = jnp.minimum(0.8 * run.target / norm, _LOOSEST)
        aims = (norm > run.target) & (run.target > trees.epsilon(iterate.x) ** 0.5 * run.scale)
        forcing = jnp.where(aims & (last > jnp.minimum(part, 0.1)), last, forcing)
        solver = self._linear_solver(problem, forcing)
        _, jacobian = problem.linearize(iterate.x, y)
        direction = trees.negative(_solve(jacobian, optimality, solver))
        if isinstance(problem, Minimum):
            # Not downhill, or NaN because curvature was negative at once: steepest descent.
            descends = trees.decided(trees.inner(optimality, direction) <= 0)
            steepest = trees.scale(-1 / jnp.maximum(norm, 1), problem.in_units_of_x(optimality))
            direction = trees.where(descends, direction, steepest)
        whole = jnp.ones_like(norm)
        found = backtrack(self.line_search, problem, iterate, y, direction, whole, True)
        return found._replace(state=run)


def _solve(jacobian: LinearOperator, optimality: PyTree, solver: LinearSolver) -> PyTree:
    # How well is seen by the line search; derivatives of the step have nothing else to tell.
    return linear_solve(jacobian, optimality, solver, on_derivative_failure=OnFailure.NAN)[0]
