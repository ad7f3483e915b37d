"""GMRES and BiCGStab of `jax.scipy.sparse.linalg`, with the status measured afterwards."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.sparse.linalg

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._operator import LinearOperator
from bilevax._results import LinearReport
from bilevax._status import Status, code, out_of_steps
from bilevax.linear import _base as base
from bilevax.linear._units import first_iterate, rescale, unit_sized

PyTree = Any


class _Cycle(NamedTuple):
    x: PyTree
    r: PyTree  # b - A x
    norm: jax.Array  # ||r||
    cycles: jax.Array
    stuck: jax.Array  # the last cycle brought nothing


@trees.register
@dataclasses.dataclass(frozen=True)
class GMRES(base.LinearSolver):
    """Restarted GMRES for any system A v = b.

    Runs one restart cycle of `jax.scipy.sparse.linalg.gmres` at a time and measures
    ||b - A v|| after each, so the status is true and the best iterate is kept.

    Args:
      rtol: relative tolerance on ||b - A v|| / ||b||; None follows the inner solver's tolerance,
        or is eps^(3/4) of the dtype.
      atol: absolute tolerance, in the unit of b.
      maxiter: number of restart cycles at most.
      restart: Krylov dimension of a cycle (static; at most the dimension is used). Memory is
        `restart` vectors.
      preconditioner: v -> M v, near A^{-1}.
      damping: solves with A + damping * I.

    Returned status:
      CONVERGED (also where it stalls below sqrt(eps)); MAXITER; TRUNCATED (both tolerances zero);
      BREAKDOWN where a whole cycle brings nothing, as on a singular system; NONFINITE.
      `iterations` counts cycles; `products` is an upper bound, as a cycle may end early.

    Example:
      >>> import jax.numpy as jnp
      >>> import bilevax as bx
      >>> problem = bx.root(lambda x, y: jnp.array([[0.0, 2.0], [-1.0, 0.0]]) @ x - y)
      >>> rule = bx.Implicit(bx.GMRES())
      >>> gradient, _ = rule.pullback(problem, jnp.zeros(2), jnp.ones(2), jnp.ones(2))
      >>> bool(jnp.allclose(gradient, jnp.array([0.5, -1.0])))
      True

    Source:
      Y. Saad and M. H. Schultz, "GMRES: A Generalized Minimal Residual Algorithm for Solving
      Nonsymmetric Linear Systems", 1986.
    """

    rtol: Any = None
    atol: Any = 0.0
    maxiter: Any = 100
    _: dataclasses.KW_ONLY
    restart: int = dataclasses.field(default=30, metadata={"static": True})
    preconditioner: Callable[[PyTree], PyTree] | None = None
    damping: Any = None

    def __post_init__(self) -> None:
        base.check_numbers(self)
        checks.positive("restart", self.restart, whole=True)

    def solve(
        self,
        operator: LinearOperator,
        rhs: PyTree,
        *,
        guess: PyTree | None,
        prepared: PyTree,
        transposed: bool,
    ) -> tuple[PyTree, LinearReport]:
        precondition = base.preconditioner_of(self, rhs, transposed)
        # Preconditioned from the right, A M u = b and v = M u: the residual is that of v.
        product = operator.with_matvec(lambda u: operator.matvec(precondition(u)))
        unit_product, size = unit_sized(product, rhs)
        restart = min(self.restart, trees.dimension(rhs))
        rhs_norm = trees.norm(rhs)
        target = base.tolerance(operator, rhs, self.rtol, self.atol)

        def proceed(state: _Cycle) -> jax.Array:
            return (state.norm > target) & ~state.stuck & (state.cycles < self.maxiter)

        def cycle(state: _Cycle) -> _Cycle:
            # Half of what is needed: inside of a cycle the residual is an estimate.
            enough: Any = 0.5 * target / state.norm
            u, _ = jax.scipy.sparse.linalg.gmres(
                unit_product.matvec,
                rescale(state.r, state.norm),
                tol=0.0,
                atol=enough,
                restart=restart,
                maxiter=1,
                # The other method squares the condition number.
                solve_method="incremental",
            )
            move = rescale(precondition(u), size)
            x = trees.add_scaled(state.x, state.norm, move)
            r = trees.add_scaled(rhs, -1, operator.matvec(x))
            norm = trees.norm(r)
            better, stuck = norm < state.norm, ~(norm < 0.99 * state.norm)
            following = _Cycle(x, r, norm, state.cycles, stuck)
            kept = trees.where(better, following, state._replace(stuck=stuck))
            return kept._replace(cycles=state.cycles + 1)

        x, r, _ = first_iterate(operator, rhs, guess)
        none = jnp.zeros((), jnp.int32)
        first = _Cycle(x, r, trees.norm(r), none, jnp.zeros((), bool))
        x, _, norm, cycles, stuck = jax.lax.while_loop(proceed, cycle, first)
        relative = norm / jnp.where(rhs_norm > 0, rhs_norm, 1)
        status = out_of_steps(self.rtol, self.atol)
        status = jnp.where(stuck, code(Status.BREAKDOWN), status)
        floor = (norm <= target) | (stuck & (relative <= base.attainable(operator)))
        status = jnp.where(floor, code(Status.CONVERGED), status)
        status = jnp.where(jnp.isfinite(size), status, code(Status.NONFINITE))
        products = 1 + (guess is not None) + cycles * (restart + 3)
        empty = ~(relative < base.no_better(operator)) & (rhs_norm > 0)  # no solution at all
        x = jax.tree.map(lambda leaf: jnp.where(empty, jnp.nan, leaf), x)
        return x, LinearReport(status, cycles, products, relative)


@trees.register
@dataclasses.dataclass(frozen=True)
class BiCGStab(base.LinearSolver):
    """BiCGStab for any system A v = b: short recurrences, no structure needed.

    Runs `jax.scipy.sparse.linalg.bicgstab`, then measures ||b - A v|| with one product.

    Args:
      rtol: relative tolerance on ||b - A v|| / ||b||; None follows the inner solver's tolerance,
        or is eps^(3/4) of the dtype.
      atol: absolute tolerance, in the unit of b.
      maxiter: number of steps at most; None is ten times the dimension, at most 10 000.
      preconditioner: v -> M v, near A^{-1}.
      damping: solves with A + damping * I.

    Returned status:
      CONVERGED (also where it ends below sqrt(eps)); BREAKDOWN where it ends above; NONFINITE.
      `iterations` and `products` are -1: the library does not say.

    Example:
      >>> import bilevax as bx
      >>> problem = bx.root(lambda x, y: 4.0 * x - y)
      >>> gradient, _ = bx.Implicit(bx.BiCGStab()).pullback(problem, 0.0, 1.0, 1.0)
      >>> float(gradient)
      0.25

    Source:
      H. A. van der Vorst, "Bi-CGSTAB: A Fast and Smoothly Converging Variant of Bi-CG for the
      Solution of Nonsymmetric Linear Systems", 1992.
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
        first, first_residual, is_guess = first_iterate(operator, rhs, guess)
        first_norm = trees.norm(first_residual)
        operator, size = unit_sized(operator, rhs)
        first = trees.scale(size, first)
        maxiter = base.default_maxiter(rhs) if self.maxiter is None else self.maxiter
        # Beyond rounding it would divide zero by zero, and lose what it had.
        floor = operator.rounding * trees.norm(rhs)
        target: Any = jnp.maximum(base.tolerance(operator, rhs, self.rtol, self.atol), floor)
        x, _ = jax.scipy.sparse.linalg.bicgstab(
            operator.matvec,
            rhs,
            first,
            tol=0.0,
            atol=target,
            maxiter=maxiter,
            M=base.preconditioner_of(self, rhs, transposed),
        )
        relative, status = base.measure(operator, x, rhs, self.rtol, self.atol)
        unsolved = status != Status.CONVERGED
        # A breakdown leaves a useless iterate behind: go back to the guess, or to NaN.
        reached = first_norm * jnp.where(is_guess, 1, base.no_better(operator))
        useless = unsolved & ~(relative * trees.norm(rhs) < reached)
        x = trees.where(useless, trees.scale(jnp.where(is_guess, 1, jnp.nan), first), x)
        relative = jnp.where(useless, first_norm / trees.norm(rhs), relative)
        status = jnp.where(useless & jnp.isfinite(size), code(Status.BREAKDOWN), status)
        unknown = jnp.full((), -1, jnp.int32)
        return rescale(x, size), LinearReport(status, unknown, unknown, relative)
