"""The table test: problems x solvers x rules x transformations, against dense truth.

The rows are in `problems_table.py`; a new row in a list there is crossed with all others. To compile
the whole product takes most of an hour, so the everyday run is a covering design: every problem
meets every rule and, with two rules each, every solver; and each of the three meets every group of
transformations. The product itself is marked slow.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
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

# Inner and linear solves stop at a relative residual of eps^(3/4) = 1.8e-12 by default. With
# ||F_1^{-1}|| < 1.6 and ||F(x0, y)|| < 1, x is within 3e-12 of x*. A Hessian takes four solves, each
# with data that are off by that much; derivatives of the maps in the table are below 5.
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
    """Return the everyday cases.

    The groups shift by one from rule to rule and from problem to problem, and the number of solvers
    of a problem is no multiple of three, so that rules, problems and solvers meet all groups.
    """
    cases = []
    for number, problem in enumerate(PROBLEMS):
        solvers = [row for row in SOLVERS if fits(problem, row)]
        rows = [
            (rule, GROUPS[(number + index) % 3])
            for index, rule in enumerate(RULES)
            if fits(problem, rule)
        ]
        # A rule for minima only meets the two other groups there.
        rows += [
            (rule, group)
            for (rule, taken), group in itertools.product(rows, GROUPS)
            if rule.minimum_only and group is not taken
        ]
        # Every solver meets two rules.
        spare = [(rule, GROUPS[(number + index + 1) % 3]) for index, rule in enumerate(RULES)]
        rows += spare[: max(0, 2 * len(solvers) - len(rows))]
        cases += [
            Case(problem, solvers[index % len(solvers)], rule, group)
            for index, (rule, group) in enumerate(rows)
        ]
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


def _supported(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options, or none where this version of XLA does not know them."""
    try:
        jax.jit(jnp.negative, compiler_options=options).lower(1.0).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options


# Every case runs once, on vectors of three entries: time goes into compiling alone, and this takes a
# third of it.
QUICK_TO_COMPILE = _supported(
    {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
        "xla_cpu_use_fusion_emitters": False,
    }
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_transformations_under_jit(case):
    compiled = jax.jit(case.results, compiler_options=QUICK_TO_COMPILE)
    check(case, compiled(Y, YS))
