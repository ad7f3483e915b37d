"""What gradients of a solution map do not reach, and need not: settings and starts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from tests.everyday import slow
from tests.solution_map.example import SOLVER, TARGET, H, Y, outer, truth

CALLABLES = {
    "Optax": lambda s: (bx.Optax(optax.sgd(0.4 * s)), None),
    "solver's preconditioner": lambda s: (
        bx.Newton(bx.CG(preconditioner=lambda v: v * s / np.diag(H))),
        None,
    ),
    "rule's preconditioner": lambda s: (
        SOLVER,
        bx.Implicit(bx.CG(preconditioner=lambda v: v * s / np.diag(H))),
    ),
    "rule's preconditioner, forward": lambda s: (
        SOLVER,
        bx.Implicit(bx.CG(preconditioner=lambda v: v * s / np.diag(H)), mode="forward"),
    ),
    "step": lambda s: (SOLVER, bx.Preconditioned(bx.Implicit(), lambda x, y, v: s * v / (2 + y))),
    "Jacobi": lambda s: (
        SOLVER,
        bx.Preconditioned(bx.Implicit(), bx.JacobiStep(lambda x, y: s * (2 + y))),
    ),
    "diagonal change": lambda s: (
        SOLVER,
        bx.Reparameterized(bx.Implicit(bx.Dense()), bx.DiagonalChange(lambda x, y: s * (2 + y))),
    ),
    "change": lambda s: (
        SOLVER,
        bx.Reparameterized(
            bx.Implicit(bx.Dense()),
            bx.ChangeOfVariables(lambda z, y: s * jnp.sinh(z), lambda x, y: jnp.arcsinh(x / s)),
        ),
    ),
    "change, forward": lambda s: (
        SOLVER,
        bx.Reparameterized(
            bx.Implicit(bx.Dense(), mode="forward"),
            bx.ChangeOfVariables(lambda z, y: s * jnp.sinh(z), lambda x, y: jnp.arcsinh(x / s)),
        ),
    ),
}


@pytest.mark.parametrize(
    ("name", "jit"),
    [*((name, True) for name in CALLABLES), slow("Optax", False), ("change, forward", False)],
)
def test_callables_of_solvers_and_rules_may_close_over_traced_values(name, jit):
    def h(y, target, s):
        return outer(y, target, *CALLABLES[name](s))

    gradient = jax.grad(h, (0, 1, 2))
    got_y, got_target, got_s = (jax.jit(gradient) if jit else gradient)(Y, TARGET, 0.9)
    _, want_y, want_target = truth()
    np.testing.assert_allclose(got_y, want_y, rtol=1e-10)
    np.testing.assert_allclose(got_target, want_target, rtol=1e-10)
    assert got_s == 0  # at the solution nothing depends on it


def test_callables_may_close_over_batched_values():
    def h(y, s):
        return outer(y, TARGET, *CALLABLES["Optax"](s)), outer(y, TARGET, *CALLABLES["Jacobi"](s))

    got = jax.jit(jax.vmap(jax.jacrev(h), in_axes=(None, 0)))(Y, jnp.array([0.5, 0.9, 1.1]))
    want = np.broadcast_to(truth()[1], (3, 2))
    np.testing.assert_allclose(got[0], want, rtol=1e-10)
    np.testing.assert_allclose(got[1], want, rtol=1e-10)


def numbers_from(y):
    return {
        "rate": 0.3 + 0.01 * jnp.sum(y),
        "rtol": 1e-13 * jnp.sum(y),
        "atol": 1e-14 * jnp.sum(y),
        "damping": 0.0 * jnp.sum(y),
    }


def outer_with_numbers(y, numbers):
    solver = bx.GradientDescent(numbers["rate"], numbers["rtol"], numbers["atol"])
    rule = bx.Implicit(bx.CG(numbers["rtol"], damping=numbers["damping"]))
    return outer(y, TARGET, solver, rule)


@pytest.mark.parametrize("jit", [False, True])
def test_numbers_of_solvers_and_rules_may_be_computed_from_y(jit):
    gradient = jax.grad(lambda y: outer_with_numbers(y, numbers_from(y)))
    got = (jax.jit(gradient) if jit else gradient)(Y)
    np.testing.assert_allclose(got, truth()[1], rtol=1e-10)


def test_gradients_with_respect_to_numbers_are_zero():
    got_y, got_numbers = jax.jit(jax.grad(outer_with_numbers, (0, 1)))(Y, numbers_from(Y))
    np.testing.assert_allclose(got_y, truth()[1], rtol=1e-10)
    assert got_numbers == {"rate": 0, "rtol": 0, "atol": 0, "damping": 0}


def test_numbers_computed_from_y_cost_no_further_loop():
    # A derivative of the rate or of a tolerance would take another solve, which is a loop.
    def loops(numbers):
        gradient = jax.grad(lambda y: outer_with_numbers(y, numbers(y)))
        return str(jax.make_jaxpr(gradient)(Y)).count("while[")

    constants = jax.tree.map(float, numbers_from(Y))
    # The solve, the scaling of the adjoint system, and its solution.
    assert loops(numbers_from) == loops(lambda y: constants) == 3


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_the_gradient_with_respect_to_the_start_is_zero(mode):
    problem = bx.minimum(lambda x, y: jnp.sum(y * x["a"] ** 2 - x["a"]) + (x["b"] - 1) ** 2)
    solve = bx.solution_map(problem, SOLVER, bx.Implicit(mode=mode))

    def h(x0, y):
        x = solve(x0, y)
        return jnp.sum(x["a"]) + x["b"]

    x0, y = {"a": jnp.array([1.0, 2.0]), "b": 3.0}, jnp.array([0.5, 1.0])
    got_x0, got_y = jax.jit(jax.grad(h, (0, 1)))(x0, y)
    np.testing.assert_array_equal(got_x0["a"], np.zeros(2))
    assert got_x0["b"] == 0
    np.testing.assert_allclose(got_y, -1 / (2 * np.asarray(y) ** 2), rtol=1e-10)
