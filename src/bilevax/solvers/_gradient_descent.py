"""First-order solvers: gradient descent and its accelerated form."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._problems import Problem
from bilevax.solvers import _base as base
from bilevax.solvers._line_search import (
    Backtracking,
    backtrack,
    evaluate,
    first_step_size,
    no_single_step,
)

PyTree = Any


@trees.register
@dataclasses.dataclass(frozen=True)
class GradientDescent(base.Solver):
    """Gradient descent: x <- x - learning_rate * F(x, y).

    With a constant rate it also solves roots and fixed points whose F_1 is positive. With
    `Backtracking()` each step tries twice the last accepted rate and shrinks it, and the first one
    what the curvature along F suggests; that needs `minimum(...)`.

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

    def evaluate(self, problem: Problem, x: PyTree, y: PyTree) -> tuple[PyTree, jax.Array]:
        if not isinstance(self.learning_rate, Backtracking):
            return super().evaluate(problem, x, y)
        return evaluate(base.require_minimum(problem, "Backtracking"), x, y)

    def init(self, problem: Problem, x: PyTree, y: PyTree) -> base.Iterate:
        evaluation, norm = self.evaluate(problem, x, y)
        if not isinstance(self.learning_rate, Backtracking):
            return base.Iterate(x, evaluation, norm)
        # The first trial is twice that.
        step_size = 0.5 * first_step_size(problem, x, y, evaluation.optimality)
        return base.Iterate(x, evaluation, norm, step_size, jnp.zeros((), bool))

    def one_step(self, problem: Problem, x: PyTree, y: PyTree) -> PyTree:
        if isinstance(self.learning_rate, Backtracking):
            raise no_single_step("GradientDescent(Backtracking())")
        return super().one_step(problem, x, y)

    def step(self, problem: Problem, iterate: base.Iterate, y: PyTree) -> base.Iterate:
        if not isinstance(self.learning_rate, Backtracking):
            x = trees.add_scaled(iterate.x, -jnp.asarray(self.learning_rate), iterate.evaluation)
            return base.Iterate(x, *self.evaluate(problem, x, y))
        direction = trees.negative(iterate.evaluation.optimality)
        return backtrack(self.learning_rate, problem, iterate, y, direction, 2 * iterate.state)


class _Momentum(NamedTuple):
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
        momentum = _Momentum(x, jnp.ones((), trees.dtype(x)))
        return base.Iterate(x, *self.evaluate(problem, x, y), momentum)

    def step(self, problem: Problem, iterate: base.Iterate, y: PyTree) -> base.Iterate:
        optimality, state = iterate.evaluation, iterate.state
        step_size = -jnp.asarray(self.learning_rate)
        gradient_step = trees.add_scaled(iterate.x, step_size, optimality)
        move = trees.add_scaled(gradient_step, -1, state.previous)
        size = jnp.where(iterate.residual > 0, iterate.residual, 1)
        uphill = trees.decided(trees.inner(trees.scale(1 / size, optimality), move) > 0)
        weight = jnp.where(uphill, 1, state.weight)
        next_weight = (1 + jnp.sqrt(1 + 4 * weight**2)) / 2
        x = trees.add_scaled(gradient_step, (weight - 1) / next_weight, move)
        momentum = _Momentum(gradient_step, next_weight)
        return base.Iterate(x, *self.evaluate(problem, x, y), momentum)
