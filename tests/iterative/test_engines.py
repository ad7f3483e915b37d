"""Engines and solution maps with iterative rules: warm starts, failures, reports."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from bilevax import Status
from tests.everyday import slow
from tests.iterative.example import (
    AFFINE_MAP,
    DECOUPLED,
    NOISY_Y,
    X0,
    C,
    Y,
    assert_close,
    descend,
    exactly,
    noisy,
)


def engine_of(rule, solver=None, **options):
    solver = bx.GradientDescent(0.3, **exactly(5)) if solver is None else solver
    return bx.value_and_hypergradient(
        lambda x, y: C @ x + jnp.sum(y**2), DECOUPLED, solver, rule, **options
    )


@pytest.mark.parametrize(
    "rule",
    [
        bx.Unrolled(),
        bx.Unrolled(checkpoints=2),
        bx.Unrolled(mode="forward"),
        bx.Unrolled(2),
        slow(bx.Unrolled(2, mode="forward")),
    ],
    ids=repr,
)
def test_an_engine_differentiates_the_run_from_its_warm_start(rule):
    engine, last = engine_of(rule), rule.last
    warm = bx.cold_start(X0)
    x = X0
    for y in (Y, Y + 0.1):
        result = engine(y, warm)
        iterates, (_, by_y, _) = descend(x, y, 0.3, 5, last)
        x = iterates[-1]
        np.testing.assert_allclose(result.x, x, rtol=1e-13)
        np.testing.assert_allclose(result.value, C @ x + y @ y, rtol=1e-13)
        np.testing.assert_allclose(result.gradient, C * by_y + 2 * y, rtol=1e-12)
        assert result.report.inner.status == Status.TRUNCATED
        assert result.report.adjoint is None and result.report.certificate is None
        assert result.report.identity_entries is None and result.aux is None
        warm = result.warm
        np.testing.assert_array_equal(warm.x, result.x)
        np.testing.assert_array_equal(warm.start, X0)
    if last is None:
        return
    lanes = jax.jit(jax.vmap(engine, (0, None)))(np.stack([Y, Y + 0.1]), bx.cold_start(X0))
    for i, y in enumerate((Y, Y + 0.1)):
        by_y = descend(X0, y, 0.3, 5, last)[1][1]
        np.testing.assert_allclose(lanes.gradient[i], C * by_y + 2 * y, rtol=1e-12)


@pytest.mark.parametrize("mode", ["reverse", slow("forward")])
def test_an_engine_with_aux_and_leaves_of_all_kinds(mode):
    y = dict(NOISY_Y, single=jnp.float32(2.0))
    engine = bx.value_and_hypergradient(
        lambda x, y: (jnp.sum(x) * y["single"], {"x": x, "count": 3, "key": y["key"]}),
        bx.minimum(noisy),
        bx.GradientDescent(0.3, **exactly(4)),
        bx.Unrolled(mode=mode),
        has_aux=True,
    )
    result = jax.jit(engine)(y, bx.cold_start(jnp.ones(2)))
    np.testing.assert_array_equal(result.aux["x"], result.x)
    assert result.aux["count"] == 3 and result.aux["key"] == y["key"]
    assert result.gradient["w"].shape == (3,) and result.gradient["w"][1] == 0
    assert result.gradient["single"].dtype == jnp.float32
    np.testing.assert_allclose(result.gradient["single"], jnp.sum(result.x), rtol=1e-6)
    for name in ("index", "key"):
        assert result.gradient[name].dtype == jax.dtypes.float0
        assert result.gradient[name].shape == y[name].shape
    other = "forward" if mode == "reverse" else "reverse"
    again = dataclasses.replace(engine, rule=bx.Unrolled(mode=other))
    assert_close(again(y, bx.cold_start(jnp.ones(2))).gradient["w"], result.gradient["w"], 1e-12)


@pytest.mark.parametrize("mode", ["reverse", slow("forward")])
def test_failures_of_an_engine(mode):
    rule, solver = bx.Unrolled(mode=mode), bx.GradientDescent(3.0, maxiter=200)
    result = engine_of(rule, solver)(Y, bx.cold_start(X0))
    assert result.report.inner.status == Status.DIVERGED
    assert np.all(np.isfinite(result.x)) and np.isfinite(result.value)
    np.testing.assert_array_equal(result.warm.x, X0)
    result = engine_of(rule, solver, on_failure=bx.OnFailure.NAN)(Y, bx.cold_start(X0))
    for leaf in (result.x, result.value, result.gradient):
        assert np.all(np.isnan(leaf))
    with pytest.raises(jax.errors.JaxRuntimeError, match="inner solve ended with status DIVERGED"):
        failing = engine_of(rule, solver, on_failure=bx.OnFailure.RAISE)
        jax.block_until_ready(failing(Y, bx.cold_start(X0)))


def test_failures_of_a_solution_map():
    solver = bx.GradientDescent(3.0, maxiter=200)
    for rule in (bx.Unrolled(), bx.OneStep()):

        def value(y, policy, rule=rule):
            return C @ bx.solution_map(DECOUPLED, solver, rule, on_failure=policy)(X0, y)

        gradient = jax.jit(jax.value_and_grad(value), static_argnums=1)
        value_at_y, by_y = gradient(Y, bx.OnFailure.NAN)
        assert np.isnan(value_at_y) and np.all(np.isnan(by_y))
        with pytest.raises(jax.errors.JaxRuntimeError, match="ended with status DIVERGED"):
            jax.block_until_ready(gradient(Y, bx.OnFailure.RAISE))


def test_raising_changes_nothing_where_nothing_fails():
    solver = bx.GradientDescent(0.3, **exactly(5))
    by_y = descend(X0, Y, 0.3, 5)[1][1]
    solve = bx.solution_map(DECOUPLED, solver, bx.Unrolled(), on_failure=bx.OnFailure.RAISE)
    got = jax.jit(jax.grad(lambda y: C @ solve(X0, y)))(Y)
    np.testing.assert_allclose(got, C * by_y, rtol=1e-12)
    jacobian = jax.jit(jax.jacfwd(lambda y: solve(X0, y)))(Y)
    np.testing.assert_allclose(jacobian, np.diag(by_y), rtol=1e-12, atol=1e-14)


def test_from_a_warm_start_at_the_solution_only_a_fixed_number_of_steps_has_a_derivative():
    """A run that stops at once has the derivative of no steps, and its report counts none."""
    exact = -C * np.exp(-Y) + 2 * Y
    for rule in (bx.Unrolled(), bx.Unrolled(20)):
        stopping = engine_of(rule, bx.GradientDescent(0.3))
        warm = stopping(Y, bx.cold_start(X0)).warm
        again = stopping(Y, warm)
        assert again.report.inner.iterations == 0
        np.testing.assert_array_equal(again.gradient, 2 * Y)
        # Not quite at the solution, where F might vanish and end the run.
        near = warm._replace(x=warm.x + 1e-6)
        fixed = engine_of(rule, bx.GradientDescent(0.3, **exactly(20)))(Y, near)
        assert fixed.report.inner.iterations == 20
        np.testing.assert_allclose(fixed.gradient, exact, rtol=0.02)


def test_a_last_step_that_rounding_ends_is_no_zero_derivative():
    """Newton's last step, at a tolerance that rounding does not allow: the search fails there."""
    ys = np.random.default_rng(0).uniform(0.2, 5.0, 40)
    solver = bx.Newton(rtol=1e-16, atol=0.0)
    solve = bx.solution_map(bx.minimum(lambda x, y: y * x**2 / 2 - x), solver, bx.Unrolled(1))

    def value(y):
        x, report = solve.with_report(0.1, y)
        return x, report.status

    derivative, status = jax.jit(jax.vmap(jax.grad(value, has_aux=True)))(ys)
    assert np.any(status == Status.STALLED)
    np.testing.assert_allclose(derivative, -1 / ys**2, rtol=1e-7)


@pytest.mark.parametrize("rule", [bx.OneStep(), bx.Unrolled(), slow(bx.Unrolled(5))], ids=repr)
def test_linear_solves_of_newton_that_fail_are_no_derivative(rule):
    """One step of conjugate gradients does not solve a system with three curvatures."""
    loose = bx.solution_map(DECOUPLED, bx.Newton(bx.CG(maxiter=1)), rule)
    assert np.isnan(jax.grad(lambda y: C @ loose(X0, y))(Y)).all()


# Reports.


def test_the_contraction_of_a_report_is_the_factor_of_the_steps():
    y = np.zeros(3)  # F = x - 1, and a rate of 0.3 leaves 0.7 of it
    for rule in (None, bx.Unrolled(), bx.Unrolled(2)):
        solver = bx.GradientDescent(0.3, **exactly(9))
        _, report = bx.solution_map(DECOUPLED, solver, rule).with_report(X0, y)
        np.testing.assert_allclose(report.contraction, 0.7, rtol=1e-8)
    _, report = bx.solution_map(AFFINE_MAP, bx.FixedPointIteration(**exactly(9))).with_report(X0, y)
    np.testing.assert_allclose(report.contraction, 0.5, rtol=1e-8)


def test_a_report_at_a_solution_has_no_contraction_above_one():
    """A start at the solution takes no step: nothing was changed, and nothing is 0 / 0."""
    _, report = bx.solution_map(DECOUPLED, bx.GradientDescent(0.3)).with_report(
        np.ones(3), np.zeros(3)
    )
    assert (report.iterations, report.residual) == (0, 0)
    assert not np.isnan(report.contraction)


@pytest.mark.parametrize("rule", [bx.Unrolled(), bx.Unrolled(3, checkpoints="sqrt"), bx.OneStep()])
def test_iterative_rules_are_pytrees_without_leaves(rule):
    assert jax.tree.leaves(rule) == []
    assert jax.tree.map(lambda leaf: leaf, rule) == rule

    @jax.jit
    def value(rule, y):
        return jnp.sum(bx.solution_map(DECOUPLED, bx.GradientDescent(0.3), rule)(X0, y))

    np.testing.assert_allclose(value(rule, Y), np.sum(np.exp(-Y)), rtol=1e-9)
