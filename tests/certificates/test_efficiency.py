"""Efficiency constants against the largest singular value of a dense d Omega/dx.

The dense estimators are written out here, on flat vectors u and w, with `jax.jacobian` and dense
solves.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import bilevax as bx
from tests.bad_input.example import assert_fails
from tests.everyday import params
from tests.rules.estimators import (
    FIXED_POINT,
    FLOATING,
    KINDS,
    MINIMUM,
    U,
    W,
    X,
    Y,
    like_x,
    outer,
    outer_on_trees,
    partials,
    solution,
)
from tests.test_compilation import Counted, recorded_compilations

DENSE = bx.Implicit(bx.Dense())
NEWTON = bx.Preconditioned(DENSE, bx.NewtonStep(bx.Dense()))
# Within 1e-8 of a singular value: then it is the largest one, from where the iterations start.
EXACT = {"rtol": 1e-8, "maxiter": 20_000}


# The estimators in dense form, as functions of (F, g).


def dense_implicit(optimality, g, u, w):
    g_1, g_2 = jax.grad(g, (0, 1))(u, w)
    jacobian_1, jacobian_2 = jax.jacobian(optimality, (0, 1))(u, w)
    return g_2 - jacobian_2.T @ jnp.linalg.solve(jacobian_1.T, g_1)


def dense_diagonal(optimality, u, w):
    return jnp.diagonal(jax.jacobian(optimality)(u, w))


def dense_jacobi(optimality, g, u, w):
    corrected = u - optimality(u, w) / dense_diagonal(optimality, u, w)
    return dense_implicit(optimality, g, corrected, w)


def dense_newton(optimality, g, u, w):
    corrected = u - jnp.linalg.solve(jax.jacobian(optimality)(u, w), optimality(u, w))
    return dense_implicit(optimality, g, corrected, w)


def dense_diagonal_change(optimality, g, u, w):
    # g_2,k - v^T (F_2,k - P'_k P^{-1} F), v = F_1^{-1} g_1, for a symmetric F_1
    g_1, g_2 = jax.grad(g, (0, 1))(u, w)
    jacobian_1, jacobian_2 = jax.jacobian(optimality, (0, 1))(u, w)
    diagonal = dense_diagonal(optimality, u, w)
    slopes = jax.jacobian(lambda w: dense_diagonal(optimality, u, w))(w)
    bracket = jacobian_2 - slopes * (optimality(u, w) / diagonal)[:, None]
    return g_2 - bracket.T @ jnp.linalg.solve(jacobian_1, g_1)


def dense_exponential_change(optimality, g, u, w):
    # g_2 - F_2^T (F_1 + diag(F / x))^{-1} g_1, for a symmetric F_1
    g_1, g_2 = jax.grad(g, (0, 1))(u, w)
    jacobian_1, jacobian_2 = jax.jacobian(optimality, (0, 1))(u, w)
    shifted = jacobian_1 + jnp.diag(optimality(u, w) / u)
    return g_2 - jacobian_2.T @ jnp.linalg.solve(shifted, g_1)


RULES = {
    "implicit": (DENSE, dense_implicit),
    "jacobi": (bx.Preconditioned(DENSE, bx.JacobiStep()), dense_jacobi),
    "newton": (NEWTON, dense_newton),
    "diagonal_change": (bx.Reparameterized(DENSE, bx.DiagonalChange()), dense_diagonal_change),
    "exponential_change": (bx.Reparameterized(DENSE, bx.ExpChange()), dense_exponential_change),
}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def jacobian_of(estimator, optimality, g, u, w):
    """Return d Omega/dx, with one row per entry of w."""
    return jax.jacobian(lambda u: estimator(optimality, g, u, w))(u)


def operator_norm(matrix):
    return np.linalg.norm(np.asarray(matrix), 2)


# Regression with one log penalty per weight.

_RANDOM = np.random.default_rng(0)
FEATURES, VALIDATION = _RANDOM.normal(size=(12, 4)), _RANDOM.normal(size=(8, 4))
WEIGHTS = np.array([1.0, -2.0, 0.5, 1.5])
TARGETS = FEATURES @ WEIGHTS + 0.3 * _RANDOM.normal(size=12)
VALIDATION_TARGETS = VALIDATION @ WEIGHTS + 0.3 * _RANDOM.normal(size=8)
PENALTY = np.array([-1.0, 0.2, -0.5, 0.4])


def ridge(u, w):
    features, targets = jnp.asarray(FEATURES, u.dtype), jnp.asarray(TARGETS, u.dtype)
    return jnp.mean((features @ u - targets) ** 2) / 2 + jnp.sum(jnp.exp(w) * u**2) / 2


def logistic(u, w):
    margins = jnp.asarray(np.sign(TARGETS), u.dtype) * (jnp.asarray(FEATURES, u.dtype) @ u)
    return jnp.mean(jnp.logaddexp(0, -margins)) + jnp.sum(jnp.exp(w) * u**2) / 2


def validation(u, w):
    features, targets = jnp.asarray(VALIDATION, u.dtype), jnp.asarray(VALIDATION_TARGETS, u.dtype)
    misfit = features @ u - targets
    return jnp.mean(jnp.sqrt(1 + misfit**2)) + 0.1 * jnp.sum(w * u)


@dataclasses.dataclass(frozen=True)
class Regression:
    problem: bx.Problem
    optimality: Callable

    @functools.cached_property
    def x(self):
        """The solution at PENALTY, by Newton's method on dense matrices."""
        u = np.zeros(4)
        for _ in range(30):
            value, first, _ = partials(self.optimality, u, PENALTY)
            u = u - np.linalg.solve(first, value)
        return u

    def constant(self, estimator, u, w=PENALTY):
        return operator_norm(jacobian_of(estimator, self.optimality, validation, u, w))


def either(is_logistic, u, w):
    return jnp.where(is_logistic, logistic(u, w), ridge(u, w))


# One function, so that every rule is compiled once.
RIDGE = Regression(bx.minimum(Partial(either, np.array(False))), jax.grad(ridge))
LOGISTIC = Regression(bx.minimum(Partial(either, np.array(True))), jax.grad(logistic))
regressions = pytest.mark.parametrize("case", [RIDGE, LOGISTIC], ids=["ridge", "logistic"])


def assert_converged(found, rtol):
    assert found.status == bx.Status.CONVERGED
    assert 0 <= found.residual <= rtol and found.iterations >= 1
    assert found.value.shape == found.residual.shape == ()
    assert found.iterations.dtype == found.status.dtype == np.int32


@regressions
@pytest.mark.parametrize("name", [name for name in RULES if name != "newton"])
def test_at_the_solution(case, name):
    rule, estimator = RULES[name]
    found = bx.efficiency_constant(validation, case.problem, rule, case.x, PENALTY, **EXACT)
    wanted = case.constant(estimator, case.x)
    np.testing.assert_allclose(found.value, wanted, rtol=1e-8)
    assert_converged(found, 1e-8)
    # As asked for by default, half of the residual bounds the error.
    found = bx.efficiency_constant(validation, case.problem, rule, case.x, PENALTY)
    assert abs(found.value - wanted) <= (found.residual / 2 + 1e-12) * wanted
    assert_converged(found, 1e-2)


@regressions
@pytest.mark.parametrize("name", ["implicit", "jacobi"])
def test_away_from_the_solution(case, name):
    rule, estimator = RULES[name]
    for u in (case.x + 0.3, case.x * np.array([1.2, 0.5, -1.0, 0.9])):
        found = bx.efficiency_constant(validation, case.problem, rule, u, PENALTY, **EXACT)
        wanted = case.constant(estimator, u)
        np.testing.assert_allclose(found.value, wanted, rtol=1e-8)
        assert abs(wanted - case.constant(estimator, case.x)) > 1e-3 * wanted


def test_changes_of_variables_away_from_the_solution():
    u = LOGISTIC.x * np.array([1.2, 0.5, 1.1, 0.9])
    for name in ("diagonal_change", "exponential_change"):
        rule, estimator = RULES[name]
        found = bx.efficiency_constant(validation, LOGISTIC.problem, rule, u, PENALTY, **EXACT)
        np.testing.assert_allclose(found.value, LOGISTIC.constant(estimator, u), rtol=1e-8)


def test_it_vanishes_for_a_newton_step_at_the_solution_only():
    vanilla = LOGISTIC.constant(dense_implicit, LOGISTIC.x)
    arguments = (validation, LOGISTIC.problem, NEWTON)
    found = bx.efficiency_constant(*arguments, LOGISTIC.x, PENALTY)
    assert 0 <= found.value < 1e-9 * vanilla and found.status == bx.Status.CONVERGED
    u = LOGISTIC.x + 0.3
    found = bx.efficiency_constant(*arguments, u, PENALTY, **EXACT)
    assert found.value > 1e-3 * vanilla
    np.testing.assert_allclose(found.value, LOGISTIC.constant(dense_newton, u), rtol=1e-8)


@pytest.mark.slow  # the same with other linear solvers
def test_it_vanishes_for_the_default_linear_solvers_too():
    rule = bx.Preconditioned(bx.Implicit(), bx.NewtonStep())
    found = bx.efficiency_constant(validation, LOGISTIC.problem, rule, LOGISTIC.x, PENALTY)
    assert found.value < 1e-9 * LOGISTIC.constant(dense_implicit, LOGISTIC.x)
    assert found.status == bx.Status.CONVERGED


def test_it_bounds_the_error_of_a_nearby_hypergradient():
    truth = jax.jit(dense_implicit, static_argnums=(0, 1))(
        LOGISTIC.optimality, validation, LOGISTIC.x, PENALTY
    )
    matrix = jacobian_of(dense_implicit, LOGISTIC.optimality, validation, LOGISTIC.x, PENALTY)
    worst = np.linalg.svd(np.asarray(matrix))[2][0]
    found = bx.efficiency_constant(
        validation, LOGISTIC.problem, DENSE, LOGISTIC.x, PENALTY, **EXACT
    )
    for direction, share in ((worst, 1.0), (np.array([0.6, 0.0, 0.8, 0.0]), None)):
        u = LOGISTIC.x + 1e-6 * direction
        cotangent, explicit = jax.grad(validation, (0, 1))(u, PENALTY)
        implicit, _ = DENSE.pullback(LOGISTIC.problem, u, PENALTY, cotangent)
        ratio = np.linalg.norm(explicit + implicit - truth) / 1e-6 / found.value
        assert ratio <= 1 + 1e-4
        if share is not None:
            np.testing.assert_allclose(ratio, share, rtol=1e-4)


# In one dimension, by hand.


def cube(x, y):
    return x**3 - y  # x* = y^(1/3); with g = x, Omega = 1 / (3 x^2) at the point of the rule


@pytest.mark.parametrize(
    ("rule", "point"),
    [
        (DENSE, lambda x: (x, 1)),
        (NEWTON, lambda x: ((2 * x + x**-2) / 3, (2 - 2 * x**-3) / 3)),
        (
            bx.Preconditioned(DENSE, bx.GradientStep(0.1)),
            lambda x: (x - 0.1 * (x**3 - 1), 1 - 0.3 * x**2),
        ),
    ],
    ids=["implicit", "newton", "gradient_step"],
)
def test_one_dimension(rule, point):
    def identity(x, y):
        return x

    for x in (1.0, 1.3):
        corrected, slope = point(x)
        wanted = abs(2 / 3 * corrected**-3 * slope)
        found = bx.efficiency_constant(identity, bx.root(cube), rule, x, 1.0)
        np.testing.assert_allclose(found.value, wanted, rtol=1e-12, atol=1e-15)
        assert (found.iterations, found.status) == (1, bx.Status.CONVERGED)


# Pytrees, an integer leaf, and Jacobians that are not symmetric.


def with_integer(function):
    """Return the function of u and the floating entries of w."""
    return lambda u, w: function(u, jnp.concatenate([w, W[FLOATING:]]))


@functools.cache
def flat_jacobian(kind):
    """Return d Omega/dx of the implicit rule as a compiled function of u."""
    functions = with_integer(kind.optimality), with_integer(outer)
    return lambda u: np.asarray(jacobian_of(dense_implicit, *functions, u, W[:FLOATING]))


# The regressions are minima too.
@pytest.mark.parametrize(
    "kind",
    params(zip(KINDS, strict=True), lambda kind: kind is not MINIMUM, lambda kind: kind.name),
)
def test_pytrees(kind):
    rule = bx.Implicit() if kind is FIXED_POINT else DENSE
    for x, u in ((like_x(solution(kind)), solution(kind)), (X, U)):
        found = bx.efficiency_constant(outer_on_trees, kind.problem, rule, x, Y, **EXACT)
        np.testing.assert_allclose(found.value, operator_norm(flat_jacobian(kind)(u)), rtol=1e-8)
        assert_converged(found, 1e-8)
    if kind is not MINIMUM:
        _, first, _ = partials(kind.optimality, U)
        assert np.linalg.norm(first - first.T) > 0.1 * np.linalg.norm(first)


# Along one direction.


def test_a_direction():
    u = solution(MINIMUM)
    matrix = flat_jacobian(MINIMUM)(u)
    constant = functools.partial(
        bx.efficiency_constant, outer_on_trees, MINIMUM.problem, DENSE, like_x(u), Y
    )
    random = np.random.default_rng(1)
    for _ in range(3):
        d = random.normal(size=4)
        found = constant(direction=like_x(d))
        wanted = np.linalg.norm(matrix @ d) / np.linalg.norm(d)
        np.testing.assert_allclose(found.value, wanted, rtol=1e-10)
        assert (found.iterations, found.residual) == (0, 0)
        assert found.status == bx.Status.CONVERGED
        assert found.value <= operator_norm(matrix)
        np.testing.assert_allclose(constant(direction=like_x(-7 * d)).value, wanted, rtol=1e-10)
    worst = np.linalg.svd(matrix)[2][0]
    np.testing.assert_allclose(
        constant(direction=like_x(worst)).value, operator_norm(matrix), rtol=1e-10
    )
    nowhere = constant(direction=like_x(np.zeros(4)))
    assert np.isnan(nowhere.value) and nowhere.status == bx.Status.NONFINITE


# Precision and transformations.


def test_float32():
    u = LOGISTIC.x + 0.3
    low = u.astype(np.float32), PENALTY.astype(np.float32)
    arguments = validation, LOGISTIC.problem
    found = bx.efficiency_constant(*arguments, DENSE, *low, rtol=1e-3, maxiter=1000)
    np.testing.assert_allclose(found.value, LOGISTIC.constant(dense_implicit, u), rtol=1e-3)
    assert found.value.dtype == found.residual.dtype == np.float32
    assert_converged(found, 1e-3)
    low = LOGISTIC.x.astype(np.float32), PENALTY.astype(np.float32)
    found = bx.efficiency_constant(*arguments, NEWTON, *low)
    assert found.value < 1e-3 * LOGISTIC.constant(dense_implicit, LOGISTIC.x)
    assert found.status == bx.Status.CONVERGED


def test_jit_and_vmap_equal_a_loop():
    def constant(w, maxiter):
        return bx.efficiency_constant(
            validation, LOGISTIC.problem, DENSE, LOGISTIC.x, w, rtol=1e-6, maxiter=maxiter
        )

    ws = PENALTY + np.array([0.0, -1.0, 2.0])[:, None]
    loop = [constant(w, 500) for w in ws]
    together = jax.jit(jax.vmap(constant, (0, None)))(ws, 500)
    for k, alone in enumerate(loop):
        np.testing.assert_allclose(together.value[k], alone.value, rtol=1e-9)
        assert together.status[k] == alone.status == bx.Status.CONVERGED
        assert abs(together.iterations[k] - alone.iterations) <= 1
        wanted = LOGISTIC.constant(dense_implicit, LOGISTIC.x, ws[k])
        np.testing.assert_allclose(alone.value, wanted, rtol=1e-6)
    jitted = jax.jit(constant)(ws[1], 500)
    np.testing.assert_allclose(jitted.value, loop[1].value, rtol=1e-12)
    assert jitted.iterations == loop[1].iterations


def test_a_second_call_traces_and_compiles_nothing():
    objective, g = Counted(logistic), Counted(validation)

    def run(u, w, **options):
        rule = bx.Implicit(bx.CG(rtol=1e-10, maxiter=50))
        return bx.efficiency_constant(g, bx.minimum(objective), rule, u, w, **options)

    with recorded_compilations() as events:
        run(LOGISTIC.x, PENALTY)
    assert events
    traced = objective.calls, g.calls
    with recorded_compilations() as events:
        run(LOGISTIC.x + 0.1, 0.5 * PENALTY, rtol=1e-4, maxiter=30)
    assert events == [] and (objective.calls, g.calls) == traced


# What goes wrong.


def test_power_iterations_that_end_early():
    found = bx.efficiency_constant(
        validation, LOGISTIC.problem, DENSE, LOGISTIC.x, PENALTY, rtol=1e-12, maxiter=2
    )
    assert (found.status, found.iterations) == (bx.Status.MAXITER, 2)
    assert found.residual > 1e-12
    # A lower bound still.
    wanted = LOGISTIC.constant(dense_implicit, LOGISTIC.x)
    assert 0.1 * wanted < found.value <= wanted * (1 + 1e-12)


@pytest.mark.parametrize("direction", [None, np.ones(4)], ids=["norm", "direction"])
def test_a_linear_solve_that_fails(direction):
    rule = bx.Implicit(bx.CG(maxiter=1))
    found = bx.efficiency_constant(
        validation, LOGISTIC.problem, rule, LOGISTIC.x, PENALTY, direction=direction
    )
    assert np.isnan(found.value) and found.status == bx.Status.NONFINITE


def test_an_x_without_entries():
    problem = bx.minimum(lambda x, y: jnp.sum(x) + y)
    found = bx.efficiency_constant(lambda x, y: y, problem, DENSE, np.zeros(0), 1.0)
    assert found.value == 0 and found.iterations == 0 and found.status == bx.Status.CONVERGED


@pytest.mark.parametrize(
    ("error", "changes", "message"),
    [
        (TypeError, {"outer": 1.0}, "`outer` must be a function, got 1.0."),
        (TypeError, {"outer": lambda x, y: x}, "`outer` must return a scalar, got float64[4]."),
        (
            TypeError,
            {"outer": lambda x, y: jnp.sum(x > 0)},
            "`outer` must return a real floating scalar, got int64[].",
        ),
        (
            TypeError,
            {"problem": ridge},
            "`problem` must be a Problem, for example `minimum(objective)`; got",
        ),
        (
            TypeError,
            {"problem": bx.minimum(lambda x, y: x)},
            "`objective` must return a scalar, got float64[4].",
        ),
        (
            TypeError,
            {"problem": bx.root(lambda x, y: x[:2])},
            "`residual` must return shapes and dtypes like `x`: `x` is float64[4], got float64[2].",
        ),
        (TypeError, {"rule": bx.Implicit}, "Did you forget the parentheses?"),
        (TypeError, {"rule": None}, "`rule` must be a Rule, for example `Implicit()`; got None."),
        (
            TypeError,
            {"x": np.zeros(4, int)},
            "`x` must be a floating array to be solved for, got dtype int64.",
        ),
        (TypeError, {"y": np.zeros(4, complex)}, "`y` is complex; only real arrays are supported."),
        (
            TypeError,
            {"direction": np.zeros(3)},
            "`direction` must have shapes and dtypes like `x`: `x` is float64[4], got float64[3].",
        ),
        (
            TypeError,
            {"direction": (np.zeros(4),)},
            "`direction` must be a pytree like `x`, PyTreeDef(*); got PyTreeDef((*,)).",
        ),
        (ValueError, {"rtol": 0.0}, "`rtol` must be positive, got 0.0."),
        (TypeError, {"rtol": None}, "`rtol` must be a number, got None."),
        (ValueError, {"maxiter": 0}, "`maxiter` must be positive, got 0."),
        (TypeError, {"maxiter": 2.5}, "`maxiter` must be a whole number, got 2.5."),
        (
            ValueError,
            {
                "rule": bx.Reparameterized(
                    DENSE, bx.ChangeOfVariables(lambda z, y: 2 * z, lambda x, y: x)
                )
            },
            "`phi(phi_inverse(x, y), y)`",
        ),
    ],
)
def test_wrong_arguments(error, changes, message):
    arguments = {
        "outer": validation,
        "problem": RIDGE.problem,
        "rule": DENSE,
        "x": WEIGHTS,
        "y": PENALTY,
    }
    assert_fails(error, message, lambda: bx.efficiency_constant(**(arguments | changes)))
