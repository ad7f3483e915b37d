"""MAID: descent with a line search whose sufficient decrease is that of h itself."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax import _mesh as mesh
from bilevax import _trees as trees
from bilevax._closures import as_partial
from bilevax._scaling import scaled
from bilevax._status import is_failure, is_unsolved
from bilevax.certificates import BoundConstants, checked_constants
from bilevax.hypergradient import Engine, cold_start, require_certificates
from bilevax.linear import default_rtol
from bilevax.outer._evaluation import evaluate, idle_unless, with_effort
from bilevax.outer._judged import Judged, by_bounds, by_reference
from bilevax.outer._quasi_newton import no_pairs
from bilevax.outer._schedules import Effort
from bilevax.outer._search import (
    CAUTION,
    FIRST_TOLERANCE,
    LOOSEST,
    VALUE_SHARE,
    Search,
    Tolerances,
    begun,
    doubted,
    judge,
    next_tolerances,
    next_trial,
    projected,
    promise,
    shortened,
)
from bilevax.outer._state import (
    Best,
    BilevelState,
    Candidate,
    Milestone,
    Outcome,
    empty_history,
    entry,
    failed,
)
from bilevax.outer._step import checked_key

PyTree = Any

# A trial is too far away where the last x is this much worse than the cold start.
_FAR = 10.0


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
        key = jax.random.key(0) if key is None else checked_key(key)
        return _init(self, y, warm, key, history)

    def engine_for(self, key: jax.Array) -> Engine:
        """Return the engine, which depends on no key."""
        return self.engine

    def stationarity(self, y: PyTree, gradient: PyTree) -> jax.Array:
        """Return ||y - P(y - gradient)||, the norm of the projected gradient."""
        moved = projected(self.projection, trees.add_scaled(y, -1, gradient))
        return trees.norm(trees.difference(moved, y))

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
    the next step needs. Every step evaluates once, at `state.y`, which is a trial: one that is not
    accepted has an infinite `stationarity` in the history. The result of `minimize` is accepted.

    Without `constants`, errors are estimated by a Newton-corrected reference, as in
    `hypergradient_error`; the decrease is real as far as these estimates hold. With `constants`
    they are proven bounds, as in `hypergradient_bound`, and so is the decrease; the looser they
    are, the more accurate the solves. Values are corrected to second order by the adjoint.

    The direction d is that of limited-memory BFGS, or the negative gradient in its scale where
    there is a projection, or where that does not lead on. Pairs count where their curvature is
    above the errors.

    Args:
      engine: made by `value_and_hypergradient`, without `accuracy`.
      constants: for bounds; a function of (x, y) that returns the `BoundConstants` of a point, such
        as `BoundConstants.ridge(train, validation)`, or one that holds for all x and y.
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


def _init(step: MaidStep, y: PyTree, warm: Any, key: jax.Array, history: int) -> BilevelState:
    y = projected(step.projection, y)
    dtype = jax.eval_shape(lambda: step.engine.value(warm.x, y)).dtype
    flat = trees.ravel(y)[0]
    infinity, none = jnp.full((), jnp.inf, dtype), jnp.zeros((), jnp.int32)
    zero, number = jnp.zeros((), flat.dtype), jnp.zeros((), dtype)
    nowhere = Judged(infinity, infinity, y, zero, zero, zero, warm.x, warm.adjoint, none)
    longest = jnp.asarray(step.first_step, flat.dtype)
    search = Search(y, nowhere, no_pairs(flat), flat, zero, longest, none, none, none == 0, none)
    tolerance = number + FIRST_TOLERANCE
    return BilevelState(
        y=y,
        optimizer=search,
        warm=warm,
        step=none,
        schedule=Tolerances(tolerance, tolerance),
        key=key,
        history=empty_history(history, infinity),
        best=Best(infinity, y, warm.x, none),
        milestone=Milestone(infinity, none),
        candidate=Candidate(y, none, none),
        first_stationarity=infinity,
        outcome=jnp.asarray(int(Outcome.RUNNING), jnp.int32),
    )


@jax.jit
def _step(step: MaidStep, state: BilevelState) -> BilevelState:
    running = state.outcome == Outcome.RUNNING
    # Under `vmap` all lanes step until the last one has stopped.
    following = mesh.cond(
        trees.in_any_lane(running), lambda state: _advance(step, state), lambda state: state, state
    )
    return jax.tree.map(lambda new, old: jnp.where(running, new, old), following, state)


def _advance(step: MaidStep, state: BilevelState) -> BilevelState:
    """Evaluate at the trial; accept it or not; make the next trial."""
    search, y = state.optimizer, state.y
    # The scaling of this step is found once, for all that is solved in it.
    problem = scaled(step.engine.problem, state.warm.x, y)
    engine = dataclasses.replace(step.engine, problem=problem)
    posed = engine.solver.posed(problem, state.warm.x, y)
    now, cold_residual = (
        posed.norm(posed.optimality(x, y)) for x in (state.warm.x, state.warm.start)
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
    record = entry(result, gradient_norm, step.stationarity(y, found.gradient), effort.rtol)
    numbers = [found.value, *jax.tree.leaves((found.gradient, found.x, found.v))]
    finite = jnp.stack([jnp.all(jnp.isfinite(number)) for number in numbers]).all()
    usable = finite & ~is_failure(record.status) & ~is_far

    verdict = judge(search, y, found, usable, is_unsolved(result.report.inner.status))
    following = trees.where(
        verdict.is_bad,
        shortened(search, y, found),
        trees.where(
            verdict.is_new,
            begun(search, y, found, verdict.is_accepted, step.projection),
            doubted(search, found),
        ),
    )
    is_again = ~verdict.is_new & ~verdict.is_bad & ~following.is_base
    near = trees.where(
        verdict.is_new | is_again, (found.x, found.v), (following.at.x, following.at.v)
    )
    # The value need tell no more than the next step, and this one where that is in doubt.
    trial = next_trial(following, step.projection)
    goal = VALUE_SHARE / 2 * promise(following, trial).astype(record.value.dtype)
    missing = jnp.abs(found.value - search.at.value) / 4
    goal = jnp.where(verdict.is_new, goal, jnp.clip(missing, goal / 10, goal))
    order = engine.rule.order  # type: ignore[union-attr]
    tolerances = next_tolerances(state.schedule, found, record, cold_residual, goal, order)
    # A trial that is rejected tells nothing about how accurate the next one must be.
    caution = jnp.where(following.is_base, CAUTION, 1).astype(record.value.dtype)
    kept_tolerances = Tolerances(*(caution * each for each in state.schedule))
    tolerances = trees.where(verdict.is_bad, kept_tolerances, tolerances)
    smallest = jnp.asarray(default_rtol(found.x), record.value.dtype)
    tolerances = jax.tree.map(lambda each: jnp.clip(each, smallest, LOOSEST), tolerances)

    record = record._replace(
        value=found.value,
        stationarity=jnp.where(verdict.is_new, record.stationarity, jnp.inf),
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
