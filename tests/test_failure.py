"""What becomes of solves that fail: returned as they are, NaN, or an error. Never a zero."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from tests.everyday import params, slow

RETURN, NAN, RAISE = bx.OnFailure.RETURN, bx.OnFailure.NAN, bx.OnFailure.RAISE
Status = bx.Status
X0 = np.array([1.0, 2.0])
Y = np.array([1.0, 2.0])
C = np.array([1.0, 1.0])


def quadratic(x, y):
    return jnp.sum(y * x**2 / 2 - x)  # x* = 1 / y


def entropy(x, y):
    return jnp.sum(x * jnp.log(x) - x - y * x)  # x* = exp(y), and F is NaN for x < 0


def flat(x, y):
    return y[0] * (x[0] - y[1]) ** 2 / 2 + 0 * x[1]  # nothing determines the second entry


def saddle(x, y):
    return jnp.sum(y * x**2 * np.array([1.0, -1.0])) / 2


# What fails, and how: the objective, the solver, the start.
INNER = {
    Status.DIVERGED: (quadratic, bx.GradientDescent(3.0), X0),
    Status.NONFINITE: (entropy, bx.GradientDescent(30.0), np.array([5.0, 5.0])),
}
# The inner solve ends well; the adjoint solve does not.
ADJOINT = {
    Status.BREAKDOWN: (flat, bx.GradientDescent(0.5), bx.CG()),
    Status.INDEFINITE: (saddle, bx.GradientDescent(0.5, maxiter=0), bx.CG()),
    Status.MAXITER: (quadratic, bx.GradientDescent(0.5), bx.CG(maxiter=1)),
}


def inner_map(status, policy, mode="reverse"):
    objective, solver, x0 = INNER[status]
    rule = bx.Implicit(mode=mode)
    solve = bx.solution_map(bx.minimum(objective), solver, rule, on_failure=policy)
    return lambda y: solve(x0, y), lambda y: solve.with_report(x0, y)


def adjoint_map(status, policy, mode="reverse"):
    objective, solver, linear_solver = ADJOINT[status]
    rule = bx.Implicit(linear_solver, mode=mode)
    solve = bx.solution_map(bx.minimum(objective), solver, rule, on_failure=policy)
    return lambda y: solve(X0, y)


def gradient_of(solve):
    return jax.grad(lambda y: C @ solve(y))


def assert_raises(status, what, function, *arguments):
    """Check that the error names the solve, the status and the remedy."""
    message = f"SolveError: The {what} ended with status {status.name}: {status.remedy}."
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(function(*arguments))
    assert message in str(caught.value)


# The inner solve.


@pytest.mark.parametrize("status", INNER)
def test_returned_as_it_is(status):
    solve, with_report = inner_map(status, RETURN)
    x, report = with_report(Y)
    assert report.status == status
    np.testing.assert_array_equal(solve(Y), x)
    assert np.all(np.isfinite(x))  # x is finite still where F(x, y) overflows or is NaN
    assert not report.residual < 1e10


MODES = ["reverse", "forward"]


@pytest.mark.parametrize(
    ("status", "mode"),
    params(
        itertools.product(INNER, MODES),
        lambda status, mode: (mode == "forward") == (status is Status.NONFINITE),
    ),
)
def test_nan_where_asked_for(status, mode):
    solve, with_report = inner_map(status, NAN, mode)
    value, gradient = jax.jit(jax.value_and_grad(lambda y: C @ solve(y)))(Y)
    assert np.isnan(value) and np.all(np.isnan(gradient))
    assert np.all(np.isnan(solve(Y)))
    # The report is for those who want to see what there is.
    x, report = with_report(Y)
    assert report.status == status and np.all(np.isfinite(x))


def test_nan_in_tangents_and_second_derivatives():
    solve, _ = inner_map(Status.NONFINITE, NAN, "forward")
    x, tangent = jax.jvp(solve, (Y,), (np.ones(2),))
    assert np.all(np.isnan(x)) and np.all(np.isnan(tangent))
    assert np.all(np.isnan(jax.jit(jax.hessian(lambda y: C @ solve(y)))(Y)))


def test_nan_is_what_happens_without_a_choice():
    solve = bx.solution_map(bx.minimum(quadratic), bx.GradientDescent(3.0))
    assert np.all(np.isnan(solve(X0, Y)))
    solve = bx.implicit_function(bx.minimum(entropy), lambda x0, y: -y)
    assert np.all(np.isnan(solve(X0, Y)))


@pytest.mark.parametrize("status", INNER)
def test_raised(status):
    solve, with_report = inner_map(status, RAISE)
    assert_raises(status, "inner solve", solve, Y)
    assert_raises(status, "inner solve", jax.jit(gradient_of(solve)), Y)
    assert with_report(Y)[1].status == status


def test_raised_by_a_jitted_call_and_an_eager_gradient():
    solve, _ = inner_map(Status.DIVERGED, RAISE)
    assert_raises(Status.DIVERGED, "inner solve", jax.jit(solve), Y)
    assert_raises(Status.DIVERGED, "inner solve", gradient_of(solve), Y)


def test_raised_in_forward_mode():
    solve, _ = inner_map(Status.DIVERGED, RAISE, "forward")
    assert_raises(Status.DIVERGED, "inner solve", lambda y: jax.jvp(solve, (y,), (y,)), Y)
    assert_raises(Status.DIVERGED, "inner solve", jax.jit(gradient_of(solve)), Y)


def test_raised_under_vmap_for_a_single_bad_lane():
    solve, with_report = inner_map(Status.DIVERGED, RAISE)
    lanes = np.stack([0.1 * Y, Y, 0.2 * Y])  # with a rate of 3, curvatures below 2 / 3 are fine
    converged = [Status.CONVERGED, Status.DIVERGED, Status.CONVERGED]
    assert jax.vmap(with_report)(lanes)[1].status.tolist() == converged
    assert_raises(Status.DIVERGED, "inner solve", jax.vmap(solve), lanes)
    assert_raises(Status.DIVERGED, "inner solve", jax.jit(jax.vmap(solve)), lanes)
    np.testing.assert_allclose(jax.vmap(solve)(lanes[::2]), 1 / lanes[::2], rtol=1e-10)


def test_a_policy_of_raising_changes_nothing_where_nothing_fails():
    for mode in ("reverse", "forward"):
        solve = bx.solution_map(
            bx.minimum(quadratic), bx.GradientDescent(0.5), bx.Implicit(mode=mode), on_failure=RAISE
        )
        h = jax.grad(lambda y, solve=solve: C @ solve(X0, y))
        gradient, hessian = jax.jit(lambda y, h=h: (h(y), jax.jacrev(h)(y)))(Y)
        np.testing.assert_allclose(gradient, -1 / Y**2, rtol=1e-10)
        np.testing.assert_allclose(hessian, np.diag(2 / Y**3), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("policy", [RETURN, NAN, RAISE])
def test_a_spent_budget_is_no_failure(policy):
    solver = bx.GradientDescent(0.3, maxiter=2)
    solve = bx.solution_map(bx.minimum(quadratic), solver, on_failure=policy)
    want = X0.copy()
    for _ in range(2):
        want -= 0.3 * (Y * want - 1)
    x, report = solve.with_report(X0, Y)
    assert report.status == Status.MAXITER and report.iterations == 2
    np.testing.assert_allclose(x, want, rtol=1e-14)
    np.testing.assert_allclose(solve(X0, Y), want, rtol=1e-14)
    gradient = jax.grad(lambda y: C @ solve(X0, y))(Y)
    np.testing.assert_allclose(gradient, -want / Y, rtol=1e-10)  # the implicit formula at x


# The adjoint solve.


@pytest.mark.parametrize(
    ("status", "mode"),
    params(
        itertools.product(ADJOINT, MODES),
        lambda status, mode: mode == "reverse" or status is Status.MAXITER,
    ),
)
def test_an_adjoint_that_fails_is_nan_or_raised(status, mode):
    gradient = jax.value_and_grad(lambda y: C @ adjoint_map(status, NAN, mode)(y))
    value, got = jax.jit(gradient)(Y)
    assert np.isfinite(value) and np.all(np.isnan(got))
    if mode == "reverse" or status is Status.MAXITER:
        raising = gradient_of(adjoint_map(status, RAISE, mode))
        assert_raises(status, "linear solve", jax.jit(raising), Y)


def test_an_adjoint_that_fails_in_eager_mode_and_under_vmap():
    lanes = np.stack([Y, 2 * Y])
    solve = adjoint_map(Status.MAXITER, NAN)
    assert np.all(np.isnan(gradient_of(solve)(Y)))
    assert np.all(np.isnan(jax.jit(jax.vmap(gradient_of(solve)))(lanes)))
    solve = adjoint_map(Status.MAXITER, RAISE)
    assert_raises(Status.MAXITER, "linear solve", gradient_of(solve), Y)
    assert_raises(Status.MAXITER, "linear solve", jax.jit(jax.vmap(gradient_of(solve))), lanes)


@pytest.mark.parametrize("mode", ["reverse", slow("forward")])
def test_an_adjoint_that_runs_out_of_steps_is_returned_where_asked_for(mode):
    # One step of CG on diag(y) v = c from zero: v = t c with t = <c, c> / <c, y c>.
    gradient = gradient_of(adjoint_map(Status.MAXITER, RETURN, mode))(Y)
    np.testing.assert_allclose(gradient, -(C @ C) / (C @ (Y * C)) * C / Y, rtol=1e-10)


def test_an_adjoint_without_any_iterate_is_nan_even_where_it_is_returned():
    # The first direction already has negative curvature: there is nothing to return.
    problem = bx.minimum(lambda x, y: -jnp.sum(y * x**2) / 2)
    solver = bx.GradientDescent(0.5, maxiter=0)
    solve = bx.solution_map(problem, solver, on_failure=RETURN)
    assert np.all(np.isnan(jax.grad(lambda y: C @ solve(X0, y))(Y)))
    _, report = bx.Implicit().pullback(problem, X0, Y, C)
    assert report.solve.status == Status.INDEFINITE


@pytest.mark.parametrize(
    ("linear_solver", "status"),
    [
        (bx.CG(), Status.BREAKDOWN),
        (bx.Dense(), Status.INDEFINITE),
        (bx.NormalCG(), Status.BREAKDOWN),
        (bx.Neumann(steps=5, step_size=5.0), Status.DIVERGED),
    ],
)
def test_a_singular_adjoint_is_never_a_zero(linear_solver, status):
    # Y[0] is the only curvature, so the cotangent has a part in the null space.
    rule = bx.Implicit(linear_solver)
    _, report = rule.pullback(bx.minimum(flat), X0, Y, C)
    assert report.solve.status == status
    solve = bx.solution_map(bx.minimum(flat), bx.GradientDescent(0.5), rule)
    assert np.all(np.isnan(jax.jit(jax.grad(lambda y: C @ solve(X0, y)))(Y)))


def test_damping_is_the_remedy_that_a_breakdown_names():
    assert "damping" in Status.BREAKDOWN.remedy
    rule = bx.Implicit(bx.CG(damping=1e-3))
    solve = bx.solution_map(bx.minimum(flat), bx.GradientDescent(0.5), rule)
    gradient = jax.grad(lambda y: C @ solve(X0, y))(Y)
    # x[0] = y[1]: F_2 = (x[0] - y[1], -y[0]) and v[0] = 1 / (y[0] + damping).
    np.testing.assert_allclose(gradient, [0, Y[0] / (Y[0] + 1e-3)], rtol=1e-10, atol=1e-10)


def test_a_tangent_solve_that_fails():
    tangent = (np.ones(2),)

    def push(policy):
        return jax.jvp(adjoint_map(Status.MAXITER, policy, "forward"), (Y,), tangent)

    x, got = push(NAN)
    np.testing.assert_allclose(x, 1 / Y, rtol=1e-10)
    assert np.all(np.isnan(got))
    assert_raises(Status.MAXITER, "linear solve", push, RAISE)
    # One step of CG on diag(y) t = b with b = -x.
    b = -1 / Y
    np.testing.assert_allclose(push(RETURN)[1], (b @ b) / (b @ (Y * b)) * b, rtol=1e-10)


def test_a_pushforward_that_fails_is_nan():
    got = bx.Implicit(bx.CG(maxiter=1)).pushforward(bx.minimum(quadratic), X0, Y, np.ones(2))
    assert np.all(np.isnan(got))


def test_only_the_failing_lane_of_a_gradient_is_nan():
    solve = bx.solution_map(bx.minimum(saddle), bx.GradientDescent(0.5, maxiter=0))
    lanes = np.array([[1.0, -2.0], [1.0, 2.0]])  # the first Hessian is positive definite
    gradient = jax.vmap(gradient_of(lambda y: solve(X0, y)))(lanes)
    np.testing.assert_allclose(gradient[0], -X0 / lanes[0], rtol=1e-10)
    assert np.all(np.isnan(gradient[1]))


def test_a_cotangent_that_is_not_finite_gives_nan():
    solve = bx.solution_map(bx.minimum(quadratic), bx.GradientDescent(0.5), on_failure=RETURN)
    _, pull = jax.vjp(lambda y: solve(X0, y), Y)
    assert np.all(np.isnan(pull(np.array([1.0, np.inf]))[0]))
    assert np.all(np.isnan(pull(np.array([np.nan, 1.0]))[0]))


# The correction of a preconditioned rule, and a change of variables.


@pytest.mark.parametrize("mode", ["reverse", slow("forward")])
def test_a_correction_that_fails(mode):
    def with_policy(policy):
        rule = bx.Preconditioned(bx.Implicit(mode=mode), bx.NewtonStep())
        solver = bx.GradientDescent(0.5, maxiter=0)
        return bx.solution_map(bx.minimum(saddle), solver, rule, on_failure=policy)

    _, report = with_policy(NAN).with_report(X0, Y)
    assert (report.status, report.correction.status) == (Status.MAXITER, Status.INDEFINITE)
    assert np.all(np.isnan(with_policy(NAN)(X0, Y)))
    assert np.all(np.isnan(jax.grad(lambda y: C @ with_policy(NAN)(X0, y))(Y)))
    assert_raises(Status.INDEFINITE, "correction of x", with_policy(RAISE), X0, Y)


@pytest.mark.parametrize("mode", ["reverse", slow("forward")])
def test_a_change_that_does_not_invert_a_traced_x(mode):
    # Values inside jit are not known, so what eager calls refuse shows as a failure.
    change = bx.ChangeOfVariables(lambda z, y: 2 * z, lambda x, y: x)
    rule = bx.Reparameterized(bx.Implicit(bx.Dense(), mode=mode), change)

    def gradient(policy):
        solve = bx.solution_map(
            bx.minimum(quadratic), bx.GradientDescent(0.5), rule, on_failure=policy
        )
        return jax.jit(jax.grad(lambda y: C @ solve(X0, y)))

    assert np.all(np.isnan(gradient(NAN)(Y)))
    assert_raises(Status.BREAKDOWN, "change of variables", gradient(RAISE), Y)
    pull = jax.jit(lambda x, y: rule.pullback(bx.minimum(quadratic), x, y, C)[1])
    assert pull(1 / Y, Y).solve.status == Status.BREAKDOWN


def test_a_correction_in_a_variable_that_is_not_the_inverse():
    """The point x = phi(z, y) would be wrong, so the correction is reported as broken."""
    change = bx.ChangeOfVariables(lambda z, y: 2 * z, lambda x, y: x)
    rule = bx.Reparameterized(bx.Preconditioned(bx.Implicit(), bx.GradientStep(0.1)), change)
    solve = bx.solution_map(bx.minimum(quadratic), bx.GradientDescent(0.5), rule)
    _, report = jax.jit(solve.with_report)(X0 + 1, Y)
    assert (report.status, report.correction.status) == (Status.CONVERGED, Status.BREAKDOWN)
    assert np.all(np.isnan(jax.jit(solve)(X0 + 1, Y)))


# The engine.


@pytest.mark.parametrize("status", INNER)
def test_the_engine_reports_an_inner_failure(status):
    objective, solver, x0 = INNER[status]

    def run(policy, y):
        engine = bx.value_and_hypergradient(
            lambda x, y: C @ x, bx.minimum(objective), solver, on_failure=policy
        )
        return engine(y, bx.cold_start(x0))

    result = run(NAN, Y)
    assert result.report.inner.status == status
    assert np.isnan(result.value) and np.all(np.isnan(result.gradient))
    assert np.all(np.isnan(result.x))
    if status is Status.DIVERGED:
        assert_raises(status, "inner solve", run, RAISE, Y)


@pytest.mark.parametrize("status", ADJOINT)
def test_the_engine_reports_an_adjoint_failure(status):
    objective, solver, linear_solver = ADJOINT[status]

    def run(policy):
        engine = bx.value_and_hypergradient(
            lambda x, y: C @ x,
            bx.minimum(objective),
            solver,
            bx.Implicit(linear_solver),
            on_failure=policy,
        )
        return engine(Y, bx.cold_start(X0))

    result = run(NAN)
    assert result.report.adjoint.status == status
    assert np.isfinite(result.value) and np.all(np.isnan(result.gradient))
    if status is Status.MAXITER:
        assert_raises(status, "linear solve", run, RAISE)


def test_the_engine_returns_by_default():
    # One step of CG on diag(y) v = c from zero, as above.
    engine = bx.value_and_hypergradient(
        lambda x, y: C @ x,
        bx.minimum(quadratic),
        bx.GradientDescent(0.5),
        bx.Implicit(bx.CG(maxiter=1)),
    )
    result = engine(Y, bx.cold_start(X0))
    assert result.report.adjoint.status == Status.MAXITER
    want = -(C @ C) / (C @ (Y * C)) * C / Y
    np.testing.assert_allclose(result.gradient, want, rtol=1e-10)


@pytest.mark.parametrize("adjoint", [0.0, 1e-300, 0.3], ids=["cold", "tiny", "warm"])
@pytest.mark.parametrize("policy", [RETURN, NAN])
def test_an_engine_never_returns_its_guess_for_an_adjoint_that_it_has_not(policy, adjoint):
    """The adjoint is INDEFINITE at its first product, at a saddle that Newton finds."""
    problem = bx.minimum(lambda x, y: x[0] ** 2 / 2 - x[1] ** 2 / 2 + y * x[1])
    engine = bx.value_and_hypergradient(
        lambda x, y: x[1] ** 2, problem, bx.Newton(), on_failure=policy
    )
    warm = bx.cold_start(jnp.array([0.0, 1.0]))
    # g_1 = (0, 2) and F_1 = diag(1, -1): 0.3 in the second entry is worse than zero.
    result = engine(1.0, warm._replace(adjoint=jnp.array([0.0, adjoint])))
    assert result.report.inner.status == Status.CONVERGED
    assert result.report.adjoint.status == Status.INDEFINITE
    assert np.isnan(result.gradient) and result.value == 1


def test_the_status_of_every_failure_names_a_remedy():
    for status in Status:
        assert len(status.remedy) > 10
        assert status.name not in status.remedy
