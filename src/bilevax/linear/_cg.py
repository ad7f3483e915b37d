"""Conjugate gradients with a verified residual."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax.tree

from bilevax import _mesh as mesh
from bilevax import _trees as trees
from bilevax._operator import LinearOperator
from bilevax._results import LinearReport
from bilevax._status import Status, code, out_of_steps
from bilevax.linear import _base as base
from bilevax.linear._units import rescale

PyTree = Any
# What the next product is for. Below -2 stand the checks after which a status is final, and below
# them, where the tolerance is not met, measurements of the rounding error.
_STEP = np.int32(-1)  # a step
_CHECK = np.int32(-2)  # the true residual of the best iterate; if it is too large, steps follow
_MEASURE = np.int32(-3 - len(Status))


# From how many steps the energy norm of the error is estimated.
_LAST = 4


def _last_check(status: Any) -> Any:
    """Return the phase in which the check before `status` is made, and the status for a phase."""
    return -3 - status


def _measure(status: Any) -> Any:
    """Return the phase that measures rounding before `status`, and the status for a phase."""
    return _MEASURE - status


class _State(NamedTuple):
    x: PyTree
    r: PyTree  # b - A x, by recurrence
    p: PyTree  # what the next product is with: the search direction, or the best iterate
    rz: jax.Array  # <r, M r>, with M in a unit that makes M b as large as b
    best: PyTree  # the iterate of smallest residual
    # In one array each, for a compiler makes a program for every array:
    numbers: jax.Array  # the `_Numbers`
    counts: jax.Array  # the `_Counts`
    # By how much <e, A e> has fallen, with e the error: in all, and by each of the last steps.
    gains: jax.Array | None


class _Counts(NamedTuple):
    phase: jax.Array  # what the next product is for, or the final status
    iterations: jax.Array
    products: jax.Array


class _Numbers(NamedTuple):
    length: jax.Array  # a power of two; the p of the textbook is `length` times p
    size: jax.Array  # <p, M^{-1} p>, by recurrence; of size one
    largest: jax.Array  # max over steps of <p, A p> / <p, M^{-1} p>, at most ||M A||
    norm: jax.Array  # max over steps of <p, A p> / <p, p>, at most ||A||
    best: jax.Array  # ||r||^2 of the best iterate; infinite until there is one
    checked: jax.Array  # ||b - A x||^2 when it was last measured, else infinite
    defect: jax.Array  # ||A (c x) - c A x||^2 when it was measured, else zero


@trees.register
@dataclasses.dataclass(frozen=True)
class CG(base.LinearSolver):
    """Conjugate gradients for a symmetric positive definite system A v = b.

    Stops at ||b - A v|| <= max(rtol ||b||, atol) in the Euclidean norm. Every test is relative, so
    the solver does not change when A or b is rescaled. Before it returns, it spends one product
    on the true residual; where rounding has made the recurrence drift from it, CG restarts from
    the true one. The iterate of smallest residual is returned.

    Args:
      rtol: relative tolerance, without unit. None follows the inner solver's tolerance, or is
        eps^(3/4) of the dtype (1.8e-12 in float64, 6.4e-6 in float32).
      atol: absolute tolerance, in the unit of b.
      maxiter: number of steps at most; None is ten times the dimension, at most 10 000. With
        `rtol=0` and `atol=0` exactly this many steps are meant, and the status is TRUNCATED.
      preconditioner: v -> M v with M symmetric positive definite, near A^{-1}.
      damping: solves with A + damping * I.
      energy_rtol: also goes on until the energy norm of the error, sqrt(<e, A e>), has fallen to
        this part of that of the first iterate, as far as the gains of the last steps tell; None
        for no such test. Residuals hardly feel what A makes small, and no unit of v matters to the
        energy norm. It is an estimate, and never makes a status worse.

    Returned status:
      CONVERGED, also at rounding level (see `LinearReport.rounding`); MAXITER; TRUNCATED;
      INDEFINITE where a direction p has <p, A p> < 0; where <p, A p> vanishes to rounding or a
      restart brings no progress STALLED, if the residual is below sqrt(eps) ||b|| by then, and
      BREAKDOWN else, as on a singular system; NONFINITE.

    Example:
      >>> import jax.numpy as jnp
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: jnp.sum(y * x**2))
      >>> rule = bx.Implicit(bx.CG(rtol=1e-6))
      >>> y, x = jnp.array([1.0, 2.0]), jnp.zeros(2)
      >>> _, report = rule.pullback(problem, x, y, jnp.ones(2))
      >>> bool(jnp.allclose(report.adjoint, 0.5 / y)), int(report.solve.iterations)
      (True, 2)

    Source:
      M. R. Hestenes and E. Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems",
      1952; for the energy norm, Z. Strakos and P. Tichy, "On Error Estimation in the Conjugate
      Gradient Method and Why It Works in Finite Precision Computations", 2002.
    """

    rtol: Any = None
    atol: Any = 0.0
    maxiter: Any = None
    _: dataclasses.KW_ONLY
    preconditioner: Callable[[PyTree], PyTree] | None = None
    damping: Any = None
    energy_rtol: Any = None

    def __post_init__(self) -> None:
        base.check_numbers(self)

    def with_steps(self, steps: Any) -> base.LinearSolver:
        return dataclasses.replace(self, rtol=0.0, atol=0.0, maxiter=steps, energy_rtol=None)

    def reducing(self, part: Any, residual: Any) -> base.LinearSolver:
        rtol = part if self.rtol is None else self.rtol
        return dataclasses.replace(self, rtol=rtol, energy_rtol=part)

    def solve(
        self,
        operator: LinearOperator,
        rhs: PyTree,
        *,
        guess: PyTree | None,
        prepared: PyTree,
        transposed: bool,
    ) -> tuple[PyTree, LinearReport]:
        # A is symmetric, and so is M. Its unit does not matter, so squares are kept in range.
        apply_raw = base.preconditioner_of(self, rhs, transposed=False)
        unit = jnp.ones((), trees.dtype(rhs))
        if self.preconditioner is not None:
            size, rhs_norm = trees.norm(apply_raw(rhs)), trees.norm(rhs)
            known = jnp.isfinite(size) & (size > 0)  # and then b is not zero
            unit = trees.where(known, size / trees.where(known, rhs_norm, unit), unit)

        def apply_preconditioner(r: PyTree) -> PyTree:
            return r if self.preconditioner is None else rescale(apply_raw(r), unit)

        maxiter = base.default_maxiter(rhs) if self.maxiter is None else self.maxiter
        maxiter = jnp.asarray(maxiter, jnp.int32)
        target = base.tolerance(operator, rhs, self.rtol, self.atol) ** 2
        smallest = base.tolerance(operator, rhs, None, 0.0) ** 2
        rhs_square = trees.inner(rhs, rhs)
        exhausted = out_of_steps(self.rtol, self.atol)
        none, one = jnp.zeros_like(rhs_square), jnp.ones_like(rhs_square)
        infinity = jnp.full_like(rhs_square, jnp.inf)
        zero = optax.tree.zeros_like(rhs)

        def step(state: _State) -> _State:
            # One product a pass, so that the operator is compiled once: with a direction to take a
            # step, or with the best iterate to measure its residual. Where steps follow a check, x
            # is that iterate, for a check is due as soon as its residual is below the tolerance.
            last, counts = _Numbers(*state.numbers), _Counts(*state.counts)
            check, measured = counts.phase != _STEP, counts.phase <= _MEASURE
            image = operator.matvec(state.p)
            curvature = trees.inner(state.p, image)
            alpha = trees.where(check, none, state.rz / last.length / curvature)
            x = trees.add_scaled(state.x, alpha, state.p)
            r = trees.where(check, rhs, state.r)
            # A measurement follows a check of the same iterate, of which A x = b - r.
            stretched = jax.tree.map(lambda b, r: base.STRETCH * (b - r), rhs, state.r)
            r = trees.where(measured, stretched, r)
            r = trees.add_scaled(r, -trees.where(check, jnp.ones_like(alpha), alpha), image)
            square, best = trees.inner(r, r), state.best
            if guess is not None:
                # A guess that is no better than zero is no iterate: begin again from zero.
                useless = ~(square <= base.no_better(operator) ** 2 * rhs_square)
                worse = (counts.products == 0) & useless
                x, r, best = trees.where(worse, (zero, rhs, zero), (x, r, best))
                square = trees.where(worse, infinity, square)
            z = apply_preconditioner(r)
            rz = trees.inner(r, z)
            beta = trees.where(check, none, rz / state.rz)

            rounding = operator.rounding * last.largest * last.size
            good = ~check & (curvature > 0.5 * rounding) & jnp.isfinite(square) & (rz >= 0)
            better = good & (square < last.best)
            checked = check & ~measured
            best = trees.where(better, x, best)
            iterations = counts.iterations + good.astype(jnp.int32)
            largest = quotient = curvature / last.size
            if self.preconditioner is not None:
                quotient = curvature / trees.inner(state.p, state.p)
            # z and the last p are orthogonal where <., M^{-1} .> is the inner product.
            length, size = _normalise(rz + (beta * last.length) ** 2 * last.size)
            numbers = _Numbers(
                length=length,
                size=size,
                largest=jnp.maximum(last.largest, trees.where(good, largest, none)),
                norm=jnp.maximum(last.norm, trees.where(good, quotient, none)),
                best=trees.where(better | (checked & jnp.isfinite(last.best)), square, last.best),
                checked=trees.where(checked, square, last.checked),
                defect=trees.where(measured, square, last.defect),
            )

            # After a step: carry on, or check the iterate that is to be returned.
            small = jnp.abs(curvature) <= 8 * rounding
            failed = trees.where(small | (rz < 0), code(Status.BREAKDOWN), code(Status.INDEFINITE))
            finite = jnp.isfinite(curvature) & (jnp.isfinite(square + rz) | small)
            failed = trees.where(finite, failed, code(Status.NONFINITE))
            near, gains = square <= target, state.gains
            if gains is not None:
                gain = trees.where(good, alpha * state.rz / last.length, none)
                gains = jnp.concatenate([jnp.stack([gains[0] + gain, gain]), gains[1:-1]])
                part = jnp.asarray(self.energy_rtol, gain.dtype)
                settled = jnp.sum(gains[1:]) <= part**2 * gains[0]
                near = near & (settled | (square <= smallest))
            after_step = trees.where(near, _CHECK, _STEP)
            after_step = trees.where(iterations < maxiter, after_step, _last_check(exhausted))
            after_step = trees.where(good, after_step, _last_check(failed))

            # After a check: done, or restart from the true residual; a second restart without
            # progress is the end of what this precision allows.
            stuck = square > 0.25 * last.checked
            after_check = trees.where(stuck, code(Status.BREAKDOWN), _STEP)
            is_last = counts.phase < _CHECK
            after_check = trees.where(is_last, _last_check(counts.phase), after_check)
            unmet = (after_check == Status.BREAKDOWN) & jnp.isfinite(numbers.best)
            after_check = trees.where(unmet, _measure(after_check), after_check)
            after_check = trees.where(square <= target, code(Status.CONVERGED), after_check)
            phase = trees.where(check, after_check, after_step)
            phase = trees.where(measured, _measure(counts.phase), phase)
            # Not by beta = 0 alone, for after a check of a bad guess p may be infinite.
            direction = trees.where(check, z, trees.add_scaled(z, beta * last.length, state.p))
            direction = rescale(direction, numbers.length)
            factor = trees.where(phase <= _MEASURE, base.STRETCH * one, one)
            iterate = trees.scale(factor, best)
            return _State(
                x=x,
                r=r,
                p=trees.where(phase <= _CHECK, iterate, direction),
                rz=rz,
                best=best,
                numbers=jnp.stack(numbers),
                counts=jnp.stack(_Counts(phase, iterations, counts.products + 1)),
                gains=gains,
            )

        z = apply_preconditioner(rhs)
        rz = trees.inner(rhs, z)
        if guess is None:
            # Zero needs no case of its own: its first step fails, and the check finds it solved.
            first, first_square, p = zero, infinity, z
            phase = jnp.where(maxiter > 0, _STEP, exhausted)
        else:  # the first product measures the guess, whatever `maxiter` is
            first, first_square = trees.where(rhs_square > 0, guess, zero), rhs_square
            p, phase = first, jnp.where(maxiter > 0, _CHECK, _last_check(exhausted))
        length, size = _normalise(rz)
        if guess is None:
            p = rescale(p, length)
        zero_count = jnp.zeros((), jnp.int32)
        start = _State(
            x=first,
            r=rhs,
            p=p,
            rz=rz,
            best=first,
            numbers=jnp.stack(_Numbers(length, size, none, none, first_square, infinity, none)),
            counts=jnp.stack(_Counts(phase, zero_count, zero_count)),
            gains=None if self.energy_rtol is None else jnp.stack([none] * (1 + _LAST)),
        )
        end = mesh.while_loop(lambda state: _Counts(*state.counts).phase < 0, step, start)
        phase, iterations, products = _Counts(*end.counts)

        # Never a zero in place of a solution: without any iterate the result is NaN.
        numbers = _Numbers(*end.numbers)
        square = numbers.best
        empty = jnp.isinf(square) & (rhs_square > 0)
        solution = jax.tree.map(lambda leaf: jnp.where(empty, jnp.nan, leaf), end.best)
        relative = trees.where(empty, rhs_square, square)
        relative = relative / jnp.where(rhs_square > 0, rhs_square, 1)
        residual = jnp.where(rhs_square > 0, jnp.sqrt(relative), 0)
        rhs_norm, size = jnp.sqrt(rhs_square), numbers.norm * trees.norm(end.best)
        rounding = base.rounding_level(operator, jnp.sqrt(numbers.defect), size, rhs_norm)
        ended = base.end_of_progress(operator, residual)
        status = jnp.where(phase == Status.BREAKDOWN, ended, phase)
        done = (phase == Status.BREAKDOWN) | (phase == Status.MAXITER)
        done = (done & (residual <= rounding)) | (rhs_square == 0)
        status = jnp.where(done, code(Status.CONVERGED), status)
        return solution, LinearReport(status, iterations, products, residual, rounding)


def _normalise(square: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return a power of two near the root of a number, and the number divided by its square."""
    known = jnp.isfinite(square) & (square > 0)
    exponent = jnp.frexp(trees.where(known, square, jnp.ones_like(square)))[1]
    length = jnp.ldexp(jnp.ones_like(square), exponent // 2)
    return length, square / length / length
