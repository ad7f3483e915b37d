"""Example problems of the tests of the solution map, and their solutions by NumPy."""

import jax.numpy as jnp
import numpy as np

import bilevax as bx

# min over x of x H x / 2 + sum(y x^2) / 2 - <target, x>, and the outer objective <C, x>.
H = np.array([[2.0, 0.5], [0.5, 1.0]])
C = np.array([1.0, -2.0])
Y = np.array([0.5, 1.5])
TARGET = np.array([1.0, 3.0])
SOLVER = bx.GradientDescent(0.4)


def objective(x, y, target=TARGET):
    # Constants in the dtype of x, so that float32 is not computed in float64.
    matrix, target = jnp.asarray(H, x.dtype), jnp.asarray(target, x.dtype)
    return x @ matrix @ x / 2 + jnp.sum(y * x**2) / 2 - target @ x


def truth(y=Y, target=TARGET):
    """Return x*, and the gradients of <C, x*> in y and in the target."""
    x, v = np.linalg.solve(H + np.diag(y), np.stack([target, C], axis=1)).T
    return x, -v * x, v


def central_difference(function, at, step=1e-5):
    """Return the Jacobian of a NumPy function, the last axes being those of `at`."""
    columns = []
    for i in range(at.size):
        shift = np.zeros(at.size)
        shift[i] = step
        shift = shift.reshape(at.shape)
        columns.append((function(at + shift) - function(at - shift)) / (2 * step))
    return np.stack(columns, axis=-1).reshape(*np.shape(columns[0]), *at.shape)


def outer(y, target, solver=SOLVER, rule=None):
    """Return <C, x*(y)> with a target that the objective closes over."""
    problem = bx.minimum(lambda x, y: objective(x, y, target))
    return C @ bx.solution_map(problem, solver, rule)(jnp.zeros(2), y)
