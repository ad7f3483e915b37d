"""The truncated Neumann series."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax.tree

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._operator import LinearOperator
from bilevax._results import LinearReport
from bilevax._status import Status, code
from bilevax.linear import _base as base

PyTree = Any


@trees.register
@dataclasses.dataclass(frozen=True)
class Neumann(base.LinearSolver):
    """A fixed number of terms of the Neumann series for A v = b.

        v = step_size * sum over k < steps of (I - step_size * A)^k b

    On a fixed point x = T(x, y), where A = I - T_1, the plain series (`step_size=None`) is the
    recursion v <- T_1^T v + g_1 of AID-FP. It converges where the spectral radius of
    I - step_size * A is below 1, and needs no structure of A. One product per term, the last for
    the residual.

    Args:
      steps: number of terms.
      step_size: scale of A in the series, in the unit of 1 / A; None is 1. For a Hessian with
        largest eigenvalue L, any value below 2 / L converges and 1 / L is the usual choice.
      damping: sums the series of A + damping * I.

    Returned status:
      TRUNCATED; DIVERGED where the residual ends above that of the zero vector; NONFINITE.

    Example:
      >>> import bilevax as bx
      >>> problem = bx.fixed_point(lambda x, y: 0.5 * x + y)
      >>> gradient, _ = bx.Implicit(bx.Neumann(steps=3)).pullback(problem, 2.0, 1.0, 1.0)
      >>> float(gradient)  # 1 + 1/2 + 1/4
      1.75

    Source:
      R. Grazzi, L. Franceschi, M. Pontil, S. Salzo, "On the Iteration Complexity of Hypergradient
      Computation", 2020.
    """

    steps: Any
    _: dataclasses.KW_ONLY
    step_size: Any = None
    damping: Any = None

    def __post_init__(self) -> None:
        base.check_numbers(self)
        checks.positive("steps", self.steps, whole=True)
        if self.step_size is not None:
            checks.positive("step_size", self.step_size)

    def without_limits(self) -> None:
        return None

    def solve(
        self,
        operator: LinearOperator,
        rhs: PyTree,
        *,
        guess: PyTree | None,
        prepared: PyTree,
        transposed: bool,
    ) -> tuple[PyTree, LinearReport]:
        # The residual after k terms is r_k = (I - step_size * A)^k b, and the next term is
        # step_size * r_k. A guess only changes the first residual; a truncated series is defined
        # by its terms alone, so guesses are not used.
        def step(_: Any, state: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            v, r = state
            if self.step_size is None and operator.complement is not None:
                return optax.tree.add(v, r), operator.complement(r)
            step_size = jnp.asarray(1 if self.step_size is None else self.step_size)
            v = trees.add_scaled(v, step_size, r)
            return v, trees.add_scaled(r, -step_size, operator.matvec(r))

        v, r = jax.lax.fori_loop(0, self.steps, step, (optax.tree.zeros_like(rhs), rhs))
        size, residual = trees.norm(rhs), trees.norm(r)
        relative = residual / jnp.where(size > 0, size, 1)
        status = jnp.where(relative < 1, code(Status.TRUNCATED), code(Status.DIVERGED))
        status = jnp.where(jnp.isfinite(residual), status, code(Status.NONFINITE))
        steps = jnp.asarray(self.steps, jnp.int32)
        return v, LinearReport(status, steps, steps, relative)
