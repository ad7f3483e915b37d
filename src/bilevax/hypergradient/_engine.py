"""Value, hypergradient, warm start and report in one pure function."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._closures import as_partial
from bilevax._estimator import value_and_aux
from bilevax._failure import OnFailure
from bilevax._iterative import IterativeRule
from bilevax._problems import Problem
from bilevax._separable import Separable, check_policy, not_separable, representative
from bilevax.certificates import Accuracy
from bilevax.hypergradient._evaluate import evaluate, evaluate_run
from bilevax.hypergradient._results import Hypergradient, WarmStart
from bilevax.rules import Implicit, Rule
from bilevax.solvers import Solver

PyTree = Any


@trees.register
@dataclasses.dataclass(frozen=True, eq=False)
class Engine:
    """A pure function (y, warm) -> `Hypergradient`; made by `value_and_hypergradient`.

    A pytree, like all that it is made of: its numbers are leaves.
    """

    outer: Partial
    problem: Problem
    solver: Solver
    rule: Rule | IterativeRule
    accuracy: Accuracy | None
    certified: Any  # whether to make a certificate, which may be traced; None for never
    adjoint_rtol: Any  # of adjoint solves without a tolerance of their own; None follows `solver`
    has_aux: bool = dataclasses.field(metadata={"static": True})
    on_failure: OnFailure = dataclasses.field(metadata={"static": True})

    def __call__(self, y: PyTree, warm: WarmStart) -> Hypergradient:
        """Return value, hypergradient, next warm start and report at y."""
        if not isinstance(warm, WarmStart):
            raise TypeError(
                f"`warm` must be a WarmStart, for example `cold_start(x0)`; got {warm!r}."
            )
        checks.inner_variable(warm.x, "warm.x")
        checks.outer_variable(y)
        warm, y = trees.as_arrays(warm), trees.as_arrays(y)
        for name in ("adjoint", "start"):
            checks.same_structure(
                f"warm.{name}", getattr(warm, name), warm.x, expected="warm.x", argument=True
            )
        if isinstance(self.rule, IterativeRule):
            return evaluate_run(
                self.outer,
                self.problem,
                self.rule.bind(self.solver),
                y,
                warm,
                forward=self.rule.mode == "forward",
                has_aux=self.has_aux,
                on_failure=self.on_failure,
            )
        self.rule.check_values(representative(self.problem, warm.x)[1], y)
        return evaluate(
            self.outer,
            self.problem,
            self.solver,
            self.rule,
            self.accuracy,
            self.certified,
            self.adjoint_rtol,
            y,
            warm,
            has_aux=self.has_aux,
            on_failure=self.on_failure,
        )

    @property
    def has_certificates(self) -> bool:
        """Whether hypergradients of this engine can be certified."""
        return not isinstance(self.rule, IterativeRule) and not isinstance(self.problem, Separable)

    def certify(self, y: PyTree, warm: WarmStart) -> Hypergradient:
        """Return the hypergradient with a certificate, whatever the policy for failures is."""
        certified = None if self.accuracy is not None else True
        engine = dataclasses.replace(self, certified=certified, on_failure=OnFailure.RETURN)
        return engine(y, warm)

    def value(self, x: PyTree, y: PyTree) -> jax.Array:
        """Return g(x, y), without what the outer objective returns besides."""
        return value_and_aux(self.outer, x, y, self.has_aux)[0]


def value_and_hypergradient(
    outer: Callable[..., Any],
    problem: Problem,
    solver: Solver,
    rule: Rule | IterativeRule | None = None,
    *,
    accuracy: Accuracy | None = None,
    certified: bool = False,
    has_aux: bool = False,
    on_failure: OnFailure = OnFailure.RETURN,
) -> Engine:
    """Make the explicit engine: value and hypergradient of h(y) = g(x*(y), y).

        engine = value_and_hypergradient(outer, problem, solver=..., rule=...)
        result = engine(y, cold_start(x0))
        result = engine(y, result.warm)

    The gradient is Omega(x, y) = g_2 + (dx*/dy)^T g_1 at the point x of the rule. Unlike `jax.grad`
    through a `solution_map`, the engine starts both solves from the last ones and reports on both.
    It is pure and compiled once per shape; `jit`, `vmap` and `scan` go through it. For derivatives
    of the gradient, or with respect to anything but y, use a `solution_map`.

    Args:
      outer: g, a function of (x, y) that returns a real scalar; with `has_aux=True` a pair of it
        and any pytree.
      problem: `minimum(f)`, `root(F)` or `fixed_point(T)`.
      solver: the inner `Solver`.
      rule: how the derivative is formed; None is `Implicit()`. `Unrolled()` differentiates the run
        from the warm start on, which is a constant: give the solver a fixed number of steps then.
      accuracy: `RelativeAccuracy(value)` or `AbsoluteAccuracy(value)`. In place of its `rtol`, the
        inner solver then comes near to x*, and corrections of x and of the adjoint follow until the
        last one changes the hypergradient by less than that; `maxiter` and `atol` bound the solver,
        which runs on where corrections do not converge. Their linear solves follow the accuracy.
      certified: whether the report has a certificate of the hypergradient at the tolerance of the
        solver; its linear solves leave a tenth of the residuals that were achieved. With
        `accuracy`, it has one anyway.
      has_aux: whether `outer` returns a pair.
      on_failure: by default results are returned as they are and the report tells; see
        `solution_map`.

    Returns:
      An `Engine`, called as engine(y, warm), which returns a `Hypergradient`.

    Raises:
      TypeError: for a wrong kind of argument; for an accuracy or a certificate where there are no
        certificates; for `OnFailure.DROP` where there are no tasks; and, at the first call, if
        `outer` does not return a scalar or the problem does not fit x.

    Example:
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: 0.5 * y * x**2 - x)  # x*(y) = 1 / y
      >>> engine = bx.value_and_hypergradient(lambda x, y: x, problem, solver=bx.Newton())
      >>> result = engine(2.0, bx.cold_start(0.0))
      >>> float(result.value), float(result.gradient)
      (0.5, -0.25)
    """
    rule = Implicit() if rule is None else rule
    outer = as_partial("outer", outer)
    checks.is_component("problem", problem, Problem, "minimum(objective)")
    checks.is_component("solver", solver, Solver, "Newton()")
    if not isinstance(rule, IterativeRule):
        checks.is_component("rule", rule, Rule, "Implicit()")
    if accuracy is not None:
        checks.is_component("accuracy", accuracy, Accuracy, "RelativeAccuracy(1e-2)")
        require_certificates("accuracy", problem, rule)
    if certified:
        require_certificates("certified", problem, rule)
    checks.is_component("on_failure", on_failure, OnFailure, "OnFailure.RETURN")
    check_policy(problem, on_failure)
    if isinstance(rule, IterativeRule):
        rule.bind(solver)  # which raises if they do not fit
    return Engine(
        outer,
        problem,
        solver,
        rule,
        accuracy,
        certified=True if certified else None,
        adjoint_rtol=None,
        has_aux=has_aux,
        on_failure=on_failure,
    )


def require_certificates(name: str, problem: Problem, rule: Rule | IterativeRule) -> None:
    """Raise where there are no certificates, which the argument of that name needs."""
    if isinstance(rule, IterativeRule):
        raise TypeError(
            f"`{name}` needs a rule with certificates, such as `Implicit()`; got {rule!r}."
        )
    not_separable(problem)
