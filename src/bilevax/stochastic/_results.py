"""What stochastic engines take and return."""

import dataclasses
from typing import Any, NamedTuple

import jax
import optax.tree

from bilevax import _trees as trees
from bilevax.stochastic._sampling import SamplerState

PyTree = Any


class StochasticState(NamedTuple):
    """Where the next call of a stochastic engine starts; made by `engine.init(x0, key)`.

    Attributes:
      x: the inner variable.
      adjoint: v of the adjoint system, a pytree like x.
      sampler: where the sampler of the inner problem stands.
      outer_sampler: where the sampler of the outer objective stands; None without one.
      start: the cold start x0.
    """

    x: PyTree
    adjoint: PyTree
    sampler: SamplerState
    outer_sampler: SamplerState | None
    start: PyTree

    def cold(self) -> "StochasticState":
        """Return a cold start, x0 and zero for the adjoint; the samplers go on from here."""
        cold = trees.copied((self.start, optax.tree.zeros_like(self.start)))
        return self._replace(x=cold[0], adjoint=cold[1])


class StochasticReport(NamedTuple):
    """What a stochastic hypergradient knows of its own quality.

    Residuals are those of one batch: they fall no further than to the noise of a batch.

    Attributes:
      status: a `Status` code, int32. TRUNCATED, for all steps are taken; DIVERGED where ||x|| has
        grown from the cold start by 1 / eps, or the adjoint residual is above 1 / eps; NONFINITE,
        also where steps that are too long have led out of range.
      inner_residual: ||F(x, y; batch)|| before the last inner step; infinite without inner
        steps.
      adjoint_residual: ||F_1(x, y; batch)^T v - g_1|| / ||g_1|| before the last adjoint step;
        infinite without adjoint steps.
      standard_error: of the gradient at this x and v, its norm, as estimated from the scatter of
        the samples in the last averages: those of F_2^T v and, with an outer sampler, of g_2. What
        x and v are off by is not in it, nor what v owes to the scatter of g_1: where y enters by a
        penalty alone, which has no batches, it is zero. Infinite for `samples=1`.
    """

    status: jax.Array
    inner_residual: jax.Array
    adjoint_residual: jax.Array
    standard_error: jax.Array


class StochasticHypergradient(NamedTuple):
    """The result of a stochastic engine.

    Attributes:
      value: g(x, y), a scalar; with an outer sampler the average over `samples` batches.
      gradient: a pytree like y (float0 for integer and key leaves).
      x: the point at which both are evaluated.
      state: the `StochasticState` for a nearby y, warm; cold where the status is a failure.
      report: a `StochasticReport`.
    """

    value: jax.Array
    gradient: PyTree
    x: PyTree
    state: StochasticState
    report: StochasticReport


def anonymous(state: StochasticState) -> StochasticState:
    """Return a state that does not know the values of its data, only shapes.

    For those are a part of its type, and nothing shall be compiled anew for other values.
    """

    def without(sampler: SamplerState | None) -> SamplerState | None:
        if sampler is None:
            return None
        source = dataclasses.replace(sampler.source, fingerprint=None)
        return dataclasses.replace(sampler, source=source)

    return state._replace(
        sampler=without(state.sampler), outer_sampler=without(state.outer_sampler)
    )


def named(state: StochasticState, like: StochasticState) -> StochasticState:
    """Return an anonymous state that belongs to the data to which another one does."""

    def with_source(sampler: SamplerState | None, like: SamplerState | None) -> Any:
        if sampler is None or like is None:
            return None
        return dataclasses.replace(sampler, source=like.source)

    return state._replace(
        sampler=with_source(state.sampler, like.sampler),
        outer_sampler=with_source(state.outer_sampler, like.outer_sampler),
    )
