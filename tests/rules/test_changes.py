"""Changes of variables: closed forms, zeros and signs, closed-over values, wrong inverses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from bilevax import Status
from tests.everyday import slow
from tests.rules.changes import diagonal, exponential, sinh, sinh_inverse
from tests.rules.estimators import (
    COTANGENT,
    MINIMUM,
    TANGENT,
    FlatChange,
    U,
    W,
    X,
    Y,
    assert_close,
    changed,
    flat_x,
    flat_y,
    like_x,
    objective,
)

# Dense solves with condition numbers below 1e3 are right to 1e3 roundings.
ROUNDING = 3e-13
STANDSTILL = bx.GradientDescent(0.1, maxiter=0)  # stops where it starts
DENSE = bx.Implicit(bx.Dense())


def status_of(report):
    return Status(int(report.status))


# A minimum with one y per entry: mean log cosh(A x - b) + sum exp(y) x^2 / 2, and g = <C, x> with
# all derivatives by hand.
DATA, TARGET = np.random.default_rng(5).normal(size=(7, 4)), np.linspace(-2, 2, 7)
POINT, PENALTY = np.array([0.8, -0.5, 1.3, -2.0]), np.array([-0.6, 0.2, -1.0, 0.1])
SLOPE = np.array([1.0, -0.4, 0.7, 0.3])
# The linear solver's default tolerance is 1.8e-12.
SOLVERS = {"default": (None, 1e-10), "dense": (bx.Dense(), 1e-13)}


def by_hand():
    """Return F, F_1 and the diagonals of F_2 and of dP / dy at POINT."""
    bend = np.tanh(DATA @ POINT - TARGET)
    value = DATA.T @ bend / 7 + np.exp(PENALTY) * POINT
    hessian = DATA.T @ np.diag(1 - bend**2) @ DATA / 7 + np.diag(np.exp(PENALTY))
    return value, hessian, np.exp(PENALTY) * POINT, np.exp(PENALTY)


def pull_penalised(change, linear_solver):
    def penalised(x, y):
        misfit = jnp.asarray(DATA) @ x - TARGET
        return jnp.mean(jnp.log(jnp.cosh(misfit))) + jnp.sum(jnp.exp(y) * x**2) / 2

    rule = bx.Reparameterized(bx.Implicit(linear_solver), change)
    pulled, report = rule.pullback(bx.minimum(penalised), POINT, PENALTY, SLOPE)
    assert status_of(report.solve) is Status.CONVERGED
    return pulled


@pytest.mark.parametrize("name", ["default", slow("dense")])
def test_the_closed_form_of_the_diagonal_change(name):
    linear_solver, accuracy = SOLVERS[name]
    value, hessian, mixed, slope = by_hand()
    v = np.linalg.solve(hessian, SLOPE)
    wanted = -v * (mixed - slope * value / np.diag(hessian))
    assert_close(pull_penalised(bx.DiagonalChange(), linear_solver), wanted, accuracy)


@pytest.mark.parametrize("name", ["default", slow("dense")])
def test_the_closed_form_of_the_exponential_change(name):
    linear_solver, accuracy = SOLVERS[name]
    value, hessian, mixed, _ = by_hand()
    wanted = -mixed * np.linalg.solve(hessian + np.diag(value / POINT), SLOPE)
    assert_close(pull_penalised(bx.ExpChange(), linear_solver), wanted, accuracy)


def test_the_default_linear_solver_takes_a_jacobian_that_is_negative_in_z():
    # f is convex in x, but F_1 + F / x = 1 - 4 here.
    problem = bx.minimum(lambda x, y: (x - y) ** 2 / 2)
    rule = bx.Reparameterized(bx.Implicit(), bx.ExpChange())
    pulled, report = rule.pullback(problem, 0.4, 2.0, 1.0)
    assert status_of(report.solve) is Status.CONVERGED
    np.testing.assert_allclose(pulled, -1 / 3, rtol=1e-13)


WITH_ZEROS = np.array([0.9, 0.0, -0.6, 0.0])


def test_zeros_keep_the_identity_under_an_exponential_change():
    rule, x = bx.Reparameterized(DENSE, bx.ExpChange()), like_x(WITH_ZEROS)
    pulled, report = rule.pullback(MINIMUM.problem, x, Y, COTANGENT)
    derivative = changed(MINIMUM, exponential(WITH_ZEROS), jnp.asarray(WITH_ZEROS))
    assert report.identity_entries == 2
    assert_close(flat_y(pulled), derivative.T @ flat_x(COTANGENT), ROUNDING)
    pushed = rule.pushforward(MINIMUM.problem, x, Y, TANGENT)
    assert_close(flat_x(pushed), derivative @ flat_y(TANGENT), ROUNDING)


def test_second_derivatives_at_zeros_are_those_of_the_identity():
    # x* = sin(y), and the Hessian of sum(exp(x*)) is diagonal; the unused logarithm of zero must
    # not spoil it.
    problem = bx.root(lambda x, y: x - jnp.sin(y))
    rule = bx.Reparameterized(DENSE, bx.ExpChange())
    solve = bx.implicit_function(problem, lambda x0, y: jnp.sin(y), rule)
    y = np.array([0.0, 0.5, -0.7])
    hessian = jax.jit(jax.jacrev(jax.grad(lambda y: jnp.sum(jnp.exp(solve(y, y))))))(y)
    wanted = np.diag(np.exp(np.sin(y)) * (np.cos(y) ** 2 - np.sin(y)))
    np.testing.assert_allclose(hessian, wanted, rtol=1e-13, atol=1e-14)


def test_nested_changes_add_their_counts():
    # The outer change leaves x = 0 alone, and the inner one log |x| = 0 as well.
    rule = bx.Reparameterized(bx.Reparameterized(DENSE, bx.ExpChange()), bx.ExpChange())
    u = np.array([0.0, -1.0, 2.0, 1.0])
    pulled, report = rule.pullback(MINIMUM.problem, like_x(u), Y, COTANGENT)
    assert report.identity_entries == 1 + 3
    first, second = exponential(u), exponential([0.0, 0.0, np.log(2.0), 0.0])
    both = FlatChange(
        lambda z, w: first.phi(second.phi(z, w), w),
        lambda u, w: second.phi_inverse(first.phi_inverse(u, w), w),
    )
    derivative = changed(MINIMUM, both, jnp.asarray(u))
    assert_close(flat_y(pulled), derivative.T @ flat_x(COTANGENT), ROUNDING)


def test_entries_keep_their_sign_in_an_exponential_change():
    # In x, a step of this length changes signs.
    problem = bx.minimum(lambda x, y: jnp.sum((x - y) ** 2) / 2)
    x, y = np.array([1.0, -1.0, 0.5, -0.2, 0.0]), np.array([-2.0, 2.0, 1.0, -1.0, 3.0])
    step = bx.GradientStep(0.9)
    in_x, _ = bx.Preconditioned(DENSE, step).refine(problem, x, y)
    assert list(np.sign(in_x)) == [-1, 1, 1, -1, 1]
    rule = bx.Reparameterized(bx.Preconditioned(DENSE, step), bx.ExpChange())
    in_z, _ = rule.refine(problem, x, y)
    # z <- z - 0.9 x F multiplies x by exp(-0.9 x F); the zero takes the step in x.
    np.testing.assert_allclose(in_z[:4], (x * np.exp(-0.9 * x * (x - y)))[:4], rtol=1e-14)
    np.testing.assert_allclose(in_z[4], 2.7, rtol=1e-14)


CLOSING = {
    "exp": (bx.ExpChange(), exponential(U)),
    "diagonal": (bx.DiagonalChange(), diagonal(MINIMUM.optimality, U)),
}


def objective_of(shift):
    """Return the objective as a function of x and the gain alone."""

    def function(x, gain):
        return objective(flat_x(x), jnp.concatenate([gain, jnp.stack([shift, W[3]])]))

    return function


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("diagonal", "reverse"),
        ("exp", "forward"),
        slow("diagonal", "forward"),
        slow("exp", "reverse"),
    ],
)
def test_gradients_reach_what_the_problem_closes_over(name, mode):
    change, flat_change = CLOSING[name]
    rule = bx.Reparameterized(bx.Implicit(bx.Dense(), mode), change)

    def pull(gain, shift):
        solve = bx.solution_map(bx.minimum(objective_of(shift)), STANDSTILL, rule)
        return flat_x(solve(X, gain)) @ flat_x(COTANGENT)

    gain, shift = jax.jit(jax.grad(pull, (0, 1)))(Y["gain"], Y["shift"])
    wanted = changed(MINIMUM, flat_change, U).T @ flat_x(COTANGENT)
    assert_close(jnp.append(gain, shift), wanted, ROUNDING)


def test_what_a_change_closes_over_is_a_number_of_the_rule_to_first_order():
    # The problem and the change close over the same value; gradients reach it by the problem.
    def pull(gain, shift):
        change = bx.ChangeOfVariables(
            lambda z, gain: like_x(sinh(flat_x(z), jnp.append(gain, shift))),
            lambda x, gain: like_x(sinh_inverse(flat_x(x), jnp.append(gain, shift))),
        )
        rule = bx.Reparameterized(DENSE, change)
        solve = bx.solution_map(bx.minimum(objective_of(shift)), STANDSTILL, rule)
        return flat_x(solve(X, gain)) @ flat_x(COTANGENT)

    gain, shift = jax.jit(jax.grad(pull, (0, 1)))(Y["gain"], Y["shift"])
    still = FlatChange(
        lambda z, w: sinh(z, w.at[2].set(W[2])), lambda u, w: sinh_inverse(u, w.at[2].set(W[2]))
    )
    wanted = changed(MINIMUM, still, U).T @ flat_x(COTANGENT)
    assert_close(jnp.append(gain, shift), wanted, ROUNDING)


def test_gradients_of_an_estimate_reach_what_the_change_closes_over():
    # With F = y x - 1 and x = z^power, phi_11 / phi_1^2 is (1 - 1 / power) / x and the estimate
    # -x / (y + F (1 - 1 / power) / x).
    x, y, power = 0.8, 1.7, 1.4

    def solve(y, power):
        change = bx.ChangeOfVariables(lambda z, y: z**power, lambda x, y: x ** (1 / power))
        problem = bx.minimum(lambda x, y: y * x**2 / 2 - x)
        return bx.solution_map(problem, STANDSTILL, bx.Reparameterized(DENSE, change))(x, y)

    @jax.jit
    def evaluate(y, power):
        by_power = jax.grad(solve, 1)(y, power)
        return by_power, *jax.value_and_grad(jax.grad(solve), 1)(y, power)

    by_power, estimate, slope = evaluate(y, power)
    value = y * x - 1
    divisor = y + value * (1 - 1 / power) / x
    assert by_power == 0  # x itself does not depend on the rule
    np.testing.assert_allclose(estimate, -x / divisor, rtol=1e-13)
    np.testing.assert_allclose(slope, value / (power * divisor) ** 2, rtol=1e-12)


WRONG = bx.ChangeOfVariables(lambda z, y: 2 * z, lambda x, y: x)


@pytest.mark.parametrize(
    ("x", "status"), [([1.0, -2.0], Status.BREAKDOWN), ([np.nan, 1.0], Status.NONFINITE)]
)
def test_a_phi_that_its_inverse_does_not_invert_is_reported_where_x_is_traced(x, status):
    problem = bx.minimum(lambda x, y: jnp.sum((x - y) ** 2))
    x, y = np.array(x), np.ones(2)
    _, report = jax.jit(bx.Reparameterized(DENSE, WRONG).pullback, static_argnums=0)(
        problem, x, y, np.ones(2)
    )
    assert status_of(report.solve) is status
    corrects = bx.Reparameterized(bx.Preconditioned(DENSE, bx.GradientStep(0.1)), WRONG)
    _, correction = jax.jit(corrects.refine, static_argnums=0)(problem, x, y)
    assert status_of(correction) is status


@pytest.mark.parametrize("mode", ["reverse", slow("forward")])
def test_a_phi_that_its_inverse_does_not_invert_makes_derivatives_nan(mode):
    problem = bx.minimum(lambda x, y: jnp.sum((x - y) ** 2))
    rule = bx.Reparameterized(bx.Implicit(bx.Dense(), mode), WRONG)
    solve = bx.solution_map(problem, STANDSTILL, rule)
    x, y = np.array([1.0, -2.0]), np.ones(2)
    value, pull = jax.vjp(lambda y: jax.jit(solve)(x, y), y)
    np.testing.assert_array_equal(value, x)
    assert np.all(np.isnan(pull(np.ones(2))[0]))
    assert np.all(np.isnan(jax.jit(rule.pushforward, static_argnums=0)(problem, x, y, y)))


def test_the_inverse_may_be_off_by_rounding():
    change = bx.ChangeOfVariables(lambda z, y: z * (1 + 1e-12), lambda x, y: x)
    problem = bx.minimum(lambda x, y: jnp.sum((x - y) ** 2))
    rule = bx.Reparameterized(DENSE, change)
    pull = jax.jit(rule.pullback, static_argnums=0)
    pulled, report = pull(problem, np.array([1.0, -2.0]), np.ones(2), np.array([3.0, 4.0]))
    assert status_of(report.solve) is Status.CONVERGED
    np.testing.assert_allclose(pulled, [3.0, 4.0], rtol=1e-11)


def test_a_correction_in_z_reports_what_the_step_leaves_there():
    # G = phi_1 F with x = exp(z): a step of length s leaves (1 - s G_1) G.
    problem = bx.minimum(lambda x, y: (x - y) ** 2 / 2)
    rule = bx.Reparameterized(bx.Preconditioned(DENSE, bx.GradientStep(0.3)), bx.ExpChange())
    x, y = 1.5, 0.4
    moved, report = rule.refine(problem, x, y)
    np.testing.assert_allclose(moved, x * np.exp(-0.3 * x * (x - y)), rtol=1e-14)
    np.testing.assert_allclose(report.residual, abs(1 - 0.3 * (x * (x - y) + x**2)), rtol=1e-13)
    assert status_of(report) is Status.TRUNCATED
