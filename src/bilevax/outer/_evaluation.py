"""How a step evaluates: with the tolerance of its schedule, from a warm start."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bilevax import _loop as loop
from bilevax import _trees as trees
from bilevax._iterative import IterativeRule
from bilevax._separable import per_task
from bilevax._solution_map import solution_map
from bilevax.certificates import Certificate
from bilevax.hypergradient import Engine, Hypergradient, WarmStart
from bilevax.linear import default_rtol
from bilevax.outer._schedules import Effort
from bilevax.rules import Settings, resolve_linear_solver

PyTree = Any

# What an inner solve leaves of the residual of a warm start, at most.
_PROGRESS = 0.5


def resolved(
    effort: Effort, engine: Engine, y: PyTree, warm: WarmStart, *, safeguarded: bool
) -> Effort:
    """Return an effort with a tolerance where there can be one.

    A safeguarded one improves a warm start, even one that meets the tolerance already.
    """
    fixed = isinstance(engine.rule, IterativeRule) or effort.steps is not None
    if fixed or engine.accuracy is not None:
        return effort  # the solver stops by steps, or by certificates
    rtol = loop.stopping_rtol(engine.solver, warm.x) if effort.rtol is None else effort.rtol
    if not safeguarded:
        return effort._replace(rtol=rtol)

    def ratio(problem: Any, x: PyTree, start: PyTree) -> jax.Array:
        now, first = (problem.norm(problem.optimality(point, y)) for point in (x, start))
        return now / loop.scale_of(first, now)

    posed = engine.solver.posed(engine.problem, warm.x, y)
    worst = jnp.max(per_task(posed, ratio, warm.x, warm.start))
    reachable = jnp.maximum(_PROGRESS * worst, default_rtol(warm.x))
    # At a start that is not finite the solve will tell.
    return effort._replace(rtol=jnp.where(reachable < rtol, reachable, rtol))


def idle_unless(running: jax.Array, effort: Effort) -> Effort:
    """Return the effort, or one that takes no steps and makes no certificate."""
    rtol, adjoint_rtol, steps, certified = effort
    return Effort(
        None if rtol is None else jnp.where(running, rtol, 1),
        None if adjoint_rtol is None else jnp.where(running, adjoint_rtol, 1),
        None if steps is None else jnp.where(running, steps, 0),
        None if certified is None else certified & running,
    )


def with_effort(engine: Engine, effort: Effort) -> Engine:
    """Return an engine that solves with the effort."""
    if effort.steps is not None:
        rule: Any = engine.rule
        solver = dataclasses.replace(engine.solver, rtol=0.0, atol=0.0, maxiter=effort.steps)  # type: ignore[type-var]
        linear_solver = resolve_linear_solver(rule.linear_solver, engine.problem, Settings())
        rule = rule.with_linear_solver(linear_solver.with_steps(effort.steps))
        return dataclasses.replace(engine, solver=solver, rule=rule)
    if effort.rtol is None:
        return engine
    solver = dataclasses.replace(engine.solver, rtol=effort.rtol)  # type: ignore[type-var]
    return dataclasses.replace(engine, solver=solver, adjoint_rtol=effort.adjoint_rtol)


def evaluate(
    engine: Engine, effort: Effort, y: PyTree, warm: WarmStart
) -> tuple[Hypergradient, Certificate | None]:
    """Return the hypergradient, and a certificate where the effort asks for one, elsewhere NaN."""
    if effort.certified is None:
        return engine(y, warm), None
    due = trees.in_any_lane(effort.certified)
    result = dataclasses.replace(engine, certified=due)(y, warm)

    # A certificate that another lane has asked for is none of this one.
    def mask(leaf: jax.Array) -> jax.Array:
        is_floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.where(effort.certified, leaf, jnp.nan if is_floating else 0)

    certificate = jax.tree.map(mask, result.report.certificate)
    result = result._replace(report=result.report._replace(certificate=certificate))
    return result, certificate


def value(engine: Engine, y: PyTree, warm: WarmStart) -> jax.Array:
    """Return h(y), whose derivative is the hypergradient, for optimisers with a line search."""
    solver = engine.solver
    if not isinstance(engine.rule, IterativeRule):
        # Relative to ||F|| at the cold start, as the tolerance of the engine is.
        def target(problem: Any, x: PyTree, start: PyTree) -> jax.Array:
            first = problem.norm(problem.optimality(start, y))
            floor = loop.smallest_target(solver, problem, x, y, first)
            return jnp.maximum(loop.stopping_rtol(solver, x) * first, floor)

        posed = solver.posed(engine.problem, warm.x, y)
        largest = jnp.max(per_task(posed, target, warm.x, warm.start))
        atol = jax.lax.stop_gradient(largest)
        solver = dataclasses.replace(solver, atol=atol)  # type: ignore[type-var]
    x = solution_map(engine.problem, solver, engine.rule)(warm.x, y)
    return engine.value(x, y)
