"""The loop: when it stops, and what it says about that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from bilevax import Status
from bilevax import _loop as loop

CURVATURES = np.array([1.0, 4.0])  # rates below 1/2 converge
START = np.array([1.0, 1.0])
GRADIENT_NORM = np.sqrt(17.0)  # at the start


def bowl(x, y):
    return 0.5 * jnp.sum(y * x**2)


def logarithm(x, y):
    return jnp.sum(x - y * jnp.log(x))  # not a number below zero


BOWL, LOGARITHM = bx.minimum(bowl), bx.minimum(logarithm)
run = jax.jit(loop.run)


def descend(rate=0.25, rtol=1e-6, atol=0.0, maxiter=1000, *, problem=BOWL, x0=START, y=CURVATURES):
    x, report = run(bx.GradientDescent(rate, rtol, atol, maxiter), problem, x0, y)
    return x, report._replace(status=Status(int(report.status)))


def norms(rate, steps):
    """Return ||F|| along the way, in closed form."""
    factors = (1 - rate * CURVATURES) ** np.arange(steps + 1)[:, None]
    return np.linalg.norm(CURVATURES * factors * START, axis=1)


@pytest.mark.parametrize("rtol", [0.5, 1e-3, 1e-10])
@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_the_relative_tolerance_is_on_the_first_residual(rate, rtol):
    expected = norms(rate, 1000)
    steps = np.argmax(expected <= rtol * GRADIENT_NORM)
    x, report = descend(rate, rtol)
    assert (report.status, report.iterations) == (Status.CONVERGED, steps)
    np.testing.assert_allclose(report.residual, expected[steps], rtol=1e-9)
    np.testing.assert_allclose(report.initial_residual, GRADIENT_NORM)
    np.testing.assert_allclose(x, (1 - rate * CURVATURES) ** steps, rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("atol", [1.0, 1e-5])
@pytest.mark.parametrize("rtol", [0.0, 1e-12])
def test_the_absolute_tolerance_is_on_the_residual(atol, rtol):
    steps = np.argmax(norms(0.1, 1000) <= atol)
    _, report = descend(0.1, rtol, atol)
    assert (report.status, report.iterations) == (Status.CONVERGED, steps)


def test_the_larger_tolerance_counts():
    steps = np.argmax(norms(0.1, 1000) <= 0.5 * GRADIENT_NORM)
    _, report = descend(0.1, 0.5, 1e-9)
    assert (report.status, report.iterations) == (Status.CONVERGED, steps)


@pytest.mark.parametrize(("dtype", "epsilon"), [(np.float32, 2.0**-23), (np.float64, 2.0**-52)])
def test_default_tolerances_follow_the_dtype(dtype, epsilon):
    x0, y = START.astype(dtype), CURVATURES.astype(dtype)
    x, report = run(bx.GradientDescent(0.1), BOWL, x0, y)
    assert x.dtype == dtype
    target = epsilon**0.75 * GRADIENT_NORM
    steps = np.argmax(norms(0.1, 1000) <= target)
    assert report.status == Status.CONVERGED
    assert abs(int(report.iterations) - steps) <= 1  # rounding may decide the last step


def scaled(x, y):
    y, unit = y
    return unit * cubic(x, y)


SCALED = bx.minimum(scaled)


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_default_tolerances_do_not_depend_on_the_unit_of_f(dtype, unit):
    x0, y = START.astype(dtype), CURVATURES.astype(dtype)
    want, _ = run(bx.Newton(), SCALED, x0, (y, dtype(1)))
    got, report = run(bx.Newton(), SCALED, x0, (y, dtype(unit)))
    assert report.status == Status.CONVERGED
    np.testing.assert_allclose(got, want, rtol=1e3 * np.finfo(dtype).eps)


def third(x, y):
    return x / 3 - y + 1e-3 * x


NEARLY_SOLVED = {  # y comes with the unit of F
    bx.minimum: bx.minimum(lambda x, y: y[1] * jnp.sum((x / 3 - y[0]) ** 2 + 1e-3 * x**2)),
    bx.root: bx.root(lambda x, y: y[1] * third(x, y[0])),
    bx.fixed_point: bx.fixed_point(lambda x, y: x - third(x, y[0])),
}


@pytest.mark.parametrize(
    ("make", "unit"),
    [(kind, unit) for kind in (bx.minimum, bx.root) for unit in (1e-12, 1.0, 1e12)]
    + [(bx.fixed_point, 1.0)],  # whose F has the unit of x
)
def test_with_defaults_a_start_at_the_solution_ends_at_once(make, unit):
    # F is a rounding error there, and a part of that is out of reach.
    y = np.array([0.1, 0.3, 0.7])
    solution = y / (1 / 3 + 1e-3)
    if make is bx.minimum:
        solution = y / 3 / (1 / 9 + 1e-3)
    x = solution * (1 + 1e-16 + np.array([2.0, -1, 1]) * 2.0**-52)
    _, report = run(bx.Newton(), NEARLY_SOLVED[make], x, (y, unit))
    assert 0 < report.initial_residual < 1e-14 * unit
    assert (report.status, report.iterations) == (Status.CONVERGED, 0)


@pytest.mark.parametrize("maxiter", [0, 1, 2, 17])
def test_without_a_tolerance_exactly_so_many_steps_are_taken(maxiter):
    x, report = descend(0.1, 0.0, 0.0, maxiter)
    assert (report.status, report.iterations) == (Status.TRUNCATED, maxiter)
    np.testing.assert_allclose(x, (1 - 0.1 * CURVATURES) ** maxiter, rtol=1e-12)


@pytest.mark.parametrize("maxiter", [0, 1, 2])
@pytest.mark.parametrize("tolerances", [(1e-6, 0.0), (0.0, 1e-6)])
def test_a_tolerance_that_is_not_met(tolerances, maxiter):
    x, report = descend(0.1, *tolerances, maxiter)
    assert (report.status, report.iterations) == (Status.MAXITER, maxiter)
    np.testing.assert_allclose(x, (1 - 0.1 * CURVATURES) ** maxiter, rtol=1e-12)


@pytest.mark.parametrize("maxiter", [0, 1000])
@pytest.mark.parametrize("rtol", [0.0, 1e-6])
def test_a_start_at_the_solution_takes_no_step(rtol, maxiter):
    x, report = descend(0.1, rtol, maxiter=maxiter, x0=np.zeros(2))
    assert (report.status, report.iterations, report.residual) == (Status.CONVERGED, 0, 0)
    np.testing.assert_array_equal(x, 0)


def test_divergence():
    _, report = descend(1.0)  # the second entry grows by -3 a step
    assert report.status is Status.DIVERGED
    expected = norms(1.0, 100)
    ceiling = GRADIENT_NORM / np.finfo(float).eps
    assert report.iterations == np.argmax(expected > ceiling)
    np.testing.assert_allclose(report.residual, expected[report.iterations])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_start_that_is_not_finite(bad):
    _, report = descend(x0=np.array([1.0, bad]))
    assert (report.status, report.iterations) == (Status.NONFINITE, 0)


def test_a_step_that_leaves_the_domain():
    _, report = descend(30.0, problem=bx.minimum(clipped), x0=np.array([0.1, 1.0]))
    assert report.status is Status.NONFINITE
    assert report.iterations >= 1


def clipped(x, y):
    return jnp.sum(x - y * jnp.sqrt(x))  # a long step makes x negative


def cubic(x, y):
    return 1e3 + jnp.sum(y * (x**3 / 3 - 2 * x))  # the gradient has no zero among the floats


def test_a_solver_that_cannot_do_better_stalls():
    solver = bx.GradientDescent(bx.Backtracking(), rtol=0.0, atol=1e-300, maxiter=100_000)
    x, report = run(solver, bx.minimum(cubic), START, CURVATURES)
    assert report.status == Status.STALLED
    np.testing.assert_allclose(x, np.sqrt(2), rtol=1e-14)


def test_every_lane_of_a_batch_has_its_own_status():
    lanes = [  # rate, rtol, atol, maxiter, start
        (0.25, 1e-6, 0.0, 1000, START, Status.CONVERGED),
        (0.25, 0.0, 0.0, 5, START, Status.TRUNCATED),
        (0.25, 1e-6, 0.0, 5, START, Status.MAXITER),
        (1.0, 1e-6, 0.0, 1000, START, Status.DIVERGED),
        (0.25, 1e-6, 0.0, 1000, START * np.nan, Status.NONFINITE),
        (0.25, 1e-6, 0.0, 0, START, Status.MAXITER),
    ]
    *numbers, starts, wanted = zip(*lanes, strict=True)
    numbers = [np.array(part) for part in numbers]

    def one(rate, rtol, atol, maxiter, x0):
        return loop.run(bx.GradientDescent(rate, rtol, atol, maxiter), BOWL, x0, CURVATURES)

    x, report = jax.jit(jax.vmap(one))(*numbers, np.stack(starts))
    assert [Status(int(status)) for status in report.status] == list(wanted)
    for i, (rate, rtol, atol, maxiter, x0, status) in enumerate(lanes):
        expected, expected_report = descend(rate, rtol, atol, maxiter, x0=x0)
        assert expected_report.status is status
        assert report.iterations[i] == expected_report.iterations
        np.testing.assert_allclose(x[i], expected, rtol=1e-9)


@pytest.mark.parametrize("empty", [np.zeros(0), {"a": np.zeros((2, 0)), "b": ()}], ids=str)
@pytest.mark.parametrize("kind", [lambda: bx.GradientDescent(0.1), bx.Newton], ids=["gd", "newton"])
def test_nothing_to_solve_for(kind, empty):
    problem = bx.minimum(lambda x, y: y * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(x)))
    x, report = bx.solution_map(problem, kind()).with_report(empty, 1.0)
    assert jax.tree.structure(x) == jax.tree.structure(empty)
    assert (report.status, report.iterations, report.residual) == (Status.CONVERGED, 0, 0)


@pytest.mark.parametrize("solver", [bx.GradientDescent(0.2), bx.Newton(), bx.ConjugateGradient()])
def test_an_inner_variable_without_axes(solver):
    problem = bx.minimum(lambda x, y: 0.5 * y * x**2 - x)
    x, report = bx.solution_map(problem, solver).with_report(0.0, 4.0)
    assert (x.shape, int(report.status)) == ((), Status.CONVERGED)
    np.testing.assert_allclose(x, 0.25, rtol=1e-11)
