"""Unrolled runs against recursions in NumPy and central differences of the same runs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import Status
from tests.everyday import params
from tests.iterative.example import (
    DECOUPLED,
    RUNS,
    X0,
    C,
    Y,
    assert_close,
    central_differences,
    exactly,
    run_of,
    steps_of,
)
from tests.problems_table import PROBLEMS
from tests.problems_table import X0 as TABLE_X0
from tests.problems_table import Y as TABLE_Y

MINIMUM, ROOT, FIXED_POINT = (row.problem for row in PROBLEMS)
RETURN = bx.OnFailure.RETURN

# Derivatives of a run with respect to all that it depends on: start, y, numbers of the solver.


REDUNDANT = ("Adam", "Newton", "conjugate gradient")
STOPPED_EARLY = ("accelerated", "Anderson", "momentum", "Newton on a root")


@pytest.mark.parametrize(
    ("name", "early"),
    params(
        [(name, False) for name in RUNS] + [(name, True) for name in STOPPED_EARLY],
        # Adam is another optimiser of Optax, and test_three_ways.py has differences for the others
        # that are left out here; one early stop of them all is enough.
        lambda name, early: name == "momentum" if early else name not in REDUNDANT,
    ),
)
def test_everything_a_run_depends_on_against_central_differences(name, early):
    """The differences are those of the plain loop, which is not differentiated."""
    steps = steps_of(name)
    settings, point = exactly(steps), (TABLE_X0, TABLE_Y, np.array(RUNS[name][1]))
    if early:
        # ||F|| after these steps lies between this tolerance and that of the step before.
        _, report = run_of(name, None, exactly(steps - 1))(point)
        settings = {"rtol": 0.0, "atol": 0.95 * float(report.residual), "maxiter": steps + 6}
    plain = jax.jit(jax.vmap(run_of(name, None, settings)))
    iterations = []

    def values(points):
        value, report = plain(points)
        iterations.append(report.iterations)
        return value

    wanted = central_differences(values, point, 2e-4)
    (_, report), gradient = jax.jit(
        jax.value_and_grad(run_of(name, bx.Unrolled(), settings), has_aux=True)
    )(point)
    assert np.all(np.concatenate(iterations) == report.iterations)  # no jump in between
    assert (0 < report.iterations < settings["maxiter"]) == early
    assert report.status == (Status.CONVERGED if early else Status.TRUNCATED)
    assert_close(gradient, wanted, 1e-6, 1e-8)


def test_a_rate_traced_into_an_optimiser_of_optax_and_heavy_ball_in_numpy():
    def value(numbers, x0, y):
        solver = bx.Optax(optax.sgd(numbers[0], momentum=numbers[1]), **exactly(4))
        return C @ bx.solution_map(DECOUPLED, solver, bx.Unrolled())(x0, y)

    def recursion(numbers, x, y):
        velocity = np.zeros_like(x)
        for _ in range(4):
            velocity = numbers[1] * velocity + np.exp(y) * x - 1
            x = x - numbers[0] * velocity
        return C @ x

    point = (np.array([0.3, 0.5]), X0, Y)
    gradient = jax.jit(jax.grad(value, argnums=(0, 1, 2)))(*point)
    wanted = central_differences(
        lambda points: [
            recursion(*(np.asarray(leaf)[i] for leaf in points)) for i in range(len(points[0]))
        ],
        point,
    )
    assert_close(gradient, wanted, 1e-9)
    eager = jax.grad(value, argnums=(0, 1, 2))(*point)
    assert_close(eager, gradient, 1e-13)


def test_newton_far_from_the_solution_has_the_derivative_of_its_steps():
    """Its default linear solves would be loose there."""
    frequencies = jnp.array([1.0, 3.0, 10.0, 30.0])

    def f(x, y):
        return jnp.sum(jnp.cosh(frequencies * x)) + jnp.exp(y) * jnp.sum((x - jnp.arange(4.0)) ** 2)

    solve = bx.solution_map(bx.minimum(f), bx.Newton(**exactly(2)), bx.Unrolled())

    def value(y):
        return jnp.sum(solve(jnp.full(4, 0.1), y))

    wanted = central_differences(jax.jit(jax.vmap(value)), np.asarray(0.0))
    np.testing.assert_allclose(jax.jit(jax.grad(value))(0.0), wanted, rtol=1e-6)
