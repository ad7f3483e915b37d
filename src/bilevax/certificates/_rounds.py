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
from bilevax.certificates._certificate import Certificate, make_certificate
from bilevax.certificates._points import (
    LARGEST_CONTRACTION,
    REDUCTION,
    Point,
    correct_twice,
    distance,
    judge,
    point_of,
    rounding_floor,
    total,
    unlimited,
)
from bilevax.linear import default_rtol
from bilevax.rules import Rule, Settings
from bilevax.solvers import Iterate, Solver

PyTree = Any

# What a correction aims at, over the error that is allowed.
_AIM = 0.1
# A correction that changes Omega by more than this part of its terms may have left the solution
# that the solver is on its way to.
_LARGEST_CHANGE = 0.5
# Where rounding decides what a correction does, the error may be so many times as large.
_NOISE = 3
# What a round leaves of ||F||, and of tolerances, where the one before told nothing.
_ONWARD, _TIGHTER = 0.1, 0.01
_RUNNING = np.int32(-1)


class _Plan(NamedTuple):
    """What the next round does."""

    target: jax.Array  # of ||F(x, y)||
    rtol: jax.Array  # of the rule's linear solves
    reduction: jax.Array  # of the first correction


class _Verdict(NamedTuple):
    """What a round has found."""

    found: Estimate  # Omega_1
    second: Point  # with Omega_2
    certificate: Certificate
    change: jax.Array  # |Omega_1 - Omega_2|
    allowed: jax.Array
    small: jax.Array  # whether the accuracy is reached
    converging: jax.Array  # whether further corrections help
    is_near: jax.Array  # whether they started where they ended, as far as Omega tells


class _Round(NamedTuple):
    """Where the rounds are."""

    iterate: Iterate
    iterations: jax.Array
    status: jax.Array
    adjoint: PyTree
    found: Estimate  # with the cost of all rounds
    certificate: Certificate  # with the cost of all rounds
    change: jax.Array  # by the last correction that led on; infinite before the first one
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
    """Solve in rounds, each of inner steps, the rule's estimate, and two corrections of it.

    The inner solver comes near to x*, and the corrections do the rest: Omega_0 is that of the rule
    at its iterate, Omega_1 that after a Newton step and a correction of the adjoint, Omega_2 that
    after another two. Omega_1 is returned, and Omega_1 - Omega_2 tells its error. Where corrections
    converge, the next round goes on from the second one, with a first one that is as accurate as
    needed. Elsewhere the inner solver runs on from its own iterate.

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

    def inspect(x: PyTree, adjoint: PyTree, plan: _Plan) -> _Verdict:
        problem = rescaled(given, x, y)
        settings = Settings(jnp.maximum(plan.rtol, tightest) ** (1 / rule.order))
        found = estimate(outer, problem, rule, x, y, settings, guess=adjoint, has_aux=has_aux)
        start = found.rule.adjoint if rule.adjoint_is_of_x else adjoint
        points = correct_twice(
            outer,
            problem,
            point_of(problem, found, start, y),
            y,
            linear_solver,
            plan.reduction,
            has_aux=has_aux,
        )
        return _judge(problem, accuracy, found, points, y)

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
        now = inspect(iterate.x, state.adjoint, plan)

        failed = is_failure(status)
        # Corrections that lead far away are for a solver that can do no more.
        can_run = (status == Status.CONVERGED) & (iterate.residual > smallest)
        usable = (now.is_near | ~can_run) & ~failed
        small = now.small & usable
        # Changes that do not fall are rounding.
        converging = now.converging & usable & (now.change < 0.5 * state.change)
        runs = can_run & ~converging
        can_tighten = plan.reduction > tightest
        going = (converging | runs | can_tighten) & ~small & ~failed
        finite = now.certificate.status != Status.NONFINITE
        ended = jnp.where(iterations >= solver.maxiter, code(Status.MAXITER), code(Status.STALLED))
        ended = jnp.where(finite | failed, ended, code(Status.NONFINITE))
        ended = jnp.where(failed, status, ended)
        ended = jnp.where(small, code(Status.CONVERGED), ended)

        restarted = solver.init(posed, now.second.x, y)
        # The error of Omega_2 is what the next correction has to reduce.
        left = jnp.maximum(now.certificate.contraction, REDUCTION) * now.change
        reduction = jnp.where(converging, _AIM * now.allowed / left, _TIGHTER * plan.reduction)
        following = _Plan(
            target=jnp.where(
                converging,
                restarted.residual,
                jnp.where(runs, _ONWARD ** (1 / rule.order), 1) * iterate.residual,
            ),
            rtol=jnp.where(converging, 1, _TIGHTER) * plan.rtol,
            reduction=jnp.clip(reduction, tightest, REDUCTION),
        )
        return _Round(
            trees.where(converging, restarted, iterate),
            iterations,
            jnp.where(going, _RUNNING, ended),
            trees.where(converging, now.second.adjoint, now.found.rule.adjoint),
            _accumulate(state.found, now.found),
            now.certificate._replace(
                products=total(state.certificate.products, now.certificate.products),
                status=jnp.where(failed, status, now.certificate.status),
            ),
            jnp.where(converging, now.change, state.change),
            following,
        )

    # Half the digits at first: what is learnt there about the error saves steps later.
    aim = jnp.asarray(accuracy.first_error, initial_norm.dtype)
    plan = _Plan(aim ** (1 / rule.order) * scale, aim, aim)
    shapes = jax.eval_shape(inspect, first.x, adjoint, plan)
    nothing = jax.tree.map(jnp.zeros_like, shapes)
    begin = _Round(
        first,
        jnp.zeros((), jnp.int32),
        jnp.asarray(_RUNNING),
        adjoint,
        nothing.found,
        nothing.certificate,
        jnp.full_like(nothing.change, jnp.inf),
        plan,
    )
    end = mesh.while_loop(lambda state: state.status == _RUNNING, step, begin)
    found = end.found
    solve = found.rule.solve.status
    gradient = guard(on_failure, "adjoint solve", is_unsolved(solve), solve, found.gradient)
    norms = end.iterate.residual, initial_norm
    none = jnp.zeros_like(initial_norm)
    inner = SolveReport(end.status, end.iterations, *norms, found.correction, rounding=none)
    return found._replace(gradient=gradient), inner, end.certificate


def _judge(
    problem: Problem,
    accuracy: Accuracy,
    found: Estimate,
    points: tuple[Point, Point, Point],
    y: PyTree,
) -> _Verdict:
    """Judge the point after the first of two corrections of an estimate."""
    start, first, second = points
    change = distance(first.gradient, second.gradient)
    floor = rounding_floor(first.terms, second.terms, like=first.x)
    judgement = contraction, reliable = judge(problem, points, y, change, floor)
    solved = jnp.maximum(first.status, second.status) == Status.CONVERGED
    converges = (contraction <= LARGEST_CONTRACTION) & solved
    is_near = distance(start.gradient, first.gradient) <= _LARGEST_CHANGE * second.terms
    # The size of dh/dy may be zero, at a stationary point.
    size = trees.norm(second.gradient)
    allowed = accuracy.allowed(size)
    error = change * jnp.where(converges, 1 / (1 - contraction), _NOISE) + floor
    # Linear solves in this precision cannot vouch for less than the smallest tolerance.
    small = (error <= allowed) & reliable & solved & ~(allowed < default_rtol(first.x) * size)
    certificate = make_certificate(
        first.gradient,
        (first, second),
        y,
        floor,
        inner=change,
        adjoint=change,
        judgement=judgement,
        products=total(first.products, second.products, second.solve.products),
    )
    products = total(found.rule.solve.products, first.solve.products)
    iterations = total(found.rule.solve.iterations, first.solve.iterations)
    solve = first.solve._replace(products=products, iterations=iterations)
    estimate = found._replace(
        value=first.value,
        gradient=trees.with_floating(first.gradient, y),
        x=first.x,
        terms=first.terms,
        rule=found.rule._replace(solve=solve, adjoint=first.adjoint),
        aux=first.aux,
    )
    return _Verdict(estimate, second, certificate, change, allowed, small, converges, is_near)


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
