"""What is left of a linear solver when only the exact solution will do."""

import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx

A = jnp.array([[4.0, 1.0, 0.0], [1.0, 3.0, 1.0], [0.0, 1.0, 2.0]])
B = jnp.array([1.0, -2.0, 0.5])
OPERATOR = bx.LinearOperator(lambda v: A @ v, bx.Structure.POSITIVE_DEFINITE, B)


@pytest.mark.parametrize(
    "solver",
    [
        bx.CG(rtol=0.3, maxiter=1, damping=5.0),
        bx.NormalCG(atol=1.0, maxiter=1, damping=5.0),
        bx.GMRES(rtol=0.3, atol=1.0, maxiter=0, damping=5.0),
        bx.BiCGStab(rtol=0.3, maxiter=1, damping=5.0),
        bx.Dense(damping=5.0),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_it_solves_exactly(solver):
    exact = np.linalg.solve(A, B)
    v, _ = bx.linear_solve(OPERATOR, B, solver)
    assert not np.allclose(v, exact, rtol=1e-2)
    v, report = bx.linear_solve(OPERATOR, B, solver.without_limits())
    np.testing.assert_allclose(v, exact, rtol=1e-9)
    assert report.status == bx.Status.CONVERGED


def test_what_serves_speed_stays():
    solver = bx.CG(rtol=0.1, preconditioner=lambda v: v / jnp.diag(A)).without_limits()
    assert solver.preconditioner is not None and solver.rtol is None
    assert bx.GMRES(restart=7).without_limits().restart == 7


def test_a_truncated_series_is_inexact_by_nature():
    assert bx.Neumann(steps=5).without_limits() is None
