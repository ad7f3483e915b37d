"""The state of a bilevel training run: one pytree of arrays."""

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax._status import Status
from bilevax.hypergradient import Hypergradient, WarmStart

PyTree = Any


class Outcome(enum.IntEnum):
    """How far a run is, or how it ended.

    States hold the code as an integer array; `Outcome(int(code))` gives the name.

    Example:
      >>> import bilevax as bx
      >>> bx.Outcome(1).name, bx.Outcome.STEPS.value
      ('CONVERGED', 3)
    """

    RUNNING = 0
    """The next step is worth taking."""
    CONVERGED = 1
    """The norm of the projected gradient met the tolerance, and so it does with the certified error
    of the gradient; of a rule without certificates, in a step whose solves met their tolerances."""
    PLATEAU = 2
    """The value has not improved for as many steps as `patience` allows."""
    STEPS = 3
    """All steps that were asked for are taken."""
    FAILED = 4
    """A step failed or was not finite; y and the optimiser are those before it."""
    INTERRUPTED = 5
    """A signal asked the process to end."""
    CANDIDATE = 6
    """The norm met the tolerance, and the error of the gradient is not known yet."""


class BilevelHistory(NamedTuple):
    """What happened in the last outer steps: arrays of one length, used as a ring.

    Step s, counted from 0, is entry s % length. `minimize` returns them in the order of steps.

    Attributes:
      value: g(x, y) at the y before the step.
      gradient_norm: the norm of the hypergradient there.
      stationarity: ||y - P(y - gradient)||, where P is the projection; zero where y is optimal to
        first order. Without a projection it is `gradient_norm`.
      rtol: the relative tolerance of the inner solve; NaN where an `accuracy` took its place.
      inner_iterations: of the inner solve, int32; for a separable problem the sum over tasks.
      inner_residual: ||F(x, y)||; for a separable problem the largest.
      adjoint_iterations: of the adjoint solve, int32 (summed over tasks); -1 where not counted.
      adjoint_residual: relative, the largest of the tasks; NaN for rules without an adjoint solve.
      products: with F_1 or F_1^T outside of the inner solve, int32: of the adjoint solve, the
        correction and the certificate; -1 where not counted.
      certificate: the estimate of the error of the hypergradient, absolute; NaN without one.
      status: the worst `Status` of the solves, int32; NONFINITE where a number was not finite.
    """

    value: jax.Array
    gradient_norm: jax.Array
    stationarity: jax.Array
    rtol: jax.Array
    inner_iterations: jax.Array
    inner_residual: jax.Array
    adjoint_iterations: jax.Array
    adjoint_residual: jax.Array
    products: jax.Array
    certificate: jax.Array
    status: jax.Array


class Best(NamedTuple):
    """The best point of a run, as far as the values of inexact inner solutions tell.

    In a run of `minimize` that converged, it is the point that met the tolerance.

    Attributes:
      value: g(x, y), the smallest so far; infinite before the first step.
      y: the outer variable there.
      x: the inner solution there.
      step: the number of the step that evaluated it, int32.
    """

    value: jax.Array
    y: PyTree
    x: PyTree
    step: jax.Array


class Milestone(NamedTuple):
    """The last improvement of the value that was large enough to count.

    Attributes:
      value: the value then.
      step: the number of the step, int32.
    """

    value: jax.Array
    step: jax.Array


class Candidate(NamedTuple):
    """The point of the last step, which may be the end of a run.

    Attributes:
      y: the outer variable before the step.
      due: the number of the first step that may be certified, int32.
      refused: how many points were no end when they were certified, int32.
    """

    y: PyTree
    due: jax.Array
    refused: jax.Array


class BilevelState(NamedTuple):
    """All that a bilevel training run is, as one pytree; made by `OuterStep.init`.

    Attributes:
      y: the outer variable.
      optimizer: the state of the Optax optimiser.
      warm: the `WarmStart` of the next hypergradient: inner solution, adjoint, cold start.
      step: the number of steps taken, int32.
      schedule: what the inexactness schedule remembers: tolerances.
      key: a PRNG key, split once a step by an engine that takes one.
      history: a `BilevelHistory` of the last steps.
      best: the `Best` point so far.
      milestone: a `Milestone`, for stopping at a plateau.
      candidate: a `Candidate` for the end of the run.
      first_stationarity: the norm of the projected gradient in the first step.
      outcome: an `Outcome` code, int32; steps leave a state alone that is not RUNNING.
    """

    y: PyTree
    optimizer: PyTree
    warm: WarmStart
    step: jax.Array
    schedule: PyTree
    key: jax.Array
    history: BilevelHistory
    best: Best
    milestone: Milestone
    candidate: Candidate
    first_stationarity: jax.Array
    outcome: jax.Array


def empty_history(length: int, value: jax.Array) -> BilevelHistory:
    """Return a history of `length` steps that are still to come; NaN and -1."""
    number = jnp.full(length, jnp.nan, value.dtype)
    count = jnp.full(length, -1, jnp.int32)
    return BilevelHistory(
        number, number, number, number, count, number, count, number, count, number, count
    )


def entry(
    result: Hypergradient, gradient_norm: jax.Array, stationarity: jax.Array, rtol: Any
) -> BilevelHistory:
    """Return what a history says of one step."""
    report = result.report
    inner, adjoint, certificate = report.inner, report.adjoint, report.certificate
    dtype = result.value.dtype
    nothing, none = jnp.full((), jnp.nan, dtype), jnp.zeros((), jnp.int32)
    solves = [solve for solve in (adjoint, inner.correction) if solve is not None]
    products = [solve.products for solve in solves]
    if certificate is not None:
        products.append(certificate.products)
    statuses = [inner.status, *(solve.status for solve in solves)]
    if report.dropped is not None:  # the gradient is right without them
        statuses = [jnp.where(report.dropped, 0, status) for status in statuses]
    return BilevelHistory(
        value=result.value,
        gradient_norm=gradient_norm.astype(dtype),
        stationarity=stationarity.astype(dtype),
        rtol=jnp.asarray(rtol, dtype),
        inner_iterations=_total([inner.iterations]),
        inner_residual=jnp.max(inner.residual).astype(dtype),
        adjoint_iterations=none if adjoint is None else _total([adjoint.iterations]),
        adjoint_residual=nothing if adjoint is None else jnp.max(adjoint.residual).astype(dtype),
        products=_total(products) if products else none,
        certificate=nothing if certificate is None else certificate.absolute.astype(dtype),
        status=jnp.max(jnp.stack([jnp.max(status) for status in statuses])),
    )


def failed(entry: BilevelHistory, ok: jax.Array) -> BilevelHistory:
    """Return an entry that says of numbers which are not finite that they are not."""
    nonfinite = jnp.asarray(int(Status.NONFINITE), jnp.int32)
    return entry._replace(status=jnp.where(ok, entry.status, jnp.maximum(entry.status, nonfinite)))


def _total(counts: list[jax.Array]) -> jax.Array:
    """Return the sum of counts, of all tasks; -1 if one of them is unknown."""
    flat = jnp.concatenate([jnp.ravel(count) for count in counts])
    return jnp.where(jnp.all(flat >= 0), jnp.sum(flat), -1).astype(jnp.int32)
