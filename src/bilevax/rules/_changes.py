"""Changes of variables x = phi(z, y), localised at the current point."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax.tree
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._problems import Problem
from bilevax.rules._diagonals import Diagonal, as_diagonal

PyTree = Any


class Change(abc.ABC):
    """Base class of changes of variables.

    What phi depends on through the current point ("localised") is constant under differentiation;
    its dependence on y is not. phi is a `Partial` whose leaves are what it depends on besides
    (z, y), so that derivatives reach values that the problem closes over.
    """

    @abc.abstractmethod
    def localise(self, problem: Problem, x: PyTree) -> Partial:
        """Return phi: (z, y) -> x, localised at x."""

    @abc.abstractmethod
    def invert(self, problem: Problem, x: PyTree, y: PyTree) -> PyTree:
        """Return z = phi^{-1}(x, y), with phi localised at x."""

    def identity_entries(self, x: PyTree) -> jax.Array:
        """Return how many entries of x the change leaves alone."""
        return jnp.zeros((), jnp.int32)

    def check(self, problem: Problem, x: PyTree, y: PyTree) -> None:
        """Raise if a user's functions do not fit x; costs nothing at run time."""

    def check_values(self, x: PyTree, y: PyTree) -> None:
        """Raise if phi does not invert phi_inverse at x, as far as values are known."""


@trees.register
@dataclasses.dataclass(frozen=True)
class ExpChange(Change):
    """x = sign(x_hat) exp(z), entry by entry, with x_hat the current point.

    Multiplicative updates for quantities of one sign. At x away from x* the estimate is
    g_2 - F_2^T (F_1 + diag(F / x))^{-1} g_1: unbounded as an entry of x goes to zero. Entries of
    x_hat at zero, where the change is singular, keep the identity; reports count them.

    Example:
      >>> import bilevax as bx
      >>> rule = bx.Reparameterized(bx.Implicit(), change=bx.ExpChange())

    Source:
      Z. Ye, G. Peyre, D. Cremers, P. Ablin, "Enhancing Hypergradients Estimation: A Study of
      Preconditioning and Reparameterization", 2024.
    """

    def localise(self, problem: Problem, x: PyTree) -> Partial:
        return Partial(_exponential, jax.tree.map(jnp.sign, x))

    def invert(self, problem: Problem, x: PyTree, y: PyTree) -> PyTree:
        # The inner `where` keeps the derivative of the unused branch finite.
        return jax.tree.map(
            lambda u: jnp.where(u == 0, u, jnp.log(jnp.where(u == 0, 1, jnp.abs(u)))), x
        )

    def identity_entries(self, x: PyTree) -> jax.Array:
        zeros = (jnp.sum(leaf == 0, dtype=jnp.int32) for leaf in jax.tree.leaves(x))
        return sum(zeros, jnp.zeros((), jnp.int32))


def _exponential(signs: PyTree, z: PyTree, y: PyTree) -> PyTree:
    def entries(sign: jax.Array, z: jax.Array) -> jax.Array:
        return jnp.where(sign == 0, z, sign * jnp.exp(jnp.where(sign == 0, 0, z)))

    return jax.tree.map(entries, signs, z)


@trees.register
@dataclasses.dataclass(frozen=True)
class DiagonalChange(Change):
    """x = P(x_hat, y)^{-1} z with P = diag F_1 and x_hat the current point.

    P is constant in x but not in y: dx/dy = P^{-1} dz/dy + d(P^{-1} z)/dy. With one y per entry of
    x and v = F_1^{-1} g_1 that is g_2,k - v^T (F_2,k - P'_k P^{-1} F).

    Args:
      diagonal: `ExactDiagonal(...)` (None), `HutchinsonDiagonal(...)`, or a function
        (x, y) -> pytree like x without zeros.

    Raises:
      TypeError: if `diagonal` is none of these.

    Example:
      >>> import bilevax as bx
      >>> rule = bx.Reparameterized(bx.Implicit(), change=bx.DiagonalChange())

    Source:
      Z. Ye, G. Peyre, D. Cremers, P. Ablin, "Enhancing Hypergradients Estimation: A Study of
      Preconditioning and Reparameterization", 2024.
    """

    diagonal: Diagonal | Callable[[PyTree, PyTree], PyTree] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "diagonal", as_diagonal(self.diagonal))

    def localise(self, problem: Problem, x: PyTree) -> Partial:
        return Partial(_divide_by_diagonal, self.diagonal, problem, x)

    def invert(self, problem: Problem, x: PyTree, y: PyTree) -> PyTree:
        diagonal = self.diagonal.evaluate(problem, x, y)  # type: ignore[union-attr]
        return jax.tree.map(jnp.multiply, diagonal, x)


def _divide_by_diagonal(
    diagonal: Diagonal, problem: Problem, x: PyTree, z: PyTree, y: PyTree
) -> PyTree:
    return jax.tree.map(jnp.divide, z, diagonal.evaluate(problem, x, y))


@trees.register
@dataclasses.dataclass(frozen=True)
class ChangeOfVariables(Change):
    """Any smooth bijection x = phi(z, y), on pytrees.

    Args:
      phi: (z, y) -> x.
      phi_inverse: (x, y) -> z, with phi(phi_inverse(x, y), y) = x. z may have any structure, but
        as many entries as x.

    Raises:
      TypeError: if either is not a function, or phi does not return something like x.
      ValueError: if phi(phi_inverse(x, y), y) is not x, wherever x and y are known numbers. Where
        they are traced, the report says BREAKDOWN instead.

    Example:
      >>> import jax.numpy as jnp
      >>> import bilevax as bx
      >>> change = bx.ChangeOfVariables(lambda z, y: jnp.sinh(z), lambda x, y: jnp.arcsinh(x))
      >>> rule = bx.Reparameterized(bx.Implicit(), change=change)

    Source:
      Z. Ye, G. Peyre, D. Cremers, P. Ablin, "Enhancing Hypergradients Estimation: A Study of
      Preconditioning and Reparameterization", 2024.
    """

    phi: Callable[[PyTree, PyTree], PyTree]
    phi_inverse: Callable[[PyTree, PyTree], PyTree]

    def __post_init__(self) -> None:
        for name in ("phi", "phi_inverse"):
            function = getattr(self, name)
            if not isinstance(function, Partial):
                checks.is_callable(name, function)
                object.__setattr__(self, name, Partial(function))

    def localise(self, problem: Problem, x: PyTree) -> Partial:
        return self.phi  # type: ignore[return-value]

    def invert(self, problem: Problem, x: PyTree, y: PyTree) -> PyTree:
        return self.phi_inverse(x, y)

    def check(self, problem: Problem, x: PyTree, y: PyTree) -> None:
        z = jax.eval_shape(self.phi_inverse, x, y)
        if trees.dimension(z) != trees.dimension(x):
            raise TypeError(
                f"`phi_inverse` must return as many entries as `x` has, {trees.dimension(x)}; "
                f"got {checks.describe(z)}."
            )
        checks.same_structure("phi", jax.eval_shape(self.phi, z, y), x)

    def check_values(self, x: PyTree, y: PyTree) -> None:
        image = self.phi(self.phi_inverse(x, y), y)
        checks.same_structure("phi", image, x)
        mismatch = trees.max_abs(optax.tree.sub(image, x))
        # A mismatch that is not finite is a start outside of the domain of phi_inverse.
        wrong = jnp.isfinite(mismatch) & (mismatch > allowed_mismatch(x))
        try:
            wrong = bool(wrong)
        except jax.errors.TracerBoolConversionError:
            return
        if wrong:
            raise ValueError(
                "`phi(phi_inverse(x, y), y)` must be `x`, but it is off by "
                f"{float(mismatch):.3g}: `phi_inverse` does not invert `phi` there."
            )


def allowed_mismatch(x: PyTree) -> jax.Array:
    """Return how far phi(phi_inverse(x, y), y) may be from x: sqrt(eps) relative to its size."""
    size = trees.max_abs(x)
    return trees.epsilon(x) ** 0.5 * jnp.where(size == 0, 1, size)
