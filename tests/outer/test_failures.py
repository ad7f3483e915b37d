"""Runs that fail, that raise, that are interrupted; and what is shown of them."""

import io
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from tests.outer.example import (
    SGD,
    X0,
    Y,
    assert_equal,
    inner,
    make_engine,
    outer,
    sgd_loop,
)
from tests.outer.test_minimize import Memory, run

# Failures.


def fails_below(x, y):
    """The outer objective, NaN where y has gone below 0.25 in its first entry."""
    return outer(x, y) + 0 * jnp.sqrt(y[0] - 0.25)


def diverges_below(x, y):
    """The inner objective, whose curvature jumps where y has gone below 0.25."""
    return inner(x, y) + jnp.where(y[0] < 0.25, 1e3, 0.0) * jnp.sum(x**2)


FAILING = {
    "NaN": (
        make_engine(function=fails_below),
        "a value, gradient or update was not finite after {} steps, y is that before it; "
        "look for overflow",
        bx.Status.NONFINITE,
    ),
    "divergence": (
        make_engine(problem=bx.minimum(diverges_below)),
        "a solve ended DIVERGED after {} steps, y is that before it; lower the learning rate",
        bx.Status.DIVERGED,
    ),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_step_that_fails_ends_a_run_with_the_state_before_it(name):
    engine, message, status = FAILING[name]
    step = bx.make_step(engine, optax.adam(0.02), schedule=bx.Geometric(1e-10, 0.9))
    states = []
    result = run(step, chunk=1, rtol=0.0, callback=states.append)
    count = result.steps
    assert 3 < count < 40 and result.outcome is bx.Outcome.FAILED
    assert result.message.startswith(message.format(count))
    assert result.history.status[-1] == status
    np.testing.assert_array_equal(result.history.status[:-1], bx.Status.CONVERGED)
    # All but what says that a step was tried is as it was before it.
    last, before = states[-1], states[-2]
    kept = last._replace(
        step=before.step, key=before.key, history=before.history, outcome=before.outcome
    )
    assert_equal(kept, before)
    assert last.step == before.step + 1 == count and result.state.y[0] < 0.25
    assert result.value == np.min(result.history.value[:-1])
    # A run that has failed does not go on.
    memory = Memory(1000)
    memory.saved.append((count, result.state, 0.0))
    assert_equal(run(step, rtol=0.0, checkpoint=memory).state, result.state)


def test_a_run_that_fails_in_its_first_step_returns_its_start():
    for y, x0 in ((Y * np.nan, X0), (Y, X0 * np.nan)):
        result = run(y=y, x0=x0)
        assert result.outcome is bx.Outcome.FAILED and result.steps == 1
        assert result.value == np.inf and np.isinf(result.state.first_stationarity)
        np.testing.assert_array_equal(result.y, y)
        np.testing.assert_array_equal(result.x, x0)


def test_an_update_that_is_not_finite_is_not_made():
    optimizer = optax.stateless(lambda updates, _: jax.tree.map(lambda u: u / 0.0, updates))
    result = run(bx.make_step(make_engine(), optimizer))
    assert result.outcome is bx.Outcome.FAILED
    np.testing.assert_array_equal(result.state.y, Y)
    np.testing.assert_allclose(result.history.value, sgd_loop(Y, 1)[1], atol=1e-9)


# Errors.


def test_an_objective_that_raises_while_it_is_traced():
    def broken(x, y):
        raise ZeroDivisionError("while tracing")

    with pytest.raises(ZeroDivisionError, match="while tracing"):
        run(bx.make_step(make_engine(function=broken), SGD))


def test_an_objective_that_raises_while_it_runs_leaves_the_last_chunk_saved():
    calls = []

    def check(y):
        calls.append(None)
        if y < 0.2:
            raise ValueError("the objective broke")
        return np.zeros(())

    @jax.custom_jvp
    def checked(y):
        return jax.pure_callback(check, jax.ShapeDtypeStruct((), y.dtype), y)

    checked.defjvp(lambda primals, tangents: (checked(*primals), 0 * tangents[0]))
    engine = make_engine(function=lambda x, y: outer(x, y) + checked(y[0]))
    memory = Memory(1000)
    errors = ValueError, jax.errors.JaxRuntimeError  # which of them, JAX decides
    with pytest.raises(errors, match="the objective broke") as caught:
        run(bx.make_step(engine, optax.sgd(0.02)), chunk=2, checkpoint=memory)
    points = sgd_loop(Y, 40, rate=0.02)[0]
    first_bad = int(np.argmax(points[:, 0] < 0.2))
    complete = first_bad - first_bad % 2
    assert calls and complete > 0
    assert [step for step, _, _ in memory.saved] == [complete]
    np.testing.assert_allclose(memory.saved[0][1].y, points[complete], atol=1e-9)
    assert caught.value.__notes__ == [f"The state after step {complete} was saved."]


# Signals.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_the_current_chunk(number):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    memory, seen = Memory(1000), []

    def interrupt(state):
        seen.append(int(state.step))
        if state.step == 6:
            os.kill(os.getpid(), number)

    result = run(chunk=3, rtol=0.0, callback=interrupt, checkpoint=memory)
    assert result.outcome is bx.Outcome.INTERRUPTED and seen == [3, 6]
    assert result.message == "interrupted by a signal after 6 steps"
    assert result.state.outcome == bx.Outcome.RUNNING  # so that it can be resumed
    np.testing.assert_allclose(result.state.y, sgd_loop(Y, 6)[0][6], atol=1e-9)
    assert [step for step, _, _ in memory.saved] == [6]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert_equal(run(steps=9, rtol=0.0, checkpoint=memory).state, run(steps=9, rtol=0.0).state)


def test_a_second_signal_acts_at_once():
    before, memory = signal.getsignal(signal.SIGINT), Memory(1000)

    def interrupt(state):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(chunk=3, callback=interrupt, checkpoint=memory)
    assert signal.getsignal(signal.SIGINT) is before
    assert [step for step, _, _ in memory.saved] == [3]


def test_handlers_are_restored_after_an_error():
    before = signal.getsignal(signal.SIGINT)

    def fail(state):
        assert signal.getsignal(signal.SIGINT) is not before
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        run(callback=fail)
    assert signal.getsignal(signal.SIGINT) is before


# Progress.


def test_nothing_is_shown_where_there_is_no_terminal(capfd):
    run(progress=True)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("batched", [False, True])
def test_a_terminal_shows_the_last_step(batched, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    y = np.stack([Y + 1, Y]) if batched else Y
    result = run(y=y, progress=True, steps=7, rtol=0.0, batched=batched)
    shown = sys.stderr.getvalue()
    history = jax.tree.map(lambda leaf: leaf[result.best_run], result.history)
    history = history if batched else result.history
    assert "7/7" in shown
    assert f"value {history.value[6]:.6g}, gradient {history.gradient_norm[6]:.2e}" in shown
    assert f"iterations {history.inner_iterations[6]} + {history.adjoint_iterations[6]}" in shown
    monkeypatch.setattr(sys, "stderr", Terminal())
    run(progress=False, steps=7)
    assert sys.stderr.getvalue() == ""
