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


class _LU(NamedTuple):
    factors: jax.Array
    pivots: jax.Array


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
      CONVERGED (relative residual below sqrt(eps)); INDEFINITE where Cholesky fails; BREAKDOWN
      where the matrix is singular; NONFINITE. `iterations` is 1, `products` counts the columns and
      the one product that measures the residual.

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
        if operator.structure is Structure.POSITIVE_DEFINITE:
            return _Cholesky(jax.scipy.linalg.cholesky(matrix, lower=True))
        return _LU(*jax.scipy.linalg.lu_factor(matrix))

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
            v = jax.scipy.linalg.lu_solve(prepared, rhs, trans=1 if transposed else 0)
            failed = jnp.any(jnp.diagonal(prepared.factors) == 0)
        relative, status = base.measure(operator, v, rhs, 0.0, 0.0)
        finite = jnp.isfinite(trees.norm(operator.matvec(rhs)))
        bad = Status.INDEFINITE if isinstance(prepared, _Cholesky) else Status.BREAKDOWN
        status = jnp.where(failed & finite, code(bad), status)
        products = trees.dimension(rhs) + 2
        return v, LinearReport(
            status, jnp.ones((), jnp.int32), jnp.full((), products, jnp.int32), relative
        )


def materialise(operator: LinearOperator, batch_size: int) -> jax.Array:
    """Return the (d, d) matrix of an operator on flat vectors."""
    basis = mesh.vary_like(jnp.eye(operator.like.size, dtype=operator.like.dtype), operator.like)
    return jax.lax.map(operator.matvec, basis, batch_size=min(batch_size, len(basis))).T
