"""How accurate a hypergradient is asked to be."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bilevax import _checks as checks
from bilevax import _trees as trees


class Accuracy(abc.ABC):
    """How accurate a hypergradient is asked to be; see `RelativeAccuracy`."""

    first_error: Any = 0.03
    """The relative error at which corrections begin, as far as one can guess."""

    @abc.abstractmethod
    def allowed(self, size: jax.Array) -> jax.Array:
        """Return the largest ||Omega - dh/dy|| that is accepted, where `size` is ||dh/dy||."""


@trees.register
@dataclasses.dataclass(frozen=True)
class RelativeAccuracy(Accuracy):
    """Ask for ||Omega - dh/dy|| <= value * ||dh/dy||.

    Near a stationary point of h, where dh/dy is a small difference of large terms, all solves are
    made as accurately as it needs. Where it vanishes that cannot be: see `AbsoluteAccuracy`. Nor
    can a value below eps^(3/4) of the dtype (1.8e-12 in float64, 6.4e-6 in float32), or an error
    below the rounding of the terms.

    Tolerances, limits of steps and damping of the rule's linear solver are set aside where the
    result is corrected and judged.

    Args:
      value: a number above 0, without unit.

    Raises:
      ValueError: if `value` is not positive.

    Example:
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: 0.5 * y * x**2 - x)  # x*(y) = 1 / y
      >>> engine = bx.value_and_hypergradient(
      ...     lambda x, y: x**2,  # so dh/dy = -2 / y^3
      ...     problem,
      ...     bx.GradientDescent(0.1),
      ...     accuracy=bx.RelativeAccuracy(1e-2),
      ... )
      >>> result = engine(2.0, bx.cold_start(0.0))
      >>> abs(float(result.gradient) + 0.25) < 1e-2 * 0.25
      True
      >>> bool(result.report.certificate.relative < 1e-2), int(result.report.inner.iterations) < 40
      (True, True)
    """

    value: Any

    def __post_init__(self) -> None:
        checks.positive("value", self.value)

    def allowed(self, size: jax.Array) -> jax.Array:
        return self.value * size

    @property
    def first_error(self) -> Any:  # type: ignore[override]
        """Half the digits that are asked for, and half of one more."""
        return jnp.minimum(0.1 * jnp.sqrt(self.value), 0.03)


@trees.register
@dataclasses.dataclass(frozen=True)
class AbsoluteAccuracy(Accuracy):
    """Ask for ||Omega - dh/dy|| <= value.

    Args:
      value: a number above 0, in the unit of the hypergradient.

    Raises:
      ValueError: if `value` is not positive.

    Example:
      >>> import bilevax as bx
      >>> bx.AbsoluteAccuracy(1e-3)
      AbsoluteAccuracy(value=0.001)
    """

    value: Any

    def __post_init__(self) -> None:
        checks.positive("value", self.value)

    def allowed(self, size: jax.Array) -> jax.Array:
        return jnp.asarray(self.value, size.dtype)
