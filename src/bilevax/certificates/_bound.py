"""Proven bounds of the error of a hypergradient, and of the value, from known constants."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax.tree
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax import _mesh as mesh
from bilevax import _trees as trees
from bilevax._estimator import checked_point
from bilevax._problems import Problem
from bilevax.certificates._constants import BoundConstants, checked_constants
from bilevax.linear import LinearSolver, linear_solve
from bilevax.rules import Implicit, Rule, Settings, resolve_linear_solver

PyTree = Any

# Newton steps go on while their decrements fall by this factor, so many at most.
_CONTRACTION, _MAX_NEWTON_STEPS = 0.25, 6


class HypergradientBound(NamedTuple):
    """What is proven of a hypergradient Omega(x, y) and a value; infinite where nothing is.

    Attributes:
      absolute: ||Omega - dh/dy|| is at most this, in the unit of the hypergradient; the sum of the
        next four.
      measured: how far Omega is from a better estimate, at a point x' with an adjoint v'.
      inner: what the error of x' adds at most.
      adjoint: what the error of v' adds at most.
      rounding: what rounding adds at most.
      distance: ||x' - x*|| is at most this, in the norm of `BoundConstants`.
      value: |g(x, y) - h(y)| is at most this.
      corrected_value: g(x', y) - <v', F(x', y)>, whose error is of second order.
      corrected: |corrected_value - h(y)| is at most this.
    """

    absolute: jax.Array
    measured: jax.Array
    inner: jax.Array
    adjoint: jax.Array
    rounding: jax.Array
    distance: jax.Array
    value: jax.Array
    corrected_value: jax.Array
    corrected: jax.Array


def hypergradient_bound(
    outer: Callable[[PyTree, PyTree], jax.Array],
    problem: Problem,
    rule: Rule,
    x: PyTree,
    y: PyTree,
    constants: BoundConstants | Callable[[PyTree, PyTree], BoundConstants],
    *,
    adjoint: PyTree | None = None,
) -> HypergradientBound:
    """Bound the error of a rule's hypergradient at (x, y), without knowing x*: a proof.

        ||Omega - dh/dy||  <=  ||Omega - Omega'|| + a e + b (||r||_* + (c + d ||v||) e)

    where e = ||F||_*, r = g_1 - F_1^T v, a = `outer_y` + `mixed_change` ||v||, b = `mixed` +
    `mixed_change` e, c = `outer_x`, d = `jacobian`, and Omega' = g_2 - F_2^T v, plus what rounding
    adds; see `BoundConstants` for the norms. It holds at any x and v. At those of the rule Omega'
    is Omega, and the rest is loose, the more so the worse the problem is conditioned; a few Newton
    steps further it is small, and the first term, which is measured, is the error. The smaller one
    of the two bounds is returned. It costs a few accurate linear solves.

    Args:
      outer: g, a function of (x, y) that returns a real scalar.
      problem: the inner problem; F must be strongly monotone in x.
      rule: whose hypergradient is judged. One that is not -F_2^T v with F_1^T v near g_1, as a
        `Reparameterized` one, is compared with one that is, which takes an adjoint solve.
      x: the inexact inner solution, before any correction, a pytree of floating arrays.
      y: the outer variable.
      constants: a function of (x, y) that returns the `BoundConstants` of a point, such as
        `BoundConstants.ridge(train, validation)`; or a `BoundConstants` that holds for all x.
      adjoint: a first guess of v, from a `RuleReport` or a `WarmStart`.

    Returns:
      A `HypergradientBound`.

    Raises:
      TypeError: if `outer` does not return a scalar, the problem does not fit x, y has no floating
        entries, or `constants` is neither of the two.

    Example:
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: 0.5 * y * x**2 - x)  # x*(y) = 1 / y
      >>> outer = lambda x, y: x**2  # so dh/dy = -2 / y^3, and Omega(x, y) = -2 x^2 / y
      >>> def constants(x, y):  # F = y x - 1, F_1 = y, F_2 = x
      ...     return bx.BoundConstants(
      ...         strong_convexity=y,
      ...         jacobian=0.0,
      ...         mixed=abs(x) / y**0.5,
      ...         mixed_change=1 / y,
      ...         outer_x=2 / y,
      ...         outer_y=0.0,
      ...         smoothness=1.0,
      ...         optimality_terms=2.0,
      ...         outer_terms=1.0,
      ...         roundings=3,
      ...     )
      >>> bound = bx.hypergradient_bound(outer, problem, bx.Implicit(), 0.6, 2.0, constants)
      >>> true = abs(-2 * 0.6**2 / 2.0 + 0.25)
      >>> round(true, 3), round(float(bound.absolute), 3)
      (0.11, 0.11)

    Source:
      M. J. Ehrhardt, L. Roberts, "Analyzing Inexact Hypergradients for Bilevel Learning", 2024.
    """
    function, x, y = checked_point(outer, problem, rule, x, y)
    constants = checked_constants(constants)
    if adjoint is not None and trees.dimension(trees.as_arrays(adjoint)) != trees.dimension(x):
        raise TypeError(
            f"`adjoint` must have as many entries as `x`, {trees.dimension(x)}; "
            f"got {checks.describe(adjoint)}."
        )
    return _hypergradient_bound(function, problem, rule, x, y, constants, adjoint)


@jax.jit
def _hypergradient_bound(
    outer: Partial,
    problem: Problem,
    rule: Rule,
    x: PyTree,
    y: PyTree,
    constants: BoundConstants | Partial,
    adjoint: PyTree | None,
) -> HypergradientBound:
    x, _ = rule.refine(problem, x, y)
    (value, slope_x), slope_y = _outer(outer, x, y)
    pulled, report = rule.pullback(problem, x, y, slope_x, guess=adjoint)
    gradient = trees.add_cotangents(slope_y, pulled)
    v = report.adjoint
    if trees.dimension(v) != trees.dimension(x) or not isinstance(rule, Implicit):
        # The adjoint of another rule may be that of another system.
        v = Implicit(rule.linear_solver).pullback(problem, x, y, slope_x)[1].adjoint
    near = bound(outer, problem, x, y, gradient, v, constants)

    linear_solver = rule.linear_solver
    if linear_solver is not None:
        linear_solver = linear_solver.without_limits()
    accurate = Implicit(linear_solver)
    newton = _newton_point(problem, x, y, linear_solver)
    (_, slope_x), _ = _outer(outer, newton, y)
    v = accurate.pullback(problem, newton, y, slope_x, guess=v)[1].adjoint
    far = bound(outer, problem, newton, y, gradient, v, constants)
    # That of g at x itself: by way of the better value.
    by_far = jnp.abs(value - far.corrected_value) + far.corrected
    chosen = trees.where(far.absolute < near.absolute, far, near)
    corrected = far.corrected < near.corrected
    return chosen._replace(
        value=jnp.fmin(near.value, by_far),  # NaN is no bound
        corrected_value=jnp.where(corrected, far.corrected_value, near.corrected_value),
        corrected=jnp.minimum(near.corrected, far.corrected),
    )


def _outer(outer: Partial, x: PyTree, y: PyTree) -> tuple[tuple[jax.Array, PyTree], PyTree]:
    """Return g and g_1, and g_2."""
    value, (slope_x, slope_y) = jax.value_and_grad(outer, argnums=(0, 1), allow_int=True)(x, y)
    return (value, slope_x), slope_y


class _Newton(NamedTuple):
    x: PyTree
    decrement: jax.Array  # F^T F_1^{-1} F before the last step, which knows no units
    goes_on: jax.Array
    steps: jax.Array


def _newton_point(
    problem: Problem, x: PyTree, y: PyTree, linear_solver: LinearSolver | None
) -> PyTree:
    """Take Newton steps while each is much shorter than the one before."""
    solver = resolve_linear_solver(linear_solver, problem, Settings())

    def step(state: _Newton) -> _Newton:
        optimality, jacobian = problem.linearize(state.x, y)
        move, _ = linear_solve(jacobian, optimality, solver)
        decrement = jnp.abs(trees.inner(move, optimality))
        goes_on = decrement < _CONTRACTION * state.decrement
        following = trees.where(goes_on, trees.add_scaled(state.x, -1, move), state.x)
        return _Newton(following, decrement, goes_on, state.steps + 1)

    infinity = jnp.full((), jnp.inf, trees.dtype(x))
    start = _Newton(x, infinity, infinity > 0, jnp.zeros((), jnp.int32))
    return mesh.while_loop(
        lambda state: state.goes_on & (state.steps < _MAX_NEWTON_STEPS), step, start
    ).x


def bound(
    outer: Callable[..., jax.Array],
    problem: Problem,
    x: PyTree,
    y: PyTree,
    gradient: PyTree,
    v: PyTree,
    constants: BoundConstants | Partial,
) -> HypergradientBound:
    """Bound the errors of a gradient and of g at x, by means of any adjoint v; inside one trace.

    The gradient need not be g_2 - F_2^T v: how far it is from that is in the bound.
    """
    known = constants if isinstance(constants, BoundConstants) else constants(x, y)
    checks.is_component("constants(x, y)", known, BoundConstants, "BoundConstants(...)")
    dtype = trees.dtype(x)

    def metric_norm(u: PyTree) -> jax.Array:  # ||u||
        return trees.norm(_weigh(u, known.strong_convexity, jnp.multiply))

    def dual_norm(w: PyTree) -> jax.Array:  # ||w||_*
        return trees.norm(_weigh(w, known.strong_convexity, jnp.divide))

    # In these norms F is strongly monotone with the constant 1: <F(a) - F(b), a - b> >= ||a - b||^2
    # and <w, u> <= ||w||_* ||u||, so that ||x - x*|| <= ||F(x) - F(x*)||_* = ||F(x)||_*, and
    # ||u|| <= ||F_1^T u||_*. With e = `distance` >= ||x - x*|| and r = g_1(x) - F_1(x)^T v:
    #
    #   F_1(x*)^T (v - v*) = (F_1(x*) - F_1(x))^T v - r + g_1(x) - g_1(x*)
    #   ||v - v*|| <= jacobian e ||v|| + ||r||_* + outer_x e
    #
    #   (g_2 - F_2^T v)(x) - dh/dy = g_2(x) - g_2(x*) - (F_2(x) - F_2(x*))^T v - F_2(x*)^T (v - v*)
    #   ||.|| <= outer_y e + mixed_change e ||v|| + (mixed + mixed_change e) ||v - v*||
    #
    # The value: g(x*) = g(x) - <g_1, x - x*> + s, and 0 = F(x) - F_1 (x - x*) + t by Taylor, with
    # |s| <= outer_x e^2 / 2 and ||t||_* <= jacobian e^2 / 2; g_1 = F_1^T v + r gives
    #
    #   h(y) - (g(x) - <v, F(x)>) = <v, t'> - <r, x - x*> + s,   ||t'||_* <= jacobian e^2 / 2.
    #
    # Rounding: a number that goes through k roundings, each of relative size eps / 2 of the terms
    # so far, is off by less than k eps times the sum of its absolute terms.
    rounding = (jnp.asarray(known.roundings, dtype) + 10) * trees.epsilon((x, v))
    optimality, pull = jax.vjp(lambda x: problem.optimality(x, y), x)
    value, slopes = jax.value_and_grad(outer, argnums=(0, 1), allow_int=True)(x, y)
    slope_x, slope_y = slopes
    residual = optax.tree.sub(slope_x, pull(v)[0])
    own = trees.difference(slope_y, problem.pull_outer(x, y, v)[1])
    moved = trees.norm(trees.floating(trees.difference(gradient, own)))
    size_v = metric_norm(v)

    distance = dual_norm(optimality) + rounding * known.optimality_terms
    left = dual_norm(residual)
    lost = rounding * (known.smoothness * size_v + known.outer_terms)  # of r by rounding
    mixed = known.mixed + known.mixed_change * distance
    from_x = known.outer_y + known.mixed_change * size_v
    from_x = from_x + mixed * (known.jacobian * size_v + known.outer_x)
    inner, adjoint = from_x * distance, mixed * left
    terms = trees.norm(trees.floating(slope_y)) + known.mixed * size_v
    rounded = rounding * terms + mixed * lost
    widened = 1 + rounding  # for what happens to the bound itself

    size_x = metric_norm(x)
    curvature = (known.jacobian * size_v + known.outer_x) / 2 * distance**2
    step = trees.inner(v, optimality)
    value_terms = jnp.abs(value) + size_x * (2 * known.outer_terms + known.outer_x * size_x)
    corrected = curvature + (left + lost) * distance + rounding * value_terms
    corrected = corrected + rounding * size_v * (known.optimality_terms + distance)

    beyond = ~(distance <= known.radius)

    def proven(number: jax.Array) -> jax.Array:
        known_number = jnp.where(jnp.isnan(number) | beyond, jnp.inf, widened * number)
        return known_number.astype(dtype)

    return HypergradientBound(
        absolute=proven(moved + inner + adjoint + rounded),
        measured=proven(moved),
        inner=proven(inner),
        adjoint=proven(adjoint),
        rounding=proven(rounded),
        distance=proven(distance),
        value=proven(jnp.abs(step) + corrected),
        corrected_value=(value - step).astype(value.dtype),
        corrected=proven(corrected),
    )


def _weigh(u: PyTree, convexity: Any, how: Callable[..., jax.Array]) -> PyTree:
    """Return u with every entry multiplied or divided by the root of its strong convexity."""

    def one(leaf: jax.Array, mu: Any) -> jax.Array:
        return how(leaf, jnp.sqrt(jnp.asarray(mu, leaf.dtype)))

    if jax.tree.structure(convexity) == jax.tree.structure(u):
        return jax.tree.map(one, u, convexity)
    return jax.tree.map(lambda leaf: one(leaf, convexity), u)
