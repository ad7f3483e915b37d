"""Derivatives of runs do not depend on how a compiler arranges their arithmetic.

Near a solution F is a rounding error, and its last bits depend on which products and sums are
contracted into one instruction. What a step decides there is decided once.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from tests.everyday import slow

SETTINGS = {
    "in a hurry": {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
    "with care": {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False},
}
YS = np.random.default_rng(0).uniform(0.2, 5.0, 500)
# name: (f, dx*/dy)
OBJECTIVES = {
    "quadratic": (lambda x, y: y * x**2 / 2 - x, lambda y: -1 / y**2),
    "exponential": (lambda x, y: jnp.exp(x) - y * x, lambda y: 1 / y),
}
# No precision allows such a tolerance: all runs end where rounding decides.
TOO_TIGHT = {"rtol": 1e-16, "atol": 0.0}


def in_one_batch(function):
    return jax.vmap(function)


def one_by_one(function):
    return lambda ys: jax.lax.map(function, ys)


SOLVERS = {
    "Newton with a dense solver": bx.Newton(bx.Dense(), **TOO_TIGHT),
    "Newton": bx.Newton(**TOO_TIGHT),
    "conjugate gradients": bx.ConjugateGradient(maxiter=50, **TOO_TIGHT),
}
ROWS = [
    ("quadratic", "Newton with a dense solver", bx.Unrolled(1), in_one_batch),
    ("exponential", "Newton with a dense solver", bx.Unrolled(1), one_by_one),
    *(
        slow(objective, name, rule, arrange)
        for name, rule in [
            ("Newton", bx.Unrolled(2)),
            ("Newton", bx.Unrolled(checkpoints=3)),
            ("conjugate gradients", bx.Unrolled()),
        ]
        for objective in OBJECTIVES
        for arrange in (in_one_batch, one_by_one)
    ),
]


@pytest.mark.parametrize(("objective", "solver", "rule", "arrange"), ROWS)
def test_at_a_solution_no_derivative_depends_on_rounding(objective, solver, rule, arrange):
    """The solver is at a tolerance that rounding does not allow.

    The last step that is no rounding error is shorter than the root of eps, 2e-8, for the error
    after it is of the order of its square. The derivative at its start is wrong by as much, times
    f''' / f'' = 1.
    """
    f, exact = OBJECTIVES[objective]
    solve = bx.solution_map(bx.minimum(f), SOLVERS[solver], rule)
    program = jax.jit(arrange(jax.grad(lambda y: solve(0.1, y)))).lower(YS)
    for name, options in SETTINGS.items():
        derivative = program.compile(compiler_options=options)(YS)
        np.testing.assert_allclose(derivative, exact(YS), rtol=1e-6, err_msg=name)
