"""MAID: descent with a line search whose sufficient decrease is that of h itself."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._closures import as_partial
from bilevax._status import is_failure, is_unsolved
from bilevax.certificates import BoundConstants, checked_constants
from bilevax.hypergradient import Engine, cold_start, require_certificates
from bilevax.linear import default_rtol
from bilevax.outer._evaluation import evaluate, idle_unless, with_effort
from bilevax.outer._judged import Judged, by_bounds, by_reference
from bilevax.outer._quasi_newton import Pairs, no_pairs, remember, times_inverse
from bilevax.outer._schedules import Effort
from bilevax.outer._state import (
    Best,
    BilevelHistory,
    BilevelState,
    Milestone,
    Outcome,
    empty_history,
    entry,
    failed,
)

PyTree = Any

# The part of the decrease that the slope promises which must be there.
_SUFFICIENT = 1e-2
# The error of a gradient over its norm: at most, and as tolerances aim at.
_LARGEST_ERROR, _AIM = 0.5, 0.2
# The error of a value over the decrease that is expected of the next step.
_VALUE_SHARE = 0.1
# What a step may be longer than the last one, and a shorter trial over the one before.
_LONGER, _SHORTEST, _SHORTER = 10.0, 0.1, 0.5
# Rejections after which the direction is that of the gradient, after twice as many the gradient is
# made again; doubts after which a trial is rejected.
_PATIENCE, _DOUBTS = 4, 3
# The curvature along a move is trusted where it is above this part of the errors.
_TRUST = 0.1
# A trial is too far away where the last x is this much worse than the cold start.
_FAR = 10.0
# By how much a tolerance changes at most; where nothing is known, the second number.
_TIGHTER, _CAUTION, _LOOSER, _LOOSEST, _FIRST = 0.01, 0.1, 2.0, 0.3, 0.1


class _Tolerances(NamedTuple):
    x: jax.Array
    adjoint: jax.Array


class _Search(NamedTuple):
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


@trees.register
@dataclasses.dataclass(frozen=True, eq=False)
class MaidStep:
    """A pure function state -> state, as an `OuterStep` is; made by `maid`.

    Attributes:
      engine: the engine.
      constants: those of bounds, a function that makes them, or None for a reference.
      projection: what is applied to y after each move, or None.
      first_step: the length of the first trial.
    """

    engine: Engine
    constants: BoundConstants | Partial | None
    projection: Partial | None
    first_step: Any

    def init(
        self, y: PyTree, x0: PyTree, *, key: jax.Array | None = None, history: int = 1000
    ) -> BilevelState:
        """Return the state before the first step; for arguments and raises see `OuterStep.init`."""
        checks.inner_variable(y, "y")
        warm, y = cold_start(x0), trees.as_arrays(y)
        history = checks.known_whole("history", history)
        if self.projection is not None:
            image = jax.eval_shape(self.projection, y)
            checks.same_structure("projection", image, y, expected="y")
        key = jax.random.key(0) if key is None else key
        return _init(self, y, warm, key, history)

    def engine_for(self, key: jax.Array) -> Engine:
        """Return the engine, which depends on no key."""
        return self.engine

    def __call__(self, state: BilevelState) -> BilevelState:
        """Return the state after one step; a state that is not RUNNING stays as it is."""
        checks.is_component("state", state, BilevelState, "step.init(y, x0)")
        return _step(self, state)


def maid(
    engine: Engine,
    *,
    constants: BoundConstants | Callable[[PyTree, PyTree], BoundConstants] | None = None,
    projection: Callable[[PyTree], PyTree] | None = None,
    first_step: Any = 1.0,
) -> MaidStep:
    """Make the outer step of MAID, the method of adaptive inexact descent: no step size to tune.

        y' = P(y + a d) is accepted where
        value(y') + error(y') <= value(y) - error(y) - <Omega, y - y'> / 100

    so that h(y') < h(y) whatever the errors are. A trial that surely decreases h by less is made
    again with a smaller a. Where the errors are too large to tell, they are reduced: tolerances of
    the inner and of the adjoint solve tighten until they can, and loosen where they are better than
    the next step needs. Every step evaluates once, at `state.y`, which is a trial: an accepted
    one has a `stationarity` in the history, another one NaN. The result of `minimize` is accepted.

    Without `constants`, errors are estimated by a Newton-corrected reference, as in
    `hypergradient_error`; the decrease is real as far as these estimates hold. With `constants`
    they are proven bounds, as in `hypergradient_bound`, and so is the decrease; the looser they
    are, the more accurate the solves. Values are corrected to second order by the adjoint.

    The direction d is that of limited-memory BFGS, or the negative gradient in its scale where
    there is a projection, or where that does not lead on. Pairs count where their curvature is
    above the errors.

    Args:
      engine: made by `value_and_hypergradient`, without `accuracy`.
      constants: for bounds; a `BoundConstants`, or a function of (x, y) that returns those of a
        point, such as `BoundConstants.ridge(train, validation)`.
      projection: P, onto a convex set; None for none.
      first_step: the length of the first trial, in the unit of y; far too large or too small ones
        cost a few evaluations.

    Returns:
      A step for `minimize`.

    Raises:
      TypeError: for a wrong kind of argument; for an engine with an `accuracy`, that is made from a
        key, or without certificates.
      ValueError: if `first_step` is not positive.

    Example:
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: 0.5 * (x - y) ** 2)  # x*(y) = y
      >>> engine = bx.value_and_hypergradient(lambda x, y: (x - 3.0) ** 2, problem, bx.Newton())
      >>> result = bx.minimize(bx.maid(engine), 1.0, 0.0, steps=100)
      >>> round(float(result.y), 2), result.outcome.name
      (3.0, 'CONVERGED')

    Source:
      M. S. Salehi, S. Mukherjee, L. Roberts, M. J. Ehrhardt, "An Adaptively Inexact First-Order
      Method for Bilevel Optimization with Application to Hyperparameter Learning", 2025.
    """
    checks.positive("first_step", first_step)
    checks.is_component("engine", engine, Engine, "value_and_hypergradient(...)")
    require_certificates("maid", engine.problem, engine.rule)
    if engine.accuracy is not None:
        raise TypeError("`maid` adapts tolerances itself: take an engine without `accuracy`.")
    if constants is not None:
        constants = checked_constants(constants)
    if projection is not None:
        projection = as_partial("projection", projection)
    return MaidStep(engine, constants, projection, first_step)


def _project(step: MaidStep, y: PyTree) -> PyTree:
    return y if step.projection is None else trees.as_arrays(step.projection(y))


def _init(step: MaidStep, y: PyTree, warm: Any, key: jax.Array, history: int) -> BilevelState:
    y = _project(step, y)
    dtype = jax.eval_shape(lambda: step.engine.value(warm.x, y)).dtype
    flat = ravel_pytree(y)[0]
    infinity, none = jnp.full((), jnp.inf, dtype), jnp.zeros((), jnp.int32)
    zero, number = jnp.zeros((), flat.dtype), jnp.zeros((), dtype)
    nowhere = Judged(infinity, infinity, y, zero, zero, zero, warm.x, warm.adjoint, none)
    longest = jnp.asarray(step.first_step, flat.dtype)
    search = _Search(y, nowhere, no_pairs(flat), flat, zero, longest, none, none, none == 0, none)
    tolerance = number + _FIRST
    return BilevelState(
        y=y,
        optimizer=search,
        warm=warm,
        step=none,
        schedule=_Tolerances(tolerance, tolerance),
        key=key,
        history=empty_history(history, infinity),
        best=Best(infinity, y, warm.x, none),
        milestone=Milestone(infinity, none),
        first_stationarity=jnp.full((), jnp.nan, dtype),
        outcome=jnp.asarray(int(Outcome.RUNNING), jnp.int32),
    )


@jax.jit
def _step(step: MaidStep, state: BilevelState) -> BilevelState:
    running = state.outcome == Outcome.RUNNING
    # Under `vmap` all lanes step until the last one has stopped.
    following = jax.lax.cond(
        trees.in_any_lane(running), lambda state: _advance(step, state), lambda state: state, state
    )
    return jax.tree.map(lambda new, old: jnp.where(running, new, old), following, state)


def _advance(step: MaidStep, state: BilevelState) -> BilevelState:
    """Evaluate at the trial; accept it or not; make the next trial."""
    search, y = state.optimizer, state.y
    engine, start = step.engine, state.warm.start
    now, cold_residual = (
        trees.norm(engine.problem.optimality(x, y)) for x in (state.warm.x, start)
    )
    is_far = ~search.is_base & ~(now <= _FAR * cold_residual)
    # A lane of `vmap` that has stopped must not hold up those that run.
    running = (state.outcome == Outcome.RUNNING) & ~is_far
    effort = idle_unless(running, Effort(*state.schedule))
    engine = with_effort(engine, effort)
    result, _ = evaluate(engine, effort, y, state.warm)
    if step.constants is None:
        found = by_reference(engine, y, result)
    else:
        found = by_bounds(engine, y, result, step.constants)
    found = jax.tree.map(lambda new, old: new.astype(old.dtype), found, search.at)

    gradient_norm = trees.norm(found.gradient)
    moved = _project(step, trees.add_scaled(y, -1, found.gradient))
    stationarity = trees.norm(trees.difference(moved, y))
    record = entry(result, gradient_norm, stationarity, effort.rtol)
    numbers = [found.value, *jax.tree.leaves((found.gradient, found.x, found.v))]
    finite = jnp.stack([jnp.all(jnp.isfinite(number)) for number in numbers]).all()
    usable = finite & ~is_failure(record.status) & ~is_far

    verdict = _judge(search, y, found, usable, is_unsolved(result.report.inner.status))
    following = trees.where(
        verdict.is_bad,
        _shorten(search, y, found),
        trees.where(
            verdict.is_new,
            _begin(step, search, y, found, verdict.is_accepted),
            _doubt(search, found),
        ),
    )
    is_again = ~verdict.is_new & ~verdict.is_bad & ~following.is_base
    near = trees.where(
        verdict.is_new | is_again, (found.x, found.v), (following.at.x, following.at.v)
    )
    # The value need tell no more than the next step, and this one where that is in doubt.
    trial = _trial(step, following)
    goal = _VALUE_SHARE / 2 * _promise(following, trial).astype(record.value.dtype)
    missing = jnp.abs(found.value - search.at.value) / 4
    goal = jnp.where(verdict.is_new, goal, jnp.clip(missing, goal / 10, goal))
    order = engine.rule.order  # type: ignore[union-attr]
    tolerances = _next_tolerances(state.schedule, found, record, cold_residual, goal, order)
    # A trial that is rejected tells nothing about how accurate the next one must be.
    caution = jnp.where(following.is_base, _CAUTION, 1).astype(record.value.dtype)
    kept_tolerances = _Tolerances(*(caution * each for each in state.schedule))
    tolerances = trees.where(verdict.is_bad, kept_tolerances, tolerances)
    smallest = jnp.asarray(default_rtol(found.x), record.value.dtype)
    tolerances = jax.tree.map(lambda each: jnp.clip(each, smallest, _LOOSEST), tolerances)

    record = record._replace(
        value=found.value,
        stationarity=jnp.where(verdict.is_new, record.stationarity, jnp.nan),
        certificate=found.gradient_error.astype(record.certificate.dtype),
        products=jnp.where(
            (record.products >= 0) & (found.products >= 0), record.products + found.products, -1
        ),
    )
    # Without a point to go back to, a failure is the end.
    ok = usable | ~search.is_base
    record = failed(record, finite)
    index = state.step % state.history.value.shape[0]
    reached = Best(found.value, y, found.x, state.step)
    kept = state._replace(
        y=trees.where(following.is_base, following.y, trial),
        optimizer=following,
        warm=state.warm._replace(x=near[0], adjoint=near[1]),
        schedule=tolerances,
        best=trees.where(verdict.is_new, reached, state.best),
        first_stationarity=trees.where(
            state.step == 0, record.stationarity, state.first_stationarity
        ),
    )
    kept = jax.tree.map(lambda new, old: jnp.where(ok, new, old), kept, state)
    return kept._replace(
        step=state.step + 1,
        history=jax.tree.map(
            lambda ring, new: jax.lax.dynamic_update_index_in_dim(ring, new, index, 0),
            state.history,
            record,
        ),
        outcome=jnp.where(ok, Outcome.RUNNING, Outcome.FAILED).astype(jnp.int32),
    )


class _Verdict(NamedTuple):
    is_new: jax.Array  # the point evaluated is the base now: accepted, or evaluated again
    is_accepted: jax.Array
    is_bad: jax.Array  # h surely does not decrease enough, or nothing can be told


def _judge(
    search: _Search, y: PyTree, found: Judged, usable: jax.Array, unsolved: jax.Array
) -> _Verdict:
    """Tell what the values prove."""
    allowed = search.at.value - _SUFFICIENT * _promise(search, y).astype(found.value.dtype)
    low, high = found.value - found.value_error, found.value + found.value_error
    is_good = usable & (high <= allowed - search.at.value_error) & ~search.is_base
    hopeless = unsolved | (search.doubts >= _DOUBTS)
    is_bad = ~usable | (low > allowed + search.at.value_error) | hopeless
    is_bad = is_bad & ~is_good & ~search.is_base
    return _Verdict(is_good | search.is_base, is_good, is_bad)


def _promise(search: _Search, y: PyTree) -> jax.Array:
    """Return the decrease from the base to y that the gradient promises."""
    return trees.inner(search.at.gradient, trees.difference(search.y, y))


def _trial(step: MaidStep, search: _Search) -> PyTree:
    return _project(step, _add(search.y, search.step_size * search.direction))


def _add(y: PyTree, move: jax.Array) -> PyTree:
    flat, unravel = ravel_pytree(y)
    return unravel(flat + move)


def _begin(step: MaidStep, search: _Search, base: PyTree, found: Judged, accepted: Any) -> _Search:
    """Return the first trial from a new base, or from the old one that was evaluated again."""
    gradient, before = ravel_pytree(found.gradient)[0], ravel_pytree(search.at.gradient)[0]
    move = ravel_pytree(trees.difference(base, search.y))[0]
    change, length = gradient - before, jnp.linalg.norm(move)
    errors = found.gradient_error + search.at.gradient_error
    is_known = accepted & (move @ change > _TRUST * errors * length)
    pairs = trees.where(is_known, remember(search.pairs, move, change), search.pairs)

    direction = -times_inverse(pairs, gradient, diagonal=step.projection is not None)
    full = _project(step, _add(base, direction))
    size = trees.norm(trees.difference(full, base))
    longest = jnp.where(accepted, _LONGER * length, search.longest)
    step_size = longest / jnp.where(size > 0, size, 1)
    step_size = jnp.where(pairs.is_empty, step_size, jnp.minimum(step_size, 1))
    moved = _project(step, trees.add_scaled(base, -1, found.gradient))
    stationarity = trees.norm(trees.difference(moved, base))
    vague = found.gradient_error > _LARGEST_ERROR * stationarity
    doubts = jnp.where(accepted, 0, search.doubts).astype(jnp.int32)
    is_base = vague & (doubts < _DOUBTS)
    return _Search(
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


def _shorten(search: _Search, y: PyTree, found: Judged) -> _Search:
    """Return a shorter trial: where the parabola through two values and a slope is lowest."""
    promise = _promise(search, y)
    excess = (found.value - search.at.value).astype(promise.dtype) + promise
    factor = jnp.where(excess > 0, promise / (2 * excess), _SHORTER)
    factor = jnp.where(jnp.isnan(factor), _SHORTEST, jnp.clip(factor, _SHORTEST, _SHORTER))
    step_size, rejections = factor * search.step_size, search.rejections + 1
    # A gradient that is accurate enough leads downhill, whatever the memory makes of it.
    gradient = ravel_pytree(search.at.gradient)[0]
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


def _doubt(search: _Search, found: Judged) -> _Search:
    """Return the same trial, or the base, whichever value is the less accurate."""
    return search._replace(
        doubts=search.doubts + 1, is_base=search.at.value_error > found.value_error
    )


def _next_tolerances(
    now: _Tolerances,
    found: Judged,
    record: BilevelHistory,
    cold_residual: jax.Array,
    goal: jax.Array,
    order: int,
) -> _Tolerances:
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
        return jnp.where(known, tolerance, _CAUTION * now)

    inner = record.inner_residual / jnp.where(cold_residual > 0, cold_residual, 1).astype(dtype)
    return _Tolerances(
        asked(now.x, inner, found.inner, order),
        asked(now.adjoint, record.adjoint_residual, found.adjoint, 1),
    )
