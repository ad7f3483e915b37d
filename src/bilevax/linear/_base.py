"""What a linear solver is, and what solvers share: tolerances, measured residuals, checks."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
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
    tolerance that the caller suggests. A field `atol`, in the unit of b, is rescaled with b.
    """

    damping: Any

    takes_scaling: bool = True
    """Whether the system may be handed over with scaled rows and columns."""

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
        """Solve A v = rhs for a flat vector rhs that is zero or of moderate size.

        Squares of its largest entry are in range: where those of b are not, rhs is b in another
        unit, and so is a field `atol`.

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

    def with_default_preconditioner(self, preconditioner: Any) -> "LinearSolver":
        """Return this solver with a preconditioner near A^{-1} if it takes one and has none."""
        if preconditioner is None or getattr(self, "preconditioner", self) is not None:
            return self
        return dataclasses.replace(self, preconditioner=preconditioner)  # type: ignore[type-var]

    def with_steps(self, steps: Any) -> "LinearSolver":
        """Return this solver with exactly so many steps and no tolerance.

        Raises:
          TypeError: if it does not take steps of one product each.
        """
        raise TypeError(f"`{type(self).__name__}` does not count steps; take `CG()` or `Neumann`.")

    def reducing(self, part: Any, residual: Any) -> "LinearSolver":
        """Return this solver such that it leaves at most a part of an error.

        A solver that knows residuals alone brings them down to `residual`: they hardly feel what A
        makes small, which can be most of the error, until they are tiny themselves.
        """
        return self.with_default_rtol(residual)

    def without_limits(self) -> "LinearSolver | None":
        """Return this solver without what keeps it from the exact solution of A v = b.

        That is tolerances of its own, a limit of steps and damping; what the caller suggests as a
        tolerance holds then. None for a solver that is inexact by nature.
        """
        neutral = {"rtol": None, "atol": 0.0, "damping": None, "energy_rtol": None}
        limits = {name: value for name, value in neutral.items() if hasattr(self, name)}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if field.name == "maxiter":
                limits["maxiter"] = field.default
        return dataclasses.replace(self, **limits)  # type: ignore[type-var]


def measure(
    operator: LinearOperator, solution: PyTree, rhs: PyTree, rtol: Any, atol: Any, size: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the relative residual of a solution, its rounding error and a status.

    It takes two products. `size` is ||A|| from below, as far as it is known.
    """
    image = operator.matvec(solution)
    residual = trees.norm(trees.add_scaled(rhs, -1, image))
    rhs_norm = trees.norm(rhs)
    relative = residual / jnp.where(rhs_norm > 0, rhs_norm, 1)
    rounding = rounding_error(operator, solution, image, rhs, size)
    met = (residual <= tolerance(operator, rhs, rtol, atol)) | (relative <= rounding)
    status = jnp.where(met, code(Status.CONVERGED), end_of_progress(operator, relative))
    return relative, rounding, jnp.where(jnp.isfinite(residual), status, code(Status.NONFINITE))


def rounding_error(
    operator: LinearOperator, v: PyTree, image: PyTree, rhs: PyTree, size: Any
) -> jax.Array:
    """Return the relative residual that rounding errors at v explain, by one more product.

    In exact arithmetic A (c v) = c A v. What the two differ by for c = 1.3 is the error of a
    product, that of v itself included: a sample of it, which few entries may hide by chance, so
    eps ||A|| ||v|| is a second one.

    Args:
      operator: A.
      v: the solution.
      image: A v.
      rhs: b.
      size: ||A|| from below, as far as it is known; ||A v|| / ||v|| always is.
    """
    defect = trees.add_scaled(operator.matvec(trees.scale(STRETCH, v)), -STRETCH, image)
    least = jnp.maximum(size * trees.norm(v), trees.norm(image))
    return rounding_level(operator, trees.norm(defect), least, trees.norm(rhs))


STRETCH = 1.3  # no power of two, which would round nothing


def rounding_level(
    operator: LinearOperator, defect: jax.Array, image_norm: jax.Array, rhs_norm: jax.Array
) -> jax.Array:
    """Return ten times the larger of a measured error and eps ||A|| ||v||, relative to ||b||.

    At most eps^(1/4): a solution that is less accurate is that of a singular system.
    """
    error = 10 * jnp.maximum(defect, operator.rounding * image_norm)
    level = error / jnp.where(rhs_norm > 0, rhs_norm, 1)
    return jnp.where(jnp.isfinite(level), jnp.minimum(level, operator.rounding**0.25), 0)


def end_of_progress(operator: LinearOperator, relative: jax.Array) -> jax.Array:
    """Return the status of a solver that can do no more, short of its tolerance and of rounding.

    STALLED where it came to sqrt(eps) at least, which a singular system rarely allows.
    """
    small = relative <= operator.rounding**0.5
    return jnp.where(small, code(Status.STALLED), code(Status.BREAKDOWN))


def tolerance(operator: LinearOperator, rhs: PyTree, rtol: Any, atol: Any) -> jax.Array:
    """Return the largest residual norm that is accepted: max(rtol ||b||, atol).

    It stays below ||b||, the residual of zero: that is never accepted as a solution.
    """
    size = trees.norm(rhs)
    rtol = operator.rounding**0.75 if rtol is None else rtol
    largest = jnp.maximum(jnp.asarray(rtol, size.dtype) * size, jnp.asarray(atol, size.dtype))
    return jnp.minimum(largest, 0.5 * size)


def default_rtol(tree: PyTree) -> float:
    """Return eps^(3/4) of the least precise leaf: 1.8e-12 in float64, 6.4e-6 in float32."""
    return trees.epsilon(tree) ** 0.75


def no_better(operator: LinearOperator) -> float:
    """Return the relative residual from which on a vector is no better than zero: 1 - sqrt(eps).

    That of zero is 1, and nearer to it rounding alone decides. What is no better is no iterate: a
    guess like that is dropped, and a solver that ends there has computed nothing.
    """
    return 1 - operator.rounding**0.5


def default_maxiter(tree: PyTree) -> int:
    """Return ten times the dimension, at most 10 000."""
    return min(10 * trees.dimension(tree), 10_000)


def check_numbers(solver: Any) -> None:
    """Check the numeric fields that linear solvers share, and wrap the preconditioner."""
    for name in ("rtol", "atol", "damping", "energy_rtol"):
        if getattr(solver, name, None) is not None:
            checks.not_negative(name, getattr(solver, name))
    if getattr(solver, "maxiter", None) is not None:
        checks.not_negative("maxiter", solver.maxiter, whole=True)
    preconditioner = getattr(solver, "preconditioner", None)
    if preconditioner is not None and not isinstance(preconditioner, Partial):
        checks.is_callable("preconditioner", preconditioner)
        object.__setattr__(solver, "preconditioner", Partial(preconditioner))


def preconditioner_of(solver: Any, like: PyTree, transposed: bool) -> Any:
    """Return v -> M v (or M^T v) for the preconditioner M of a solver, the identity if None."""
    if solver.preconditioner is None:
        return lambda v: v
    if not transposed:
        return solver.preconditioner
    transposed_preconditioner = jax.linear_transpose(solver.preconditioner, like)
    return lambda v: transposed_preconditioner(v)[0]
