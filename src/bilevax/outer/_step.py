"""One outer step: a hypergradient, an update of y, a projection; a pure function of the state."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax import _loop as loop
from bilevax import _trees as trees
from bilevax._closures import as_partial
from bilevax._iterative import Bound, IterativeRule
from bilevax._scaling import scaled
from bilevax._status import is_failure
from bilevax.hypergradient import Engine, WarmStart, cold_residual, cold_start
from bilevax.outer._evaluation import evaluate, idle_unless, resolved, value, with_effort
from bilevax.outer._schedules import Constant, Schedule
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

PyTree = Any


@trees.register
@dataclasses.dataclass(frozen=True, eq=False)
class OuterStep:
    """A pure function state -> state; made by `make_step`.

    Attributes:
      engine: the engine, or a function of a PRNG key that returns one.
      start: the optimiser's function from y to its state.
      update: the optimiser's function from gradients to updates.
      schedule: the inexactness schedule.
      projection: what is applied to y after each update, or None.
      warm_x: whether the inner solve starts from the last one.
      warm_adjoint: whether the adjoint solve does.
    """

    engine: Engine | Partial
    start: Partial
    update: Partial
    schedule: Schedule
    projection: Partial | None
    warm_x: bool = dataclasses.field(metadata={"static": True})
    warm_adjoint: bool = dataclasses.field(metadata={"static": True})

    def init(
        self, y: PyTree, x0: PyTree, *, key: jax.Array | None = None, history: int = 1000
    ) -> BilevelState:
        """Return the state before the first step.

        Args:
          y: the outer variable, a pytree of floating arrays; it is projected first.
          x0: where the first inner solve starts, and what its tolerance refers to.
          key: a PRNG key, for an engine that takes one; None is `jax.random.key(0)`.
          history: how many of the last steps the state remembers.

        Returns:
          A `BilevelState`.

        Raises:
          TypeError: for a wrong kind of argument; if the projection returns no pytree like y.
          ValueError: if `history` is not positive.
        """
        checks.inner_variable(y, "y")
        warm, y = cold_start(x0), trees.as_arrays(y)
        history = checks.known_whole("history", history)
        key = jax.random.key(0) if key is None else checked_key(key)
        if self.projection is not None:
            image = jax.eval_shape(self.projection, y)
            checks.same_structure("projection", image, y, expected="y")
        return _init(self, y, warm, key, history=history)

    def engine_for(self, key: jax.Array) -> Engine:
        """Return the engine, made from the key if it is made from one."""
        if isinstance(self.engine, Engine):
            return self.engine
        engine = self.engine(key)
        checks.is_component("engine(key)", engine, Engine, "value_and_hypergradient(...)")
        self.schedule.check(engine)
        return engine

    def stationarity(self, y: PyTree, gradient: PyTree) -> jax.Array:
        """Return ||y - P(y - gradient)||, the norm of the projected gradient."""
        if self.projection is None:
            return trees.norm(gradient)
        moved = self.projection(trees.add_scaled(y, -1, gradient))
        return trees.norm(trees.difference(moved, y))

    def __call__(self, state: BilevelState) -> BilevelState:
        """Return the state after one step; a state that is not RUNNING stays as it is."""
        checks.is_component("state", state, BilevelState, "step.init(y, x0)")
        return _step(self, state)


def make_step(
    engine: Engine | Callable[[jax.Array], Engine],
    optimizer: optax.GradientTransformation,
    *,
    schedule: Schedule = Constant(),
    projection: Callable[[PyTree], PyTree] | None = None,
    warm_x: bool = True,
    warm_adjoint: bool = True,
) -> OuterStep:
    """Make one step of inexact hypergradient descent, a pure function of a `BilevelState`.

        x, v  =  inner and adjoint solution at y, to the tolerance of the schedule
        y     <- P(y + update(Omega(x, y)))

    The solves start from those of the last step. A warm start that meets a loose tolerance already
    would never move again while y does, and the error would not fall below that tolerance; so an
    inner solve leaves at most half of the residual that it starts with, unless that is below
    eps^(3/4) of the one at x0 (of a separable problem, the task that is worst off tells). With
    `Adaptive`, certificates take care of that.

    Args:
      engine: made by `value_and_hypergradient`; or a function of a PRNG key that returns one, which
        is called anew in every step, for objectives that draw a batch: data may be traced there.
      optimizer: any Optax optimiser. Those with a line search, as `optax.lbfgs()`, get a `value_fn`
        whose derivative is the hypergradient; the solves in there are not in the history, and need
        a tight tolerance, for line searches compare values. `value`, `grad` and `tolerance` are
        handed over to those that take them.
      schedule: how accurately each step solves: `Constant`, `Geometric`, `Harmonic`, `Logarithmic`,
        `Adaptive`. By default as accurately as the engine does.
      projection: P, a function of y that returns a pytree like y, such as
        `lambda y: optax.projections.projection_box(y, -5.0, 5.0)` for a y that is one array.
      warm_x: False starts every inner solve from x0.
      warm_adjoint: False starts every adjoint solve from zero.

    Returns:
      An `OuterStep`: `step.init(y, x0)` makes a state and `step(state)` the next one. It goes
      through `jax.jit`, `jax.vmap` and `jax.lax.scan`. `minimize` drives it.

    Raises:
      TypeError: for a wrong kind of argument; if the schedule does not fit the engine.

    Example:
      >>> import jax
      >>> import optax
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: 0.5 * (x - y) ** 2)  # x*(y) = y
      >>> engine = bx.value_and_hypergradient(lambda x, y: (x - 3.0) ** 2, problem, bx.Newton())
      >>> step = bx.make_step(engine, optax.sgd(0.25))
      >>> state, _ = jax.lax.scan(lambda s, _: (step(s), None), step.init(1.0, 0.0), length=3)
      >>> float(state.y), [float(value) for value in state.history.value[:3]]
      (2.75, [4.0, 1.0, 0.25])

    Source:
      F. Pedregosa, "Hyperparameter Optimization with Approximate Gradient", 2016.
    """
    checks.is_component("optimizer", optimizer, optax.GradientTransformation, "optax.adam(0.1)")
    checks.is_component("schedule", schedule, Schedule, "Constant(1e-6)")
    if isinstance(engine, Engine):
        schedule.check(engine)
        if isinstance(engine.rule, IterativeRule):
            # In a compiled step the length of a run is traced.
            rule = Bound(engine.rule.bind(engine.solver), engine.rule.mode)
            engine = dataclasses.replace(engine, rule=rule)
    else:
        if not callable(engine):
            checks.is_component("engine", engine, Engine, "value_and_hypergradient(...)")
        engine = as_partial("engine", engine)
    if projection is not None:
        projection = as_partial("projection", projection)
    start = Partial(optimizer.init)
    update = Partial(optax.with_extra_args_support(optimizer).update)
    return OuterStep(engine, start, update, schedule, projection, warm_x, warm_adjoint)


@jax.jit
def _project(step: OuterStep, y: PyTree) -> PyTree:
    return y if step.projection is None else trees.as_arrays(step.projection(y))


def _init(
    step: OuterStep, y: PyTree, warm: WarmStart, key: jax.Array, history: int
) -> BilevelState:
    y = _project(step, y)
    dtype = jax.eval_shape(lambda: step.engine_for(key).value(warm.x, y)).dtype
    infinity, none = jnp.full((), jnp.inf, dtype), jnp.zeros((), jnp.int32)
    return BilevelState(
        y=y,
        optimizer=trees.as_arrays(step.start(y)),
        warm=warm,
        step=none,
        schedule=step.schedule.init(dtype),
        key=key,
        history=empty_history(history, infinity),
        best=Best(infinity, y, warm.x, none),
        milestone=Milestone(infinity, none),
        candidate=Candidate(y, none, none),
        first_stationarity=jnp.full((), jnp.nan, dtype),
        outcome=jnp.asarray(int(Outcome.RUNNING), jnp.int32),
    )


@jax.jit
def _step(step: OuterStep, state: BilevelState) -> BilevelState:
    running = state.outcome == Outcome.RUNNING
    # Under `vmap` all lanes step until the last one has stopped.
    following = jax.lax.cond(
        trees.in_any_lane(running), lambda state: _advance(step, state), lambda state: state, state
    )
    return jax.tree.map(lambda new, old: jnp.where(running, new, old), following, state)


def _advance(step: OuterStep, state: BilevelState) -> BilevelState:
    """Take a step from a running state."""
    key = drawn = state.key
    if not isinstance(step.engine, Engine):  # random numbers take long to compile
        key, drawn = jax.random.split(key)
    engine, y, warm = step.engine_for(drawn), state.y, state.warm
    if not step.warm_x:
        warm = warm._replace(x=warm.start)
    if not step.warm_adjoint:
        warm = warm._replace(adjoint=jax.tree.map(jnp.zeros_like, warm.adjoint))
    # The scaling of this step is found once, for all that is solved in it.
    engine = dataclasses.replace(engine, problem=scaled(engine.problem, warm.x, y))
    effort = step.schedule.effort(state.schedule, state.step, warm.x)
    safeguarded = step.warm_x and step.schedule.safeguarded
    effort = resolved(effort, engine, y, warm, safeguarded=safeguarded)
    # A lane of `vmap` that has stopped must not hold up those that run.
    effort = idle_unless(state.outcome == Outcome.RUNNING, effort)
    engine = with_effort(engine, effort)
    result, certificate = evaluate(engine, effort, y, warm)

    gradient_norm = trees.norm(result.gradient)
    stationarity = step.stationarity(y, result.gradient)
    rtol = jnp.nan if engine.accuracy is not None else loop.stopping_rtol(engine.solver, warm.x)
    record = entry(result, gradient_norm, stationarity, rtol)

    updates, optimizer = step.update(
        result.gradient,
        state.optimizer,
        y,
        value=result.value,
        grad=result.gradient,
        # Line searches of Optax want it to take what else they are given.
        value_fn=lambda y, tolerance: value(engine, y, result.warm),
        tolerance=record.rtol,
    )
    next_y = optax.apply_updates(y, updates)
    if step.projection is not None:
        next_y = step.projection(next_y)
    next_y, optimizer = trees.as_arrays(next_y), trees.as_arrays(optimizer)
    checks.same_structure("optimizer", optimizer, state.optimizer, expected="its state")

    numbers = [record.value, *jax.tree.leaves((result.gradient, next_y))]
    finite = jnp.stack([jnp.all(jnp.isfinite(number)) for number in numbers]).all()
    ok = finite & ~is_failure(record.status)
    record = failed(record, finite)
    outcome = jnp.where(ok, Outcome.RUNNING, Outcome.FAILED).astype(jnp.int32)
    index = state.step % state.history.value.shape[0]
    is_first = state.step == 0
    moves = step.schedule.accepts(state.schedule, state.step, record, certificate)
    memory = step.schedule.update(
        state.schedule,
        state.step,
        record,
        certificate,
        jnp.max(cold_residual(engine.solver, engine.problem, warm, y)),
        _order(engine),
    )
    reached = Best(record.value, y, result.x, state.step)
    y, optimizer = trees.where(moves, (next_y, optimizer), (y, state.optimizer))
    kept = state._replace(
        y=y,
        optimizer=optimizer,
        warm=result.warm,
        schedule=memory,
        best=trees.where(record.value < state.best.value, reached, state.best),
        first_stationarity=trees.where(is_first, record.stationarity, state.first_stationarity),
    )
    kept = jax.tree.map(lambda new, old: jnp.where(ok, new, old), kept, state)
    return kept._replace(
        key=key,
        step=state.step + 1,
        history=jax.tree.map(
            lambda ring, new: jax.lax.dynamic_update_index_in_dim(ring, new, index, 0),
            state.history,
            record,
        ),
        outcome=outcome,
    )


def _order(engine: Engine) -> int:
    return 1 if isinstance(engine.rule, IterativeRule) else engine.rule.order


def checked_key(key: Any) -> jax.Array:
    """Return a PRNG key, or raise if it is none."""
    is_key = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not is_key or key.shape != ():
        raise TypeError(f"`key` must be a PRNG key from `jax.random.key`, got {key!r}.")
    return key
