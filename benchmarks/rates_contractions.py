"""Inner problems that gradient steps solve, as contractions, and their truth by NumPy alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial

import bilevax as bx


class Data(NamedTuple):
    rows: Any
    targets: Any
    validation_rows: Any
    validation_targets: Any
    penalty: Any  # lambda


Draw = tuple[Data, np.ndarray, int]  # data, y and the number of unknowns


class Case(NamedTuple):
    """What a seed decides: an inner problem at one y."""

    data: Data
    y: Any
    x0: Any
    alpha: Any


class Derivatives(NamedTuple):
    """At one (x, y), for NumPy; those of f and g, so without alpha.

    Attributes:
      optimality: grad_x f.
      hessian: grad_xx f.
      mixed: the derivative of grad_x f in y; y is flat.
      outer_x: g_1.
      outer_y: g_2.
    """

    optimality: np.ndarray
    hessian: np.ndarray
    mixed: np.ndarray
    outer_x: np.ndarray
    outer_y: np.ndarray

    @property
    def adjoint(self) -> np.ndarray:
        return np.linalg.solve(self.hessian, self.outer_x)

    @property
    def implicit(self) -> np.ndarray:
        """The implicit estimate of the hypergradient, with an exact adjoint."""
        return self.outer_y - self.mixed.T @ self.adjoint


class Truth(NamedTuple):
    """The solution of a case.

    Attributes:
      x: the inner solution.
      gradient: the hypergradient, flat.
      contraction: q, the spectral radius of T_1 there.
      conditioning: the condition number of I - T_1 there.
    """

    x: np.ndarray
    gradient: np.ndarray
    contraction: float
    conditioning: float


class Setting(NamedTuple):
    """One of the four settings; `affine` says that T is affine in (x, y) together."""

    title: str
    inner: Callable[..., jax.Array]
    outer: Callable[..., jax.Array]
    draw: Callable[[int], Draw]
    derivatives: Callable[[Data, np.ndarray, np.ndarray], Derivatives]
    affine: bool = False

    def case(self, seed: int) -> Case:
        """Draw a problem. Its curvature is largest at x = 0, also for the logistic loss."""
        data, y, size = self.draw(seed)
        x0 = np.zeros(size)
        largest = np.linalg.eigvalsh(self.derivatives(data, y, x0).hessian)[-1]
        return Case(data, y, x0, 1 / largest)

    def truth(self, case: Case) -> Truth:
        x = case.x0
        for _ in range(30):  # Newton's method: one step, but for the logistic loss
            at = self.derivatives(case.data, case.y, x)
            x = x - np.linalg.solve(at.hessian, at.optimality)
        at = self.derivatives(case.data, case.y, x)
        curvature = np.linalg.eigvalsh(at.hessian)
        jacobian = np.eye(len(x)) - case.alpha * at.hessian
        q = np.abs(np.linalg.eigvalsh(jacobian)).max()
        return Truth(x, at.implicit, float(q), float(curvature[-1] / curvature[0]))

    def problem(self, case: Case) -> tuple[bx.Problem, Partial]:
        """Return the inner problem and the outer objective of a case."""
        step = Partial(_gradient_step, Partial(self.inner, case.data), case.alpha)
        problem = bx.fixed_point(step, structure=bx.Structure.POSITIVE_DEFINITE)
        return problem, Partial(self.outer, case.data)

    def conjugate_gradient_bound(self, case: Case, truth: Truth, steps: list[int]) -> np.ndarray:
        """Return a bound of the error of AID-CG after t = k steps, for all t of `steps`.

        The error of the implicit estimate at x_t, which has q^t, and that of conjugate gradients:
        ||F_2|| 2 sqrt(kappa) p^k ||v||, p = (sqrt(kappa) - 1) / (sqrt(kappa) + 1), all at x_t.
        """
        bounds, x = [], case.x0
        for t in range(max(steps) + 1):
            at = self.derivatives(case.data, case.y, x)
            if t in steps:
                error = np.linalg.norm(at.implicit - truth.gradient)
                bounds.append(error + adjoint_bound(at, t))
            x = x - case.alpha * at.optimality
        return np.array(bounds)


def adjoint_bound(at: Derivatives, steps: Any) -> Any:
    """Return how far k steps of conjugate gradients can be from the exact implicit estimate."""
    curvature = np.linalg.eigvalsh(at.hessian)
    root = np.sqrt(curvature[-1] / curvature[0])
    size = np.linalg.norm(at.mixed, 2) * np.linalg.norm(at.adjoint)
    return size * 2 * root * ((root - 1) / (root + 1)) ** steps


def _gradient_step(objective: Partial, alpha: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return x - alpha * jax.grad(objective)(x, y)
