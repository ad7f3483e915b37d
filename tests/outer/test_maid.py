"""MAID: every accepted step decreases h by NumPy, and its end is the minimiser of SciPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import bilevax as bx
from bilevax.checkpoints import Checkpoints
from bilevax.outer._quasi_newton import no_pairs, remember, times_inverse
from tests.certificates.bound_problems import FAMILIES, SIZE
from tests.certificates.bound_problems import truth as truth_of
from tests.outer.example import (
    DESCENT,
    X0,
    A,
    B,
    C,
    E,
    Y,
    assert_equal,
    make_engine,
    minimiser,
    scanned,
    truth,
)

LOOSE = make_engine(DESCENT, bx.Implicit(bx.Dense()))
# The example's losses are sums over rows, and those of `BoundConstants` means.
CONSTANTS = bx.BoundConstants.ridge(
    tuple(np.sqrt(len(B)) * part for part in (A, B)),
    tuple(np.sqrt(len(E)) * part for part in (C, E)),
)
WAYS = {"reference": None, "bounds": CONSTANTS}
STEPS = 40
FIRST_STEPS = (1e-3, 1.0, 1e3)


def run(step: Any, y: Any = Y, x0: Any = X0, **options: Any) -> bx.MinimizeResult:
    return bx.minimize(step, y, x0, progress=False, **options)


def states(way, first_step, y=Y):
    step = bx.maid(LOOSE, constants=WAYS[way], first_step=first_step)
    return scanned(step, step.init(y, X0, history=STEPS), STEPS)


@pytest.mark.parametrize("first_step", FIRST_STEPS)
@pytest.mark.parametrize("way", WAYS)
def test_every_accepted_step_decreases_the_true_value(way, first_step):
    found = states(way, first_step)
    search = found.optimizer
    values = np.array([truth(y)[2] for y in search.y])
    gradients = np.array([truth(y)[3] for y in search.y])
    is_move = np.diff(search.accepted) > 0
    assert np.all(np.diff(values)[is_move] < 0) and np.sum(is_move) >= 6
    np.testing.assert_array_equal(np.diff(search.y, axis=0)[~is_move], 0)
    # What is said of errors at the point that is accepted.
    room = 1e-15
    assert np.all(np.abs(search.at.value - values) <= search.at.value_error + room)
    errors = np.linalg.norm(search.at.gradient - gradients, axis=1)
    assert np.all(errors <= search.at.gradient_error + room)
    # It ends at the minimiser, and solves loosely at first.
    np.testing.assert_allclose(search.y[-1], minimiser(), atol=1e-6)
    assert found.history.rtol[-1][0] == 0.1
    assert search.at.gradient_error[0] > 1e-3 or way == "reference"


@pytest.mark.parametrize("way", WAYS)
def test_history_tells_accepted_steps_from_trials(way):
    found = states(way, 1e3)
    history = jax.tree.map(lambda leaf: leaf[-1], found.history)
    before = np.concatenate([[0], found.optimizer.accepted[:-1]])
    is_move = np.asarray(found.optimizer.accepted) > before
    assert np.all(np.isfinite(history.stationarity[is_move]))
    assert np.isinf(history.stationarity).sum() >= 3  # trials that were too far
    # Rejected trials leave the point, the best one is the last that was accepted.
    np.testing.assert_array_equal(found.best.y, found.optimizer.y)
    assert history.value[0] == np.max(history.value[is_move | (np.arange(STEPS) == 0)])


def test_a_run_of_minimize_goes_on_from_a_checkpoint(tmp_path):
    step = bx.maid(LOOSE)
    whole = run(step, steps=60, rtol=1e-6, chunk=4)
    assert whole.outcome is bx.Outcome.CONVERGED
    np.testing.assert_allclose(whole.y, minimiser(), atol=1e-5)
    np.testing.assert_allclose(whole.value, truth(minimiser())[2], rtol=1e-9)
    saved: dict[str, Any] = {"chunk": 4, "checkpoint": Checkpoints(tmp_path, every_steps=4)}
    assert run(step, steps=8, rtol=1e-6, **saved).outcome is bx.Outcome.STEPS
    assert_equal(run(step, steps=60, rtol=1e-6, **saved).state, whole.state)


def test_a_batch_of_runs_with_a_box():
    """Each run equals one by itself; the minimiser in the box is that of SciPy."""

    def box(y):
        return optax.projections.projection_box(y, -0.3, 0.2)

    step = bx.maid(LOOSE, projection=box, first_step=0.3)
    starts = jnp.stack([jnp.asarray(Y), jnp.full(3, 0.2), jnp.full(3, -0.3)])
    runs = run(step, starts, steps=60, rtol=1e-6, batched=True, chunk=60)
    assert np.all(runs.outcome == bx.Outcome.CONVERGED)
    want = minimiser(bounds=[(-0.3, 0.2)] * 3)
    np.testing.assert_allclose(runs.y, np.broadcast_to(want, (3, 3)), atol=1e-5)
    assert len(set(np.asarray(runs.steps).tolist())) > 1
    one = run(step, starts[1], steps=60, rtol=1e-6, chunk=60)
    np.testing.assert_allclose(runs.y[1], one.y, rtol=1e-8)
    assert runs.steps[1] == one.steps


def test_in_float32():
    x0, y = jnp.zeros(3, jnp.float32), jnp.asarray(Y, jnp.float32)
    step = bx.maid(LOOSE, constants=CONSTANTS)
    found = scanned(step, step.init(y, x0, history=STEPS), STEPS)
    values = np.array([truth(y)[2] for y in found.optimizer.y])
    is_move = np.diff(found.optimizer.accepted) > 0
    assert found.optimizer.y.dtype == np.float32
    assert np.all(np.diff(values)[is_move] < 0) and np.sum(is_move) >= 4
    assert values[-1] - truth(minimiser())[2] < 1e-4


# Where h has no value, and where nothing is there at all.


def pole(x, y):
    """h(y) = y - log(y), which does not exist below 0."""
    return x - jnp.log(y)


def follow(x, y):
    return (x - y) ** 2


def test_a_trial_without_a_value_is_made_shorter():
    engine = bx.value_and_hypergradient(pole, bx.minimum(follow), bx.Newton())
    result = run(bx.maid(engine, first_step=30.0), 5.0, 5.0, steps=60, rtol=1e-5, chunk=60)
    assert result.outcome is bx.Outcome.CONVERGED
    np.testing.assert_allclose(result.y, 1.0, rtol=1e-4)
    assert not np.all(np.isfinite(result.history.value))
    lost = run(bx.maid(engine, first_step=30.0), -5.0, 5.0, steps=60, rtol=1e-5, chunk=60)
    assert lost.outcome is bx.Outcome.FAILED and lost.state.y == -5.0


# Directions.


def test_directions_are_those_of_bfgs():
    """The inverse Hessian of BFGS as a matrix, by its formula."""
    rng = np.random.default_rng(0)
    hessian = np.diag([1.0, 3.0, 10.0, 30.0])
    pairs, moves = no_pairs(jnp.zeros(4)), rng.normal(size=(3, 4))
    for move in moves:
        pairs = remember(pairs, jnp.asarray(move), jnp.asarray(hessian @ move))
    last = moves[-1]
    inverse = np.eye(4) * (last @ hessian @ last) / np.sum((hessian @ last) ** 2)
    for move in moves:
        change = hessian @ move
        left = np.eye(4) - np.outer(move, change) / (move @ change)
        inverse = left @ inverse @ left.T + np.outer(move, move) / (move @ change)
    gradient = rng.normal(size=4)
    got = times_inverse(pairs, jnp.asarray(gradient), diagonal=False)
    np.testing.assert_allclose(got, inverse @ gradient, rtol=1e-10)
    scale = np.sum(last**2) / (last @ hessian @ last)
    plain = times_inverse(pairs, jnp.asarray(gradient), diagonal=True)
    np.testing.assert_allclose(plain, scale * gradient, rtol=1e-12)


def test_without_pairs_the_direction_is_the_gradient():
    gradient = jnp.array([1.0, -2.0])
    np.testing.assert_array_equal(
        times_inverse(no_pairs(gradient), gradient, diagonal=False), gradient
    )


# Wrong arguments.

ANY_FUNCTION: Any = lambda key: LOOSE  # noqa: E731
ANY_CONSTANTS: Any = 3.0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: bx.maid(ANY_FUNCTION), "`engine` must be an Engine, for example"),
        (lambda: bx.maid(LOOSE, first_step=0.0), "`first_step` must be positive, got 0.0"),
        (lambda: bx.maid(LOOSE, constants=ANY_CONSTANTS), "`constants` must be a BoundConstants"),
        (
            lambda: bx.maid(make_engine(accuracy=bx.RelativeAccuracy(1e-2))),
            "take an engine without `accuracy`",
        ),
        (
            lambda: bx.maid(make_engine(bx.GradientDescent(0.1, maxiter=3), bx.Unrolled())),
            "`maid` needs a rule with certificates",
        ),
        (
            lambda: bx.maid(
                make_engine(
                    problem=bx.separable(bx.minimum(lambda x, y, d: (x - y) ** 2), np.ones(2))
                )
            ),
            "must not be separable here",
        ),
        (
            lambda: bx.maid(LOOSE, projection=lambda y: y[:2]).init(Y, X0),
            "`projection` must return",
        ),
        (lambda: bx.maid(LOOSE)(ANY_CONSTANTS), "`state` must be a BilevelState"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ridge", "logistic", "poisson"])
def test_proofs_hold_on_random_regressions_in_any_units(name):
    """By bounds, from first steps of 1e-3 to 1e3, half of them in units of 1e-3 to 1e3."""
    family, count, steps = FAMILIES[name], 40, 30
    rng = np.random.default_rng(4)
    units = 10 ** (rng.uniform(-3, 3, (count, SIZE)) * (rng.random((count, 1)) < 0.5))
    data, y = family.draw(rng, count, units)

    def outer(data, x, y):  # there is a minimum
        return family.outer(data, x, y) + 0.02 * jnp.sum((y - data["start"]) ** 2)

    @jax.jit
    @jax.vmap
    def follow(data, y, first_step):
        problem, g = bx.minimum(Partial(family.inner, data)), Partial(outer, data)
        engine = bx.value_and_hypergradient(g, problem, bx.Newton())
        step = bx.maid(engine, constants=family.constants(data), first_step=first_step)

        def one(state, _):
            following = step(state)
            return following, (following.optimizer.y, following.optimizer.accepted)

        return jax.lax.scan(one, step.init(y, jnp.zeros(SIZE)), length=steps)[1]

    points, accepted = follow({**data, "start": y}, y, 10 ** rng.uniform(-3, 3, count))
    points = np.asarray(points).reshape(-1, SIZE)
    repeated = {key: np.repeat(leaf, steps, axis=0) for key, leaf in data.items()}
    values = truth_of(family, repeated, points)[1]
    values = values + 0.02 * np.sum((points - np.repeat(y, steps, axis=0)) ** 2, axis=1)
    is_move = np.diff(accepted, axis=1) > 0
    assert np.all(np.diff(values.reshape(count, steps), axis=1)[is_move] < 0)
    assert np.min(accepted[:, -1]) >= 3 and np.sum(is_move) > 5 * count
