"""A problem whose runs of gradient descent have a closed form, and what the tests here share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import bilevax as bx
from tests.problems_table import PROBLEMS, outer


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
      steps is a constant, unless it is the start.
    """
    x, y, curvature = np.asarray(x, float), np.asarray(y, float), np.exp(y)
    iterates, by_x0, by_y, by_rate = [x], np.ones_like(x), np.zeros_like(x), np.zeros_like(x)
    for k in range(steps):
        if last is not None and 0 < k == steps - last:
            by_x0, by_y, by_rate = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
        residual, factor = curvature * x - 1, 1 - rate * curvature
        by_x0, by_y = factor * by_x0, factor * by_y - rate * curvature * x
        by_rate = factor * by_rate - residual
        x = x - rate * residual
        iterates.append(x)
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


MINIMUM, ROOT, FIXED_POINT = (row.problem for row in PROBLEMS)
# name: (problem, numbers, solver from numbers and settings)
RUNS = {
    "gradient descent": (ROOT, [0.7], lambda n, s: bx.GradientDescent(n[0], **s)),
    "accelerated": (MINIMUM, [0.4], lambda n, s: bx.AcceleratedGradient(n[0], **s)),
    "backtracking": (MINIMUM, [], lambda n, s: bx.GradientDescent(bx.Backtracking(), **s)),
    "damped Picard": (FIXED_POINT, [0.6], lambda n, s: bx.FixedPointIteration(n[0], **s)),
    "Anderson": (FIXED_POINT, [0.8], lambda n, s: bx.FixedPointIteration(n[0], memory=2, **s)),
    "momentum": (
        MINIMUM,
        [0.3, 0.4],
        lambda n, s: bx.Optax(optax.sgd(n[0], momentum=n[1]), **s),
    ),
    "Adam": (
        MINIMUM,
        [0.1],
        lambda n, s: bx.Optax(optax.scale_by_adam(eps_root=1e-8), n[0], **s),
    ),
    "Newton": (MINIMUM, [], lambda n, s: bx.Newton(bx.Dense(), **s)),
    "Newton on a root": (ROOT, [], lambda n, s: bx.Newton(bx.Dense(), **s)),
    "conjugate gradient": (MINIMUM, [], lambda n, s: bx.ConjugateGradient(**s)),
}
# Newton and its kin are at the solution after a few steps, where line searches are decided by
# rounding; an early stop comes one step later.
FAST = ("Newton", "conjugate gradient")


def steps_of(name):
    return 2 if name.startswith(FAST) else 5


def run_of(name, rule, settings):
    """Return the value of g after a run, and the report, as a function of everything."""
    problem, _, make = RUNS[name]

    def run(point):
        x0, y, numbers = point
        solver = make([numbers[i] for i in range(len(RUNS[name][1]))], settings)
        solve = bx.solution_map(problem, solver, rule, on_failure=bx.OnFailure.RETURN)
        x, report = solve.with_report(x0, y)
        return outer(x, y), report

    return run


def curved(x, y):
    return jnp.sum(y * x**2 / 2 - x)


def noisy(x, y):
    return decoupled(x, y["w"][y["index"]]) + 1e-3 * jax.random.normal(y["key"], x.shape) @ x


NOISY_Y = {"w": jnp.array([0.1, 0.4, -0.3]), "index": jnp.array([2, 0]), "key": jax.random.key(0)}
