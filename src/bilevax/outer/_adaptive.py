"""The schedule that keeps the error of the hypergradient a fraction of its norm."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._status import Status
from bilevax.certificates import Certificate
from bilevax.hypergradient import Engine, require_certificates
from bilevax.linear import default_rtol
from bilevax.outer._schedules import Effort, Schedule, check_positive
from bilevax.outer._state import BilevelHistory

PyTree = Any

# The error that a tolerance aims at, over the one allowed.
_AIM = 0.5
# The loosest tolerance: an inner solve that starts cold must at least do something.
_LOOSEST = 0.3
# How much a single certificate may change a tolerance.
_LARGEST_CHANGE = 1e4
# How much it may loosen one. That is a risk, for the error may grow unseen until the next one; a
# tolerance that is too tight by more than the second number is loosened by half of the digits.
_LOOSENING, _FAR_TOO_TIGHT = 1.5, 1e3
# What becomes of the tolerance where a certificate tells nothing.
_CAUTION = 0.1


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

    Where a certificate finds more error than allowed, or tells nothing, y stays, unless this
    precision or a solver with limits of its own allows no tighter tolerance. The next step gets a
    certificate again, and so does one after half as many steps as lay between the last two.

    Between certificates the bound is an extrapolation, for the error has also to do with how x and
    the adjoint are reached. On ill-conditioned problems some steps exceed it, so tolerances are
    loosened slowly; a smaller `every` watches more closely.

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
        check_positive(self)
        checks.positive("every", self.every, whole=True)
        if isinstance(self.fraction, int | float) and self.fraction >= 1:
            raise ValueError(f"`fraction` must be below 1, got {self.fraction!r}.")

    def check(self, engine: Engine) -> None:
        super().check(engine)
        require_certificates("Adaptive", engine.problem, engine.rule)

    def init(self, dtype: Any) -> _Memory:
        first = jnp.minimum(jnp.asarray(self.first, dtype), _LOOSEST)
        none = jnp.zeros((), jnp.int32)
        both = _Tolerances(first, first)
        return _Memory(both, jnp.ones((), dtype), both, none, none + 1)

    def effort(self, state: _Memory, step: jax.Array, x: PyTree) -> Effort:
        rtol, adjoint_rtol = (jnp.clip(each, default_rtol(x), _LOOSEST) for each in state.now)
        return Effort(rtol, adjoint_rtol, certified=step >= state.due)

    def accepts(
        self,
        state: _Memory,
        step: jax.Array,
        entry: BilevelHistory,
        certificate: Certificate | None,
    ) -> jax.Array:
        assert certificate is not None
        error, allowed, known = self._judged(entry, certificate)
        bad = (step >= state.due) & ~(known & (error <= allowed)) & (entry.stationarity > 0)
        # Only what has a tolerance to tighten is worth waiting for, down to half of the digits that
        # `effort` goes to. An adjoint solve with limits of its own does not follow.
        adjoint_rtol = jnp.minimum(state.now.adjoint, _LOOSEST)
        follows = ~(entry.adjoint_residual > 2 * adjoint_rtol)
        smallest = jnp.finfo(entry.rtol.dtype).eps ** 0.375
        is_adjoint = certificate.adjoint > certificate.inner
        tightens = jnp.where(is_adjoint, follows & (adjoint_rtol > smallest), entry.rtol > smallest)
        return ~(bad & tightens)

    def update(
        self,
        state: _Memory,
        step: jax.Array,
        entry: BilevelHistory,
        certificate: Certificate | None,
        cold_residual: jax.Array,
        order: int,
    ) -> _Memory:
        assert certificate is not None  # made in every step, if only of infinities
        size, dtype = entry.stationarity, entry.stationarity.dtype
        error, allowed, known = self._judged(entry, certificate)

        def asked(part: jax.Array, residual: jax.Array, used: jax.Array, power: int) -> jax.Array:
            """Return the tolerance at which a part is half of the error that is aimed at."""
            # A part goes with the residual that there was, which may be far below the tolerance;
            # later ones may come up to it.
            goal = _AIM / 2 * allowed / (1 + certificate.contraction**2)
            change = (goal / part).astype(dtype) ** (1 / power)
            change = jnp.clip(change, 1 / _LARGEST_CHANGE, _LARGEST_CHANGE)
            residual = jnp.maximum(residual.astype(dtype), jnp.finfo(dtype).eps)
            excess = residual * change / used
            slowly = jnp.where(excess > _FAR_TOO_TIGHT, jnp.sqrt(excess), _LOOSENING)
            factor = jnp.where(known & ~jnp.isnan(change), jnp.minimum(excess, slowly), _CAUTION)
            return jnp.minimum(factor * used, _LOOSEST)

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
        # The second correction leaves about the square of the contraction.
        error = (certificate.absolute * (1 + certificate.contraction**2)).astype(size.dtype)
        allowed = jnp.asarray(self.fraction, size.dtype) * size
        known = (certificate.status == Status.CONVERGED) & jnp.isfinite(error) & (size > 0)
        return error, allowed, known
