"""HOAG against its recursion in NumPy, and its minimiser against SciPy."""

import numpy as np
import optax
import pytest

import bilevax as bx
from tests.outer.example import ENGINE, X0, Y, make_engine, minimiser, scanned, truth
from tests.outer.test_minimize import run


def recursion(y, steps, tolerances, first_step, project):
    """Return points and curvatures L_s, with exact values and gradients."""
    y = project(np.asarray(y, float))
    points, curvatures, branches = [y], [], []
    last_y = last_value = last_tolerance = curvature = None
    for number in range(steps):
        _, _, value, gradient = truth(y)
        tolerance = tolerances[number]
        if number == 0:
            curvature = np.linalg.norm(gradient) / first_step
        else:
            distance = np.linalg.norm(y - last_y)
            slack = tolerance + last_tolerance * (1 + distance)
            if value <= last_value + slack - curvature * distance**2 / 2:
                curvature, branch = 0.95 * curvature, "longer"
            elif value <= last_value:
                branch = "same"
            else:
                curvature, branch = 2 * curvature, "shorter"
            branches.append(branch)
        last_y, last_value, last_tolerance = y, value, tolerance
        y = project(y - gradient / curvature)
        points.append(y)
        curvatures.append(curvature)
    return np.array(points), np.array(curvatures), branches


@pytest.mark.parametrize("bounded", [False, True])
def test_steps_equal_the_recursion_in_numpy(bounded):
    # The tolerances are large in the recursion, and the solver is exact: its own are not those.
    schedule = bx.Geometric(2e-10, 0.5, smallest=1e-12)
    project = (lambda y: np.clip(y, -0.3, 0.3)) if bounded else (lambda y: y)
    projection = (lambda y: optax.projections.projection_box(y, -0.3, 0.3)) if bounded else None
    step = bx.hoag(ENGINE, schedule=schedule, projection=projection, first_step=8.0)
    state = scanned(step, step.init(Y, X0, history=40), 40)
    tolerances = np.asarray(state.history.rtol[-1])
    points, curvatures, branches = recursion(Y, 40, tolerances, 8.0, project)
    assert {"longer", "shorter"} <= set(branches)
    np.testing.assert_allclose(state.y, points[1:], atol=1e-6)
    np.testing.assert_allclose(state.optimizer.curvature, curvatures, rtol=1e-7)


def test_loose_tolerances_forgive_a_rise_of_the_value():
    """With values as inexact as 1, every step counts as progress."""
    step = bx.hoag(make_engine(), schedule=bx.Constant(0.4), first_step=0.1)
    state = scanned(step, step.init(Y, X0, history=8), 8)
    curvatures = np.asarray(state.optimizer.curvature)
    np.testing.assert_allclose(curvatures, curvatures[0] * 0.95 ** np.arange(8), rtol=1e-12)


def test_a_run_reaches_the_minimiser_of_scipy():
    result = run(bx.hoag(ENGINE), steps=200, rtol=1e-7, chunk=100)
    assert result.outcome is bx.Outcome.CONVERGED
    np.testing.assert_allclose(result.y, minimiser(), atol=1e-5)
    np.testing.assert_allclose(result.x, truth(minimiser())[0], atol=1e-5)
    # Values of rough inner solutions are below the minimum of h: no such point is the result.
    assert np.min(result.history.value) < result.value - 1e-6
    assert result.value == result.history.value[-1]
    tolerances = np.maximum(0.1 * 0.9 ** np.arange(result.steps), np.finfo(float).eps ** 0.75)
    assert np.all(result.history.rtol <= tolerances * (1 + 1e-12))


def test_the_first_step_has_the_length_that_was_asked_for():
    step = bx.hoag(ENGINE, first_step=0.7)
    y = step(step.init(Y, X0)).y
    np.testing.assert_allclose(np.linalg.norm(y - Y), 0.7, rtol=1e-12)


def test_a_start_at_a_stationary_point_stays_there():
    engine = bx.value_and_hypergradient(
        lambda x, y: (x - 3.0) ** 2, bx.minimum(lambda x, y: (x - y) ** 2), bx.Newton()
    )
    result = run(bx.hoag(engine), 3.0, 0.0)
    assert result.outcome is bx.Outcome.CONVERGED and result.state.y == 3.0
