"""What gradients of a solution map reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import bilevax as bx
from tests.everyday import slow
from tests.solution_map.example import (
    SOLVER,
    TARGET,
    C,
    H,
    Y,
    central_difference,
    objective,
    outer,
    truth,
)


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


@pytest.mark.parametrize("mode", ["reverse", slow("forward")])
def test_no_tracer_outlives_its_trace(mode):
    def h(y, target):
        return outer(y, target, rule=bx.Implicit(mode=mode))

    with jax.checking_leaks():
        got = jax.jit(jax.grad(h))(Y, TARGET)
    np.testing.assert_allclose(got, truth()[1], rtol=1e-10)
