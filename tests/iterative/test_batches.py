"""Lanes of a batch are runs by themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import Status
from tests.everyday import params
from tests.iterative.example import (
    DECOUPLED,
    X0,
    C,
    Y,
    assert_close,
    curved,
    descend,
    exactly,
)

LANES_X0 = np.array([[0.9, 0.1], [0.5, 2.0], [0.4, 0.6], [0.3, 1.0], [0.0, 0.0]])
CURVATURES = np.array([[1.0, 2.0], [2.0, 0.5], [0.7, 1.9], [200.0, 1.0], [0.01, 3.0]])
# 1: a start at the solution, F = 0. 3: diverges with a rate of 0.4. 4: very slow.


CURVED = bx.minimum(curved)
BATCHED = {  # solver, rule, whether a lane diverges
    "gradient descent": (bx.GradientDescent(0.4, maxiter=40), bx.Unrolled(), True),
    "momentum": (
        bx.Optax(optax.sgd(0.4, momentum=0.1), maxiter=40),
        bx.Unrolled(3, checkpoints=2),
        True,
    ),
    "Anderson": (bx.FixedPointIteration(0.4, memory=1, maxiter=40), bx.Unrolled(3), False),
    "Newton": (bx.Newton(maxiter=40), bx.Unrolled(), False),
    "backtracking": (
        bx.GradientDescent(bx.Backtracking(), maxiter=40),
        bx.Unrolled(checkpoints=5),
        False,
    ),
    "conjugate gradient": (bx.ConjugateGradient(maxiter=40), bx.Unrolled(1), False),
}


# Lanes of Anderson's method and of conjugate gradients, whose line search is that of
# backtracking, are in tests/solvers; without derivatives.
EVERYDAY = ("gradient descent", "momentum", "Newton")


@pytest.mark.parametrize("name", params(zip(BATCHED, strict=True), EVERYDAY.__contains__))
def test_lanes_of_a_batch_are_runs_by_themselves(name):
    solver, rule, diverges = BATCHED[name]
    solve = bx.solution_map(CURVED, solver, rule, on_failure=bx.OnFailure.NAN)

    def value(x0, y):
        x, report = solve.with_report(x0, y)
        if diverges:
            x = solve(x0, y)  # where the policy applies
        return x @ C[:2], report

    derivative = jax.value_and_grad(value, (0, 1), has_aux=True)
    (values, reports), gradients = batch = jax.jit(jax.vmap(derivative))(LANES_X0, CURVATURES)
    alone = jax.jit(derivative)
    for lane in range(len(LANES_X0)):
        got = jax.tree.map(lambda leaf, lane=lane: leaf[lane], batch)
        assert_close(got, alone(LANES_X0[lane], CURVATURES[lane]), 1e-12)
    failed = [diverges and lane == 3 for lane in range(len(LANES_X0))]
    assert [status == Status.DIVERGED for status in reports.status] == failed
    assert np.isnan(values).tolist() == failed
    assert np.isnan(gradients[1]).any(axis=1).tolist() == failed
    # Lanes stop at different steps; Newton needs one, for the objective is quadratic.
    assert len(set(reports.iterations.tolist())) >= (2 if name == "Newton" else 3)
    # A start at the solution: a run of no steps, whose derivative is that of its start.
    assert (reports.status[1], reports.iterations[1]) == (Status.CONVERGED, 0)
    np.testing.assert_array_equal(gradients[1][1], np.zeros(2))


def test_batches_of_rates_and_batches_of_batches():
    def value(rate, x0, y):
        solver = bx.GradientDescent(rate, **exactly(5))
        return C @ bx.solution_map(DECOUPLED, solver, bx.Unrolled(checkpoints=2))(x0, y)

    rates, ys = np.array([0.1, 0.3]), np.stack([Y, Y - 0.2, 2 * Y])
    over_ys = jax.vmap(jax.grad(value, (0, 2)), (None, None, 0))
    by_rate, by_y = jax.jit(jax.vmap(over_ys, (0, None, None)))(rates, X0, ys)
    total = jax.jit(jax.grad(lambda ys: jnp.sum(jax.vmap(lambda y: value(0.3, X0, y))(ys))))(ys)
    for i, rate in enumerate(rates):
        for j, y in enumerate(ys):
            _, (_, want_y, want_rate) = descend(X0, y, rate, 5)
            np.testing.assert_allclose(by_rate[i, j], C @ want_rate, rtol=1e-12)
            np.testing.assert_allclose(by_y[i, j], C * want_y, rtol=1e-12)
    np.testing.assert_allclose(total, by_y[1], rtol=1e-12)
