"""One correction step of the point before the rule is applied, against dense formulas."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from bilevax import Status
from tests.everyday import params
from tests.rules.estimators import (
    FLOATING,
    KINDS,
    MINIMUM,
    ROOT,
    SIZE,
    TANGENT,
    U,
    W,
    X,
    Y,
    assert_close,
    corrected,
    flat_x,
    flat_y,
    hypergradient,
    implicit,
    like_x,
    outer_on_trees,
    partials,
)

# Linear solves end at a relative residual of eps^(3/4) = 1.8e-12, and cond(F_1) < 3 at the point.
DEFAULT_ACCURACY = 1e-11
ROUNDING = 1e-13
STANDSTILL = bx.GradientDescent(0.1, maxiter=0)  # stops where it starts


def user_diagonal(x, y):
    return like_x(2 + jnp.cos(flat_x(x)) + y["shift"] ** 2)


def damp(x, y, v):
    """Apply an inverse that is not diagonal and depends on both x and y."""
    u = flat_x(v)
    return like_x(0.5 * jnp.exp(y["gain"][0]) * u + 0.1 * flat_x(x) * jnp.sum(u))


def damping(u, w):
    return 0.5 * np.exp(w[0]) * np.eye(SIZE) + 0.1 * np.outer(u, np.ones(SIZE))


@dataclasses.dataclass(frozen=True)
class StepRow:
    step: bx.Step | Callable
    inverse: Callable  # (F_1, u, w) -> P^{-1}
    accuracy: float = ROUNDING

    @property
    def is_solve(self):
        return isinstance(self.step, bx.NewtonStep)


STEPS = {
    "newton": StepRow(bx.NewtonStep(), lambda first, u, w: np.linalg.inv(first), DEFAULT_ACCURACY),
    "newton_dense": StepRow(
        bx.NewtonStep(bx.Dense()), lambda first, u, w: np.linalg.inv(first), ROUNDING
    ),
    "jacobi": StepRow(bx.JacobiStep(), lambda first, u, w: np.diag(1 / np.diag(first))),
    "jacobi_user": StepRow(
        bx.JacobiStep(user_diagonal), lambda first, u, w: np.diag(1 / (2 + np.cos(u) + w[2] ** 2))
    ),
    "gradient": StepRow(bx.GradientStep(0.3), lambda first, u, w: 0.3 * np.eye(SIZE)),
    "function": StepRow(damp, lambda first, u, w: damping(u, w)),
}
# Every day each step meets one kind of problem, and each kind two steps.
kinds_and_steps = pytest.mark.parametrize(
    ("kind", "name"),
    params(
        itertools.product(KINDS, STEPS),
        lambda kind, name: (KINDS.index(kind) + list(STEPS).index(name)) % len(KINDS) == 0,
        lambda part: getattr(part, "name", part),
    ),
)


def preconditioner(name, kind):
    _, first, _ = partials(kind.optimality, U)
    return np.linalg.inv(STEPS[name].inverse(first, np.asarray(U), np.asarray(W)))


@functools.cache
def evaluate(name, kind):
    """Return the corrected point, its report and the hypergradient there."""
    rule = bx.Preconditioned(bx.Implicit(bx.Dense()), step=STEPS[name].step)

    @jax.jit
    def run(x, y):
        x, correction = rule.refine(kind.problem, x, y)
        g_1, g_2 = jax.grad(outer_on_trees, (0, 1), allow_int=True)(x, y)
        pulled, _ = rule.pullback(kind.problem, x, y, g_1)
        pushed = rule.pushforward(kind.problem, x, y, TANGENT)
        return x, correction, flat_y(g_2) + flat_y(pulled), pushed

    return run(X, Y)


def status_of(report):
    return Status(int(report.status))


@kinds_and_steps
def test_the_point_moves_by_one_step(kind, name):
    x, *_ = evaluate(name, kind)
    assert jax.tree.map(np.shape, x) == jax.tree.map(np.shape, X)
    moved = corrected(kind.optimality, preconditioner(name, kind), U)
    assert_close(flat_x(x) - U, moved - U, STEPS[name].accuracy)


@kinds_and_steps
def test_the_hypergradient_is_the_implicit_one_at_the_corrected_point(kind, name):
    *_, gradient, pushed = evaluate(name, kind)
    moved = corrected(kind.optimality, preconditioner(name, kind), U)
    derivative = implicit(kind.optimality, moved)
    assert_close(gradient, hypergradient(derivative, moved), STEPS[name].accuracy)
    assert_close(flat_x(pushed), derivative @ flat_y(TANGENT), STEPS[name].accuracy)
    # The point matters: at the point before the step the estimate is another one.
    before = hypergradient(implicit(kind.optimality, U), U)
    assert np.linalg.norm(gradient - before) > 1e-2 * np.linalg.norm(before)


@kinds_and_steps
def test_the_report_tells_how_much_of_f_a_step_leaves(kind, name):
    _, report, *_ = evaluate(name, kind)
    value, first, _ = partials(kind.optimality, U)
    inverse = np.linalg.inv(preconditioner(name, kind))
    left = value - first @ inverse @ value
    if STEPS[name].is_solve:
        assert status_of(report) is Status.CONVERGED
        assert report.residual <= 1.9e-12
    else:
        assert status_of(report) is Status.TRUNCATED
        assert (report.iterations, report.products) == (1, 1)
        residual = np.linalg.norm(left) / np.linalg.norm(value)
        np.testing.assert_allclose(report.residual, residual, rtol=1e-11)


def test_a_newton_step_is_exact_on_a_quadratic():
    matrix = np.array([[2.0, 0.5, -0.2], [0.5, 1.0, 0.3], [-0.2, 0.3, 1.5]])
    problem = bx.minimum(lambda x, y: x @ jnp.asarray(matrix) @ x / 2 - jnp.sin(y) @ x)
    rule = bx.Preconditioned(bx.Implicit(), step=bx.NewtonStep(bx.Dense()))
    y = np.array([0.3, -0.5, 1.1])
    x, _ = rule.refine(problem, np.array([10.0, -20.0, 5.0]), y)
    # What is left is rounding of numbers of the size of the start.
    np.testing.assert_allclose(x, np.linalg.solve(matrix, np.sin(y)), rtol=0, atol=1e-13)


def test_how_the_step_depends_on_y_is_not_differentiated():
    rule = bx.Preconditioned(bx.Implicit(bx.Dense()), step=damp)
    solve = bx.solution_map(MINIMUM.problem, STANDSTILL, rule)
    pull = jax.jit(lambda y, c: jax.vjp(lambda y: flat_x(solve(X, y)), y)[1](c)[0])
    derivative = np.stack([flat_y(pull(Y, c)) for c in np.eye(SIZE)])
    moved = corrected(MINIMUM.optimality, preconditioner("function", MINIMUM), U)
    assert_close(derivative, implicit(MINIMUM.optimality, moved), ROUNDING)

    # The derivative of x - P^{-1} F itself is another matrix.
    def step(w):
        value = MINIMUM.optimality(U, w)
        return U - 0.5 * jnp.exp(w[0]) * value - 0.1 * U * jnp.sum(value)

    through = jax.jacobian(step)(W)[:, :FLOATING]
    assert np.linalg.norm(through - derivative) > 0.1 * np.linalg.norm(derivative)


@pytest.mark.parametrize("step", [bx.GradientStep(10.0), bx.JacobiStep(lambda x, y: 0 * x + 0.1)])
def test_a_step_that_makes_things_worse_has_a_residual_above_one(step):
    # F = A x - y: the step is 10 F, and what it leaves of F is (I - 10 A) F, exactly.
    matrix = np.array([[1.0, 0.4], [-0.3, 2.0]])
    problem = bx.root(lambda x, y: jnp.asarray(matrix) @ x - y)
    x, y = np.array([0.5, -1.0]), np.array([0.2, 0.6])
    moved, report = bx.Preconditioned(bx.Implicit(), step=step).refine(problem, x, y)
    before, after = np.linalg.norm(matrix @ x - y), np.linalg.norm(matrix @ moved - y)
    assert status_of(report) is Status.TRUNCATED
    assert report.residual > 1
    np.testing.assert_allclose(report.residual, after / before, rtol=1e-14)


@pytest.mark.parametrize("names", [("gradient", "newton_dense"), ("newton_dense", "gradient")])
def test_nested_corrections_are_taken_from_the_inside_out(names):
    rule = bx.Implicit(bx.Dense())
    for name in names:
        rule = bx.Preconditioned(rule, step=STEPS[name].step)
    x, report = rule.refine(ROOT.problem, X, Y)
    moved, residuals = np.asarray(U), []
    for name in names:
        value, first, _ = partials(ROOT.optimality, moved)
        step = STEPS[name].inverse(first, moved, np.asarray(W)) @ value
        residuals.append(np.linalg.norm(value - first @ step) / np.linalg.norm(value))
        moved = moved - step
    assert_close(flat_x(x) - U, moved - U, ROUNDING)
    # One report of both: the worse status and residual, and the sum of the costs.
    assert status_of(report) is Status.TRUNCATED
    np.testing.assert_allclose(report.residual, max(residuals), rtol=1e-11)
    assert report.products > 1
    costs = [evaluate(name, ROOT)[1] for name in names]
    assert report.products == sum(cost.products for cost in costs)
    assert report.iterations == sum(cost.iterations for cost in costs)


def test_nested_corrections_in_another_order_end_elsewhere():
    points = []
    for first, second in [("gradient", "newton_dense"), ("newton_dense", "gradient")]:
        rule = bx.Preconditioned(bx.Implicit(), step=STEPS[first].step)
        rule = bx.Preconditioned(rule, step=STEPS[second].step)
        points.append(flat_x(rule.refine(ROOT.problem, X, Y)[0]))
    assert np.linalg.norm(points[0] - points[1]) > 1e-2


@pytest.mark.parametrize("diagonal", [None, lambda x, y: x.at[1].set(0)], ids=["exact", "user"])
def test_a_zero_on_the_diagonal_is_nonfinite(diagonal):
    problem = bx.root(lambda x, y: jnp.stack([2 * x[0] + x[1], x[0]]) - y)  # F_1 has a zero
    rule = bx.Preconditioned(bx.Implicit(), step=bx.JacobiStep(diagonal))
    x, y = np.array([0.5, -1.0]), np.array([0.2, 0.6])
    moved, report = rule.refine(problem, x, y)
    assert status_of(report) is Status.NONFINITE
    assert np.isfinite(moved[0]) and not np.isfinite(moved[1])
    # The solution map has no report to give, so all of x is NaN.
    assert np.all(np.isnan(bx.solution_map(problem, STANDSTILL, rule)(x, y)))


def test_a_newton_step_on_a_saddle_is_indefinite_until_it_is_declared():
    def saddle(x, y):
        return x[0] ** 2 - 2 * x[1] ** 2 + x[0] * x[1] - y * x[1]

    rule = bx.Preconditioned(bx.Implicit(), step=bx.NewtonStep())
    x, y = np.array([1.0, 3.0]), 0.5
    _, report = rule.refine(bx.minimum(saddle), x, y)
    assert status_of(report) is Status.INDEFINITE
    declared = bx.minimum(saddle, structure=bx.Structure.SYMMETRIC)
    moved, report = rule.refine(declared, x, y)
    assert status_of(report) is Status.CONVERGED
    solution = np.linalg.solve([[2.0, 1.0], [1.0, -4.0]], [0.0, y])
    np.testing.assert_allclose(moved, solution, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["newton_dense", "jacobi", "function"])
def test_the_corrected_point_is_what_a_solution_map_and_an_engine_return(name):
    rule = bx.Preconditioned(bx.Implicit(bx.Dense()), step=STEPS[name].step)
    moved = corrected(ROOT.optimality, preconditioner(name, ROOT), U)
    x, report = bx.solution_map(ROOT.problem, STANDSTILL, rule).with_report(X, Y)
    assert_close(flat_x(x) - U, moved - U, ROUNDING)
    engine = bx.value_and_hypergradient(outer_on_trees, ROOT.problem, STANDSTILL, rule)
    result = engine(Y, bx.cold_start(X))
    assert_close(flat_x(result.x) - U, moved - U, ROUNDING)
    assert_close(flat_y(result.gradient), evaluate(name, ROOT)[2], ROUNDING)
    # The solver's own residual is that before the correction.
    value, *_ = partials(ROOT.optimality, U)
    for inner in (report, result.report.inner):
        np.testing.assert_allclose(inner.residual, np.linalg.norm(value), rtol=1e-14)
        wanted = evaluate(name, ROOT)[1]
        assert inner.correction.status == wanted.status
        # The residual of a solve is rounding, and differs from one program to another.
        np.testing.assert_allclose(
            inner.correction.residual, wanted.residual, rtol=1e-9, atol=1e-14
        )


@pytest.mark.parametrize("order", [1, 2])
def test_the_adjoint_is_as_accurate_as_the_corrected_point(order):
    # Twelve distinct eigenvalues, so that CG meets every tolerance at another iteration.
    eigenvalues = np.linspace(1.0, 50.0, 12)
    problem = bx.minimum(lambda x, y: jnp.sum(jnp.asarray(eigenvalues) * x**2) / 2 - y * jnp.sum(x))
    step = bx.NewtonStep(bx.Dense()) if order == 2 else bx.JacobiStep()
    solver = bx.GradientDescent(0.01, rtol=1e-2, maxiter=0)
    rule = bx.Preconditioned(bx.Implicit(), step=step)
    engine = bx.value_and_hypergradient(lambda x, y: jnp.sum(x), problem, solver, rule)
    report = engine(1.0, bx.cold_start(np.ones(12))).report.adjoint
    assert status_of(report) is Status.CONVERGED
    assert report.residual <= 1e-2**order
    if order == 1:
        assert report.residual > 1e-4
