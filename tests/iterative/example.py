"""A problem whose runs of gradient descent have a closed form, and what the tests here share."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import bilevax as bx


def decoupled(x, y):
    """Return f with F = exp(y) x - 1 entry by entry, so x* = exp(-y)."""
    return jnp.sum(jnp.exp(y) * x**2 / 2 - x)


def affine_map(x, y):
    """Return x - F(x, y) / 2 for the same F."""
    return x - (jnp.exp(y) * x - 1) / 2


DECOUPLED = bx.minimum(decoupled)
AFFINE_MAP = bx.fixed_point(affine_map)
X0 = np.array([0.9, -0.4, 0.2])
Y = np.array([0.1, 0.4, -0.3])
C = np.array([1.0, -2.0, 0.7])


def exactly(steps):
    """Return the settings under which a solver takes this many steps."""
    return {"rtol": 0.0, "atol": 0.0, "maxiter": steps}


def descend(x, y, rate, steps, last=None):
    """Run gradient descent on `decoupled` in NumPy.

    Returns:
      The iterates, and the derivatives of the last one with respect to x0, y and the rate, entry by
      entry: dx_{k+1} = (1 - rate exp(y)) dx_k + S_2. With `last`, the iterate before that many
      steps is a constant.
    """
    x, y, curvature = np.asarray(x, float), np.asarray(y, float), np.exp(y)
    iterates, by_x0, by_y, by_rate = [x], np.ones_like(x), np.zeros_like(x), np.zeros_like(x)
    for k in range(steps):
        if last is not None and k == max(0, steps - last):
            by_x0, by_y, by_rate = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
        residual, factor = curvature * x - 1, 1 - rate * curvature
        by_x0, by_y = factor * by_x0, factor * by_y - rate * curvature * x
        by_rate = factor * by_rate - residual
        x = x - rate * residual
        iterates.append(x)
    if last is not None:
        by_x0 = np.zeros_like(x)
    return iterates, (by_x0, by_y, by_rate)


def central_differences(function, point, step=1e-3):
    """Return the gradient of a scalar function of a pytree, with an error of order step^4.

    The function is called once, on all points at a time: it maps a leading axis.
    """
    flat, unravel = ravel_pytree(point)
    flat = np.asarray(flat, float)
    directions = step * np.eye(flat.size)
    offsets = np.concatenate([k * directions for k in (1, -1, 2, -2)])
    values = np.asarray(function(jax.vmap(unravel)(flat + offsets)))
    near, opposite, far, far_opposite = values.reshape(4, flat.size)
    return unravel((8 * (near - opposite) - (far - far_opposite)) / (12 * step))


def assert_close(got, wanted, rtol, atol=None):
    """Compare two pytrees, leaf by leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for (path, leaf), want in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_allclose(
            leaf,
            want,
            rtol=rtol,
            atol=rtol if atol is None else atol,
            err_msg=jax.tree_util.keystr(path),
        )
