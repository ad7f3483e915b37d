"""The efficiency constant: how fast the error of a hypergradient grows with that of x."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._estimator import checked_point, estimate
from bilevax._failure import OnFailure
from bilevax._problems import Problem
from bilevax._scaling import scaled
from bilevax._status import Status, code
from bilevax.rules import Rule, Settings

PyTree = Any


class EfficiencyConstant(NamedTuple):
    """The operator norm of d Omega/dx, or its length along one direction.

    Attributes:
      value: C_y, in the unit of the hypergradient per unit of x.
      iterations: power iterations taken, int32; one product with d Omega/dx and one with its
        transpose each.
      residual: ||J^T J u - C_y^2 u|| / C_y^2 at the last unit vector u, J = d Omega/dx. Some
        singular value of J is within half of it, relatively, of C_y. Large where C_y is noise.
      status: CONVERGED; MAXITER; NONFINITE where a linear solve failed.
    """

    value: jax.Array
    iterations: jax.Array
    residual: jax.Array
    status: jax.Array


def efficiency_constant(
    outer: Callable[[PyTree, PyTree], jax.Array],
    problem: Problem,
    rule: Rule,
    x: PyTree,
    y: PyTree,
    *,
    direction: PyTree | None = None,
    rtol: Any = 1e-2,
    maxiter: Any = 100,
) -> EfficiencyConstant:
    """Return C_y = ||d Omega/dx (x, y)||, by which a rule multiplies a small error of x.

        ||Omega(x, y) - dh/dy||  <=  C_y ||x - x*||  +  O(||x - x*||^2)

    Omega is the estimator of the rule, its correction of x and its linear solves included, and the
    norms are Euclidean over all entries. The bound is sharp for the worst direction of x - x*;
    along one `direction` d the factor is ||d Omega/dx d|| / ||d||. Evaluated at x = x* it is the
    constant of the theory, at a nearby x it differs from that by O(||x - x*||). It vanishes, to the
    accuracy of the linear solves, for `Preconditioned(rule, NewtonStep())` at x*.

    The largest singular value of J = d Omega/dx comes from power iterations on J^T J, by forward
    and reverse derivatives of the estimator: nothing is materialised. A value below sqrt(eps)
    ||Omega|| / ||x|| is noise of the solves and counts as converged.

    Args:
      outer: g, a function of (x, y) that returns a real scalar.
      problem: `minimum(f)`, `root(F)` or `fixed_point(T)`.
      rule: whose estimator is looked at. Linear solvers in it need tolerances well below `rtol`
        (the default ones are).
      x: the point, a pytree of floating arrays.
      y: the outer variable.
      direction: a pytree like x; None for the operator norm.
      rtol: stops where ||J^T J u - C_y^2 u|| <= rtol C_y^2.
      maxiter: power iterations at most.

    Returns:
      An `EfficiencyConstant`. Its value is NaN if a linear solve on the way failed.

    Raises:
      TypeError: if `outer` does not return a scalar, the problem does not fit x, or `direction` is
        not like x.

    Example:
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: 0.5 * y * x**2 - x)  # x*(y) = 1 / y
      >>> outer = lambda x, y: x**2  # so Omega(x, y) = -2 x^2 / y for the implicit rule
      >>> float(bx.efficiency_constant(outer, problem, bx.Implicit(), 0.5, 2.0).value)
      1.0
      >>> newton = bx.Preconditioned(bx.Implicit(), step=bx.NewtonStep())
      >>> float(bx.efficiency_constant(outer, problem, newton, 0.5, 2.0).value)
      0.0

    Source:
      Z. Ye, G. Peyre, D. Cremers, P. Ablin, "Enhancing Hypergradients Estimation: A Study of
      Preconditioning and Reparameterization", 2024.
    """
    function, x, y = checked_point(outer, problem, rule, x, y)
    checks.positive("rtol", rtol)
    checks.positive("maxiter", maxiter, whole=True)
    if direction is not None:
        direction = trees.as_arrays(direction)
        checks.same_structure("direction", direction, x, argument=True)
    return _efficiency_constant(function, problem, rule, x, y, direction, rtol, maxiter)


class _State(NamedTuple):
    u: jax.Array  # a unit vector
    constant: EfficiencyConstant


@jax.jit
def _efficiency_constant(
    outer: Partial,
    problem: Problem,
    rule: Rule,
    x: PyTree,
    y: PyTree,
    direction: PyTree | None,
    rtol: Any,
    maxiter: Any,
) -> EfficiencyConstant:
    problem.check(x, y)
    rule.check(problem, x, y)
    problem = scaled(problem, x, y)
    flat, unravel = ravel_pytree(x)
    # A derivative of a solve has no report; a failure shows as NaN.
    settings = Settings(on_failure=OnFailure.NAN)

    def omega(flat: jax.Array) -> jax.Array:
        gradient = estimate(outer, problem, rule, unravel(flat), y, settings).gradient
        return ravel_pytree(trees.floating(gradient))[0]

    value, push = jax.linearize(omega, flat)
    pull = jax.linear_transpose(push, flat)
    done, nothing = code(Status.CONVERGED), jnp.zeros((), jnp.int32)

    if direction is not None:
        d = ravel_pytree(direction)[0]
        length = trees.norm(push(d)) / trees.norm(d)
        status = jnp.where(jnp.isfinite(length), done, code(Status.NONFINITE))
        return EfficiencyConstant(length, nothing, jnp.zeros_like(length), status)

    if flat.size == 0:
        zero = jnp.zeros((), flat.dtype)
        return EfficiencyConstant(zero, nothing, zero, done)

    size = trees.norm(flat)
    noise = trees.epsilon(x) ** 0.5 * trees.norm(value) / jnp.where(size > 0, size, 1)

    def step(state: _State) -> _State:
        image = push(state.u)
        square = trees.inner(image, image)
        product = pull(image)[0]
        length = trees.norm(product)
        residual = trees.norm(product - square * state.u) / jnp.where(square > 0, square, 1)
        iterations = state.constant.iterations + 1
        found = (residual <= rtol) | (square <= noise**2)
        status = jnp.where(found, done, jnp.where(iterations >= maxiter, code(Status.MAXITER), -1))
        status = jnp.where(jnp.isfinite(length), status, code(Status.NONFINITE))
        following = product / jnp.where(length > 0, length, 1)
        return _State(following, EfficiencyConstant(jnp.sqrt(square), iterations, residual, status))

    # Any start serves that no symmetry of the problem makes orthogonal to what is looked for.
    start = jax.random.normal(jax.random.key(0), flat.shape, flat.dtype)
    nan = jnp.full_like(size, jnp.nan)
    constant = EfficiencyConstant(nan, nothing, nan, jnp.asarray(-1, jnp.int32))
    state = _State(start / trees.norm(start), constant)
    return jax.lax.while_loop(lambda state: state.constant.status < 0, step, state).constant
