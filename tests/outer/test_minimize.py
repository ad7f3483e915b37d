"""Training runs: how they end, what they return, and that chunks do not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax.outer import Checkpointer, OpenCheckpoints
from tests.everyday import slow
from tests.outer.example import (
    ENGINE,
    LARGEST,
    SGD,
    STEP,
    X0,
    Y,
    assert_equal,
    inner,
    make_engine,
    minimiser,
    outer,
    sgd_loop,
    truth,
)

FIRST = np.linalg.norm(truth(Y)[3])


def run(step=STEP, y=Y, x0=X0, steps=40, **options):
    return bx.minimize(step, y, x0, steps, **({"chunk": 10, "progress": False} | options))


# How runs end.


def test_a_run_ends_where_the_gradient_meets_the_relative_tolerance():
    result = run(rtol=1e-2, steps=100)
    points, values, gradients = sgd_loop(Y, 100)
    norms = np.linalg.norm(gradients, axis=1)
    last = int(np.argmax(norms <= 1e-2 * FIRST))
    assert result.outcome is bx.Outcome.CONVERGED and result.steps == last + 1
    assert result.message == (
        f"the norm of the projected gradient met the tolerance after {last + 1} steps"
    )
    assert len(result.history.value) == last + 1
    np.testing.assert_allclose(result.history.value, values[: last + 1], atol=1e-9)
    # The result is the point that met the tolerance, and the state is one step further.
    np.testing.assert_allclose(result.y, points[last], atol=1e-9)
    np.testing.assert_allclose(result.x, truth(points[last])[0], atol=1e-9)
    np.testing.assert_allclose(result.value, values[last], atol=1e-9)
    np.testing.assert_allclose(result.state.y, points[last + 1], atol=1e-9)
    assert result.state.outcome == bx.Outcome.CONVERGED and result.best_run is None


def test_a_run_ends_where_the_gradient_meets_the_absolute_tolerance():
    norms = np.linalg.norm(sgd_loop(Y, 100)[2], axis=1)
    result = run(rtol=0.0, atol=0.03, steps=100)
    assert result.outcome == bx.Outcome.CONVERGED
    assert result.steps == int(np.argmax(norms <= 0.03)) + 1


@pytest.mark.parametrize(
    ("solver", "rule"),
    [
        (bx.GradientDescent(LARGEST / 20, rtol=1e-9, maxiter=2), bx.Implicit()),
        (bx.Newton(), bx.Implicit(bx.CG(maxiter=1))),
    ],
    ids=["inner", "adjoint"],
)
def test_a_gradient_of_solves_that_ended_early_meets_no_tolerance(solver, rule):
    step = bx.make_step(make_engine(solver, rule), SGD, warm_x=False, warm_adjoint=False)
    result = run(step, rtol=0.5, steps=100)
    assert np.any(result.history.stationarity <= 0.5 * result.history.stationarity[0])
    np.testing.assert_array_equal(result.history.status, bx.Status.MAXITER)
    assert result.outcome is bx.Outcome.STEPS
    assert result.message == (
        "stopped after 100 steps, as asked for; the gradient had not met the tolerance, and in the "
        f"last step a solve ended MAXITER: {bx.Status.MAXITER.remedy}"
    )


@pytest.mark.parametrize("shift", [0.0, -0.5])
def test_a_run_ends_at_a_plateau(shift):
    """A shift makes values negative: a part of their size still is what counts."""
    function = outer if shift == 0 else lambda x, y: outer(x, y) + shift
    step = STEP if shift == 0 else bx.make_step(make_engine(function=function), SGD)
    result = run(step, rtol=0.0, patience=3, min_improvement=0.02, steps=100)
    values = sgd_loop(Y, 100)[1] + shift
    milestone, at = np.inf, 0
    for number, value in enumerate(values):
        if number == 0 or value < milestone - 0.02 * abs(milestone):
            milestone, at = value, number
        if number - at >= 3:
            break
    assert 5 < number < 99 and np.all(np.diff(values[:number]) < 0)
    assert result.outcome is bx.Outcome.PLATEAU and result.steps == number + 1
    assert result.message == f"the value no longer improved after {number + 1} steps"
    assert result.state.milestone.step == at
    np.testing.assert_allclose(result.state.milestone.value, milestone, atol=1e-9)


def test_a_run_ends_after_all_its_steps():
    result = run(steps=7, rtol=0.0)
    assert result.outcome is bx.Outcome.STEPS and result.steps == 7
    assert result.message == (
        "stopped after 7 steps, as asked for; the gradient had not met the tolerance"
    )
    np.testing.assert_allclose(result.state.y, sgd_loop(Y, 7)[0][7], atol=1e-9)
    seconds = result.seconds
    assert seconds.first > 0 and 0 <= seconds.inside <= seconds.total


def test_a_run_from_a_stationary_point_ends_with_its_first_step():
    engine = bx.value_and_hypergradient(
        lambda x, y: (x - 3.0) ** 2, bx.minimum(lambda x, y: (x - y) ** 2), bx.Newton()
    )
    result = run(bx.make_step(engine, optax.sgd(0.25)), 3.0, 0.0)
    assert result.outcome is bx.Outcome.CONVERGED and result.steps == 1
    assert result.state.first_stationarity == 0 and result.y == 3.0


def test_the_best_point_of_a_run_need_not_be_its_last():
    step = bx.make_step(ENGINE, optax.sgd(4.0))  # too long
    result = run(step, rtol=0.0, steps=8)
    points, values, _ = sgd_loop(Y, 8, rate=4.0)
    best = int(np.argmin(values))
    assert best == 2
    np.testing.assert_allclose(result.value, values[best], atol=1e-8)
    np.testing.assert_allclose(result.y, points[best], atol=1e-8)
    np.testing.assert_allclose(result.x, truth(points[best])[0], atol=1e-8)
    assert result.state.best.step == best


# Chunks, histories, callbacks.


def test_chunks_do_not_change_a_single_bit():
    whole = run(steps=25, rtol=1e-3, chunk=25)
    for chunk in (1, 4, None):
        parts = run(steps=25, rtol=1e-3, chunk=chunk)
        assert_equal(parts.state, whole.state)
        assert_equal(parts.history, whole.history)


@pytest.mark.parametrize("length", [slow(1), 4, slow(10), 30])
def test_a_history_is_in_the_order_of_steps(length):
    result = run(steps=10, rtol=0.0, history=length)
    values = sgd_loop(Y, 10)[1][max(10 - length, 0) :]
    np.testing.assert_allclose(result.history.value, values, atol=1e-9)
    assert result.state.history.value.shape == (length,)


def test_a_callback_gets_the_state_after_each_chunk():
    class Kept(list):  # which cannot be hashed
        __call__ = list.append

    seen = Kept()
    result = run(steps=10, rtol=0.0, chunk=4, callback=seen)
    assert [int(state.step) for state in seen] == [4, 8, 10]
    assert_equal(seen[-1], result.state)


def test_an_error_of_a_callback_ends_the_run():
    def fail(state):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        run(callback=fail)


# Saving, with states that are kept in memory.


class Memory(Checkpointer, OpenCheckpoints):
    def __init__(self, every):
        self.every, self.saved, self.closed, self.identity = every, [], 0, None

    def open(self, identity, like):
        self.identity = identity
        return self

    def restore(self):
        return self.saved[-1][1] if self.saved else None

    def is_due(self, step):
        return step % self.every == 0

    def steps_until_due(self, step):
        return self.every - step % self.every

    def save(self, step, state, value):
        self.saved.append((step, state, value))

    def close(self):
        self.closed += 1


def test_a_run_that_is_resumed_ends_with_the_bits_of_one_that_was_not():
    memory, values = Memory(4), sgd_loop(Y, 20)[1]
    first = run(steps=10, rtol=0.0, chunk=None, checkpoint=memory)
    assert [step for step, _, _ in memory.saved] == [4, 8, 10] and first.steps == 10
    np.testing.assert_allclose([value for *_, value in memory.saved], values[[3, 7, 9]], atol=1e-9)
    second = run(steps=20, rtol=0.0, checkpoint=memory)
    assert_equal(second.state, run(steps=20, rtol=0.0).state)
    assert [step for step, _, _ in memory.saved[3:]] == [12, 16, 20, 20]
    again = run(steps=20, rtol=0.0, checkpoint=memory)
    assert again.steps == 20 and len(memory.saved) == 7 and memory.closed == 3
    np.testing.assert_allclose(memory.identity.start["the outer objective"], [outer(X0, Y)])


def test_an_identity_tells_problems_apart_by_more_than_norms():
    """The same data with other signs, another start, and what a start at zero does not show."""

    def start(function=outer, problem=None, y=Y):
        memory = Memory(1000)
        step = bx.make_step(make_engine(problem=problem, function=function), SGD)
        run(step, y, steps=1, checkpoint=memory)
        return {name: numbers[0] for name, numbers in memory.identity.start.items()}

    usual = start()
    assert start() == usual
    # F and F nearby, the gradient of the outer objective, this, and y.
    nearby, optimality, slope, value, point = sorted(usual)
    away = Y + 1.0
    cases = [
        (start(lambda x, y: outer(-x, y)), {slope}),
        (start(lambda x, y: outer(x, y) + jnp.sum((y - Y) * away)), {slope}),
        (start(problem=bx.minimum(lambda x, y: inner(-x, y))), {optimality, nearby}),
        (start(problem=bx.minimum(lambda x, y: inner(x, y) + jnp.sum(x**4))), {nearby}),
    ]
    for other, names in cases:
        assert {key for key in usual if abs(other[key] - usual[key]) > 1e-9} == names
    assert abs(start(y=Y[::-1])[point] - usual[point]) > 1e-3
    assert usual[value] == pytest.approx(outer(X0, Y))


@pytest.mark.parametrize("dtype", [np.float16, slow(np.float32)])
def test_an_identity_sees_long_and_constant_vectors(dtype):
    """Half precision has no 70 000, and cosines of so many angles add up to nothing."""
    problem = bx.minimum(lambda x, y: 0.5 * jnp.sum((x - y) ** 2))
    engine = bx.value_and_hypergradient(
        lambda x, y: jnp.sum(x[:1]), problem, bx.GradientDescent(1.0, rtol=1e-2)
    )
    for size in (710, 70_000):
        memory, y = Memory(1000), np.full(size, 0.001, dtype)
        run(bx.make_step(engine, SGD), y, np.zeros_like(y), steps=1, checkpoint=memory)
        *_, point = sorted(memory.identity.start)
        (found,) = memory.identity.start[point]
        expected = y.astype(np.float64) @ (2 + np.cos(np.arange(size)))
        np.testing.assert_allclose(found, expected, rtol=1e-3)
        assert found > 1.0


def test_a_run_that_had_converged_goes_on_with_a_smaller_tolerance():
    memory = Memory(1000)
    first = run(steps=100, rtol=1e-1, checkpoint=memory)
    assert run(steps=100, rtol=1e-1, checkpoint=memory).steps == first.steps
    second = run(steps=100, rtol=1e-2, checkpoint=memory)
    assert second.outcome == bx.Outcome.CONVERGED and second.steps > first.steps
    assert_equal(second.state, run(steps=100, rtol=1e-2).state)


def test_when_a_callback_raises_the_state_is_saved_first():
    memory = Memory(1000)

    def fail(state):
        if state.step == 6:
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough") as caught:
        run(chunk=3, callback=fail, checkpoint=memory)
    assert caught.value.__notes__ == ["The state after step 6 was saved."]
    assert [step for step, _, _ in memory.saved] == [6] and memory.closed == 1

    class Full(Memory):
        def save(self, step, state, value):
            raise OSError("no space")

    with pytest.raises(ValueError, match="enough") as caught:
        run(chunk=3, callback=fail, checkpoint=Full(1000))
    assert caught.value.__notes__ == ["The state after step 6 could not be saved: no space"]


def test_runs_of_the_library_reach_the_minimiser_of_scipy():
    result = run(bx.make_step(ENGINE, optax.sgd(1.0)), steps=400, rtol=1e-9, chunk=100)
    assert result.outcome == bx.Outcome.CONVERGED
    np.testing.assert_allclose(result.y, minimiser(), atol=1e-7)
    assert isinstance(result.history.value, np.ndarray) and isinstance(result.x, jax.Array)
