"""Backtracking along a direction, with an acceptance test that survives rounding."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._problems import Minimum, Problem

PyTree = Any


@trees.register
@dataclasses.dataclass(frozen=True)
class Backtracking:
    """Shrink a step until it brings enough: f(x + t d) <= f(x) + decrease * t <F, d>.

    Near a minimum the decrease of f drowns in its rounding error long before the gradient is
    small. There, where f changes by less than sqrt(eps) |f|, the decrease is judged by the slopes
    at both ends, t (<F(x), d> + <F(x + t d), d>) / 2, which is exact on a quadratic. For
    problems without an objective the test is ||F(x + t d)|| <= (1 - decrease * t) ||F(x)||.

    Args:
      decrease: the part of the predicted decrease that is asked for, in (0, 1/2).
      contraction: factor between trials, in (0, 1).
      maxiter: trials at most; a search without success stalls the solver.

    Raises:
      ValueError: for a number outside of its range.

    Example:
      >>> import bilevax as bx
      >>> solver = bx.GradientDescent(bx.Backtracking())

    Source:
      L. Armijo, "Minimization of Functions Having Lipschitz Continuous First Partial
      Derivatives", 1966; the test by slopes: W. Hager and H. Zhang, "A New Conjugate Gradient
      Method with Guaranteed Descent and an Efficient Line Search", 2005.
    """

    decrease: Any = 1e-4
    _: dataclasses.KW_ONLY
    contraction: Any = 0.5
    maxiter: Any = 40

    def __post_init__(self) -> None:
        checks.positive("decrease", self.decrease)
        checks.positive("contraction", self.contraction)
        checks.positive("maxiter", self.maxiter, whole=True)
        for name, bound in (("decrease", 0.5), ("contraction", 1)):
            value = getattr(self, name)
            if isinstance(value, int | float) and not value < bound:
                raise ValueError(f"`{name}` must be below {bound}, got {value!r}.")


class Point(NamedTuple):
    """A point with all that the search needs to know of it; value is 0 without an objective."""

    x: PyTree
    value: jax.Array
    optimality: PyTree
    norm: jax.Array


class Trial(NamedTuple):
    """A point of the search, the step that led to it, and whether it passes the test."""

    point: Point
    step_size: jax.Array
    accepted: jax.Array


def evaluate(problem: Problem, x: PyTree, y: PyTree) -> Point:
    """Return a point with value and optimality."""
    if isinstance(problem, Minimum):
        value, optimality = problem.value_and_optimality(x, y)
    else:
        optimality = problem.optimality(x, y)
        value = jnp.zeros((), trees.dtype(x))
    return Point(x, value, optimality, trees.norm(optimality))


def backtrack(
    options: Backtracking,
    problem: Problem,
    start: Point,
    y: PyTree,
    direction: PyTree,
    first_step: Any,
) -> Trial:
    """Search from `start` along `direction`; the start itself if no trial is accepted."""
    slope = trees.inner(start.optimality, direction)
    epsilon, size = trees.epsilon(start.x), jnp.abs(start.value)
    rounding = 64 * epsilon
    first_step = jnp.asarray(first_step, start.norm.dtype)

    def accepts(point: Point, step_size: jax.Array) -> jax.Array:
        if not isinstance(problem, Minimum):
            return point.norm <= (1 - options.decrease * step_size) * start.norm
        # Values tell nothing where the first-order change of f is below their rounding error. That
        # error can be far above eps |f|, for f may be a small difference of large terms.
        predicted = -step_size * slope
        by_values = point.value <= start.value - options.decrease * predicted
        level = point.value <= start.value + epsilon**0.5 * size
        end_slope = trees.inner(point.optimality, direction)
        by_slopes = level & (end_slope <= (2 * options.decrease - 1) * slope)
        # In the end rounding hides F too, and only a norm that keeps falling leads to a stop.
        falling = (predicted > rounding**2 * size) | (point.norm < start.norm)
        accepted = ((predicted > rounding * size) & by_values) | (by_slopes & falling)
        return accepted & jnp.isfinite(point.norm)

    def search(state: tuple[jax.Array, Trial]) -> tuple[jax.Array, Trial]:
        trials, trial = state
        step_size = jnp.where(trials == 0, first_step, trial.step_size * options.contraction)
        point = evaluate(problem, trees.add_scaled(start.x, step_size, direction), y)
        return trials + 1, Trial(point, step_size, accepts(point, step_size))

    def proceed(state: tuple[jax.Array, Trial]) -> jax.Array:
        trials, trial = state
        return ~trial.accepted & (trials < options.maxiter)

    nothing = (jnp.zeros((), jnp.int32), Trial(start, first_step, jnp.zeros((), bool)))
    _, trial = jax.lax.while_loop(proceed, search, nothing)
    return trial._replace(point=trees.where(trial.accepted, trial.point, start))
