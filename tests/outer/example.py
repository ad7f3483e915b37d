"""Ridge regression with one penalty per weight, whose hypergradient has a closed form.

    f(x, y) = |A x - B|^2 / 2 + sum(exp(y) x^2) / 2
    g(x, y) = |C x - E|^2 / 2 + |y|^2 / 20

The formulas by NumPy share no code with the library.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

import bilevax as bx

RNG = np.random.default_rng(11)
WEIGHTS = np.array([2.0, -1.0, 0.3])
A, C = RNG.normal(size=(8, 3)) / 2, RNG.normal(size=(6, 3)) / 2
B = A @ WEIGHTS + 0.3 * RNG.normal(size=8)
E = C @ WEIGHTS + 0.3 * RNG.normal(size=6)
X0, Y = np.zeros(3), np.array([0.4, -0.3, 0.1])
LARGEST = 2.0 / (np.linalg.norm(A, 2) ** 2 + np.exp(2.0))  # a rate for y below 2
SGD, ADAM = optax.sgd(0.3), optax.adam(0.1)


def inner(x, y):
    # Constants in the dtype of x, so that float32 is not computed in float64.
    misfit = jnp.asarray(A, x.dtype) @ x - jnp.asarray(B, x.dtype)
    return misfit @ misfit / 2 + jnp.sum(jnp.exp(y) * x**2) / 2


def outer(x, y):
    misfit = jnp.asarray(C, x.dtype) @ x - jnp.asarray(E, x.dtype)
    return misfit @ misfit / 2 + jnp.sum(y**2) / 20


DESCENT = bx.GradientDescent(LARGEST / 2)
EXACT = bx.GradientDescent(LARGEST / 2, rtol=1e-13)


def make_engine(solver=EXACT, rule=None, problem=None, function=outer, **options):
    problem = bx.minimum(inner) if problem is None else problem
    rule = bx.Implicit(bx.Dense()) if rule is None else rule
    return bx.value_and_hypergradient(function, problem, solver, rule, **options)


ENGINE, LOOSE = make_engine(), make_engine(DESCENT)
STEP = bx.make_step(ENGINE, SGD)


@functools.partial(jax.jit, static_argnames="steps")
def scanned(step, state, steps):
    """Take steps in one compiled loop, and return all states."""
    return jax.lax.scan(lambda state, _: (step(state),) * 2, state, length=steps)[1]


def readable(tree):
    """Return a pytree with PRNG keys as numbers."""

    def convert(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    return jax.tree.map(convert, tree)


def assert_equal(got, want):
    """Assert that two pytrees have the same bits."""
    jax.tree.map(np.testing.assert_array_equal, readable(got), readable(want))


# By NumPy.


def truth(y):
    """Return x*, v, h(y) and its gradient."""
    y = np.asarray(y, float)
    matrix = A.T @ A + np.diag(np.exp(y))
    x = np.linalg.solve(matrix, A.T @ B)
    v = np.linalg.solve(matrix, C.T @ (C @ x - E))
    return x, v, np.sum((C @ x - E) ** 2) / 2 + y @ y / 20, y / 10 - np.exp(y) * x * v


def residual(x, y):
    return np.linalg.norm(A.T @ (A @ x - B) + np.exp(y) * x)


def minimiser(**options):
    """Return the minimiser of h by SciPy, with bounds or constraints."""
    method = "SLSQP" if options else "BFGS"
    tolerance = {"ftol": 1e-15, "maxiter": 500} if options else {"gtol": 1e-10}
    found = scipy.optimize.minimize(
        lambda y: truth(y)[2], Y, jac=lambda y: truth(y)[3], method=method, options=tolerance,
        **options,
    )  # fmt: skip
    return found.x


def sgd_loop(y, steps, rate=0.3, projection=lambda y: y):
    """Return the points of gradient descent, one more than steps, and values and gradients."""
    points, values, gradients = [np.asarray(y, float)], [], []
    for _ in range(steps):
        _, _, value, gradient = truth(points[-1])
        values.append(value)
        gradients.append(gradient)
        points.append(projection(points[-1] - rate * gradient))
    return np.array(points), np.array(values), np.array(gradients)
