"""Steps, diagonals, changes of variables, warm starts and black boxes that do not fit."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import bilevax as bx
from tests.bad_input.example import X0, Y, assert_fails, engine, quadratic, solve_map

# Steps, diagonals and changes of variables.


def reparameterized(change):
    return bx.Reparameterized(bx.Implicit(bx.Dense()), change)


def test_a_custom_step_unlike_x():
    rule = bx.Preconditioned(bx.Implicit(), lambda x, y, v: v[:1])
    message = "`step` must return shapes and dtypes like `x`: `x` is float64[2], got float64[1]."
    assert_fails(TypeError, message, solve_map(rule=rule), X0, Y)
    rule = bx.Preconditioned(bx.Implicit(), lambda x, y, v: (v,))
    assert_fails(TypeError, "`step` must return a pytree like `x`", solve_map(rule=rule), X0, Y)


@pytest.mark.parametrize(
    "make",
    [
        lambda diagonal: bx.Preconditioned(bx.Implicit(), bx.JacobiStep(diagonal)),
        lambda diagonal: reparameterized(bx.DiagonalChange(diagonal)),
    ],
    ids=["JacobiStep", "DiagonalChange"],
)
def test_a_diagonal_unlike_x(make):
    message = "`diagonal` must return a pytree like `x`, PyTreeDef(*); got PyTreeDef({'d': *})."
    refine = make(lambda x, y: {"d": y}).pullback
    whole = jax.grad(lambda y: jnp.sum(solve_map(rule=make(lambda x, y: {"d": y}))(X0, y)))
    assert_fails(TypeError, message, whole, Y)
    if isinstance(make(lambda x, y: y), bx.Reparameterized):
        assert_fails(TypeError, message, refine, bx.minimum(quadratic), X0, Y, X0)
    message = "`diagonal` must return shapes and dtypes like `x`: `x` is float64[2], got float64[]."
    whole = jax.grad(lambda y: jnp.sum(solve_map(rule=make(lambda x, y: 1.0))(X0, y)))
    assert_fails(TypeError, message, whole, Y)


def test_a_phi_unlike_x():
    change = bx.ChangeOfVariables(lambda z, y: {"x": z}, lambda x, y: x)
    message = "`phi` must return a pytree like `x`, PyTreeDef(*); got PyTreeDef({'x': *})."
    assert_fails(TypeError, message, solve_map(rule=reparameterized(change)), X0, Y)
    traced = jax.jit(lambda y: solve_map(rule=reparameterized(change))(X0, y))
    assert_fails(TypeError, message, traced, Y)
    pullback = reparameterized(change).pullback
    assert_fails(TypeError, message, pullback, bx.minimum(quadratic), X0, Y, X0)
    change = bx.ChangeOfVariables(lambda z, y: z.astype(jnp.float32), lambda x, y: x)
    message = "`phi` must return shapes and dtypes like `x`: `x` is float64[2], got float32[2]."
    assert_fails(TypeError, message, solve_map(rule=reparameterized(change)), X0, Y)


def test_a_phi_inverse_with_another_number_of_entries():
    change = bx.ChangeOfVariables(lambda z, y: jnp.stack([z, z]), lambda x, y: x[0])
    message = "`phi_inverse` must return as many entries as `x` has, 2; got float64[]."
    assert_fails(TypeError, message, solve_map(rule=reparameterized(change)), X0, Y)


def test_a_change_inside_a_change_is_checked_in_its_variable():
    inside = bx.ChangeOfVariables(lambda z, y: z, lambda x, y: x[:1])
    rule = bx.Reparameterized(bx.Reparameterized(bx.Implicit(), inside), bx.ExpChange())
    message = "`phi_inverse` must return as many entries as `x` has, 2; got float64[1]."
    assert_fails(TypeError, message, solve_map(rule=rule), X0 + 1, Y)


def test_numbers_of_a_solver_are_single():
    message = "`learning_rate` of `GradientDescent` must be a single number, got float64[2]."
    assert_fails(TypeError, message, solve_map(solver=bx.GradientDescent(np.ones(2))), X0, Y)
    message = "`rtol` of `Newton` must be a single number, got float64[2]."
    assert_fails(TypeError, message, solve_map(solver=bx.Newton(rtol=np.ones(2))), X0, Y)


def test_a_phi_that_its_inverse_does_not_invert():
    change = bx.ChangeOfVariables(lambda z, y: 2 * z, lambda x, y: x)
    rule, x = reparameterized(change), np.array([1.0, -3.0])
    problem, message = bx.minimum(quadratic), "`phi(phi_inverse(x, y), y)`"
    for call in (
        lambda: solve_map(rule=rule)(x, Y),
        lambda: solve_map(rule=rule).with_report(x, Y),
        lambda: engine(rule=rule)(Y, bx.cold_start(x)),
        lambda: bx.implicit_function(problem, lambda x0, y: x0, rule)(x, Y),
        lambda: bx.Preconditioned(rule, bx.NewtonStep()).pullback(problem, x, Y, X0),
        lambda: rule.refine(problem, x, Y),
        lambda: rule.pullback(problem, x, Y, X0),
        lambda: rule.pushforward(problem, x, Y, Y),
    ):
        assert_fails(ValueError, message, call)
    assert_fails(ValueError, "off by 3", rule.pullback, problem, x, Y, X0)
    # The right inverse passes.
    change = bx.ChangeOfVariables(lambda z, y: 2 * z, lambda x, y: x / 2)
    gradient, _ = reparameterized(change).pullback(problem, 1 / Y, Y, np.ones(2))
    np.testing.assert_allclose(gradient, -np.ones(2), rtol=1e-10)


# Rules, warm starts, outer objectives and black boxes.


def test_a_cotangent_unlike_x():
    pullback = bx.Implicit().pullback
    problem = bx.minimum(quadratic)
    with pytest.raises(TypeError, match=r"`cotangent` must .* `x`, .*\(\*\); got .*\(\(\*,\)\)\."):
        pullback(problem, X0, Y, (X0,))
    assert_fails(TypeError, "got float64[3].", pullback, problem, X0, Y, np.ones(3))
    assert_fails(TypeError, "got float32[2].", pullback, problem, X0, Y, np.ones(2, np.float32))


def test_a_warm_start_of_the_wrong_kind():
    message = "`warm` must be a WarmStart, for example `cold_start(x0)`; got "
    assert_fails(TypeError, message, engine(), Y, X0)
    assert_fails(TypeError, message, engine(), Y, (X0, X0))
    assert_fails(TypeError, message, engine(), Y, None)
    warm = bx.WarmStart(X0, np.zeros(3), X0)
    message = "`warm.adjoint` must have shapes and dtypes like `warm.x`: `warm.x` is float64[2], "
    assert_fails(TypeError, message + "got float64[3].", engine(), Y, warm)


@pytest.mark.parametrize(
    ("outer", "has_aux", "message"),
    [
        (lambda x, y: x, False, "`outer` must return a scalar, got float64[2]."),
        (lambda x, y: (jnp.sum(x), y), False, "`outer` must return a scalar, got (float64[], f"),
        (lambda x, y: (x, y), True, "`outer` must return a scalar, got float64[2]."),
        (lambda x, y: jnp.sum(x > 0), False, "`outer` must return a real floating scalar, got int"),
        (lambda x, y: jnp.sum(x), True, "`outer` must return a pair (value, aux) with `has_aux"),
        (lambda x, y: (jnp.sum(x), y, y), True, "`outer` must return a pair (value, aux) with"),
    ],
)
def test_outer_objectives_that_are_not_scalar(outer, has_aux, message):
    assert_fails(TypeError, message, engine(outer, has_aux=has_aux), Y, bx.cold_start(X0))


def test_a_black_box_that_returns_something_unlike_x():
    problem = bx.minimum(quadratic)
    message = (
        "`solve_fn` must return shapes and dtypes like `x0`: `x0` is float64[2], got float64[3]."
    )
    solve = bx.implicit_function(problem, lambda x0, y: jnp.ones(3))
    assert_fails(TypeError, message, solve, X0, Y)
    assert_fails(TypeError, message, jax.jit(lambda y: solve(X0, y)), Y)
    message = "`solve_fn` must return a pytree like `x0`, PyTreeDef(*); got PyTreeDef((*, *))."
    assert_fails(TypeError, message, bx.implicit_function(problem, lambda x0, y: (x0, y)), X0, Y)


def test_lineax_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "lineax", None)
    message = "`LineaxSolver` needs Lineax: install it with `pip install bilevax[lineax]`."
    assert_fails(ImportError, message, bx.LineaxSolver, object())


def test_numbers_that_are_traced_pass():
    # Their values are not known, and nothing is checked at run time.
    jax.eval_shape(lambda rate: solve_map(solver=bx.GradientDescent(rate))(X0, Y), 0.5)
    partial = bx.minimum(Partial(lambda data, x, y: quadratic(x, data * y), 2.0))
    np.testing.assert_allclose(solve_map(partial)(X0, Y), [0.5, 0.5], rtol=1e-10)
