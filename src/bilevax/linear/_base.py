"""The linear layer: solve A v = b (or A^T v = b) and say how well.

`linear_solve` is the one entry point. It normalises the right-hand side, prepares a solver once for
A and A^T, and wraps the solve in `jax.lax.custom_linear_solve`, which makes it transposable and
differentiable to any order without looking inside the solver's loop.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._operator import LinearOperator
from bilevax._results import LinearReport
from bilevax._status import Status, code

PyTree = Any


class LinearSolver(abc.ABC):
    """Base class of linear solvers: frozen pytrees of numbers with one method, `solve`.

    A subclass is a frozen dataclass with a field `damping` (the system solved is then
    A + damping * I; None for none). Subclasses with a field `rtol` that is None take the
    tolerance that the caller suggests.
    """

    damping: Any

    def prepare(self, operator: LinearOperator) -> PyTree:
        """Return what is computed once per operator (a factorisation); nothing by default."""
        return ()

    @abc.abstractmethod
    def solve(
        self,
        operator: LinearOperator,
        rhs: PyTree,
        *,
        guess: PyTree | None,
        prepared: PyTree,
        transposed: bool,
    ) -> tuple[PyTree, LinearReport]:
        """Solve A v = rhs for a flat vector rhs whose largest entry in absolute value is 1 or 0.

        Args:
          operator: A, already transposed and damped where asked for.
          rhs: the right-hand side.
          guess: a first guess of v, or None.
          prepared: what `prepare` returned for the operator before transposition.
          transposed: whether A is the transpose of the operator that was prepared.
        """

    def with_default_rtol(self, rtol: Any) -> "LinearSolver":
        """Return this solver with a tolerance of `rtol` if it has none of its own."""
        if getattr(self, "rtol", 0.0) is None:
            return dataclasses.replace(self, rtol=rtol)  # type: ignore[type-var]
        return self


def linear_solve(
    operator: LinearOperator,
    rhs: PyTree,
    solver: LinearSolver,
    *,
    transpose: bool = False,
    guess: PyTree | None = None,
) -> tuple[PyTree, LinearReport]:
    """Solve (A + damping I) v = b, or its transpose, and report how it went.

    The solution is linear in b for differentiation: derivatives and transposes of any order are
    solves with the same solver, and see A through its products only.

    Args:
      operator: A.
      rhs: b, a pytree like v.
      solver: a `LinearSolver`.
      transpose: solve with A^T.
      guess: a first guess of v; one that is worse than zero is dropped. No gradient flows
        through it.

    Returns:
      v and a `LinearReport`. v is NaN if b is not finite or if no iterate was computed.
    """
    if trees.dimension(rhs) == 0:
        return rhs, LinearReport(code(Status.CONVERGED), *_zeros(3))
    # One flat vector: `custom_linear_solve` can transpose a solve only if every leaf of b carries a
    # tangent, and with a single leaf that is sure.
    flat, unravel = ravel_pytree(rhs)

    def flatten(function: Callable[[PyTree], PyTree]) -> Callable[[jax.Array], jax.Array]:
        return lambda v: ravel_pytree(function(unravel(v)))[0]

    operator = LinearOperator(flatten(operator.matvec), operator.structure, flat)
    if solver.damping is not None:
        operator = operator.damped(solver.damping)
    preconditioner = getattr(solver, "preconditioner", None)
    if preconditioner is not None:
        solver = dataclasses.replace(solver, preconditioner=flatten(preconditioner))  # type: ignore[type-var]
    prepared = jax.lax.stop_gradient(solver.prepare(operator))
    guess = None if guess is None else jax.lax.stop_gradient(ravel_pytree(guess)[0])
    system = operator.transpose if transpose else operator

    def solve_as(transposed: bool, guess: jax.Array | None) -> Any:
        def solve(matvec: Any, b: jax.Array) -> tuple[jax.Array, LinearReport]:
            size = trees.max_abs(b)
            usable = jnp.isfinite(size) & (size > 0)
            unit = jnp.where(usable, size, 1)
            v, report = solver.solve(
                LinearOperator(matvec, operator.structure, flat),
                b / unit,
                guess=None if guess is None else guess / unit,
                prepared=prepared,
                transposed=transposed,
            )
            finite = jnp.isfinite(size)
            status = jnp.where(finite, report.status, code(Status.NONFINITE))
            return jnp.where(finite, unit, jnp.nan) * v, report._replace(status=status)

        return solve

    v, report = jax.lax.custom_linear_solve(
        system.matvec,
        flat,
        solve=solve_as(transpose, guess),
        transpose_solve=solve_as(not transpose, None),
        symmetric=operator.structure.is_symmetric,
        has_aux=True,
    )
    return unravel(v), report


def measure(
    operator: LinearOperator, solution: PyTree, rhs: PyTree, rtol: Any, atol: Any
) -> tuple[jax.Array, jax.Array]:
    """Return the relative residual of a solution and its status, at the price of one product.

    A direct solver, or an iterative one that can do no more, is held to be converged at a
    relative residual of sqrt(eps) too: the tolerance asked for may be below what rounding allows.
    """
    residual = trees.norm(trees.add_scaled(rhs, -1, operator.matvec(solution)))
    size = trees.norm(rhs)
    relative = residual / jnp.where(size > 0, size, 1)
    accepted = (residual <= tolerance(rhs, rtol, atol)) | (relative <= attainable(rhs))
    status = jnp.where(accepted, code(Status.CONVERGED), code(Status.BREAKDOWN))
    return relative, jnp.where(jnp.isfinite(residual), status, code(Status.NONFINITE))


def tolerance(rhs: PyTree, rtol: Any, atol: Any) -> jax.Array:
    """Return the largest residual norm that is accepted: max(rtol ||b||, atol)."""
    size = trees.norm(rhs)
    rtol = default_rtol(rhs) if rtol is None else rtol
    return jnp.maximum(jnp.asarray(rtol, size.dtype) * size, jnp.asarray(atol, size.dtype))


def default_rtol(tree: PyTree) -> float:
    """Return eps^(3/4) of the least precise leaf: 1.8e-12 in float64, 6.4e-6 in float32."""
    return trees.epsilon(tree) ** 0.75


def attainable(tree: PyTree) -> float:
    """Return the relative residual that a solver which can do no more must reach: sqrt(eps)."""
    return trees.epsilon(tree) ** 0.5


def default_maxiter(tree: PyTree) -> int:
    """Return ten times the dimension, at most 10 000."""
    return min(10 * trees.dimension(tree), 10_000)


def check_numbers(solver: Any) -> None:
    """Check the numeric fields that linear solvers share, and wrap the preconditioner."""
    for name in ("rtol", "atol", "maxiter", "damping"):
        checks.not_negative(name, getattr(solver, name, None))
    preconditioner = getattr(solver, "preconditioner", None)
    # Unflattening puts placeholders into fields; only plain functions need wrapping.
    if callable(preconditioner) and not isinstance(preconditioner, Partial):
        object.__setattr__(solver, "preconditioner", Partial(preconditioner))


def preconditioner_of(solver: Any, like: PyTree, transposed: bool) -> Any:
    """Return v -> M v (or M^T v) for the preconditioner M of a solver, the identity if None."""
    if solver.preconditioner is None:
        return lambda v: v
    if not transposed:
        return solver.preconditioner
    transposed_preconditioner = jax.linear_transpose(solver.preconditioner, like)
    return lambda v: transposed_preconditioner(v)[0]


def _zeros(count: int) -> tuple[jax.Array, ...]:
    return (jnp.zeros((), jnp.int32),) * (count - 1) + (jnp.zeros(()),)
