"""What becomes of results that could not be computed: returned as they are, NaN, or an error."""

import enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import _trees as trees
from bilevax._status import Status

PyTree = Any


class OnFailure(enum.Enum):
    """What a solution map does when a solve fails.

    Attributes:
      RETURN: hand back what there is; the report tells.
      NAN: put NaN in its place, per batch lane. To see why, use RAISE, or read a report.
      RAISE: raise an error that names the status and the remedy, also from compiled programs
        (through a callback to the host, which the device must support).
      DROP: leave tasks of a `separable` problem that fail out of the derivative, exactly, and go on
        with the others. A dropped task is a constant: it stands at its start where its inner solve
        failed, and at the inner solution where that was solved. `report.dropped` tells which they
        are, so that g may mask them. NaN if all are dropped.

    Example:
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: -y * x**2)  # has no minimum
      >>> solve = bx.solution_map(problem, solver=bx.GradientDescent(1.0))
      >>> float(solve(1.0, 1.0))
      nan

      Of three tasks, the second has no minimum:

      >>> import jax
      >>> import jax.numpy as jnp
      >>> tasks = bx.separable(
      ...     bx.minimum(lambda x, y, a: a * x**2 / 2 - y * x), jnp.array([1.0, -1.0, 2.0])
      ... )
      >>> solve = bx.solution_map(tasks, bx.GradientDescent(0.5), on_failure=bx.OnFailure.DROP)
      >>> def loss(y):
      ...     x, report = solve.with_report(jnp.zeros(3), y)
      ...     return jnp.sum(jnp.where(report.dropped, 0.0, x)), report.dropped
      >>> gradient, dropped = jax.grad(loss, has_aux=True)(3.0)
      >>> round(float(gradient), 4), int(dropped.sum())  # 1 + 1/2
      (1.5, 1)
    """

    RETURN = "return"
    NAN = "nan"
    RAISE = "raise"
    DROP = "drop"


class SolveError(RuntimeError):
    """A solve failed and `OnFailure.RAISE` was chosen.

    It is raised on the host while a compiled program runs, so JAX hands it on as a
    `jax.errors.JaxRuntimeError` that quotes it: that, or `RuntimeError`, is what to catch.
    """


def guard(policy: OnFailure, what: str, failed: jax.Array, status: jax.Array, value: PyTree) -> Any:
    """Return the value, with the policy applied where `failed` holds.

    Args:
      policy: see `OnFailure`.
      what: names the solve in the error.
      failed: a scalar boolean.
      status: the status code to quote.
      value: a pytree; only floating leaves can be NaN.

    Raises:
      ValueError: under DROP, for something that is not one of many.
    """
    if policy is OnFailure.DROP:
        raise ValueError(
            f"A {what} by itself cannot be dropped: `OnFailure.DROP` is for tasks of a `separable` "
            "problem, in a solution map or an engine. Take `OnFailure.NAN` or `RETURN`."
        )
    if policy is OnFailure.RETURN:
        return value
    if policy is OnFailure.RAISE:

        def check(failed: Any, status: Any) -> Any:
            for code in np.asarray(status)[np.asarray(failed)].reshape(-1)[:1]:
                name, remedy = Status(int(code)).name, Status(int(code)).remedy
                raise SolveError(f"The {what} ended with status {name}: {remedy}.")
            return np.zeros(np.shape(failed), bool)

        shape = jax.ShapeDtypeStruct((), bool)
        failed = failed | jax.pure_callback(check, shape, failed, status, vmap_method="expand_dims")

    def poison(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):  # float0, keys and integers
            return leaf
        return jnp.where(failed, jnp.nan, 1).astype(leaf.dtype) * leaf

    return jax.tree.map(poison, value)


@jax.custom_jvp
def with_slope(factor: jax.Array, value: PyTree, x: PyTree) -> PyTree:
    """Return a value with the derivative of x times a factor: zero, or NaN where none is known."""
    return value


@with_slope.defjvp
def _with_slope_jvp(primals: Any, tangents: Any) -> tuple[PyTree, PyTree]:
    return primals[1], trees.scale(primals[0], tangents[2])
