"""The truncated Neumann series."""

import dataclasses
from typing import Any, NamedTuple

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


class _State(NamedTuple):
    v: PyTree
    r: PyTree  # b - A v
    norm: jax.Array  # ||r||
    terms: jax.Array


@trees.register
@dataclasses.dataclass(frozen=True)
class Neumann(base.LinearSolver):
    """A fixed number of terms of the Neumann series for A v = b.

        v = step_size * sum over k < steps of (I - step_size * A)^k b

    On a fixed point x = T(x, y), where A = I - T_1, the plain series with step size 1 is the
    recursion v <- T_1^T v + g_1 of AID-FP. The series converges where the spectral radius of
    I - step_size * A is below 1, and needs no structure of A. One product per term but the first;
    so the residual that is reported is that of the sum without its last term, which is larger.

    Args:
      steps: number of terms.
      step_size: scale of A in the series, in the unit of 1 / A. None is 1 on a fixed point, and
        elsewhere 1 / L with L = ||A|| from 20 power iterations: for a Hessian with largest
        eigenvalue L, any value below 2 / L converges.
      damping: sums the series of A + damping * I.

    Returned status:
      TRUNCATED; DIVERGED where the residual ends above that of the zero vector, at the latest when
      it has grown by 1 / eps (`report.contraction` then estimates the spectral radius); NONFINITE.
      `iterations` counts products.

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

    takes_scaling = False  # the series is that of A as it is

    def __post_init__(self) -> None:
        base.check_numbers(self)
        checks.positive("steps", self.steps, whole=True)
        if self.step_size is not None:
            checks.positive("step_size", self.step_size)

    def without_limits(self) -> None:
        return None

    def prepare(self, operator: LinearOperator) -> jax.Array:
        """Return the step size."""
        unit = jnp.ones((), trees.dtype(operator.like))
        if self.step_size is not None:
            return self.step_size * unit
        if operator.complement is not None:
            return unit
        size = _operator_norm(operator)
        return jnp.where(size > 0, 1 / size, unit)

    def with_steps(self, steps: Any) -> base.LinearSolver:
        return dataclasses.replace(self, steps=steps)

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
        # step_size * r_k: the last one costs no product. A guess only changes the first residual; a
        # truncated series is defined by its terms alone, so guesses are not used.
        # v <- v - A v + b without a subtraction where that is at hand, as on a fixed point.
        plain = operator.complement if self.step_size is None else None
        size = trees.norm(rhs)
        largest = size / operator.rounding

        def proceed(state: _State) -> jax.Array:
            return (state.terms < self.steps - 1) & (state.norm <= largest)

        def step(state: _State) -> _State:
            if plain is not None:
                v, r = optax.tree.add(state.v, state.r), plain(state.r)
            else:
                v = trees.add_scaled(state.v, prepared, state.r)
                r = trees.add_scaled(state.r, -prepared, operator.matvec(state.r))
            return _State(v, r, trees.norm(r), state.terms + 1)

        first = _State(optax.tree.zeros_like(rhs), rhs, size, jnp.zeros((), jnp.int32))
        v, r, norm, terms = jax.lax.while_loop(proceed, step, first)
        v = trees.add_scaled(v, prepared, r)
        relative = norm / jnp.where(size > 0, size, 1)
        falls = (relative < 1) | (terms == 0)  # no product, nothing known
        status = jnp.where(falls, code(Status.TRUNCATED), code(Status.DIVERGED))
        status = jnp.where(jnp.isfinite(norm), status, code(Status.NONFINITE))
        is_bounded = self.step_size is None and plain is None
        extra = _norm_products(operator) if is_bounded else 0
        return v, LinearReport(status, terms, terms + extra, relative)


_POWER_ITERATIONS = 20


def _norm_products(operator: LinearOperator) -> int:
    return _POWER_ITERATIONS if operator.structure.is_symmetric else 2 * _POWER_ITERATIONS


def _operator_norm(operator: LinearOperator) -> jax.Array:
    """Return ||A|| from below, by power iterations on A, or on A^T A where A is not symmetric."""
    symmetric = operator.structure.is_symmetric

    def step(_: Any, state: tuple[PyTree, jax.Array]) -> tuple[PyTree, jax.Array]:
        image = operator.matvec(state[0])
        size = trees.norm(image)
        if not symmetric:
            # Squares of A^T A would be out of range where those of A are not.
            image = trees.scale(1 / jnp.where(size > 0, size, 1), image)
            image = operator.transpose.matvec(image)
        length = trees.norm(image)
        return trees.scale(1 / jnp.where(length > 0, length, 1), image), size

    # Any start serves that no symmetry of the problem makes orthogonal to what is looked for.
    start = optax.tree.random_like(jax.random.key(0), operator.like)
    start = trees.scale(1 / trees.norm(start), start)
    return jax.lax.fori_loop(0, _POWER_ITERATIONS, step, (start, trees.norm(start)))[1]
