"""The linear layer: solve A v = b (or A^T v = b) and say how well.

`linear_solve` reports on the solve and is differentiable; `transposable_solve` is linear in b for
JAX, so that it can be transposed as well. Both normalise the right-hand side, prepare a solver once
for A and A^T, and are differentiable to any order without a look inside the solver's loop.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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
from bilevax.linear._base import LinearSolver

PyTree = Any


def linear_solve(
    operator: LinearOperator,
    rhs: PyTree,
    solver: LinearSolver,
    *,
    transpose: bool = False,
    guess: PyTree | None = None,
    on_failure: OnFailure = OnFailure.RETURN,
    on_derivative_failure: OnFailure | None = None,
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
      on_failure: what becomes of v where the solve does not end as asked for.
      on_derivative_failure: the same for the solves of derivatives, which have no report; None is
        `on_failure`.

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
    system, b, way = _System.build(operator, rhs, solver, transpose, on_failure)
    if on_derivative_failure is not None:
        system = dataclasses.replace(system, on_derivative_failure=on_derivative_failure)
    if guess is not None:
        if trees.dimension(guess) != b.size:
            raise TypeError(
                f"`guess` must have as many entries as the unknown, {b.size}; "
                f"got {checks.describe(guess)}."
            )
        guess = way.from_solution(jax.lax.stop_gradient(ravel_pytree(guess)[0].astype(b.dtype)))
    v, report = _solve(system, guess, b)
    return way.to_solution(v), report


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
    system, b, way = _System.build(operator, rhs, solver, False, on_failure)
    return way.to_solution(_solve_transposably(system, b))


class _Way(NamedTuple):
    """The way from the flat vectors of a system to pytrees, and back."""

    unravel: Callable[[jax.Array], PyTree]
    columns: Any  # the units of the solution

    def to_solution(self, v: jax.Array) -> PyTree:
        return self.unravel(self.columns * v)

    def from_solution(self, v: jax.Array) -> jax.Array:
        return v / self.columns


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
    on_derivative_failure: OnFailure = dataclasses.field(metadata={"static": True})

    @classmethod
    def build(
        cls,
        operator: LinearOperator,
        rhs: PyTree,
        solver: LinearSolver,
        transposed: bool,
        on_failure: OnFailure,
    ) -> tuple["_System", jax.Array, _Way]:
        """Return the system, b as a flat vector, and the way back to a pytree.

        The vector has the widest dtype of the leaves, and float32 at least. What a product loses by
        rounding is still that of the least precise leaf. Where the operator has a scaling, the
        system is R A C w = R b with v = C w.
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

        solver = solver.with_default_preconditioner(operator.preconditioner)
        complement = None if operator.complement is None else flatten(operator.complement)
        scaling = operator.scaling if solver.takes_scaling else None
        operator = LinearOperator(
            flatten(operator.matvec), operator.structure, b, complement, epsilon
        )
        if solver.damping is not None:
            operator = operator.damped(solver.damping)
        preconditioner = getattr(solver, "preconditioner", None)
        if preconditioner is not None:
            shape = jax.eval_shape(preconditioner, rhs)
            checks.same_structure("preconditioner", shape, rhs, expected="v")
            preconditioner = flatten(preconditioner)
        columns: Any = 1
        if scaling is not None:
            rows, columns = (
                jax.lax.stop_gradient(ravel_pytree(diagonal)[0].astype(b.dtype))
                for diagonal in (scaling.rows, scaling.columns)
            )
            operator = operator.with_matvec(_scale_both(operator.matvec, rows, columns))
            if preconditioner is not None:
                preconditioner = _scale_both(preconditioner, 1 / columns, 1 / rows)
            if transposed:
                rows, columns = columns, rows
            b = rows * b
        if preconditioner is not None:
            explicit = make_explicit(preconditioner, b)
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
            on_failure,
        )
        return system, b, _Way(unravel, columns)

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
        tiny = jnp.finfo(size.dtype).tiny
        # Not beyond what has a reciprocal: compilers divide by multiplying with it.
        power = jnp.frexp(jnp.minimum(size, 0.1 / tiny))[1]
        # Where squares are in range the unit is 1. Compilers may compute b twice, and where b is
        # rounding alone, units of the two would have nothing to do with one another.
        in_range = (size > tiny**0.25) & (size < tiny**-0.25)
        unit = jnp.ldexp(jnp.ones_like(size), power)
        unit = jnp.where(finite & (size > 0) & ~in_range, unit, 1)
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
    system = dataclasses.replace(system, on_failure=system.on_derivative_failure)
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


def _scale_both(
    product: Callable[[jax.Array], jax.Array], left: jax.Array, right: jax.Array
) -> Callable[[jax.Array], jax.Array]:
    return lambda v: left * product(right * v)


def _subtract_product(complement: Partial, v: jax.Array) -> jax.Array:
    return v - complement(v)
