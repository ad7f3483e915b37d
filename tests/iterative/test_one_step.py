"""One-step differentiation against S_2 in closed form, and its error against the contraction."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import Status
from tests.everyday import slow
from tests.iterative.example import AFFINE_MAP, DECOUPLED, X0, C, Y, assert_close
from tests.problems_table import PROBLEMS, dense_value, outer
from tests.problems_table import X0 as TABLE_X0
from tests.problems_table import Y as TABLE_Y

RULE = bx.OneStep()

# With F = exp(y) x - 1 and x* = exp(-y), every first step along -F has S_2 = -rate x exp(y) = -rate
# at the solution, whatever the solver would remember later on.
FIRST_ORDER = {
    "gradient descent": (DECOUPLED, bx.GradientDescent(0.3), 0.3),
    "accelerated": (DECOUPLED, bx.AcceleratedGradient(0.3), 0.3),
    "momentum": (DECOUPLED, bx.Optax(optax.sgd(0.2, momentum=0.5)), 0.2),
    "Anderson": (DECOUPLED, bx.FixedPointIteration(0.4, memory=2), 0.4),
    "Picard": (AFFINE_MAP, bx.FixedPointIteration(), 0.5),
}


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_is_the_derivative_of_a_step_in_y(name):
    problem, solver, rate = FIRST_ORDER[name]
    solve = bx.solution_map(problem, solver, RULE)

    def value(x0, y):
        x, report = solve.with_report(x0, y)
        return C @ x, (x, report)

    gradient = jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))
    (_, (x, report)), (by_x0, by_y) = gradient(X0, Y)
    assert report.status == Status.CONVERGED
    np.testing.assert_allclose(x, np.exp(-Y), rtol=1e-10)
    np.testing.assert_allclose(by_y, -rate * C, rtol=1e-9)
    np.testing.assert_array_equal(by_x0, np.zeros(3))
    # The error, relative to dx*/dy = -x*, is the factor by which a step shrinks an error.
    exact = -C * np.exp(-Y)
    contraction = 1 - rate * np.exp(Y)
    np.testing.assert_allclose((exact - by_y) / exact, contraction, rtol=1e-8, atol=1e-9)


def test_modes_an_engine_and_closed_over_values():
    problem, solver, rate = FIRST_ORDER["gradient descent"]
    solve = bx.solution_map(problem, solver, RULE)

    @jax.jit
    def everything(y):
        return jax.jvp(lambda y: solve(X0, y), (y,), (jnp.ones(3),))[1], jax.jacfwd(
            lambda y: solve(X0, y)
        )(y)

    tangent, jacobian = everything(Y)
    np.testing.assert_allclose(tangent, np.full(3, -rate), rtol=1e-9)
    np.testing.assert_allclose(jacobian, -rate * np.eye(3), rtol=1e-9, atol=1e-14)
    engine = bx.value_and_hypergradient(lambda x, y: C @ x + jnp.sum(y**2), problem, solver, RULE)
    cold = engine(Y, bx.cold_start(X0))
    np.testing.assert_allclose(cold.gradient, -rate * C + 2 * Y, rtol=1e-9)
    assert cold.report.adjoint is None
    again = engine(Y, cold.warm)  # from the solution, no step of the run is needed
    assert again.report.inner.iterations <= 1
    np.testing.assert_allclose(again.gradient, -rate * C + 2 * Y, rtol=1e-9)


def test_every_lane_of_a_batch():
    problem, solver, rate = FIRST_ORDER["gradient descent"]
    x0 = np.stack([X0, np.ones(3), X0])  # the second starts at its solution
    ys = np.stack([Y, np.zeros(3), Y + 3.0])  # the third diverges: 0.3 exp(3.1) > 2
    solve = bx.solution_map(problem, solver, RULE, on_failure=bx.OnFailure.NAN)
    gradient = jax.jit(jax.vmap(jax.grad(lambda x0, y: C @ solve(x0, y), 1)))(x0, ys)
    np.testing.assert_allclose(gradient[:2], np.stack([-rate * C] * 2), rtol=1e-9)
    assert np.all(np.isnan(gradient[2]))


NEWTONS = {"inexact": bx.Newton(), "dense": bx.Newton(bx.Dense())}


@pytest.mark.parametrize("name", ["inexact", slow("dense")])
def test_newton_is_implicit_differentiation_wherever_it_ends(name):
    """At many solutions: where F is 0, where rounding decides the line search, and elsewhere.

    For an x that solves y x = 1 the derivative is -1 / y^2, never zero and never NaN.
    """
    ys = np.concatenate([[1.0, 2.0, 3.0, 4.0], np.random.default_rng(0).uniform(0.2, 5.0, 60)])
    problems = {
        "minimum": bx.minimum(lambda x, y: y * x**2 / 2 - x),
        "root": bx.root(lambda x, y: y * x - 1),
    }
    for kind, problem in problems.items():
        solve = bx.solution_map(problem, NEWTONS[name], RULE)
        derivative = jax.jit(jax.vmap(jax.grad(lambda y, solve=solve: solve(0.1, y))))
        np.testing.assert_allclose(derivative(ys), -1 / ys**2, rtol=1e-7, err_msg=kind)


@pytest.mark.parametrize(
    "problem",
    [slow(PROBLEMS[0]), slow(PROBLEMS[1]), PROBLEMS[2]],  # the others are above
    ids=lambda row: row.name,
)
def test_newton_is_implicit_differentiation(problem):
    solve = bx.solution_map(problem.problem, bx.Newton(bx.Dense()), RULE)
    gradient = jax.jit(jax.grad(lambda y: outer(solve(TABLE_X0, y), y)))(TABLE_Y)
    wanted = jax.jit(jax.grad(lambda y: dense_value(problem, y)))(TABLE_Y)
    assert_close(gradient, wanted, 1e-7)


@pytest.mark.parametrize(
    "solver",
    [bx.GradientDescent(bx.Backtracking()), bx.ConjugateGradient()],
    ids=lambda solver: type(solver).__name__,
)
def test_a_line_search_that_rounding_ends_is_no_zero_derivative(solver):
    """A step t has S_2 = -t x, of the exact -x / y: the part t y, which is above zero.

    A solver whose steps have no length of their own at a solution may be refused instead.
    """
    ys = np.random.default_rng(1).uniform(0.5, 1.5, 30)
    solve = bx.solution_map(bx.minimum(lambda x, y: y * x**2 / 2 - x), solver, RULE)
    try:
        derivative = jax.jit(jax.vmap(jax.grad(lambda y: solve(0.1, y))))(ys)
    except TypeError as error:
        assert "`OneStep`" in str(error)
        return
    part = derivative * -(ys**2)
    assert np.all(part > 0.1) and np.all(part < 4)


@pytest.mark.parametrize(
    "solver",
    [bx.FixedPointIteration(memory=2), bx.Optax(optax.adam(0.05)), bx.GradientDescent(0.3)],
    ids=["Anderson", "Adam", "gradient descent"],
)
def test_a_converged_status_is_true_of_the_x_returned(solver):
    """Where plain iteration diverges, Anderson converges; and a first step of Adam is long."""
    problem = bx.root(lambda x, y: y * x - 1)
    x0, y = np.array([0.9, 0.4]), np.array([2.2, 1.1])
    solve = bx.solution_map(problem, solver, RULE)
    x, report = solve.with_report(x0, y)
    assert report.status == Status.CONVERGED
    target = 1.9e-12 * np.linalg.norm(y * x0 - 1)
    assert report.residual <= target
    np.testing.assert_allclose(report.residual, np.linalg.norm(y * np.asarray(x) - 1), atol=1e-15)


def test_a_spent_budget_is_reported_and_differentiated_where_it_ends():
    solver = bx.GradientDescent(0.3, rtol=1e-12, maxiter=3)
    solve = bx.solution_map(DECOUPLED, solver, RULE)
    x, report = solve.with_report(X0, Y)
    assert report.status == Status.MAXITER
    reached = X0
    for _ in range(3):
        reached = reached - 0.3 * (np.exp(Y) * reached - 1)
    by_y = jax.jit(jax.grad(lambda y: C @ solve(X0, y)))(Y)
    np.testing.assert_allclose(by_y, -0.3 * C * np.exp(Y) * reached, rtol=1e-12)
    final = reached - 0.3 * (np.exp(Y) * reached - 1)
    np.testing.assert_allclose(report.residual, np.linalg.norm(np.exp(Y) * x - 1), rtol=1e-12)
    assert np.allclose(x, reached, rtol=1e-12) or np.allclose(x, final, rtol=1e-12)
