"""Conjugate gradients on the normal equations, for systems without structure."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import _trees as trees
from bilevax._operator import LinearOperator
from bilevax._results import LinearReport
from bilevax._status import Status, out_of_steps
from bilevax.linear import _base as base
from bilevax.linear._units import first_iterate, rescale, unit_sized

PyTree = Any


class _State(NamedTuple):
    x: PyTree
    r: PyTree  # b - A x
    s: PyTree  # A^T r
    p: PyTree  # search direction
    sz: jax.Array  # <s, M s>
    size: jax.Array  # <p, M^{-1} p>, by recurrence
    largest: jax.Array  # max over steps of <A p, A p> / <p, M^{-1} p>, at most ||A M A^T||
    iterations: jax.Array


@trees.register
@dataclasses.dataclass(frozen=True)
class NormalCG(base.LinearSolver):
    """Conjugate gradients on A^T A v = A^T b, for any A.

    Minimises ||b - A v|| over growing Krylov spaces, so the residual never rises; the price is the
    square of the condition number and two products a step (one with A, one with A^T).
    On a singular system it tends to the least-squares solution and reports BREAKDOWN.

    Args:
      rtol: relative tolerance on ||b - A v|| / ||b||; None follows the inner solver's tolerance,
        or is eps^(3/4) of the dtype.
      atol: absolute tolerance, in the unit of b.
      maxiter: number of steps at most; None is ten times the dimension, at most 10 000.
      preconditioner: v -> M v with M symmetric positive definite, near (A^T A)^{-1}.
      damping: solves with A + damping * I.

    Returned status:
      CONVERGED; MAXITER; TRUNCATED (both tolerances zero); BREAKDOWN where A^T r vanishes but r
      does not; NONFINITE.

    Example:
      >>> import jax.numpy as jnp
      >>> import bilevax as bx
      >>> problem = bx.root(lambda x, y: jnp.array([[0.0, 2.0], [-1.0, 0.0]]) @ x - y)
      >>> rule = bx.Implicit(bx.NormalCG())
      >>> gradient, _ = rule.pullback(problem, jnp.zeros(2), jnp.ones(2), jnp.ones(2))
      >>> bool(jnp.allclose(gradient, jnp.array([0.5, -1.0])))
      True

    Source:
      C. C. Paige and M. A. Saunders, "LSQR: An Algorithm for Sparse Linear Equations and Sparse
      Least Squares", 1982 (section 7.1, the method CGLS).
    """

    rtol: Any = None
    atol: Any = 0.0
    maxiter: Any = None
    _: dataclasses.KW_ONLY
    preconditioner: Callable[[PyTree], PyTree] | None = None
    damping: Any = None

    def __post_init__(self) -> None:
        base.check_numbers(self)

    def with_default_preconditioner(self, preconditioner: Any) -> base.LinearSolver:
        return self  # what is near A^{-1} is not near (A^T A)^{-1}

    def with_steps(self, steps: Any) -> base.LinearSolver:
        return dataclasses.replace(self, rtol=0.0, atol=0.0, maxiter=steps)

    def solve(
        self,
        operator: LinearOperator,
        rhs: PyTree,
        *,
        guess: PyTree | None,
        prepared: PyTree,
        transposed: bool,
    ) -> tuple[PyTree, LinearReport]:
        # (A^T A)^{-1} is symmetric, so its approximation needs no transpose; for the transposed
        # system it is M of A A^T that would be wanted, and M of A^T A only preconditions less.
        precondition = base.preconditioner_of(self, rhs, transposed=False)
        first, residual, _ = first_iterate(operator, rhs, guess)
        operator, unit = unit_sized(operator, rhs)
        adjoint = operator.transpose
        maxiter = base.default_maxiter(rhs) if self.maxiter is None else self.maxiter
        target = base.tolerance(operator, rhs, self.rtol, self.atol)

        def apply_preconditioner(s: PyTree) -> PyTree:
            if self.preconditioner is None:
                return s
            # The inverse of (A / unit)^T (A / unit), in two factors to stay in the range.
            return trees.scale(unit, trees.scale(unit, precondition(s)))

        def start_from(x: PyTree, r: PyTree) -> _State:
            s = adjoint.matvec(r)
            z = apply_preconditioner(s)
            sz = trees.inner(s, z)
            return _State(x, r, s, z, sz, sz, jnp.zeros_like(sz), jnp.zeros((), jnp.int32))

        def has_direction(state: _State) -> jax.Array:
            # At a least-squares solution A^T r vanishes, to rounding, and r need not.
            rounding = 8 * operator.rounding * trees.norm(state.r)
            return state.sz > state.largest * rounding**2

        def proceed(state: _State) -> jax.Array:
            norm = trees.norm(state.r)
            more = (norm > target) & has_direction(state) & jnp.isfinite(norm)
            return more & (state.iterations < maxiter)

        def step(state: _State) -> _State:
            image = operator.matvec(state.p)
            curvature = trees.inner(image, image)
            alpha = state.sz / curvature
            x = trees.add_scaled(state.x, alpha, state.p)
            r = trees.add_scaled(state.r, -alpha, image)
            s = adjoint.matvec(r)
            z = apply_preconditioner(s)
            sz = trees.inner(s, z)
            beta = sz / state.sz
            p = trees.add_scaled(z, beta, state.p)
            size = sz + beta**2 * state.size
            largest = jnp.maximum(state.largest, curvature / state.size)
            return _State(x, r, s, p, sz, size, largest, state.iterations + 1)

        end = jax.lax.while_loop(proceed, step, start_from(trees.scale(unit, first), residual))

        relative, status = base.measure(operator, end.x, rhs, self.rtol, self.atol)
        exhausted = out_of_steps(self.rtol, self.atol)
        unfinished = (status == Status.BREAKDOWN) & (end.iterations >= maxiter)
        unfinished = unfinished & has_direction(end)
        status = jnp.where(unfinished, exhausted, status)
        products = 2 * end.iterations + 3 + (guess is not None)
        # Steps that were asked for count even where they bring little; steps along rounding do not.
        ended = (end.iterations == 0) | (status == Status.BREAKDOWN)
        empty = ended & (trees.norm(rhs) > 0) & ~(relative < base.no_better(operator))
        x = jax.tree.map(lambda leaf: jnp.where(empty, jnp.nan, leaf), end.x)
        return rescale(x, unit), LinearReport(status, end.iterations, products, relative)
