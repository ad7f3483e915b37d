"""Training runs: outer steps in compiled chunks, watched and saved between them."""

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax.outer._checkpointing import Checkpointer, OpenCheckpoints
from bilevax.outer._convergence import Criteria, judge, remember, verified
from bilevax.outer._identity import identify
from bilevax.outer._interrupts import Interrupts
from bilevax.outer._progress import ProgressBar
from bilevax.outer._result import MinimizeResult, Seconds, make_result
from bilevax.outer._state import BilevelState, Outcome
from bilevax.outer._step import OuterStep, checked_key

PyTree = Any

# How long a chunk of steps should last: much longer than what happens between two of them.
_CHUNK_SECONDS = 0.5


def minimize(
    step: OuterStep,
    y: PyTree,
    x0: PyTree,
    steps: int = 1000,
    *,
    rtol: Any = 1e-4,
    atol: Any = 0.0,
    patience: int | None = None,
    min_improvement: Any = 1e-4,
    batched: bool = False,
    key: jax.Array | None = None,
    history: int = 1000,
    chunk: int | None = None,
    callback: Callable[[BilevelState], None] | None = None,
    checkpoint: Checkpointer | None = None,
    progress: bool = True,
) -> MinimizeResult:
    """Minimise h(y) = g(x*(y), y): take outer steps until the projected gradient vanishes.

        stop where ||y - P(y - Omega)|| + error <= max(rtol * its first value, atol)

    The error is that of a certificate of Omega. Where the engine and its schedule make none, one is
    made when the first term meets the tolerance, with the accuracy of the engine itself; a run that
    it refuses goes on, and is certified again after one step, two, four, and so on. Rules without
    certificates and engines that are made from a key count without an error. A step whose inner or
    adjoint solve has not met its own tolerance does not count: what is small there may be the
    error.

    Steps run in compiled chunks of about half a second. Between them the host shows progress on a
    terminal (with the extra `progress`), calls back, saves, and looks for signals: after SIGINT or
    SIGTERM the run ends with the current chunk and its state is saved. The length of chunks does
    not change results.

    A run that is resumed from a checkpoint ends with the bits of one that was not interrupted. A
    failed or non-finite step ends a run with the state before it. If a chunk raises, the state
    before the chunk is saved.

    Args:
      step: made by `make_step` or `hoag`.
      y: where to start, a pytree of floating arrays; with `batched`, with a leading axis of runs.
      x0: where inner solves start, one for all runs.
      steps: outer steps at most, with those before a resume.
      rtol: see above; without unit.
      atol: see above; in the unit of the hypergradient.
      patience: end after so many steps without an improvement of the value; None for no such end.
      min_improvement: an improvement by less than this part of the value does not count.
      batched: whether y is a batch of starting points: all runs are one vmapped program. A run that
        has ended stays as it is and takes no more inner steps; none changes another.
      key: a PRNG key, for an engine that takes one; None is `jax.random.key(0)`.
      history: how many of the last steps the result and the checkpoints remember.
      chunk: steps in a chunk; None for about half a second of them.
      callback: called with the `BilevelState` after each chunk.
      checkpoint: where states are saved and found again, such as
        `bilevax.checkpoints.Checkpoints("runs/1")`; None saves nothing.
      progress: False for no progress bar, not even on a terminal.

    Returns:
      A `MinimizeResult`. `result.message` says how the run ended.

    Raises:
      TypeError: for a wrong kind of argument; whatever the engine and the projection raise.
      ValueError: for a negative tolerance; for a checkpoint of another problem.
      OSError: before the first step, if the checkpoint cannot be written.

    Example:
      >>> import optax
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: 0.5 * (x - y) ** 2)  # x*(y) = y
      >>> engine = bx.value_and_hypergradient(lambda x, y: (x - 3.0) ** 2, problem, bx.Newton())
      >>> result = bx.minimize(bx.make_step(engine, optax.sgd(0.25)), 1.0, 0.0, rtol=1e-3)
      >>> round(float(result.y), 2), result.outcome.name, result.steps
      (3.0, 'CONVERGED', 11)
    """
    checks.is_component("step", step, OuterStep, "make_step(engine, optax.adam(0.1))")
    steps = checks.known_whole("steps", steps)
    if chunk is not None:
        chunk = checks.known_whole("chunk", chunk)
    if patience is not None:
        checks.positive("patience", patience, whole=True)
    for name, number in {"rtol": rtol, "atol": atol, "min_improvement": min_improvement}.items():
        checks.not_negative(name, number)
    if callback is not None and not callable(callback):
        raise TypeError(f"`callback` must be a function, got {callback!r}.")
    if checkpoint is not None:
        checks.is_component("checkpoint", checkpoint, Checkpointer, 'Checkpoints("runs/1")')
    largest = np.iinfo(np.int32).max
    criteria = Criteria(rtol, atol, largest if patience is None else patience, min_improvement)
    state = _start(step, y, x0, key, history, batched)
    with contextlib.ExitStack() as stack:
        saved = None
        if checkpoint is not None:
            saved = checkpoint.open(identify(step, state, batched), state)
            stack.callback(saved.close)
            restored = saved.restore()
            state = state if restored is None else restored
        state = _judge_all(step, criteria, state, batched=batched)
        state = verified(step, criteria, state, batched)
        interrupts = stack.enter_context(Interrupts())
        bar = stack.enter_context(ProgressBar(steps, _done(state), shown=progress))

        def between(state: BilevelState) -> None:
            done = _done(state)
            bar.update(done, state)
            if saved is not None and saved.is_due(done):
                saved.save(done, state, _value(state))
            if callback is not None:
                callback(state)

        run = _Run(step, criteria, batched, steps, chunk, saved)
        state, seconds = run.drive(state, interrupts, between)
    return make_result(state, interrupts.requested, seconds, batched=batched)


class _Run(NamedTuple):
    """What does not change during a run."""

    step: OuterStep
    criteria: Criteria
    batched: bool
    steps: int
    chunk: int | None
    saved: OpenCheckpoints | None

    def drive(
        self,
        state: BilevelState,
        interrupts: Interrupts,
        between: Callable[[BilevelState], None],
    ) -> tuple[BilevelState, Seconds]:
        """Return the last state, and where the time went."""
        began = time.perf_counter()
        first = inside = 0.0
        length, is_first, at_start = 1, True, _done(state)
        try:
            while self._goes_on(state) and not interrupts.requested:
                start = time.perf_counter()
                count = min(self.chunk or length, self.steps - _done(state))
                if self.saved is not None:
                    count = min(count, self.saved.steps_until_due(_done(state)) or count)
                following = _advance(self.step, self.criteria, state, count, batched=self.batched)
                following = verified(self.step, self.criteria, following, self.batched)
                jax.block_until_ready(following)
                taken = _done(following) - _done(state)
                state = following
                lasted = time.perf_counter() - start
                if is_first:
                    first, began, is_first = lasted, time.perf_counter(), False
                else:
                    inside += lasted
                    length = max(1, round(max(taken, 1) * _CHUNK_SECONDS / max(lasted, 1e-6)))
                between(state)
        except BaseException as error:
            self._save_at_last(state, at_start, error)
            raise
        total = time.perf_counter() - began
        self._save_at_last(state, at_start, None)
        return state, Seconds(first, inside, 0.0 if is_first else total)

    def _goes_on(self, state: BilevelState) -> bool:
        running = np.asarray(state.outcome) == Outcome.RUNNING
        return bool(np.any(running & (np.asarray(state.step) < self.steps)))

    def _save_at_last(
        self, state: BilevelState, at_start: int, error: BaseException | None
    ) -> None:
        """Save where a run ends; if it ends by an error, that is what is raised."""
        if self.saved is None or _done(state) == at_start:
            return
        if error is None:
            self.saved.save(_done(state), state, _value(state))
            return
        try:
            self.saved.save(_done(state), state, _value(state))
            error.add_note(f"The state after step {_done(state)} was saved.")
        except Exception as second:
            error.add_note(f"The state after step {_done(state)} could not be saved: {second}")


def _start(
    step: OuterStep, y: PyTree, x0: PyTree, key: jax.Array | None, history: int, batched: bool
) -> BilevelState:
    if not batched:
        return step.init(y, x0, key=key, history=history)
    counts = {jnp.shape(leaf)[0] if jnp.ndim(leaf) else 0 for leaf in jax.tree.leaves(y)}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            "`y` must have arrays with one common leading axis of runs with `batched=True`, "
            f"got {checks.describe(y)}."
        )
    keys = jax.random.split(jax.random.key(0) if key is None else checked_key(key), counts.pop())
    return jax.vmap(lambda y, key: step.init(y, x0, key=key, history=history))(
        trees.as_arrays(y), keys
    )


@functools.partial(jax.jit, static_argnames="batched")
def _advance(
    step: OuterStep, criteria: Criteria, state: BilevelState, count: Any, batched: bool
) -> BilevelState:
    """Take `count` steps, fewer if all runs end before that."""

    def one(state: BilevelState) -> BilevelState:
        # A run that has ended stays as it is: `judge` is for those that go on.
        following = trees.where(
            state.outcome == Outcome.RUNNING, judge(step, criteria, step(state)), state
        )
        return remember(state, following)

    def proceed(carry: tuple[BilevelState, jax.Array]) -> jax.Array:
        state, taken = carry
        return jnp.any(state.outcome == Outcome.RUNNING) & (taken < count)

    def body(carry: tuple[BilevelState, jax.Array]) -> tuple[BilevelState, jax.Array]:
        state, taken = carry
        return (jax.vmap(one) if batched else one)(state), taken + 1

    return jax.lax.while_loop(proceed, body, (state, jnp.zeros((), jnp.int32)))[0]


@functools.partial(jax.jit, static_argnames="batched")
def _judge_all(
    step: OuterStep, criteria: Criteria, state: BilevelState, batched: bool
) -> BilevelState:
    one = functools.partial(judge, step, criteria)
    return (jax.vmap(one) if batched else one)(state)


def _done(state: BilevelState) -> int:
    return int(np.max(np.asarray(state.step)))


def _value(state: BilevelState) -> float:
    """Return the value of the last step, the smallest of several runs: what a state is worth."""
    step, values = np.asarray(state.step), np.asarray(state.history.value)
    last = (step - 1) % values.shape[-1]
    # NaN, of a run that failed, is not the smallest.
    return float(np.fmin.reduce(np.take_along_axis(values, last[..., None], axis=-1), axis=None))
