"""The last steps of a run, and checkpoints, against a recursion in NumPy and Neumann series."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import bilevax as bx
from tests.everyday import slow
from tests.iterative.example import (
    DECOUPLED,
    RUNS,
    X0,
    C,
    Y,
    assert_close,
    central_differences,
    descend,
    exactly,
    run_of,
    steps_of,
)
from tests.problems_table import PROBLEMS
from tests.problems_table import X0 as TABLE_X0
from tests.problems_table import Y as TABLE_Y

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
@pytest.mark.parametrize("last", [1, slow(2), slow(3), 5, 12])
def test_the_last_steps_of_runs_of_any_length(last):
    check_runs(bx.Unrolled(last), last)


@pytest.mark.parametrize(
    "rule",
    [
        bx.Unrolled(),
        bx.Unrolled(checkpoints=1),
        slow(bx.Unrolled(checkpoints=3)),
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
        ("backtracking", "reverse"),
        slow("Anderson", "reverse"),
        slow("conjugate gradient", "reverse"),
        slow("momentum", "reverse"),
        slow("accelerated", "forward"),
        slow("Newton", "reverse"),
        slow("conjugate gradient", "forward"),
    ],
)
def test_as_many_last_steps_as_there_are_is_all_of_them(name, mode):
    """Of the start as well: first directions and step sizes depend on y and on x0."""
    steps = steps_of(name)

    def gradient(rule):
        run = run_of(name, rule, exactly(steps))
        derivative = jax.grad if mode == "reverse" else jax.jacfwd
        return jax.jit(derivative(lambda point: run((*point, np.array(RUNS[name][1])))[0]))

    point = TABLE_X0, TABLE_Y
    whole, truncated = bx.Unrolled(mode=mode), bx.Unrolled(steps, mode=mode)
    assert_close(gradient(truncated)(point), gradient(whole)(point), 1e-12)


@pytest.mark.parametrize(
    "solver",
    [bx.ConjugateGradient(), slow(bx.GradientDescent(bx.Backtracking()))],
    ids=lambda solver: type(solver).__name__,
)
def test_a_window_over_a_whole_run_against_differences(solver):
    """Random members of a kind: the run of any length that the window reaches over."""
    random = np.random.default_rng(5)
    matrices = jnp.asarray(random.normal(size=(6, 3)))

    def f(x, y):
        return jnp.mean(jnp.cosh(matrices @ x - 1)) + jnp.sum(jnp.exp(y) * x**2) / 2

    steps = 4
    solver = dataclasses.replace(solver, **exactly(steps))
    starts, ys = random.normal(size=(5, 3)), 0.5 * random.normal(size=(5, 3))

    def value(rule, x0, y):
        return C @ bx.solution_map(bx.minimum(f), solver, rule)(x0, y)

    def both(x0, y):
        return jax.grad(lambda y: value(bx.Unrolled(steps), x0, y))(y)

    plain = jax.jit(jax.vmap(lambda x0, y: value(None, x0, y)))
    got = jax.jit(jax.vmap(both))(starts, ys)
    for x0, y, gradient in zip(starts, ys, got, strict=True):
        wanted = central_differences(
            lambda ys, x0=x0: plain(np.tile(x0, (len(ys), 1)), ys), y, 1e-4
        )
        np.testing.assert_allclose(gradient, wanted, rtol=1e-6, atol=1e-6)


# At the solution, the derivative of K steps is the Neumann series of K terms.


@pytest.mark.parametrize(
    ("row", "solver", "step_size", "last", "distance"),
    [
        slow(PROBLEMS[0], bx.GradientDescent(0.2), 0.2, None, 1e-13),
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
