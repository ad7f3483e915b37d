"""Small problems with known solutions, and one way to solve them all."""

import jax
import jax.numpy as jnp
import numpy as np

import bilevax as bx
from tests.linear.systems import with_spectrum


def quadratic(x, y):
    matrix, b = y
    return 0.5 * x @ matrix @ x - b @ x


def affine(x, y):
    matrix, b = y
    return matrix @ x - b


def contraction(x, y):
    matrix, b = y
    return matrix @ x + b


def rosenbrock(x, y):
    return (1 - x[0]) ** 2 + y * (x[1] - x[0] ** 2) ** 2


def smooth(x, y):
    """A strongly convex function of x in R^3 that is not quadratic."""
    return jnp.sum(jnp.log(jnp.cosh(MIX @ x - y))) + 0.25 * jnp.sum(x**2) + 0.1 * jnp.sum(x)


MIX = np.array([[1.0, 0.3, -0.2], [0.1, 0.8, 0.4], [-0.5, 0.2, 1.1]])

# Module-level problems: the same function object is compiled once.
QUADRATIC = bx.minimum(quadratic)
AFFINE = bx.root(affine)
CONTRACTION = bx.fixed_point(contraction)
ROSENBROCK = bx.minimum(rosenbrock)
SMOOTH = bx.minimum(smooth)

SIZE = 4
MATRIX = with_spectrum(np.linspace(1.0, 4.0, SIZE))
B = np.random.default_rng(1).normal(size=SIZE)
X0 = np.random.default_rng(2).normal(size=SIZE)
SOLUTION = np.linalg.solve(MATRIX, B)


def solve(solver, problem=QUADRATIC, x0=X0, y=(MATRIX, B)):
    """Return x and the report as NumPy values, with the status as a `Status`."""
    x, report = bx.solution_map(problem, solver).with_report(x0, y)
    report = jax.tree.map(np.asarray, report)
    return np.asarray(x), report._replace(status=bx.Status(int(report.status)))


def exactly(steps):
    """Return the settings under which a solver takes this many steps."""
    return {"rtol": 0.0, "atol": 0.0, "maxiter": steps}
