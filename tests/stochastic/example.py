"""Ridge regression with random penalties: every partial derivative differs from batch to batch.

    f(x, y) = mean over i of (a_i x - b_i)^2 / 2 + sum(w_i exp(y) x^2) / 2
    g(x, y) = mean over j of (c_j x - e_j)^2 / 2 + u_j y + |y|^2 / 10

The functions take batches; the formulas by NumPy take the indices of examples and share no code
with them.
"""

import jax.numpy as jnp
import numpy as np

import bilevax as bx

RNG = np.random.default_rng(7)
A, C = RNG.normal(size=(12, 3)), RNG.normal(size=(8, 3))
TRAIN = {
    "a": A,
    "b": A @ np.array([2.0, -1.5, 1.0]) + 0.3 * RNG.normal(size=12),
    "w": RNG.uniform(0.2, 1.8, size=(12, 3)),
}
VALIDATION = {
    "c": C,
    "e": C @ np.array([3.0, -0.5, 1.5]) + 0.3 * RNG.normal(size=8),
    "u": 0.2 * RNG.normal(size=(8, 3)),
}
X0, Y = np.zeros(3), np.array([-0.4, 0.3, 0.1])
ALL, ALL_OUTER = np.arange(12), np.arange(8)


def objective(x, y, batch):
    misfit = jnp.mean((batch["a"] @ x - batch["b"]) ** 2) / 2
    return misfit + jnp.sum(jnp.mean(batch["w"], axis=0) * jnp.exp(y) * x**2) / 2


def outer(x, y, batch):
    misfit = jnp.mean((batch["c"] @ x - batch["e"]) ** 2) / 2
    return misfit + jnp.mean(batch["u"] @ y) + jnp.sum(y**2) / 10


def exact_outer(x, y):
    return outer(x, y, VALIDATION)


def make(function=outer, problem=None, sampler=None, outer_sampler="uniform", **options):
    if outer_sampler == "uniform":
        outer_sampler = bx.UniformSampler(VALIDATION, batch_size=2)
    numbers = {
        "inner_steps": 4,
        "adjoint_steps": 5,
        "samples": 3,
        "inner_step_size": 0.1,
        "adjoint_step_size": 0.2,
    }
    return bx.stochastic_hypergradient(
        function,
        bx.stochastic_minimum(objective) if problem is None else problem,
        sampler=bx.UniformSampler(TRAIN, batch_size=2) if sampler is None else sampler,
        outer_sampler=outer_sampler,
        **(numbers | options),
    )


# By NumPy, averages over the examples with these indices.


def optimality(x, y, i):
    a, b, w = TRAIN["a"][i], TRAIN["b"][i], TRAIN["w"][i]
    return a.T @ (a @ x - b) / len(i) + w.mean(axis=0) * np.exp(y) * x


def jacobian(y, i):
    a, w = TRAIN["a"][i], TRAIN["w"][i]
    return a.T @ a / len(i) + np.diag(w.mean(axis=0) * np.exp(y))


def pullback(x, y, v, i):
    return TRAIN["w"][i].mean(axis=0) * np.exp(y) * x * v


def outer_terms(x, y, j):
    c, e, u = VALIDATION["c"][j], VALIDATION["e"][j], VALIDATION["u"][j]
    value = np.mean((c @ x - e) ** 2) / 2 + np.mean(u @ y) + y @ y / 10
    return value, c.T @ (c @ x - e) / len(j), u.mean(axis=0) + y / 5


def truth(y):
    """Return x*, v, the value and the gradient of h in closed form."""
    matrix = jacobian(y, ALL)
    x = np.linalg.solve(matrix, TRAIN["a"].T @ TRAIN["b"] / 12)
    value, cotangent_x, cotangent_y = outer_terms(x, y, ALL_OUTER)
    v = np.linalg.solve(matrix, cotangent_x)
    return x, v, value, cotangent_y - pullback(x, y, v, ALL)
