"""What becomes of results that could not be computed: returned as they are, NaN, or an error."""

import enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevax._status import Status

PyTree = Any


class OnFailure(enum.Enum):
    """What a solution map does when a solve fails.

    Attributes:
      RETURN: hand back what there is; the report tells.
      NAN: put NaN in its place, per batch lane. To see why, use RAISE, or read a report.
      RAISE: raise an error that names the status and the remedy, also from compiled programs
        (through a callback to the host, which the device must support).

    Example:
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: -y * x**2)  # has no minimum
      >>> solve = bx.solution_map(problem, solver=bx.GradientDescent(1.0))
      >>> float(solve(1.0, 1.0))
      nan
    """

    RETURN = "return"
    NAN = "nan"
    RAISE = "raise"


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
    """
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
