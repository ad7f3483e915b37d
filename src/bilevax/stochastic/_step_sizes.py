"""Step sizes: a number, or a function of the index of the step."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax._closures import as_partial


def decreasing(beta: Any, gamma: Any) -> Partial:
    """Return the step sizes beta / (gamma + t) of the steps t = 0, 1, 2, ...

    With steps of a constant size, stochastic approximation ends in a cloud around the solution;
    with these it converges, in mean square like 1 / t where beta is large enough.

    Args:
      beta: the numerator. For an inner problem whose F_1 has eigenvalues of at least mu, it must
        be above 1 / (2 mu) for the rate 1 / t; 1 / mu is usual.
      gamma: the number of steps before the sizes start to fall. The first one is beta / gamma.

    Returns:
      A function of t, a pytree with the leaves beta and gamma.

    Raises:
      TypeError: if `beta` or `gamma` is not a number.
      ValueError: if one of them is not positive.

    Example:
      >>> import bilevax as bx
      >>> step_size = bx.decreasing(1.0, 4.0)
      >>> float(step_size(0)), float(step_size(4))
      (0.25, 0.125)
    """
    checks.positive("beta", beta)
    checks.positive("gamma", gamma)
    return Partial(_decreasing, beta, gamma)


def _decreasing(beta: Any, gamma: Any, index: Any) -> jax.Array:
    return jnp.asarray(beta / (gamma + index))


def as_step_size(name: str, step_size: Any) -> Any:
    """Return a step size as a part of a pytree: a number as it is, a function as a `Partial`."""
    if callable(step_size):
        return as_partial(name, step_size)
    checks.positive(name, step_size)
    return step_size


def check_step_size(name: str, step_size: Any) -> None:
    """Raise if a step size is a function that returns anything but one real number."""
    if not callable(step_size):
        return
    size = jax.eval_shape(step_size, jax.ShapeDtypeStruct((), jnp.int32))
    leaves = jax.tree.leaves(size)
    if len(leaves) != 1 or leaves[0] is not size or size.shape != ():
        raise TypeError(f"`{name}` must return a single number, got {checks.describe(size)}.")
    if jnp.issubdtype(size.dtype, jnp.complexfloating):
        raise TypeError(f"`{name}` must return a real number, got {checks.describe(size)}.")


def size_of(step_size: Any, index: jax.Array) -> Any:
    """Return the size of the step with this index."""
    return step_size(index) if callable(step_size) else step_size
