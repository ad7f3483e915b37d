"""First-order solvers: gradient descent and its accelerated form."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._problems import Problem
from bilevax.solvers import _base as base
from bilevax.solvers._line_search import Backtracking, Point, backtrack, evaluate

PyTree = Any


class _SearchState(NamedTuple):
    value: jax.Array
    optimality: PyTree
    step_size: jax.Array


@trees.register
@dataclasses.dataclass(frozen=True)
class GradientDescent(base.Solver):
    """Gradient descent: x <- x - learning_rate * F(x, y).

    With a constant rate it also solves roots and fixed points whose F_1 is positive. With
    `Backtracking()` each step tries twice the last accepted rate and shrinks it; that needs
    `minimum(...)`.

    Args:
      learning_rate: a positive number, or `Backtracking(...)`. For an objective with largest
        curvature L, any rate below 2 / L converges and 1 / L is the usual choice.
      rtol: stop at ||F(x, y)|| <= max(rtol ||F(x0, y)||, atol).
      atol: see `rtol`; in the unit of F. None is the rounding error of F, see `Solver`.
      maxiter: steps at most.

    Raises:
      ValueError: for a rate that is not positive, a negative tolerance or a negative `maxiter`.

    Example:
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: 0.5 * (x - y) ** 2)
      >>> solve = bx.solution_map(problem, solver=bx.GradientDescent(0.5))
      >>> round(float(solve(0.0, 3.0)), 4)
      3.0

    Source:
      A.-L. Cauchy, "Methode generale pour la resolution des systemes d'equations simultanees",
      1847.
    """

    learning_rate: Any
    rtol: Any = None
    atol: Any = None
    maxiter: Any = 10_000

    def __post_init__(self) -> None:
        base.check_stopping(self)
        checks.positive("learning_rate", self.learning_rate)

    def init(self, problem: Problem, x: PyTree, y: PyTree) -> base.Iterate:
        if not isinstance(self.learning_rate, Backtracking):
            optimality = problem.optimality(x, y)
            return base.Iterate(x, trees.norm(optimality), optimality)
        point = evaluate(base.require_minimum(problem, "Backtracking"), x, y)
        # No step is known to be good yet: start from a move of unit length, or less.
        step_size = 0.5 / jnp.maximum(point.norm, 1)
        state = _SearchState(point.value, point.optimality, step_size)
        return base.Iterate(x, point.norm, state, False)

    def step(self, problem: Problem, iterate: base.Iterate, y: PyTree) -> base.Iterate:
        if not isinstance(self.learning_rate, Backtracking):
            x = trees.add_scaled(iterate.x, -jnp.asarray(self.learning_rate), iterate.state)
            optimality = problem.optimality(x, y)
            return base.Iterate(x, trees.norm(optimality), optimality)
        state = iterate.state
        start = Point(iterate.x, state.value, state.optimality, iterate.residual)
        direction = trees.negative(state.optimality)
        trial = backtrack(self.learning_rate, problem, start, y, direction, 2 * state.step_size)
        point = trial.point
        state = _SearchState(point.value, point.optimality, trial.step_size)
        return base.Iterate(point.x, point.norm, state, ~trial.accepted)


class _Momentum(NamedTuple):
    optimality: PyTree
    previous: PyTree  # the last gradient step, before extrapolation
    weight: jax.Array  # Nesterov's t


@trees.register
@dataclasses.dataclass(frozen=True)
class AcceleratedGradient(base.Solver):
    """Nesterov's accelerated gradient with adaptive restart.

        w' = x - learning_rate * F(x, y),   x' = w' + (t - 1) / t' (w' - w),
        t' = (1 + sqrt(1 + 4 t^2)) / 2

    Momentum is dropped (t = 1) whenever it points uphill: <F(x, y), w' - w> > 0. The iterate x is
    the extrapolated point, where F is known. On roots and fixed points it needs F_1 near
    symmetric positive definite.

    Args:
      learning_rate: a positive number, at most 1 / L for largest curvature L.
      rtol: stop at ||F(x, y)|| <= max(rtol ||F(x0, y)||, atol).
      atol: see `rtol`; in the unit of F. None is the rounding error of F, see `Solver`.
      maxiter: steps at most.

    Raises:
      ValueError: for a rate that is not positive, a negative tolerance or a negative `maxiter`.

    Example:
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: 0.5 * (x - y) ** 2)
      >>> solve = bx.solution_map(problem, solver=bx.AcceleratedGradient(0.5))
      >>> round(float(solve(0.0, 3.0)), 4)
      3.0

    Source:
      Y. Nesterov, "A Method for Solving the Convex Programming Problem with Convergence Rate
      O(1/k^2)", 1983; B. O'Donoghue and E. Candes, "Adaptive Restart for Accelerated Gradient
      Schemes", 2015.
    """

    learning_rate: Any
    rtol: Any = None
    atol: Any = None
    maxiter: Any = 10_000

    def __post_init__(self) -> None:
        base.check_stopping(self)
        checks.positive("learning_rate", self.learning_rate)

    def init(self, problem: Problem, x: PyTree, y: PyTree) -> base.Iterate:
        optimality, weight = problem.optimality(x, y), jnp.ones((), trees.dtype(x))
        return base.Iterate(x, trees.norm(optimality), _Momentum(optimality, x, weight))

    def step(self, problem: Problem, iterate: base.Iterate, y: PyTree) -> base.Iterate:
        state = iterate.state
        step_size = -jnp.asarray(self.learning_rate)
        gradient_step = trees.add_scaled(iterate.x, step_size, state.optimality)
        move = trees.add_scaled(gradient_step, -1, state.previous)
        weight = jnp.where(trees.inner(state.optimality, move) > 0, 1, state.weight)
        next_weight = (1 + jnp.sqrt(1 + 4 * weight**2)) / 2
        x = trees.add_scaled(gradient_step, (weight - 1) / next_weight, move)
        optimality = problem.optimality(x, y)
        state = _Momentum(optimality, gradient_step, next_weight)
        return base.Iterate(x, trees.norm(optimality), state)
