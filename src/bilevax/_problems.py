"""Inner problems: what F(x, y) = 0 means, and the partial derivatives of F.

The optimality map F has one sign convention, that of a gradient: `x - step * F(x, y)` moves
towards the solution. So F = grad_x f for `minimum`, F as given for `root`, and F = x - T(x, y)
for `fixed_point`, whose Jacobian F_1 = I - T_1 is then "positive" like a Hessian.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax.tree
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax import _mesh as mesh
from bilevax import _trees as trees
from bilevax._closures import as_partial, hoist
from bilevax._operator import LinearOperator, Scaling, Structure

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Problem(abc.ABC):
    """An inner problem F(x, y) = 0; made by `minimum`, `root` or `fixed_point`.

    Attributes:
      function: the user's function of (x, y), as a `jax.tree_util.Partial`.
      structure: what is declared of the Jacobian F_1.
      preconditioner: (x, y, v) -> what is near F_1(x, y)^{-1} v, or None.
      scaling: of the rows and columns of F_1, found by `scaled`; None before that.
    """

    function: Partial
    structure: Structure = dataclasses.field(metadata={"static": True})
    preconditioner: Partial | None = dataclasses.field(default=None, kw_only=True)
    scaling: Scaling | None = dataclasses.field(default=None, kw_only=True)

    @abc.abstractmethod
    def optimality(self, x: PyTree, y: PyTree) -> PyTree:
        """Return F(x, y), a pytree like x."""

    def image(self, x: PyTree, y: PyTree) -> PyTree:
        """Return T(x, y) = x - F(x, y), of which the solution is a fixed point."""
        return optax.tree.sub(x, self.optimality(x, y))

    @abc.abstractmethod
    def check(self, x: PyTree, y: PyTree) -> None:
        """Raise a `TypeError` if the function does not fit x; costs nothing at run time."""

    def varying(self, x: PyTree, y: PyTree) -> PyTree:
        """Return x as it varies over the devices of a mesh: wherever the function of it does.

        Without that, the gradient of an objective that each device has its own of would be summed
        over all devices, for an x that they share.
        """
        return mesh.vary_with(x, lambda x: self.function(x, y))

    def hoisted(self, x: PyTree, y: PyTree, *task: PyTree) -> "Problem":
        """Return an equal problem, with all traced values that it closes over as leaves.

        x, y and the data of a task, if there are any, give structure, shapes and dtypes; their
        values do not matter.
        """
        preconditioner = self.preconditioner
        if preconditioner is not None:
            preconditioner = hoist(preconditioner, x, y, x, *task)
        function = hoist(self.function, x, y, *task)
        return dataclasses.replace(self, function=function, preconditioner=preconditioner)

    def compose(self, change: Partial) -> "Problem":
        """Return the problem G(z, y) = phi_1^T F(phi(z, y), y) = 0, where x = phi(z, y) = change.

        For a minimum, G is the gradient in z of f(phi(z, y), y). For a root or a fixed point, the
        factor phi_1^T is what makes the choice of phi matter: without it, phi cancels in the
        implicit function theorem.
        """
        # Away from the solution G_1 gains a term F . phi_11 of either sign. A symmetric F_1 makes F
        # a gradient field, and then G is one.
        structure = Structure.SYMMETRIC if self.structure.is_symmetric else Structure.GENERAL
        return Root(Partial(_composed_optimality, self, change), structure)

    def linearize(self, x: PyTree, y: PyTree) -> tuple[PyTree, LinearOperator]:
        """Return F(x, y) and its Jacobian F_1(x, y); what they share is computed once."""
        value, jvp = jax.linearize(lambda x: self.optimality(x, y), x)
        preconditioner = self.precondition(x, y)
        return value, LinearOperator(
            jvp, self.structure, x, preconditioner=preconditioner, scaling=self.scaling
        )

    def norm(self, optimality: PyTree) -> jax.Array:
        """Return ||F||, of rows in comparable units where a scaling is known."""
        if self.scaling is not None:
            optimality = optax.tree.mul(self.scaling.rows, optimality)
        return trees.norm(optimality)

    def precondition(self, x: PyTree, y: PyTree) -> Callable[[PyTree], PyTree] | None:
        """Return the preconditioner at (x, y), None if there is none.

        What does not depend on the vector, such as a factorisation, is computed once.
        """
        if self.preconditioner is None:
            return None
        # No derivative depends on it, and it need not have any.
        problem, x, y = jax.lax.stop_gradient((self, x, y))
        return jax.linearize(lambda v: problem.near_inverse(x, y, v), optax.tree.zeros_like(x))[1]

    def near_inverse(self, x: PyTree, y: PyTree, v: PyTree) -> PyTree:
        """Return the preconditioner's image of v."""
        assert self.preconditioner is not None
        return self.preconditioner(x, y, v)

    def in_units_of_x(self, optimality: PyTree) -> PyTree:
        """Return F as a direction: of comparable entries of x where a scaling is known."""
        if self.scaling is None:
            return optimality
        return optax.tree.mul(self.scaling.columns, optax.tree.mul(self.scaling.rows, optimality))

    def terms_norm(self, x: PyTree, y: PyTree) -> jax.Array:
        """Return the size of the terms that cancel in F at a solution near x: ||F_1(x, y) x||.

        Times eps, it is how large F is there by rounding errors alone. It is a difference of F
        along x, for F need not have derivatives in forward mode, as with a `jax.custom_vjp` inside.
        """
        step = trees.epsilon(x) ** 0.5
        further = self.optimality(trees.add_scaled(x, step, x), y)
        change = trees.add_scaled(further, -1, self.optimality(x, y))
        return self.norm(change) / step

    def rounding_error(self, x: PyTree, y: PyTree) -> jax.Array:
        """Return how large ||F|| is by rounding errors at a solution near x, times ten."""
        size = self.terms_norm(x, y)
        return 10 * trees.epsilon(x) * jnp.where(jnp.isfinite(size), size, 0)

    def pull_outer(self, x: PyTree, y: PyTree, v: PyTree) -> tuple["Problem", PyTree]:
        """Return F_2(x, y)^T v, as cotangents of this problem's leaves and of y.

        The leaves of a problem are traced values that its function closes over: they are
        differentiated like y. Integer and key leaves get float0.
        """
        return jax.vjp(lambda problem, y: problem.optimality(x, y), self, y)[1](v)

    def push_outer(self, x: PyTree, y: PyTree, tangent: tuple["Problem", PyTree]) -> PyTree:
        """Return F_2(x, y) applied to tangents of this problem's leaves and of y."""
        return jax.jvp(lambda problem, y: problem.optimality(x, y), (self, y), tangent)[1]


@trees.register
@dataclasses.dataclass(frozen=True)
class Minimum(Problem):
    """x*(y) = argmin over x of f(x, y); F = grad_x f and F_1 is the Hessian."""

    def optimality(self, x: PyTree, y: PyTree) -> PyTree:
        return jax.grad(self.function)(x, y)

    def value_and_optimality(self, x: PyTree, y: PyTree) -> tuple[jax.Array, PyTree]:
        """Return f(x, y) and grad_x f(x, y)."""
        return jax.value_and_grad(self.function)(x, y)

    def check(self, x: PyTree, y: PyTree) -> None:
        checks.inner_variable(x)
        checks.scalar_output("objective", jax.eval_shape(self.function, x, y))

    def compose(self, change: Partial) -> Problem:
        return Minimum(Partial(_composed_objective, self.function, change), Structure.SYMMETRIC)

    def pull_outer(self, x: PyTree, y: PyTree, v: PyTree) -> tuple[Problem, PyTree]:
        # F_2^T v = grad_y <grad_x f(x, y), v>, and <grad_x f, v> is one forward derivative of f:
        # reverse over forward is cheaper than reverse over reverse.
        def directional(problem: Minimum, y: PyTree) -> jax.Array:
            return jax.jvp(lambda x: problem.function(x, y), (x,), (v,))[1]

        value, pullback = jax.vjp(directional, self, y)
        return pullback(jnp.ones_like(value))


@trees.register
@dataclasses.dataclass(frozen=True)
class Root(Problem):
    """x*(y) solves F(x, y) = 0."""

    def optimality(self, x: PyTree, y: PyTree) -> PyTree:
        return self.function(x, y)

    def check(self, x: PyTree, y: PyTree) -> None:
        checks.inner_variable(x)
        checks.same_structure("residual", jax.eval_shape(self.function, x, y), x)


@trees.register
@dataclasses.dataclass(frozen=True)
class FixedPoint(Problem):
    """x*(y) = T(x*(y), y); F = x - T(x, y) and F_1 = I - T_1."""

    def image(self, x: PyTree, y: PyTree) -> PyTree:
        return self.function(x, y)

    def optimality(self, x: PyTree, y: PyTree) -> PyTree:
        return optax.tree.sub(x, self.image(x, y))

    def linearize(self, x: PyTree, y: PyTree) -> tuple[PyTree, LinearOperator]:
        image, product = jax.linearize(lambda x: self.image(x, y), x)
        jacobian = LinearOperator(
            lambda v: optax.tree.sub(v, product(v)),
            self.structure,
            x,
            complement=product,
            preconditioner=self.precondition(x, y),
            scaling=self.scaling,
        )
        return optax.tree.sub(x, image), jacobian

    def terms_norm(self, x: PyTree, y: PyTree) -> jax.Array:
        return self.norm(x)

    def check(self, x: PyTree, y: PyTree) -> None:
        checks.inner_variable(x)
        checks.same_structure("map", jax.eval_shape(self.function, x, y), x)


def minimum(
    objective: Callable[..., jax.Array],
    *,
    structure: Structure = Structure.POSITIVE_DEFINITE,
    preconditioner: Callable[..., PyTree] | None = None,
) -> Minimum:
    """Pose the inner problem x*(y) = argmin over x of f(x, y).

    The optimality map is F(x, y) = grad_x f(x, y), its Jacobian F_1 the Hessian of f in x.

    Entries of x may be in units of any sizes. Where those of F_1 differ widely, `Newton` and all
    linear solves work with R F_1 C, whose rows and columns are comparable, and measure residuals
    there: R and C are diagonal, powers of two, and found by a few products with F_1.

    Args:
      objective: f, a function of (x, y) that returns a real scalar. x is a pytree of floating
        arrays, y any pytree (integer and PRNG-key leaves get float0 cotangents). It must be
        pure and at least twice differentiable. It may close over arrays and over traced values;
        gradients reach both `y` and the traced values.
      structure: what is known of the Hessian near the solution. `POSITIVE_DEFINITE` makes CG
        the default linear solver; `SYMMETRIC` allows negative curvature and saddle points.
      preconditioner: (x, y, v) -> P(x, y)^{-1} v, linear in v, with P near the Hessian; symmetric
        positive definite for CG. Every solve with the Hessian takes fewer products the nearer it
        is: the steps of `Newton`, adjoint systems, corrections, certificates. What it computes of
        x and y alone, such as a factorisation, is computed once per solve. A linear solver with a
        preconditioner of its own keeps that. The solution does not depend on it, nor does any
        derivative.

    Returns:
      A `Minimum`, a pytree.

    Raises:
      TypeError: if `objective` or `preconditioner` is not callable or `structure` not a
        `Structure`; once it meets x and y, if the objective does not return a real scalar or x has
        leaves that are not real floating arrays; once a solve takes it, if the preconditioner does
        not return a pytree like v.

    Example:
      >>> problem = minimum(lambda x, y: 0.5 * y * x**2 - x)
      >>> float(problem.optimality(2.0, 3.0))
      5.0

      A Hessian that is nearly diagonal, with its diagonal as the preconditioner:

      >>> import jax.numpy as jnp
      >>> import bilevax as bx
      >>> def objective(x, y):
      ...     return 0.5 * jnp.sum(y * x**2) + 0.01 * jnp.sum(x) ** 2
      >>> y = jnp.logspace(0.0, 4.0, 50)
      >>> for preconditioner in (None, lambda x, y, v: v / (y + 0.02)):
      ...     problem = minimum(objective, preconditioner=preconditioner)
      ...     _, jacobian = problem.linearize(jnp.zeros(50), y)
      ...     _, report = bx.linear_solve(jacobian, jnp.ones(50), bx.CG(rtol=1e-4))
      ...     print(int(report.iterations) > 5)
      True
      False
    """
    checks.is_component("structure", structure, Structure, "Structure.SYMMETRIC")
    return Minimum(
        as_partial("objective", objective), structure, preconditioner=_as_optional(preconditioner)
    )


def root(
    residual: Callable[..., PyTree],
    *,
    structure: Structure = Structure.GENERAL,
    preconditioner: Callable[..., PyTree] | None = None,
) -> Root:
    """Pose the inner problem F(x*(y), y) = 0.

    Args:
      residual: F, a function of (x, y) that returns a pytree like x. Solvers that step along
        -F (`GradientDescent` and its kin) need F_1 to be positive, as a gradient's is at a
        minimum; `Newton` does not.
      structure: what is known of the Jacobian F_1.
      preconditioner: (x, y, v) -> P(x, y)^{-1} v, linear in v, with P near F_1; see `minimum`.

    Returns:
      A `Root`, a pytree.

    Raises:
      TypeError: if `residual` or `preconditioner` is not callable or `structure` not a
        `Structure`; and, once they meet x and y or v, if what they return has not the structure,
        shapes and dtypes of x.

    Example:
      >>> problem = root(lambda x, y: x**3 - y)
      >>> float(problem.optimality(2.0, 3.0))
      5.0
    """
    checks.is_component("structure", structure, Structure, "Structure.SYMMETRIC")
    return Root(
        as_partial("residual", residual), structure, preconditioner=_as_optional(preconditioner)
    )


def fixed_point(
    map: Callable[..., PyTree],
    *,
    structure: Structure = Structure.GENERAL,
    preconditioner: Callable[..., PyTree] | None = None,
) -> FixedPoint:
    """Pose the inner problem x*(y) = T(x*(y), y).

    The optimality map is F(x, y) = x - T(x, y), its Jacobian F_1 = I - T_1.

    Args:
      map: T, a function of (x, y) that returns a pytree like x.
      structure: what is known of F_1 = I - T_1. A symmetric T_1 with eigenvalues below 1 makes
        it positive definite.
      preconditioner: (x, y, v) -> P(x, y)^{-1} v, linear in v, with P near F_1; see `minimum`.

    Returns:
      A `FixedPoint`, a pytree.

    Raises:
      TypeError: if `map` or `preconditioner` is not callable or `structure` not a `Structure`;
        and, once they meet x and y or v, if what they return has not the structure, shapes and
        dtypes of x.

    Example:
      >>> problem = fixed_point(lambda x, y: 0.5 * x + y)
      >>> float(problem.optimality(2.0, 3.0))
      -2.0
    """
    checks.is_component("structure", structure, Structure, "Structure.SYMMETRIC")
    return FixedPoint(
        as_partial("map", map), structure, preconditioner=_as_optional(preconditioner)
    )


def _as_optional(preconditioner: Any) -> Partial | None:
    return None if preconditioner is None else as_partial("preconditioner", preconditioner)


def _composed_objective(objective: Partial, change: Partial, z: PyTree, y: PyTree) -> jax.Array:
    return objective(change(z, y), y)


def _composed_optimality(problem: Problem, change: Partial, z: PyTree, y: PyTree) -> PyTree:
    x, pull = jax.vjp(lambda z: change(z, y), z)
    return pull(problem.optimality(x, y))[0]
