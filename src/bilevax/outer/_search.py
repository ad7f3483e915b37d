"""The line search of MAID: what values with errors prove, and what is tried next."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from bilevax import _trees as trees
from bilevax.outer._judged import Judged
from bilevax.outer._quasi_newton import Pairs, remember, times_inverse
from bilevax.outer._state import BilevelHistory

PyTree = Any

# The part of the decrease that the slope promises which must be there.
_SUFFICIENT = 1e-2
# The error of a gradient over its norm: at most, and as tolerances aim at.
_LARGEST_ERROR, _AIM = 0.5, 0.2
# The error of a value over the decrease that is expected of the next step.
VALUE_SHARE = 0.1
# What a step may be longer than the last one, and a shorter trial over the one before.
_LONGER, _SHORTEST, _SHORTER = 10.0, 0.1, 0.5
# Rejections after which the direction is that of the gradient, after twice as many the gradient is
# made again; doubts after which a trial is rejected.
_PATIENCE, _DOUBTS = 4, 3
# The curvature along a move is trusted where it is above this part of the errors.
_TRUST = 0.1
# By how much a tolerance changes at most; where nothing is known, the second number.
_TIGHTER, CAUTION, _LOOSER, LOOSEST, FIRST_TOLERANCE = 0.01, 0.1, 2.0, 0.3, 0.1


class Tolerances(NamedTuple):
    """Of the inner and of the adjoint solve, relative."""

    x: jax.Array
    adjoint: jax.Array


class Search(NamedTuple):
    """The point that was accepted last, and the trial that is about to be made from there."""

    y: PyTree
    at: Judged  # there
    pairs: Pairs
    direction: jax.Array
    step_size: jax.Array
    longest: jax.Array  # that the next trial may be
    rejections: jax.Array
    doubts: jax.Array  # of this trial
    is_base: jax.Array  # whether the next evaluation is at `y` itself
    accepted: jax.Array  # moves so far


class Verdict(NamedTuple):
    """What values and their errors say of a trial."""

    is_new: jax.Array  # the point evaluated is the base now: accepted, or evaluated again
    is_accepted: jax.Array
    is_bad: jax.Array  # h surely does not decrease enough, or nothing can be told


def judge(
    search: Search, y: PyTree, found: Judged, usable: jax.Array, unsolved: jax.Array
) -> Verdict:
    """Tell what the values prove."""
    allowed = search.at.value - _SUFFICIENT * promise(search, y).astype(found.value.dtype)
    low, high = found.value - found.value_error, found.value + found.value_error
    is_good = usable & (high <= allowed - search.at.value_error) & ~search.is_base
    hopeless = unsolved | (search.doubts >= _DOUBTS)
    is_bad = ~usable | (low > allowed + search.at.value_error) | hopeless
    is_bad = is_bad & ~is_good & ~search.is_base
    return Verdict(is_good | search.is_base, is_good, is_bad)


def promise(search: Search, y: PyTree) -> jax.Array:
    """Return the decrease from the base to y that the gradient promises."""
    return trees.inner(search.at.gradient, trees.difference(search.y, y))


def projected(projection: Partial | None, y: PyTree) -> PyTree:
    """Return P(y)."""
    return y if projection is None else trees.as_arrays(projection(y))


def next_trial(search: Search, projection: Partial | None) -> PyTree:
    """Return where a search evaluates next, if not at its base."""
    return projected(projection, _add(search.y, search.step_size * search.direction))


def _add(y: PyTree, move: jax.Array) -> PyTree:
    flat, unravel = trees.ravel(y)
    return unravel(flat + move)


def begun(
    search: Search, base: PyTree, found: Judged, accepted: jax.Array, projection: Partial | None
) -> Search:
    """Return the first trial from a new base, or from the old one that was evaluated again."""
    gradient, before = trees.ravel(found.gradient)[0], trees.ravel(search.at.gradient)[0]
    move = trees.ravel(trees.difference(base, search.y))[0]
    change, length = gradient - before, jnp.linalg.norm(move)
    errors = found.gradient_error + search.at.gradient_error
    is_known = accepted & (move @ change > _TRUST * errors * length)
    pairs = trees.where(is_known, remember(search.pairs, move, change), search.pairs)

    direction = -times_inverse(pairs, gradient, diagonal=projection is not None)
    full = projected(projection, _add(base, direction))
    size = trees.norm(trees.difference(full, base))
    longest = jnp.where(accepted, _LONGER * length, search.longest)
    step_size = longest / jnp.where(size > 0, size, 1)
    step_size = jnp.where(pairs.is_empty, step_size, jnp.minimum(step_size, 1))
    moved = projected(projection, trees.add_scaled(base, -1, found.gradient))
    stationarity = trees.norm(trees.difference(moved, base))
    vague = found.gradient_error > _LARGEST_ERROR * stationarity
    doubts = jnp.where(accepted, 0, search.doubts).astype(jnp.int32)
    is_base = vague & (doubts < _DOUBTS)
    return Search(
        y=base,
        at=found,
        pairs=pairs,
        direction=direction,
        step_size=step_size,
        longest=longest,
        rejections=jnp.zeros_like(search.rejections),
        doubts=doubts + is_base,
        is_base=is_base,
        accepted=search.accepted + accepted,
    )


def shortened(search: Search, y: PyTree, found: Judged) -> Search:
    """Return a shorter trial: where the parabola through two values and a slope is lowest."""
    promised = promise(search, y)
    excess = (found.value - search.at.value).astype(promised.dtype) + promised
    factor = jnp.where(excess > 0, promised / (2 * excess), _SHORTER)
    factor = jnp.where(jnp.isnan(factor), _SHORTEST, jnp.clip(factor, _SHORTEST, _SHORTER))
    step_size, rejections = factor * search.step_size, search.rejections + 1
    # A gradient that is accurate enough leads downhill, whatever the memory makes of it.
    gradient = trees.ravel(search.at.gradient)[0]
    length, size = jnp.linalg.norm(search.direction), jnp.linalg.norm(gradient)
    plain = rejections == _PATIENCE
    direction = jnp.where(plain, -gradient, search.direction)
    rescaled = step_size * length / jnp.where(size > 0, size, 1)
    step_size = jnp.where(plain, rescaled, step_size)
    return search._replace(
        direction=direction,
        step_size=step_size,
        longest=factor * trees.norm(trees.difference(y, search.y)),
        rejections=rejections,
        doubts=jnp.zeros_like(search.doubts),
        is_base=rejections % (2 * _PATIENCE) == 0,
    )


def doubted(search: Search, found: Judged) -> Search:
    """Return the same trial, or the base, whichever value is the less accurate."""
    return search._replace(
        doubts=search.doubts + 1, is_base=search.at.value_error > found.value_error
    )


def next_tolerances(
    now: Tolerances,
    found: Judged,
    record: BilevelHistory,
    cold_residual: jax.Array,
    goal: jax.Array,
    order: int,
) -> Tolerances:
    """Return tolerances at which the errors are as small as the next step needs.

    Args:
      now: the tolerances that led to `found`.
      found: its errors.
      record: residuals and the norm of the projected gradient.
      cold_residual: what the tolerance of x is relative to.
      goal: the error of the value that is wanted.
      order: the power of the tolerance of x to which the error of the gradient is proportional.
    """
    dtype = record.value.dtype
    wanted = _AIM / 2 * record.stationarity
    # The error of a corrected value goes with the product of both tolerances.
    by_value = jnp.sqrt(goal / found.value_error)

    def asked(now: jax.Array, residual: jax.Array, part: jax.Array, power: int) -> jax.Array:
        factor = jnp.minimum((wanted / part).astype(dtype) ** (1 / power), by_value)
        # Errors go with the residual that there was, which may be below the tolerance.
        residual = jnp.maximum(residual.astype(dtype), jnp.finfo(dtype).eps)
        tolerance = jnp.clip(residual * factor, _TIGHTER * now, _LOOSER * now)
        known = jnp.isfinite(part) & jnp.isfinite(found.value_error) & ~jnp.isnan(tolerance)
        return jnp.where(known, tolerance, CAUTION * now)

    inner = record.inner_residual / jnp.where(cold_residual > 0, cold_residual, 1).astype(dtype)
    return Tolerances(
        asked(now.x, inner, found.inner, order),
        asked(now.adjoint, record.adjoint_residual, found.adjoint, 1),
    )
