"""Corrections of rounding size, where F_1 is singular along a direction that changes nothing.

Potentials of entropic transport are a root of the errors of both marginals. Adding a number to one
potential and taking it from the other changes nothing, so F_1 has no inverse, and F no part along
that direction but for rounding.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from bilevax import Status

ROWS, COLUMNS = 4, 3
_generator = np.random.default_rng(0)
COST = _generator.uniform(size=(ROWS, COLUMNS))
A, B = _generator.dirichlet(np.ones(ROWS)), _generator.dirichlet(np.ones(COLUMNS))
Y = 0.2


def plan(x, y):
    return jnp.exp((x["f"][:, None] + x["g"] - COST) / y)


def marginal_errors(x, y):
    return {"f": plan(x, y).sum(axis=1) - A, "g": plan(x, y).sum(axis=0) - B}


def transport_cost(x, y):
    return jnp.sum(plan(x, y) * COST)


PROBLEM = bx.root(marginal_errors)
RULE = bx.Preconditioned(bx.Implicit(), bx.NewtonStep())
ZERO = {"f": np.zeros(ROWS), "g": np.zeros(COLUMNS)}


def sinkhorn(y):
    """Return the potentials by Sinkhorn's iterations."""
    kernel, u, v = np.exp(-COST / y), np.ones(ROWS), np.ones(COLUMNS)
    for _ in range(2000):
        u = A / (kernel @ v)
        v = B / (kernel.T @ u)
    return {"f": y * np.log(u), "g": y * np.log(v)}


def true_cost(y):
    x = sinkhorn(y)
    return np.sum(np.exp((x["f"][:, None] + x["g"] - COST) / y) * COST)


SLOPE = (true_cost(Y + 1e-5) - true_cost(Y - 1e-5)) / 2e-5  # to 1e-9 or so


def test_a_map_whose_solution_has_a_direction_to_spare():
    solve = bx.solution_map(PROBLEM, bx.Newton(), RULE)

    def loss(y):
        x, report = solve.with_report(ZERO, y)
        return transport_cost(x, y), report

    (value, report), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(Y)
    assert (report.status, report.correction.status) == (Status.CONVERGED, Status.CONVERGED)
    np.testing.assert_allclose(value, true_cost(Y), rtol=1e-10)
    np.testing.assert_allclose(slope, SLOPE, rtol=1e-6)


@pytest.mark.parametrize("distance", [0.0, 1e-16, 1e-14, 1e-12, 1e-10, 1e-6])
@pytest.mark.parametrize("gauge", [0.0, 1.0])
def test_a_correction_of_any_size(distance, gauge):
    exact = sinkhorn(Y)
    generator = np.random.default_rng(1)
    x = {
        "f": exact["f"] + gauge + distance * generator.normal(size=ROWS),
        "g": exact["g"] - gauge + distance * generator.normal(size=COLUMNS),
    }
    refined, report = RULE.refine(PROBLEM, x, Y)
    assert report.status == Status.CONVERGED
    # ||F_1|| is at most 2 / y; potentials of size ||x|| are known to eps ||x||.
    noise = 50 * 2.0**-52 * (1 + gauge) * 2 / Y
    left = np.concatenate(list(marginal_errors(refined, Y).values()))
    assert np.linalg.norm(left) <= noise + 100 * distance**2
    # It does not wander off along the direction to spare.
    moved = np.concatenate([np.ravel(refined[name] - x[name]) for name in "fg"])
    assert np.linalg.norm(moved) <= 1e3 * distance + 1e-9
