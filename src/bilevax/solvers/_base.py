"""What a solver is: frozen hyperparameters with a pure `init` and a pure `step`."""

import abc
from typing import Any, NamedTuple

import jax

from bilevax import _checks as checks
from bilevax._problems import Minimum, Problem
from bilevax._scaling import scaled, without_scaling

PyTree = Any


class Iterate(NamedTuple):
    """Where a solver stands.

    Attributes:
      x: the current point.
      evaluation: what the solver knows of the problem at x (F, f, T), a function of x and y alone.
      residual: ||F(x, y)||, which the loop reads to decide when to stop.
      state: what the solver remembers of earlier steps (momentum, step size, ...).
      stalled: whether the last step could not improve x; ends the loop.
    """

    x: PyTree
    evaluation: PyTree
    residual: jax.Array
    state: PyTree = ()
    stalled: Any = False


class Solver(abc.ABC):
    """Base class of inner solvers: a frozen pytree of numbers with `evaluate` and `step`.

    Subclasses are frozen dataclasses, registered as pytrees, with the fields `rtol`, `atol` and
    `maxiter`. The loop stops when ||F(x, y)|| <= max(rtol ||F(x0, y)||, atol). By default `rtol` is
    eps^(3/4) (1.8e-12 in float64, 6.4e-6 in float32), and `atol` is the rounding error of F at a
    solution near x0: 10 eps ||F_1(x0, y) x0||, or 10 eps ||x0|| for a fixed point. So defaults do
    not depend on the unit of F. With `rtol=0` and `atol=0` exactly `maxiter` steps are taken.
    """

    rtol: Any
    atol: Any
    maxiter: Any

    takes_scaling: bool = False
    """Whether rows and columns of F_1 are scaled for it, and ||F|| is that of scaled rows."""

    def posed(self, problem: Problem, x: PyTree, y: PyTree) -> Problem:
        """Return the problem as this solver takes it: with a scaling found at (x, y), or none."""
        return scaled(problem, x, y) if self.takes_scaling else without_scaling(problem)

    is_smooth: Any = True
    """Whether steps have derivatives at a solution, where what they remember is rounding.

    `Unrolled` ends the runs of other solvers once F is of the size of its rounding error.
    """

    def evaluate(self, problem: Problem, x: PyTree, y: PyTree) -> tuple[PyTree, jax.Array]:
        """Return what steps from x need of the problem, F(x, y) by default, and ||F(x, y)||."""
        optimality = problem.optimality(x, y)
        return optimality, problem.norm(optimality)

    def init(self, problem: Problem, x: PyTree, y: PyTree) -> Iterate:
        """Return the iterate at the start x; by default without a memory."""
        return Iterate(x, *self.evaluate(problem, x, y))

    def toward(self, iterate: Iterate, scale: jax.Array, target: jax.Array) -> Iterate:
        """Return the iterate for a run that ends at ||F|| <= target; by default the same.

        Args:
          iterate: where the run is.
          scale: ||F|| where nothing was known of the solution.
          target: see above.
        """
        return iterate

    @abc.abstractmethod
    def step(self, problem: Problem, iterate: Iterate, y: PyTree) -> Iterate:
        """Return the next iterate."""

    def one_step(self, problem: Problem, x: PyTree, y: PyTree) -> PyTree:
        """Return a step from x as a smooth function of x and y, near a solution."""
        start = self.init(problem, x, y)
        start = start._replace(residual=jax.lax.stop_gradient(start.residual))
        return self.step(problem, start, y).x

    def differentiable(self, problem: Problem, x: PyTree) -> "Solver":
        """Return the solver whose steps `Unrolled` differentiates; by default this one.

        Warns if derivatives of its steps are known to fail.
        """
        return self


def check_stopping(solver: Solver) -> None:
    """Check the numeric fields that all solvers share."""
    for name in ("rtol", "atol"):
        if getattr(solver, name) is not None:
            checks.not_negative(name, getattr(solver, name))
    checks.not_negative("maxiter", solver.maxiter, whole=True)


def require_minimum(problem: Problem, solver: str) -> Minimum:
    """Return the problem if it is a minimum; solvers that look at f need one."""
    if not isinstance(problem, Minimum):
        kind = {"Root": "root", "FixedPoint": "fixed_point"}.get(type(problem).__name__, "problem")
        raise TypeError(
            f"`{solver}` evaluates an objective and needs `minimum(...)`, got `{kind}(...)`. "
            "For a root or a fixed point use `Newton` or `FixedPointIteration`."
        )
    return problem
