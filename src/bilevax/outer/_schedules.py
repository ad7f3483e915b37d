"""Inexactness schedules: how accurately each outer step solves."""

import abc
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._iterative import IterativeRule
from bilevax.certificates import Certificate
from bilevax.hypergradient import Engine
from bilevax.linear import default_rtol
from bilevax.outer._state import BilevelHistory
from bilevax.rules import Settings, resolve_linear_solver

PyTree = Any


class Effort(NamedTuple):
    """How accurately the next hypergradient is made.

    Attributes:
      rtol: the relative tolerance of the inner solver; None leaves the solver as it is.
      adjoint_rtol: that of a linear solver of the adjoint system that has none of its own; None
        follows `rtol`.
      steps: exactly so many inner and adjoint steps in its place; None for a tolerance.
      certified: whether the hypergradient gets a certificate; None for never.
    """

    rtol: Any = None
    adjoint_rtol: Any = None
    steps: Any = None
    certified: Any = None


class Schedule(abc.ABC):
    """Base class of inexactness schedules: frozen pytrees of numbers, pure functions of the step.

    The tolerance of a schedule is that of the inner solver, relative to ||F(x0, y)|| at the cold
    start; linear solves without a tolerance of their own follow it.
    """

    safeguarded: bool = True
    """Whether a step must improve a warm start that meets the tolerance already."""

    def check(self, engine: Engine) -> None:
        """Raise if the schedule does not fit the engine."""
        name = type(self).__name__
        if isinstance(engine.rule, IterativeRule):
            raise TypeError(
                f"`{name}` changes tolerances, and `{type(engine.rule).__name__}` differentiates a "
                "fixed run of the solver; take `schedule=Constant()`."
            )
        if engine.accuracy is not None:
            raise TypeError(
                f"`{name}` and the `accuracy` of the engine both say when the inner solver stops; "
                "take `schedule=Constant()`, or an engine without `accuracy`."
            )

    def init(self, dtype: Any) -> PyTree:
        """Return what the schedule remembers before the first step; by default nothing."""
        return ()

    @abc.abstractmethod
    def effort(self, state: PyTree, step: jax.Array, x: PyTree) -> Effort:
        """Return the effort of the step of that number, counted from 0, for an x like this."""

    def accepts(
        self,
        state: PyTree,
        step: jax.Array,
        entry: BilevelHistory,
        certificate: Certificate | None,
    ) -> Any:
        """Tell whether y moves by this hypergradient; if not, the step has improved x and v only.

        For the arguments see `update`.
        """
        return jnp.ones((), bool)

    def update(
        self,
        state: PyTree,
        step: jax.Array,
        entry: BilevelHistory,
        certificate: Certificate | None,
        cold_residual: jax.Array,
        order: int,
    ) -> PyTree:
        """Return what the schedule remembers after a step.

        Args:
          state: what it remembered before.
          step: the number of the step.
          entry: what the history says of it.
          certificate: of the hypergradient, where the schedule asks for some; infinite in other
            steps.
          cold_residual: ||F(x0, y)||, which tolerances are relative to.
          order: the power of the tolerance to which the error is proportional.
        """
        return state


@trees.register
@dataclasses.dataclass(frozen=True)
class Constant(Schedule):
    """The same tolerance in all steps.

    Args:
      rtol: the relative tolerance; None is the inner solver's own, or the engine's `accuracy`.

    Raises:
      ValueError: for a negative tolerance.

    Example:
      >>> import bilevax as bx
      >>> bx.Constant(1e-4)
      Constant(rtol=0.0001)
    """

    rtol: Any = None

    def __post_init__(self) -> None:
        if self.rtol is not None:
            checks.not_negative("rtol", self.rtol)

    def check(self, engine: Engine) -> None:
        if self.rtol is not None:
            super().check(engine)

    def effort(self, state: PyTree, step: jax.Array, x: PyTree) -> Effort:
        return Effort(self.rtol)


@trees.register
@dataclasses.dataclass(frozen=True)
class Geometric(Schedule):
    """A tolerance that falls by a factor: rtol_s = max(first * factor^s, smallest), s = 0, 1, ...

    Args:
      first: the tolerance of the first step.
      factor: between 0 and 1.
      smallest: where it ends; None is eps^(3/4) of the dtype.

    Raises:
      ValueError: if a number is not positive, or `factor` is 1 or more.

    Example:
      >>> import bilevax as bx
      >>> bx.Geometric(0.1, factor=0.9)
      Geometric(first=0.1, factor=0.9, smallest=None)

    Source:
      F. Pedregosa, "Hyperparameter Optimization with Approximate Gradient", 2016.
    """

    first: Any = 0.1
    factor: Any = 0.9
    smallest: Any = None

    def __post_init__(self) -> None:
        check_positive(self)
        if isinstance(self.factor, int | float) and self.factor >= 1:
            raise ValueError(f"`factor` must be below 1, got {self.factor!r}.")

    def effort(self, state: PyTree, step: jax.Array, x: PyTree) -> Effort:
        return Effort(_at_least(self.smallest, self.first * _power(self.factor, step), x))


@trees.register
@dataclasses.dataclass(frozen=True)
class Harmonic(Schedule):
    """A tolerance that falls by a power: rtol_s = max(first / (s + 1)^power, smallest).

    Errors that can be summed over s, as `power` above 1 gives them, are what convergence of inexact
    hypergradient descent is proved with.

    Args:
      first: the tolerance of the first step, s = 0.
      power: above 0.
      smallest: where it ends; None is eps^(3/4) of the dtype.

    Raises:
      ValueError: if a number is not positive.

    Example:
      >>> import bilevax as bx
      >>> bx.Harmonic(0.1, power=2)
      Harmonic(first=0.1, power=2, smallest=None)

    Source:
      F. Pedregosa, "Hyperparameter Optimization with Approximate Gradient", 2016.
    """

    first: Any = 0.1
    power: Any = 2.0
    smallest: Any = None

    def __post_init__(self) -> None:
        check_positive(self)

    def effort(self, state: PyTree, step: jax.Array, x: PyTree) -> Effort:
        number = (step + 1).astype(jnp.result_type(float))
        return Effort(_at_least(self.smallest, self.first / number**self.power, x))


@trees.register
@dataclasses.dataclass(frozen=True)
class Logarithmic(Schedule):
    """A number of steps that grows slowly: t_s = k_s = ceil(kappa * log(s + 1)), s = 1, 2, ...

    The inner solver takes exactly t_s steps and the adjoint solve k_s, whatever their residuals.
    Steps of `Newton` are counted, not the products inside of them.

    Args:
      kappa: above 0.

    Raises:
      ValueError: if `kappa` is not positive.

    Example:
      >>> import bilevax as bx
      >>> schedule = bx.Logarithmic(5.0)
      >>> [int(schedule.effort((), s, 0.0).steps) for s in (0, 1, 9, 99)]
      [4, 6, 12, 24]

    Source:
      R. Grazzi, M. Pontil, S. Salzo, "Bilevel Optimization with a Lower-level Contraction: Optimal
      Sample Complexity without Warm-start", 2023.
    """

    kappa: Any

    def __post_init__(self) -> None:
        checks.positive("kappa", self.kappa)

    def check(self, engine: Engine) -> None:
        super().check(engine)
        linear_solver = engine.rule.linear_solver  # type: ignore[union-attr]
        resolve_linear_solver(linear_solver, engine.problem, Settings()).with_steps(1)

    def effort(self, state: PyTree, step: jax.Array, x: PyTree) -> Effort:
        number = jnp.asarray(step + 2, jnp.result_type(float))  # steps are counted from 0 here
        return Effort(steps=jnp.ceil(self.kappa * jnp.log(number)).astype(jnp.int32))


def check_positive(schedule: Schedule) -> None:
    """Raise if a number of a schedule is not positive."""
    for field in dataclasses.fields(schedule):  # type: ignore[arg-type]
        value = getattr(schedule, field.name)
        if value is not None or field.default is not None:
            checks.positive(field.name, value)


def _power(base: Any, exponent: jax.Array) -> jax.Array:
    return jnp.asarray(base, jnp.result_type(float)) ** exponent.astype(jnp.result_type(float))


def _at_least(smallest: Any, rtol: jax.Array, x: PyTree) -> jax.Array:
    return jnp.maximum(rtol, default_rtol(x) if smallest is None else smallest)
