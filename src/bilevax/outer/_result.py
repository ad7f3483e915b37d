"""What `minimize` returns."""

from typing import Any, NamedTuple

import jax
import numpy as np

from bilevax._status import Status, is_unsolved
from bilevax.outer._state import BilevelHistory, BilevelState, Outcome

PyTree = Any


class Seconds(NamedTuple):
    """Where the wall time of a run went.

    Attributes:
      first: of the first step, with its compilation.
      inside: inside of compiled steps after that.
      total: of everything after the first step: the rest went to the host, for progress,
        callbacks and checkpoints.
    """

    first: float
    inside: float
    total: float


class MinimizeResult(NamedTuple):
    """The result of `minimize`.

    For several runs (`batched=True`), y, x, value, outcome, steps, state and history have the axis
    of runs, and `best_run` is the index of the best one.

    Attributes:
      y: the outer variable that met the tolerance; where none did, that with the smallest value, as
        far as values of inexact inner solutions tell.
      x: the inner solution there.
      value: g(x, y) there; infinite if not even one step could be evaluated.
      outcome: the `Outcome`, for several runs their codes.
      steps: how many steps were taken in all, with those before a resume.
      message: how the run ended and what to do about it, in a sentence.
      state: the `BilevelState` at the end; its y is the point after the last step.
      history: a `BilevelHistory` of the last steps, NumPy arrays in the order of steps. Where runs
        have taken different numbers of steps, the ends are infinite and -1.
      seconds: see `Seconds`.
      best_run: the run with the smallest value; None if there is but one.
    """

    y: PyTree
    x: PyTree
    value: Any
    outcome: Any
    steps: Any
    message: str
    state: BilevelState
    history: BilevelHistory
    seconds: Seconds
    best_run: int | None


def make_result(
    state: BilevelState, interrupted: bool, seconds: Seconds, *, batched: bool
) -> MinimizeResult:
    """Return the result of a run that ended in this state."""
    running = Outcome.INTERRUPTED if interrupted else Outcome.STEPS
    codes = np.asarray(state.outcome)
    codes = np.where(codes == Outcome.RUNNING, int(running), codes)
    ring, steps = jax.device_get((state.history, state.step))
    last = (steps - 1) % ring.status.shape[-1]
    statuses = np.take_along_axis(ring.status, last[..., None], axis=-1)[..., 0]
    if batched:
        history, best_run, outcome = _ordered_runs(ring, steps), _best(state), codes
        alike: dict[tuple[int, int], list[int]] = {}
        for run, code in enumerate(codes):
            status = statuses[run] if is_unsolved(statuses[run]) else 0
            alike.setdefault((int(code), int(status)), []).append(run)
        message = "; ".join(
            f"{len(runs)} of {len(codes)} runs: {_message(Outcome(code), status, steps[runs])}"
            for (code, status), runs in sorted(alike.items())
        )
    else:
        history, best_run, outcome = _ordered(ring, int(steps)), None, Outcome(int(codes))
        message, steps = _message(outcome, int(statuses), steps), int(steps)
    y, x, value = state.best.y, state.best.x, np.asarray(state.best.value)
    return MinimizeResult(y, x, value, outcome, steps, message, state, history, seconds, best_run)


def _best(state: BilevelState) -> int:
    values = np.asarray(state.best.value)
    return int(np.argmin(np.where(np.isnan(values), np.inf, values)))


def _ordered(ring: BilevelHistory, steps: int) -> BilevelHistory:
    """Return what a ring remembers in the order of steps."""
    length = len(ring.value)
    order = np.arange(max(steps - length, 0), steps) % length
    return BilevelHistory(*(leaf[order] for leaf in ring))


def _ordered_runs(ring: BilevelHistory, steps: np.ndarray) -> BilevelHistory:
    runs = [_ordered(_row(ring, run), int(count)) for run, count in enumerate(steps)]
    longest = max(len(run.value) for run in runs)

    def stack(*leaves: np.ndarray) -> np.ndarray:
        missing = np.inf if np.issubdtype(leaves[0].dtype, np.floating) else -1
        gaps = [(0, longest - len(leaf)) for leaf in leaves]
        return np.stack(
            [np.pad(u, gap, constant_values=missing) for u, gap in zip(leaves, gaps, strict=True)]
        )

    return jax.tree.map(stack, *runs)


def _row(history: BilevelHistory, run: int) -> BilevelHistory:
    return BilevelHistory(*(leaf[run] for leaf in history))


def _message(outcome: Outcome, status: int, steps: np.ndarray) -> str:
    """Say how runs ended that took so many steps, the last of them with this status."""
    least, most = np.min(steps), np.max(steps)
    count = f"{most} step" if most == 1 else f"{most} steps"
    after = f"after {count}" if least == most else f"after {least} to {count}"
    unsolved = f"a solve ended {Status(status).name}"
    match outcome:
        case Outcome.CONVERGED:
            return f"the norm of the projected gradient met the tolerance {after}"
        case Outcome.FAILED:
            nonfinite = "a value, gradient or update was not finite"
            what = nonfinite if status == Status.NONFINITE else unsolved
            return f"{what} {after}, y is that before it; {Status(status).remedy}"
        case Outcome.PLATEAU:
            end = f"the value no longer improved {after}"
        case Outcome.INTERRUPTED:
            end = f"interrupted by a signal {after}"
        case _:
            end = f"stopped {after}, as asked for; the gradient had not met the tolerance"
    if is_unsolved(status):
        return f"{end}, and in the last step {unsolved}: {Status(status).remedy}"
    return end
