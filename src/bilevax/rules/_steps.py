"""Corrections of an inexact solution: one preconditioned step x - P^{-1} F(x, y)."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax.tree
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._operator import LinearOperator
from bilevax._problems import Problem
from bilevax._results import LinearReport
from bilevax._status import Status, code
from bilevax.linear import LinearSolver, linear_solve
from bilevax.rules._base import Settings
from bilevax.rules._diagonals import Diagonal, as_diagonal
from bilevax.rules._implicit import resolve_linear_solver

PyTree = Any


class Step(abc.ABC):
    """Base class of correction steps.

    A subclass gives P^{-1} F. `order` is the power of ||x - x*|| that is left after the step.
    """

    order = 1

    @abc.abstractmethod
    def apply_inverse(
        self, problem: Problem, x: PyTree, y: PyTree, settings: Settings
    ) -> tuple[PyTree, LinearReport]:
        """Return P(x, y)^{-1} F(x, y) and how well it solves F_1 s = F."""


@trees.register
@dataclasses.dataclass(frozen=True)
class NewtonStep(Step):
    """P = F_1(x, y): one Newton step. What is left of ||x - x*|| is its square.

    F_1 s = F is solved to the rounding error of F and no further: where F_1 is singular along a
    direction that changes nothing, what rounding leaves of F along it has no solution.

    Args:
      linear_solver: for F_1 s = F. None is `CG()` where F_1 is declared positive definite and
        `GMRES()` elsewhere, at the tolerance of the inner solver.

    Raises:
      TypeError: if `linear_solver` is not a `LinearSolver`.

    Example:
      >>> import bilevax as bx
      >>> rule = bx.Preconditioned(bx.Implicit(), step=bx.NewtonStep(bx.CG(maxiter=20)))

    Source:
      Z. Ye, G. Peyre, D. Cremers, P. Ablin, "Enhancing Hypergradients Estimation: A Study of
      Preconditioning and Reparameterization", 2024.
    """

    linear_solver: LinearSolver | None = None
    order = 2

    def __post_init__(self) -> None:
        if self.linear_solver is not None:
            checks.is_component("linear_solver", self.linear_solver, LinearSolver, "CG()")

    def apply_inverse(
        self, problem: Problem, x: PyTree, y: PyTree, settings: Settings
    ) -> tuple[PyTree, LinearReport]:
        optimality, jacobian = problem.linearize(x, y)
        solver: Any = resolve_linear_solver(self.linear_solver, problem, settings)
        noise = problem.rounding_error(x, y)
        if hasattr(solver, "atol"):
            solver = dataclasses.replace(solver, atol=jnp.maximum(solver.atol, noise))
        step, report = linear_solve(jacobian, optimality, solver)

        size, status = trees.norm(optimality), report.status
        unsolved = (status == Status.MAXITER) | (status == Status.STALLED)
        unsolved = unsolved | (status == Status.BREAKDOWN)
        nothing = unsolved & (size <= noise)  # to be corrected
        step = trees.where(nothing, optax.tree.zeros_like(step), step)
        done = nothing | (unsolved & (report.residual * size <= noise))
        level = noise / jnp.where(size > 0, size, 1)
        return step, report._replace(
            status=jnp.where(done, code(Status.CONVERGED), status),
            rounding=jnp.maximum(report.rounding, level),
        )


@trees.register
@dataclasses.dataclass(frozen=True)
class JacobiStep(Step):
    """P = diag F_1(x, y): cheap, and first order still.

    It multiplies the error by I - P^{-1} F_1. If that has a norm above 1 the step makes things
    worse; the `residual` of its report is ||(I - F_1 P^{-1}) F|| / ||F||, which then is above 1
    as a rule.

    Args:
      diagonal: `ExactDiagonal(...)` (None), `HutchinsonDiagonal(...)`, or a function
        (x, y) -> pytree like x. A zero in it makes the step NONFINITE.

    Raises:
      TypeError: if `diagonal` is none of these.

    Example:
      >>> import bilevax as bx
      >>> rule = bx.Preconditioned(bx.Implicit(), step=bx.JacobiStep())

    Source:
      Z. Ye, G. Peyre, D. Cremers, P. Ablin, "Enhancing Hypergradients Estimation: A Study of
      Preconditioning and Reparameterization", 2024.
    """

    diagonal: Diagonal | Callable[[PyTree, PyTree], PyTree] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "diagonal", as_diagonal(self.diagonal))

    def apply_inverse(
        self, problem: Problem, x: PyTree, y: PyTree, settings: Settings
    ) -> tuple[PyTree, LinearReport]:
        optimality, jacobian = problem.linearize(x, y)
        diagonal = self.diagonal.evaluate(problem, x, y)  # type: ignore[union-attr]
        return _single(jacobian, optimality, jax.tree.map(jnp.divide, optimality, diagonal))


@trees.register
@dataclasses.dataclass(frozen=True)
class GradientStep(Step):
    """P^{-1} = step_size * I: one more gradient (or damped Picard) step.

    Args:
      step_size: a positive number, in the unit of 1 / F_1.

    Raises:
      ValueError: if `step_size` is not positive.

    Example:
      >>> import bilevax as bx
      >>> rule = bx.Preconditioned(bx.Implicit(), step=bx.GradientStep(0.1))
    """

    step_size: Any

    def __post_init__(self) -> None:
        checks.positive("step_size", self.step_size)

    def apply_inverse(
        self, problem: Problem, x: PyTree, y: PyTree, settings: Settings
    ) -> tuple[PyTree, LinearReport]:
        optimality, jacobian = problem.linearize(x, y)
        return _single(jacobian, optimality, trees.scale(self.step_size, optimality))


@trees.register
@dataclasses.dataclass(frozen=True)
class CustomStep(Step):
    """Any P^{-1} of the user's.

    Args:
      inverse: (x, y, v) -> P(x, y)^{-1} v, a pytree like x.

    Raises:
      TypeError: if `inverse` is not a function, or returns something unlike x.

    Example:
      >>> import bilevax as bx
      >>> rule = bx.Preconditioned(bx.Implicit(), step=bx.CustomStep(lambda x, y, v: v / y))
    """

    inverse: Callable[[PyTree, PyTree, PyTree], PyTree]

    def __post_init__(self) -> None:
        if not isinstance(self.inverse, Partial):
            checks.is_callable("step", self.inverse)
            object.__setattr__(self, "inverse", Partial(self.inverse))

    def apply_inverse(
        self, problem: Problem, x: PyTree, y: PyTree, settings: Settings
    ) -> tuple[PyTree, LinearReport]:
        optimality, jacobian = problem.linearize(x, y)
        step = trees.as_arrays(self.inverse(x, y, optimality))
        checks.same_structure("step", step, x)
        return _single(jacobian, optimality, step)


def _single(
    jacobian: LinearOperator, optimality: PyTree, step: PyTree
) -> tuple[PyTree, LinearReport]:
    """Report on a step that is not a solve: the part of F that it leaves, to first order."""
    left = trees.norm(trees.add_scaled(optimality, -1, jacobian.matvec(step)))
    size = trees.norm(optimality)
    residual = left / jnp.where(size > 0, size, 1)
    status = jnp.where(jnp.isfinite(left), code(Status.TRUNCATED), code(Status.NONFINITE))
    one = jnp.ones((), jnp.int32)
    return step, LinearReport(status, one, one, residual)
