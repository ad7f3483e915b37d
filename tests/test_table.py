"""The table test: problems x solvers x rules x transformations, against dense truth.

The rows are in `problems_table.py`; a new row in a list there is crossed with others. In a covering
design, every problem meets every rule and, with two rules each, every solver; and each of the three
meets every group of transformations. That takes minutes, and most of it is marked slow: every day,
together with the gradients outside of jit, all solvers, all rules, and all problems under all
groups are met once. Of the rest of the product, which takes an hour to compile, a sample is slow.
"""

import dataclasses
import itertools
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import bilevax as bx
from tests.everyday import params
from tests.problems_table import (
    PROBLEMS,
    RULES,
    SOLVERS,
    TANGENT,
    X0,
    YS,
    ProblemRow,
    RuleRow,
    SolverRow,
    Y,
    dense_solution,
    dense_value,
    fits,
    objective,
    outer,
    truth,
)

PyTree = Any

# Inner and linear solves stop at a relative residual of eps^(3/4) = 1.8e-12 by default. Here
# ||F_1^{-1}|| < 1.2 and ||F(x0, y)|| < 0.5, so x is within 1.1e-12 of x*. A Hessian takes four
# solves, with data that are off by as much: 1e-11 in all, and ten times that for the third
# derivatives of F and g, which carry these errors into it.
TOLERANCE = 1e-10


def first_order(solve: bx.SolutionMap, y: PyTree, ys: PyTree) -> dict[str, PyTree]:
    """grad, jacrev, vmap, vmap of grad, grad of vmap."""

    def value_and_x(y: PyTree) -> tuple[jax.Array, PyTree]:
        x = solve(X0, y)
        return outer(x, y), x

    def value(y: PyTree) -> jax.Array:
        return value_and_x(y)[0]

    (value_at_y, x), gradient = jax.value_and_grad(value_and_x, has_aux=True)(y)
    (_, xs), gradients = jax.vmap(jax.value_and_grad(value_and_x, has_aux=True))(ys)
    of_vmap = jax.grad(lambda ys: jnp.sum(jax.vmap(value)(ys)))(ys)
    jacobian = jax.jacrev(lambda y: solve(X0, y))(y)
    return {
        "x": x,
        "value": value_at_y,
        "gradient": gradient,
        "xs": xs,
        "gradients": gradients,
        "gradients of vmap": of_vmap,
        "jacobian": jacobian,
    }


def second_order(solve: bx.SolutionMap, y: PyTree, ys: PyTree) -> dict[str, PyTree]:
    """Reverse over reverse."""
    return {"hessian": jax.jacrev(jax.grad(lambda y: outer(solve(X0, y), y)))(y)}


def forward(solve: bx.SolutionMap, y: PyTree, ys: PyTree) -> dict[str, PyTree]:
    """jvp, jacfwd and hessian (forward over reverse), for rules in forward mode."""
    x, tangent = jax.jvp(lambda y: solve(X0, y), (y,), (TANGENT,))
    return {
        "x": x,
        "tangent": tangent,
        "jacobian": jax.jacfwd(lambda y: solve(X0, y))(y),
        "hessian": jax.hessian(lambda y: outer(solve(X0, y), y))(y),
    }


GROUPS = [first_order, second_order, forward]
Group = Callable[[bx.SolutionMap, PyTree, PyTree], dict[str, PyTree]]


@dataclasses.dataclass(frozen=True)
class Case:
    problem: ProblemRow
    solver: SolverRow
    rule: RuleRow
    group: Group

    @property
    def id(self) -> str:
        group = self.group.__name__
        return f"{self.problem.name}-{self.solver.name}-{self.rule.name}-{group}"

    def results(self, y: PyTree, ys: PyTree) -> dict[str, PyTree]:
        mode = "forward" if self.group is forward else "reverse"
        rule = self.rule.make(mode)
        solve = bx.solution_map(self.problem.problem, self.solver.solver, rule)
        return self.group(solve, y, ys)


def covering_design() -> list[Case]:
    """Return the everyday cases, chosen one by one to meet what has been met least so far."""
    cases: list[Case] = []

    def count(**wanted: Any) -> int:
        return sum(all(getattr(case, k) is v for k, v in wanted.items()) for case in cases)

    def add(problem: ProblemRow, solver: SolverRow, rule: RuleRow) -> None:
        def times_met(group: Group) -> tuple[int, int, int]:
            with_solver = count(solver=solver, group=group)
            return count(rule=rule, group=group), with_solver, count(problem=problem, group=group)

        cases.append(Case(problem, solver, rule, min(GROUPS, key=times_met)))

    # Every rule meets every problem that it fits, and all groups.
    for rule in RULES:
        problems = [problem for problem in PROBLEMS if fits(problem, rule)]
        for problem in itertools.islice(itertools.cycle(problems), len(GROUPS)):
            solvers = [solver for solver in SOLVERS if fits(problem, solver)]
            add(problem, min(solvers, key=lambda s: count(problem=problem, solver=s)), rule)
    # Every solver meets two rules of every problem that it fits.
    for problem, solver in itertools.product(PROBLEMS, SOLVERS):
        if fits(problem, solver):
            rules = [rule for rule in RULES if fits(problem, rule)]
            rules.sort(key=lambda rule: count(problem=problem, solver=solver, rule=rule))
            for rule in rules[: max(0, 2 - count(problem=problem, solver=solver))]:
                add(problem, solver, rule)
    # Every solver meets all groups.
    for solver in SOLVERS:
        while any(count(solver=solver, group=group) == 0 for group in GROUPS):
            problem = next(problem for problem in PROBLEMS if fits(problem, solver))
            add(problem, solver, min(RULES, key=lambda rule: count(solver=solver, rule=rule)))
    return cases


CASES = covering_design()


def check(case: Case, results: dict[str, PyTree]) -> None:
    expected = truth(case.problem)
    for name, result in results.items():
        want = expected["gradients" if name == "gradients of vmap" else name]
        assert jax.tree.structure(result) == jax.tree.structure(want), name
        for got, leaf in zip(jax.tree.leaves(result), jax.tree.leaves(want), strict=True):
            assert got.shape == leaf.shape, name
            np.testing.assert_allclose(
                got, leaf, rtol=TOLERANCE, atol=TOLERANCE, err_msg=f"{case.id}: {name}"
            )


# One row for each problem, of three kinds of rules.
EAGER = [
    Case(problem, solver, rule, first_order)
    for problem, solver, rule in zip(
        PROBLEMS,
        (row for row in SOLVERS if row.name in ("newton", "anderson", "momentum")),
        (row for row in RULES if row.name in ("default", "jacobi_step", "exp_change")),
        strict=True,
    )
]


def what_is_met(cases: list[Case]) -> set[Any]:
    single = {part for case in cases for part in (case.solver, case.rule)}
    return single | {(case.problem, case.group) for case in cases}


def few_cases() -> list[Case]:
    """Return cases of the design that meet, together with `EAGER`, all that the design meets."""
    cases, missing = [], what_is_met(CASES) - what_is_met(EAGER)
    while missing:
        case = max(CASES, key=lambda case: len(missing & what_is_met([case])))  # the first of them
        cases.append(case)
        missing -= what_is_met([case])
    return cases


EVERYDAY = few_cases()


@pytest.mark.parametrize(
    "case",
    params([(case,) for case in CASES], lambda case: case in EVERYDAY, lambda case: case.id),
)
def test_transformations_under_jit(case):
    check(case, jax.jit(case.results)(Y, YS))


def test_what_is_met_every_day():
    everything = {*SOLVERS, *RULES, *itertools.product(PROBLEMS, GROUPS)}
    assert what_is_met([*EVERYDAY, *EAGER]) == everything


def test_the_design_covers_what_it_should():
    def met(*names):
        return {tuple(getattr(case, name) for name in names) for case in CASES}

    for problem in PROBLEMS:
        for row in (*SOLVERS, *RULES):
            name = "solver" if isinstance(row, SolverRow) else "rule"
            assert ((problem, row) in met("problem", name)) == fits(problem, row)
    for problem, solver in met("problem", "solver"):
        rules = {
            rule for (*pair, rule) in met("problem", "solver", "rule") if pair == [problem, solver]
        }
        assert len(rules) >= 2
    for group in GROUPS:
        assert {problem for problem, its in met("problem", "group") if its is group} == set(
            PROBLEMS
        )
        assert {rule for rule, its in met("rule", "group") if its is group} == set(RULES)
        assert {solver for solver, its in met("solver", "group") if its is group} == set(SOLVERS)


@pytest.mark.parametrize("case", EAGER, ids=lambda case: case.id)
def test_gradient_without_jit(case):
    solve = bx.solution_map(case.problem.problem, case.solver.solver, case.rule.make("reverse"))
    gradient = jax.grad(lambda y: outer(solve(X0, y), y))(Y)
    check(case, {"x": solve(X0, Y), "gradient": gradient})


def some_others(count: int) -> list[Case]:
    """Return cases of the whole product that the design does not have, chosen at random."""
    product = itertools.product(PROBLEMS, SOLVERS, RULES, GROUPS)
    others = [Case(*row) for row in product if fits(*row[:2]) and fits(row[0], row[2])]
    others = [case for case in others if case not in CASES]
    return random.Random(0).sample(others, count)


# Solver and rule meet in x alone, so that pairs are what can go wrong; threes are sampled.
@pytest.mark.slow
@pytest.mark.parametrize("case", some_others(48), ids=lambda case: case.id)
def test_others_of_the_whole_product(case):
    check(case, jax.jit(case.results)(Y, YS))


def central_differences(function, y, step):
    """Return the Jacobian of a function of flat vectors, with an error of order step^4."""

    def difference(direction):
        near = function(y + direction) - function(y - direction)
        far = function(y + 2 * direction) - function(y - 2 * direction)
        return (8 * near - far) / (12 * step)

    return np.stack([difference(direction) for direction in step * np.eye(y.size)], axis=-1)


# Gradients of the others are compared with differences in iterative/test_three_ways.py.
@pytest.mark.parametrize(
    "problem",
    params(zip(PROBLEMS, strict=True), lambda row: row.is_minimum, lambda row: row.name),
)
def test_truth_equals_central_differences(problem):
    """The truth solves F = 0, and its derivatives are those of its values."""
    flat, unravel = ravel_pytree(Y)
    size = ravel_pytree(X0)[0].size
    expected = truth(problem)

    def flatten(function):
        return jax.jit(lambda y: ravel_pytree(function(unravel(y)))[0])

    def compare(function, name, shape):
        # h^4 = 1e-12 times fifth derivatives, and rounding of 1e-16 / h.
        got = central_differences(flatten(function), flat, 1e-3).reshape(shape)
        np.testing.assert_allclose(got, by_columns(expected[name], shape), rtol=1e-9, atol=1e-9)

    residual = problem.optimality(expected["x"], Y)
    np.testing.assert_allclose(ravel_pytree(residual)[0], np.zeros(size), atol=1e-14)
    compare(lambda y: dense_solution(problem, y), "jacobian", (size, flat.size))
    compare(lambda y: dense_value(problem, y), "gradient", (1, flat.size))
    compare(jax.grad(lambda y: dense_value(problem, y)), "hessian", (flat.size, flat.size))
    direction = ravel_pytree(TANGENT)[0]
    np.testing.assert_allclose(
        ravel_pytree(expected["tangent"])[0],
        by_columns(expected["jacobian"], (size, flat.size)) @ direction,
        rtol=1e-12,
    )
    for name in ("x", "gradient"):  # the first lane is Y
        lane = jax.tree.map(lambda leaf: leaf[0], expected[name + "s"])
        np.testing.assert_allclose(
            ravel_pytree(lane)[0], ravel_pytree(expected[name])[0], rtol=1e-12
        )


def by_columns(derivative, shape):
    """Return a derivative with respect to y as a matrix, whose columns are the entries of y.

    A leaf of the output comes with one array per leaf of y, of shape (*output, *leaf of y).
    """
    sizes = [leaf.size for leaf in jax.tree.leaves(Y)]
    leaves = jax.tree.leaves(derivative)
    rows = [leaves[i : i + len(sizes)] for i in range(0, len(leaves), len(sizes))]
    blocks = [
        [np.reshape(leaf, (-1, columns)) for leaf, columns in zip(row, sizes, strict=True)]
        for row in rows
    ]
    return np.block(blocks).reshape(shape)


def test_gradient_of_the_objective_equals_central_differences():
    minimum = PROBLEMS[0]
    flat, unravel = ravel_pytree(X0)
    got = central_differences(
        lambda u: np.asarray(objective(unravel(u), Y)), np.asarray(flat), 1e-3
    )
    optimality = ravel_pytree(minimum.optimality(X0, Y))[0]
    np.testing.assert_allclose(got, optimality, rtol=1e-9, atol=1e-9)
