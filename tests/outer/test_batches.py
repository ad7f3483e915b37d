"""Several runs as one vmapped program: each is what it is by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from tests.everyday import params
from tests.outer.example import DESCENT, SGD, STEP, Y, inner, make_engine, outer, truth
from tests.outer.test_minimize import Memory, run

YS = np.stack([Y, Y + 1.0, -2 * Y])


def assert_lanes(result, singles, rtol=1e-10):
    """Assert that each run of a batch equals a run by itself."""
    for lane, single in enumerate(singles):
        assert result.steps[lane] == single.steps
        assert result.outcome[lane] == single.outcome
        np.testing.assert_allclose(result.y[lane], single.y, rtol=rtol)
        np.testing.assert_allclose(result.x[lane], single.x, rtol=rtol)
        np.testing.assert_allclose(result.value[lane], single.value, rtol=rtol)
        for name, leaf in single.history._asdict().items():
            got = getattr(result.history, name)[lane]
            # Residuals near rounding are rounding.
            np.testing.assert_allclose(got[: single.steps], leaf, rtol=1e-6, atol=1e-12)
            rest = got[single.steps :]
            assert np.all(rest == (np.inf if rest.dtype == float else -1)), name


STEPS = {
    "constant": STEP,
    "adaptive": bx.make_step(make_engine(DESCENT), SGD, schedule=bx.Adaptive(0.1, every=4)),
    "cold": bx.make_step(make_engine(DESCENT), SGD, warm_x=False),
}


# The runs that fail, below, are lanes of the constant schedule.
@pytest.mark.parametrize("name", params(zip(STEPS, strict=True), lambda name: name == "adaptive"))
def test_runs_of_a_batch_equal_runs_by_themselves(name):
    options = {"steps": 60, "rtol": 0.1}
    result = run(STEPS[name], YS, batched=True, **options)
    assert_lanes(result, [run(STEPS[name], y, **options) for y in YS])
    assert len(set(result.steps.tolist())) > 1  # they have ended at different times
    assert result.y.shape == (3, 3) and result.history.value.shape == (3, max(result.steps))
    assert result.best_run == np.argmin([truth(y)[2] for y in result.y])
    np.testing.assert_allclose(result.value, [truth(y)[2] for y in result.y], rtol=1e-2)
    assert np.all(result.outcome == bx.Outcome.CONVERGED)
    assert result.message == (
        "3 of 3 runs: the norm of the projected gradient met the tolerance "
        f"after {min(result.steps)} to {max(result.steps)} steps"
    )


def test_a_batch_ends_when_all_of_its_runs_have():
    seen = []
    result = run(y=YS, steps=1000, rtol=0.1, chunk=1, batched=True, callback=seen.append)
    assert len(seen) == max(result.steps) < 40
    first = int(np.argmin(result.steps))
    at_its_end = seen[result.steps[first] - 1]
    np.testing.assert_array_equal(result.state.y[first], at_its_end.y[first])
    np.testing.assert_array_equal(result.state.warm.x[first], at_its_end.warm.x[first])


def fails_below(x, y):
    return outer(x, y) + 0 * jnp.sqrt(y[0] - 0.3)


def diverges_below(x, y):
    return inner(x, y) + jnp.where(y[1] < -2.0, 1e3, 0.0) * jnp.sum(x**2)


def test_runs_that_fail_change_no_other():
    engine = make_engine(problem=bx.minimum(diverges_below), function=fails_below)
    step = bx.make_step(engine, optax.adam(0.02))
    ys = np.stack([Y + 1.5, Y, np.array([0.9, -2.5, 0.1]), Y * np.nan, Y + 1.2])
    options = {"steps": 20, "rtol": 0.0}
    result = run(step, ys, batched=True, **options)
    singles = [run(step, y, **options) for y in ys]
    assert_lanes(result, singles)
    codes, count = [single.outcome.name for single in singles], singles[1].steps
    assert codes == ["STEPS", "FAILED", "FAILED", "FAILED", "STEPS"] and 1 < count < 20
    assert result.message == (
        "2 of 5 runs: stopped after 20 steps, as asked for; the gradient had not met the "
        "tolerance; 1 of 5 runs: a solve ended DIVERGED after 1 step, y is that before it; "
        f"{bx.Status.DIVERGED.remedy}; "
        "2 of 5 runs: a value, gradient or update was not finite after 1 to "
        f"{count} steps, y is that before it; {bx.Status.NONFINITE.remedy}"
    )
    alone = run(step, ys[[0, 4]], batched=True, **options)
    np.testing.assert_array_equal(result.y[jnp.array([0, 4])], alone.y)
    assert result.best_run == np.argmin([single.value for single in singles])


def test_runs_of_a_batch_draw_with_keys_of_their_own():
    key = jax.random.key(3)

    def drawing(key):
        shift = jax.random.normal(key, (3,))
        return make_engine(function=lambda x, y: outer(x, y) + shift @ y)

    step = bx.make_step(drawing, SGD)
    ys = np.stack([Y, Y])
    result = run(step, ys, batched=True, key=key, steps=3, rtol=0.0)
    for lane, own in enumerate(jax.random.split(key, 2)):
        y = Y
        for _ in range(3):
            own, used = jax.random.split(own)
            y = y - 0.3 * (truth(y)[3] + np.asarray(jax.random.normal(used, (3,))))
        np.testing.assert_allclose(result.state.y[lane], y, atol=1e-9)
    assert np.max(np.abs(result.state.y[0] - result.state.y[1])) > 0.1


def test_what_a_checkpoint_of_a_batch_is_worth_is_its_best_value():
    memory = Memory(1000)
    step = bx.make_step(make_engine(function=fails_below), SGD)
    result = run(step, np.stack([Y * np.nan, Y + 2]), batched=True, steps=3, checkpoint=memory)
    assert [step for step, _, _ in memory.saved] == [3]
    assert memory.saved[0][2] == result.history.value[1, 2]
