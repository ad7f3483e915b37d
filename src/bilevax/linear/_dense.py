"""A direct solve with the materialised matrix."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg

from bilevax import _checks as checks
from bilevax import _mesh as mesh
from bilevax import _trees as trees
from bilevax._operator import LinearOperator, Structure
from bilevax._results import LinearReport
from bilevax._status import Status, code
from bilevax.linear import _base as base

PyTree = Any


class _Cholesky(NamedTuple):
    lower: jax.Array
    size: jax.Array  # ||A|| from below


class _LU(NamedTuple):
    factors: jax.Array
    pivots: jax.Array
    size: jax.Array


@trees.register
@dataclasses.dataclass(frozen=True)
class Dense(base.LinearSolver):
    """A direct solve: materialise A by batched products, factor it once, solve.

    Cholesky where A is declared positive definite, LU with partial pivoting otherwise. One
    factorisation serves any number of right-hand sides and the transpose. Takes O(d^2) memory
    and O(d^3) time for dim(x) = d: the choice for small inner problems.

    Args:
      batch_size: how many products run at once (static); fewer need less memory.
      damping: factors A + damping * I.

    Returned status:
      CONVERGED where the residual is at rounding level, as is that of every stable solve;
      INDEFINITE where Cholesky fails; BREAKDOWN where the matrix is singular to this precision;
      STALLED; NONFINITE. `iterations` is 1, `products` counts the columns and the three products
      that tell how good the solution is.

    Example:
      >>> import jax.numpy as jnp
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: jnp.sum(y * x**2))
      >>> rule = bx.Implicit(bx.Dense())
      >>> y = jnp.array([1.0, 2.0])
      >>> _, report = rule.pullback(problem, jnp.zeros(2), y, jnp.ones(2))
      >>> bool(jnp.allclose(report.adjoint, 0.5 / y))
      True
    """

    _: dataclasses.KW_ONLY
    batch_size: int = dataclasses.field(default=256, metadata={"static": True})
    damping: Any = None

    def __post_init__(self) -> None:
        base.check_numbers(self)
        checks.positive("batch_size", self.batch_size, whole=True)

    def prepare(self, operator: LinearOperator) -> _Cholesky | _LU:
        matrix = materialise(operator, self.batch_size)
        size = _norm_from_below(matrix)
        if operator.structure is Structure.POSITIVE_DEFINITE:
            return _Cholesky(jax.scipy.linalg.cholesky(matrix, lower=True), size)
        factors, pivots = jax.scipy.linalg.lu_factor(matrix)
        return _LU(factors, pivots, size)

    def solve(
        self,
        operator: LinearOperator,
        rhs: PyTree,
        *,
        guess: PyTree | None,
        prepared: PyTree,
        transposed: bool,
    ) -> tuple[PyTree, LinearReport]:
        if isinstance(prepared, _Cholesky):
            v = jax.scipy.linalg.cho_solve((prepared.lower, True), rhs)
            failed = jnp.any(jnp.isnan(prepared.lower))
        else:
            factors = (prepared.factors, prepared.pivots)
            v = jax.scipy.linalg.lu_solve(factors, rhs, trans=1 if transposed else 0)
            failed = jnp.any(jnp.diagonal(prepared.factors) == 0)
        relative, rounding, status = base.measure(operator, v, rhs, 0.0, 0.0, prepared.size)
        finite = jnp.isfinite(trees.norm(operator.matvec(rhs)))
        bad = Status.INDEFINITE if isinstance(prepared, _Cholesky) else Status.BREAKDOWN
        status = jnp.where(failed & finite, code(bad), status)
        products = jnp.full((), trees.dimension(rhs) + 3, jnp.int32)
        return v, LinearReport(status, jnp.ones((), jnp.int32), products, relative, rounding)


def _norm_from_below(matrix: jax.Array) -> jax.Array:
    """Return the largest norm of a column or a row, which ||A|| is not below."""
    largest = trees.max_abs(matrix)
    squares = jnp.square(matrix / jnp.where(largest > 0, largest, 1))
    square = jnp.maximum(jnp.max(jnp.sum(squares, axis=0)), jnp.max(jnp.sum(squares, axis=1)))
    return largest * jnp.sqrt(square)


def materialise(operator: LinearOperator, batch_size: int) -> jax.Array:
    """Return the (d, d) matrix of an operator on flat vectors."""
    basis = mesh.vary_like(jnp.eye(operator.like.size, dtype=operator.like.dtype), operator.like)
    return jax.lax.map(operator.matvec, basis, batch_size=min(batch_size, len(basis))).T
