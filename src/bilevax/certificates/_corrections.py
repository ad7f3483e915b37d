"""Corrections of an estimate until it is as accurate as asked for, or they do not lead on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import _mesh as mesh
from bilevax import _trees as trees
from bilevax._problems import Problem
from bilevax._status import Status
from bilevax.certificates._accuracy import Accuracy
from bilevax.certificates._certificate import Certificate, make_certificate
from bilevax.certificates._points import (
    LARGEST_CONTRACTION,
    REDUCTION,
    Point,
    correct,
    distance,
    judge,
    rounding_floor,
    total,
)
from bilevax.linear import LinearSolver, default_rtol

PyTree = Any

# What a correction aims at, over the error that is allowed.
_AIM = 0.1
# A correction that changes Omega by more than this part of its terms may have left the solution
# that the solver is on its way to.
_LARGEST_CHANGE = 0.5
# Where rounding decides what a correction does, the error may be so many times as large.
_NOISE = 3


class Verdict(NamedTuple):
    """What three points in a row, Omega_{k-1} to Omega_{k+1}, tell of the middle one."""

    certificate: Certificate
    small: jax.Array  # whether Omega_k is as accurate as asked for
    leads_on: jax.Array  # whether another correction helps
    reduction: jax.Array  # of that correction


class Corrections(NamedTuple):
    """Where the corrections of one estimate are."""

    points: tuple[Point, Point, Point]  # the last three; at first the same one
    steps: jax.Array
    verdict: Verdict
    adjoint: tuple[jax.Array, jax.Array]  # iterations and products, up to the middle point
    newton: jax.Array  # products, up to the last point


def correct_until_accurate(
    outer: Callable[..., Any],
    problem: Problem,
    start: Point,
    y: PyTree,
    accuracy: Accuracy,
    linear_solver: LinearSolver | None,
    reduction: jax.Array,
    trusted: jax.Array,
    *,
    has_aux: bool,
) -> Corrections:
    """Correct a point until the last but one is accurate enough, or while corrections lead on.

    Args:
      outer: g.
      problem: the inner problem.
      start: the point.
      y: the outer variable.
      accuracy: what is asked for.
      linear_solver: of the corrections; None for the default.
      reduction: of the first correction, see `correct`. The second one is only to tell of the
        first.
      trusted: whether corrections may lead far away.
      has_aux: whether `outer` returns a pair.
    """

    def verdict_on(points: tuple[Point, Point, Point], reduction: jax.Array) -> Verdict:
        return _judge(problem, accuracy, points, y, reduction, trusted)

    def step(state: Corrections) -> Corrections:
        _, before, now = state.points
        reduction = state.verdict.reduction
        points = before, now, correct(outer, problem, now, y, linear_solver, reduction, has_aux)
        verdict = verdict_on(points, reduction)
        # Two points tell nothing yet.
        begins = state.steps == 0
        verdict = verdict._replace(
            small=verdict.small & ~begins,
            leads_on=verdict.leads_on | begins,
            reduction=jnp.where(begins, REDUCTION, verdict.reduction),
        )
        iterations, products = state.adjoint
        now_corrected = (
            jnp.where(begins, iterations, total(iterations, now.solve.iterations)),
            jnp.where(begins, products, total(products, now.solve.products)),
        )
        newton = total(state.newton, points[2].products)
        return Corrections(points, state.steps + 1, verdict, now_corrected, newton)

    def proceed(state: Corrections) -> jax.Array:
        return state.verdict.leads_on & ~state.verdict.small

    none, points = jnp.zeros((), jnp.int32), (start, start, start)
    nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(verdict_on, points, reduction))
    verdict = nothing._replace(leads_on=jnp.ones_like(nothing.leads_on), reduction=reduction)
    begin = Corrections(points, none, verdict, (none, none), none)
    return mesh.while_loop(proceed, step, begin)


def _judge(
    problem: Problem,
    accuracy: Accuracy,
    points: tuple[Point, Point, Point],
    y: PyTree,
    reduction: jax.Array,
    trusted: jax.Array,
) -> Verdict:
    """Judge the middle one of three points, the last of which has a correction of `reduction`."""
    before, now, following = points
    change = distance(now.gradient, following.gradient)
    change_before = distance(before.gradient, now.gradient)
    floor = rounding_floor(now.terms, following.terms, like=now.x)
    judgement = contraction, reliable = judge(problem, points, y, change, floor)
    solved = jnp.maximum(now.status, following.status) == Status.CONVERGED
    converges = (contraction <= LARGEST_CONTRACTION) & solved
    useful = trusted | (change_before <= _LARGEST_CHANGE * following.terms)
    # The size of dh/dy may be zero, at a stationary point.
    size = trees.norm(following.gradient)
    allowed = accuracy.allowed(size)
    error = change * jnp.where(converges, 1 / (1 - contraction), _NOISE) + floor
    # Linear solves in this precision cannot vouch for less than the smallest tolerance.
    tightest = default_rtol(now.x)
    small = (error <= allowed) & reliable & solved & ~(allowed < tightest * size)
    certificate = make_certificate(
        now.gradient,
        (now, following),
        y,
        floor,
        inner=change,
        adjoint=change,
        judgement=judgement,
        products=following.products,
    )
    # The error of the last point is what the next correction has to reduce.
    left = jnp.maximum(contraction, REDUCTION) * change
    aim = jnp.where(converges, _AIM * allowed / left, REDUCTION * reduction)
    return Verdict(
        certificate,
        small & useful,
        solved & useful & (change < 0.5 * change_before),  # changes that do not fall are rounding
        jnp.clip(aim, tightest, REDUCTION),
    )
