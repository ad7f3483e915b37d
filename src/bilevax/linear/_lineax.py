"""An adapter for the solvers of Lineax (the extra `lineax`)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._operator import LinearOperator
from bilevax._results import LinearReport
from bilevax._status import Status, code
from bilevax.linear import _base as base
from bilevax.linear._units import first_iterate, rescale

try:
    import lineax
except ImportError:  # an extra: everything else works without it
    lineax: Any = None

PyTree = Any


@trees.register
@dataclasses.dataclass(frozen=True)
class LineaxSolver(base.LinearSolver):
    """Any solver of Lineax, with the status measured afterwards by one product.

    Args:
      solver: a `lineax.AbstractLinearSolver` (static: other numbers in it compile anew).
      damping: solves with A + damping * I.

    Returned status:
      CONVERGED where the relative residual is below sqrt(eps); BREAKDOWN; NONFINITE.
      `iterations` is what the solver states, -1 if it does not; `products` is -1.

    Raises:
      ImportError: if Lineax is not installed.

    Example:
      >>> import lineax
      >>> import bilevax as bx
      >>> rule = bx.Implicit(bx.LineaxSolver(lineax.LU()))
      >>> gradient, _ = rule.pullback(bx.root(lambda x, y: 4.0 * x - y), 0.0, 1.0, 1.0)
      >>> float(gradient)
      0.25

    Source:
      J. Rader, T. Lyons, P. Kidger, "Lineax: unified linear solves and linear least-squares in
      JAX and Equinox", 2023.
    """

    solver: Any = dataclasses.field(metadata={"static": True})
    _: dataclasses.KW_ONLY
    damping: Any = None

    def __post_init__(self) -> None:
        base.check_numbers(self)
        if lineax is None:
            raise ImportError(
                "`LineaxSolver` needs Lineax: install it with `pip install bilevax[lineax]`."
            )
        solver = lineax.AbstractLinearSolver
        checks.is_component("solver", self.solver, solver, "lineax.LU()")

    def solve(
        self,
        operator: LinearOperator,
        rhs: PyTree,
        *,
        guess: PyTree | None,
        prepared: PyTree,
        transposed: bool,
    ) -> tuple[PyTree, LinearReport]:
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), rhs)
        tags = {
            "POSITIVE_DEFINITE": (lineax.symmetric_tag, lineax.positive_semidefinite_tag),
            "SYMMETRIC": (lineax.symmetric_tag,),
            "GENERAL": (),
        }[operator.structure.name]
        system = lineax.FunctionLinearOperator(operator.matvec, shapes, tags=tags)
        size = trees.max_abs(rhs)
        unit = jnp.where(size > 0, size, 1)  # absolute constants in Lineax expect one of size 1
        options = {}
        if guess is not None:  # a bad one would not be dropped
            options["y0"] = rescale(first_iterate(operator, rhs, guess)[0], unit)
        result = lineax.linear_solve(
            system, rescale(rhs, unit), self.solver, options=options, throw=False
        )
        solution = trees.scale(unit, result.value)
        relative, status = base.measure(operator, solution, rhs, 0.0, 0.0)
        # A direct solver divides by zero where the matrix, though finite, is singular.
        finite = jnp.isfinite(trees.norm(operator.matvec(rhs)))
        singular = (status == Status.NONFINITE) & finite
        status = jnp.where(singular, code(Status.BREAKDOWN), status)
        # Some give up with zero, where there is nothing to return.
        empty = (status != Status.CONVERGED) & ~(relative < base.no_better(operator))
        solution = jax.tree.map(lambda leaf: jnp.where(empty, jnp.nan, leaf), solution)
        iterations = jnp.asarray(result.stats.get("num_steps", -1), jnp.int32)
        return solution, LinearReport(status, iterations, jnp.full((), -1, jnp.int32), relative)
