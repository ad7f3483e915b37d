"""When a run has converged: the projected gradient and its certified error meet the tolerance."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import _mesh as mesh
from bilevax import _trees as trees
from bilevax._status import Status, is_unsolved
from bilevax.hypergradient import Engine
from bilevax.outer._maid import MaidStep
from bilevax.outer._state import Best, BilevelState, Candidate, Milestone, Outcome
from bilevax.outer._step import OuterStep


class Criteria(NamedTuple):
    """When a run ends before all its steps are taken."""

    rtol: Any
    atol: Any
    patience: Any
    min_improvement: Any

    def tolerance(self, state: BilevelState) -> jax.Array:
        """Return what the norm of the projected gradient must come down to."""
        return jnp.maximum(self.rtol * state.first_stationarity, self.atol)


def judge(step: OuterStep | MaidStep, criteria: Criteria, state: BilevelState) -> BilevelState:
    """Return the state with the outcome that the last step brought."""
    index = (state.step - 1) % state.history.value.shape[0]
    last = jax.tree.map(lambda leaf: leaf[index], state.history)
    milestone = state.milestone
    # Not the other way round: the first milestone is infinite.
    least = milestone.value - criteria.min_improvement * jnp.abs(milestone.value)
    is_good = (state.outcome != Outcome.FAILED) & (state.step > 0)
    improved = is_good & ~(last.value >= least)
    milestone = trees.where(improved, Milestone(last.value, state.step - 1), milestone)
    stuck = state.step - 1 - milestone.step >= criteria.patience
    outcome = jnp.where(is_good & stuck, Outcome.PLATEAU, Outcome.RUNNING)

    tolerance = criteria.tolerance(state)
    met = is_good & ~is_unsolved(last.status) & (last.stationarity <= tolerance)
    if _has_certificates(step):
        converged = met & (last.stationarity + last.certificate <= tolerance)
        due = met & ~jnp.isfinite(last.certificate) & (state.step > state.candidate.due)
        outcome = jnp.where(due, Outcome.CANDIDATE, outcome)
    else:
        converged = met
    outcome = jnp.where(converged, Outcome.CONVERGED, outcome)
    outcome = jnp.where(state.outcome == Outcome.FAILED, Outcome.FAILED, outcome)
    return state._replace(milestone=milestone, outcome=outcome.astype(jnp.int32))


def remember(before: BilevelState, after: BilevelState) -> BilevelState:
    """Return a state that knows the point of its last step, where a run may end."""
    was_running = before.outcome == Outcome.RUNNING
    # Values of inexact solutions may be too small: a point that converged is better than those.
    converged = (after.outcome == Outcome.CONVERGED) & was_running
    stepped = was_running & (after.outcome != Outcome.FAILED)
    point = trees.where(stepped, before.y, after.candidate.y)
    return after._replace(
        best=trees.where(converged, _reached(after, before.y), after.best),
        candidate=after.candidate._replace(y=point),
    )


def verified(
    step: OuterStep | MaidStep, criteria: Criteria, state: BilevelState, batched: bool
) -> BilevelState:
    """Certify the candidates among the runs: each has converged, or runs on.

    The engine solves as accurately as it does by itself, whatever the schedule asks of its steps.
    The second certificate is due after one more step, the third after two, then four, and so on.
    """
    if not np.any(np.asarray(state.outcome) == Outcome.CANDIDATE):
        return state
    return _verify(step, criteria, state, batched=batched)


@functools.partial(jax.jit, static_argnames="batched")
def _verify(
    step: OuterStep | MaidStep, criteria: Criteria, state: BilevelState, batched: bool
) -> BilevelState:

    def one(state: BilevelState) -> BilevelState:
        engine, candidate = step.engine, state.candidate
        assert isinstance(engine, Engine)
        result = engine.certify(candidate.y, state.warm)
        certificate = result.report.certificate
        assert certificate is not None
        error = certificate.absolute * (1 + certificate.contraction)
        stationarity = step.stationarity(candidate.y, result.gradient)
        converged = (stationarity + error <= criteria.tolerance(state)) & (
            certificate.status == Status.CONVERGED
        )
        wait = jnp.left_shift(1, jnp.minimum(candidate.refused, 20)) - 1
        refused = Candidate(candidate.y, state.step + wait, candidate.refused + 1)
        outcome = jnp.where(converged, Outcome.CONVERGED, Outcome.RUNNING).astype(jnp.int32)
        judged = state._replace(
            outcome=outcome,
            best=trees.where(converged, _reached(state, candidate.y), state.best),
            candidate=trees.where(converged, candidate, refused),
        )
        return trees.where(state.outcome == Outcome.CANDIDATE, judged, state)

    return (mesh.vmap(one) if batched else one)(state)


def _reached(state: BilevelState, y: Any) -> Best:
    """Return the point that the last step has evaluated."""
    value = state.history.value[(state.step - 1) % state.history.value.shape[0]]
    return Best(value, y, state.warm.x, state.step - 1)


def _has_certificates(step: OuterStep | MaidStep) -> bool:
    return isinstance(step.engine, Engine) and step.engine.has_certificates
