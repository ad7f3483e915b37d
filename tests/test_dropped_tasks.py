"""Tasks that fail are left out, exactly, and the others are what they would be without them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import Status
from tests.everyday import slow

DROP = bx.OnFailure.DROP
SOLVER = bx.GradientDescent(0.3, maxiter=300)
Y = 0.1
X0 = np.array([0.3, -0.2, 0.5, 0.1])
CURVATURES = np.array([1.0, 50.0, 2.0, 0.5])  # the second diverges
GOOD = CURVATURES < 10


def quadratic(x, y, a):
    """Return f with x* = a / (a + exp(y))."""
    return a * (x - 1) ** 2 / 2 + jnp.exp(y) * x**2 / 2


def logarithmic(x, y, a):
    """Return the same, and beside it a term of NaN where data are negative, anywhere."""
    return quadratic(x, y, jnp.abs(a)) + 0 * x * jnp.log(a)


def problem_of(objective=quadratic, tasks=CURVATURES):
    return bx.separable(bx.minimum(objective), tasks=jnp.asarray(tasks))


def squares(y, curvatures):
    """Return the sum of x*^2 and its first two derivatives in y; u = exp(y), s = a + u."""
    a, u = curvatures, np.exp(y)
    s = a + u
    first = -2 * a**2 * u / s**3
    return np.sum((a / s) ** 2), np.sum(first), np.sum(-2 * a**2 * (u * s - 3 * u**2) / s**4)


def masked(solve, x0=X0):
    def loss(y):
        x, report = solve.with_report(x0, y)
        return jnp.sum(jnp.where(report.dropped, 0.0, x**2)), report

    return loss


RULES = {
    "implicit": bx.Implicit(),
    "forward": bx.Implicit(mode="forward"),
    "Newton": bx.Preconditioned(bx.Implicit(), bx.NewtonStep()),
    "unrolled": bx.Unrolled(),
    "forward run": bx.Unrolled(mode="forward"),
}


@pytest.mark.parametrize("name", ["implicit", "unrolled", slow("forward"), slow("forward run")])
def test_the_others_are_exact_to_second_order(name):
    solve = bx.solution_map(problem_of(), SOLVER, RULES[name], on_failure=DROP)
    loss = masked(solve)
    grad = jax.jacfwd if name == "forward run" else jax.grad
    (first, report), second = jax.jit(
        lambda y: (grad(loss, has_aux=True)(y), grad(lambda y: grad(loss, has_aux=True)(y)[0])(y))
    )(Y)
    _, *wanted = squares(Y, CURVATURES[GOOD])
    np.testing.assert_allclose((first, second), wanted, rtol=1e-8)
    np.testing.assert_array_equal(report.dropped, ~GOOD)
    assert [Status(int(s)).name == "DIVERGED" for s in report.status] == (~GOOD).tolist()
    # Its start is what there is of a dropped task, and nothing depends on it.
    x = solve(X0, Y)
    np.testing.assert_allclose(x, np.where(GOOD, CURVATURES / (CURVATURES + np.exp(Y)), X0))
    unmasked = jax.jit(grad(lambda y: jnp.sum(solve(X0, y) ** 2)))(Y)
    np.testing.assert_allclose(unmasked, wanted[0], rtol=1e-8)


@pytest.mark.parametrize(
    ("name", "data"),
    [("implicit", -1.0), slow("implicit", np.nan), slow("implicit", 1e200), slow("unrolled", -1.0)],
)
def test_data_that_make_everything_nan_leave_nothing_behind(name, data):
    """Not even zero times NaN: in y, in the data of the others, and in second derivatives."""
    tasks = np.array([1.0, data, 2.0, 0.5])

    def loss(y, tasks):
        solve = bx.solution_map(
            problem_of(logarithmic, tasks), SOLVER, RULES[name], on_failure=DROP
        )
        return masked(solve)(y)

    def both(y, tasks):
        first, report = jax.grad(loss, (0, 1), has_aux=True)(y, tasks)
        second = jax.grad(lambda y: jax.grad(loss, has_aux=True)(y, tasks)[0])(y)
        return *first, second, report

    by_y, by_data, second, report = jax.jit(both)(Y, tasks)
    good = np.array([True, False, True, True])
    np.testing.assert_array_equal(report.dropped, ~good)
    a, u = tasks[good], np.exp(Y)
    _, *wanted = squares(Y, a)
    np.testing.assert_allclose((by_y, second), wanted, rtol=1e-8)
    np.testing.assert_allclose(by_data[good], 2 * a * u / (a + u) ** 3, rtol=1e-8)
    assert by_data[1] == 0


def test_random_members_of_the_kind():
    """Any subset of tasks may fail; where all do, there is nothing to return."""
    random = np.random.default_rng(0)
    curvatures = random.uniform(0.5, 3.0, (8, 4))
    curvatures = np.where(random.random((8, 4)) < 0.4, 40.0, curvatures)
    curvatures[0], curvatures[1] = 40.0, 1.0  # all, and none

    def loss(y, tasks):
        solve = bx.solution_map(problem_of(tasks=tasks), SOLVER, on_failure=DROP)
        return masked(solve)(y)

    gradient = jax.jit(jax.vmap(jax.grad(loss, has_aux=True), (None, 0)))
    got, report = gradient(Y, curvatures)
    np.testing.assert_array_equal(report.dropped, curvatures > 10)
    assert np.isnan(got[0])
    for row, value in zip(curvatures[1:], got[1:], strict=True):
        np.testing.assert_allclose(value, squares(Y, row[row < 10])[1], rtol=1e-8)


@pytest.mark.parametrize(
    "name", ["Newton", slow("implicit"), slow("unrolled"), slow("forward run")]
)
def test_an_engine_counts_them_and_goes_on(name):
    engine = bx.value_and_hypergradient(
        lambda x, y: jnp.sum(x**2), problem_of(), SOLVER, RULES[name], on_failure=DROP
    )
    result = engine(Y, bx.cold_start(X0))
    value, gradient, _ = squares(Y, CURVATURES[GOOD])
    np.testing.assert_allclose(result.value, value + X0[1] ** 2, rtol=1e-8)
    np.testing.assert_allclose(result.gradient, gradient, rtol=1e-8)
    np.testing.assert_array_equal(result.report.dropped, ~GOOD)
    np.testing.assert_array_equal(result.warm.x[~GOOD], X0[~GOOD])
    everything = bx.value_and_hypergradient(
        lambda x, y: jnp.sum(x**2),
        problem_of(tasks=40 + CURVATURES),
        SOLVER,
        RULES[name],
        on_failure=DROP,
    )
    result = everything(Y, bx.cold_start(X0))
    assert np.isnan(result.gradient) and np.all(result.report.dropped)


def test_a_descent_goes_on_without_a_task_that_fails():
    engine = bx.value_and_hypergradient(
        lambda x, y: jnp.sum(x**2), problem_of(), SOLVER, on_failure=DROP
    )
    result = bx.minimize(bx.make_step(engine, optax.sgd(0.1)), 0.1, X0, steps=3)
    y = 0.1
    for k in range(3):
        value, gradient, _ = squares(y, CURVATURES[GOOD])
        np.testing.assert_allclose(result.history.value[k], value + X0[1] ** 2, rtol=1e-6)
        y = y - 0.1 * gradient
    assert np.all(result.history.status < Status.DIVERGED)


def test_a_function_for_scipy_goes_on_without_a_task_that_fails():
    engine = bx.value_and_hypergradient(
        lambda x, y: jnp.sum(x**2), problem_of(), SOLVER, on_failure=DROP
    )
    _, gradient = bx.scipy_objective(engine, Y, X0)(np.array([Y]))
    np.testing.assert_allclose(gradient, squares(Y, CURVATURES[GOOD])[1], rtol=1e-6)


# The adjoint solve.

RATES = np.array([0.4, 1.5, -0.6, 0.2])  # the series of the second diverges


def equilibrium(x, y, rate):
    """Return T with x* = y / (1 - rate): the series of a rate above 1 diverges."""
    return rate * x + y


def black_box(x0, y):
    return y / (1 - jnp.asarray(RATES))


def test_an_adjoint_that_fails_is_left_out_with_a_warning():
    """Of a solution map under `jax.grad` no report can tell."""
    solve = bx.implicit_function(
        bx.separable(bx.fixed_point(equilibrium), RATES),
        black_box,
        bx.Implicit(bx.Neumann(300)),
        on_failure=DROP,
    )
    gradient = jax.jit(jax.grad(lambda y: jnp.sum(jnp.square(solve(X0, y)))))
    with pytest.warns(RuntimeWarning, match=r"adjoint solves of 1 tasks failed \(DIVERGED: "):
        got = jax.block_until_ready(gradient(2.0))
        jax.effects_barrier()
    np.testing.assert_allclose(got, np.sum(4.0 / (1 - RATES[[0, 2, 3]]) ** 2), rtol=1e-8)


def test_an_engine_reports_an_adjoint_that_fails():
    """Newton's method finds the fixed point that the series of the adjoint does not."""
    engine = bx.value_and_hypergradient(
        lambda x, y: jnp.sum(x**2),
        bx.separable(bx.fixed_point(equilibrium), RATES),
        bx.Newton(),
        bx.Implicit(bx.Neumann(300)),
        on_failure=DROP,
    )
    result = engine(2.0, bx.cold_start(X0))
    np.testing.assert_allclose(result.value, np.sum(4.0 / (1 - RATES) ** 2), rtol=1e-8)
    wanted = np.sum(4.0 / (1 - RATES[[0, 2, 3]]) ** 2)
    np.testing.assert_allclose(result.gradient, wanted, rtol=1e-8)
    np.testing.assert_array_equal(result.report.dropped, [False, True, False, False])
    assert np.all(result.report.inner.status == Status.CONVERGED)


def test_a_correction_that_fails_leaves_the_solution_as_a_constant():
    """At a start with negative curvature Newton's correction is INDEFINITE."""
    tasks = bx.separable(bx.minimum(lambda x, y, a: x**4 / 4 - a * x**2 / 2 - y * x), X0 * 0 + 1)
    rule = bx.Preconditioned(bx.Implicit(), bx.NewtonStep())
    start = np.array([1.2, 0.1, 1.4, 1.1])  # 3 x^2 - 1 is negative at the second
    solve = bx.solution_map(tasks, bx.GradientDescent(0.1, maxiter=0), rule, on_failure=DROP)
    x, report = solve.with_report(start, 0.0)
    np.testing.assert_array_equal(report.dropped, start < 0.5)
    newton = start - (start**3 - start) / (3 * start**2 - 1)
    np.testing.assert_allclose(x, np.where(start < 0.5, start, newton), rtol=1e-12)
    gradient = jax.grad(lambda y: jnp.sum(solve(start, y)))(0.0)
    kept = newton[start > 0.5]
    np.testing.assert_allclose(gradient, np.sum(1 / (3 * kept**2 - 1)), rtol=1e-10)


# A problem without tasks.


def test_a_single_problem_is_refused():
    problem, message = bx.minimum(lambda x, y: x**2), r"drops tasks of a `separable.*OnFailure.NAN"
    with pytest.raises(TypeError, match=message):
        bx.solution_map(problem, bx.Newton(), on_failure=DROP)
    with pytest.raises(TypeError, match=message):
        bx.implicit_function(problem, lambda x0, y: x0, on_failure=DROP)
    with pytest.raises(TypeError, match=message):
        bx.value_and_hypergradient(lambda x, y: x, problem, bx.Newton(), on_failure=DROP)
