"""Implicit differentiation at a given point: pullback, pushforward and what the report holds."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from bilevax import Status
from tests.everyday import params, slow
from tests.rules.estimators import (
    COTANGENT,
    KINDS,
    MINIMUM,
    ROOT,
    TANGENT,
    U,
    X,
    Y,
    assert_close,
    flat_x,
    flat_y,
    implicit,
    outer,
    outer_on_trees,
    partials,
)

kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)

# Linear solves end at a relative residual of eps^(3/4) = 1.8e-12, and cond(F_1) < 3 at the point.
DEFAULT_ACCURACY = 1e-11
ROUNDING = 1e-14
ACCURACY = {None: DEFAULT_ACCURACY, "dense": ROUNDING}
SOLVERS = {None: None, "dense": bx.Dense()}
solvers = pytest.mark.parametrize("solver", SOLVERS)
# Every day all kinds meet the default solver, and minima the dense one.
kinds_and_solvers = pytest.mark.parametrize(
    ("kind", "solver"),
    params(
        itertools.product(KINDS, SOLVERS),
        lambda kind, solver: solver is None or kind is MINIMUM,
        lambda part: getattr(part, "name", str(part)),
    ),
)

# A solver that stops where it starts.
STANDSTILL = bx.GradientDescent(0.1, maxiter=0)


def scaled(factor, tree):
    return jax.tree.map(lambda leaf: (factor * leaf).astype(leaf.dtype), tree)


def in_float32(tree):
    return jax.tree.map(
        lambda leaf: leaf.astype(np.float32) if np.issubdtype(leaf.dtype, np.floating) else leaf,
        tree,
    )


def adjoint(kind, cotangent=COTANGENT):
    _, first, _ = partials(kind.optimality, U)
    return np.linalg.solve(first.T, flat_x(cotangent))


def status_of(report):
    return Status(int(report.solve.status))


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@kinds_and_solvers
def test_a_pullback_is_the_dense_one(kind, solver, scale):
    cotangent = scaled(scale, COTANGENT)
    pulled, report = bx.Implicit(SOLVERS[solver]).pullback(kind.problem, X, Y, cotangent)
    wanted = implicit(kind.optimality, U).T @ flat_x(COTANGENT)
    assert_close(flat_y(pulled) / scale, wanted, ACCURACY[solver])
    assert status_of(report) is Status.CONVERGED


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@kinds
def test_a_pullback_in_float32_is_as_accurate_as_float32_allows(kind, scale):
    x, y, cotangent = in_float32((X, Y, scaled(scale, COTANGENT)))
    pulled, report = bx.Implicit().pullback(kind.problem, x, y, cotangent)
    assert pulled["gain"].dtype == report.adjoint["left"].dtype == np.float32
    wanted = implicit(kind.optimality, U).T @ flat_x(COTANGENT)
    # The default tolerance of float32 is 6.4e-6.
    assert_close(np.asarray(flat_y(pulled), np.float64) / scale, wanted, 3e-5)
    assert status_of(report) is Status.CONVERGED


@kinds_and_solvers
def test_a_pushforward_is_the_dense_one(kind, solver):
    pushed = bx.Implicit(SOLVERS[solver]).pushforward(kind.problem, X, Y, TANGENT)
    assert jax.tree.map(np.shape, pushed) == jax.tree.map(np.shape, X)
    wanted = implicit(kind.optimality, U) @ flat_y(TANGENT)
    assert_close(flat_x(pushed), wanted, ACCURACY[solver])


@kinds_and_solvers
def test_a_pushforward_is_the_adjoint_of_a_pullback(kind, solver):
    rule = bx.Implicit(SOLVERS[solver])
    pulled, _ = rule.pullback(kind.problem, X, Y, COTANGENT)
    pushed = rule.pushforward(kind.problem, X, Y, TANGENT)
    left, right = flat_y(pulled) @ flat_y(TANGENT), flat_x(COTANGENT) @ flat_x(pushed)
    np.testing.assert_allclose(left, right, rtol=ACCURACY[solver])


@pytest.mark.parametrize(
    ("kind", "mode"),
    params(
        itertools.product(KINDS, ["reverse", "forward"]),
        lambda kind, mode: (mode == "forward") == (kind is ROOT),
        lambda part: getattr(part, "name", part),
    ),
)
def test_both_modes_make_the_solution_map_differentiable(kind, mode):
    rule = bx.Implicit(bx.Dense(), mode)
    solve = bx.solution_map(kind.problem, STANDSTILL, rule)
    derivative = implicit(kind.optimality, U)
    _, outer_x, outer_y = partials(outer, U)

    @jax.jit
    def gradient(y):
        return jax.grad(lambda y: outer_on_trees(solve(X, y), y), allow_int=True)(y)

    wanted = outer_y + derivative.T @ outer_x
    assert_close(flat_y(gradient(Y)), wanted, ROUNDING)
    if mode == "forward":
        pushed = jax.jit(lambda y: jax.jvp(lambda y: solve(X, y), (y,), (TANGENT,))[1])(Y)
        assert_close(flat_x(pushed), derivative @ flat_y(TANGENT), ROUNDING)


def test_a_pullback_and_a_pushforward_do_not_depend_on_the_mode():
    rule, derivative = bx.Implicit(bx.Dense(), "forward"), implicit(ROOT.optimality, U)
    pulled, _ = rule.pullback(ROOT.problem, X, Y, COTANGENT)
    assert_close(flat_y(pulled), derivative.T @ flat_x(COTANGENT), ROUNDING)
    pushed = rule.pushforward(ROOT.problem, X, Y, TANGENT)
    assert_close(flat_x(pushed), derivative @ flat_y(TANGENT), ROUNDING)


@kinds_and_solvers
def test_the_report_holds_the_adjoint(kind, solver):
    _, report = bx.Implicit(SOLVERS[solver]).pullback(kind.problem, X, Y, COTANGENT)
    assert jax.tree.map(np.shape, report.adjoint) == jax.tree.map(np.shape, X)
    assert_close(flat_x(report.adjoint), adjoint(kind), ACCURACY[solver])
    assert report.solve.residual <= {None: 1.9e-12, "dense": ROUNDING}[solver]
    assert report.identity_entries == 0


# CG, and GMRES in restarts of one step: both are far from the adjoint after two of their steps.
SHORT = {"minimum": bx.CG, "root": functools.partial(bx.GMRES, restart=1)}


@pytest.mark.parametrize(
    ("rtol", "status"), [(0.0, Status.TRUNCATED), (1e-10, Status.MAXITER), (0.9, Status.CONVERGED)]
)
@pytest.mark.parametrize("kind", [MINIMUM, ROOT], ids=lambda kind: kind.name)
def test_the_report_tells_how_a_solve_that_stops_early_ended(kind, rtol, status):
    rule = bx.Implicit(SHORT[kind.name](rtol=rtol, maxiter=2))
    pulled, report = rule.pullback(kind.problem, X, Y, COTANGENT)
    assert status_of(report) is status
    # The residual is that of the adjoint at hand, and the result is made with that adjoint.
    _, first, second = partials(kind.optimality, U)
    v = np.asarray(flat_x(report.adjoint))
    left = np.linalg.norm(flat_x(COTANGENT) - first.T @ v) / np.linalg.norm(flat_x(COTANGENT))
    assert 1e-3 < left < 0.9
    np.testing.assert_allclose(report.solve.residual, left, rtol=1e-12)
    assert_close(flat_y(pulled), -second.T @ v, ROUNDING)


@kinds
def test_a_guess_that_is_the_adjoint_costs_no_iterations(kind):
    rule = bx.Implicit()
    _, cold = rule.pullback(kind.problem, X, Y, COTANGENT)
    assert cold.solve.iterations > 0
    pulled, warm = rule.pullback(kind.problem, X, Y, COTANGENT, guess=cold.adjoint)
    assert (status_of(warm), int(warm.solve.iterations)) == (Status.CONVERGED, 0)
    assert_close(flat_y(pulled), implicit(kind.optimality, U).T @ flat_x(COTANGENT), 1e-11)


@kinds
def test_integer_leaves_get_no_cotangent(kind):
    pulled, _ = bx.Implicit().pullback(kind.problem, X, Y, COTANGENT)
    assert jax.tree.structure(pulled) == jax.tree.structure(Y)
    assert jax.tree.map(np.shape, pulled) == jax.tree.map(np.shape, Y)
    assert pulled["steps"].dtype == jax.dtypes.float0
    # The integer matters for the others all the same.
    other, _ = bx.Implicit().pullback(kind.problem, X, {**Y, "steps": np.int32(3)}, COTANGENT)
    assert np.linalg.norm(flat_y(other) - flat_y(pulled)) > 1e-3


@kinds
def test_the_point_is_not_moved(kind):
    x, report = bx.Implicit().refine(kind.problem, X, Y)
    assert report is None
    jax.tree.map(np.testing.assert_array_equal, x, X)


def test_an_adjoint_system_with_the_identity_takes_one_iteration():
    problem = bx.minimum(lambda x, y: jnp.sum(x**2) / 2 - y @ x)
    cotangent = np.array([0.3, -2.0, 5.0])
    pulled, report = bx.Implicit(bx.CG()).pullback(problem, np.ones(3), np.ones(3), cotangent)
    assert (status_of(report), int(report.solve.iterations)) == (Status.CONVERGED, 1)
    np.testing.assert_allclose(pulled, cotangent, rtol=1e-15)


@solvers
def test_a_number_for_x(solver):
    # F = exp(y) x + x^3, so dx/dy = -exp(y) x / (exp(y) + 3 x^2).
    problem = bx.minimum(lambda x, y: jnp.exp(y) * x**2 / 2 + x**4 / 4)
    rule, x, y = bx.Implicit(SOLVERS[solver]), 0.7, 0.2
    derivative = -np.exp(y) * x / (np.exp(y) + 3 * x**2)
    pulled, report = rule.pullback(problem, x, y, 2.0)
    assert pulled.shape == report.adjoint.shape == ()
    np.testing.assert_allclose(pulled, 2 * derivative, rtol=1e-14)
    np.testing.assert_allclose(rule.pushforward(problem, x, y, 3.0), 3 * derivative, rtol=1e-14)


@solvers
def test_a_single_array_for_x(solver):
    # F = A x - y^3, so dx/dy = 3 y^2 A^{-1} 1.
    matrix = np.array([[2.0, 0.5, -0.3], [-0.4, 1.5, 0.2], [0.1, 0.6, 1.8]])
    problem = bx.root(lambda x, y: jnp.asarray(matrix) @ x - y**3)
    rule, x, y = bx.Implicit(SOLVERS[solver]), np.array([0.2, -0.6, 1.0]), np.array(1.3)
    derivative = 3 * y**2 * np.linalg.solve(matrix, np.ones(3))
    cotangent = np.array([1.0, -0.5, 2.0])
    pulled, _ = rule.pullback(problem, x, y, cotangent)
    np.testing.assert_allclose(pulled, derivative @ cotangent, rtol=1e-11)
    np.testing.assert_allclose(rule.pushforward(problem, x, y, 1.0), derivative, rtol=1e-11)


@pytest.mark.parametrize("x", [np.zeros(0), {}, {"a": np.zeros((0, 2))}], ids=["0", "{}", "(0, 2)"])
@solvers
def test_an_empty_x_has_the_derivative_zero(solver, x):
    def function(x, y):
        return sum((jnp.sum(leaf**2) for leaf in jax.tree.leaves(x)), y**2)

    problem, rule = bx.minimum(function), bx.Implicit(SOLVERS[solver])
    pulled, report = rule.pullback(problem, x, 3.0, x)
    assert pulled == 0
    assert (status_of(report), int(report.solve.iterations)) == (Status.CONVERGED, 0)
    pushed = rule.pushforward(problem, x, 3.0, 1.0)
    assert jax.tree.map(np.shape, pushed) == jax.tree.map(np.shape, x)


# At any x, the Hessian of this function has eigenvalues of both signs.
SADDLE = np.array([[2.0, 0.7, 0.1], [0.7, -1.5, 0.4], [0.1, 0.4, 0.9]])


def saddle(x, y):
    return x @ jnp.asarray(SADDLE) @ x / 2 - jnp.sum(jnp.sin(y) * x)


@pytest.mark.parametrize("structure", [bx.Structure.SYMMETRIC, slow(bx.Structure.GENERAL)])
def test_a_saddle_is_no_obstacle_where_it_is_declared(structure):
    problem = bx.minimum(saddle, structure=structure)
    x, y, cotangent = np.ones(3), np.array([0.3, -0.2, 0.8]), np.array([0.2, 1.0, -0.4])
    pulled, report = bx.Implicit().pullback(problem, x, y, cotangent)
    assert status_of(report) is Status.CONVERGED
    assert_close(pulled, np.cos(y) * np.linalg.solve(SADDLE, cotangent), 1e-11)
    pushed = bx.Implicit().pushforward(problem, x, y, cotangent)
    assert_close(pushed, np.linalg.solve(SADDLE, np.cos(y) * cotangent), 1e-11)


def test_a_saddle_that_is_not_declared_is_found_out():
    problem, x, y = bx.minimum(saddle), np.ones(3), np.ones(3)
    negative = np.linalg.eigh(SADDLE)[1][:, 0]
    _, report = bx.Implicit().pullback(problem, x, y, negative)
    assert status_of(report) is Status.INDEFINITE
    # A pushforward has no report.
    assert np.all(np.isnan(bx.Implicit().pushforward(problem, x, y, negative)))


@pytest.mark.parametrize("make", [slow(bx.root), bx.fixed_point], ids=["root", "fixed_point"])
def test_what_is_declared_of_a_root_or_a_fixed_point_picks_the_solver(make):
    matrix = SADDLE if make is bx.root else np.eye(3) - SADDLE

    def function(x, y):
        return jnp.asarray(matrix) @ x + y

    negative = np.linalg.eigh(SADDLE)[1][:, 0]
    for structure in bx.Structure:
        problem = make(function, structure=structure)
        _, report = bx.Implicit().pullback(problem, np.ones(3), np.ones(3), negative)
        found_out = structure is bx.Structure.POSITIVE_DEFINITE
        assert status_of(report) is (Status.INDEFINITE if found_out else Status.CONVERGED)
