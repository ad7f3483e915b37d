"""A linear operator: what it does to a vector, and what is known of its structure."""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import jax
import optax.tree

from bilevax import _trees as trees

PyTree = Any


@trees.register
@dataclasses.dataclass(frozen=True)
class Scaling:
    """Positive numbers that make the rows and columns of A comparable: those of R A C.

    Attributes:
      rows: the diagonal of R, a pytree like the image of A.
      columns: the diagonal of C, a pytree like v: the units of its entries.
    """

    rows: PyTree
    columns: PyTree


class Structure(enum.Enum):
    """What is known of the Jacobian F_1. It is declared, never guessed.

    Example:
      >>> import bilevax as bx
      >>> bx.minimum(lambda x, y: y * x**2).structure.name
      'POSITIVE_DEFINITE'
    """

    GENERAL = "general"
    SYMMETRIC = "symmetric"
    POSITIVE_DEFINITE = "positive definite"

    @property
    def is_symmetric(self) -> bool:
        """Whether the operator equals its transpose."""
        return self is not Structure.GENERAL


@dataclasses.dataclass(frozen=True)
class LinearOperator:
    """A square linear map on pytrees, for use inside one trace.

    Attributes:
      matvec: v -> A v.
      structure: what is declared of A.
      like: a pytree of arrays (or shapes) that gives the structure of v.
      complement: v -> v - A v, where that is at hand without a subtraction, as T_1 is for
        A = I - T_1; else None.
      epsilon: relative rounding error of a product; None for that of the least precise leaf of
        `like`.
      preconditioner: v -> what is near A^{-1} v, for solvers that have none themselves; or None.
      scaling: of rows and columns, in which residuals are measured; or None.
    """

    matvec: Callable[[PyTree], PyTree]
    structure: Structure
    like: PyTree
    complement: Callable[[PyTree], PyTree] | None = None
    epsilon: float | None = None
    preconditioner: Callable[[PyTree], PyTree] | None = None
    scaling: Scaling | None = None

    @property
    def rounding(self) -> float:
        """The relative rounding error of a product."""
        return trees.epsilon(self.like) if self.epsilon is None else self.epsilon

    def norm(self, image: PyTree) -> jax.Array:
        """Return the norm of what A returns, in scaled rows; of numbers of any size."""
        if self.scaling is not None:
            image = optax.tree.mul(self.scaling.rows, image)
        return trees.scaled_norm(image)

    @property
    def transpose(self) -> "LinearOperator":
        """The operator v -> A^T v."""
        scaling = self.scaling
        if scaling is not None:
            scaling = Scaling(scaling.columns, scaling.rows)
        if self.structure.is_symmetric:
            return dataclasses.replace(self, scaling=scaling)

        def transposed(function: Callable[[PyTree], PyTree] | None) -> Any:
            if function is None:
                return None
            transpose = jax.linear_transpose(function, self.like)
            return lambda v: transpose(v)[0]

        return dataclasses.replace(
            self,
            matvec=transposed(self.matvec),
            complement=transposed(self.complement),
            preconditioner=transposed(self.preconditioner),
            scaling=scaling,
        )

    def damped(self, damping: Any) -> "LinearOperator":
        """Return the operator A + damping * I."""
        damped = self.with_matvec(lambda v: trees.add_scaled(self.matvec(v), damping, v))
        complement = self.complement
        if complement is None:
            return damped
        return dataclasses.replace(
            damped, complement=lambda v: trees.add_scaled(complement(v), -damping, v)
        )

    def with_matvec(self, matvec: Callable[[PyTree], PyTree]) -> "LinearOperator":
        """Return an operator of the same structure on the same vectors."""
        return dataclasses.replace(self, matvec=matvec, complement=None)
