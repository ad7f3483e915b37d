"""An adapter that lets `scipy.optimize.minimize` drive an engine."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._failure import SolveError
from bilevax._iterative import IterativeRule
from bilevax._solution_map import solution_map
from bilevax._status import Status, code, is_failure
from bilevax.hypergradient import Engine, Hypergradient, WarmStart, cold_start

PyTree = Any


class ScipyObjective:
    """h, its gradient and its Hessian-vector products on flat vectors; made by `scipy_objective`.

    It keeps the warm start of the last call, and so is no pure function.

    Attributes:
      start: the first y as a flat float64 NumPy vector.
      evaluations: how often value and gradient were computed.
    """

    def __init__(self, engine: Engine, y: PyTree, x0: PyTree) -> None:
        flat, self._unravel = ravel_pytree(y)
        self._engine, self._warm = engine, cold_start(x0)
        self._dtype = flat.dtype
        self.start = np.asarray(flat, np.float64)
        self.evaluations = 0

    def __call__(self, flat: np.ndarray) -> tuple[float, np.ndarray]:
        """Return h and its gradient, as `scipy.optimize.minimize(..., jac=True)` takes them."""
        result = self._evaluate(flat)
        gradient = ravel_pytree(result.gradient)[0]
        return float(result.value), np.asarray(gradient, np.float64)

    def hessian_product(self, flat: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """Return the Hessian of h times a direction, as `hessp=` takes it.

        Raises:
          TypeError: if the rule has not `mode="forward"`.
          SolveError: if a solve failed.
        """
        rule = self._engine.rule
        if isinstance(rule, IterativeRule) or rule.mode != "forward":
            raise TypeError(
                'Hessian-vector products need a rule with `mode="forward"`, such as '
                f'`Implicit(mode="forward")`; got {rule!r}.'
            )
        product = _product(
            self._engine, self.unflatten(flat), self.unflatten(direction), self._warm
        )
        product = np.asarray(ravel_pytree(product)[0], np.float64)
        if not np.all(np.isfinite(product)):
            raise SolveError("a Hessian-vector product of h is not finite: a linear solve failed")
        return product

    def unflatten(self, flat: np.ndarray) -> PyTree:
        """Return a flat vector as a pytree like y."""
        return self._unravel(jnp.asarray(flat, self._dtype))

    def solution(self, flat: np.ndarray) -> PyTree:
        """Return the inner solution x at a flat vector."""
        return self._evaluate(flat).x

    def _evaluate(self, flat: np.ndarray) -> Hypergradient:
        result = self._engine(self.unflatten(flat), self._warm)
        self._warm, self.evaluations = result.warm, self.evaluations + 1
        inner, adjoint = result.report.inner, result.report.adjoint
        solves = {"inner solve": inner, "correction of x": inner.correction, "adjoint": adjoint}
        dropped = False if result.report.dropped is None else np.asarray(result.report.dropped)
        for name, solve in solves.items():
            codes = 0 if solve is None else np.where(dropped, 0, solve.status)
            status = Status(int(np.max(codes)))
            # Not where this precision allows no more.
            if status == Status.MAXITER or is_failure(code(status)):
                where = f"in evaluation {self.evaluations}"
                raise SolveError(f"the {name} ended {status.name} {where}: {status.remedy}")
        if not np.isfinite(result.value):
            raise SolveError(f"the outer objective is not finite: {float(result.value)}")
        return result


def scipy_objective(engine: Engine, y: PyTree, x0: PyTree) -> ScipyObjective:
    """Make h a function that `scipy.optimize.minimize` minimises, by first or second order methods.

        objective = bx.scipy_objective(engine, y, x0)
        scipy.optimize.minimize(objective, objective.start, jac=True, method="L-BFGS-B")
        scipy.optimize.minimize(
            objective,
            objective.start,
            jac=True,
            hessp=objective.hessian_product,
            method="trust-ncg",
        )

    A Hessian-vector product is the forward derivative of the hypergradient, jvp of grad through a
    `solution_map`, and takes a rule with `mode="forward"`. Line searches compare values: give the
    solver a tight tolerance, in float64.

    Args:
      engine: made by `value_and_hypergradient`.
      y: where to start, a pytree of floating arrays; its structure is that of all y.
      x0: where the first inner solve starts; the later ones start from the last solution.

    Returns:
      A `ScipyObjective`; `objective.unflatten(result.x)` is the y that was found.

    Raises:
      TypeError: for a wrong kind of argument.
      SolveError: by the objective, if a solve failed or did not meet its tolerance within
        `maxiter`, or the value is not finite. Give SciPy bounds where it tries points that are too
        far away.

    Example:
      >>> import jax.numpy as jnp
      >>> import scipy.optimize
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: 0.5 * (x - y["a"]) ** 2)  # x*(y) = a
      >>> engine = bx.value_and_hypergradient(
      ...     lambda x, y: jnp.cosh(x - 3.0), problem, bx.Newton(), bx.Implicit(mode="forward")
      ... )
      >>> objective = bx.scipy_objective(engine, {"a": 1.0}, 0.0)
      >>> result = scipy.optimize.minimize(
      ...     objective,
      ...     objective.start,
      ...     jac=True,
      ...     hessp=objective.hessian_product,
      ...     method="trust-ncg",
      ... )
      >>> round(float(objective.unflatten(result.x)["a"]), 3)
      3.0
    """
    checks.is_component("engine", engine, Engine, "value_and_hypergradient(...)")
    checks.inner_variable(y, "y")
    return ScipyObjective(engine, trees.as_arrays(y), x0)


@jax.jit
def _product(engine: Engine, y: PyTree, direction: PyTree, warm: WarmStart) -> PyTree:
    solve = solution_map(engine.problem, engine.solver, engine.rule)

    def value(y: PyTree) -> jax.Array:
        return engine.value(solve(warm.x, y), y)

    return jax.jvp(jax.grad(value), (y,), (direction,))[1]
