"""What functions return: named tuples of arrays, one entry per batch lane under `jax.vmap`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any


class LinearReport(NamedTuple):
    """How a linear solve A v = b ended.

    Attributes:
      status: a `Status` code, int32.
      iterations: steps taken, int32; -1 where the underlying library does not say.
      products: products with A, int32; -1 where the underlying library does not say.
      residual: ||b - A v|| / ||b||, measured with one product at the v returned, without unit; for
        `Neumann` at the sum without its last term.

    The property `contraction` is the mean factor by which a step changed the residual.
    """

    status: jax.Array
    iterations: jax.Array
    products: jax.Array
    residual: jax.Array

    @property
    def contraction(self) -> jax.Array:
        """The mean factor by which a step changed the residual.

        For `Neumann` it tends to the spectral radius of I - step_size * A, that of T_1 on a fixed
        point: above 1, the series diverges. NaN where no steps were taken or counted.
        """
        factor = self.residual ** (1 / jnp.maximum(self.iterations, 1))
        return jnp.where(self.iterations > 0, factor, jnp.nan)


class SolveReport(NamedTuple):
    """How an inner solve ended.

    Attributes:
      status: a `Status` code, int32.
      iterations: steps taken, int32.
      residual: ||F(x, y)|| at the solver's last iterate, in the unit of F.
      initial_residual: ||F(x0, y)||.
      correction: the `LinearReport` of the correction that a `Preconditioned` rule applied to
        the last iterate; None for rules without one.
      dropped: under `OnFailure.DROP`, whether this or the correction failed, so that the task is a
        constant: a boolean per task, whose sum counts them. Else None.
    """

    status: jax.Array
    iterations: jax.Array
    residual: jax.Array
    initial_residual: jax.Array
    correction: LinearReport | None = None
    dropped: jax.Array | None = None

    @property
    def contraction(self) -> jax.Array:
        """The mean factor by which a step changed ||F||; 1 where no step was taken."""
        ratio = self.residual / self.initial_residual
        factor = ratio ** (1 / jnp.maximum(self.iterations, 1))
        return jnp.where(self.iterations > 0, factor, 1)  # a start at the solution is 0 / 0


class RuleReport(NamedTuple):
    """What a rule computed on the way to a pullback.

    Attributes:
      solve: the `LinearReport` of the adjoint system.
      adjoint: v with F_1^T v = cotangent, a pytree like x. `Reparameterized` gives it in its own
        variable z.
      identity_entries: entries of x that a change of variables left alone because it is
        singular there, int32; 0 for rules without a change.
    """

    solve: LinearReport
    adjoint: PyTree
    identity_entries: jax.Array
