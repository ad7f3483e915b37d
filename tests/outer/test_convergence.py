"""A run has converged where the projected gradient and its certified error meet the tolerance."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from tests.outer.example import X0, Y, inner, make_engine, outer, truth

LOOSE = bx.GradientDescent(0.05, rtol=0.3)


def norm_at(y):
    return np.linalg.norm(truth(np.asarray(y))[3])


def test_a_gradient_that_is_small_by_its_error_alone_is_no_end():
    """With inner solves to a relative residual of 0.3, what vanishes is not dh/dy."""
    step = bx.make_step(make_engine(LOOSE), optax.sgd(0.5), warm_x=False)
    result = bx.minimize(step, Y, X0, steps=400, rtol=1e-3)
    smallest = np.min(result.history.stationarity)
    tolerance = 1e-3 * result.history.stationarity[0]
    assert smallest <= tolerance  # it would have ended
    assert result.outcome is not bx.Outcome.CONVERGED
    assert int(result.state.candidate.refused) >= 1
    assert norm_at(result.state.y) > tolerance


@pytest.mark.parametrize(
    "make",
    [
        lambda engine: bx.make_step(engine, optax.sgd(0.5)),
        lambda engine: bx.make_step(engine, optax.sgd(0.5), schedule=bx.Adaptive(every=1)),
        lambda engine: bx.make_step(engine, optax.sgd(0.5), schedule=bx.Geometric(0.3, 0.99)),
        lambda engine: bx.hoag(engine),
    ],
    ids=["constant", "adaptive", "geometric", "hoag"],
)
def test_what_has_converged_meets_the_tolerance_in_truth(make):
    for rtol in (1e-1, 1e-3):
        result = bx.minimize(make(make_engine(bx.GradientDescent(0.05))), Y, X0, 2000, rtol=rtol)
        assert result.outcome is bx.Outcome.CONVERGED
        assert norm_at(result.y) <= 1.01 * rtol * norm_at(Y)


def test_certificates_of_candidates_get_rarer():
    """They cost as much as a hypergradient; runs that are refused wait for 1, 2, 4, ... steps."""
    step = bx.make_step(make_engine(LOOSE), optax.sgd(0.5), warm_x=False)
    result = bx.minimize(step, Y, X0, steps=300, rtol=3e-2)
    met = np.sum(result.history.stationarity <= 3e-2 * result.history.stationarity[0])
    refused = int(result.state.candidate.refused)
    assert met > 20 and 1 <= refused <= np.log2(300) + 1


def test_a_batch_of_runs_is_certified_run_by_run():
    starts = jnp.stack([jnp.asarray(Y), jnp.asarray(Y) + 0.5])
    step = bx.make_step(make_engine(bx.GradientDescent(0.05)), optax.sgd(0.5))
    together = bx.minimize(step, starts, X0, steps=2000, rtol=1e-2, batched=True)
    for lane, start in enumerate(starts):
        alone = bx.minimize(step, start, X0, steps=2000, rtol=1e-2)
        assert together.outcome[lane] == alone.outcome == bx.Outcome.CONVERGED
        np.testing.assert_allclose(together.y[lane], alone.y, rtol=1e-9)


def test_rules_without_certificates_end_by_the_gradient_alone():
    solver = bx.GradientDescent(0.05, rtol=0.0, atol=0.0, maxiter=300)
    engine = bx.value_and_hypergradient(outer, bx.minimum(inner), solver, bx.Unrolled())
    result = bx.minimize(bx.make_step(engine, optax.sgd(0.5)), Y, X0, 2000, rtol=1e-2)
    assert result.outcome is bx.Outcome.CONVERGED
    assert int(result.state.candidate.refused) == 0
