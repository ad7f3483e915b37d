"""Which rule is worth its cost: predicted errors and costs of all of them at one inexact point."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._estimator import Estimate, checked_point, estimate
from bilevax._problems import Problem
from bilevax._status import Status, is_unsolved
from bilevax.certificates import Accuracy, hypergradient_error
from bilevax.linear import LinearSolver
from bilevax.rules import (
    DiagonalChange,
    ExpChange,
    Implicit,
    JacobiStep,
    NewtonStep,
    Preconditioned,
    Reparameterized,
    Rule,
    Settings,
)

PyTree = Any


class _Candidate(NamedTuple):
    name: str
    make: Callable[[LinearSolver | None], Rule]
    diagonals: int  # evaluations of diag F_1, in the unit of one


# A DiagonalChange differentiates diag F_1 in y. That counts as two, as F_2^T v does beside F.
_CANDIDATES = (
    _Candidate("Implicit", Implicit, 0),
    _Candidate("JacobiStep", lambda s: Preconditioned(Implicit(s), JacobiStep()), 1),
    _Candidate("NewtonStep", lambda s: Preconditioned(Implicit(s), NewtonStep(s)), 0),
    _Candidate("DiagonalChange", lambda s: Reparameterized(Implicit(s), DiagonalChange()), 2),
    _Candidate("ExpChange", lambda s: Reparameterized(Implicit(s), ExpChange()), 0),
)


class RuleTable(NamedTuple):
    """Rules beside the predicted errors and the costs of their hypergradients at one point (x, y).

    Printed, it is a table. Arrays are NumPy arrays with one entry per rule.

    Attributes:
      names: what tells a rule from the others, a tuple of texts.
      rules: the `Rule`s, a tuple.
      relative_error: the estimate of ||Omega - dh/dy|| / ||dh/dy||, of a `Certificate`.
      absolute_error: the estimate of ||Omega - dh/dy||, in the unit of the hypergradient.
      cost: of the hypergradient at x, in evaluations of F; NaN where the linear solver does not
        count its products.
      contraction: of the certificate; the errors may be wrong by about that factor, relatively.
      status: the worst `Status` code of the correction, the adjoint solve and the certificate.
        The errors of a rule that is not CONVERGED are a guess at best, and it is never chosen.
      accuracy: the one asked for, or None.
      accurate: whether the rule is CONVERGED and as accurate as asked for: its absolute error,
        times 1 + `contraction`, is allowed. False where nothing was asked.
      cheapest: the index of the cheapest accurate rule; -1 where there is none, or where there are
        several and the costs are not known.
    """

    names: tuple[str, ...]
    rules: tuple[Rule, ...]
    relative_error: np.ndarray
    absolute_error: np.ndarray
    cost: np.ndarray
    contraction: np.ndarray
    status: np.ndarray
    accuracy: Accuracy | None
    accurate: np.ndarray
    cheapest: int

    @property
    def rule(self) -> Rule:
        """The cheapest rule that is as accurate as asked for; a ValueError if there is none."""
        if self.cheapest < 0:
            raise ValueError(f"There is no rule to recommend: {self._verdict()}.\n{self}")
        return self.rules[self.cheapest]

    def _verdict(self) -> str:
        if self.accuracy is None:
            return "no `accuracy` was asked for"
        if self.cheapest >= 0:
            return f"{self.names[self.cheapest]} is the cheapest with {self.accuracy}"
        if np.any(self.accurate):
            accurate = [n for n, good in zip(self.names, self.accurate, strict=True) if good]
            return f"the cheapest of {', '.join(accurate)} is not known"
        if not np.any(self.status == Status.CONVERGED):
            return "no rule is CONVERGED: try another `linear_solver`, or an x nearer to x*"
        return "none is that accurate at this x: run the inner solver longer"

    def __str__(self) -> str:
        lines = [f"{'rule':<14} {'rel. error':>10} {'abs. error':>10} {'cost':>8}  status"]
        for k, name in enumerate(self.names):
            cost = "unknown" if np.isnan(self.cost[k]) else f"{self.cost[k]:.0f}"
            errors = f"{self.relative_error[k]:>10.1e} {self.absolute_error[k]:>10.1e}"
            lines.append(f"{name:<14} {errors} {cost:>8}  {Status(int(self.status[k])).name}")
        if np.any(np.isnan(self.cost)):
            lines.append("cost unknown: the linear solver does not count its products")
        if np.any(self.status != Status.CONVERGED):
            lines.append("a rule that is not CONVERGED is not recommended: its errors are a guess")
        return "\n".join([*lines, self._verdict()])


def recommend_rule(
    outer: Callable[[PyTree, PyTree], jax.Array],
    problem: Problem,
    x: PyTree,
    y: PyTree,
    accuracy: Accuracy | None = None,
    *,
    linear_solver: LinearSolver | None = None,
) -> RuleTable:
    """Tell which rule is the cheapest that is accurate enough at the inexact solution x.

        cost = 2 (products with F_1 and F_1^T) + 2 (for F_2^T v) + 1 (for F, in a correction)

    in evaluations of F(x, y). Products are those that the reports of the rule's solves tell of: an
    upper bound with `GMRES`, the default of the two reparameterized rules. The diagonal of F_1 for
    `JacobiStep` and `DiagonalChange` is dim(x) products, its derivative in y as much again. The
    gradient of g, which all rules need, is left out; so is what the errors cost, which are those
    of `hypergradient_error`.

    The rules are `Implicit()`, it `Preconditioned` by a `JacobiStep()` and by a `NewtonStep()`, and
    it `Reparameterized` by a `DiagonalChange()` and by an `ExpChange()`. Which is best depends on
    x, y and g; a correction can be worse than none. A solution map or an engine loosens linear
    solvers without an `rtol` to the tolerance of its inner solver, and the errors then grow; one
    that is given here keeps its own.

    It runs ten compiled programs, decides in Python, and does not itself run under `jax.jit`.

    Args:
      outer: g, a function of (x, y) that returns a real scalar.
      problem: `minimum(f)`, `root(F)` or `fixed_point(T)`.
      x: the inexact inner solution, before any correction, a pytree of floating arrays.
      y: the outer variable, a pytree with floating entries.
      accuracy: `RelativeAccuracy(...)` or `AbsoluteAccuracy(...)`; None only makes the table.
      linear_solver: for the corrections, the adjoint solves and, without its damping and at the
        default tolerance of the dtype, the errors. None is `CG()` where the matrix is declared
        positive definite and `GMRES()` elsewhere, which may fail where dim(x) is above `restart`.

    Returns:
      A `RuleTable`. Its `rule` is the one recommended.

    Raises:
      TypeError: if anything here is traced; if y has no floating entries, `outer` does not return a
        scalar, the problem does not fit x, or `accuracy` or `linear_solver` is of another class.

    Example:
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: 0.5 * y * x**2 - x)  # x*(y) = 1 / y
      >>> outer = lambda x, y: x**2  # so dh/dy = -2 / y^3, and Omega(x, y) = -2 x^2 / y
      >>> table = bx.recommend_rule(outer, problem, 0.501, 2.0, bx.RelativeAccuracy(3e-3))
      >>> [round(float(error), 3) for error in table.relative_error]
      [0.004, 0.0, 0.0, 0.002, 0.002]
      >>> table.rule == bx.Reparameterized(bx.Implicit(), bx.ExpChange())
      True

    Source:
      Z. Ye, G. Peyre, D. Cremers, P. Ablin, "Enhancing Hypergradients Estimation: A Study of
      Preconditioning and Reparameterization", 2024.
    """
    _refuse_traced("`x`", x)
    _refuse_traced("`y`", y)
    if accuracy is not None:
        checks.is_component("accuracy", accuracy, Accuracy, "RelativeAccuracy(1e-3)")
    if linear_solver is not None:
        checks.is_component("linear_solver", linear_solver, LinearSolver, "CG()")
    g, x, y = checked_point(outer, problem, Implicit(), x, y)
    rules = tuple(candidate.make(linear_solver) for candidate in _CANDIDATES)
    rows = []
    for candidate, rule in zip(_CANDIDATES, rules, strict=True):
        found = _estimate(g, problem, rule, x, y)
        certificate = hypergradient_error(g, problem, rule, x, y)
        allowed = np.nan
        if accuracy is not None:
            reference = trees.difference(found.gradient, certificate.error)
            allowed = accuracy.allowed(trees.norm(trees.floating(reference)))
        _refuse_traced("something else, or what a function closes over,", (certificate, allowed))
        cost, worst = _cost_and_status(found, 2 * candidate.diagonals * trees.dimension(x))
        status = max(worst, int(certificate.status))
        error, contraction = float(certificate.absolute), float(certificate.contraction)
        accurate = status == Status.CONVERGED and error * (1 + contraction) <= float(allowed)
        relative = float(certificate.relative)
        rows.append((relative, error, cost, contraction, np.int32(status), accurate))
    relative, absolute, cost, contraction, status, accurate = map(np.array, zip(*rows, strict=True))
    choice = np.where(accurate, cost, np.inf)
    known = np.sum(accurate) == 1 or not np.any(np.isnan(choice))
    cheapest = int(np.argmin(choice)) if np.any(accurate) and known else -1
    names = tuple(candidate.name for candidate in _CANDIDATES)
    errors = relative, absolute, cost, contraction, status
    return RuleTable(names, rules, *errors, accuracy, accurate, cheapest)


def _refuse_traced(name: str, value: PyTree) -> None:
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value)):
        raise TypeError(
            "`recommend_rule` decides in Python, so it cannot run inside of `jax.jit`, `jax.grad` "
            f"or `jax.vmap`, but {name} is traced. Call it outside, with numbers."
        )


@jax.jit
def _estimate(g: Partial, problem: Problem, rule: Rule, x: PyTree, y: PyTree) -> Estimate:
    problem.check(x, y)
    return estimate(g, problem, rule, x, y, Settings())


def _cost_and_status(found: Estimate, diagonals: int) -> tuple[float, int]:
    solve, correction = found.rule.solve, found.correction
    status, products, evaluations = int(solve.status), int(solve.products), 0
    if correction is not None:
        # A JacobiStep is always TRUNCATED; whatever a correction leaves is in the error.
        if bool(is_unsolved(correction.status)):
            status = max(status, int(correction.status))
        spent = int(correction.products)
        products, evaluations = -1 if min(products, spent) < 0 else products + spent, 1
    return np.nan if products < 0 else 2.0 * products + 2.0 + evaluations + diagonals, status
