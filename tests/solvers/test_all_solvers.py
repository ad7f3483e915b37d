"""One table over all inner solvers: a nonlinear problem of each kind, against SciPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import bilevax as bx
from bilevax import Status
from tests.everyday import params, slow
from tests.solvers.problems import MIX, ROSENBROCK, SMOOTH, smooth, solve

Y = np.array([0.5, -1.0, 0.3])
START = np.array([0.4, 0.2, -0.7])


def residual(x, y):
    return x + 0.3 * jnp.tanh(MIX @ x - y) + 0.1 * jnp.roll(x, 1)


def mapping(x, y):
    return 0.4 * jnp.cos(MIX @ x + y)


ROOT, FIXED_POINT = bx.root(residual), bx.fixed_point(mapping)
SET = {"rtol": 1e-11, "atol": 0.0, "maxiter": 2000}
SOLVERS = {
    "GradientDescent": bx.GradientDescent(0.4, **SET),
    "AcceleratedGradient": bx.AcceleratedGradient(0.3, **SET),
    "Newton": bx.Newton(**SET),
    "Newton, dense": bx.Newton(bx.Dense(), **SET),
    "FixedPointIteration": bx.FixedPointIteration(0.4, **SET),
    "Anderson": bx.FixedPointIteration(0.4, **SET, memory=3),
    "Optax": bx.Optax(optax.sgd(0.4), **SET),
}
OF_OBJECTIVES = {
    "ConjugateGradient": bx.ConjugateGradient(**SET),
    "Backtracking": bx.GradientDescent(bx.Backtracking(), **SET),
}


def truth(problem, y):
    """Return SciPy's solution."""
    if problem is SMOOTH:
        gradient = jax.jit(jax.grad(smooth))
        function = lambda x: np.asarray(gradient(x, y))  # noqa: E731
    elif problem is ROOT:
        function = lambda x: np.asarray(residual(x, y))  # noqa: E731
    else:
        function = lambda x: x - np.asarray(mapping(x, y))  # noqa: E731
    result = scipy.optimize.root(function, np.zeros(3), tol=1e-13)
    assert np.linalg.norm(result.fun) < 1e-11
    return result.x


@pytest.fixture(scope="module")
def truths():
    return {problem: truth(problem, Y) for problem in (SMOOTH, ROOT, FIXED_POINT)}


KINDS = {"min": SMOOTH, "root": ROOT, "fixed": FIXED_POINT}


@pytest.mark.parametrize(
    ("name", "kind"),
    params(
        itertools.product(SOLVERS, KINDS),
        # Every day each solver meets two kinds.
        lambda name, kind: (list(SOLVERS).index(name) + list(KINDS).index(kind)) % 3 > 0,
    ),
)
def test_every_solver_on_every_kind_of_problem(name, kind, truths):
    solver, problem = SOLVERS[name], KINDS[kind]
    x, report = solve(solver, problem, START, Y)
    assert report.status is Status.CONVERGED
    assert report.residual <= 1e-11 * report.initial_residual
    np.testing.assert_allclose(x, truths[problem], rtol=1e-9)


@pytest.mark.parametrize("solver", OF_OBJECTIVES.values(), ids=OF_OBJECTIVES.keys())
def test_solvers_of_objectives(solver, truths):
    x, report = solve(solver, SMOOTH, START, Y)
    assert report.status is Status.CONVERGED
    np.testing.assert_allclose(x, truths[SMOOTH], rtol=1e-9)


ALL = {**SOLVERS, **OF_OBJECTIVES}


@pytest.mark.parametrize(
    "name", [slow("AcceleratedGradient"), "Newton", "ConjugateGradient", "Anderson"]
)
def test_lanes_of_a_batch_are_solved_one_by_one(name):
    """Each lane has its own start, outer variable and number of steps."""
    lanes = [(START, Y), (2 * START, -Y), (truth(SMOOTH, 0 * Y), 0 * Y)]

    def one(x0, y):
        return bx.solution_map(SMOOTH, ALL[name]).with_report(x0, y)

    x, report = jax.vmap(one)(*(np.stack(part) for part in zip(*lanes, strict=True)))
    assert len(set(np.asarray(report.iterations).tolist())) > 1
    for lane, (x0, y) in enumerate(lanes[:2]):
        expected, expected_report = solve(ALL[name], SMOOTH, x0, y)
        np.testing.assert_allclose(x[lane], expected, rtol=1e-9)
        assert report.status[lane] == expected_report.status
        assert report.iterations[lane] == expected_report.iterations


def test_structures_of_two_solvers_are_never_equal():
    """Else a compiled function could mistake one for the other."""
    numbers = {"rtol": 1e-3, "atol": 0.0, "maxiter": 3}
    solvers = [bx.GradientDescent(0.1, **numbers), bx.AcceleratedGradient(0.1, **numbers)]
    first, second = (jax.tree.structure(solver) for solver in solvers)
    assert first != second
    assert first == jax.tree.structure(bx.GradientDescent(0.2, **numbers))


@pytest.mark.parametrize("solver", ALL.values(), ids=ALL.keys())
def test_solvers_are_frozen_pytrees_that_survive_a_round_trip(solver):
    leaves, structure = jax.tree.flatten(solver)
    assert set(SET.values()) <= set(leaves)
    assert jax.tree.flatten(jax.tree.unflatten(structure, leaves)) == (leaves, structure)
    with pytest.raises(AttributeError, match="cannot assign"):
        solver.rtol = 0.1


EVALUATED = {
    **{name: (SMOOTH, solver) for name, solver in ALL.items()},
    "Newton on a root": (ROOT, bx.Newton(bx.Dense(), **SET)),
    "GradientDescent on a fixed point": (FIXED_POINT, bx.GradientDescent(0.4, **SET)),
    "Anderson on a fixed point": (FIXED_POINT, bx.FixedPointIteration(memory=2, **SET)),
    "momentum": (SMOOTH, bx.Optax(optax.sgd(0.2, momentum=0.5), **SET)),
    "L-BFGS": (SMOOTH, bx.Optax(optax.lbfgs(), **SET)),
}


# Where the same solver is on another kind of problem, or another optimiser of Optax is.
REDUNDANT = ("Newton, dense", "GradientDescent on a fixed point", "Anderson", "Optax")


@pytest.mark.parametrize(
    "name", params(zip(EVALUATED, strict=True), lambda name: name not in REDUNDANT)
)
def test_what_a_solver_knows_at_x_depends_on_x_and_y_alone(name):
    """Whoever holds x can evaluate it anew: iterates carry nothing else but what they remember."""
    problem, solver = EVALUATED[name]

    @jax.jit
    def iterates(x, y):
        first = solver.init(problem, x, y)
        second = solver.step(problem, first, y)
        third = solver.step(problem, second, y)
        anew = [solver.evaluate(problem, it.x, y) for it in (first, second, third)]
        return (first, second, third), anew

    visited, anew = iterates(START, Y)
    assert not np.allclose(visited[0].x, visited[1].x)
    optimality = {
        SMOOTH: jax.jit(jax.grad(smooth)),
        ROOT: residual,
        FIXED_POINT: lambda x, y: x - mapping(x, y),
    }[problem]
    for iterate, (evaluation, norm) in zip(visited, anew, strict=True):
        for got, want in zip(
            jax.tree.leaves(iterate.evaluation), jax.tree.leaves(evaluation), strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-15)
        np.testing.assert_allclose(iterate.residual, norm, rtol=1e-12)
        np.testing.assert_allclose(norm, np.linalg.norm(optimality(iterate.x, Y)), rtol=1e-12)


def test_a_search_that_fails_knows_the_point_it_is_back_at():
    solver = bx.GradientDescent(bx.Backtracking(maxiter=1))
    iterate = solver.init(ROSENBROCK, jnp.array([-1.2, 1.0]), 100.0)
    iterate = iterate._replace(state=jnp.asarray(1.0))  # far too long a step
    back = solver.step(ROSENBROCK, iterate, 100.0)
    assert back.stalled
    np.testing.assert_array_equal(back.x, iterate.x)
    np.testing.assert_array_equal(back.evaluation.optimality, iterate.evaluation.optimality)
    assert (back.evaluation.value, back.residual) == (iterate.evaluation.value, iterate.residual)
