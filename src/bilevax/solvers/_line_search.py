"""Backtracking along a direction, with an acceptance test that survives rounding."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import _checks as checks
from bilevax import _mesh as mesh
from bilevax import _trees as trees
from bilevax._problems import Minimum, Problem
from bilevax.solvers._base import Iterate

PyTree = Any
_ROUNDING = 64  # rounding errors of f, F and x are at most that many times epsilon, mostly


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


class Evaluation(NamedTuple):
    """What the search needs of the problem at a point; value is 0 without an objective."""

    value: jax.Array
    optimality: PyTree


def evaluate(problem: Problem, x: PyTree, y: PyTree) -> tuple[Evaluation, jax.Array]:
    """Return value and optimality at a point, and the norm of the optimality."""
    if isinstance(problem, Minimum):
        value, optimality = problem.value_and_optimality(x, y)
    else:
        optimality = problem.optimality(x, y)
        value = jnp.zeros((), trees.dtype(x))
    return Evaluation(value, optimality), problem.norm(optimality)


def first_step_size(problem: Problem, x: PyTree, y: PyTree, optimality: PyTree) -> jax.Array:
    """Return the step size 1 / ||F_1 u||, u = F / ||F||, of a minimum.

    The gradient step of that size is right where the curvature is that along F, in any unit of f
    and x. Where there is none, it is as long as x, or of length one if x is zero.
    """
    size = trees.norm(optimality)
    unit = trees.scale(1 / jnp.where(size > 0, size, 1), optimality)
    # The transpose, for some objectives have no forward derivative; F_1 is symmetric.
    curvature = trees.norm(jax.vjp(lambda x: problem.optimality(x, y), x)[1](unit)[0])
    flat = longest_step(x) / jnp.where(size > 0, size, 1)
    return jnp.where(curvature > 0, 1 / jnp.where(curvature > 0, curvature, 1), flat)


def longest_step(x: PyTree) -> jax.Array:
    """Return the length of a step where nothing tells of one: ||x||, or one if that is zero."""
    length = trees.norm(x)
    return jnp.where(length > 0, length, 1)


def no_single_step(solver: str) -> TypeError:
    """Return the error for a single step from a solution, where rounding decides the search."""
    return TypeError(
        f"`OneStep` needs steps without a line search, which rounding decides at a solution; got "
        f"`{solver}`. Give a rate, or use `Newton()`."
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(6,))
def backtrack(
    options: Backtracking,
    problem: Problem,
    start: Iterate,
    y: PyTree,
    direction: PyTree,
    first_step: jax.Array,
    is_whole: bool = False,
) -> Iterate:
    """Search from `start` along `direction`; stalled at the start if no trial is accepted.

    The state of the iterate returned is its step size. How often the step was shrunk is a constant
    under differentiation: it is one, but for jumps. Where the first step is a whole one, as that of
    Newton's method, and as short as rounding errors of x, rounding decides how often it is shrunk,
    and the derivative is that of the whole step.
    """
    value, optimality = start.evaluation
    # The first trial has the size of x, where a direction and its step size may have any.
    move = trees.scale(first_step, direction)
    slope = trees.inner(optimality, move)
    epsilon, size = trees.epsilon(start.x), jnp.abs(value)
    rounding = _ROUNDING * epsilon

    def accepts(trial: Iterate) -> jax.Array:
        if not isinstance(problem, Minimum):
            part = options.decrease * trial.state * first_step
            return trial.residual <= (1 - part) * start.residual
        # Values tell nothing where the first-order change of f is below their rounding error. That
        # error can be far above eps |f|, for f may be a small difference of large terms.
        predicted = -trial.state * slope
        by_values = trial.evaluation.value <= value - options.decrease * predicted
        level = trial.evaluation.value <= value + epsilon**0.5 * size
        end_slope = trees.inner(trial.evaluation.optimality, move)
        by_slopes = level & (end_slope <= (2 * options.decrease - 1) * slope)
        # In the end rounding hides F too, and only a norm that keeps falling leads to a stop.
        falling = (predicted > rounding**2 * size) | (trial.residual < start.residual)
        accepted = ((predicted > rounding * size) & by_values) | (by_slopes & falling)
        return accepted & jnp.isfinite(trial.residual)

    def search(state: tuple[jax.Array, Iterate]) -> tuple[jax.Array, Iterate]:
        trials, last = state  # of which `state` is the part of the first step that is taken
        part = jnp.where(trials == 0, 1, last.state * options.contraction)
        x = trees.add_scaled(start.x, part, move)
        trial = Iterate(x, *evaluate(problem, x, y), part)
        return trials + 1, trial._replace(stalled=~accepts(trial))

    def proceed(state: tuple[jax.Array, Iterate]) -> jax.Array:
        trials, trial = state
        return trial.stalled & (trials < options.maxiter)

    nothing = start._replace(state=jnp.ones_like(first_step), stalled=jnp.ones((), bool))
    _, trial = mesh.while_loop(proceed, search, (jnp.zeros((), jnp.int32), nothing))
    trial = trial._replace(state=trial.state * first_step)
    back = start._replace(state=trial.state, stalled=trial.stalled)
    return trees.where(trial.stalled, back, trial)


@backtrack.defjvp
def _backtrack_jvp(is_whole: bool, primals: Any, tangents: Any) -> tuple[Iterate, Iterate]:
    _, problem, start, y, direction, first_step = primals
    _, *tangents = tangents
    found = backtrack(*primals, is_whole)
    stalled = trees.decided(found.stalled)
    # A search that rounding ends, at a solution, has the derivative of the step that it tried.
    is_tried = stalled
    if is_whole:
        length, size = trees.norm(trees.scale(first_step, direction)), trees.norm(start.x)
        is_tried = is_tried | (length <= _ROUNDING * trees.epsilon(start.x) * size)
    part = found.state / jnp.where(first_step == 0, 1, first_step)
    shrunk = trees.decided(jnp.where(is_tried, 1, part))

    def follow(
        problem: Problem, start: Iterate, y: PyTree, direction: PyTree, first_step: jax.Array
    ) -> Iterate:
        move = trees.scale(shrunk, trees.scale(first_step, direction))
        still = trees.scale(stalled, jax.lax.stop_gradient(move))
        x = jax.tree.map(lambda x, u, w: x + u - w, start.x, move, still)
        return Iterate(x, *evaluate(problem, x, y), shrunk * first_step, stalled)

    _, tangent = jax.jvp(follow, (problem, start, y, direction, first_step), tuple(tangents))
    return found, tangent
