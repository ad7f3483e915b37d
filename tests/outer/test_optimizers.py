"""Optimisers of Optax and projections, against NumPy and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import bilevax as bx
from tests.outer.example import (
    DESCENT,
    ENGINE,
    LARGEST,
    SGD,
    X0,
    A,
    B,
    C,
    E,
    Y,
    inner,
    make_engine,
    minimiser,
    outer,
    scanned,
    truth,
)
from tests.test_compilation import Counted, recorded_compilations


def test_momentum_by_hand():
    step = bx.make_step(ENGINE, optax.sgd(0.05, momentum=0.8))
    states = scanned(step, step.init(Y, X0), 20)
    y, trace = Y, np.zeros(3)
    for number in range(20):
        trace = truth(y)[3] + 0.8 * trace
        y = y - 0.05 * trace
        np.testing.assert_allclose(states.y[number], y, atol=1e-9)


@pytest.mark.parametrize("rule", [None, bx.Unrolled()], ids=["implicit", "unrolled"])
def test_a_line_search_evaluates_the_value_and_its_hypergradient(rule):
    solver = DESCENT
    if rule is not None:  # 200 steps are exact here
        solver = bx.GradientDescent(LARGEST / 2, rtol=0.0, atol=0.0, maxiter=200)
    step = bx.make_step(make_engine(solver, rule), optax.lbfgs())
    result = bx.minimize(step, Y, X0, 40, rtol=1e-9, chunk=40, progress=False)
    assert result.outcome == bx.Outcome.CONVERGED and result.steps < 20
    np.testing.assert_allclose(result.state.y, minimiser(), atol=1e-8)
    # What the line search has found of h at the next point is what the next step finds.
    values = result.history.value
    assert np.all(np.diff(values) <= 1e-14)
    np.testing.assert_allclose(values[-1], truth(minimiser())[2], rtol=1e-12)


def test_an_optimiser_with_a_random_key_draws_as_it_does_by_itself():
    optimizer = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(5)), optax.sgd(0.2))
    step = bx.make_step(ENGINE, optimizer)
    states = scanned(step, step.init(Y, X0), 6)
    y, state = Y, optimizer.init(Y)
    for number in range(6):
        updates, state = optimizer.update(jnp.asarray(truth(y)[3]), state)
        y = np.asarray(y + updates)
        np.testing.assert_allclose(states.y[number], y, atol=1e-9)


def test_an_optimiser_that_looks_at_values_gets_them():
    # It halves the rate where two values in a row are no better: those of a rate that is too large.
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=2, cooldown=0)
    step = bx.make_step(ENGINE, optax.chain(optax.sgd(4.0), plateau))
    states = scanned(step, step.init(Y, X0), 25)
    best, bad, scale, scales, y = np.inf, 0, 1.0, [], Y
    for number in range(25):
        _, _, value, gradient = truth(y)
        better = value < (1 - 1e-4) * best
        best, bad = (value, 0) if better else (best, bad + 1)
        if bad == 2:
            scale, bad = 0.5 * scale, 0
        y = y - 4.0 * scale * gradient
        np.testing.assert_allclose(states.y[number], y, atol=1e-7)
        scales.append(scale)
    np.testing.assert_allclose(states.optimizer[1].scale, scales)
    assert scales[-1] < 1


# Projections.


def test_a_simplex_against_scipy():
    step = bx.make_step(ENGINE, optax.sgd(0.5), projection=optax.projections.projection_simplex)
    result = bx.minimize(step, Y, X0, 300, rtol=0.0, atol=1e-11, chunk=100, progress=False)
    assert result.outcome == bx.Outcome.CONVERGED
    constraint = {"type": "eq", "fun": lambda y: np.sum(y) - 1}
    want = minimiser(bounds=[(0, None)] * 3, constraints=constraint)
    np.testing.assert_allclose(result.state.y, want, atol=1e-6)
    # The gradient does not vanish there, but the projected one does.
    assert result.history.gradient_norm[-1] > 0.05 > 1e-11 >= result.history.stationarity[-1]


def test_a_ball_of_a_pytree_against_scipy():
    def joined(y):
        return jnp.stack([y["a"], *y["rest"]])

    engine = make_engine(
        problem=bx.minimum(lambda x, y: inner(x, joined(y))),
        function=lambda x, y: outer(x, joined(y)),
    )
    y = {"a": Y[0], "rest": Y[1:]}
    step = bx.make_step(
        engine, optax.sgd(0.5), projection=lambda y: optax.projections.projection_l2_ball(y, 0.5)
    )
    result = bx.minimize(step, y, X0, 300, rtol=0.0, atol=1e-11, chunk=100, progress=False)
    found = scipy.optimize.minimize(
        lambda y: truth(y)[2],
        Y / 2,
        jac=lambda y: truth(y)[3],
        constraints={"type": "ineq", "fun": lambda y: 0.25 - y @ y, "jac": lambda y: -2 * y},
        method="SLSQP",
        options={"ftol": 1e-15},
    )
    np.testing.assert_allclose(joined(result.state.y), found.x, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(joined(result.state.y)), 0.5)
    # On the ball, the gradient is a multiple of y.
    gradient = truth(joined(result.state.y))[3]
    np.testing.assert_allclose(gradient / gradient[0], found.x / found.x[0], rtol=1e-5)


def test_the_start_is_projected_too():
    step = bx.make_step(ENGINE, SGD, projection=optax.projections.projection_simplex)
    y = np.asarray(step.init(np.array([3.0, 1.0, -5.0]), X0).y)
    np.testing.assert_allclose(y, [1.0, 0.0, 0.0])


# Engines that are made from a key.


def batch_of(key):
    return jax.random.choice(key, 8, (5,), replace=False)


def test_an_engine_from_a_key_gets_a_new_one_in_each_step():
    def drawing(key):
        rows = batch_of(key)
        a, b = jnp.asarray(A)[rows], jnp.asarray(B)[rows]

        def objective(x, y):
            return jnp.sum((a @ x - b) ** 2) / 2 + jnp.sum(jnp.exp(y) * x**2) / 2

        return make_engine(problem=bx.minimum(objective))

    counted = Counted(drawing)
    step, key = bx.make_step(counted, SGD), jax.random.key(9)
    compiled = jax.jit(lambda state: step(state))
    state, y, drawn = step.init(Y, X0, key=key), Y, []
    state = compiled(state)
    calls, states = counted.calls, [state]
    with recorded_compilations() as events:
        for _ in range(4):
            states.append(compiled(states[-1]))
    assert events == [] and counted.calls == calls

    for number in range(5):
        key, used = jax.random.split(key)
        rows = np.asarray(batch_of(used))
        drawn.append(tuple(rows))
        matrix = A[rows].T @ A[rows] + np.diag(np.exp(y))
        x = np.linalg.solve(matrix, A[rows].T @ B[rows])
        v = np.linalg.solve(matrix, C.T @ (C @ x - E))
        y = y - 0.3 * (y / 10 - np.exp(y) * x * v)
        np.testing.assert_allclose(states[number].y, y, atol=1e-9)
        np.testing.assert_allclose(states[number].warm.x, x, atol=1e-9)
    assert len(set(drawn)) == 5
    assert states[-1].key == key
