"""The linear layer: solve A v = b (or A^T v = b) and say how well.

`linear_solve` reports on the solve and is differentiable; `transposable_solve` is linear in b for
JAX, so that it can be transposed as well. Both normalise the right-hand side, prepare a solver once
for A and A^T, and are differentiable to any order without a look inside the solver's loop.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._closures import make_explicit
from bilevax._failure import OnFailure, guard
from bilevax._operator import LinearOperator, Structure
from bilevax._results import LinearReport
from bilevax._status import Status, code, is_unsolved

PyTree = Any


class LinearSolver(abc.ABC):
    """Base class of linear solvers: frozen pytrees of numbers with one method, `solve`.

    A subclass is a frozen dataclass with a field `damping` (the system solved is then
    A + damping * I; None for none). Subclasses with a field `rtol` that is None take the
    tolerance that the caller suggests. A field `atol`, in the unit of b, is rescaled with b.
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
    on_failure: OnFailure = OnFailure.RETURN,
) -> tuple[PyTree, LinearReport]:
    """Solve (A + damping I) v = b, or its transpose, and report how it went.

    Differentiable to any order in b and in all that A depends on: derivatives are solves with the
    same solver, dv = A^{-1} (db - dA v).

    Args:
      operator: A.
      rhs: b, a pytree like v.
      solver: a `LinearSolver`.
      transpose: solve with A^T.
      guess: a first guess of v; one that is worse than zero is dropped. No gradient flows
        through it.
      on_failure: what becomes of v where the solve does not end as asked for; it holds for the
        solves of derivatives too, which have no report.

    Returns:
      v and a `LinearReport`. v is NaN if b is not finite or if no iterate was computed.

    Example:
      >>> import jax.numpy as jnp
      >>> import bilevax as bx
      >>> b = jnp.array([2.0, 4.0])
      >>> operator = bx.LinearOperator(lambda v: 2 * v, bx.Structure.POSITIVE_DEFINITE, b)
      >>> v, report = bx.linear_solve(operator, b, bx.CG())
      >>> [float(entry) for entry in v], int(report.iterations)
      ([1.0, 2.0], 1)
    """
    if trees.dimension(rhs) == 0:
        nothing = jnp.zeros((), jnp.int32)
        return rhs, LinearReport(code(Status.CONVERGED), nothing, nothing, jnp.zeros(()))
    system, b, unravel = _System.build(operator, rhs, solver, transpose, on_failure)
    if guess is not None:
        if trees.dimension(guess) != b.size:
            raise TypeError(
                f"`guess` must have as many entries as the unknown, {b.size}; "
                f"got {checks.describe(guess)}."
            )
        guess = jax.lax.stop_gradient(ravel_pytree(guess)[0].astype(b.dtype))
    v, report = _solve(system, guess, b)
    return unravel(v), report


def transposable_solve(
    operator: LinearOperator,
    rhs: PyTree,
    solver: LinearSolver,
    *,
    on_failure: OnFailure = OnFailure.RETURN,
) -> PyTree:
    """Solve (A + damping I) v = b as a linear function of b that JAX can also transpose.

    For tangents, which are transposed when a forward rule is used in reverse mode. A linear
    function has no room for a report, so `on_failure` is all that tells of a failure.
    """
    if trees.dimension(rhs) == 0:
        return rhs
    system, b, unravel = _System.build(operator, rhs, solver, False, on_failure)
    return unravel(_solve_transposably(system, b))


@trees.register
@dataclasses.dataclass(frozen=True)
class _System:
    """A linear system on flat vectors, as a pytree of all that it depends on."""

    solver: LinearSolver
    matvec: Partial  # its leaves are what A depends on
    complement: Partial | None
    prepared: PyTree
    structure: Structure = dataclasses.field(metadata={"static": True})
    epsilon: float = dataclasses.field(metadata={"static": True})
    transposed: bool = dataclasses.field(metadata={"static": True})
    on_failure: OnFailure = dataclasses.field(metadata={"static": True})

    @classmethod
    def build(
        cls,
        operator: LinearOperator,
        rhs: PyTree,
        solver: LinearSolver,
        transposed: bool,
        on_failure: OnFailure,
    ) -> tuple["_System", jax.Array, Callable[[jax.Array], PyTree]]:
        """Return the system, b as a flat vector, and the way back to a pytree.

        The vector has the widest dtype of the leaves, and float32 at least. What a product loses by
        rounding is still that of the least precise leaf.
        """
        checks.single_numbers(solver)
        epsilon = trees.epsilon(rhs)
        b, unravel_leaves = ravel_pytree(rhs)
        narrow = b.dtype
        b = b.astype(jnp.promote_types(narrow, jnp.float32))

        def unravel(v: jax.Array) -> PyTree:
            return unravel_leaves(v.astype(narrow))

        def flatten(function: Callable[[PyTree], PyTree]) -> Callable[[jax.Array], jax.Array]:
            return lambda v: ravel_pytree(function(unravel(v)))[0].astype(b.dtype)

        complement = None if operator.complement is None else flatten(operator.complement)
        operator = LinearOperator(
            flatten(operator.matvec), operator.structure, b, complement, epsilon
        )
        if solver.damping is not None:
            operator = operator.damped(solver.damping)
        preconditioner = getattr(solver, "preconditioner", None)
        if preconditioner is not None:
            shape = jax.eval_shape(preconditioner, rhs)
            checks.same_structure("preconditioner", shape, rhs, expected="v")
            explicit = make_explicit(flatten(preconditioner), b)
            solver = dataclasses.replace(solver, preconditioner=explicit)  # type: ignore[type-var]
        prepared = jax.lax.stop_gradient(solver.prepare(operator))
        product = operator.transpose if transposed else operator
        if product.complement is None:
            complement, matvec = None, make_explicit(product.matvec, b)
        else:
            complement = make_explicit(product.complement, b)
            matvec = Partial(_subtract_product, complement)
        system = cls(
            solver,
            matvec,
            complement,
            prepared,
            operator.structure,
            epsilon,
            transposed,
            on_failure,
        )
        return system, b, unravel

    def operator(
        self, matvec: Callable[..., jax.Array], b: jax.Array, complement: Partial | None = None
    ) -> LinearOperator:
        """Return the operator with this product, of this system or its transpose."""
        return LinearOperator(matvec, self.structure, b, complement, self.epsilon)

    def run(
        self, operator: LinearOperator, b: jax.Array, guess: jax.Array | None, swap: bool
    ) -> tuple[jax.Array, LinearReport]:
        """Normalise b, solve, apply the policy; `swap` says that the operator is transposed."""
        size = trees.max_abs(b)
        finite = jnp.isfinite(size)
        # Not beyond what has a reciprocal: compilers divide by multiplying with it.
        unit = jnp.minimum(size, 0.1 / jnp.finfo(size.dtype).tiny)
        unit = jnp.where(finite & (size > 0), unit, 1)
        solver: Any = self.solver
        if hasattr(solver, "atol"):
            solver = dataclasses.replace(solver, atol=solver.atol / unit)
        v, report = solver.solve(
            operator,
            b / unit,
            guess=None if guess is None else guess / unit,
            prepared=self.prepared,
            transposed=self.transposed != swap,
        )
        v = jnp.where(finite, unit, jnp.nan) * v
        status = jnp.where(finite, report.status, code(Status.NONFINITE))
        v = guard(self.on_failure, "linear solve", is_unsolved(status), status, v)
        return v, report._replace(status=status)


@jax.custom_jvp
def _solve(
    system: _System, guess: jax.Array | None, b: jax.Array
) -> tuple[jax.Array, LinearReport]:
    operator = system.operator(system.matvec, b, system.complement)
    return system.run(operator, b, guess, swap=False)


@_solve.defjvp
def _solve_jvp(primals: Any, tangents: Any) -> Any:
    system, _, _ = primals
    tangent_system, _, tangent_b = tangents
    v, report = _solve(*primals)
    # A v = b, so A dv = db - dA v; the solver's own numbers do not matter at the solution.
    tangent_product = jax.jvp(lambda matvec: matvec(v), (system.matvec,), (tangent_system.matvec,))[
        1
    ]
    tangent_v = _solve_transposably(system, tangent_b - tangent_product)
    still = jax.tree.map(jax.custom_derivatives.zero_from_primal, report)
    return (v, report), (tangent_v, still)


def _solve_transposably(system: _System, b: jax.Array) -> jax.Array:
    def solve(swap: bool, matvec: Callable[..., jax.Array], b: jax.Array) -> jax.Array:
        return system.run(system.operator(matvec, b), b, None, swap)[0]

    return jax.lax.custom_linear_solve(
        system.matvec,
        b,
        solve=functools.partial(solve, False),
        transpose_solve=functools.partial(solve, True),
        symmetric=system.structure.is_symmetric,
    )


def _subtract_product(complement: Partial, v: jax.Array) -> jax.Array:
    return v - complement(v)


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
    asked = residual <= tolerance(operator, rhs, rtol, atol)
    accepted = asked | (relative <= attainable(operator))
    status = jnp.where(accepted, code(Status.CONVERGED), code(Status.BREAKDOWN))
    return relative, jnp.where(jnp.isfinite(residual), status, code(Status.NONFINITE))


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


def attainable(operator: LinearOperator) -> float:
    """Return the relative residual that a solver which can do no more must reach: sqrt(eps)."""
    return operator.rounding**0.5


def default_maxiter(tree: PyTree) -> int:
    """Return ten times the dimension, at most 10 000."""
    return min(10 * trees.dimension(tree), 10_000)


def check_numbers(solver: Any) -> None:
    """Check the numeric fields that linear solvers share, and wrap the preconditioner."""
    for name in ("rtol", "atol", "damping"):
        if getattr(solver, name, None) is not None:
            checks.not_negative(name, getattr(solver, name))
    if getattr(solver, "maxiter", None) is not None:
        checks.not_negative("maxiter", solver.maxiter, whole=True)
    preconditioner = getattr(solver, "preconditioner", None)
    # Unflattening puts placeholders into fields; only plain functions need wrapping.
    is_set = preconditioner is not None and type(preconditioner) is not object
    if is_set and not isinstance(preconditioner, Partial):
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
