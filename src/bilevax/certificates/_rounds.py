"""Hypergradients of a requested accuracy: rounds until one is good."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import _checks as checks
from bilevax import _loop as loop
from bilevax import _mesh as mesh
from bilevax import _trees as trees
from bilevax._estimator import Estimate, estimate
from bilevax._failure import OnFailure, guard
from bilevax._problems import Problem
from bilevax._results import LinearReport, SolveReport
from bilevax._scaling import rescaled
from bilevax._status import Status, code, is_failure, is_unsolved
from bilevax.certificates._accuracy import Accuracy
from bilevax.certificates._certificate import Certificate
from bilevax.certificates._corrections import Corrections, correct_until_accurate
from bilevax.certificates._points import REDUCTION, point_of, total, unlimited
from bilevax.linear import default_rtol
from bilevax.rules import Rule, Settings
from bilevax.solvers import Iterate, Solver

PyTree = Any

# The first target of ||F||, over that of the adjoint.
_NEARER = 0.3
# What a round leaves of ||F||, and of tolerances, where the one before told nothing.
_ONWARD, _TIGHTER = 0.1, 0.01
_RUNNING = np.int32(-1)


class _Plan(NamedTuple):
    """What the next round does."""

    target: jax.Array  # of ||F(x, y)||
    rtol: jax.Array  # of the rule's linear solves
    reduction: jax.Array  # of the first correction


class _Round(NamedTuple):
    """Where the rounds are."""

    iterate: Iterate
    iterations: jax.Array
    status: jax.Array
    adjoint: PyTree
    found: Estimate  # with the cost of all rounds
    certificate: Certificate  # with the cost of all rounds
    plan: _Plan


def solve_accurately(
    outer: Callable[..., Any],
    problem: Problem,
    solver: Solver,
    rule: Rule,
    accuracy: Accuracy,
    x: PyTree,
    adjoint: PyTree,
    y: PyTree,
    scale: jax.Array,
    on_failure: OnFailure,
    *,
    has_aux: bool,
) -> tuple[Estimate, SolveReport, Certificate]:
    """Solve in rounds, each of inner steps, the rule's estimate, and corrections of it.

    The inner solver comes near to x*, and the corrections do the rest: Omega_0 is that of the rule
    at its iterate, Omega_{k+1} that after another Newton step and another correction of the
    adjoint. Omega_k is returned as soon as Omega_{k-1}, Omega_k and Omega_{k+1} tell that it is
    accurate enough. Where corrections do not converge, the inner solver runs on from its own
    iterate.

    Args:
      outer: g.
      problem: the inner problem.
      solver: the inner solver.
      rule: how the derivative is formed at an iterate of the solver.
      accuracy: what is asked for.
      x: where the solver starts.
      adjoint: where the first adjoint solve starts.
      y: the outer variable.
      scale: ||F|| at the cold start; see `_loop.run`.
      on_failure: of the adjoint solve behind the result.
      has_aux: whether `outer` returns a pair.

    Returns:
      The last estimate, a report on the inner solve, and the certificate. The status of the report
      is CONVERGED if the accuracy was reached.
    """
    checks.single_numbers(accuracy)
    given, posed = problem, solver.posed(problem, x, y)
    linear_solver = unlimited(rule, None)
    first = solver.init(posed, x, y)
    initial_norm = first.residual
    scale = loop.scale_of(scale, initial_norm)
    tightest = default_rtol(x)

    def inspect(
        x: PyTree, adjoint: PyTree, plan: _Plan, trusted: jax.Array
    ) -> tuple[Estimate, Corrections]:
        problem = rescaled(given, x, y)
        settings = Settings(jnp.maximum(plan.rtol, tightest) ** (1 / rule.order))
        found = estimate(outer, problem, rule, x, y, settings, guess=adjoint, has_aux=has_aux)
        start = point_of(problem, found, found.rule.adjoint if rule.adjoint_is_of_x else adjoint, y)
        return found, correct_until_accurate(
            outer,
            problem,
            start,
            y,
            accuracy,
            linear_solver,
            plan.reduction,
            trusted,
            has_aux=has_aux,
        )

    def step(state: _Round) -> _Round:
        plan = state.plan
        smallest = loop.smallest_target(solver, posed, state.iterate.x, y, initial_norm)
        iterate, iterations, status = loop.advance(
            solver,
            posed,
            y,
            (solver.toward(state.iterate, scale, plan.target), state.iterations),
            lambda iterate, _: iterate.residual <= jnp.maximum(plan.target, smallest),
            initial_norm,
            code(Status.MAXITER),
        )
        failed = is_failure(status)
        # Corrections that lead far away are for a solver that can do no more.
        can_run = (status == Status.CONVERGED) & (iterate.residual > smallest)
        found, end = inspect(iterate.x, state.adjoint, plan, ~can_run)
        found, certificate = _result(found, end, y)

        small = end.verdict.small & ~failed
        # Corrections that have led on are ended by rounding, or by what the next run may mend.
        led = end.steps > 2
        iterate = trees.where(led, solver.init(posed, found.x, y), iterate)
        runs = can_run & (iterate.residual > smallest)
        going = (runs | (plan.reduction > tightest)) & ~small & ~failed
        finite = certificate.status != Status.NONFINITE
        ended = jnp.where(iterations >= solver.maxiter, code(Status.MAXITER), code(Status.STALLED))
        ended = jnp.where(finite | failed, ended, code(Status.NONFINITE))
        ended = jnp.where(failed, status, ended)
        ended = jnp.where(small, code(Status.CONVERGED), ended)
        following = _Plan(
            target=jnp.where(runs, _ONWARD ** (1 / rule.order), 1) * iterate.residual,
            rtol=_TIGHTER * plan.rtol,
            reduction=jnp.clip(_TIGHTER * plan.reduction, tightest, REDUCTION),
        )
        return _Round(
            iterate,
            iterations,
            jnp.where(going, _RUNNING, ended),
            found.rule.adjoint,
            _accumulate(state.found, found),
            certificate._replace(
                products=total(state.certificate.products, certificate.products),
                status=jnp.where(failed, status, certificate.status),
            ),
            following,
        )

    aim = jnp.asarray(accuracy.first_error, initial_norm.dtype)
    # Nearer to x* than to the adjoint: there, what a Newton step leaves is of second order.
    plan = _Plan((_NEARER * aim) ** (1 / rule.order) * scale, aim, aim)
    shapes = jax.eval_shape(
        lambda *of: _result(*inspect(*of), y), first.x, adjoint, plan, jnp.asarray(True)
    )
    found, certificate = jax.tree.map(jnp.zeros_like, shapes)
    none = jnp.zeros((), jnp.int32)
    begin = _Round(first, none, jnp.asarray(_RUNNING), adjoint, found, certificate, plan)
    end = mesh.while_loop(lambda state: state.status == _RUNNING, step, begin)
    found = end.found
    solve = found.rule.solve.status
    gradient = guard(on_failure, "adjoint solve", is_unsolved(solve), solve, found.gradient)
    norms = end.iterate.residual, initial_norm
    rounding = jnp.zeros_like(initial_norm)
    inner = SolveReport(end.status, end.iterations, *norms, found.correction, rounding=rounding)
    return found._replace(gradient=gradient), inner, end.certificate


def _result(found: Estimate, end: Corrections, y: PyTree) -> tuple[Estimate, Certificate]:
    """Return the middle one of the last points, and its certificate, with their costs."""
    _, point, last = end.points
    costs = found.rule.solve.iterations, found.rule.solve.products
    iterations, products = map(total, costs, end.adjoint)
    solve = point.solve._replace(iterations=iterations, products=products)
    found = found._replace(
        value=point.value,
        gradient=trees.with_floating(point.gradient, y),
        x=point.x,
        terms=point.terms,
        rule=found.rule._replace(solve=solve, adjoint=point.adjoint),
        aux=point.aux,
    )
    products = total(end.newton, last.solve.products)
    return found, end.verdict.certificate._replace(products=products)


def _accumulate(before: Estimate, now: Estimate) -> Estimate:
    """Return the estimate of now, with the costs of both in its reports."""

    def add(a: LinearReport, b: LinearReport) -> LinearReport:
        return b._replace(
            iterations=total(a.iterations, b.iterations), products=total(a.products, b.products)
        )

    rule = now.rule._replace(solve=add(before.rule.solve, now.rule.solve))
    if before.correction is not None and now.correction is not None:
        now = now._replace(correction=add(before.correction, now.correction))
    return now._replace(rule=rule)
