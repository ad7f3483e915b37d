"""What the tests of wrong arguments share."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx

X0, Y = np.zeros(2), np.ones(2)


def quadratic(x, y):
    return jnp.sum(y * x**2 / 2 - x)


def residual(x, y):
    return y * x - 1


def solve_map(problem=None, solver=None, rule=None, **options):
    problem = bx.minimum(quadratic) if problem is None else problem
    return bx.solution_map(
        problem, bx.GradientDescent(0.5) if solver is None else solver, rule, **options
    )


def engine(outer=lambda x, y: jnp.sum(x), problem=None, solver=None, rule=None, **options):
    problem = bx.minimum(quadratic) if problem is None else problem
    solver = bx.GradientDescent(0.5) if solver is None else solver
    return bx.value_and_hypergradient(outer, problem, solver, rule, **options)


def assert_fails(error, message, function, *arguments):
    with pytest.raises(error, match=re.escape(message)):
        function(*arguments)
