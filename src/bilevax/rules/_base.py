"""What a rule is: how the derivative of the solution map is formed at an inexact solution."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bilevax import _checks as checks
from bilevax import _mesh as mesh
from bilevax import _trees as trees
from bilevax._failure import OnFailure
from bilevax._problems import Problem
from bilevax._results import LinearReport, RuleReport
from bilevax._scaling import scaled
from bilevax._separable import representative
from bilevax.linear import LinearSolver, default_rtol
from bilevax.rules._tasks import correct_tasks, pull_tasks, push_tasks

PyTree = Any


@trees.register
@dataclasses.dataclass(frozen=True)
class Settings:
    """What a solution map or an engine tells the linear solves inside a rule.

    Attributes:
      rtol: the tolerance of linear solvers that have none of their own; None for the dtype's.
      on_failure: what becomes of adjoint and tangent solves that do not end as asked for.
      adjoint_rtol: the tolerance of adjoint solves, where it is another one than `rtol` suggests.
    """

    rtol: Any = None
    on_failure: OnFailure = dataclasses.field(default=OnFailure.RETURN, metadata={"static": True})
    adjoint_rtol: Any = None

    @classmethod
    def following(
        cls, rtol: Any, x: PyTree, on_failure: OnFailure, adjoint_rtol: Any = None
    ) -> "Settings":
        """Return settings at the tolerance of an inner solver that stops at `rtol`.

        A zero, of a solver that stops by `atol` or by a number of steps, is no tolerance to follow.
        """
        if rtol is not None:
            rtol = jnp.where(jnp.asarray(rtol) > 0, rtol, default_rtol(x))
        return cls(rtol, on_failure, adjoint_rtol)

    def of_adjoint(self) -> "Settings":
        """Return the settings of an adjoint solve."""
        if self.adjoint_rtol is None:
            return self
        return dataclasses.replace(self, rtol=self.adjoint_rtol)


class Rule(abc.ABC):
    """Base class of rules: frozen pytrees that differentiate x*(y) at a point x near it.

    Users call `refine`, `pullback` and `pushforward`; they are compiled once per shape. A new
    rule implements `correct` (if it moves the point), `pull` and `push`, which run inside one
    trace. They differentiate with respect to the pair (problem, y): the leaves of a problem are the
    traced values that its function closes over.
    """

    mode: Any
    """"reverse" (a `custom_vjp`) or "forward" (a `custom_jvp`); a wrapper has that of its rule."""

    linear_solver: LinearSolver | None
    """Solves the adjoint system; None for the default. A wrapper has that of its rule."""

    order: int = 1
    """The power of ||x - x*|| to which the error is proportional."""

    adjoint_is_of_x: bool = True
    """Whether the adjoint that it reports is that of F_1, not of another variable."""

    def refine(self, problem: Problem, x: PyTree, y: PyTree) -> tuple[PyTree, LinearReport | None]:
        """Return the point at which this rule is evaluated, and the report of its correction.

        For `Implicit` that is x itself. For `Preconditioned` it is x - P^{-1} F(x, y).
        """
        x = _checked(self, problem, x, y)
        return _refine(self, problem, x, y)

    def pullback(
        self,
        problem: Problem,
        x: PyTree,
        y: PyTree,
        cotangent: PyTree,
        *,
        guess: PyTree | None = None,
    ) -> tuple[PyTree, RuleReport]:
        """Return (dx*/dy)^T cotangent as this rule estimates it at (x, y).

        The point is taken as given: rules that correct it do so in `refine`, so a hypergradient is
        `x, _ = rule.refine(problem, x, y)`, then g_2(x, y) plus the pullback of g_1(x, y).

        Args:
          problem: a `minimum`, `root` or `fixed_point`.
          x: the point, a pytree of floating arrays.
          y: the outer variable.
          cotangent: a pytree like x.
          guess: a first guess of the adjoint v, from a report of a nearby problem.

        Returns:
          A cotangent of y (float0 for integer and key leaves), and a `RuleReport`.

        Raises:
          TypeError: if the problem does not fit x, or the cotangent is not like x.
        """
        x = _checked(self, problem, x, y)
        cotangent = trees.as_arrays(cotangent)
        checks.same_structure("cotangent", cotangent, x, argument=True)
        cotangent = mesh.vary_like(cotangent, x)
        return _pullback(self, problem, x, y, cotangent, guess)

    def pushforward(self, problem: Problem, x: PyTree, y: PyTree, tangent: PyTree) -> PyTree:
        """Return (dx*/dy) tangent as this rule estimates it at (x, y).

        A linear function has no room for a report: the result is NaN where the solve fails.

        Args:
          problem: a `minimum`, `root` or `fixed_point`.
          x: the point, a pytree of floating arrays.
          y: the outer variable.
          tangent: a pytree like y, float0 for integer and key leaves.

        Returns:
          A tangent of x.

        Raises:
          TypeError: if the problem does not fit x.
        """
        x = _checked(self, problem, x, y)
        return _pushforward(self, problem, x, y, tangent)

    def check(self, problem: Problem, x: PyTree, y: PyTree) -> None:
        """Raise if a user's function does not fit the problem; costs nothing at run time."""

    def check_values(self, x: PyTree, y: PyTree) -> None:
        """Raise if a user's function is wrong at x and y, as far as their values are known."""

    def correct(
        self, problem: Problem, x: PyTree, y: PyTree, settings: Settings
    ) -> tuple[PyTree, LinearReport | None]:
        """Return the point at which this rule is evaluated; see `refine`."""
        return x, None

    @abc.abstractmethod
    def with_linear_solver(self, linear_solver: LinearSolver | None) -> "Rule":
        """Return this rule with another solver of the adjoint system; None for the default."""

    @abc.abstractmethod
    def pull(
        self,
        problem: Problem,
        x: PyTree,
        y: PyTree,
        cotangent: PyTree,
        guess: PyTree | None,
        settings: Settings,
    ) -> tuple[Problem, PyTree, RuleReport]:
        """Return cotangents of (problem, y), and a report."""

    @abc.abstractmethod
    def push(
        self,
        problem: Problem,
        x: PyTree,
        y: PyTree,
        tangent: tuple[Problem, PyTree],
        settings: Settings,
    ) -> PyTree:
        """Return the tangent of x that belongs to a tangent of (problem, y)."""


@dataclasses.dataclass(frozen=True)
class Wrapper(Rule):
    """Base class of rules that modify another one; what they leave alone is that of the other."""

    rule: Rule

    def __post_init__(self) -> None:
        checks.is_component("rule", self.rule, Rule, "Implicit()")

    @property
    def mode(self) -> str:  # type: ignore[override]
        """The mode of the rule inside."""
        return self.rule.mode

    @property
    def linear_solver(self) -> LinearSolver | None:  # type: ignore[override]
        """The solver of the adjoint system in the rule inside."""
        return self.rule.linear_solver

    @property
    def order(self) -> int:  # type: ignore[override]
        """The order of the rule inside."""
        return self.rule.order

    @property
    def adjoint_is_of_x(self) -> bool:  # type: ignore[override]
        """What the rule inside has."""
        return self.rule.adjoint_is_of_x

    def with_linear_solver(self, linear_solver: LinearSolver | None) -> "Wrapper":
        return dataclasses.replace(self, rule=self.rule.with_linear_solver(linear_solver))


def _checked(rule: Rule, problem: Problem, x: PyTree, y: PyTree) -> PyTree:
    checks.is_component("problem", problem, Problem, "minimum(objective)")
    checks.outer_variable(y)
    checks.inner_variable(x)
    x = problem.varying(trees.as_arrays(x), y)
    rule.check_values(representative(problem, x)[1], y)
    return x


@jax.jit
def _refine(rule: Rule, problem: Problem, x: PyTree, y: PyTree) -> Any:
    problem.check(x, y)
    rule.check(*representative(problem, x), y)
    return correct_tasks(rule.correct, problem, x, y, Settings())[:2]


@jax.jit
def _pullback(
    rule: Rule, problem: Problem, x: PyTree, y: PyTree, cotangent: PyTree, guess: PyTree | None
) -> Any:
    problem.check(x, y)
    rule.check(*representative(problem, x), y)
    problem = scaled(problem, x, y)
    _, cotangent_y, report = pull_tasks(rule.pull, problem, x, y, cotangent, guess, Settings())
    return cotangent_y, report


@jax.jit
def _pushforward(rule: Rule, problem: Problem, x: PyTree, y: PyTree, tangent: PyTree) -> Any:
    problem.check(x, y)
    rule.check(*representative(problem, x), y)
    problem = scaled(problem, x, y)
    still = jax.tree.map(jax.custom_derivatives.zero_from_primal, problem)
    settings = Settings(on_failure=OnFailure.NAN)
    return push_tasks(rule.push, problem, x, y, (still, tangent), settings)
