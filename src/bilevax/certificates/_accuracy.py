"""Hypergradients of a requested accuracy: the inner solver runs on until a certificate is good."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import _checks as checks
from bilevax import _loop as loop
from bilevax import _trees as trees
from bilevax._estimator import Estimate, estimate
from bilevax._failure import OnFailure
from bilevax._problems import Problem
from bilevax._results import LinearReport, SolveReport
from bilevax._status import Status, code, is_failure
from bilevax.certificates._certificate import Certificate, Reference, certify
from bilevax.linear import default_rtol
from bilevax.rules import Rule, Settings
from bilevax.solvers import Iterate, Solver

PyTree = Any

# Where the first certificate is made: ||F(x, y)|| over that at the cold start.
_FIRST_TARGET = 0.1
# The error that the next round aims at, over the one allowed.
_AIM = 0.6
# Tolerance of linear solves, over the relative error allowed.
_LINEAR_SHARE = 0.01
_MAX_ROUNDS = 50
_RUNNING = np.int32(-1)


class Accuracy(abc.ABC):
    """How accurate a hypergradient is asked to be; see `RelativeAccuracy`."""

    @abc.abstractmethod
    def allowed(self, size: jax.Array) -> jax.Array:
        """Return the largest ||Omega - dh/dy|| that is accepted, where `size` is ||dh/dy||."""


@trees.register
@dataclasses.dataclass(frozen=True)
class RelativeAccuracy(Accuracy):
    """Ask for ||Omega - dh/dy|| <= value * ||dh/dy||.

    Near a stationary point of h, where dh/dy vanishes, that cannot be met: see `AbsoluteAccuracy`.

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


class _Round(NamedTuple):
    iterate: Iterate
    iterations: jax.Array
    status: jax.Array
    target: jax.Array  # of ||F||, where the next certificate is made
    rtol: jax.Array  # of linear solves
    found: Estimate
    certificate: Certificate
    reference: Reference
    count: jax.Array


def solve_accurately(
    outer: Callable[..., Any],
    problem: Problem,
    solver: Solver,
    rule: Rule,
    accuracy: Accuracy,
    x: PyTree,
    adjoint: PyTree,
    y: PyTree,
    scale: jax.Array,
    on_failure: OnFailure,
    *,
    has_aux: bool,
) -> tuple[Estimate, SolveReport, Certificate]:
    def scalar(x: PyTree, y: PyTree) -> jax.Array:
        return outer(x, y)[0] if has_aux else outer(x, y)

    first = solver.init(problem, x, y)
    initial_norm = first.residual
    tightest = jnp.asarray(default_rtol(x), initial_norm.dtype)

    def inspect(iterate: Iterate, rtol: jax.Array, near: Reference) -> Any:
        settings = Settings(rtol ** (1 / rule.order), on_failure)
        guess = near.adjoint
        found = estimate(outer, problem, rule, iterate.x, y, settings, guess=guess, has_aux=has_aux)
        settings = Settings(rtol, OnFailure.RETURN)
        certificate, reference = certify(scalar, problem, rule, found, y, None, settings, near.x)
        return found, certificate, reference

    def step(state: _Round) -> _Round:
        iterate, iterations, status = loop.advance(
            solver,
            problem,
            y,
            (state.iterate, state.iterations),
            state.target,
            initial_norm,
            code(Status.MAXITER),
        )
        found, certificate, reference = inspect(iterate, state.rtol, state.reference)
        size = trees.norm(trees.floating(found.gradient))
        size = certificate.absolute / certificate.relative
        allowed = accuracy.allowed(size)
        error = certificate.absolute * (1 + certificate.contraction)
        accurate = (error <= allowed) & (certificate.status == Status.CONVERGED)
        # The solver may run on if it came to its target and could go further.
        floor = loop.smallest_target(solver, problem, iterate.x, y, initial_norm)
        at_floor = iterate.residual <= floor
        can_run = (status == Status.CONVERGED) & ~at_floor
        ratio = allowed / error
        shrink = jnp.clip((_AIM * ratio) ** (1 / rule.order), 1e-3, 0.5)
        share = allowed / certificate.adjoint
        tighten = jnp.clip(0.3 * share, 1e-3, 1.0)
        rtol = jnp.maximum(tighten * state.rtol, tightest)
        can_tighten = rtol < 0.5 * state.rtol
        finite = jnp.isfinite(error)
        going = ~accurate & (can_run | can_tighten) & finite & (state.count < _MAX_ROUNDS)
        ended = jnp.where(status == Status.CONVERGED, code(Status.STALLED), status)
        ended = jnp.where(finite | is_failure(status), ended, code(Status.NONFINITE))
        ended = jnp.where(accurate, code(Status.CONVERGED), ended)
        counted = certificate._replace(
            products=_total(state.certificate.products, certificate.products)
        )
        found = _accumulate(state.found, found)
        return _Round(
            iterate,
            iterations,
            jnp.where(going, _RUNNING, ended),
            jnp.maximum(jnp.where(can_run, shrink * iterate.residual, iterate.residual), floor),
            rtol,
            found,
            counted,
            reference,
            state.count + 1,
        )

    share = getattr(accuracy, "value", 0.1)
    rtol = jnp.clip(jnp.asarray(_LINEAR_SHARE * share, initial_norm.dtype), tightest, 1e-2)
    shapes = jax.eval_shape(inspect, first, rtol, Reference(first.x, adjoint))
    found, certificate, reference = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    target = _FIRST_TARGET * jnp.maximum(initial_norm, scale)
    start = _Round(
        first,
        jnp.zeros((), jnp.int32),
        _RUNNING,
        target,
        rtol,
        found,
        certificate,
        Reference(first.x, adjoint),
        jnp.zeros((), jnp.int32),
    )
    end = jax.lax.while_loop(lambda state: state.status == -1, step, start)
    inner = SolveReport(
        end.status, end.iterations, end.iterate.residual, initial_norm, end.found.correction
    )
    return end.found, inner, end.certificate


def _total(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where((a < 0) | (b < 0), -1, a + b)


def _accumulate(before: Estimate, now: Estimate) -> Estimate:
    """Return the estimate of now, with the costs of both in its reports."""

    def add(a: LinearReport, b: LinearReport) -> LinearReport:
        return b._replace(
            iterations=_total(a.iterations, b.iterations), products=_total(a.products, b.products)
        )

    rule = now.rule._replace(solve=add(before.rule.solve, now.rule.solve))
    correction = None if now.correction is None else add(before.correction, now.correction)
    return now._replace(rule=rule, correction=correction)
