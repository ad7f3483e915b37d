"""How an engine evaluates: by an estimator at a point, or by differentiating a run."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from bilevax import _loop as loop
from bilevax import _trees as trees
from bilevax._estimator import estimate, value_and_aux
from bilevax._failure import OnFailure, guard
from bilevax._iterative import run_dropping
from bilevax._problems import Problem
from bilevax._results import SolveReport
from bilevax._scaling import rescaled, scaled
from bilevax._separable import choose, per_task, representative
from bilevax._status import is_failure
from bilevax.certificates import (
    Accuracy,
    Certificate,
    certify,
    solve_accurately,
)
from bilevax.hypergradient._results import Hypergradient, HypergradientReport, WarmStart
from bilevax.rules import Rule, Settings
from bilevax.solvers import Solver

PyTree = Any


@functools.partial(jax.jit, static_argnames=("has_aux", "on_failure"))
def evaluate(
    outer: Partial,
    problem: Problem,
    solver: Solver,
    rule: Rule,
    accuracy: Accuracy | None,
    certified: Any,
    adjoint_rtol: Any,
    y: PyTree,
    warm: WarmStart,
    has_aux: bool,
    on_failure: OnFailure,
) -> Hypergradient:
    """Solve, and evaluate the estimator of a rule there."""
    problem.check(warm.x, y)
    rule.check(*representative(problem, warm.x), y)
    problem = scaled(problem, warm.x, y)
    scale = cold_residual(solver, problem, warm, y)
    if accuracy is None:
        x, inner = loop.run(solver, problem, warm.x, y, scale)
        dropped = None
        if on_failure is OnFailure.DROP:
            dropped = is_failure(inner.status)
            x = choose(problem, dropped, warm.x, x)
        problem = rescaled(problem, x, y)
        linear = OnFailure.RETURN if dropped is not None else on_failure
        settings = Settings.following(solver.rtol, x, linear, adjoint_rtol)
        found = estimate(
            outer,
            problem,
            rule,
            x,
            y,
            settings,
            guess=warm.adjoint,
            has_aux=has_aux,
            dropped=dropped,
        )
        inner = inner._replace(correction=found.correction)
        certificate = None
        if certified is not None:
            certificate = _certificate_if(
                certified,
                lambda: certify(outer, problem, rule, found, y, None, has_aux=has_aux),
                y,
            )
    else:
        found, inner, certificate = solve_accurately(
            outer,
            problem,
            solver,
            rule,
            accuracy,
            warm.x,
            warm.adjoint,
            y,
            scale,
            on_failure,
            has_aux=has_aux,
        )
    report = HypergradientReport(
        inner, found.rule.solve, found.rule.identity_entries, certificate, found.dropped
    )
    statuses = {"inner solve": inner.status}
    if found.correction is not None:
        statuses["correction of x"] = found.correction.status
    result = found.value, found.gradient, found.x
    (value, gradient, x), warm_x = _guarded(problem, statuses, result, warm, on_failure)
    # The adjoint of a `Reparameterized` rule is like z; a carry of `scan` must stay like x.
    flat, unravel = ravel_pytree(x)
    adjoint = unravel(ravel_pytree(found.rule.adjoint)[0].astype(flat.dtype))
    following = WarmStart(warm_x, adjoint, warm.start)
    return Hypergradient(value, gradient, x, following, report, found.aux)


@functools.partial(jax.jit, static_argnames=("forward", "has_aux", "on_failure"))
def evaluate_run(
    outer: Partial,
    problem: Problem,
    run: Partial,
    y: PyTree,
    warm: WarmStart,
    forward: bool,
    has_aux: bool,
    on_failure: OnFailure,
) -> Hypergradient:
    """Differentiate the run of the solver."""
    problem.check(warm.x, y)
    scale = per_task(problem, lambda each, x: each.norm(each.optimality(x, y)), warm.start)
    if on_failure is OnFailure.DROP:
        run = Partial(run_dropping, run)

    def value_at(y: PyTree) -> tuple[jax.Array, tuple[PyTree, SolveReport, Any]]:
        x, inner = run(problem, warm.x, y, scale)
        value, aux = value_and_aux(outer, x, y, has_aux)
        return value, (x, inner, aux)

    differentiated = _value_and_forward_gradient if forward else _value_and_reverse_gradient
    (value, (x, inner, aux)), gradient = differentiated(value_at, y)
    result, statuses = (value, gradient, x), {"inner solve": inner.status}
    (value, gradient, x), warm_x = _guarded(problem, statuses, result, warm, on_failure)
    report = HypergradientReport(inner, None, None, dropped=inner.dropped)
    return Hypergradient(value, gradient, x, warm._replace(x=warm_x), report, aux)


def _value_and_reverse_gradient(function: Callable[[PyTree], Any], y: PyTree) -> Any:
    """Return ((value, aux), gradient) of a function that returns (value, aux)."""
    return jax.value_and_grad(function, has_aux=True, allow_int=True)(y)


def _value_and_forward_gradient(function: Callable[[PyTree], Any], y: PyTree) -> Any:
    """Return the same, by one forward derivative for each floating entry of y."""
    leaves, structure = jax.tree.flatten(y)
    moving = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
    flat, unravel = ravel_pytree([leaf for leaf, m in zip(leaves, moving, strict=True) if m])

    def of_moving(flat: jax.Array) -> Any:
        moved, pairs = iter(unravel(flat)), zip(leaves, moving, strict=True)
        value, aux = function(structure.unflatten([next(moved) if m else u for u, m in pairs]))
        return value, (value, aux)

    gradient, (value, aux) = jax.jacfwd(of_moving, has_aux=True)(flat)
    return (value, aux), trees.with_floating(unravel(gradient.astype(flat.dtype)), y)


def _certificate_if(certified: Any, certify: Callable[[], Certificate], y: PyTree) -> Certificate:
    """Return a certificate; where none is asked for, one of NaN that costs nothing."""

    def with_one() -> Certificate:
        certificate = certify()
        return certificate._replace(error=trees.floating(certificate.error))

    def without() -> Certificate:
        return jax.tree.map(_nothing, jax.eval_shape(with_one))

    certificate = jax.lax.cond(certified, with_one, without)
    return certificate._replace(error=trees.with_floating(certificate.error, y))


def _nothing(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Return NaN, or zero where there is none: no products were spent."""
    is_floating = jnp.issubdtype(shape.dtype, jnp.floating)
    return jnp.full(shape.shape, jnp.nan if is_floating else 0, shape.dtype)


def cold_residual(solver: Solver, problem: Problem, warm: WarmStart, y: PyTree) -> jax.Array:
    """Return ||F|| at the cold start as the solver measures it, per task."""
    problem = solver.posed(problem, warm.x, y)
    return per_task(problem, lambda each, x: each.norm(each.optimality(x, y)), warm.start)


def _guarded(
    problem: Problem,
    statuses: dict[str, jax.Array],
    result: tuple[jax.Array, PyTree, PyTree],
    warm: WarmStart,
    on_failure: OnFailure,
) -> tuple[tuple[jax.Array, PyTree, PyTree], PyTree]:
    """Return the result with the policy applied, and where the next inner solve starts."""
    warm_x = result[2]
    for what, status in statuses.items():
        failed = is_failure(status)
        warm_x = per_task(
            problem, lambda _, failed, a, b: trees.where(failed, a, b), failed, warm.start, warm_x
        )
        # One task that failed spoils what is summed over all.
        worst = jnp.max(status)
        if on_failure is not OnFailure.DROP:
            result = guard(on_failure, what, is_failure(worst), worst, result)
    return result, warm_x
