"""One outer step, against loops written in NumPy with the hypergradient in closed form."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from tests.everyday import slow
from tests.outer.example import (
    ADAM,
    DESCENT,
    ENGINE,
    LARGEST,
    SGD,
    STEP,
    X0,
    A,
    B,
    C,
    E,
    Y,
    assert_equal,
    inner,
    make_engine,
    outer,
    residual,
    scanned,
    sgd_loop,
    truth,
)
from tests.test_compilation import Counted, recorded_compilations

LOWER, UPPER = -0.35, 0.2


def to_box(y):
    return jax.tree.map(lambda leaf: optax.projections.projection_box(leaf, LOWER, UPPER), y)


# The iterates.


@pytest.mark.parametrize("projected", [False, True])
def test_steps_of_gradient_descent_equal_a_numpy_loop(projected):
    step = bx.make_step(ENGINE, SGD, projection=to_box) if projected else STEP
    project = (lambda y: np.clip(y, LOWER, UPPER)) if projected else (lambda y: y)
    states = scanned(step, step.init(Y, X0), 30)
    points, values, gradients = sgd_loop(project(Y), 30, projection=project)
    np.testing.assert_allclose(states.y, points[1:], atol=1e-9)
    assert np.any(points == UPPER) == projected
    history = jax.tree.map(lambda leaf: leaf[-1][:30], states.history)
    np.testing.assert_allclose(history.value, values, atol=1e-9)
    np.testing.assert_allclose(history.gradient_norm, np.linalg.norm(gradients, axis=1), atol=1e-9)
    moves = project(points[:-1] - gradients) - points[:-1]
    np.testing.assert_allclose(history.stationarity, np.linalg.norm(moves, axis=1), atol=1e-9)
    np.testing.assert_array_equal(history.status, bx.Status.CONVERGED)
    np.testing.assert_array_equal(states.step, np.arange(1, 31))
    first = states.first_stationarity
    np.testing.assert_allclose(first, np.full(30, np.linalg.norm(moves[0])), atol=1e-9)
    for name in ("value", "rtol", "status", "products"):  # what is still to come
        rest = np.asarray(getattr(states.history, name))[-1][30:]
        assert np.all(rest == (np.inf if rest.dtype == float else -1))


def test_steps_of_adam_equal_a_numpy_loop_on_trees_of_both_variables():
    def split(x):
        return {"u": x[:1], "rest": (x[1], x[2])}

    def joined(x):
        return jnp.stack([x["u"][0], *x["rest"]])

    engine = make_engine(
        problem=bx.minimum(lambda x, y: inner(joined(x), joined(y))),
        function=lambda x, y: outer(joined(x), joined(y)),
    )
    step = bx.make_step(engine, ADAM, projection=to_box)
    states = scanned(step, step.init(split(Y), split(X0)), 25)
    y, m, v = np.clip(Y, LOWER, UPPER), np.zeros(3), np.zeros(3)
    for number in range(1, 26):
        gradient = truth(y)[3]
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        unbiased = m / (1 - 0.9**number), v / (1 - 0.999**number)
        y = np.clip(y - 0.1 * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8), LOWER, UPPER)
        got = jax.tree.map(operator.itemgetter(number - 1), states.y)
        np.testing.assert_allclose(joined(got), y, atol=1e-8)


def test_steps_in_single_precision():
    y, x0 = jnp.asarray(Y, jnp.float32), jnp.asarray(X0, jnp.float32)
    step = bx.make_step(make_engine(DESCENT), SGD)
    states = scanned(step, step.init(y, x0), 20)
    assert states.y.dtype == states.history.value.dtype == states.warm.x.dtype == jnp.float32
    np.testing.assert_allclose(states.y, sgd_loop(Y, 20)[0][1:], atol=5e-5)


@pytest.mark.parametrize(
    ("names", "optimizer"),
    [
        slow(("float32", "float64"), SGD, id="32-64-sgd"),
        pytest.param(("float32", "float64"), optax.lbfgs(), id="32-64-lbfgs"),
        pytest.param(("float64", "float32"), SGD, id="64-32-sgd"),
        slow(("float64", "float32"), optax.lbfgs(), id="64-32-lbfgs"),
    ],
)
def test_the_variables_may_differ_in_precision(names, optimizer):
    y, x0 = jnp.asarray(Y, names[0]), jnp.asarray(X0, names[1])
    step = bx.make_step(make_engine(DESCENT), optimizer)
    states = scanned(step, step.init(y, x0), 2)
    assert (states.y.dtype, states.warm.x.dtype) == names
    points = [Y, states.y[0]]
    np.testing.assert_allclose(
        states.history.value[1][:2], [truth(y)[2] for y in points], rtol=2e-4
    )
    np.testing.assert_allclose(
        states.history.gradient_norm[1][:2],
        [np.linalg.norm(truth(y)[3]) for y in points],
        rtol=2e-4,
    )


def test_numbers_of_a_schedule_may_have_another_precision_than_the_value():
    schedule = bx.Adaptive(np.float64(0.2), every=np.int64(4), first=np.float64(0.05))
    step = bx.make_step(make_engine(DESCENT), SGD, schedule=schedule)
    y, x0 = jnp.asarray(Y, jnp.float32), jnp.asarray(X0, jnp.float32)
    state = scanned(step, step.init(y, x0), 2)
    assert state.schedule.now.x.dtype == jnp.float32
    np.testing.assert_allclose(state.history.rtol[0][0], 0.05, rtol=1e-6)


PROBLEMS = {
    "root": (bx.root(lambda x, y: jax.grad(inner)(x, y)), DESCENT),
    "fixed point": (
        bx.fixed_point(lambda x, y: x - LARGEST / 2 * jax.grad(inner)(x, y)),
        bx.FixedPointIteration(rtol=1e-13),
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_roots_and_fixed_points(name):
    problem, solver = PROBLEMS[name]
    step = bx.make_step(make_engine(solver, problem=problem), SGD)
    states = scanned(step, step.init(Y, X0), 10)
    np.testing.assert_allclose(states.y, sgd_loop(Y, 10)[0][1:], atol=1e-9)


def test_unrolled_steps_are_differentiated_from_the_warm_start_on():
    rate, steps = LARGEST / 2, 4
    solver = bx.GradientDescent(rate, rtol=0.0, atol=0.0, maxiter=steps)
    step = bx.make_step(make_engine(solver, bx.Unrolled()), SGD)
    states = scanned(step, step.init(Y, X0), 12)
    x, y = X0, Y
    for number in range(12):
        by_y = np.zeros((3, 3))
        matrix = A.T @ A + np.diag(np.exp(y))
        for _ in range(steps):
            by_y = by_y - rate * (matrix @ by_y + np.diag(np.exp(y) * x))
            x = x - rate * (matrix @ x - A.T @ B)
        gradient = by_y.T @ C.T @ (C @ x - E) + y / 10
        np.testing.assert_allclose(states.warm.x[number], x, atol=1e-12)
        np.testing.assert_allclose(
            states.history.gradient_norm[-1][number], np.linalg.norm(gradient), rtol=1e-11
        )
        y = y - 0.3 * gradient
        np.testing.assert_allclose(states.y[number], y, atol=1e-12)
    np.testing.assert_array_equal(states.history.adjoint_iterations[-1][:12], 0)
    np.testing.assert_array_equal(states.history.inner_iterations[-1][:12], steps)


@pytest.mark.parametrize("rule", [bx.OneStep(), bx.Unrolled(2, mode="forward")], ids=repr)
def test_steps_of_iterative_rules_equal_calls_of_their_engines(rule):
    engine = make_engine(bx.GradientDescent(LARGEST / 2, rtol=0.0, atol=0.0, maxiter=6), rule)
    step, y, warm = bx.make_step(engine, SGD), jnp.asarray(Y), bx.cold_start(X0)
    states = scanned(step, step.init(Y, X0), 3)
    for number in range(3):
        result = engine(y, warm)
        y, warm = y - 0.3 * result.gradient, result.warm
        np.testing.assert_allclose(states.y[number], y, rtol=1e-12)


def test_an_engine_with_an_accuracy_keeps_to_it_in_each_step():
    engine = make_engine(DESCENT, accuracy=bx.RelativeAccuracy(1e-2))
    step = bx.make_step(engine, SGD)
    states = scanned(step, step.init(Y, X0), 15)
    points = np.concatenate([Y[None], states.y[:-1]])
    gradients = (points - states.y) / 0.3
    true = np.array([truth(y)[3] for y in points])
    errors = np.linalg.norm(gradients - true, axis=1)
    assert np.all(errors <= 1e-2 * np.linalg.norm(true, axis=1))
    history = jax.tree.map(lambda leaf: leaf[-1][:15], states.history)
    # The inner solver only comes near: corrections with the dense matrix do the rest.
    plain = scanned(STEP, STEP.init(Y, X0), 1)
    assert 2 * np.max(history.inner_iterations) < plain.history.inner_iterations[0, 0]
    np.testing.assert_allclose(history.certificate, errors, rtol=0.05, atol=1e-12)
    assert np.all(np.isinf(history.rtol)) and np.all(history.products > 0)


# Transformations.


def test_jit_scan_and_vmap_equal_a_python_loop():
    ys = np.stack([Y, -Y, Y + 0.5])
    compiled = jax.jit(STEP)
    loops = []
    for y in ys:
        state = STEP.init(y, X0, history=4)
        for _ in range(5):
            following = STEP(state)
            assert_equal(compiled(state), following)
            state = following
        loops.append(state)
    states = jax.vmap(lambda y: STEP.init(y, X0, history=4))(ys)
    _, together = jax.jit(
        lambda states: jax.lax.scan(lambda s, _: (jax.vmap(STEP)(s), s.step), states, length=5)
    )(states)
    np.testing.assert_array_equal(together, np.tile(np.arange(5)[:, None], 3))
    end = jax.lax.fori_loop(0, 5, lambda _, s: jax.vmap(STEP)(s), states)
    for lane, loop in enumerate(loops):
        np.testing.assert_allclose(end.y[lane], loop.y, rtol=1e-12)
        np.testing.assert_allclose(end.history.value[lane], loop.history.value, rtol=1e-12)
        np.testing.assert_array_equal(
            end.history.inner_iterations[lane], loop.history.inner_iterations
        )


def test_a_second_step_compiles_nothing_nor_do_other_numbers():
    counted = Counted(inner)

    def make(first, rate):
        engine = make_engine(bx.GradientDescent(rate), problem=bx.minimum(counted))
        return bx.make_step(engine, SGD, schedule=bx.Geometric(first, 0.5))

    with recorded_compilations() as events:
        step = make(1e-6, 0.1)
        state = step(step.init(Y, X0))
    assert events and counted.calls > 0
    traced = counted.calls
    with recorded_compilations() as events:
        again = make(2e-6, 0.15)(step(state))
    assert events == [] and counted.calls == traced
    np.testing.assert_allclose(again.history.rtol[:3], [1e-6, 5e-7, 5e-7])


def test_a_state_is_a_pytree_that_moves_between_devices():
    state = STEP(STEP.init(Y, X0))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    moved = jax.tree.map(lambda leaf: jnp.array(leaf), jax.device_put(state, sharding))
    assert isinstance(moved, bx.BilevelState)
    assert_equal(STEP(moved), STEP(state))


# Ends.


def test_a_state_that_has_ended_stays_as_it_is():
    state = STEP(STEP.init(Y, X0))
    for outcome in (bx.Outcome.CONVERGED, bx.Outcome.FAILED, bx.Outcome.PLATEAU):
        ended = state._replace(outcome=jnp.asarray(int(outcome), jnp.int32))
        assert_equal(STEP(ended), ended)


def test_leaves_without_entries():
    engine = bx.value_and_hypergradient(
        lambda x, y: (x - 3.0) ** 2, bx.minimum(lambda x, y: (x - y["a"]) ** 2), bx.Newton()
    )
    step = bx.make_step(engine, optax.sgd(0.25))
    state = step(step.init({"a": 1.0, "empty": jnp.zeros((0, 2))}, 0.0))
    np.testing.assert_allclose(state.y["a"], 2.0)
    assert state.y["empty"].shape == (0, 2) and state.outcome == bx.Outcome.RUNNING


def test_the_auxiliary_output_of_an_objective_is_left_out():
    engine = make_engine(function=lambda x, y: (outer(x, y), {"x": x}), has_aux=True)
    step = bx.make_step(engine, SGD)
    np.testing.assert_allclose(step(step.init(Y, X0)).y, sgd_loop(Y, 1)[0][1], atol=1e-9)


def test_a_correction_of_x_counts_as_products():
    rule = bx.Preconditioned(bx.Implicit(bx.CG()), bx.NewtonStep(bx.CG()))
    engine = make_engine(bx.GradientDescent(LARGEST / 2, maxiter=2), rule)
    step = bx.make_step(engine, SGD)
    state = step(step.init(Y, X0))
    history = jax.tree.map(lambda leaf: leaf[0], state.history)
    report = engine(Y, bx.cold_start(X0)).report
    assert history.products == report.adjoint.products + report.inner.correction.products
    # The correction is exact on a quadratic, so that two inner steps are enough.
    np.testing.assert_allclose(state.warm.x, truth(Y)[0], rtol=1e-10)
    assert residual(state.warm.x, Y) < 1e-9 < history.inner_residual
    assert history.status == bx.Status.MAXITER and state.outcome == bx.Outcome.RUNNING
