"""Inner problems of which only samples are at hand: one batch at a time."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._closures import as_partial
from bilevax._operator import Structure
from bilevax._problems import FixedPoint, Minimum, Problem

PyTree = Any


@trees.register
@dataclasses.dataclass(frozen=True)
class StochasticProblem:
    """An inner problem F(x, y) = E[F(x, y; batch)] = 0; one batch of it is an ordinary `Problem`.

    Made by `stochastic_minimum` or `stochastic_fixed_point`.

    Attributes:
      function: the user's function of (x, y, batch), as a `jax.tree_util.Partial`.
      kind: what a batch of it poses, the class `Minimum` or `FixedPoint`.
      structure: what is declared of the Jacobian F_1 of every batch.

    Example:
      >>> import bilevax as bx
      >>> problem = bx.stochastic_minimum(lambda x, y, batch: 0.5 * y * (x - batch) ** 2)
      >>> float(problem.on_batch(1.0).optimality(2.0, 3.0))
      3.0
    """

    function: Partial
    kind: type[Minimum] | type[FixedPoint] = dataclasses.field(metadata={"static": True})
    structure: Structure = dataclasses.field(metadata={"static": True})

    def on_batch(self, batch: PyTree) -> Problem:
        """Return the problem that one batch poses; its F is an unbiased sample of this one's."""
        return self.kind(Partial(_on_batch, self.function, batch), self.structure)

    def check(self, x: PyTree, y: PyTree, batch: PyTree) -> None:
        """Raise a `TypeError` if the function does not fit x; costs nothing at run time."""
        # Shapes can stand in for the batch, which the function of (x, y) must hold as arrays.
        jax.eval_shape(lambda batch: self.on_batch(batch).check(x, y), batch)


def stochastic_minimum(
    objective: Callable[[PyTree, PyTree, PyTree], jax.Array],
    *,
    structure: Structure = Structure.POSITIVE_DEFINITE,
) -> StochasticProblem:
    """Pose the inner problem x*(y) = argmin over x of f(x, y) = E[f(x, y; batch)].

    Args:
      objective: a function of (x, y, batch) that returns a real scalar whose mean over batches is
        f(x, y). For a mean over examples that is the mean over the batch; penalties are added as
        they are. Else as in `minimum`.
      structure: what is known of the Hessian of every batch. A symmetric one needs no transpose.

    Returns:
      A `StochasticProblem`, a pytree.

    Raises:
      TypeError: if `objective` is not callable or `structure` not a `Structure`; and, once it
        meets x, y and a batch, if it does not return a real scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> import bilevax as bx
      >>> problem = bx.stochastic_minimum(lambda x, y, batch: y * jnp.mean((x - batch) ** 2))
      >>> float(problem.on_batch(jnp.array([1.0, 3.0])).optimality(0.0, 1.0))
      -4.0
    """
    checks.is_component("structure", structure, Structure, "Structure.SYMMETRIC")
    return StochasticProblem(as_partial("objective", objective), Minimum, structure)


def stochastic_fixed_point(
    map: Callable[[PyTree, PyTree, PyTree], PyTree],
    *,
    structure: Structure = Structure.GENERAL,
) -> StochasticProblem:
    """Pose the inner problem x*(y) = T(x*(y), y) with T(x, y) = E[T(x, y; batch)].

    Args:
      map: a function of (x, y, batch) that returns a pytree like x whose mean over batches is
        T(x, y). Else as in `fixed_point`.
      structure: what is known of F_1 = I - T_1 of every batch.

    Returns:
      A `StochasticProblem`, a pytree.

    Raises:
      TypeError: if `map` is not callable or `structure` not a `Structure`; and, once it meets x, y
        and a batch, if what it returns has not the structure, shapes and dtypes of x.

    Example:
      >>> import bilevax as bx
      >>> problem = bx.stochastic_fixed_point(lambda x, y, batch: 0.5 * x + y * batch)
      >>> float(problem.on_batch(1.0).optimality(2.0, 3.0))
      -2.0
    """
    checks.is_component("structure", structure, Structure, "Structure.SYMMETRIC")
    return StochasticProblem(as_partial("map", map), FixedPoint, structure)


def _on_batch(function: Partial, batch: PyTree, x: PyTree, y: PyTree) -> PyTree:
    return function(x, y, batch)
