"""The solution map as a function of JAX: what gradients reach, transformations, shapes, dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import bilevax as bx

# min over x of x H x / 2 + sum(y x^2) / 2 - <target, x>, and the outer objective <C, x>.
H = np.array([[2.0, 0.5], [0.5, 1.0]])
C = np.array([1.0, -2.0])
Y = np.array([0.5, 1.5])
TARGET = np.array([1.0, 3.0])
SOLVER = bx.GradientDescent(0.4)


def objective(x, y, target=TARGET):
    # Constants in the dtype of x, so that float32 is not computed in float64.
    matrix, target = jnp.asarray(H, x.dtype), jnp.asarray(target, x.dtype)
    return x @ matrix @ x / 2 + jnp.sum(y * x**2) / 2 - target @ x


def truth(y=Y, target=TARGET):
    """Return x*, and the gradients of <C, x*> in y and in the target."""
    x, v = np.linalg.solve(H + np.diag(y), np.stack([target, C], axis=1)).T
    return x, -v * x, v


def central_difference(function, at, step=1e-5):
    """Return the Jacobian of a NumPy function, the last axes being those of `at`."""
    columns = []
    for i in range(at.size):
        shift = np.zeros(at.size)
        shift[i] = step
        shift = shift.reshape(at.shape)
        columns.append((function(at + shift) - function(at - shift)) / (2 * step))
    return np.stack(columns, axis=-1).reshape(*np.shape(columns[0]), *at.shape)


def outer(y, target, solver=SOLVER, rule=None):
    """Return <C, x*(y)> with a target that the objective closes over."""
    problem = bx.minimum(lambda x, y: objective(x, y, target))
    return C @ bx.solution_map(problem, solver, rule)(jnp.zeros(2), y)


# What gradients reach.


def over_lanes(h):
    def gradients(y, target):
        lanes = jax.vmap(jax.grad(h, (0, 1)))(
            jnp.stack([y + 1, y]), jnp.stack([2 * target, target])
        )
        return jax.tree.map(lambda lane: lane[1], lanes)

    return gradients


def over_lanes_of_what_is_closed_over(h):
    def gradients(y, target):
        targets = jnp.stack([2 * target, target])
        lanes = jax.vmap(jax.grad(h, (0, 1)), in_axes=(None, 0))(y, targets)
        return jax.tree.map(lambda lane: lane[1], lanes)

    return gradients


def gradient_of_a_vmap(h):
    def mean(y, target):
        return jnp.mean(jax.vmap(h, in_axes=(None, 0))(y, jnp.stack([target, target])))

    return jax.grad(mean, (0, 1))


def gradient_of_a_scan(h):
    def last(y, target):
        def body(carry, _):
            return h(y, target), carry

        return jax.lax.scan(body, jnp.zeros(()), None, length=2)[0]

    return jax.grad(last, (0, 1))


def inside_a_scan(h):
    def gradients(y, target):
        def body(carry, y):
            return carry, jax.grad(h, (0, 1))(y, target)

        lanes = jax.lax.scan(body, 0.0, jnp.stack([y + 1, y]))[1]
        return jax.tree.map(lambda lane: lane[1], lanes)

    return gradients


TRANSFORMATIONS = {
    "grad": lambda h: jax.grad(h, (0, 1)),
    "jit of grad": lambda h: jax.jit(jax.grad(h, (0, 1))),
    "grad of jit": lambda h: jax.grad(jax.jit(h), (0, 1)),
    "grad of checkpoint": lambda h: jax.jit(jax.grad(jax.checkpoint(h), (0, 1))),
    "vmap": over_lanes,
    "vmap of what is closed over": lambda h: jax.jit(over_lanes_of_what_is_closed_over(h)),
    "grad of vmap": lambda h: jax.jit(gradient_of_a_vmap(h)),
    "grad of scan": lambda h: jax.jit(gradient_of_a_scan(h)),
    "inside scan": lambda h: jax.jit(inside_a_scan(h)),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_gradients_reach_y_and_closed_over_traced_values(name):
    got_y, got_target = TRANSFORMATIONS[name](outer)(jnp.asarray(Y), jnp.asarray(TARGET))
    _, want_y, want_target = truth()
    np.testing.assert_allclose(got_y, want_y, rtol=1e-10)
    np.testing.assert_allclose(got_target, want_target, rtol=1e-10)


@pytest.mark.parametrize(
    "rule",
    [
        bx.Implicit(mode="forward"),
        bx.Preconditioned(bx.Implicit(), step=bx.NewtonStep()),
        bx.Reparameterized(bx.Implicit(bx.Dense()), change=bx.DiagonalChange()),
        bx.Reparameterized(bx.Implicit(bx.Dense(), mode="forward"), change=bx.ExpChange()),
    ],
    ids=["forward", "preconditioned", "reparameterized", "reparameterized forward"],
)
def test_every_kind_of_rule_reaches_closed_over_traced_values(rule):
    gradient = jax.jit(jax.grad(lambda y, target: outer(y, target, rule=rule), (0, 1)))
    got_y, got_target = gradient(Y, TARGET)
    _, want_y, want_target = truth()
    np.testing.assert_allclose(got_y, want_y, rtol=1e-10)
    np.testing.assert_allclose(got_target, want_target, rtol=1e-10)


def test_a_value_that_is_y_and_closed_over_gets_the_sum_of_both():
    def h(y):
        problem = bx.minimum(lambda x, argument: objective(x, argument, target=y))
        return C @ bx.solution_map(problem, SOLVER)(jnp.zeros(2), y)

    _, through_y, through_closure = truth(Y, Y)
    got = jax.jit(jax.grad(h))(Y)
    np.testing.assert_allclose(got, through_y + through_closure, rtol=1e-10)


def test_a_root_and_a_fixed_point_reach_closed_over_traced_values():
    def h(y, target):
        root = bx.root(lambda x, y: H @ x + y * x - target)
        x = bx.solution_map(root, SOLVER, bx.Implicit(bx.Dense()))(jnp.zeros(2), y)
        fixed_point = bx.fixed_point(lambda x, y: x - 0.4 * (H @ x + y * x - target))
        solver = bx.FixedPointIteration()
        other = bx.solution_map(fixed_point, solver, bx.Implicit(bx.Dense()))(jnp.zeros(2), y)
        return C @ x, C @ other

    _, want_y, want_target = truth()
    for got_y, got_target in jax.jit(jax.jacrev(h, (0, 1)))(Y, TARGET):
        np.testing.assert_allclose(got_y, want_y, rtol=1e-10)
        np.testing.assert_allclose(got_target, want_target, rtol=1e-10)


def test_gradients_reach_closed_over_data_of_a_nonlinear_problem():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(6, 2)), np.array([1.0, -1, 1, 1, -1, -1])
    y = np.array([-0.5, 0.3])

    def solve_by_numpy(features, y):
        x = np.zeros(2)
        for _ in range(30):  # Newton, to rounding
            odds = 1 / (1 + np.exp(labels * (features @ x)))
            gradient = -features.T @ (labels * odds) + np.exp(y) * x
            curvature = features.T @ (features * (odds * (1 - odds))[:, None])
            x = x - np.linalg.solve(curvature + np.diag(np.exp(y)), gradient)
        return x

    def h(features, y):
        def logistic(x, y):
            margins = labels * (features @ x)
            return jnp.sum(jnp.logaddexp(0, -margins)) + jnp.sum(jnp.exp(y) * x**2) / 2

        solve = bx.solution_map(bx.minimum(logistic), bx.GradientDescent(0.2))
        return C @ solve(jnp.zeros(2), y)

    got_features, got_y = jax.jit(jax.grad(h, (0, 1)))(features, y)
    want_y = central_difference(lambda y: C @ solve_by_numpy(features, y), y)
    want_features = central_difference(lambda a: C @ solve_by_numpy(a, y), features)
    np.testing.assert_allclose(got_y, want_y, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(got_features, want_features, rtol=1e-8, atol=1e-10)


def test_integer_and_key_arrays_that_are_closed_over_are_carried_along():
    def h(y, index, key):
        noise = jax.random.normal(key, (2,))
        problem = bx.minimum(
            lambda x, y: jnp.sum((x - y[index] - jax.random.normal(key, (2,))) ** 2) / 2
        )
        return C @ bx.solution_map(problem, SOLVER)(jnp.zeros(2), y) - C @ noise

    y, key = jnp.arange(4.0), jax.random.key(1)
    value_and_gradient = jax.jit(jax.value_and_grad(h))
    for index in (jnp.array([0, 2]), jnp.array([3, 3])):
        want = np.zeros(4)
        np.add.at(want, np.asarray(index), C)
        value, got = value_and_gradient(y, index, key)
        np.testing.assert_allclose(value, C @ np.asarray(y)[np.asarray(index)], atol=1e-10)
        np.testing.assert_allclose(got, want, rtol=1e-10)


@pytest.mark.parametrize("jit", [False, True])
def test_the_leaves_of_a_partial_get_gradients(jit):
    def loss(data, x, y):
        return objective(x, y, data["target"] * data["factor"])

    def h(data, y):
        solve = bx.solution_map(bx.minimum(Partial(loss, data)), SOLVER)
        return C @ solve(jnp.zeros(2), y)

    gradient = jax.grad(h, (0, 1))
    data = {"target": TARGET, "factor": 2.0}
    got_data, got_y = (jax.jit(gradient) if jit else gradient)(data, Y)
    _, want_y, want_target = truth(Y, 2.0 * TARGET)
    np.testing.assert_allclose(got_y, want_y, rtol=1e-10)
    np.testing.assert_allclose(got_data["target"], 2.0 * want_target, rtol=1e-10)
    np.testing.assert_allclose(got_data["factor"], want_target @ TARGET, rtol=1e-10)


def test_plain_numbers_and_numpy_arrays_may_be_leaves_of_a_partial():
    def loss(factor, target, x, y):
        return objective(x, y, factor * target)

    solve = bx.solution_map(bx.minimum(Partial(loss, 2.0, TARGET)), SOLVER)
    want, want_gradient, _ = truth(Y, 2.0 * TARGET)
    np.testing.assert_allclose(solve(np.zeros(2), Y), want, rtol=1e-10)
    gradient = jax.grad(lambda y: C @ solve(np.zeros(2), y))(Y)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-10)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_no_tracer_outlives_its_trace(mode):
    def h(y, target):
        return outer(y, target, rule=bx.Implicit(mode=mode))

    with jax.checking_leaks():
        got = jax.jit(jax.grad(h))(Y, TARGET)
    np.testing.assert_allclose(got, truth()[1], rtol=1e-10)


# What gradients do not reach, and need not.

CALLABLES = {
    "Optax": lambda s: (bx.Optax(optax.sgd(0.4 * s)), None),
    "solver's preconditioner": lambda s: (
        bx.Newton(bx.CG(preconditioner=lambda v: v * s / np.diag(H))),
        None,
    ),
    "rule's preconditioner": lambda s: (
        SOLVER,
        bx.Implicit(bx.CG(preconditioner=lambda v: v * s / np.diag(H))),
    ),
    "rule's preconditioner, forward": lambda s: (
        SOLVER,
        bx.Implicit(bx.CG(preconditioner=lambda v: v * s / np.diag(H)), mode="forward"),
    ),
    "step": lambda s: (SOLVER, bx.Preconditioned(bx.Implicit(), lambda x, y, v: s * v / (2 + y))),
    "Jacobi": lambda s: (
        SOLVER,
        bx.Preconditioned(bx.Implicit(), bx.JacobiStep(lambda x, y: s * (2 + y))),
    ),
    "diagonal change": lambda s: (
        SOLVER,
        bx.Reparameterized(bx.Implicit(bx.Dense()), bx.DiagonalChange(lambda x, y: s * (2 + y))),
    ),
    "change": lambda s: (
        SOLVER,
        bx.Reparameterized(
            bx.Implicit(bx.Dense()),
            bx.ChangeOfVariables(lambda z, y: s * jnp.sinh(z), lambda x, y: jnp.arcsinh(x / s)),
        ),
    ),
    "change, forward": lambda s: (
        SOLVER,
        bx.Reparameterized(
            bx.Implicit(bx.Dense(), mode="forward"),
            bx.ChangeOfVariables(lambda z, y: s * jnp.sinh(z), lambda x, y: jnp.arcsinh(x / s)),
        ),
    ),
}


@pytest.mark.parametrize(
    ("name", "jit"),
    [*((name, True) for name in CALLABLES), ("Optax", False), ("change, forward", False)],
)
def test_callables_of_solvers_and_rules_may_close_over_traced_values(name, jit):
    def h(y, target, s):
        return outer(y, target, *CALLABLES[name](s))

    gradient = jax.grad(h, (0, 1, 2))
    got_y, got_target, got_s = (jax.jit(gradient) if jit else gradient)(Y, TARGET, 0.9)
    _, want_y, want_target = truth()
    np.testing.assert_allclose(got_y, want_y, rtol=1e-10)
    np.testing.assert_allclose(got_target, want_target, rtol=1e-10)
    assert got_s == 0  # at the solution nothing depends on it


def test_callables_may_close_over_batched_values():
    def h(y, s):
        return outer(y, TARGET, *CALLABLES["Optax"](s)), outer(y, TARGET, *CALLABLES["Jacobi"](s))

    got = jax.jit(jax.vmap(jax.jacrev(h), in_axes=(None, 0)))(Y, jnp.array([0.5, 0.9, 1.1]))
    want = np.broadcast_to(truth()[1], (3, 2))
    np.testing.assert_allclose(got[0], want, rtol=1e-10)
    np.testing.assert_allclose(got[1], want, rtol=1e-10)


def numbers_from(y):
    return {
        "rate": 0.3 + 0.01 * jnp.sum(y),
        "rtol": 1e-13 * jnp.sum(y),
        "atol": 1e-14 * jnp.sum(y),
        "damping": 0.0 * jnp.sum(y),
    }


def outer_with_numbers(y, numbers):
    solver = bx.GradientDescent(numbers["rate"], numbers["rtol"], numbers["atol"])
    rule = bx.Implicit(bx.CG(numbers["rtol"], damping=numbers["damping"]))
    return outer(y, TARGET, solver, rule)


@pytest.mark.parametrize("jit", [False, True])
def test_numbers_of_solvers_and_rules_may_be_computed_from_y(jit):
    gradient = jax.grad(lambda y: outer_with_numbers(y, numbers_from(y)))
    got = (jax.jit(gradient) if jit else gradient)(Y)
    np.testing.assert_allclose(got, truth()[1], rtol=1e-10)


def test_gradients_with_respect_to_numbers_are_zero():
    got_y, got_numbers = jax.jit(jax.grad(outer_with_numbers, (0, 1)))(Y, numbers_from(Y))
    np.testing.assert_allclose(got_y, truth()[1], rtol=1e-10)
    assert got_numbers == {"rate": 0, "rtol": 0, "atol": 0, "damping": 0}


def test_numbers_computed_from_y_cost_no_further_loop():
    # A derivative of the rate or of a tolerance would take another solve, which is a loop.
    def loops(numbers):
        gradient = jax.grad(lambda y: outer_with_numbers(y, numbers(y)))
        return str(jax.make_jaxpr(gradient)(Y)).count("while[")

    constants = jax.tree.map(float, numbers_from(Y))
    assert loops(numbers_from) == loops(lambda y: constants) == 2  # the solve and its adjoint


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_the_gradient_with_respect_to_the_start_is_zero(mode):
    problem = bx.minimum(lambda x, y: jnp.sum(y * x["a"] ** 2 - x["a"]) + (x["b"] - 1) ** 2)
    solve = bx.solution_map(problem, SOLVER, bx.Implicit(mode=mode))

    def h(x0, y):
        x = solve(x0, y)
        return jnp.sum(x["a"]) + x["b"]

    x0, y = {"a": jnp.array([1.0, 2.0]), "b": 3.0}, jnp.array([0.5, 1.0])
    got_x0, got_y = jax.jit(jax.grad(h, (0, 1)))(x0, y)
    np.testing.assert_array_equal(got_x0["a"], np.zeros(2))
    assert got_x0["b"] == 0
    np.testing.assert_allclose(got_y, -1 / (2 * np.asarray(y) ** 2), rtol=1e-10)


# Leaves of y that have no derivative.


def shifted(x, y):
    noise = jax.random.normal(y["key"], x.shape)
    return jnp.sum(jnp.where(y["flag"], 1.0, 2.0) * (x - y["w"][y["index"]] - noise) ** 2) / 2


def shifted_y():
    return {
        "w": jnp.arange(3.0),
        "index": jnp.array([2, 0]),
        "key": jax.random.key(3),
        "flag": jnp.array([True, False]),
    }


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_integer_boolean_and_key_leaves_of_y_get_float0(mode):
    solve = bx.solution_map(bx.minimum(shifted), SOLVER, bx.Implicit(mode=mode))
    y = shifted_y()
    x, pull = jax.vjp(lambda y: solve(jnp.zeros(2), y), y)
    (cotangent,) = pull(jnp.asarray(C))
    noise = np.asarray(jax.random.normal(y["key"], (2,)))
    np.testing.assert_allclose(x, np.array([2.0, 0.0]) + noise, atol=1e-10)
    np.testing.assert_allclose(cotangent["w"], [C[1], 0, C[0]], rtol=1e-10)
    for name in ("index", "key", "flag"):
        assert cotangent[name].dtype == jax.dtypes.float0
        assert cotangent[name].shape == y[name].shape


def test_gradients_with_respect_to_some_leaves_of_y():
    solve = bx.solution_map(bx.minimum(shifted), SOLVER)

    def h(w, rest):
        return C @ solve(jnp.zeros(2), rest | {"w": w})

    rest = shifted_y()
    w = rest.pop("w")
    np.testing.assert_allclose(jax.jit(jax.grad(h))(w, rest), [C[1], 0, C[0]], rtol=1e-10)
    # One index and one key per lane.
    lanes = rest | {
        "index": jnp.array([[2, 0], [1, 1]]),
        "key": jax.random.split(rest["key"]),
    }
    axes = {"index": 0, "key": 0, "flag": None}
    got = jax.jit(jax.vmap(jax.grad(h), in_axes=(None, axes)))(w, lanes)
    np.testing.assert_allclose(got, [[C[1], 0, C[0]], [0, C[0] + C[1], 0]], rtol=1e-10)


# Transformations change nothing.


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_jit_equals_eager(mode):
    solve = bx.solution_map(bx.minimum(objective), SOLVER, bx.Implicit(mode=mode))

    def everything(y):
        x, report = solve.with_report(jnp.zeros(2), y)
        return x, report, jax.jacrev(lambda y: solve(jnp.zeros(2), y))(y)

    x, report, jacobian = everything(Y)
    x_jit, report_jit, jacobian_jit = jax.jit(everything)(Y)
    np.testing.assert_allclose(x_jit, x, rtol=1e-14)
    np.testing.assert_allclose(jacobian_jit, jacobian, rtol=1e-14)
    assert report_jit.status == report.status == bx.Status.CONVERGED
    assert report_jit.iterations == report.iterations > 1
    np.testing.assert_allclose(report_jit.initial_residual, report.initial_residual, rtol=1e-14)


def test_vmap_equals_a_loop_lane_by_lane():
    solve = bx.solution_map(bx.minimum(objective), bx.GradientDescent(0.4, maxiter=40))

    def everything(x0, y):
        x, report = solve.with_report(x0, y)
        return x, report, jax.grad(lambda y: C @ solve(x0, y))(y)

    rng = np.random.default_rng(1)
    x0, y = rng.normal(size=(4, 2)), np.array([[0.0, 0.1], [1.0, 1.0], [2.0, 0.5], [0.3, 2.0]])
    x, report, gradient = jax.jit(jax.vmap(everything))(x0, y)
    one = jax.jit(everything)
    alone = [one(*lane) for lane in zip(x0, y, strict=True)]
    for lane, (x_alone, report_alone, gradient_alone) in enumerate(alone):
        np.testing.assert_allclose(x[lane], x_alone, rtol=1e-13)
        np.testing.assert_allclose(gradient[lane], gradient_alone, rtol=1e-13)
        assert report.status[lane] == report_alone.status
        assert report.iterations[lane] == report_alone.iterations
    assert len(set(report.iterations.tolist())) > 1
    assert set(report.status.tolist()) == {bx.Status.CONVERGED, bx.Status.MAXITER}


def test_vmap_over_numbers_of_the_solver():
    def solve(rate, maxiter):
        solver = bx.GradientDescent(rate, maxiter=maxiter)
        return bx.solution_map(bx.minimum(objective), solver).with_report(jnp.zeros(2), Y)

    rates, budgets = jnp.array([0.1, 0.3, 0.3]), jnp.array([1000, 1000, 2])
    x, report = jax.vmap(solve)(rates, budgets)
    assert report.iterations[2] == 2 < report.iterations[1] < report.iterations[0]
    np.testing.assert_allclose(x[:2], np.stack([truth()[0]] * 2), rtol=1e-10)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_a_bad_lane_does_not_spoil_its_neighbours(mode):
    solve = bx.solution_map(bx.minimum(objective), SOLVER, bx.Implicit(mode=mode))

    def everything(y):
        x = solve(jnp.zeros(2), y)
        status = solve.with_report(jnp.zeros(2), y)[1].status
        return x, status, jax.grad(lambda y: C @ solve(jnp.zeros(2), y))(y)

    # With a rate of 0.4 a curvature above 5 makes gradient descent diverge.
    other = np.array([0.1, 0.2])
    y = np.stack([Y, np.array([9.0, 9.0]), np.array([np.nan, 1.0]), other])
    x, status, gradient = jax.jit(jax.vmap(everything))(y)
    converged, bad = bx.Status.CONVERGED, [bx.Status.DIVERGED, bx.Status.NONFINITE]
    assert status.tolist() == [converged, *bad, converged]
    assert np.all(np.isnan(x[1:3])) and np.all(np.isnan(gradient[1:3]))
    for lane, y_alone in ((0, Y), (3, other)):
        want, want_gradient, _ = truth(y_alone)
        np.testing.assert_allclose(x[lane], want, rtol=1e-10)
        np.testing.assert_allclose(gradient[lane], want_gradient, rtol=1e-10)
    alone = jax.jit(everything)(Y)
    np.testing.assert_allclose(x[0], alone[0], rtol=1e-14)
    np.testing.assert_allclose(gradient[0], alone[2], rtol=1e-14)


def test_a_map_inside_cond():
    solve = bx.solution_map(bx.minimum(objective), SOLVER)

    def h(y, flag):
        return jax.lax.cond(flag, lambda y: C @ solve(jnp.zeros(2), y), jnp.sum, y)

    gradient = jax.jit(jax.grad(h))
    np.testing.assert_allclose(gradient(Y, True), truth()[1], rtol=1e-10)
    np.testing.assert_allclose(gradient(Y, False), np.ones(2), rtol=1e-10)


def test_second_derivatives_by_reverse_mode_reach_what_is_closed_over():
    got = jax.jit(jax.jacrev(jax.grad(outer, (0, 1)), (0, 1)))(Y, TARGET)
    by_y = central_difference(lambda y: np.stack(truth(y, TARGET)[1:]), Y)
    by_target = central_difference(lambda target: np.stack(truth(Y, target)[1:]), TARGET)
    for i in range(2):
        np.testing.assert_allclose(got[i][0], by_y[i], rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(got[i][1], by_target[i], rtol=1e-8, atol=1e-10)


def test_forward_mode_gives_jvp_jacfwd_and_hessian():
    def h(y, target):
        return outer(y, target, rule=bx.Implicit(mode="forward"))

    tangents = (np.array([1.0, 2.0]), np.array([-1.0, 0.5]))

    @jax.jit
    def everything(y, target):
        return (
            jax.jvp(h, (y, target), tangents),
            jax.jacfwd(h)(y, target),
            jax.hessian(h)(y, target),
        )

    (value, tangent), jacobian, hessian = everything(Y, TARGET)
    _, want_y, want_target = truth()
    np.testing.assert_allclose(value, C @ truth()[0], rtol=1e-10)
    want = want_y @ tangents[0] + want_target @ tangents[1]
    np.testing.assert_allclose(tangent, want, rtol=1e-10)
    np.testing.assert_allclose(jacobian, want_y, rtol=1e-10)
    want = central_difference(lambda y: truth(y)[1], Y)
    np.testing.assert_allclose(hessian, want, rtol=1e-8)


def test_a_problem_inside_a_problem():
    # lower: u*(x, y) = argmin (u - x y)^2 / 2 = x y. upper: x* = argmin (u* - 1)^2 / 2 + x^2 / 2,
    # so x*(y) = y / (1 + y^2) and its derivative is (1 - y^2) / (1 + y^2)^2.
    lower = bx.solution_map(
        bx.minimum(lambda u, xy: (u - xy[0] * xy[1]) ** 2 / 2),
        bx.GradientDescent(1.0),
        bx.Implicit(mode="forward"),
    )

    def upper(x, y):
        return (lower(jnp.zeros(()), (x, y)) - 1) ** 2 / 2 + x**2 / 2

    solve = bx.solution_map(bx.minimum(upper), bx.GradientDescent(0.5))
    value, gradient = jax.jit(jax.value_and_grad(lambda y: solve(0.0, y)))(0.7)
    np.testing.assert_allclose(value, 0.7 / 1.49, rtol=1e-10)
    np.testing.assert_allclose(gradient, (1 - 0.49) / 1.49**2, rtol=1e-10)


# Shapes, sizes and budgets.


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_a_scalar_x(mode):
    problem = bx.minimum(lambda x, y: y * x**2 / 2 - x)
    solve = bx.solution_map(problem, SOLVER, bx.Implicit(mode=mode))
    value, gradient = jax.value_and_grad(lambda y: solve(0.0, y))(2.0)
    assert solve(0.0, 2.0).shape == ()
    np.testing.assert_allclose([value, gradient], [0.5, -0.25], rtol=1e-10)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("x0", [{}, np.zeros(0), {"none": np.zeros((2, 0)), "some": np.ones(1)}])
def test_an_x_without_entries(x0, mode):
    def total(x):
        return sum((jnp.sum(leaf) for leaf in jax.tree.leaves(x)), jnp.zeros(()))

    problem = bx.minimum(lambda x, y: total(jax.tree.map(lambda leaf: y * leaf**2 / 2 - leaf, x)))
    solve = bx.solution_map(problem, SOLVER, bx.Implicit(mode=mode))
    x, report = jax.jit(solve.with_report)(x0, 2.0)
    assert jax.tree.structure(x) == jax.tree.structure(x0)
    assert [leaf.shape for leaf in jax.tree.leaves(x)] == [
        leaf.shape for leaf in jax.tree.leaves(x0)
    ]
    assert report.status == bx.Status.CONVERGED
    entries = sum(leaf.size for leaf in jax.tree.leaves(x0))
    gradient = jax.jit(jax.grad(lambda y: total(solve(x0, y)) + 3 * y))(2.0)
    np.testing.assert_allclose(gradient, 3 - 0.25 * entries, rtol=1e-10)


def test_a_pytree_x_with_a_single_leaf():
    solve = bx.solution_map(bx.minimum(lambda x, y: objective(x["w"], y)), SOLVER)
    x, pull = jax.vjp(lambda y: solve({"w": jnp.zeros(2)}, y), Y)
    np.testing.assert_allclose(x["w"], truth()[0], rtol=1e-10)
    np.testing.assert_allclose(pull({"w": jnp.asarray(C)})[0], truth()[1], rtol=1e-10)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_budgets_of_zero_and_one(mode):
    x0 = np.array([0.3, -0.7])
    one_step = x0 - 0.4 * ((H + np.diag(Y)) @ x0 - TARGET)
    v = truth()[2]
    for maxiter, want in ((0, x0), (1, one_step)):
        solver = bx.GradientDescent(0.4, maxiter=maxiter)
        solve = bx.solution_map(bx.minimum(objective), solver, bx.Implicit(mode=mode))
        x, report = solve.with_report(x0, Y)
        np.testing.assert_allclose(x, want, rtol=1e-14)
        assert (report.status, report.iterations) == (bx.Status.MAXITER, maxiter)
        # The implicit formula at the point reached: -F_2^T v with F_2 = diag(x).
        gradient = jax.grad(lambda y, solve=solve: C @ solve(x0, y))(Y)
        np.testing.assert_allclose(gradient, -v * want, rtol=1e-10)


def test_an_adjoint_that_one_iteration_solves():
    problem = bx.minimum(lambda x, y: jnp.sum((x - y) ** 2) / 2)  # the Hessian is the identity
    _, report = bx.Implicit().pullback(problem, jnp.ones(2), jnp.ones(2), C)
    assert (report.solve.status, report.solve.iterations) == (bx.Status.CONVERGED, 1)
    solve = bx.solution_map(problem, SOLVER)
    jacobian = jax.jit(jax.jacrev(lambda y: solve(jnp.zeros(2), y)))(Y)
    np.testing.assert_allclose(jacobian, np.eye(2), atol=1e-15)


# Scales and precision.


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "rule",
    [
        bx.Implicit(),
        bx.Implicit(bx.NormalCG()),
        bx.Implicit(bx.Dense()),
        bx.Implicit(mode="forward"),
        bx.Preconditioned(bx.Implicit(), step=bx.NewtonStep()),
    ],
    ids=["CG", "NormalCG", "Dense", "forward", "preconditioned"],
)
def test_cotangents_of_any_size_give_the_same_relative_accuracy(rule, dtype):
    solve = bx.solution_map(bx.minimum(objective), bx.GradientDescent(dtype(0.4)), rule)
    x, pull = jax.vjp(lambda y: solve(jnp.zeros(2, dtype), y), jnp.asarray(Y, dtype))
    want = -truth()[2] * np.asarray(x, np.float64)  # the implicit formula at the point reached

    def error(size):
        (got,) = pull(jnp.asarray(size * C, dtype))
        assert got.dtype == dtype
        return np.linalg.norm(np.asarray(got, np.float64) / size - want) / np.linalg.norm(want)

    epsilon = np.finfo(dtype).eps
    assert error(1.0) < 8 * epsilon
    assert error(1e-20) < 8 * epsilon
    assert error(1e20) < 8 * epsilon


def test_memory_of_a_gradient_does_not_depend_on_the_number_of_iterations():
    size = 1000
    problem = bx.minimum(lambda x, y: jnp.sum(x**4 + y * (x - 1) ** 2))

    def temporary_memory(maxiter):
        solve = bx.solution_map(problem, bx.GradientDescent(0.1, rtol=0, atol=0, maxiter=maxiter))
        gradient = jax.jit(jax.grad(lambda y: jnp.sum(solve(jnp.zeros(size), y) ** 3)))
        compiled = gradient.lower(jnp.ones(size)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporary_memory(10), temporary_memory(10_000)
    assert many == few > 0


def assert_is_float32(tree):
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert leaf.dtype == jnp.float32
            assert not leaf.weak_type


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_float32_stays_float32_with_double_precision_at_hand(mode):
    solve = bx.solution_map(bx.minimum(objective), SOLVER, bx.Implicit(mode=mode))
    x0, y = jnp.zeros(2, jnp.float32), jnp.asarray(Y, jnp.float32)
    x, report = solve.with_report(x0, y)
    gradient = jax.grad(lambda y: jnp.sum(jnp.asarray(C, x.dtype) * solve(x0, y)))(y)
    assert_is_float32((x, report, gradient))
    assert report.status == bx.Status.CONVERGED
    # rtol is 6.4e-6 and the condition number is below 3.
    np.testing.assert_allclose(x, truth()[0], rtol=2e-5)
    np.testing.assert_allclose(gradient, truth()[1], rtol=4e-5)


def test_float32_is_the_default_without_double_precision():
    with jax.enable_x64(False):
        solve = bx.solution_map(bx.minimum(lambda x, y: y * x**2 / 2 - x), SOLVER)
        x, report = solve.with_report(0.0, 2.0)
        gradient = jax.grad(solve, argnums=1)(0.0, 2.0)
        assert_is_float32((x, report))
        assert gradient.dtype == jnp.float32
        assert report.status == bx.Status.CONVERGED
        np.testing.assert_allclose([x, gradient], [0.5, -0.25], rtol=1e-5)


def test_python_numbers_are_arrays_of_the_default_dtype():
    solve = bx.solution_map(bx.minimum(lambda x, y: y * x**2 / 2 - x), SOLVER)
    x = solve(0.0, 2.0)
    assert x.dtype == jnp.float64 and not x.weak_type
    # A weakly typed y does not widen x.
    x, gradient = jax.value_and_grad(solve, argnums=1)(jnp.float32(0), 2.0)
    assert_is_float32(x)
    np.testing.assert_allclose([x, gradient], [0.5, -0.25], rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_converges_to_its_own_accuracy(dtype):
    solve = bx.solution_map(bx.minimum(lambda x, y: jnp.sum(y * x**2 / 2 - x)), SOLVER)
    y = jnp.array([1.0, 1.5, 2.0], dtype)
    x, report = solve.with_report(jnp.zeros(3, dtype), y)
    gradient = jax.grad(lambda y: jnp.sum(solve(jnp.zeros(3, dtype), y)))(y)
    assert x.dtype == gradient.dtype == dtype
    assert report.status == bx.Status.CONVERGED
    want = 1 / np.asarray(y, np.float64)
    rtol = 3 * float(jnp.finfo(dtype).eps) ** 0.75  # ||F|| <= eps^(3/4) ||F(x0)||
    np.testing.assert_allclose(np.asarray(x, np.float64), want, rtol=rtol)
    np.testing.assert_allclose(np.asarray(gradient, np.float64), -(want**2), rtol=2 * rtol)
