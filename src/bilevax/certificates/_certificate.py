"""The certificate: an a-posteriori estimate of the error of a hypergradient."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._estimator import Estimate, checked_point, estimate, evaluate, value_and_aux
from bilevax._problems import Problem
from bilevax._scaling import scaled
from bilevax._status import Status, code, is_failure
from bilevax.certificates._points import (
    REDUCTION,
    Point,
    correct_twice,
    distance,
    judge,
    point_of,
    rounding_floor,
    total,
    unlimited,
)
from bilevax.linear import CG, LinearSolver, default_rtol
from bilevax.rules import Rule, Settings

PyTree = Any

# What the solve that tells the two parts of an error apart leaves of the adjoint's residual.
_EXACT = 0.01


class Certificate(NamedTuple):
    """What is known of the error of a hypergradient Omega(x, y).

    Attributes:
      absolute: the estimate of ||Omega - dh/dy||, in the unit of the hypergradient. The rounding
        error of the terms that cancel in Omega, which no estimate sees, is part of it.
      relative: `absolute` / ||dh/dy||.
      error: the estimate of Omega - dh/dy itself, a pytree like y (float0 for integer and key
        leaves): its leaves tell which part of the gradient is wrong, and <error, d> how wrong the
        derivative along d is.
      inner: the norm of the part of `error` that the inexact x causes.
      adjoint: the norm of the part of `error` that the inexact adjoint v causes. With a requested
        accuracy, for which x and v are corrected together, both parts are the whole.
      contraction: what the second correction changed in Omega, over what the first one did, or the
        mean factor of ||F|| if that is larger; slow entries of y count for more. The
        estimate can be trusted where it is well below 1, and is wrong by about that factor.
      products: with F_1 or F_1^T, spent on the certificate, int32; -1 where a linear solver does
        not count them.
      status: CONVERGED; STALLED where `contraction` is above 0.4, and the estimate is a guess only;
        otherwise the worst status of the linear solves. Where that is a failure, as on a singular
        system, nothing is known and all numbers are NaN.
    """

    absolute: jax.Array
    relative: jax.Array
    error: PyTree
    inner: jax.Array
    adjoint: jax.Array
    contraction: jax.Array
    products: jax.Array
    status: jax.Array


def hypergradient_error(
    outer: Callable[[PyTree, PyTree], jax.Array],
    problem: Problem,
    rule: Rule,
    x: PyTree,
    y: PyTree,
    *,
    adjoint: PyTree | None = None,
    linear_solver: LinearSolver | None = None,
) -> Certificate:
    """Estimate the error of a rule's hypergradient at (x, y), without knowing x*.

        Omega(x, y) - dh/dy  ~  Omega(x, y) - Omega_I(x_2, y),   x_{k+1} = x_k - F_1^{-1} F(x_k, y)

    Omega is the estimator of the rule with all its inaccuracies, Omega_I that of `Implicit()` with
    an accurate adjoint, and x_2 comes from the point x_0 = x where the rule is evaluated by two
    Newton steps. The true error differs from the estimate by the error at x_2, which is
    O(||x - x*||^4): the ratio of the two tends to 1 for every rule. What Omega_I does from x_1 to
    x_2 tells whether the steps converge.

    The part of the adjoint is what changes when v is replaced by the solution F_1^{-T} g_1 at the
    same x; the rest is the part of x. All solves reduce the errors that were left before by orders
    of magnitude, however small they are: near a stationary point of h, where the hypergradient is a
    small difference of large terms, a small residual of v can be a large error.

    Units do not matter: residuals are measured in scaled rows where entries of x or F have sizes
    that differ widely, see `minimum`.

    Cost, besides the rule itself: five linear solves, matrix-free. Two are Newton steps, three are
    corrections of the adjoint, at x, x_1 and x_2. Those of the second step leave a millionth.

    Args:
      outer: g, a function of (x, y) that returns a real scalar.
      problem: `minimum(f)`, `root(F)` or `fixed_point(T)`.
      rule: whose hypergradient is judged.
      x: the inexact inner solution, before any correction, a pytree of floating arrays.
      y: the outer variable.
      adjoint: v as the rule computed it at x, from its `RuleReport` or from a `WarmStart`, so that
        a solve is not done twice. It is judged as it is; one that is worse than zero is NaN.
      linear_solver: for all solves; None is that of the rule. Its tolerances, limit of steps
        and damping are set aside, in favour of the default tolerance of the dtype. Where there is
        none, or it is a `Neumann` series, it is `CG()` or `GMRES()` as declared of F_1.

    Returns:
      A `Certificate`.

    Raises:
      TypeError: if `outer` does not return a scalar, the problem does not fit x, y has no floating
        entries, `adjoint` is not of the size of x, or `linear_solver` is not a `LinearSolver`.

    Example:
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: 0.5 * y * x**2 - x)  # x*(y) = 1 / y
      >>> outer = lambda x, y: x**2  # so dh/dy = -2 / y^3, and Omega(x, y) = -2 x^2 / y
      >>> certificate = bx.hypergradient_error(outer, problem, bx.Implicit(), 0.6, 2.0)
      >>> round(float(certificate.error), 4), round(float(certificate.relative), 4)
      (-0.11, 0.44)

    Source:
      The idea of comparing with a better solution is W. Bangerth, R. Rannacher, "Adaptive Finite
      Element Methods for Differential Equations", 2003; the second-order accuracy of the reference
      is Z. Ye, G. Peyre, D. Cremers, P. Ablin, "Enhancing Hypergradients Estimation", 2024.
    """
    function, x, y = checked_point(outer, problem, rule, x, y)
    if linear_solver is not None:
        checks.is_component("linear_solver", linear_solver, LinearSolver, "CG()")
    if adjoint is not None and trees.dimension(trees.as_arrays(adjoint)) != trees.dimension(x):
        raise TypeError(
            f"`adjoint` must have as many entries as `x`, {trees.dimension(x)}; "
            f"got {checks.describe(adjoint)}."
        )
    return _hypergradient_error(function, problem, rule, x, y, adjoint, linear_solver)


@jax.jit
def _hypergradient_error(
    outer: Partial,
    problem: Problem,
    rule: Rule,
    x: PyTree,
    y: PyTree,
    adjoint: PyTree | None,
    linear_solver: LinearSolver | None,
) -> Certificate:
    problem.check(x, y)
    rule.check(problem, x, y)
    problem = scaled(problem, x, y)
    # An adjoint that is given is the one to judge: no step is taken from it.
    judged = rule if adjoint is None else rule.with_linear_solver(CG(maxiter=0))
    found = estimate(outer, problem, judged, x, y, Settings(), guess=adjoint)
    return certify(outer, problem, rule, found, y, linear_solver, default_rtol(x))


def certify(
    outer: Callable[..., Any],
    problem: Problem,
    rule: Rule,
    found: Estimate,
    y: PyTree,
    linear_solver: LinearSolver | None,
    reduction: Any = REDUCTION,
    *,
    has_aux: bool = False,
) -> Certificate:
    """Judge an estimate; inside one trace.

    Args:
      outer: g.
      problem: the inner problem.
      rule: that made the estimate.
      found: the estimate.
      y: the outer variable.
      linear_solver: see `hypergradient_error`.
      reduction: what the linear solves leave of the errors that they start from.
      has_aux: whether `outer` returns a pair.
    """

    def value(x: PyTree, y: PyTree) -> jax.Array:
        return value_and_aux(outer, x, y, has_aux)[0]

    linear_solver = unlimited(rule, linear_solver)
    # The part of the adjoint is known once its residual is far below what was achieved.
    achieved = found.rule.solve.residual
    rtol = jnp.minimum(_EXACT * jnp.where(achieved < 1, achieved, 1), reduction)
    exact = evaluate(
        value,
        problem,
        rule.with_linear_solver(linear_solver),
        found.x,
        y,
        Settings(jnp.maximum(rtol, trees.epsilon(found.x))),
        guess=found.rule.adjoint,
    )

    points = correct_twice(
        value, problem, point_of(problem, exact, exact.rule.adjoint, y), y, linear_solver, reduction
    )
    start, first, reference = points

    gradient = trees.floating(found.gradient)
    floor = rounding_floor(found.terms, reference.terms, like=found.x)
    judged = start._replace(gradient=gradient), first, reference
    following = distance(first.gradient, reference.gradient)
    return make_certificate(
        gradient,
        points,
        y,
        floor,
        inner=distance(start.gradient, reference.gradient),
        adjoint=distance(gradient, start.gradient),
        judgement=judge(problem, judged, y, following, floor),
        products=total(
            *(point.products for point in points), *(point.solve.products for point in points)
        ),
    )


def make_certificate(
    gradient: list[jax.Array],
    points: Sequence[Point],
    y: PyTree,
    floor: jax.Array,
    *,
    inner: jax.Array,
    adjoint: jax.Array,
    judgement: tuple[jax.Array, jax.Array],
    products: jax.Array,
) -> Certificate:
    """Return the certificate of a gradient, beside that of the last of the points.

    Args:
      gradient: its floating leaves.
      points: those whose linear solves the certificate rests on.
      y: the outer variable.
      floor: the rounding error of terms that cancel.
      inner: see `Certificate`, as are `adjoint` and `products`.
      adjoint: see `inner`.
      judgement: what `judge` returned.
      products: see `inner`.
    """
    contraction, reliable = judgement
    reference = points[-1].gradient
    status = jnp.max(jnp.stack([point.status for point in points]))
    status = jnp.maximum(status, jnp.where(reliable, code(Status.CONVERGED), code(Status.STALLED)))
    absolute = distance(gradient, reference) + floor
    finite = jnp.isfinite(absolute) & ~jnp.isnan(contraction)
    status = jnp.where(finite, status, jnp.maximum(status, code(Status.NONFINITE)))
    # A singular system tells nothing.
    known = ~is_failure(status)

    def number(value: jax.Array) -> jax.Array:
        return jnp.where(known, value, jnp.nan)

    error = [number(u - w) for u, w in zip(gradient, reference, strict=True)]
    return Certificate(
        absolute=number(absolute),
        relative=number(absolute / trees.norm(reference)),
        error=trees.with_floating(error, y),
        inner=number(inner),
        adjoint=number(adjoint),
        contraction=number(contraction),
        products=products,
        status=status,
    )
