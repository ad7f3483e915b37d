"""Implicit = unrolled to convergence = central differences of solutions found by other means."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

import bilevax as bx
from tests.iterative.example import assert_close, central_differences
from tests.problems_table import PROBLEMS, SOLVERS, X0, Y, dense_value, fits, outer

# The line search of L-BFGS is a `while_loop`, which has no reverse mode.
PAIRS = [
    (problem, solver)
    for problem, solver in itertools.product(PROBLEMS, SOLVERS)
    if fits(problem, solver) and solver.name != "lbfgs"
]
EVERYDAY = {
    "minimum": ("backtracking", "conjugate_gradient", "newton", "momentum"),
    "root": ("gradient_descent", "newton_dense"),
    "fixed_point": ("accelerated", "damped_picard", "anderson"),
}


@functools.cache
def truth(problem):
    """Return differences of h by Newton's method with dense matrices, on all points at once."""
    values = jax.jit(jax.vmap(lambda y: dense_value(problem, y)))
    return central_differences(values, Y)


def of_pair(pair):
    problem, solver = pair
    marks = () if solver.name in EVERYDAY[problem.name] else pytest.mark.slow
    return pytest.param(problem, solver, marks=marks, id=f"{problem.name}-{solver.name}")


@pytest.mark.parametrize(("problem", "solver"), [of_pair(pair) for pair in PAIRS])
def test_three_ways_agree(problem, solver):
    # ||F|| falls by 13 orders: a run of T steps has an error of T q^T, and Newton's one of the
    # order of the last step but one.
    tight = dataclasses.replace(solver.solver, rtol=1e-14, atol=1e-14, maxiter=150)

    @jax.jit
    def gradients(y):
        def gradient(rule):
            solve = bx.solution_map(problem.problem, tight, rule)
            return jax.grad(lambda y: outer(solve(X0, y), y))(y)

        return gradient(bx.Unrolled()), gradient(bx.Implicit())

    unrolled, implicit = gradients(Y)
    assert_close(unrolled, implicit, 1e-7)
    assert_close(unrolled, truth(problem), 1e-7)
    assert_close(implicit, truth(problem), 1e-9)


def test_every_solver_and_problem_is_met_every_day():
    names = set(itertools.chain(*EVERYDAY.values()))
    assert names == {row.name for row in SOLVERS} - {"lbfgs"}
    assert set(EVERYDAY) == {row.name for row in PROBLEMS}
    known = {(problem.name, solver.name) for problem, solver in PAIRS}
    assert all((p, s) in known for p, solvers in EVERYDAY.items() for s in solvers)


def test_differences_see_a_wrong_derivative():
    """The derivative of a run of one step is no derivative of the solution."""
    solver = bx.GradientDescent(0.8, rtol=0.0, atol=0.0, maxiter=1)
    solve = bx.solution_map(PROBLEMS[0].problem, solver, bx.Unrolled())
    gradient = jax.jit(jax.grad(lambda y: outer(solve(X0, y), y)))(Y)
    wanted = truth(PROBLEMS[0])
    largest = max(
        np.max(np.abs(got - want))
        for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True)
    )
    assert largest > 1e-3
