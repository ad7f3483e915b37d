"""Warm starts: what solves start from, and why an inner solve always gets on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from tests.outer.example import (
    LARGEST,
    SGD,
    X0,
    Y,
    assert_equal,
    make_engine,
    minimiser,
    residual,
    scanned,
    truth,
)

ROUGH = make_engine(bx.GradientDescent(LARGEST / 2, rtol=0.3), bx.Implicit(bx.CG(rtol=1e-3)))


@pytest.mark.parametrize(("warm_x", "warm_adjoint"), [(False, False), (False, True)])
def test_cold_steps_equal_calls_of_the_engine(warm_x, warm_adjoint):
    step = bx.make_step(ROUGH, SGD, warm_x=warm_x, warm_adjoint=warm_adjoint)
    states = scanned(step, step.init(Y, X0, history=4), 4)
    y, adjoint = jnp.asarray(Y), jnp.zeros(3)
    for number in range(4):
        warm = bx.cold_start(X0)._replace(adjoint=adjoint)
        result = ROUGH(y, warm)
        history = jax.tree.map(lambda leaf, number=number: leaf[-1][number], states.history)
        assert history.value == result.value
        assert history.inner_iterations == result.report.inner.iterations
        assert history.adjoint_iterations == result.report.adjoint.iterations
        assert history.inner_residual == result.report.inner.residual
        assert history.adjoint_residual == result.report.adjoint.residual
        got = jax.tree.map(lambda leaf, number=number: leaf[number], states.warm)
        assert_equal(got, result.warm)
        y = y - 0.3 * result.gradient
        np.testing.assert_allclose(states.y[number], y, rtol=1e-14)
        adjoint = result.warm.adjoint if warm_adjoint else adjoint


def test_a_loose_tolerance_freezes_a_naive_warm_start_but_not_a_step():
    engine = make_engine(bx.GradientDescent(LARGEST / 2, rtol=0.4))
    y, warm, points = jnp.asarray(Y), bx.cold_start(X0), []
    for _ in range(60):  # the naive loop: x starts where it is, at a tolerance that it meets
        result = engine(y, warm)
        y, warm = y - 0.1 * result.gradient, result.warm
        points.append(np.asarray(result.x))
    assert np.all(np.array(points[1:]) == points[-1])  # x is frozen after the second solve
    assert truth(y)[2] > truth(Y)[2] + 0.2  # and the loss has risen

    step, best = bx.make_step(engine, optax.sgd(0.5)), minimiser()
    state = jax.lax.fori_loop(0, 400, lambda _, state: step(state), step.init(Y, X0))
    np.testing.assert_allclose(state.y, best, atol=1e-5)
    np.testing.assert_allclose(state.history.value[399], truth(best)[2], rtol=1e-8)


def test_each_solve_at_least_halves_the_residual_that_it_starts_with():
    step = bx.make_step(ROUGH, SGD, schedule=bx.Constant(0.2))
    states = scanned(step, step.init(Y, X0), 40)
    ys, xs = np.concatenate([Y[None], states.y[:-1]]), np.concatenate([X0[None], states.warm.x])
    before = np.array([residual(x, y) for x, y in zip(xs[:-1], ys, strict=True)])
    after = np.array([residual(x, y) for x, y in zip(xs[1:], ys, strict=True)])
    cold = np.array([residual(X0, y) for y in ys])
    history = jax.tree.map(lambda leaf: leaf[-1][:40], states.history)
    np.testing.assert_allclose(history.inner_residual, after, rtol=1e-8)
    assert np.all(after <= 0.5 * before * (1 + 1e-9))
    np.testing.assert_allclose(history.rtol, np.minimum(0.2, 0.5 * before / cold), rtol=1e-8)
    assert np.all(history.inner_iterations > 0)
    # It is the safeguard that makes them small: the tolerance alone has them at 0.2.
    assert history.rtol[0] == 0.2 and np.max(history.rtol[20:]) < 1e-2


def test_of_several_tasks_the_worst_off_gets_on():
    tasks = {"shift": np.array([0.0, 1.0, -2.0]), "scale": np.array([1.0, 0.5, 2.0])}
    inner = bx.minimum(
        lambda x, y, task: task["scale"] * (x - y[0] - task["shift"]) ** 2 / 2 + y[1] ** 2 * x**2
    )
    engine = bx.value_and_hypergradient(
        lambda x, y: jnp.sum((x - 1.0) ** 2) + jnp.sum(y**2),
        bx.separable(inner, tasks),
        bx.GradientDescent(0.2, rtol=0.2),
        bx.Implicit(bx.Dense()),
    )
    step = bx.make_step(engine, SGD)
    start = step.init(np.array([0.3, 0.5]), np.zeros(3))
    states = scanned(step, start, 25)
    ys = np.concatenate([start.y[None], states.y[:-1]])
    xs = np.concatenate([np.zeros((1, 3)), states.warm.x])

    def residuals(x, y):
        return np.abs(tasks["scale"] * (x - y[:, :1] - tasks["shift"]) + 2 * y[:, 1:] ** 2 * x)

    before, after, cold = residuals(xs[:-1], ys), residuals(xs[1:], ys), residuals(0 * xs[1:], ys)
    worst = np.max(before / np.maximum(cold, before), axis=1)
    history = jax.tree.map(lambda leaf: leaf[-1][:25], states.history)
    np.testing.assert_allclose(history.rtol, np.minimum(0.2, 0.5 * worst), rtol=1e-9)
    np.testing.assert_allclose(history.inner_residual, np.max(after, axis=1), rtol=1e-9)
    assert np.all(after <= history.rtol[:, None] * np.maximum(cold, before) * (1 + 1e-9))
