"""Leaves of y without a derivative, and transformations that change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from tests.everyday import slow
from tests.solution_map.example import (
    SOLVER,
    TARGET,
    C,
    Y,
    central_difference,
    objective,
    outer,
    truth,
)

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


@pytest.mark.parametrize("mode", ["reverse", slow("forward")])
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


@pytest.mark.parametrize("mode", ["reverse", slow("forward")])
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


@pytest.mark.parametrize("mode", ["reverse", slow("forward")])
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
