"""Separable problems against loops over their tasks, and against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import bilevax as bx
from bilevax import Status
from tests.everyday import params, slow
from tests.iterative.example import assert_close

# Ridge-like classification: three tasks with features, labels (integers) and an offset.
COUNT = 3
RNG = np.random.default_rng(0)
TASKS = {
    "features": RNG.normal(size=(COUNT, 5, 2)) * np.array([0.6, 1.0, 1.8])[:, None, None],
    "labels": RNG.integers(0, 2, size=(COUNT, 5)),
    "offset": RNG.normal(size=COUNT),
}
Y = {"penalty": np.array([0.2, -0.4]), "scale": np.array(0.3)}
X0 = RNG.normal(size=(COUNT, 2)) + 1.0
WEIGHTS = np.array([1.0, -0.5, 2.0])


def loss(x, y, task):
    target = jnp.where(task["labels"] == 1, 1.0, -1.0).astype(x.dtype)
    margin = task["features"] @ x + task["offset"] - target
    return (
        jnp.mean(jnp.log(jnp.cosh(margin))) * jnp.exp(y["scale"])
        + jnp.sum(jnp.exp(y["penalty"]) * x**2) / 2
    )


def loss_of_task(task, x, y):
    return loss(x, y, task)


def outer_of_task(x, y):
    return jnp.sum(jnp.sin(x)) + jnp.sum(y["penalty"]) * jnp.sum(x**2)


def outer(x, y):
    return jnp.dot(WEIGHTS.astype(x.dtype), jax.vmap(outer_of_task, (0, None))(x, y))


def task_number(i, tasks=TASKS):
    return jax.tree.map(lambda leaf: leaf[i], tasks)


def with_floats(tasks, floats):
    return dict(tasks, **floats)


FLOATS = {name: TASKS[name] for name in ("features", "offset")}
GRADIENT = bx.GradientDescent(0.45, rtol=1e-10, atol=0.0, maxiter=100)
STEPS = bx.GradientDescent(0.45, rtol=1e-2, atol=0.0, maxiter=40)
DENSE = bx.Implicit(bx.Dense())

CASES = {
    "implicit": (GRADIENT, bx.Implicit()),
    "forward": (GRADIENT, bx.Implicit(mode="forward")),
    "preconditioned": (STEPS, bx.Preconditioned(DENSE, bx.NewtonStep(bx.Dense()))),
    "exponential": (STEPS, bx.Reparameterized(DENSE, bx.ExpChange())),
    "diagonal": (STEPS, bx.Reparameterized(DENSE, bx.DiagonalChange())),
    "Newton": (bx.Newton(bx.Dense()), DENSE),
    "unrolled": (STEPS, bx.Unrolled()),
    "last steps": (STEPS, bx.Unrolled(2, checkpoints=1)),
    "one step": (STEPS, bx.OneStep()),
}
# Where the derivative with respect to x0 and the rest is one of steps that differ between tasks.
ROUGH = [name for name, (solver, _) in CASES.items() if solver is STEPS]


@functools.cache
def together(name):
    solver, rule = CASES[name]

    def value(floats, y):
        problem = bx.separable(bx.minimum(loss), with_floats(TASKS, floats))
        x, report = bx.solution_map(problem, solver, rule).with_report(X0, y)
        return outer(x, y), (x, report)

    return jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))


@functools.cache
def alone(name):
    """Return the same of one task: its weight in g and its data are arguments."""
    solver, rule = CASES[name]

    def value(floats, y, labels, x0, weight):
        problem = bx.minimum(Partial(loss_of_task, dict(floats, labels=labels)))
        x, report = bx.solution_map(problem, solver, rule).with_report(x0, y)
        return weight * outer_of_task(x, y), (x, report)

    return jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))


def loop(name, y):
    """Return values, points, reports and gradients of all tasks, one after the other."""
    results = []
    for i in range(COUNT):
        task = task_number(i)
        floats = {name: task[name] for name in FLOATS}
        results.append(alone(name)(floats, y, task["labels"], X0[i], WEIGHTS[i]))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *results)
    (values, aux), (by_floats, by_y) = stacked
    return (np.sum(values), aux), (by_floats, jax.tree.map(lambda leaf: np.sum(leaf, 0), by_y))


# Forward mode and Newton's method are met below; the others of a kind differ in a detail.
EVERYDAY = ("implicit", "preconditioned", "diagonal", "unrolled", "one step")


@pytest.mark.parametrize("name", params(zip(CASES, strict=True), EVERYDAY.__contains__))
def test_equals_a_loop_over_tasks(name):
    got, wanted = together(name)(FLOATS, Y), loop(name, Y)
    (_, (_, report)), _ = got
    assert report.iterations.shape == report.status.shape == (COUNT,)
    if name in ROUGH:
        assert len(set(report.iterations.tolist())) == COUNT  # each task has its own stopping
    for field in ("status", "iterations"):
        np.testing.assert_array_equal(
            getattr(report, field), getattr(wanted[0][1][1], field), err_msg=field
        )
    # Solutions and gradients up to rounding; residuals near the rounding of F, roughly.
    (value, (x, _)), gradient = got
    assert_close((value, x, gradient), (wanted[0][0], wanted[0][1][0], wanted[1]), 1e-11)
    np.testing.assert_allclose(report.residual, wanted[0][1][1].residual, rtol=1e-4, atol=1e-14)


@pytest.mark.parametrize("name", ["preconditioned", slow("diagonal"), "unrolled"])
def test_an_engine_equals_the_solution_map(name):
    solver, rule = CASES[name]
    engine = bx.value_and_hypergradient(outer, bx.separable(bx.minimum(loss), TASKS), solver, rule)
    result = engine(Y, bx.cold_start(X0))
    (value, (x, report)), (_, by_y) = together(name)(FLOATS, Y)
    assert_close((result.value, result.x, result.gradient), (value, x, by_y), 1e-12)
    np.testing.assert_array_equal(result.report.inner.iterations, report.iterations)
    if name != "unrolled":
        assert result.report.adjoint.status.tolist() == [Status.CONVERGED] * COUNT
        assert result.warm.adjoint.shape == (COUNT, 2)
    again = engine(Y, result.warm)
    assert np.all(again.report.inner.iterations <= report.iterations)


# Means with a closed form: min over x of y (x - d)^2 / 2 + x^2 / 2, x* = y d / (1 + y).


def mean_loss(x, y, data):
    return 0.5 * y * (x - data) ** 2 + 0.5 * x**2


DATA = np.array([1.0, -2.0, 4.0])


def means(data=DATA):
    return bx.separable(bx.minimum(mean_loss), data)


def test_closed_form_in_all_modes():
    solve = bx.solution_map(means(), bx.Newton(), bx.Implicit(mode="forward"))

    @jax.jit
    def everything(y):
        def value(y):
            return jnp.sum(solve(jnp.zeros(COUNT), y) ** 2)

        return {
            "x": solve(jnp.zeros(COUNT), y),
            "jvp": jax.jvp(lambda y: solve(jnp.zeros(COUNT), y), (y,), (2.0,))[1],
            "gradient": jax.grad(value)(y),
            "hessian": jax.hessian(value)(y),
        }

    y, total = 0.7, np.sum(DATA**2)
    got = everything(y)
    np.testing.assert_allclose(got["x"], y * DATA / (1 + y), rtol=1e-11)
    np.testing.assert_allclose(got["jvp"], 2 * DATA / (1 + y) ** 2, rtol=1e-11)
    # h = total (y / (1 + y))^2
    np.testing.assert_allclose(got["gradient"], total * 2 * y / (1 + y) ** 3, rtol=1e-11)
    np.testing.assert_allclose(got["hessian"], total * (2 - 4 * y) / (1 + y) ** 4, rtol=1e-10)


@pytest.mark.parametrize(
    ("solver", "rule"),
    [
        pytest.param(bx.Newton(), bx.Implicit(), id="implicit"),
        slow(bx.GradientDescent(0.5, maxiter=60), bx.Unrolled(checkpoints="sqrt"), id="unrolled"),
    ],
)
def test_data_closed_over_values_and_batches(solver, rule):
    """Gradients reach the data of tasks and traced values; a batch of separable problems."""

    def value(data, shift, y):
        def shifted(x, y, data):
            return mean_loss(x, y, data + shift)

        solve = bx.solution_map(bx.separable(bx.minimum(shifted), data), solver, rule)
        return WEIGHTS @ solve(jnp.zeros(COUNT), y)

    shifts, ys = np.array([0.0, 0.5]), np.array([0.7, 1.2])
    gradient = jax.grad(value, (0, 1, 2))
    batch = jax.jit(jax.vmap(gradient, (None, 0, 0)))(DATA, shifts, ys)
    for i, (shift, y) in enumerate(zip(shifts, ys, strict=True)):
        wanted = (
            WEIGHTS * y / (1 + y),
            np.sum(WEIGHTS) * y / (1 + y),
            WEIGHTS @ (DATA + shift) / (1 + y) ** 2,
        )
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], batch), wanted, 1e-9)
    eager = gradient(DATA, shifts[1], ys[1])
    assert_close(eager, jax.tree.map(lambda leaf: leaf[1], batch), 1e-12)


def test_closures_of_a_loop_in_python():
    """A loop that makes a closure per task gives the same, closures being bound at once."""
    got = bx.solution_map(means(), bx.Newton())(jnp.zeros(COUNT), 0.7)
    for i in range(COUNT):

        def task_loss(x, y, data=DATA[i]):
            return mean_loss(x, y, data)

        x = bx.solution_map(bx.minimum(task_loss), bx.Newton())(0.0, 0.7)
        np.testing.assert_allclose(got[i], x, rtol=1e-12)


@pytest.mark.parametrize(
    "rule", [bx.Implicit(), slow(bx.Implicit(mode="forward")), bx.Unrolled()], ids=repr
)
def test_integer_and_key_leaves(rule):
    def shifted(x, y, task):
        noise = jax.random.normal(task["key"], ())
        return (x - y["w"][task["index"] + y["by"]] * (1 + task["on"]) - noise) ** 2 / 2

    tasks = {
        "index": jnp.array([0, 2, 1]),
        "on": jnp.array([True, False, True]),
        "key": jax.random.split(jax.random.key(0), COUNT),
    }
    y = {"w": jnp.arange(4.0), "by": jnp.array(1)}

    def value(y, tasks):
        solver = bx.GradientDescent(0.7, maxiter=50)
        solve = bx.solution_map(bx.separable(bx.minimum(shifted), tasks), solver, rule)
        return WEIGHTS @ solve(jnp.zeros(COUNT), y)

    by_y, by_tasks = jax.jit(jax.grad(value, (0, 1), allow_int=True))(y, tasks)
    np.testing.assert_allclose(by_y["w"], [0, 2 * 1.0, 2 * 2.0, -0.5], rtol=1e-9)
    for leaf in (by_y["by"], *by_tasks.values()):
        assert leaf.dtype == jax.dtypes.float0


def test_complex_data_is_refused_and_never_has_a_zero_gradient():
    with pytest.raises(TypeError, match="complex"):
        bx.separable(bx.minimum(lambda x, y, c: (x - y * c.real) ** 2), np.array([1 + 1j, 2.0]))


def test_equilibria_that_share_their_weights():
    """z_i = tanh(W z_i + u_i), an equilibrium model on a batch of inputs u."""
    weight = 0.4 * RNG.normal(size=(4, 4)) / 2
    inputs = RNG.normal(size=(5, 4))
    problem = bx.separable(bx.fixed_point(lambda z, w, u: jnp.tanh(w @ z + u)), inputs)
    z = np.zeros((5, 4))
    for _ in range(100):
        z = np.tanh(z @ weight.T + inputs)
    wanted = np.zeros((4, 4))
    for i in range(5):
        slope = 1 - z[i] ** 2
        v = np.linalg.solve((np.eye(4) - slope[:, None] * weight).T, 2 * z[i])
        wanted += np.outer(slope * v, z[i])
    cases = [
        (bx.FixedPointIteration(memory=2), bx.Implicit(bx.Neumann(60))),
        (bx.FixedPointIteration(maxiter=80), bx.Unrolled(60)),
    ]
    for solver, rule in cases:
        engine = bx.value_and_hypergradient(lambda z, w: jnp.sum(z**2), problem, solver, rule)
        result = engine(weight, bx.cold_start(np.zeros((5, 4))))
        np.testing.assert_allclose(result.x, z, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(result.gradient, wanted, rtol=1e-8, atol=1e-10)


def test_float32_stays_float32():
    single = functools.partial(jax.tree.map, lambda leaf: jnp.asarray(leaf, jnp.float32))
    problem = bx.separable(bx.minimum(loss), with_floats(TASKS, single(FLOATS)))
    engine = bx.value_and_hypergradient(outer, problem, bx.GradientDescent(0.45))
    result = engine(single(Y), bx.cold_start(single(X0)))
    for leaf in jax.tree.leaves(result):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    _, (_, by_y) = together("implicit")(FLOATS, Y)
    assert_close(result.gradient, by_y, 2e-4)


# A task that fails.


def curved(x, y, curvature):
    return 0.5 * y * curvature * x**2 - x  # x* = 1 / (y curvature)


CURVATURES = np.array([1.0, 50.0, 2.0])  # at a rate of 0.4 the second diverges


@pytest.mark.parametrize(
    "rule",
    [bx.Implicit(), slow(bx.Unrolled()), slow(bx.OneStep())],
    ids=lambda rule: type(rule).__name__,
)
def test_one_diverging_task_does_not_spoil_the_others(rule):
    problem = bx.separable(bx.minimum(curved), CURVATURES)
    solver = bx.GradientDescent(0.4, maxiter=80)

    def value(y, policy):
        solve = bx.solution_map(problem, solver, rule, on_failure=policy)
        x = solve(jnp.ones(COUNT), y)
        return jnp.sum(x), x

    gradient = jax.jit(jax.value_and_grad(value, has_aux=True), static_argnums=1)
    (total, x), by_y = gradient(1.0, bx.OnFailure.NAN)
    np.testing.assert_allclose(x[np.array([0, 2])], [1.0, 0.5], rtol=1e-10)
    assert np.isnan(x[1]) and np.isnan(total) and np.isnan(by_y)
    with pytest.raises(jax.errors.JaxRuntimeError, match="ended with status DIVERGED"):
        jax.block_until_ready(gradient(1.0, bx.OnFailure.RAISE))
    # The engine: the report tells, the next start of the task that failed is cold.
    for policy in (bx.OnFailure.RETURN, bx.OnFailure.NAN):
        engine = bx.value_and_hypergradient(
            lambda x, y: jnp.sum(x), problem, solver, rule, on_failure=policy
        )
        result = engine(1.0, bx.cold_start(np.ones(COUNT)))
        expected = [Status.CONVERGED, Status.DIVERGED, Status.CONVERGED]
        assert result.report.inner.status.tolist() == expected
        np.testing.assert_allclose(result.warm.x, [1.0, 1.0, 0.5], rtol=1e-10)
        is_nan = policy is bx.OnFailure.NAN
        assert np.isnan(result.gradient) == np.isnan(result.value) == is_nan


def test_an_adjoint_that_fails_in_one_task():
    """A flat task has no adjoint: the sum is NaN, and its own data alone have a NaN gradient."""

    def value(data):
        problem = bx.separable(bx.minimum(lambda x, y, c: 0.5 * c * (x - y) ** 2), data)
        solver = bx.GradientDescent(0.4, maxiter=100)
        x = bx.solution_map(problem, solver, bx.Implicit(bx.CG()))(jnp.ones(COUNT), 1.5)
        return jnp.sum(x)

    gradient = jax.jit(jax.grad(value))(np.array([1.0, 0.0, 2.0]))
    assert np.isnan(gradient[1])
    np.testing.assert_allclose(gradient[np.array([0, 2])], 0, atol=1e-10)


# Everything that meets a problem meets a separable one.


def test_a_black_box():
    def closed_form(x0, y):
        return y * DATA / (1 + y)

    solve = bx.implicit_function(means(), closed_form)
    x, report = solve.with_report(jnp.zeros(COUNT), 0.7)
    np.testing.assert_allclose(x, 0.7 * DATA / 1.7, rtol=1e-14)
    assert report.status.tolist() == [Status.TRUNCATED] * COUNT
    got = jax.grad(lambda y: WEIGHTS @ solve(jnp.zeros(COUNT), y))(0.7)
    np.testing.assert_allclose(got, WEIGHTS @ DATA / 1.7**2, rtol=1e-10)


def test_rules_by_themselves():
    x, y, cotangent = 0.7 * DATA / 1.7, 0.7, np.array([1.0, 2.0, -1.0])
    for rule in (bx.Implicit(), bx.Preconditioned(bx.Implicit(), bx.NewtonStep())):
        near, _ = rule.refine(means(), x, y)
        np.testing.assert_allclose(near, x, rtol=1e-12)
        gradient, report = rule.pullback(means(), x, y, cotangent)
        np.testing.assert_allclose(gradient, cotangent @ DATA / 1.7**2, rtol=1e-10)
        assert report.solve.status.shape == (COUNT,)
        tangent = rule.pushforward(means(), x, y, 2.0)
        np.testing.assert_allclose(tangent, 2 * DATA / 1.7**2, rtol=1e-10)


def test_checks_against_differences():
    solve = bx.solution_map(means(), bx.Newton())
    bx.assert_hypergradient(lambda x, y: jnp.sum(x**2), solve, 0.7, np.zeros(COUNT))


def test_an_optimiser_of_optax_has_its_memory_per_task():
    x0, rate = np.zeros(COUNT), 0.3
    solver = bx.Optax(optax.sgd(rate, momentum=0.5), rtol=0.0, atol=0.0, maxiter=4)
    x, velocity = x0, 0.0
    for _ in range(4):
        velocity = 0.5 * velocity + 0.7 * (x - DATA) + x
        x = x - rate * velocity
    got, report = bx.solution_map(means(), solver).with_report(x0, 0.7)
    np.testing.assert_allclose(got, x, rtol=1e-13)
    assert report.status.tolist() == [Status.TRUNCATED] * COUNT
