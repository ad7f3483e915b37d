"""The rows of the table test: small nonlinear problems on pytrees, solvers, rules; and dense truth.

A new row in one of the three lists is crossed with everything it fits.

x = {"a": (2,), "b": (1, 1)} has 3 entries, y = ({"gain": (2,), "shift": ()}, (1,)) has 4. All maps
F have a Jacobian F_1 within 0.4 of the identity at the solution, so that every solver and every
linear solver of the tables converges fast.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

import bilevax as bx

PyTree = Any

X0 = {"a": jnp.array([0.9, -1.1]), "b": jnp.array([[0.8]])}
Y = ({"gain": jnp.array([0.4, -0.7]), "shift": jnp.array(0.3)}, jnp.array([0.6]))
# Three lanes, of which the first is Y.
YS = jax.tree.map(
    lambda leaf, step: jnp.stack([leaf, leaf + step, leaf - 2 * step]),
    Y,
    ({"gain": jnp.array([0.2, 0.1]), "shift": jnp.array(-0.15)}, jnp.array([0.1])),
)
TANGENT = ({"gain": jnp.array([0.5, 1.0]), "shift": jnp.array(-0.8)}, jnp.array([0.7]))

_SYMMETRIC = jnp.array([[0.6, -0.3, 0.2], [-0.3, 0.5, 0.4], [0.2, 0.4, -0.7]])
_SKEWED = jnp.array([[0.4, 0.5, -0.3], [-0.6, 0.3, 0.4], [0.2, -0.5, 0.5]])
_CENTRE = jnp.array([1.0, -1.2, 0.7])


def _flat_x(x: PyTree) -> jax.Array:
    return jnp.concatenate([x["a"], x["b"].reshape(1)])


def _like_x(u: jax.Array) -> PyTree:
    return {"a": u[:2], "b": u[2:].reshape(1, 1)}


def _drive(y: PyTree) -> jax.Array:
    """Return a vector that depends on all of y nonlinearly."""
    first, second = y
    gain, shift = first["gain"], first["shift"]
    return jnp.concatenate([jnp.tanh(gain) * shift, jnp.exp(0.5 * second) * gain[:1]]) * 0.3


def objective(x: PyTree, y: PyTree) -> jax.Array:
    u = _flat_x(x)
    first, second = y
    bend = _SYMMETRIC @ u + first["shift"] * first["gain"][0]
    return (
        0.5 * jnp.sum((u - _CENTRE - _drive(y)) ** 2)
        + 0.2 * jnp.sum(jnp.log(jnp.cosh(bend)))
        + 0.1 * jnp.exp(second[0]) * jnp.sum(jnp.sin(u + first["gain"][1]))
    )


def residual(x: PyTree, y: PyTree) -> PyTree:
    u = _flat_x(x)
    first, second = y
    bend = jnp.tanh(_SKEWED @ u * jnp.exp(0.3 * first["gain"][0]) + first["shift"])
    return _like_x(u - _CENTRE - _drive(y) + 0.3 * bend + 0.05 * second[0] * u**2)


def equilibrium(x: PyTree, y: PyTree) -> PyTree:
    u = _flat_x(x)
    first, second = y
    bend = jnp.tanh(_SKEWED @ u + first["gain"][1] * u[::-1])
    return _like_x(_CENTRE + _drive(y) - 0.25 * bend + 0.1 * jnp.cos(second[0] * u))


def outer(x: PyTree, y: PyTree) -> jax.Array:
    """Return g(x, y), a scalar that depends on both arguments nonlinearly."""
    first, second = y
    weights = jnp.array([1.0, -0.5])
    return (
        jnp.sum(weights * jnp.sin(x["a"])) * (1 + second[0])
        + 0.5 * jnp.sum(x["b"] ** 2) * first["shift"]
        + jnp.sum(first["gain"] ** 2) * x["a"][0]
    )


@dataclasses.dataclass(frozen=True)
class ProblemRow:
    name: str
    problem: bx.Problem
    optimality: Callable[[PyTree, PyTree], PyTree]  # F, written out here

    @property
    def is_minimum(self) -> bool:
        return self.name == "minimum"


PROBLEMS = [
    ProblemRow("minimum", bx.minimum(objective), jax.grad(objective)),
    ProblemRow("root", bx.root(residual), residual),
    ProblemRow(
        "fixed_point",
        bx.fixed_point(equilibrium),
        lambda x, y: jax.tree.map(jnp.subtract, x, equilibrium(x, y)),
    ),
]


@dataclasses.dataclass(frozen=True)
class SolverRow:
    name: str
    solver: bx.Solver
    minimum_only: bool = False


SOLVERS = [
    SolverRow("gradient_descent", bx.GradientDescent(0.8)),
    SolverRow("backtracking", bx.GradientDescent(bx.Backtracking()), minimum_only=True),
    SolverRow("accelerated", bx.AcceleratedGradient(0.6)),
    SolverRow("newton", bx.Newton()),
    SolverRow("newton_dense", bx.Newton(bx.Dense())),
    SolverRow("conjugate_gradient", bx.ConjugateGradient(), minimum_only=True),
    SolverRow("damped_picard", bx.FixedPointIteration(0.8)),
    SolverRow("anderson", bx.FixedPointIteration(memory=2)),
    SolverRow("momentum", bx.Optax(optax.sgd(0.7, momentum=0.2))),
    SolverRow("lbfgs", bx.Optax(optax.lbfgs()), minimum_only=True),
]


@dataclasses.dataclass(frozen=True)
class RuleRow:
    name: str
    make: Callable[[str], bx.Rule]  # of the mode
    minimum_only: bool = False


def _implicit(linear_solver: bx.LinearSolver | None) -> Callable[[str], bx.Rule]:
    return lambda mode: bx.Implicit(linear_solver, mode)


def _preconditioned(step: Any) -> Callable[[str], bx.Rule]:
    return lambda mode: bx.Preconditioned(bx.Implicit(mode=mode), step=step)


def _reparameterized(
    change: bx.Change, linear_solver: bx.LinearSolver | None = None
) -> Callable[[str], bx.Rule]:
    return lambda mode: bx.Reparameterized(bx.Implicit(linear_solver, mode), change=change)


def _scale(y: PyTree) -> jax.Array:
    return jnp.exp(0.2 * y[1][0] - 0.1 * y[0]["shift"])


# z is a flat vector here: a change may also change the structure.
_SINH = bx.ChangeOfVariables(
    lambda z, y: _like_x(_scale(y) * jnp.sinh(z)),
    lambda x, y: jnp.arcsinh(_flat_x(x) / _scale(y)),
)


def _damp(x: PyTree, y: PyTree, v: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: 0.8 * leaf * jnp.exp(0.1 * y[1][0]), v)


RULES = [
    RuleRow("default", _implicit(None)),
    RuleRow("cg", _implicit(bx.CG()), minimum_only=True),
    RuleRow("gmres", _implicit(bx.GMRES())),
    RuleRow("dense", _implicit(bx.Dense())),
    RuleRow("normal_cg", _implicit(bx.NormalCG())),
    RuleRow("bicgstab", _implicit(bx.BiCGStab())),
    # ||I - 0.8 F_1|| < 0.4 at the solutions, and 0.4^40 = 1e-16.
    RuleRow("neumann", _implicit(bx.Neumann(40, step_size=0.8))),
    RuleRow("newton_step", _preconditioned(bx.NewtonStep())),
    RuleRow("jacobi_step", _preconditioned(bx.JacobiStep())),
    RuleRow("gradient_step", _preconditioned(bx.GradientStep(0.7))),
    RuleRow("custom_step", _preconditioned(_damp)),
    RuleRow("exp_change", _reparameterized(bx.ExpChange())),
    RuleRow("diagonal_change", _reparameterized(bx.DiagonalChange())),
    RuleRow("sinh_change", _reparameterized(_SINH, bx.Dense())),
    RuleRow(
        "step_of_change",
        lambda mode: bx.Preconditioned(
            bx.Reparameterized(bx.Implicit(mode=mode), change=_SINH), step=bx.NewtonStep()
        ),
    ),
    RuleRow(
        "change_of_step",
        lambda mode: bx.Reparameterized(
            bx.Preconditioned(bx.Implicit(mode=mode), step=bx.NewtonStep()), change=bx.ExpChange()
        ),
    ),
]


def fits(problem: ProblemRow, row: SolverRow | RuleRow) -> bool:
    return problem.is_minimum or not row.minimum_only


# The truth, with nothing but F, dense Jacobians and dense solves.


def dense_solution(row: ProblemRow, y: PyTree) -> PyTree:
    """Return x*(y), such that JAX can differentiate it twice.

    Newton's method, unrolled. A differentiated Newton step at a solution turns k right orders of
    derivatives into 2 k + 1; the first steps, which only find the point, are held constant.
    """
    flat, unravel = ravel_pytree(X0)

    def optimality(u: jax.Array) -> jax.Array:
        return ravel_pytree(row.optimality(unravel(u), y))[0]

    def step(u: jax.Array) -> jax.Array:
        return u - jnp.linalg.solve(jax.jacfwd(optimality)(u), optimality(u))

    found = jax.lax.stop_gradient(jax.lax.fori_loop(0, 12, lambda _, u: step(u), flat))
    return unravel(step(step(found)))


def dense_value(row: ProblemRow, y: PyTree) -> jax.Array:
    """Return h(y) = g(x*(y), y)."""
    return outer(dense_solution(row, y), y)


@functools.cache
def truth(row: ProblemRow) -> dict[str, PyTree]:
    """Return everything that the table test compares with, by name."""

    def solution(y: PyTree) -> PyTree:
        return dense_solution(row, y)

    def value(y: PyTree) -> jax.Array:
        return dense_value(row, y)

    @jax.jit
    def everything(y: PyTree, ys: PyTree) -> dict[str, PyTree]:
        return {
            "x": solution(y),
            "value": value(y),
            "gradient": jax.grad(value)(y),
            "jacobian": jax.jacfwd(solution)(y),
            "tangent": jax.jvp(solution, (y,), (TANGENT,))[1],
            "hessian": jax.jacfwd(jax.grad(value))(y),
            "xs": jax.vmap(solution)(ys),
            "gradients": jax.vmap(jax.grad(value))(ys),
        }

    return everything(Y, YS)
