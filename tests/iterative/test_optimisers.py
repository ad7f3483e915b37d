"""Optimisers whose derivative does not exist where the gradient, or an entry of it, is zero."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from tests.everyday import slow
from tests.iterative.example import central_differences, exactly


def flat_entry(x, y):
    return y * (x[0] - 1) ** 2 / 2 + y * x[1] ** 2 / 2  # F[1] = 0 along a run from x[1] = 0


@pytest.mark.parametrize(
    "rule", [bx.Unrolled(), bx.Unrolled(2), bx.Unrolled(mode="forward")], ids=repr
)
def test_adam_without_a_root_of_epsilon_warns_and_is_nan(rule):
    solver = bx.Optax(optax.adam(0.1), **exactly(3))
    solve = bx.solution_map(bx.minimum(flat_entry), solver, rule)
    with pytest.warns(UserWarning, match="set `eps_root=1e-12` or so"):
        _, tangent = jax.jvp(lambda y: solve(jnp.zeros(2), y), (1.0,), (1.0,))
    assert np.isfinite(tangent[0]) and np.isnan(tangent[1])


def test_adam_without_a_root_of_epsilon_in_reverse_mode_and_an_engine():
    solver = bx.Optax(optax.adam(0.1), **exactly(3))
    engine = bx.value_and_hypergradient(
        lambda x, y: jnp.sum(x), bx.minimum(flat_entry), solver, bx.Unrolled()
    )
    with pytest.warns(UserWarning, match="set `eps_root=1e-12` or so"):
        result = engine(1.0, bx.cold_start(jnp.zeros(2)))
    assert np.isnan(result.gradient) and np.isfinite(result.value)


@pytest.mark.parametrize(
    "transformation",
    [optax.adam(0.1, eps_root=1e-12), optax.sgd(0.1, momentum=0.9), optax.sgd(0.1)],
    ids=["eps_root", "momentum", "sgd"],
)
def test_no_warning_where_derivatives_exist(transformation):
    solver = bx.Optax(transformation, **exactly(3))
    solve = bx.solution_map(bx.minimum(flat_entry), solver, bx.Unrolled())
    jacobian = jax.jacrev(lambda y: solve(jnp.zeros(2), y))(1.0)  # warnings are errors
    assert np.isfinite(jacobian[0]) and jacobian[1] == 0


# Line searches and quasi-Newton methods, whose steps have no derivatives at a solution.

STOPS = "takes a part of its own update for a constant"
RNG = np.random.default_rng(3)
FEATURES, TARGETS = RNG.normal(size=(8, 3)), RNG.normal(size=8)
LOG_PENALTY, START, DIRECTION = 0.4 * RNG.normal(size=3), RNG.normal(size=3), RNG.normal(size=3)


def ridge(x, y):
    return jnp.mean((FEATURES @ x - TARGETS) ** 2) / 2 + jnp.sum(jnp.exp(y) * x**2) / 2


def ridge_derivative():
    """Return d <DIRECTION, x*> / dy by NumPy: x* = H^{-1} b and dx*/dy_k = -H^{-1} e_k p_k x_k."""
    penalty = np.exp(LOG_PENALTY)
    hessian = FEATURES.T @ FEATURES / 8 + np.diag(penalty)
    x = np.linalg.solve(hessian, FEATURES.T @ TARGETS / 8)
    return -np.linalg.solve(hessian, DIRECTION) * penalty * x


def ridge_run(transformation, settings):
    solve = bx.solution_map(
        bx.minimum(ridge), bx.Optax(transformation, **settings), bx.Unrolled(mode="forward")
    )

    def run(x0, y):
        x, report = solve.with_report(x0, y)
        return DIRECTION @ x, report

    return jax.jit(jax.jacfwd(run, argnums=1, has_aux=True))


@pytest.mark.parametrize("steps", [slow(20), slow(60), 200])
def test_steps_after_convergence_do_not_spoil_the_derivative_of_lbfgs(steps):
    with pytest.warns(UserWarning, match=STOPS):
        run = ridge_run(optax.lbfgs(), exactly(steps))
        derivative, report = run(START, LOG_PENALTY)
    assert 2 < report.iterations < steps and report.status == bx.Status.CONVERGED
    # x is off by rounding, and the derivative by no more than what F was one step before.
    np.testing.assert_allclose(derivative, ridge_derivative(), rtol=1e-6)


QUASI_NEWTON = optax.lbfgs(0.5, memory_size=3, linesearch=None, scale_init_precond=False)


def test_lbfgs_without_a_line_search_goes_in_reverse_mode_too():
    solver = bx.Optax(QUASI_NEWTON, **exactly(200))

    def value(y, rule):
        x, report = bx.solution_map(bx.minimum(ridge), solver, rule).with_report(START, y)
        return DIRECTION @ x, report.iterations

    gradient = jax.jit(jax.grad(lambda y: value(y, bx.Unrolled(200)), has_aux=True))
    derivative, iterations = gradient(LOG_PENALTY)
    assert 10 < iterations < 200
    # Steps of half a length leave T 2^-T of the derivative where they leave 2^-T of x.
    np.testing.assert_allclose(derivative, ridge_derivative(), rtol=1e-6)


def test_from_a_solution_there_is_no_derivative_and_no_zero():
    hessian = FEATURES.T @ FEATURES / 8 + np.diag(np.exp(LOG_PENALTY))
    x = np.linalg.solve(hessian, FEATURES.T @ TARGETS / 8)
    derivative, report = ridge_run(QUASI_NEWTON, exactly(20))(x, LOG_PENALTY)
    assert report.iterations == 0 and report.status == bx.Status.CONVERGED
    assert np.all(np.isnan(derivative))
    # Momentum has derivatives there, and takes its steps. Not quite there, lest F vanish.
    momentum = ridge_run(optax.sgd(0.3, momentum=0.3), exactly(30))
    derivative, report = momentum(x + 1e-8, LOG_PENALTY)
    assert report.iterations == 30
    np.testing.assert_allclose(derivative, ridge_derivative(), rtol=1e-2)


@pytest.mark.slow
def test_a_run_of_lbfgs_that_ends_early_warns_of_a_derivative_that_is_not_its_own():
    """Optax holds the scaling of the first step for a constant; without it there is no warning."""
    with pytest.warns(UserWarning, match=STOPS):
        ridge_run(optax.lbfgs(), exactly(2))(START, LOG_PENALTY)
    derivative, report = ridge_run(QUASI_NEWTON, exactly(2))(START, LOG_PENALTY)
    assert report.status == bx.Status.TRUNCATED
    plain = bx.solution_map(bx.minimum(ridge), bx.Optax(QUASI_NEWTON, **exactly(2)))
    values = jax.jit(jax.vmap(lambda y: DIRECTION @ plain(START, y)))
    wanted = central_differences(values, LOG_PENALTY)
    np.testing.assert_allclose(derivative, wanted, rtol=1e-6)


SMOOTH = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "Adam": optax.adam(0.1, eps_root=1e-12),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
}
ROUGH = {
    "L-BFGS": optax.lbfgs(0.1, linesearch=None, scale_init_precond=False),
    "backtracking": optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", [*SMOOTH, *ROUGH])
def test_which_optimisers_have_derivatives_at_a_solution(name, dtype):
    solver = bx.Optax((SMOOTH | ROUGH)[name])
    x = {"a": jnp.ones((2, 2), dtype), "b": jnp.ones(3, dtype)}
    unrolled = solver.differentiable(bx.minimum(lambda x, y: 0.0), x)
    assert bool(unrolled.is_smooth) == (name in SMOOTH)
    assert (unrolled is solver) == (name in SMOOTH)
