"""Conjugate gradients with a verified residual."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax.tree

from bilevax import _trees as trees
from bilevax._operator import LinearOperator
from bilevax._results import LinearReport
from bilevax._status import Status, code
from bilevax.linear import _base as base

PyTree = Any
_RUNNING = -1


class _State(NamedTuple):
    x: PyTree
    r: PyTree  # b - A x, by recurrence
    p: PyTree  # search direction
    rz: jax.Array  # <r, M r>
    best: PyTree  # the iterate of smallest residual
    best_norm: jax.Array  # infinite until there is an iterate
    verified_norm: jax.Array  # ||b - A x|| when it was last measured
    size: jax.Array  # <p, M^{-1} p>, by recurrence
    largest: jax.Array  # max over steps of <p, A p> / <p, M^{-1} p>, at most ||M A||
    verify: jax.Array  # the next product measures b - A x instead of taking a step
    pending: jax.Array  # the status to report after that, if the tolerance is not met
    status: jax.Array
    iterations: jax.Array
    products: jax.Array


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

    Returned status:
      CONVERGED; MAXITER; TRUNCATED; INDEFINITE where a direction p has <p, A p> < 0; BREAKDOWN
      where <p, A p> vanishes to rounding or the true residual stays above sqrt(eps) ||b|| after
      a restart (a singular system); NONFINITE.

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
      1952.
    """

    rtol: Any = None
    atol: Any = 0.0
    maxiter: Any = None
    _: dataclasses.KW_ONLY
    preconditioner: Callable[[PyTree], PyTree] | None = None
    damping: Any = None

    def __post_init__(self) -> None:
        base.check_numbers(self)

    def solve(
        self,
        operator: LinearOperator,
        rhs: PyTree,
        *,
        guess: PyTree | None,
        prepared: PyTree,
        transposed: bool,
    ) -> tuple[PyTree, LinearReport]:
        apply_preconditioner = base.preconditioner_of(self, rhs, transposed)
        maxiter = base.default_maxiter(rhs) if self.maxiter is None else self.maxiter
        maxiter = jnp.asarray(maxiter, jnp.int32)
        target = base.tolerance(rhs, self.rtol, self.atol)
        rhs_norm = trees.norm(rhs)
        out_of_steps = jnp.where(target > 0, code(Status.MAXITER), code(Status.TRUNCATED))
        infinity = jnp.full_like(rhs_norm, jnp.inf)

        def is_guess(state: _State) -> jax.Array:
            return (state.products == 0) & (guess is not None)

        def step(state: _State) -> _State:
            # One product a pass, so that the operator is compiled once: with p to take a step, or
            # with x to measure the residual.
            image = operator.matvec(trees.where(state.verify, state.x, state.p))
            curvature = trees.inner(state.p, image)
            alpha = state.rz / curvature
            measured = trees.add_scaled(rhs, -1, image)
            r = trees.where(state.verify, measured, trees.add_scaled(state.r, -alpha, image))
            x = trees.where(state.verify, state.x, trees.add_scaled(state.x, alpha, state.p))
            norm = trees.norm(r)

            # An iterate worse than zero is of no use as a start: begin again from zero.
            worse = state.verify & ~(norm <= rhs_norm)
            worse = worse & ((state.pending == _RUNNING) | is_guess(state))
            r, x = trees.where(worse, rhs, r), trees.where(worse, optax.tree.zeros_like(x), x)

            z = apply_preconditioner(r)
            rz = trees.inner(r, z)
            beta = jnp.where(state.verify, 0, rz / state.rz)
            p = trees.add_scaled(z, beta, trees.where(state.verify, z, state.p))

            stepped = ~state.verify
            rounding = trees.epsilon(rhs) * state.largest * state.size
            good = stepped & (curvature > 0.5 * rounding) & jnp.isfinite(norm) & (rz >= 0)
            better = good & (norm < state.best_norm)
            # A verification makes the norm of the iterate true, where there is one to verify.
            verified = state.verify & ~worse & (jnp.isfinite(state.best_norm) | is_guess(state))
            best = trees.where(better | verified, x, state.best)
            best_norm = jnp.where(better | verified, norm, state.best_norm)
            best_norm = jnp.where(worse, infinity, best_norm)
            iterations = state.iterations + good.astype(jnp.int32)

            # After a step: carry on, or verify the iterate that is to be returned.
            small = jnp.abs(curvature) <= 8 * rounding
            failed = jnp.where(small, code(Status.BREAKDOWN), code(Status.INDEFINITE))
            failed = jnp.where(rz < 0, code(Status.BREAKDOWN), failed)
            failed = jnp.where(
                jnp.isfinite(curvature) & (jnp.isfinite(norm + rz) | small),
                failed,
                code(Status.NONFINITE),
            )
            reached = good & (norm <= target)
            pending = jnp.where(iterations >= maxiter, out_of_steps, _RUNNING)
            pending = jnp.where(good | state.verify, pending, failed)
            pending = jnp.where(state.verify, state.pending, pending)
            verify_next = stepped & (reached | (pending != _RUNNING))
            x = trees.where(verify_next & ~reached, best, x)

            # After a verification: done, or restart from the true residual; a second restart
            # without progress is the end of what this precision allows.
            stuck = (norm > 0.5 * state.verified_norm) & (state.verified_norm <= rhs_norm)
            floor = jnp.where(
                norm <= base.attainable(rhs) * rhs_norm,
                code(Status.CONVERGED),
                code(Status.BREAKDOWN),
            )
            ended = jnp.where(
                state.pending != _RUNNING, state.pending, jnp.where(stuck, floor, _RUNNING)
            )
            ended = jnp.where(norm <= target, code(Status.CONVERGED), ended)
            return _State(
                x=x,
                r=r,
                p=p,
                rz=rz,
                best=best,
                best_norm=best_norm,
                verified_norm=jnp.where(state.verify, norm, state.verified_norm),
                size=jnp.where(state.verify, rz, rz + beta**2 * state.size),
                largest=jnp.where(
                    good, jnp.maximum(state.largest, curvature / state.size), state.largest
                ),
                verify=verify_next,
                pending=pending,
                status=jnp.where(state.verify, ended, _RUNNING),
                iterations=iterations,
                products=state.products + 1,
            )

        z = apply_preconditioner(rhs)
        no_steps = jnp.where(maxiter > 0, _RUNNING, out_of_steps)
        at_rest = jnp.where(jnp.isfinite(rhs_norm), no_steps, code(Status.NONFINITE))
        at_rest = jnp.where(rhs_norm > 0, at_rest, code(Status.CONVERGED))
        if guess is not None:  # the first product measures the guess, whatever `maxiter` is
            at_rest = jnp.where(at_rest == no_steps, _RUNNING, at_rest)
        start = _State(
            x=optax.tree.zeros_like(rhs) if guess is None else guess,
            r=rhs,
            p=z,
            rz=trees.inner(rhs, z),
            best=optax.tree.zeros_like(rhs),
            best_norm=infinity,
            verified_norm=infinity,
            size=trees.inner(rhs, z),
            largest=jnp.zeros_like(rhs_norm),
            verify=jnp.asarray(guess is not None),
            pending=no_steps,
            status=at_rest,
            iterations=jnp.zeros((), jnp.int32),
            products=jnp.zeros((), jnp.int32),
        )
        end = jax.lax.while_loop(lambda state: state.status == _RUNNING, step, start)

        # Never a zero in place of a solution: without any iterate the result is NaN.
        empty = jnp.isinf(end.best_norm) & (rhs_norm > 0)
        residual = jnp.where(empty, rhs_norm, end.verified_norm)
        residual = jnp.where(rhs_norm > 0, residual / jnp.where(rhs_norm > 0, rhs_norm, 1), 0)
        solution = jax.tree.map(lambda leaf: jnp.where(empty, jnp.nan, leaf), end.best)
        return solution, LinearReport(end.status, end.iterations, end.products, residual)
