"""The diagonal of F_1, exactly or by probes."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax import _mesh as mesh
from bilevax import _trees as trees
from bilevax._closures import as_partial
from bilevax._problems import Problem

PyTree = Any


class Diagonal(abc.ABC):
    """Base class of ways to the diagonal of F_1(x, y)."""

    @abc.abstractmethod
    def evaluate(self, problem: Problem, x: PyTree, y: PyTree) -> PyTree:
        """Return diag F_1(x, y) as a pytree like x."""


@trees.register
@dataclasses.dataclass(frozen=True)
class ExactDiagonal(Diagonal):
    """The exact diagonal of F_1, by dim(x) Jacobian-vector products.

    Takes O(dim(x)) products and O(batch_size * dim(x)) memory.

    Args:
      batch_size: products that run at once (static).

    Example:
      >>> import bilevax as bx
      >>> step = bx.JacobiStep(bx.ExactDiagonal(batch_size=32))
    """

    _: dataclasses.KW_ONLY
    batch_size: int = dataclasses.field(default=256, metadata={"static": True})

    def __post_init__(self) -> None:
        checks.positive("batch_size", self.batch_size, whole=True)

    def evaluate(self, problem: Problem, x: PyTree, y: PyTree) -> PyTree:
        flat, unravel = trees.ravel(x)
        if flat.size == 0:
            return x
        _, jacobian = problem.linearize(x, y)

        def entry(index: jax.Array) -> jax.Array:
            unit = jnp.zeros_like(flat).at[index].set(1)
            return trees.ravel(jacobian.matvec(unravel(unit)))[0][index]

        batch_size = min(self.batch_size, flat.size)
        return unravel(jax.lax.map(entry, jnp.arange(flat.size), batch_size=batch_size))


@trees.register
@dataclasses.dataclass(frozen=True)
class HutchinsonDiagonal(Diagonal):
    """An unbiased estimate of the diagonal of F_1 from random signs.

        diag F_1 ~ mean over probes s of s * (F_1 s),   s in {-1, 1}^dim(x)

    The variance of entry i is the sum over j != i of F_1[i, j]^2, divided by `probes`.

    Args:
      probes: number of probes (static), each one Jacobian-vector product.
      seed: of the signs; the same seed gives the same probes.

    Example:
      >>> import bilevax as bx
      >>> step = bx.JacobiStep(bx.HutchinsonDiagonal(probes=16))

    Source:
      C. Bekas, E. Kokiopoulou, Y. Saad, "An Estimator for the Diagonal of a Matrix", 2007.
    """

    probes: int = dataclasses.field(metadata={"static": True})
    _: dataclasses.KW_ONLY
    seed: Any = 0

    def __post_init__(self) -> None:
        checks.positive("probes", self.probes, whole=True)

    def evaluate(self, problem: Problem, x: PyTree, y: PyTree) -> PyTree:
        flat, unravel = trees.ravel(x)
        _, jacobian = problem.linearize(x, y)
        keys = jax.random.split(jax.random.key(self.seed), self.probes)

        def probe(key: jax.Array) -> jax.Array:
            signs = mesh.vary_like(jax.random.rademacher(key, flat.shape, flat.dtype), flat)
            return signs * trees.ravel(jacobian.matvec(unravel(signs)))[0]

        return unravel(jnp.mean(jax.lax.map(probe, keys), axis=0))


@trees.register
@dataclasses.dataclass(frozen=True)
class UserDiagonal(Diagonal):
    """A diagonal that the user computes: (x, y) -> a pytree like x."""

    function: Partial

    def evaluate(self, problem: Problem, x: PyTree, y: PyTree) -> PyTree:
        diagonal = trees.as_arrays(self.function(x, y))
        checks.same_structure("diagonal", diagonal, x)
        return diagonal


def as_diagonal(value: Any) -> Any:
    """Return a `Diagonal`: the exact one for None, and a user's function wrapped."""
    if value is None:
        return ExactDiagonal()
    if isinstance(value, Diagonal):
        return value
    return UserDiagonal(as_partial("diagonal", value))
