"""Unrolled runs against recursions in NumPy and central differences of the same runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import bilevax as bx
from bilevax import Status
from tests.iterative.example import (
    AFFINE_MAP,
    DECOUPLED,
    X0,
    C,
    Y,
    assert_close,
    central_differences,
    decoupled,
    descend,
    exactly,
)
from tests.problems_table import PROBLEMS, outer
from tests.problems_table import X0 as TABLE_X0
from tests.problems_table import Y as TABLE_Y

MINIMUM, ROOT, FIXED_POINT = (row.problem for row in PROBLEMS)
RETURN = bx.OnFailure.RETURN

# Derivatives of a run with respect to all that it depends on: start, y, numbers of the solver.

# name: (problem, numbers, solver from numbers and settings)
RUNS = {
    "gradient descent": (ROOT, [0.7], lambda n, s: bx.GradientDescent(n[0], **s)),
    "accelerated": (MINIMUM, [0.4], lambda n, s: bx.AcceleratedGradient(n[0], **s)),
    "backtracking": (MINIMUM, [], lambda n, s: bx.GradientDescent(bx.Backtracking(), **s)),
    "damped Picard": (FIXED_POINT, [0.6], lambda n, s: bx.FixedPointIteration(n[0], **s)),
    "Anderson": (FIXED_POINT, [0.8], lambda n, s: bx.FixedPointIteration(n[0], memory=2, **s)),
    "momentum": (
        MINIMUM,
        [0.3, 0.4],
        lambda n, s: bx.Optax(optax.sgd(n[0], momentum=n[1]), **s),
    ),
    "Adam": (
        MINIMUM,
        [0.1],
        lambda n, s: bx.Optax(optax.scale_by_adam(eps_root=1e-8), n[0], **s),
    ),
    "Newton": (MINIMUM, [], lambda n, s: bx.Newton(bx.Dense(), **s)),
    "Newton on a root": (ROOT, [], lambda n, s: bx.Newton(bx.Dense(), **s)),
    "conjugate gradient": (MINIMUM, [], lambda n, s: bx.ConjugateGradient(**s)),
}
# Newton and its kin are at the solution after a few steps, where line searches are decided by
# rounding; an early stop comes one step later.
FAST = ("Newton", "conjugate gradient")


def steps_of(name):
    return 2 if name.startswith(FAST) else 5


def run_of(name, rule, settings):
    """Return the value of g after a run, and the report, as a function of everything."""
    problem, _, make = RUNS[name]

    def run(point):
        x0, y, numbers = point
        solver = make([numbers[i] for i in range(len(RUNS[name][1]))], settings)
        solve = bx.solution_map(problem, solver, rule, on_failure=RETURN)
        x, report = solve.with_report(x0, y)
        return outer(x, y), report

    return run


STOPPED_EARLY = ("accelerated", "Anderson", "momentum", "Newton on a root")


@pytest.mark.parametrize(
    ("name", "early"),
    [(name, False) for name in RUNS] + [(name, True) for name in STOPPED_EARLY],
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


# Truncation and checkpoints, against the recursion in NumPy.

RATE, LONGEST = 0.35, 12
LEVELS = [np.linalg.norm(np.exp(Y) * x - 1) for x in descend(X0, Y, RATE, LONGEST)[0]]
# A tolerance for each number of steps from 0 to the longest; ||F|| falls.
ATOLS = np.array([*(1.0001 * level for level in LEVELS[:LONGEST]), 0.0])


def stopped_run(rule, atol, x0, y, rate):
    solver = bx.GradientDescent(rate, 0.0, atol, LONGEST)
    x, report = bx.solution_map(DECOUPLED, solver, rule).with_report(x0, y)
    return C @ x, report


def derivatives(rule):
    return jax.value_and_grad(
        lambda atol, x0, y, rate: stopped_run(rule, atol, x0, y, rate), (1, 2, 3), has_aux=True
    )


def check_runs(rule, last):
    """Check all lengths of runs in one batch, and a few of them alone."""
    batch = jax.jit(jax.vmap(derivatives(rule), (0, None, None, None)))(ATOLS, X0, Y, RATE)
    alone = jax.jit(derivatives(rule))
    for steps in range(LONGEST + 1):
        iterates, (by_x0, by_y, by_rate) = descend(X0, Y, RATE, steps, last)
        wanted = C @ iterates[-1], (C * by_x0, C * by_y, C @ by_rate)
        results = [jax.tree.map(lambda leaf, steps=steps: leaf[steps], batch)]
        if steps in (0, 1, 5, 6, 11, LONGEST):
            results.append(alone(ATOLS[steps], X0, Y, RATE))
        for (value, report), gradient in results:
            assert report.iterations == steps
            np.testing.assert_allclose(report.residual, LEVELS[steps], rtol=1e-12)
            np.testing.assert_allclose(report.initial_residual, LEVELS[0], rtol=1e-12)
            assert_close((value, gradient), wanted, 1e-13, 1e-13)


# N < K, N = K, N = K + 1, N a multiple of K, for all N up to 12.
@pytest.mark.parametrize("last", [1, 2, 3, 5, 12])
def test_the_last_steps_of_runs_of_any_length(last):
    check_runs(bx.Unrolled(last), last)


@pytest.mark.parametrize(
    "rule",
    [
        bx.Unrolled(),
        bx.Unrolled(checkpoints=1),
        bx.Unrolled(checkpoints=3),
        bx.Unrolled(checkpoints=5),  # 12 steps in five pieces of three
        bx.Unrolled(checkpoints="sqrt"),
        bx.Unrolled(checkpoints=100),
    ],
    ids=lambda rule: str(rule.checkpoints),
)
def test_checkpoints_change_nothing(rule):
    check_runs(rule, None)


def test_checkpoints_of_the_last_steps():
    check_runs(bx.Unrolled(5, checkpoints=2), 5)


def test_truncation_of_what_a_solver_remembers():
    """The momentum before the last steps is a constant, and so is the weight of Nesterov."""
    solver = bx.Optax(optax.sgd(0.2, momentum=0.5), **exactly(7))

    def recursion(y):
        y = np.asarray(y)
        x, velocity = X0, np.zeros_like(X0)
        for k in range(7):
            curvature = np.exp(Y if k < 4 else y)
            velocity = 0.5 * velocity + curvature * x - 1
            x = x - 0.2 * velocity
        return C @ x

    wanted = central_differences(lambda ys: [recursion(y) for y in ys], Y)
    solve = bx.solution_map(DECOUPLED, solver, bx.Unrolled(3))
    got = jax.jit(jax.grad(lambda y: C @ solve(X0, y)))(Y)
    np.testing.assert_allclose(got, wanted, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("Anderson", "reverse"),
        ("accelerated", "forward"),
        pytest.param("Newton", "reverse", marks=pytest.mark.slow),
    ],
)
def test_as_many_last_steps_as_there_are_is_all_of_them(name, mode):
    steps = steps_of(name)

    def gradient(rule):
        run = run_of(name, rule, exactly(steps))
        derivative = jax.grad if mode == "reverse" else jax.jacfwd
        return jax.jit(derivative(lambda y: run((TABLE_X0, y, np.array(RUNS[name][1])))[0]))

    whole, truncated = bx.Unrolled(mode=mode), bx.Unrolled(steps, mode=mode)
    assert_close(gradient(truncated)(TABLE_Y), gradient(whole)(TABLE_Y), 1e-12)


# At the solution, the derivative of K steps is the Neumann series of K terms.


@pytest.mark.parametrize(
    ("row", "solver", "step_size", "last", "distance"),
    [
        (PROBLEMS[0], bx.GradientDescent(0.2), 0.2, None, 1e-13),
        (PROBLEMS[1], bx.GradientDescent(0.2), 0.2, 4, 1e-13),
        (PROBLEMS[2], bx.FixedPointIteration(), None, None, 1e-10),
    ],
    ids=["minimum", "last steps on a root", "Picard"],
)
def test_is_a_neumann_series_at_the_solution(row, solver, step_size, last, distance):
    """K steps from x* are a series of K terms. F must not vanish before, for a run ends there."""
    terms = 4
    length = terms if last is None else terms + 3
    flat_y, unravel_y = ravel_pytree(TABLE_Y)
    flat_x0, unravel_x = ravel_pytree(TABLE_X0)
    cotangent = np.array([0.3, -1.0, 0.7])

    def optimality(u, w):
        return ravel_pytree(row.optimality(unravel_x(u), unravel_y(w)))[0]

    jacobians = jax.jit(jax.jacfwd(optimality, (0, 1)))
    u = flat_x0
    for _ in range(8):
        u = u - np.linalg.solve(jacobians(u, flat_y)[0], optimality(u, flat_y))
    by_x, by_y = (np.asarray(matrix) for matrix in jacobians(u, flat_y))
    scale = 1.0 if step_size is None else step_size
    step = np.eye(3) - scale * by_x.T
    v = scale * sum(np.linalg.matrix_power(step, k) for k in range(terms)) @ cotangent
    wanted = unravel_y(-by_y.T @ v)

    start = unravel_x(u + distance)
    solve = bx.solution_map(
        row.problem, dataclasses.replace(solver, **exactly(length)), bx.Unrolled(last)
    )
    rule = bx.Implicit(bx.Neumann(terms, step_size=step_size))

    @jax.jit
    def both(y):
        (x, report), pull = jax.vjp(lambda y: solve.with_report(start, y), y)
        still = jax.tree.map(jax.custom_derivatives.zero_from_primal, report)
        (unrolled,) = pull((unravel_x(cotangent), still))
        series, _ = rule.pullback(row.problem, x, y, unravel_x(cotangent))
        return unrolled, series, report.iterations

    unrolled, series, iterations = both(TABLE_Y)
    assert iterations == length
    assert_close(unrolled, wanted, 10 * distance)
    assert_close(series, wanted, 10 * distance)


@pytest.mark.parametrize("last", [None, 3])
def test_is_a_neumann_series_anywhere_if_steps_are_affine(last):
    """T(x, y) = M x + b(y), from any start: v <- M^T v + c, to the last digit but two."""
    matrix = np.random.default_rng(0).normal(size=(3, 3)) / 3
    problem = bx.fixed_point(lambda x, y: matrix @ x + jnp.sin(y))
    solve = bx.solution_map(problem, bx.FixedPointIteration(**exactly(6)), bx.Unrolled(last))
    v = np.zeros(3)
    for _ in range(6 if last is None else last):
        v = matrix.T @ v + C
    got = jax.jit(jax.grad(lambda y: C @ solve(X0, y)))(Y)
    np.testing.assert_allclose(got, np.cos(Y) * v, rtol=1e-14)


# Batches.

LANES_X0 = np.array([[0.9, 0.1], [0.5, 2.0], [0.4, 0.6], [0.3, 1.0], [0.0, 0.0]])
CURVATURES = np.array([[1.0, 2.0], [2.0, 0.5], [0.7, 1.9], [200.0, 1.0], [0.01, 3.0]])
# 1: a start at the solution, F = 0. 3: diverges with a rate of 0.4. 4: very slow.


def curved(x, y):
    return jnp.sum(y * x**2 / 2 - x)


CURVED = bx.minimum(curved)
BATCHED = {  # solver, rule, whether a lane diverges
    "gradient descent": (bx.GradientDescent(0.4, maxiter=40), bx.Unrolled(), True),
    "momentum": (
        bx.Optax(optax.sgd(0.4, momentum=0.1), maxiter=40),
        bx.Unrolled(3, checkpoints=2),
        True,
    ),
    "Anderson": (bx.FixedPointIteration(0.4, memory=1, maxiter=40), bx.Unrolled(3), False),
    "Newton": (bx.Newton(maxiter=40), bx.Unrolled(), False),
    "backtracking": (
        bx.GradientDescent(bx.Backtracking(), maxiter=40),
        bx.Unrolled(checkpoints=5),
        False,
    ),
    "conjugate gradient": (bx.ConjugateGradient(maxiter=40), bx.Unrolled(1), False),
}


@pytest.mark.parametrize("name", BATCHED)
def test_lanes_of_a_batch_are_runs_by_themselves(name):
    solver, rule, diverges = BATCHED[name]
    solve = bx.solution_map(CURVED, solver, rule, on_failure=bx.OnFailure.NAN)

    def value(x0, y):
        x, report = solve.with_report(x0, y)
        if diverges:
            x = solve(x0, y)  # where the policy applies
        return x @ C[:2], report

    derivative = jax.value_and_grad(value, (0, 1), has_aux=True)
    (values, reports), gradients = batch = jax.jit(jax.vmap(derivative))(LANES_X0, CURVATURES)
    alone = jax.jit(derivative)
    for lane in range(len(LANES_X0)):
        got = jax.tree.map(lambda leaf, lane=lane: leaf[lane], batch)
        assert_close(got, alone(LANES_X0[lane], CURVATURES[lane]), 1e-12)
    failed = [diverges and lane == 3 for lane in range(len(LANES_X0))]
    assert [status == Status.DIVERGED for status in reports.status] == failed
    assert np.isnan(values).tolist() == failed
    assert np.isnan(gradients[1]).any(axis=1).tolist() == failed
    assert len(set(reports.iterations.tolist())) >= 3  # lanes stop at different steps
    # A start at the solution: a run of no steps, whose derivative is that of its start.
    assert (reports.status[1], reports.iterations[1]) == (Status.CONVERGED, 0)
    np.testing.assert_array_equal(gradients[1][1], np.zeros(2))


def test_batches_of_rates_and_batches_of_batches():
    def value(rate, x0, y):
        solver = bx.GradientDescent(rate, **exactly(5))
        return C @ bx.solution_map(DECOUPLED, solver, bx.Unrolled(checkpoints=2))(x0, y)

    rates, ys = np.array([0.1, 0.3]), np.stack([Y, Y - 0.2, 2 * Y])
    over_ys = jax.vmap(jax.grad(value, (0, 2)), (None, None, 0))
    by_rate, by_y = jax.jit(jax.vmap(over_ys, (0, None, None)))(rates, X0, ys)
    total = jax.jit(jax.grad(lambda ys: jnp.sum(jax.vmap(lambda y: value(0.3, X0, y))(ys))))(ys)
    for i, rate in enumerate(rates):
        for j, y in enumerate(ys):
            _, (_, want_y, want_rate) = descend(X0, y, rate, 5)
            np.testing.assert_allclose(by_rate[i, j], C @ want_rate, rtol=1e-12)
            np.testing.assert_allclose(by_y[i, j], C * want_y, rtol=1e-12)
    np.testing.assert_allclose(total, by_y[1], rtol=1e-12)


# All modes and orders.


def closed_form(x0, y, rate, steps):
    """Return x_T = x* + (1 - rate exp(y))^T (x0 - x*)."""
    return np.exp(-y) + (1 - rate * np.exp(y)) ** steps * (x0 - np.exp(-y))


def second_derivative(x0, y, rate, steps, step=1e-3):
    """Return d2x_T/dy2 entry by entry, by differences of the recursion's derivative."""

    def first(y):
        return descend(x0, y, rate, steps)[1][1]

    near, far = (first(y + k * step) - first(y - k * step) for k in (1, 2))
    return (8 * near - far) / (12 * step)


@pytest.mark.parametrize(
    "rule",
    [bx.Unrolled(checkpoints=3), pytest.param(bx.Unrolled(), marks=pytest.mark.slow)],
    ids=["three", "all"],
)
def test_modes_and_orders(rule):
    def solve(y):
        return bx.solution_map(DECOUPLED, bx.GradientDescent(0.3, **exactly(7)), rule)(X0, y)

    def value(y):
        return C @ solve(y)

    @jax.jit
    def everything(y):
        return {
            "x": solve(y),
            "jvp": jax.jvp(solve, (y,), (jnp.ones(3),))[1],
            "jacfwd": jax.jacfwd(solve)(y),
            "jacrev": jax.jacrev(solve)(y),
            "hessian": jax.hessian(value)(y),
            "reverse over reverse": jax.jacrev(jax.grad(value))(y),
            "grad of grad": jax.grad(lambda y: jnp.sum(jax.grad(value)(y)))(y),
        }

    got = everything(Y)
    np.testing.assert_allclose(got["x"], closed_form(X0, Y, 0.3, 7), rtol=1e-13)
    by_y = descend(X0, Y, 0.3, 7)[1][1]
    for name in ("jacfwd", "jacrev"):
        np.testing.assert_allclose(got[name], np.diag(by_y), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(got["jvp"], by_y, rtol=1e-12)
    second = C * second_derivative(X0, Y, 0.3, 7)
    for name in ("hessian", "reverse over reverse"):
        np.testing.assert_allclose(got[name], np.diag(second), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(got["grad of grad"], second, rtol=1e-9)


def test_forward_mode_with_a_traced_number_of_steps():
    rule = bx.Unrolled(mode="forward")

    @jax.jit
    def tangent(steps, x0, y):
        solver = bx.GradientDescent(0.3, 0.0, 0.0, steps)
        solve = bx.solution_map(DECOUPLED, solver, rule)
        push_y = jax.jvp(lambda y: solve(x0, y), (y,), (jnp.ones(3),))[1]
        return push_y, jax.jacfwd(lambda x0: solve(x0, y))(x0)

    for steps in (0, 1, 6):
        by_x0, by_y, _ = descend(X0, Y, 0.3, steps)[1]
        got = tangent(steps, X0, Y)
        assert_close(got, (by_y, np.diag(by_x0)), 1e-12)


def test_forward_mode_of_the_last_steps():
    solver = bx.GradientDescent(0.3, **exactly(7))
    solve = bx.solution_map(DECOUPLED, solver, bx.Unrolled(3, mode="forward"))
    by_y = descend(X0, Y, 0.3, 7, last=3)[1][1]
    by_x0, got = jax.jit(jax.jacfwd(solve, (0, 1)))(X0, Y)
    np.testing.assert_allclose(got, np.diag(by_y), rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(by_x0, np.zeros((3, 3)))


@pytest.mark.slow
def test_an_optimiser_with_while_loops_goes_in_forward_mode():
    """The line search of L-BFGS is a `while_loop`; at the solution the start is forgotten."""
    solver = bx.Optax(optax.lbfgs(), maxiter=50)
    solve = bx.solution_map(DECOUPLED, solver, bx.Unrolled(mode="forward"))
    jacobian = jax.jit(jax.jacfwd(lambda y: solve(X0, y)))(Y)
    np.testing.assert_allclose(jacobian, np.diag(-np.exp(-Y)), rtol=1e-5, atol=1e-5)


# What flows where.


def test_closed_over_traced_values_get_gradients():
    def value(shift, rate):
        problem = bx.minimum(lambda x, y: decoupled(x, y + shift))
        solver = bx.GradientDescent(rate, **exactly(5))
        return C @ bx.solution_map(problem, solver, bx.Unrolled())(X0, Y)

    _, (_, by_y, by_rate) = descend(X0, Y + 0.2, 0.3, 5)
    for transform in (lambda f: f, jax.jit):
        by_shift, got = transform(jax.grad(value, (0, 1)))(jnp.full(3, 0.2), 0.3)
        np.testing.assert_allclose(by_shift, C * by_y, rtol=1e-12)
        np.testing.assert_allclose(got, C @ by_rate, rtol=1e-12)


def test_rates_that_depend_on_y():
    def value(y):
        solver = bx.GradientDescent(0.3 * jnp.exp(y[0]), **exactly(5))
        return C @ bx.solution_map(DECOUPLED, solver, bx.Unrolled())(X0, y)

    rate = 0.3 * np.exp(Y[0])
    _, (_, by_y, by_rate) = descend(X0, Y, rate, 5)
    wanted = C * by_y + np.array([C @ by_rate * rate, 0, 0])
    np.testing.assert_allclose(jax.jit(jax.grad(value))(Y), wanted, rtol=1e-12)


def noisy(x, y):
    return decoupled(x, y["w"][y["index"]]) + 1e-3 * jax.random.normal(y["key"], x.shape) @ x


NOISY_Y = {"w": jnp.array([0.1, 0.4, -0.3]), "index": jnp.array([2, 0]), "key": jax.random.key(0)}


@pytest.mark.parametrize(
    "rule", [bx.Unrolled(), bx.Unrolled(2, checkpoints=1), bx.OneStep()], ids=["all", "last", "one"]
)
def test_integer_and_key_leaves_of_y(rule):
    solver = bx.GradientDescent(0.3, **exactly(4))
    solve = bx.solution_map(bx.minimum(noisy), solver, rule)
    gradient = jax.jit(jax.grad(lambda y: jnp.sum(solve(jnp.ones(2), y)), allow_int=True))(NOISY_Y)
    noise = 1e-3 * np.asarray(jax.random.normal(NOISY_Y["key"], (2,)))
    # The noise shifts F by a constant; a recursion in NumPy once more.
    x, w, by_w = np.ones(2), np.array([-0.3, 0.1]), np.zeros(2)
    one_step = isinstance(rule, bx.OneStep)
    for k in range(5 if one_step else 4):
        if (one_step and k == 4) or (not one_step and rule.last and k == 4 - rule.last):
            by_w = np.zeros(2)
        by_w = (1 - 0.3 * np.exp(w)) * by_w - 0.3 * np.exp(w) * x
        x = x - 0.3 * (np.exp(w) * x - 1 + noise)
    np.testing.assert_allclose(gradient["w"], [by_w[1], 0, by_w[0]], rtol=1e-12)
    for name in ("index", "key"):
        assert gradient[name].dtype == jax.dtypes.float0


def test_an_optimiser_that_remembers_a_random_key():
    solver = bx.Optax(optax.noisy_sgd(0.2, eta=1e-4, gamma=0.5, key=0), **exactly(6))

    def value(rule, x0, y):
        return C @ bx.solution_map(DECOUPLED, solver, rule)(x0, y)

    # The noise is additive: it changes the iterates, but the derivative with respect to x0 not.
    got = jax.jit(jax.grad(lambda x0: value(bx.Unrolled(checkpoints=2), x0, Y)))(X0)
    np.testing.assert_allclose(got, C * descend(X0, Y, 0.2, 6)[1][0], rtol=1e-12)
    last = jax.jit(jax.grad(lambda y: value(bx.Unrolled(2), X0, y)))(Y)
    assert np.all(np.isfinite(last)) and np.all(last != 0)


@pytest.mark.parametrize("rule", [bx.Unrolled(), bx.Unrolled(3), bx.OneStep()], ids=repr)
def test_float32_stays_float32(rule):
    solver = bx.Optax(optax.sgd(0.3, momentum=0.2), **exactly(6))
    x0, y = jnp.asarray(X0, jnp.float32), jnp.asarray(Y, jnp.float32)

    def value(x0, y):
        x, report = bx.solution_map(DECOUPLED, solver, rule).with_report(x0, y)
        return jnp.sum(x * jnp.asarray(C, x.dtype)), (x, report)

    derivative = jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))
    got, wanted = derivative(x0, y), derivative(X0, Y)
    for leaf in jax.tree.leaves(got):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    assert_close(got[1], wanted[1], 2e-6, 2e-6)
    assert_close(got[0][1][0], wanted[0][1][0], 2e-6)


def test_custom_derivatives_inside_the_problem():
    """A user's `custom_vjp` allows reverse mode alone, and the run before the last steps too."""

    @jax.custom_vjp
    def half_cosine(x, y):
        return 0.5 * jnp.cos(x * y)

    def forward(x, y):
        return half_cosine(x, y), (x, y)

    def backward(saved, cotangent):
        x, y = saved
        return -0.5 * jnp.sin(x * y) * y * cotangent, -0.5 * jnp.sin(x * y) * x * cotangent

    half_cosine.defvjp(forward, backward)
    x, by_y, y = 0.3, 0.0, 1.2
    for k in range(9):
        by_y = 0.0 if k == 6 else by_y
        slope = -0.5 * np.sin(x * y)
        x, by_y = 0.5 * np.cos(x * y), slope * y * by_y + slope * x
    solver = bx.FixedPointIteration(**exactly(9))
    solve = bx.solution_map(bx.fixed_point(half_cosine), solver, bx.Unrolled(3))
    np.testing.assert_allclose(jax.jit(jax.grad(lambda y: solve(0.3, y)))(y), by_y, rtol=1e-12)


def test_a_solution_map_inside_of_an_unrolled_one():
    """The inner map has x*(z) = 1 / z, so the outer equation is z = 0.3 / (y + z^2)."""
    inner = bx.solution_map(bx.minimum(curved), bx.Newton(), bx.Implicit(mode="forward"))
    unrolled = bx.solution_map(
        bx.minimum(curved), bx.GradientDescent(0.4, maxiter=60), bx.Unrolled()
    )

    def value(solve, y):
        outside = bx.root(lambda z, y: z - 0.3 * solve(0.5, y + z**2))
        return bx.solution_map(outside, bx.GradientDescent(0.9, maxiter=40), bx.Unrolled())(0.2, y)

    z = 0.14
    for _ in range(60):
        z = 0.3 / (2.0 + z**2)
    # dz = -0.3 / (y + z^2)^2 (dy + 2 z dz)
    slope = -0.3 / (2.0 + z**2) ** 2
    for solve in (inner, unrolled):
        value_at_2, got = jax.jit(jax.value_and_grad(lambda y, s=solve: value(s, y)))(2.0)
        np.testing.assert_allclose(value_at_2, z, rtol=1e-9)
        np.testing.assert_allclose(got, slope / (1 - 2 * z * slope), rtol=1e-8)


# Memory.

FEATURES = 16


def fit(x, y):
    return jnp.mean((DATA @ x - 1) ** 2) / 2 + jnp.exp(y) * jnp.sum(x**2) / 2


DATA = np.random.default_rng(0).normal(size=(2048, FEATURES))
BYTES = 8 * FEATURES


def temporary_bytes(rule, steps, derivative=jax.grad):
    solver = bx.GradientDescent(0.1, **exactly(steps))
    solve = bx.solution_map(bx.minimum(fit), solver, rule)
    program = jax.jit(derivative(lambda y: jnp.sum(solve(jnp.zeros(FEATURES), y))))
    return program.lower(0.1).compile().memory_analysis().temp_size_in_bytes


def test_memory_is_a_few_vectors_per_step_and_never_the_data():
    few, many = (temporary_bytes(bx.Unrolled(), steps) for steps in (100, 400))
    per_step = (many - few) / 300
    assert BYTES <= per_step < 8 * BYTES < DATA.nbytes / 100


def test_memory_of_checkpoints_grows_as_the_root_of_the_number_of_steps():
    few, many = (temporary_bytes(bx.Unrolled(checkpoints="sqrt"), n) for n in (100, 10_000))
    # 10 checkpoints and 10 steps between two of them; 100 and 100.
    assert 90 * BYTES < many - few < 90 * 2 * 8 * BYTES
    truncated = [temporary_bytes(bx.Unrolled(10), steps) for steps in (100, 10_000)]
    assert truncated[0] == truncated[1]


def test_memory_of_forward_mode_does_not_depend_on_the_number_of_steps():
    rule = bx.Unrolled(mode="forward")
    sizes = {temporary_bytes(rule, steps, jax.jacfwd) for steps in (100, 10_000)}
    assert len(sizes) == 1


# Optimisers whose derivative does not exist where an entry of the gradient is zero.


def flat_entry(x, y):
    return y * (x[0] - 1) ** 2 / 2 + y * x[1] ** 2 / 2  # F[1] = 0 along a run from x[1] = 0


@pytest.mark.parametrize(
    "rule", [bx.Unrolled(), bx.Unrolled(2), bx.Unrolled(mode="forward")], ids=repr
)
def test_adam_without_a_root_of_epsilon_warns_and_is_nan(rule):
    solver = bx.Optax(optax.adam(0.1), **exactly(3))
    solve = bx.solution_map(bx.minimum(flat_entry), solver, rule)
    with pytest.warns(UserWarning, match="set `eps_root=1e-12` or so"):
        _, tangent = jax.jvp(lambda y: solve(jnp.zeros(2), y), (1.0,), (1.0,))
    assert np.isfinite(tangent[0]) and np.isnan(tangent[1])


def test_adam_without_a_root_of_epsilon_in_reverse_mode_and_an_engine():
    solver = bx.Optax(optax.adam(0.1), **exactly(3))
    engine = bx.value_and_hypergradient(
        lambda x, y: jnp.sum(x), bx.minimum(flat_entry), solver, bx.Unrolled()
    )
    with pytest.warns(UserWarning, match="set `eps_root=1e-12` or so"):
        result = engine(1.0, bx.cold_start(jnp.zeros(2)))
    assert np.isnan(result.gradient) and np.isfinite(result.value)


@pytest.mark.parametrize(
    "transformation",
    [optax.adam(0.1, eps_root=1e-12), optax.sgd(0.1, momentum=0.9), optax.sgd(0.1)],
    ids=["eps_root", "momentum", "sgd"],
)
def test_no_warning_where_derivatives_exist(transformation):
    solver = bx.Optax(transformation, **exactly(3))
    solve = bx.solution_map(bx.minimum(flat_entry), solver, bx.Unrolled())
    jacobian = jax.jacrev(lambda y: solve(jnp.zeros(2), y))(1.0)  # warnings are errors
    assert np.isfinite(jacobian[0]) and jacobian[1] == 0


# Engines.


def engine_of(rule, solver=None, **options):
    solver = bx.GradientDescent(0.3, **exactly(5)) if solver is None else solver
    return bx.value_and_hypergradient(
        lambda x, y: C @ x + jnp.sum(y**2), DECOUPLED, solver, rule, **options
    )


@pytest.mark.parametrize(
    "rule",
    [
        bx.Unrolled(),
        bx.Unrolled(checkpoints=2),
        bx.Unrolled(mode="forward"),
        bx.Unrolled(2),
        bx.Unrolled(2, mode="forward"),
    ],
    ids=repr,
)
def test_an_engine_differentiates_the_run_from_its_warm_start(rule):
    engine, last = engine_of(rule), rule.last
    warm = bx.cold_start(X0)
    x = X0
    for y in (Y, Y + 0.1):
        result = engine(y, warm)
        iterates, (_, by_y, _) = descend(x, y, 0.3, 5, last)
        x = iterates[-1]
        np.testing.assert_allclose(result.x, x, rtol=1e-13)
        np.testing.assert_allclose(result.value, C @ x + y @ y, rtol=1e-13)
        np.testing.assert_allclose(result.gradient, C * by_y + 2 * y, rtol=1e-12)
        assert result.report.inner.status == Status.TRUNCATED
        assert result.report.adjoint is None and result.report.certificate is None
        assert result.report.identity_entries is None and result.aux is None
        warm = result.warm
        np.testing.assert_array_equal(warm.x, result.x)
        np.testing.assert_array_equal(warm.start, X0)
    if last is None:
        return
    lanes = jax.jit(jax.vmap(engine, (0, None)))(np.stack([Y, Y + 0.1]), bx.cold_start(X0))
    for i, y in enumerate((Y, Y + 0.1)):
        by_y = descend(X0, y, 0.3, 5, last)[1][1]
        np.testing.assert_allclose(lanes.gradient[i], C * by_y + 2 * y, rtol=1e-12)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_an_engine_with_aux_and_leaves_of_all_kinds(mode):
    y = dict(NOISY_Y, single=jnp.float32(2.0))
    engine = bx.value_and_hypergradient(
        lambda x, y: (jnp.sum(x) * y["single"], {"x": x, "count": 3, "key": y["key"]}),
        bx.minimum(noisy),
        bx.GradientDescent(0.3, **exactly(4)),
        bx.Unrolled(mode=mode),
        has_aux=True,
    )
    result = jax.jit(engine)(y, bx.cold_start(jnp.ones(2)))
    np.testing.assert_array_equal(result.aux["x"], result.x)
    assert result.aux["count"] == 3 and result.aux["key"] == y["key"]
    assert result.gradient["w"].shape == (3,) and result.gradient["w"][1] == 0
    assert result.gradient["single"].dtype == jnp.float32
    np.testing.assert_allclose(result.gradient["single"], jnp.sum(result.x), rtol=1e-6)
    for name in ("index", "key"):
        assert result.gradient[name].dtype == jax.dtypes.float0
        assert result.gradient[name].shape == y[name].shape
    other = "forward" if mode == "reverse" else "reverse"
    again = dataclasses.replace(engine, rule=bx.Unrolled(mode=other))
    assert_close(again(y, bx.cold_start(jnp.ones(2))).gradient["w"], result.gradient["w"], 1e-12)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_failures_of_an_engine(mode):
    rule, solver = bx.Unrolled(mode=mode), bx.GradientDescent(3.0, maxiter=200)
    result = engine_of(rule, solver)(Y, bx.cold_start(X0))
    assert result.report.inner.status == Status.DIVERGED
    assert np.all(np.isfinite(result.x)) and np.isfinite(result.value)
    np.testing.assert_array_equal(result.warm.x, X0)
    result = engine_of(rule, solver, on_failure=bx.OnFailure.NAN)(Y, bx.cold_start(X0))
    for leaf in (result.x, result.value, result.gradient):
        assert np.all(np.isnan(leaf))
    with pytest.raises(jax.errors.JaxRuntimeError, match="inner solve ended with status DIVERGED"):
        failing = engine_of(rule, solver, on_failure=bx.OnFailure.RAISE)
        jax.block_until_ready(failing(Y, bx.cold_start(X0)))


def test_failures_of_a_solution_map():
    solver = bx.GradientDescent(3.0, maxiter=200)
    for rule in (bx.Unrolled(), bx.OneStep()):

        def value(y, policy, rule=rule):
            return C @ bx.solution_map(DECOUPLED, solver, rule, on_failure=policy)(X0, y)

        gradient = jax.jit(jax.value_and_grad(value), static_argnums=1)
        value_at_y, by_y = gradient(Y, bx.OnFailure.NAN)
        assert np.isnan(value_at_y) and np.all(np.isnan(by_y))
        with pytest.raises(jax.errors.JaxRuntimeError, match="ended with status DIVERGED"):
            jax.block_until_ready(gradient(Y, bx.OnFailure.RAISE))


def test_raising_changes_nothing_where_nothing_fails():
    solver = bx.GradientDescent(0.3, **exactly(5))
    by_y = descend(X0, Y, 0.3, 5)[1][1]
    solve = bx.solution_map(DECOUPLED, solver, bx.Unrolled(), on_failure=bx.OnFailure.RAISE)
    got = jax.jit(jax.grad(lambda y: C @ solve(X0, y)))(Y)
    np.testing.assert_allclose(got, C * by_y, rtol=1e-12)
    jacobian = jax.jit(jax.jacfwd(lambda y: solve(X0, y)))(Y)
    np.testing.assert_allclose(jacobian, np.diag(by_y), rtol=1e-12, atol=1e-14)


def test_from_a_warm_start_at_the_solution_only_a_fixed_number_of_steps_has_a_derivative():
    """A run that stops at once has the derivative of no steps, and its report counts none."""
    exact = -C * np.exp(-Y) + 2 * Y
    for rule in (bx.Unrolled(), bx.Unrolled(20)):
        stopping = engine_of(rule, bx.GradientDescent(0.3))
        warm = stopping(Y, bx.cold_start(X0)).warm
        again = stopping(Y, warm)
        assert again.report.inner.iterations == 0
        np.testing.assert_array_equal(again.gradient, 2 * Y)
        # Not quite at the solution, where F might vanish and end the run.
        near = warm._replace(x=warm.x + 1e-6)
        fixed = engine_of(rule, bx.GradientDescent(0.3, **exactly(20)))(Y, near)
        assert fixed.report.inner.iterations == 20
        np.testing.assert_allclose(fixed.gradient, exact, rtol=0.02)


def test_a_last_step_that_rounding_ends_is_no_zero_derivative():
    """Newton's last step, at a tolerance that rounding does not allow: the search fails there."""
    ys = np.random.default_rng(0).uniform(0.2, 5.0, 40)
    solver = bx.Newton(rtol=1e-16, atol=0.0)
    solve = bx.solution_map(bx.minimum(lambda x, y: y * x**2 / 2 - x), solver, bx.Unrolled(1))

    def value(y):
        x, report = solve.with_report(0.1, y)
        return x, report.status

    derivative, status = jax.jit(jax.vmap(jax.grad(value, has_aux=True)))(ys)
    assert np.any(status == Status.STALLED)
    np.testing.assert_allclose(derivative, -1 / ys**2, rtol=1e-7)


# Reports.


def test_the_contraction_of_a_report_is_the_factor_of_the_steps():
    y = np.zeros(3)  # F = x - 1, and a rate of 0.3 leaves 0.7 of it
    for rule in (None, bx.Unrolled(), bx.Unrolled(2)):
        solver = bx.GradientDescent(0.3, **exactly(9))
        _, report = bx.solution_map(DECOUPLED, solver, rule).with_report(X0, y)
        np.testing.assert_allclose(report.contraction, 0.7, rtol=1e-8)
    _, report = bx.solution_map(AFFINE_MAP, bx.FixedPointIteration(**exactly(9))).with_report(X0, y)
    np.testing.assert_allclose(report.contraction, 0.5, rtol=1e-8)


def test_a_report_at_a_solution_has_no_contraction_above_one():
    """A start at the solution takes no step: nothing was changed, and nothing is 0 / 0."""
    _, report = bx.solution_map(DECOUPLED, bx.GradientDescent(0.3)).with_report(
        np.ones(3), np.zeros(3)
    )
    assert (report.iterations, report.residual) == (0, 0)
    assert not np.isnan(report.contraction)


@pytest.mark.parametrize("rule", [bx.Unrolled(), bx.Unrolled(3, checkpoints="sqrt"), bx.OneStep()])
def test_iterative_rules_are_pytrees_without_leaves(rule):
    assert jax.tree.leaves(rule) == []
    assert jax.tree.map(lambda leaf: leaf, rule) == rule

    @jax.jit
    def value(rule, y):
        return jnp.sum(bx.solution_map(DECOUPLED, bx.GradientDescent(0.3), rule)(X0, y))

    np.testing.assert_allclose(value(rule, Y), np.sum(np.exp(-Y)), rtol=1e-9)
