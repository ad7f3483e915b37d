"""Schedules: the tolerances and counts of the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from tests.outer.example import (
    DESCENT,
    LARGEST,
    SGD,
    X0,
    A,
    B,
    C,
    E,
    Y,
    make_engine,
    scanned,
)

DEFAULT = np.finfo(float).eps ** 0.75
S = np.arange(12)
FORMULAS = [
    (bx.Constant(3e-7), np.full(12, 3e-7)),
    (bx.Constant(), np.full(12, DEFAULT)),
    (bx.Geometric(1e-3, 0.1), np.maximum(1e-3 * 0.1**S, DEFAULT)),
    (bx.Geometric(1e-3, 0.1, smallest=1e-7), np.maximum(1e-3 * 0.1**S, 1e-7)),
    (bx.Harmonic(1e-4, 3.0), 1e-4 / (S + 1.0) ** 3),
    (bx.Harmonic(1e-4, 9, smallest=1e-9), np.maximum(1e-4 / (S + 1.0) ** 9, 1e-9)),
]


@pytest.mark.parametrize(("schedule", "want"), FORMULAS, ids=repr)
def test_tolerances_are_those_of_the_formulas(schedule, want):
    efforts = [schedule.effort((), jnp.int32(s), X0).rtol for s in S]
    got = [DEFAULT if rtol is None else rtol for rtol in efforts]
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_a_run_solves_to_the_tolerances_of_its_schedule():
    step = bx.make_step(make_engine(DESCENT), SGD, schedule=bx.Geometric(1e-3, 0.3), warm_x=False)
    history = scanned(step, step.init(Y, X0, history=12), 12).history
    rtol = history.rtol[-1]
    np.testing.assert_allclose(rtol, 1e-3 * 0.3**S, rtol=1e-12)
    residuals, initial = history.inner_residual[-1], np.linalg.norm(A.T @ B)
    assert np.all(residuals <= rtol * initial * (1 + 1e-12))
    # Gradient descent stops at once where it is there, a step before it is not.
    assert np.all(residuals > 0.3 * rtol * initial)


@pytest.mark.parametrize(
    "rule", [bx.Implicit(bx.CG()), bx.Implicit(bx.Neumann(1, step_size=LARGEST / 2))]
)
def test_a_logarithmic_schedule_counts_steps_of_both_solves(rule):
    schedule = bx.Logarithmic(2.5)
    step = bx.make_step(make_engine(DESCENT, rule), SGD, schedule=schedule, warm_adjoint=False)
    state = scanned(step, step.init(Y, X0, history=8), 8)
    history = jax.tree.map(lambda leaf: leaf[-1], state.history)
    want = np.ceil(2.5 * np.log(np.arange(1, 9) + 1))  # from 2 to 6
    np.testing.assert_array_equal(history.inner_iterations, want)
    np.testing.assert_array_equal(history.rtol, 0)
    np.testing.assert_array_equal(history.status, bx.Status.TRUNCATED)
    is_series = isinstance(rule.linear_solver, bx.Neumann)
    if is_series:  # terms, of which the first one costs no product
        np.testing.assert_array_equal(history.adjoint_iterations, want - 1)
    else:  # conjugate gradients in three dimensions are done after three, to rounding
        np.testing.assert_array_equal(history.adjoint_iterations[:2], want[:2])
        assert np.all(history.adjoint_iterations <= want)
    x, y = X0, Y
    for number in range(2):
        matrix = A.T @ A + np.diag(np.exp(y))
        for _ in range(int(want[number])):
            x = x - LARGEST / 2 * (matrix @ x - A.T @ B)
        np.testing.assert_allclose(state.warm.x[number], x, rtol=1e-12)
        v = np.zeros(3)
        for _ in range(int(want[number])):
            v = v - LARGEST / 2 * (matrix @ v - C.T @ (C @ x - E))
        if is_series:
            np.testing.assert_allclose(state.warm.adjoint[number], v, rtol=1e-12)
        y = state.y[number]
