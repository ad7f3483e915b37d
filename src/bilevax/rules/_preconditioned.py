"""The preconditioned implicit function theorem."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._problems import Problem
from bilevax._results import LinearReport, RuleReport
from bilevax._scaling import scaled
from bilevax.linear import default_rtol
from bilevax.rules._base import Settings, Wrapper
from bilevax.rules._steps import CustomStep, Step

PyTree = Any


@trees.register
@dataclasses.dataclass(frozen=True)
class Preconditioned(Wrapper):
    """A rule evaluated at the corrected point x - P(x, y)^{-1} F(x, y).

    The first-order error factor of the rule is multiplied by I - P^{-1} F_1. With `NewtonStep()` it
    vanishes and the error of the hypergradient is quadratic in ||x - x*||. The corrected point is
    also the value that the solution map returns; how the correction depends on y is not
    differentiated, for at the solution it does not depend on y.

    Order of composition: `Preconditioned(Reparameterized(rule, change), step)` corrects x, then
    differentiates in z there. `Reparameterized(Preconditioned(rule, step), change)` does everything
    in z: the step is one on z -> F in the new variable. Two corrections,
    `Preconditioned(Preconditioned(rule, first), second)`, are taken from the inside out.

    Args:
      rule: the rule that is evaluated at the corrected point.
      step: `NewtonStep`, `JacobiStep`, `GradientStep`, or a function (x, y, v) -> P(x, y)^{-1} v.

    Raises:
      TypeError: if `rule` is not a `Rule` or `step` neither a `Step` nor a function.

    Example:
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: 0.5 * y * x**2 - x)  # x*(y) = 1 / y
      >>> rule = bx.Preconditioned(bx.Implicit(), step=bx.NewtonStep())
      >>> x, _ = rule.refine(problem, 0.3, 2.0)
      >>> float(x), float(rule.pullback(problem, x, 2.0, 1.0)[0])
      (0.5, -0.25)

    Source:
      Z. Ye, G. Peyre, D. Cremers, P. Ablin, "Enhancing Hypergradients Estimation: A Study of
      Preconditioning and Reparameterization", 2024.
    """

    step: Step | Callable[[PyTree, PyTree, PyTree], PyTree]

    def __post_init__(self) -> None:
        super().__post_init__()
        if callable(self.step) and not isinstance(self.step, type):
            object.__setattr__(self, "step", CustomStep(self.step))
        checks.is_component("step", self.step, Step, "NewtonStep()")

    @property
    def order(self) -> int:  # type: ignore[override]
        """The power of ||x - x*|| that the step and the rule inside leave together."""
        return self.rule.order * self.step.order  # type: ignore[union-attr]

    def check(self, problem: Problem, x: PyTree, y: PyTree) -> None:
        self.rule.check(problem, x, y)

    def check_values(self, x: PyTree, y: PyTree) -> None:
        self.rule.check_values(x, y)

    def correct(
        self, problem: Problem, x: PyTree, y: PyTree, settings: Settings
    ) -> tuple[PyTree, LinearReport | None]:
        x, first = self.rule.correct(problem, x, y, settings)
        problem = scaled(problem, x, y)
        step, report = self.step.apply_inverse(problem, x, y, settings)  # type: ignore[union-attr]
        return trees.add_scaled(x, -1, step), _merge(first, report)

    def pull(
        self,
        problem: Problem,
        x: PyTree,
        y: PyTree,
        cotangent: PyTree,
        guess: PyTree | None,
        settings: Settings,
    ) -> tuple[Problem, PyTree, RuleReport]:
        return self.rule.pull(problem, x, y, cotangent, guess, self._tighten(settings, x))

    def push(
        self,
        problem: Problem,
        x: PyTree,
        y: PyTree,
        tangent: tuple[Problem, PyTree],
        settings: Settings,
    ) -> PyTree:
        return self.rule.push(problem, x, y, tangent, self._tighten(settings, x))

    def _tighten(self, settings: Settings, x: PyTree) -> Settings:
        # The corrected point is accurate to rtol^order, and the adjoint must not spoil that.
        order = self.step.order  # type: ignore[union-attr]
        if settings.rtol is None:
            return settings
        rtol = jnp.maximum(settings.rtol**order, default_rtol(x))
        return dataclasses.replace(settings, rtol=rtol)


def _merge(first: LinearReport | None, second: LinearReport) -> LinearReport:
    """Return one report of two corrections: the worse status and residual, and the total cost."""
    if first is None:
        return second
    return LinearReport(
        jnp.maximum(first.status, second.status),
        first.iterations + second.iterations,
        first.products + second.products,
        jnp.maximum(first.residual, second.residual),
        jnp.minimum(first.rounding, second.rounding),
    )
