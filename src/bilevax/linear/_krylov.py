"""GMRES and BiCGStab of `jax.scipy.sparse.linalg`, with the status measured afterwards."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.sparse.linalg
import optax.tree

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._operator import LinearOperator
from bilevax._results import LinearReport
from bilevax._status import Status, code
from bilevax.linear import _base as base

PyTree = Any


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
      `iterations` counts cycles, `products` takes each of them for complete.

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
        checks.positive("restart", self.restart)

    def solve(
        self,
        operator: LinearOperator,
        rhs: PyTree,
        *,
        guess: PyTree | None,
        prepared: PyTree,
        transposed: bool,
    ) -> tuple[PyTree, LinearReport]:
        operator, size = _unit_sized(operator, rhs)
        preconditioner = base.preconditioner_of(self, rhs, transposed)
        restart = min(self.restart, trees.dimension(rhs))
        rhs_norm = trees.norm(rhs)
        target = base.tolerance(rhs, self.rtol, self.atol)

        def residual_norm(x: PyTree) -> jax.Array:
            return trees.norm(trees.add_scaled(rhs, -1, operator.matvec(x)))

        def proceed(state: tuple[PyTree, jax.Array, jax.Array, jax.Array]) -> jax.Array:
            _, norm, cycles, stuck = state
            return (norm > target) & ~stuck & (cycles < self.maxiter)

        def cycle(
            state: tuple[PyTree, jax.Array, jax.Array, jax.Array],
        ) -> tuple[PyTree, jax.Array, jax.Array, jax.Array]:
            x, norm, cycles, _ = state
            following, _ = jax.scipy.sparse.linalg.gmres(
                operator.matvec,
                rhs,
                x,
                tol=0.0,
                restart=restart,
                maxiter=1,
                M=preconditioner,
            )
            following_norm = residual_norm(following)
            better = following_norm < norm
            x = trees.where(better, following, x)
            stuck = ~(following_norm < 0.99 * norm)
            return x, jnp.where(better, following_norm, norm), cycles + 1, stuck

        x, norm = _first_iterate(rhs, guess, size, residual_norm)
        none = jnp.zeros((), jnp.int32)
        x, norm, cycles, stuck = jax.lax.while_loop(
            proceed, cycle, (x, norm, none, jnp.zeros((), bool))
        )
        relative = norm / jnp.where(rhs_norm > 0, rhs_norm, 1)
        status = jnp.where(target > 0, code(Status.MAXITER), code(Status.TRUNCATED))
        status = jnp.where(stuck, code(Status.BREAKDOWN), status)
        floor = (norm <= target) | (stuck & (relative <= base.attainable(rhs)))
        status = jnp.where(floor, code(Status.CONVERGED), status)
        status = jnp.where(jnp.isfinite(size), status, code(Status.NONFINITE))
        products = 1 + (guess is not None) + cycles * (restart + 3)
        empty = ~(relative < 1) & (rhs_norm > 0)  # nothing better than zero: no solution at all
        x = jax.tree.map(lambda leaf: jnp.where(empty, jnp.nan, leaf), x)
        return _rescale(x, size), LinearReport(status, cycles, products, relative)


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
        operator, size = _unit_sized(operator, rhs)
        maxiter = base.default_maxiter(rhs) if self.maxiter is None else self.maxiter

        def residual_norm(x: PyTree) -> jax.Array:
            return trees.norm(trees.add_scaled(rhs, -1, operator.matvec(x)))

        first, first_norm = _first_iterate(rhs, guess, size, residual_norm)
        target: Any = base.tolerance(rhs, self.rtol, self.atol)
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
        # A breakdown leaves a useless iterate behind: go back to the first one, or to NaN.
        useless = unsolved & ~(relative * trees.norm(rhs) < first_norm)
        fallback = first if guess is not None else jax.tree.map(lambda v: v * jnp.nan, first)
        x = trees.where(useless, fallback, x)
        relative = jnp.where(useless, first_norm / trees.norm(rhs), relative)
        status = jnp.where(useless & jnp.isfinite(size), code(Status.BREAKDOWN), status)
        unknown = jnp.full((), -1, jnp.int32)
        return _rescale(x, size), LinearReport(status, unknown, unknown, relative)


def _unit_sized(operator: LinearOperator, rhs: PyTree) -> tuple[LinearOperator, jax.Array]:
    """Divide the operator by ||A b|| / ||b||: the library's breakdown tests are absolute."""
    rhs_norm = trees.norm(rhs)
    image = operator.matvec(rhs)
    largest = trees.max_abs(image)
    largest = jnp.where(largest == 0, 1, largest)
    image = jax.tree.map(lambda leaf: leaf / largest.astype(leaf.dtype), image)
    size = largest * trees.norm(image) / jnp.where(rhs_norm > 0, rhs_norm, 1)
    size = jnp.where(size == 0, 1, size)
    return dataclasses.replace(operator, matvec=lambda v: _rescale(operator.matvec(v), size)), size


def _rescale(tree: PyTree, size: jax.Array) -> PyTree:
    return jax.tree.map(lambda leaf: leaf / size.astype(leaf.dtype), tree)


def _first_iterate(
    rhs: PyTree, guess: PyTree | None, size: jax.Array, residual_norm: Callable[[PyTree], jax.Array]
) -> tuple[PyTree, jax.Array]:
    """Return the guess, in the units of the scaled system, unless zero is better."""
    zero, rhs_norm = optax.tree.zeros_like(rhs), trees.norm(rhs)
    if guess is None:
        return zero, rhs_norm
    guess = trees.scale(size, guess)
    norm = residual_norm(guess)
    better = norm < rhs_norm
    return trees.where(better, guess, zero), jnp.where(better, norm, rhs_norm)
