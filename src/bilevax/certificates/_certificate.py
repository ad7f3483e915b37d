"""The certificate: an a-posteriori estimate of the error of a hypergradient."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax.tree
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax import _mesh as mesh
from bilevax import _trees as trees
from bilevax._estimator import Estimate, checked_point, estimate, evaluate, value_and_aux
from bilevax._problems import Problem
from bilevax._status import Status, code, is_unsolved
from bilevax.linear import CG, LinearSolver, default_rtol, linear_solve
from bilevax.rules import Implicit, Rule, Settings, resolve_linear_solver

PyTree = Any

# A reference point is good enough when ||F|| there is this much smaller than at x.
_CONTRACTION = 0.05
_MAX_NEWTON_STEPS = 3
# Tolerance of the solves for these steps where a factor of the error is enough to know.
_NEWTON_RTOL = 0.02
# Tolerance of the certificate's solves over that of the rule's: it must see what they leave.
CERTIFICATE_SHARE = 0.1
# Above this contraction, Newton's method is not where it converges fast.
_LARGEST_CONTRACTION = 0.3


class Certificate(NamedTuple):
    """What is known of the error of a hypergradient Omega(x, y).

    Attributes:
      absolute: the estimate of ||Omega - dh/dy||, in the unit of the hypergradient.
      relative: `absolute` / ||dh/dy||.
      error: the estimate of Omega - dh/dy itself, a pytree like y (float0 for integer and key
        leaves): its leaves tell which part of the gradient is wrong, and <error, d> how wrong the
        derivative along d is.
      inner: the norm of the part of `error` that the inexact x causes.
      adjoint: the norm of the part of `error` that the inexact adjoint v causes.
      contraction: how far the reference may be from x*, relatively: the larger of ||F|| there over
        ||F|| at x, and of what the next Newton step would do to g over what the last one did. The
        estimate can be trusted where it is well below 1, and is wrong by about that factor.
      products: with F_1 or F_1^T, spent on the certificate, int32; -1 where a linear solver does
        not count them.
      status: CONVERGED; STALLED where `contraction` is above 0.3, and the estimate is a guess only;
        otherwise the worst status of the linear solves.
    """

    absolute: jax.Array
    relative: jax.Array
    error: PyTree
    inner: jax.Array
    adjoint: jax.Array
    contraction: jax.Array
    products: jax.Array
    status: jax.Array


class Reference(NamedTuple):
    """The point near x* that a hypergradient is compared at, and the adjoint there."""

    x: PyTree
    adjoint: PyTree


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

        Omega(x, y) - dh/dy  ~  Omega(x, y) - Omega_I(x_N, y),   x_N = x - F_1(x, y)^{-1} F(x, y)

    Omega is the estimator of the rule with all its inaccuracies, Omega_I that of `Implicit()` with
    an accurate adjoint, and x_N a Newton step from the point where the rule is evaluated. The true
    error differs from the estimate by the error at x_N, which is O(||x - x*||^2): the ratio of the
    two tends to 1 for every rule (for a Newton-preconditioned one x_N is the second Newton step).
    The linearisation d Omega/dx (x - x_N) costs as many linear solves and is less accurate: it errs
    by the curvature of Omega too, even where the inner problem is quadratic. Where one Newton step
    leaves more than a twentieth of ||F||, another is taken, three at most.

    The part of the adjoint is what changes when v is replaced by the solution F_1^{-T} g_1 at the
    same x; the rest is the part of x.

    Cost, besides the rule itself: three linear solves, matrix-free. One is the Newton step. Two are
    adjoint solves, at x and at x_N, that start from the adjoint of the rule; the first of them
    costs one product where the rule's own solve was accurate.

    Args:
      outer: g, a function of (x, y) that returns a real scalar.
      problem: `minimum(f)`, `root(F)` or `fixed_point(T)`.
      rule: whose hypergradient is judged.
      x: the inexact inner solution, before any correction, a pytree of floating arrays.
      y: the outer variable.
      adjoint: v as the rule computed it at x, from its `RuleReport` or from a `WarmStart`, so that
        a solve is not done twice. It is judged as it is; one that is worse than zero is NaN.
      linear_solver: for the three solves; None is that of the rule. Its tolerances, limit of steps
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
      >>> round(float(certificate.error), 6), round(float(certificate.relative), 6)
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
    # An adjoint that is given is the one to judge: no step is taken from it.
    judged = rule if adjoint is None else rule.with_linear_solver(CG(maxiter=0))
    found = estimate(outer, problem, judged, x, y, Settings(), guess=adjoint)
    return certify(outer, problem, rule, found, y, linear_solver, Settings(), found.x)[0]


def certificate_settings(rtol: Any, x: PyTree, adjoint_rtol: Any = None) -> Settings:
    """Return the settings of a certificate of an estimate with linear solves to `rtol`.

    Where adjoint solves have another tolerance, it is one that certificates are to find, and more
    than a factor is not asked of them: Newton steps need leave no less than they may.
    """

    def tightened(rtol: Any) -> Any:
        return jnp.maximum(CERTIFICATE_SHARE * jnp.asarray(rtol), default_rtol(x))

    if adjoint_rtol is not None:
        return Settings(_NEWTON_RTOL, adjoint_rtol=tightened(adjoint_rtol))
    return Settings(None if rtol is None else tightened(rtol))


def certify(
    outer: Callable[..., Any],
    problem: Problem,
    rule: Rule,
    found: Estimate,
    y: PyTree,
    linear_solver: LinearSolver | None,
    settings: Settings,
    near: PyTree,
    *,
    has_aux: bool = False,
) -> tuple[Certificate, Reference]:
    """Judge an estimate; inside one trace.

    Args:
      outer: g.
      problem: the inner problem.
      rule: that made the estimate.
      found: the estimate.
      y: the outer variable.
      linear_solver: see `hypergradient_error`.
      settings: the tolerance of the Newton steps, and of the adjoint solves.
      near: where Newton's method starts: the point of the estimate, or an earlier reference.
      has_aux: whether `outer` returns a pair.

    Returns:
      The certificate, and the reference.
    """

    def value(x: PyTree, y: PyTree) -> jax.Array:
        return value_and_aux(outer, x, y, has_aux)[0]

    linear_solver = rule.linear_solver if linear_solver is None else linear_solver
    if linear_solver is not None:
        linear_solver = linear_solver.without_limits()
    newton = _refine(problem, found.x, near, y, linear_solver, settings)
    exact = evaluate(
        value,
        problem,
        rule.with_linear_solver(linear_solver),
        found.x,
        y,
        settings,
        guess=found.rule.adjoint,
    )
    reference = evaluate(
        value, problem, Implicit(linear_solver), newton.x, y, settings, guess=exact.rule.adjoint
    )
    error = trees.difference(found.gradient, reference.gradient)
    absolute = trees.scaled_norm(trees.floating(error))
    size = trees.scaled_norm(trees.floating(reference.gradient))
    unsolved = [newton.status]
    counts = [newton.products]
    for solve in (exact.rule.solve, reference.rule.solve):
        unsolved.append(jnp.where(is_unsolved(solve.status), solve.status, 0))
        counts.append(solve.products)

    contraction, status = _judge(value, problem, found.x, y, newton, reference.rule.adjoint)
    status = jnp.max(jnp.stack([status, *unsolved]))
    finite = jnp.isfinite(absolute) & ~jnp.isnan(contraction)
    certificate = Certificate(
        absolute=jnp.where(finite, absolute, jnp.nan),
        relative=jnp.where(finite, absolute / size, jnp.nan),
        error=error,
        inner=trees.scaled_norm(
            trees.floating(trees.difference(exact.gradient, reference.gradient))
        ),
        adjoint=trees.scaled_norm(trees.floating(trees.difference(found.gradient, exact.gradient))),
        contraction=contraction,
        products=jnp.where(jnp.all(jnp.stack(counts) >= 0), sum(counts), -1),
        status=jnp.where(finite, status, code(Status.NONFINITE)),
    )
    return certificate, Reference(newton.x, reference.rule.adjoint)


class _Newton(NamedTuple):
    x: PyTree
    optimality: PyTree  # F there
    previous: PyTree  # x before the last step
    steps: jax.Array
    products: jax.Array
    status: jax.Array


def _refine(
    problem: Problem,
    x: PyTree,
    near: PyTree,
    y: PyTree,
    linear_solver: LinearSolver | None,
    settings: Settings,
) -> _Newton:
    """Take Newton steps, from the better of x and `near`, until ||F|| is far below that at x."""
    solver = resolve_linear_solver(linear_solver, problem, settings)
    optimality, near_optimality = problem.optimality(x, y), problem.optimality(near, y)
    norm = trees.norm(optimality)
    is_nearer = trees.norm(near_optimality) < norm

    def is_far(state: _Newton) -> jax.Array:
        far = trees.norm(state.optimality) > _CONTRACTION * norm
        return far & (state.steps < _MAX_NEWTON_STEPS)

    def step(state: _Newton) -> _Newton:
        _, jacobian = problem.linearize(state.x, y)
        direction, report = linear_solve(jacobian, state.optimality, solver)
        following = trees.add_scaled(state.x, -1, direction)
        counted = (report.products >= 0) & (state.products >= 0)
        return _Newton(
            following,
            problem.optimality(following, y),
            state.x,
            state.steps + 1,
            jnp.where(counted, state.products + report.products, -1),
            jnp.maximum(state.status, jnp.where(is_unsolved(report.status), report.status, 0)),
        )

    none = jnp.zeros((), jnp.int32)
    start = _Newton(
        trees.where(is_nearer, near, x),
        trees.where(is_nearer, near_optimality, optimality),
        x,
        none,
        none,
        code(Status.CONVERGED),
    )
    return mesh.while_loop(is_far, step, start)


def _judge(
    outer: Callable[..., Any], problem: Problem, x: PyTree, y: PyTree, newton: _Newton, v: PyTree
) -> tuple[jax.Array, jax.Array]:
    """Return the contraction of a reference, where the adjoint is v, and a status."""
    norm = trees.norm(problem.optimality(x, y))
    left = trees.norm(newton.optimality) / jnp.where(norm > 0, norm, 1)
    # ||F|| alone says little about x* where F is far from linear or F_1 ill-conditioned. With the
    # adjoint v of the reference, <v, F> = <g_1, F_1^{-1} F> is what a step from there does to g.
    coming = jnp.abs(trees.inner(v, newton.optimality))
    last = optax.tree.sub(newton.previous, newton.x)
    gone = jnp.abs(trees.inner(jax.grad(outer)(newton.x, y), last))
    # What rounding leaves of F at a solution near x: no step can improve on that.
    noise = 10 * trees.epsilon(x) * problem.terms_norm(x, y)
    is_noise = coming <= noise * trees.norm(v)
    contraction = jnp.maximum(left, jnp.where(is_noise, 0, coming / gone))
    stalled = (contraction > _LARGEST_CONTRACTION) & (norm > noise)
    return contraction, jnp.where(stalled, code(Status.STALLED), code(Status.CONVERGED))
