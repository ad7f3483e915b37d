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
from bilevax import _mesh as mesh
from bilevax import _trees as trees
from bilevax._estimator import Estimate, estimate
from bilevax._failure import OnFailure
from bilevax._problems import Problem
from bilevax._results import LinearReport, SolveReport
from bilevax._status import Status, code, is_failure
from bilevax.certificates._certificate import (
    CERTIFICATE_SHARE,
    Certificate,
    Reference,
    certificate_settings,
    certify,
)
from bilevax.linear import default_rtol
from bilevax.rules import Rule, Settings
from bilevax.solvers import Iterate, Solver

PyTree = Any

# The error that a round aims at, over the one allowed.
_AIM = 0.6
# Tolerance of the rule's linear solves, at first, over the relative error that is expected of a
# round. A residual can hide an error of the hypergradient that is many times as large, relatively.
_LINEAR_SHARE = 0.1
# The part of the error allowed that the adjoint may take.
_ADJOINT_SHARE = 0.3
# A round of inner steps costs at least this part of the certificate before it.
_INNER_SHARE = 0.5
_RUNNING = np.int32(-1)


class Accuracy(abc.ABC):
    """How accurate a hypergradient is asked to be; see `RelativeAccuracy`."""

    first_error: Any = 0.1
    """The relative error at which the first certificate is made, as far as one can guess."""

    @abc.abstractmethod
    def allowed(self, size: jax.Array) -> jax.Array:
        """Return the largest ||Omega - dh/dy|| that is accepted, where `size` is ||dh/dy||."""


@trees.register
@dataclasses.dataclass(frozen=True)
class RelativeAccuracy(Accuracy):
    """Ask for ||Omega - dh/dy|| <= value * ||dh/dy||.

    Near a stationary point of h, where dh/dy vanishes, that cannot be met: see `AbsoluteAccuracy`.
    Nor can a value below eps^(3/4) of the dtype (1.8e-12 in float64, 6.4e-6 in float32).

    Linear solves without a tolerance of their own are made to a residual that follows the value,
    and to a tenth of it in the certificate, which so sees the error of the adjoint. Where F_1 is
    so ill-conditioned that this tells too little, give the rule a tolerance, as in
    `Implicit(CG(rtol=1e-10))`: it holds in all its solves.

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
        """Half the digits that are asked for."""
        return jnp.minimum(0.3 * jnp.sqrt(self.value), 0.1)


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


class _Plan(NamedTuple):
    """What the next round does."""

    target: jax.Array  # of ||F(x, y)||
    least: jax.Array  # iterations in all, before that
    expected: jax.Array  # relative error of the hypergradient
    share: jax.Array  # tolerance of the rule's linear solves, over that error


class _Round(NamedTuple):
    iterate: Iterate
    iterations: jax.Array
    status: jax.Array
    found: Estimate  # with the cost of all rounds
    certificate: Certificate  # with the cost of all rounds
    reference: Reference
    plan: _Plan


def solve_accurately(
    outer: Callable[..., Any],
    problem: Problem,
    solver: Solver,
    rule: Rule,
    accuracy: Accuracy,
    start: Reference,
    y: PyTree,
    scale: jax.Array,
    on_failure: OnFailure,
    *,
    has_aux: bool,
) -> tuple[Estimate, SolveReport, Certificate]:
    """Solve in rounds: inner steps, the hypergradient, its certificate, and a plan of what next.

    The error is proportional to ||F(x, y)||^order, roughly, so a certificate tells where the next
    one is worth its price. Linear solves of a round are as accurate as its error is expected to be:
    the adjoint and the reference are carried on, and get better from round to round.

    Args:
      outer: g.
      problem: the inner problem.
      solver: the inner solver.
      rule: how the derivative is formed.
      accuracy: what is asked for.
      start: x and the adjoint to start from.
      y: the outer variable.
      scale: ||F|| at the cold start; see `_loop.run`.
      on_failure: of the rule's adjoint solve.
      has_aux: whether `outer` returns a pair.

    Returns:
      The last estimate, a report on the inner solve, and the certificate. The status of the report
      is CONVERGED if the accuracy was reached.
    """
    checks.single_numbers(accuracy)
    first = solver.init(problem, start.x, y)
    initial_norm = first.residual
    scale = jnp.maximum(initial_norm, jnp.where(jnp.isfinite(scale), scale, 0))
    tightest = default_rtol(start.x)

    def inspect(x: PyTree, plan: _Plan, near: Reference) -> Any:
        rtol = plan.share * plan.expected
        settings = Settings(jnp.maximum(rtol, tightest) ** (1 / rule.order), on_failure)
        guess = near.adjoint
        found = estimate(outer, problem, rule, x, y, settings, guess=guess, has_aux=has_aux)
        settings = certificate_settings(rtol, x)
        certificate, reference = certify(
            outer, problem, rule, found, y, None, settings, near.x, has_aux=has_aux
        )
        return found, certificate, reference

    def step(state: _Round) -> _Round:
        plan = state.plan

        def reached(iterate: Iterate, iterations: jax.Array) -> jax.Array:
            done = (iterate.residual <= plan.target) & (iterations >= plan.least)
            return done | (iterate.residual <= smallest)

        smallest = loop.smallest_target(solver, problem, state.iterate.x, y, initial_norm)
        iterate, iterations, status = loop.advance(
            solver,
            problem,
            y,
            (solver.toward(state.iterate, scale, plan.target), state.iterations),
            reached,
            initial_norm,
            code(Status.MAXITER),
        )
        found, certificate, reference = inspect(iterate.x, plan, state.reference)

        # ||dh/dy|| at the reference; it may be zero.
        reference_gradient = trees.difference(found.gradient, certificate.error)
        size = trees.scaled_norm(trees.floating(reference_gradient))
        allowed = accuracy.allowed(size)
        needed = allowed / size
        error = certificate.absolute * (1 + certificate.contraction)
        small = (error <= allowed) & (certificate.status == Status.CONVERGED)
        # Linear solves in this precision cannot vouch for less.
        small = small & ~(needed < tightest)
        # Linear solves that are too loose for this accuracy cannot tell, and must be done again.
        is_loose = plan.expected > 1.5 * needed

        # What is to blame: x, so that the solver must run on, if it can; or the linear solves.
        blames_x = certificate.inner * (1 + certificate.contraction) > allowed
        blames_x = blames_x | (certificate.status != Status.CONVERGED)
        runs = blames_x & (status == Status.CONVERGED) & (iterate.residual > smallest)
        blame = certificate.adjoint / (_ADJOINT_SHARE * allowed)
        tighter = jnp.where(blame > 1, jnp.clip(2 * blame, 2, 1e3), jnp.where(runs, 1, 1e3))
        share = plan.share / jnp.where(small, 1, tighter)
        can_tighten = CERTIFICATE_SHARE * plan.share * plan.expected > tightest
        going = runs | ((~small | is_loose) & can_tighten)
        going = going & ~is_failure(status) & jnp.isfinite(error)
        factor = jnp.clip(_AIM * allowed / error, 1e-3**rule.order, 0.5)
        products = found.rule.solve.products + certificate.products
        cost = (_INNER_SHARE * 2 * jnp.maximum(products, 0).astype(float)).astype(jnp.int32)
        following = _Plan(
            target=jnp.where(runs, factor ** (1 / rule.order), 1) * iterate.residual,
            least=jnp.where(runs, iterations + cost, iterations),
            expected=jnp.where(runs, jnp.maximum(factor * certificate.relative, needed), needed),
            share=share,
        )
        ended = jnp.where(status == Status.CONVERGED, code(Status.STALLED), status)
        ended = jnp.where(jnp.isfinite(error) | is_failure(status), ended, code(Status.NONFINITE))
        ended = jnp.where(small, code(Status.CONVERGED), ended)
        total = _total(state.certificate.products, certificate.products)
        return _Round(
            iterate,
            iterations,
            jnp.where(going, _RUNNING, ended),
            _accumulate(state.found, found),
            certificate._replace(products=total),
            reference,
            following,
        )

    # Half the digits at first: what is learnt there about the error saves steps later.
    none = jnp.zeros((), jnp.int32)
    aim = jnp.asarray(accuracy.first_error, initial_norm.dtype)
    plan = _Plan(aim ** (1 / rule.order) * scale, none, aim, jnp.full_like(aim, _LINEAR_SHARE))
    # The start is no reference: NaN is nearer to nothing.
    start = start._replace(x=jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), start.x))
    shapes = jax.eval_shape(inspect, first.x, plan, start)
    found, certificate, _ = jax.tree.map(jnp.zeros_like, shapes)
    begin = _Round(first, none, jnp.asarray(_RUNNING), found, certificate, start, plan)
    end = mesh.while_loop(lambda state: state.status == _RUNNING, step, begin)
    norm, correction = end.iterate.residual, end.found.correction
    inner = SolveReport(end.status, end.iterations, norm, initial_norm, correction)
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
    if before.correction is not None and now.correction is not None:
        now = now._replace(correction=add(before.correction, now.correction))
    return now._replace(rule=rule)
