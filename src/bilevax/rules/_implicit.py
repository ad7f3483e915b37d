"""The implicit function theorem."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._operator import Structure
from bilevax._problems import Problem
from bilevax._results import RuleReport
from bilevax.linear import CG, GMRES, LinearSolver, linear_solve, transposable_solve
from bilevax.rules._base import Rule, Settings

PyTree = Any


@trees.register
@dataclasses.dataclass(frozen=True)
class Implicit(Rule):
    """Implicit differentiation, evaluated at the point x as it is.

        dx*/dy = -F_1(x, y)^{-1} F_2(x, y)

    F(x, y) = 0 is the inner problem, F_1 and F_2 the partial derivatives of F in x and in y. A
    pullback of the cotangent c solves the adjoint system F_1^T v = c and returns -F_2^T v. At an
    inexact x its error is first order, C_y ||x - x*||.

    Args:
      linear_solver: for the adjoint system. None is `CG()` where F_1 is declared positive definite
        and `GMRES()` elsewhere, at the tolerance of the inner solver.
      mode: "reverse" makes the solution map a `jax.custom_vjp`: reverse mode to any order.
        "forward" makes it a `jax.custom_jvp` with a transposable solve: the same numbers, and
        `jvp`, `jacfwd` and `hessian` as well; adjoint solves then go without a report. A solution
        map inside the problem of another one needs "forward".

    Raises:
      TypeError: if `linear_solver` is not a `LinearSolver`.
      ValueError: if `mode` is neither of the two.

    Example:
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: 0.5 * y * x**2 - x)  # x*(y) = 1 / y
      >>> gradient, report = bx.Implicit().pullback(problem, 0.5, 2.0, 1.0)
      >>> float(gradient), bx.Status(int(report.solve.status)).name
      (-0.25, 'CONVERGED')

    Source:
      F. Pedregosa, "Hyperparameter Optimization with Approximate Gradient", 2016.
    """

    linear_solver: LinearSolver | None = None
    mode: str = dataclasses.field(default="reverse", metadata={"static": True})

    def __post_init__(self) -> None:
        if self.linear_solver is not None:
            checks.is_component("linear_solver", self.linear_solver, LinearSolver, "CG()")
        checks.mode(self.mode)

    def with_linear_solver(self, linear_solver: LinearSolver | None) -> "Implicit":
        return dataclasses.replace(self, linear_solver=linear_solver)

    def pull(
        self,
        problem: Problem,
        x: PyTree,
        y: PyTree,
        cotangent: PyTree,
        guess: PyTree | None,
        settings: Settings,
    ) -> tuple[Problem, PyTree, RuleReport]:
        _, jacobian = problem.linearize(x, y)
        solver = resolve_linear_solver(self.linear_solver, problem, settings.of_adjoint())
        v, report = linear_solve(
            jacobian,
            cotangent,
            solver,
            transpose=True,
            guess=guess,
            on_failure=settings.on_failure,
        )
        cotangents = problem.pull_outer(x, y, trees.negative(v))
        return *cotangents, RuleReport(report, v, jnp.zeros((), jnp.int32))

    def push(
        self,
        problem: Problem,
        x: PyTree,
        y: PyTree,
        tangent: tuple[Problem, PyTree],
        settings: Settings,
    ) -> PyTree:
        _, jacobian = problem.linearize(x, y)
        solver = resolve_linear_solver(self.linear_solver, problem, settings)
        rhs = trees.negative(problem.push_outer(x, y, tangent))
        return transposable_solve(jacobian, rhs, solver, on_failure=settings.on_failure)


def resolve_linear_solver(
    solver: LinearSolver | None, problem: Problem, settings: Settings
) -> LinearSolver:
    """Return the solver, or the matrix-free default for what is declared of F_1."""
    if solver is None:
        solver = CG() if problem.structure is Structure.POSITIVE_DEFINITE else GMRES()
    return solver.with_default_rtol(settings.rtol)
