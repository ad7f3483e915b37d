"""Rules that differentiate steps of the solver, not the equation that they solve."""

import abc
import dataclasses
import math
import operator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax import _loop as loop
from bilevax import _trees as trees
from bilevax._failure import with_slope
from bilevax._problems import Problem
from bilevax._results import SolveReport
from bilevax._separable import Separable, all_of, choose, per_task, spread, without
from bilevax._status import Status, is_failure
from bilevax._unroll import Sweep, unroll
from bilevax.solvers import Solver

PyTree = Any


class IterativeRule(abc.ABC):
    """Base class of rules that differentiate a run of the solver: frozen pytrees.

    They take the place of a `Rule` in `solution_map` and `value_and_hypergradient`. They are no
    estimators at a point, so nothing wraps them and there is no adjoint system to report on.
    """

    mode: Any
    """How an engine forms the gradient: "reverse", or "forward" once per entry of y."""

    @abc.abstractmethod
    def bind(self, solver: Solver) -> Partial:
        """Return the run of a solver that JAX is to differentiate.

        It is a function of (problem, x0, y, scale) that returns x and a `SolveReport`, as
        `_loop.run` does.
        """


@trees.register
@dataclasses.dataclass(frozen=True)
class Unrolled(IterativeRule):
    """Iterative differentiation (ITD): the derivative of the run itself, x_T(y).

        x_{k+1} = S(x_k, y),   dx_{k+1}/dy = S_1 dx_k/dy + S_2,   k = 0 ... T - 1

    S is a step of the solver, with its momentum and whatever else it remembers. T is where the
    solver stops, or its `maxiter`. If S is a contraction by q in x, the error is O(T q^T).

    What the rules see, with d = dim x, T steps, and one gradient of f as the unit of time:

    | rule                      | sees y | sees x0, rates | memory       | time, reverse     |
    |---------------------------|--------|----------------|--------------|-------------------|
    | `Implicit()`              | yes    | no (zero)      | d            | T + adjoint solve |
    | `Unrolled()`              | yes    | yes            | T d          | about 4 T         |
    | `Unrolled(checkpoints=c)` | yes    | yes            | (c + T/c) d  | about 5 T         |
    | `Unrolled(last=K)`, K < T | K steps| K steps, not x0| K d          | T + about 6 K     |
    | `Unrolled(mode="forward")`| yes    | yes            | d per entry  | 2 T per entry     |
    | `OneStep()`               | 1 step | 1 step, not x0 | d            | T + 3             |

    Steps of `Optax(optax.lbfgs())`, and of other line searches of Optax, loop inside: they go in
    forward mode only.

    Kept per step are the iterate, F(x, y) there, and what the solver remembers: never the data that
    the problem closes over. In reverse mode that is allocated for `maxiter` steps, which must be a
    Python int; steps after an early stop cost nothing. Line searches have their outcome as a
    constant. The linear solves of `Newton()` are made to full accuracy here, for their derivative
    is that of the exact solution; with a linear solver of yours that does not get there it is NaN.
    The derivative is that of the run, however short: from a start at the solution it is zero.

    Line searches and quasi-Newton methods of Optax divide rounding by rounding once they are at a
    solution, and derivatives of such steps mean nothing. So their runs end where F is of the size
    of its rounding error, whatever the tolerances; from a start that is there already the
    derivative is NaN.

    Through a `solution_map`, JAX differentiates in any mode and to any order.

    In an engine the run starts at the warm start, a constant: use a fixed number of steps there
    (`rtol=0, atol=0`), or what is solved already leaves nothing to differentiate.

    Args:
      last: differentiate the last steps only (truncated back-propagation). The iterate before them
        is a constant, so the gradient with respect to x0 is zero, and so is what the solver
        remembers there: momentum, directions, step sizes. None for all. A run of no more steps
        than that is differentiated as a whole, from its start on, as with None.
      checkpoints: iterates kept in reverse mode, from which those between are computed anew.
        "sqrt" is the root of the number of steps, and memory proportional to it; None keeps all.
      mode: "reverse", or "forward" for few outer variables and any number of steps. An engine then
        goes through the entries of y, and a `solution_map` takes `jvp` and `jacfwd` alone.

    Raises:
      TypeError: if `last` or `checkpoints` is no whole number; and, where the rule meets a solver,
        if `maxiter` is traced in reverse mode.
      ValueError: if `last` or `checkpoints` is below 1 or `mode` neither of the two; and, where the
        rule meets a solver, if `last` is above its `maxiter`.

    Warns:
      UserWarning: for an Optax optimiser whose derivative is not finite at a zero gradient, as that
        of Adam with `eps_root=0`; and for one that stops gradients inside, as the scaling of the
        first step of `optax.lbfgs()`, whose derivative is not that of the run before it converges.

    Example:
      >>> import jax
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: 0.5 * (x - y) ** 2)
      >>> solver = bx.GradientDescent(0.5, rtol=0.0, atol=0.0, maxiter=3)
      >>> solve = bx.solution_map(problem, solver, bx.Unrolled())
      >>> float(jax.grad(solve)(8.0, 1.0))  # with respect to x0: (1 - 1/2)^3
      0.125
      >>> float(jax.grad(solve, argnums=1)(8.0, 1.0))
      0.875

    Source:
      L. Franceschi, M. Donini, P. Frasconi, M. Pontil, "Forward and Reverse Gradient-Based
      Hyperparameter Optimization", 2017; A. Shaban, C. Cheng, N. Hatch, B. Boots, "Truncated
      Back-propagation for Bilevel Optimization", 2019.
    """

    last: int | None = dataclasses.field(default=None, metadata={"static": True})
    _: dataclasses.KW_ONLY
    checkpoints: int | str | None = dataclasses.field(default=None, metadata={"static": True})
    mode: str = dataclasses.field(default="reverse", metadata={"static": True})

    def __post_init__(self) -> None:
        if self.last is not None:
            checks.positive("last", self.last, whole=True)
        if isinstance(self.checkpoints, str):
            if self.checkpoints != "sqrt":
                raise ValueError(
                    f'`checkpoints` must be a whole number, "sqrt" or None, got '
                    f"{self.checkpoints!r}."
                )
        elif self.checkpoints is not None:
            checks.positive("checkpoints", self.checkpoints, whole=True)
        checks.mode(self.mode)

    def bind(self, solver: Solver) -> Partial:
        if self.mode == "forward" and self.last is None:
            return Partial(_differentiable_run, solver)
        steps = _whole_maxiter(solver)
        if self.last is not None and self.last > steps:
            raise ValueError(
                f"`last` must not exceed the run: {self.last} steps of at most {steps} "
                "(`maxiter` of the solver)."
            )
        kept = self.checkpoints
        if kept == "sqrt":
            kept = math.isqrt(max(self.last or steps, 1))
        is_fixed = all(isinstance(t, int | float) and t == 0 for t in (solver.rtol, solver.atol))
        return Partial(_unroll, Sweep(steps, self.last, kept, is_fixed), solver)  # type: ignore[arg-type]


@trees.register
@dataclasses.dataclass(frozen=True)
class OneStep(IterativeRule):
    """The derivative of one step of the solver at the solution, with the solution as a constant.

        dx*/dy = S_2(x, y),   x the last iterate and S the first step of the solver from there

    Its error is the contraction factor of S, however accurate x is: small for a fast solver, and
    zero for `Newton()`, where it is the implicit formula. It costs one step and no linear solve.
    With a factor near 1, as of gradient descent on ill-conditioned problems, even its sign may be
    wrong. Steps of unit length, as the first ones of Adam are, have no such derivative.

    Raises:
      TypeError: where it meets a solver with a line search other than `Newton`: rounding decides
        about the length of its steps at a solution.

    Example:
      >>> import jax
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: 0.5 * y * x**2 - x)  # x*(y) = 1 / y
      >>> solve = bx.solution_map(problem, bx.GradientDescent(0.4), bx.OneStep())
      >>> round(float(jax.grad(lambda y: solve(0.0, y))(2.0)), 4)  # 80 % of -1/4
      -0.2

    Source:
      J. Bolte, E. Pauwels, S. Vaiter, "One-step differentiation of iterative algorithms", 2023.
    """

    mode: ClassVar[Any] = "reverse"

    def bind(self, solver: Solver) -> Partial:
        return Partial(_one_step, solver)


@trees.register
@dataclasses.dataclass(frozen=True)
class Bound(IterativeRule):
    """A rule that has met its solver where the length of a run was known.

    Numbers of the solver may then be traced, as where an engine is an argument of a compiled
    function.
    """

    run: Partial
    mode: Any = dataclasses.field(metadata={"static": True})

    def bind(self, solver: Solver) -> Partial:
        return self.run


def _unroll(
    sweep: Sweep, solver: Solver, problem: Problem, x0: PyTree, y: PyTree, scale: Any = 0.0
) -> tuple[PyTree, SolveReport]:
    solver = solver.differentiable(problem, x0)
    if solver.is_smooth is not True:  # the run may end by rounding
        sweep = dataclasses.replace(sweep, is_fixed=False)
    return _where_known(solver, problem, *unroll(sweep, solver, problem, x0, y, scale))


def _differentiable_run(
    solver: Solver, problem: Problem, x0: PyTree, y: PyTree, scale: Any = 0.0
) -> tuple[PyTree, SolveReport]:
    solver = solver.differentiable(problem, x0)
    x, report = loop.run(solver, problem, x0, y, scale)
    return _where_known(solver, problem, x, jax.lax.stop_gradient(report))


def run_dropping(
    run: Partial, problem: Separable, x0: PyTree, y: PyTree, scale: Any = 0.0
) -> tuple[PyTree, SolveReport]:
    """Return a run in which tasks that fail stay at x0, as constants.

    It is made twice, first without derivatives to see which fail: where those of a failure enter,
    not even a factor of zero keeps NaN out.
    """
    scale = spread(problem, scale)
    first, *arguments = jax.lax.stop_gradient((run, problem, x0, y, scale))
    _, report = first(*arguments)
    dropped = is_failure(report.status)
    kept, (start, scale) = without(problem, dropped, x0, scale)
    x, _ = run(kept, start, y, scale)
    factor = jnp.where(all_of(dropped), jnp.nan, 0.0)
    x = choose(problem, dropped, with_slope(factor, x0, x), x)
    return x, report._replace(dropped=dropped)


def _where_known(
    solver: Solver, problem: Problem, x: PyTree, report: SolveReport
) -> tuple[PyTree, SolveReport]:
    """Return a run, with NaN as the derivative of one that ended where it started for want of any.

    It is not zero: where steps at a solution have a derivative, they are taken.
    """
    if solver.is_smooth is True:
        return x, report
    idle = (report.iterations == 0) & (report.status == Status.CONVERGED)
    factor = jnp.where(solver.is_smooth | ~idle, 1.0, jnp.nan)
    return per_task(problem, lambda _, factor, x: with_slope(factor, x, x), factor, x), report


def _one_step(
    solver: Solver, problem: Problem, x0: PyTree, y: PyTree, scale: Any = 0.0
) -> tuple[PyTree, SolveReport]:
    x, report = jax.lax.stop_gradient(loop.run(solver, problem, x0, y, scale))

    def step(problem: Problem, x: PyTree) -> PyTree:
        following = solver.one_step(problem, x, y)
        # The value of x is that of the run, which the report is about.
        return jax.tree.map(lambda x, u: x + (u - jax.lax.stop_gradient(u)), x, following)

    return per_task(problem, step, x), report


def _whole_maxiter(solver: Solver) -> int:
    try:
        return operator.index(solver.maxiter)
    except TypeError:
        raise TypeError(
            "`Unrolled` must know how long a run can be: `maxiter` of the solver must be a Python "
            f"int, got {solver.maxiter!r}."
        ) from None
