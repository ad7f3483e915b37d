"""Inexactness schedules: how accurately each outer step solves."""

import abc
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._iterative import IterativeRule
from bilevax._status import Status
from bilevax.certificates import Certificate
from bilevax.hypergradient import Engine, require_certificates
from bilevax.linear import default_rtol
from bilevax.outer._state import BilevelHistory
from bilevax.rules import Settings, resolve_linear_solver

PyTree = Any

# The error that a tolerance aims at, over the one allowed.
_AIM = 0.5
# The loosest tolerance: an inner solve that starts cold must at least do something.
_LOOSEST = 0.3
# How much a single certificate may change the tolerance.
_LARGEST_CHANGE = 1e4
# What becomes of the tolerance where a certificate tells nothing.
_CAUTION = 0.1


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

    def accepts(self, entry: BilevelHistory, certificate: Certificate | None) -> Any:
        """Tell whether y moves by this hypergradient; if not, the step has improved x and v only.

        Args:
          entry: what the history says of the step.
          certificate: see `update`.
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
          certificate: of the hypergradient, where the schedule asks for some; NaN in other steps.
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
        _check_positive(self)
        if isinstance(self.factor, int | float) and self.factor >= 1:
            raise ValueError(f"`factor` must be below 1, got {self.factor!r}.")

    def effort(self, state: PyTree, step: jax.Array, x: PyTree) -> Effort:
        return Effort(_at_least(self.smallest, self.first * jnp.asarray(self.factor) ** step, x))


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
        _check_positive(self)

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


class _Tolerances(NamedTuple):
    x: jax.Array
    adjoint: jax.Array


class _Memory(NamedTuple):
    judged: _Tolerances  # what the last certificate asks for, where
    size: jax.Array  # the gradient has this norm
    now: _Tolerances  # what the change of the norm since then makes of that
    due: jax.Array  # the number of the step that is certified next
    interval: jax.Array  # how many steps a good certificate is good for


@trees.register
@dataclasses.dataclass(frozen=True)
class Adaptive(Schedule):
    """A tolerance that keeps the error of the hypergradient a fixed fraction of its norm.

        || Omega - dh/dy || <= fraction * || y - P(y - Omega) ||

    Without a projection P, the right-hand side is fraction * || Omega ||.

    The first hypergradient gets a certificate, and further ones follow after 2, 4, 8, ... steps, up
    to `every`. The part of the error that x causes is proportional to rtol^order (`Rule.order`),
    and that of the adjoint to the tolerance of its solve. So a certificate tells the two tolerances
    at which the parts are equal and the fraction is kept; in between, both follow the right-hand
    side. A linear solver with a tolerance of its own keeps it.

    Where a certificate finds more error than allowed, y stays, unless this precision allows no
    tighter tolerance. The next step gets a certificate again, and so does one after half as many
    steps as lay between the last two.

    Args:
      fraction: between 0 and 1, without unit. An error of 0.3 turns the gradient by 18 degrees at
        most.
      every: how many steps share a certificate at most; one costs about as much as a hypergradient.
      first: the tolerance of the first step.

    Raises:
      ValueError: if a number is not positive, or `fraction` is 1 or more.
      TypeError: by `make_step`, for an engine without certificates: see `hypergradient_error`.

    Example:
      >>> import bilevax as bx
      >>> bx.Adaptive(fraction=0.1, every=20)
      Adaptive(fraction=0.1, every=20, first=0.1)
    """

    fraction: Any = 0.3
    every: Any = 20
    first: Any = 0.1

    safeguarded = False  # certificates see what a warm start leaves

    def __post_init__(self) -> None:
        _check_positive(self)
        checks.positive("every", self.every, whole=True)
        if isinstance(self.fraction, int | float) and self.fraction >= 1:
            raise ValueError(f"`fraction` must be below 1, got {self.fraction!r}.")

    def check(self, engine: Engine) -> None:
        super().check(engine)
        require_certificates("Adaptive", engine.problem, engine.rule)

    def init(self, dtype: Any) -> _Memory:
        first, none = jnp.asarray(self.first, dtype), jnp.zeros((), jnp.int32)
        both = _Tolerances(first, first)
        return _Memory(both, jnp.ones((), dtype), both, none, none + 1)

    def effort(self, state: _Memory, step: jax.Array, x: PyTree) -> Effort:
        rtol, adjoint_rtol = (jnp.clip(each, default_rtol(x), _LOOSEST) for each in state.now)
        return Effort(rtol, adjoint_rtol, certified=step >= state.due)

    def accepts(self, entry: BilevelHistory, certificate: Certificate | None) -> jax.Array:
        error, allowed, known = self._judged(entry, certificate)
        # Half of the digits that `effort` goes down to.
        can_tighten = entry.rtol > jnp.finfo(entry.rtol.dtype).eps ** 0.375
        return ~(known & (error > allowed) & can_tighten)

    def update(
        self,
        state: _Memory,
        step: jax.Array,
        entry: BilevelHistory,
        certificate: Certificate | None,
        cold_residual: jax.Array,
        order: int,
    ) -> _Memory:
        assert certificate is not None  # made in every step, if only of NaN
        size, dtype = entry.stationarity, entry.stationarity.dtype
        error, allowed, known = self._judged(entry, certificate)

        def asked(part: jax.Array, residual: jax.Array, used: jax.Array, power: int) -> jax.Array:
            """Return the tolerance at which a part is half of the error that is aimed at."""
            # A part goes with the residual that there was, which may be far below the tolerance;
            # later ones may come up to it.
            goal = _AIM / 2 * allowed / (1 + certificate.contraction)
            change = (goal / part).astype(dtype) ** (1 / power)
            change = jnp.clip(change, 1 / _LARGEST_CHANGE, _LARGEST_CHANGE)
            residual = jnp.maximum(residual.astype(dtype), jnp.finfo(dtype).eps)
            return jnp.where(known & ~jnp.isnan(change), residual * change, _CAUTION * used)

        judged = _Tolerances(
            asked(certificate.inner, entry.inner_residual / cold_residual, state.now.x, order),
            asked(certificate.adjoint, entry.adjoint_residual, state.now.adjoint, 1),
        )
        certified = step >= state.due
        good = known & (error <= allowed)
        longer, shorter = jnp.minimum(2 * state.interval, self.every), state.interval // 2
        interval = jnp.where(good, longer, jnp.maximum(shorter, 1)).astype(jnp.int32)
        due = step + jnp.where(good, interval, 1)
        # The gradient moves before its tolerances do, so it may not loosen them by much.
        ratio = jnp.minimum(size / state.size, 2)
        moved = _Tolerances(state.judged.x * ratio ** (1 / order), state.judged.adjoint * ratio)
        return trees.where(
            certified,
            _Memory(judged, size, judged, due.astype(jnp.int32), interval),
            state._replace(now=moved),
        )

    def _judged(
        self, entry: BilevelHistory, certificate: Certificate | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the error, the one allowed, and whether the certificate tells."""
        assert certificate is not None
        size = entry.stationarity
        error = (certificate.absolute * (1 + certificate.contraction)).astype(size.dtype)
        allowed = jnp.asarray(self.fraction, size.dtype) * size
        known = (certificate.status == Status.CONVERGED) & jnp.isfinite(error) & (size > 0)
        return error, allowed, known


def _check_positive(schedule: Schedule) -> None:
    for field in dataclasses.fields(schedule):  # type: ignore[arg-type]
        value = getattr(schedule, field.name)
        if value is not None or field.default is not None:
            checks.positive(field.name, value)


def _at_least(smallest: Any, rtol: jax.Array, x: PyTree) -> jax.Array:
    return jnp.maximum(rtol, default_rtol(x) if smallest is None else smallest)
