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

PyTree = Any


@trees.register
@dataclasses.dataclass(frozen=True)
class LineaxSolver(base.LinearSolver):
    """Any solver of Lineax, with the status measured afterwards by three products.

    Args:
      solver: a `lineax.AbstractLinearSolver` (static: other numbers in it compile anew).
      damping: solves with A + damping * I.

    Returned status:
      CONVERGED where the residual is at rounding level or meets the tolerance of the solver;
      STALLED where it is below sqrt(eps), BREAKDOWN where it is above; NONFINITE.
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
        checks.is_component("solver", self.solver, _lineax().AbstractLinearSolver, "lineax.LU()")

    def solve(
        self,
        operator: LinearOperator,
        rhs: PyTree,
        *,
        guess: PyTree | None,
        prepared: PyTree,
        transposed: bool,
    ) -> tuple[PyTree, LinearReport]:
        lineax = _lineax()
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
        image_norm, rhs_norm = trees.norm(operator.matvec(rhs)), trees.norm(rhs)
        known = image_norm / jnp.where(rhs_norm > 0, rhs_norm, 1)
        # Where it has tolerances, it stops at |r| <= atol + rtol |b|, entry by entry.
        rtol, atol = getattr(self.solver, "rtol", 0.0), getattr(self.solver, "atol", 0.0)
        largest = rtol * rhs_norm + unit * atol * trees.dimension(rhs) ** 0.5
        relative, rounding, status = base.measure(operator, solution, rhs, 0.0, largest, known)
        # A direct solver divides by zero where the matrix, though finite, is singular.
        finite = jnp.isfinite(image_norm)
        singular = (status == Status.NONFINITE) & finite
        status = jnp.where(singular, code(Status.BREAKDOWN), status)
        # Some give up with zero, where there is nothing to return.
        empty = (status != Status.CONVERGED) & ~(relative < base.no_better(operator))
        solution = jax.tree.map(lambda leaf: jnp.where(empty, jnp.nan, leaf), solution)
        iterations = jnp.asarray(result.stats.get("num_steps", -1), jnp.int32)
        unknown = jnp.full((), -1, jnp.int32)
        return solution, LinearReport(status, iterations, unknown, relative, rounding)


def _lineax() -> Any:
    """Return Lineax, an extra that takes half a second to import."""
    try:
        import lineax
    except ImportError as error:
        raise ImportError(
            "`LineaxSolver` needs Lineax: install it with `pip install bilevax[lineax]`."
        ) from error
    return lineax
