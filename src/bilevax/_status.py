"""Status codes: how a solve ended, and what to do about it."""

import enum
from typing import Any

import jax
import jax.numpy as jnp


class Status(enum.IntEnum):
    """How a solve ended.

    Reports hold the code as an integer array, one entry per batch lane under `jax.vmap`;
    `Status(int(code))` gives the name and `.remedy` says what to do.

    Example:
      >>> Status(2).name, Status.MAXITER.remedy
      ('MAXITER', 'raise `maxiter`, loosen `rtol`, choose a faster solver, or see what \
`check_problem` finds')
    """

    CONVERGED = 0
    """The tolerance was met."""
    TRUNCATED = 1
    """The number of steps asked for was taken; no tolerance was set."""
    MAXITER = 2
    """The tolerance was not met within `maxiter` iterations."""
    STALLED = 3
    """The solver could not improve its iterate any further in this precision."""
    DIVERGED = 4
    """The residual grew beyond any use."""
    NONFINITE = 5
    """An infinity or a NaN turned up."""
    BREAKDOWN = 6
    """The linear system is singular, or too close to it for this solver."""
    INDEFINITE = 7
    """A direction of negative curvature in a system declared positive definite."""

    @property
    def remedy(self) -> str:
        """What a user can do about it."""
        return _REMEDIES[self]


_REMEDIES = {
    Status.CONVERGED: "nothing to do",
    Status.TRUNCATED: "nothing to do; set a tolerance to stop by accuracy",
    Status.MAXITER: (
        "raise `maxiter`, loosen `rtol`, choose a faster solver, or see what `check_problem` finds"
    ),
    Status.STALLED: (
        "loosen `rtol` and `atol`, use float64, or see whether `check_problem` finds kinks"
    ),
    Status.DIVERGED: "lower the learning rate or step size, or damp the iteration",
    Status.NONFINITE: (
        "look for overflow, log(0) or 0/0 in the functions and in the start, or lower the step size"
    ),
    Status.BREAKDOWN: "regularise the inner problem or set `damping` on the linear solver",
    Status.INDEFINITE: "start nearer to a minimum, or declare `structure=Structure.SYMMETRIC`",
}


def is_failure(status: jax.Array) -> jax.Array:
    """Tell whether what a solve returned is of no use (an exhausted budget is not a failure)."""
    return jnp.asarray(status) >= Status.DIVERGED


def is_unsolved(status: Any) -> jax.Array:
    """Tell whether a solve ended neither by its tolerance nor by the step count asked for."""
    return jnp.asarray(status) >= Status.MAXITER


def code(status: Status) -> jax.Array:
    """Return a status as the integer array that reports hold."""
    return jnp.asarray(int(status), jnp.int32)


def out_of_steps(rtol: Any, atol: Any) -> jax.Array:
    """Return how a solver ends after its last step: TRUNCATED if both tolerances are zero.

    A tolerance of None stands for a default one.
    """
    if rtol is None or atol is None:
        return code(Status.MAXITER)
    has_tolerance = (jnp.asarray(rtol) > 0) | (jnp.asarray(atol) > 0)
    return jnp.where(has_tolerance, code(Status.MAXITER), code(Status.TRUNCATED))
