"""Hypergradients against difference quotients of h(y) = g(x*(y), y)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax import _loop as loop
from bilevax import _trees as trees
from bilevax._closures import as_partial
from bilevax._iterative import IterativeRule
from bilevax._solution_map import SolutionMap
from bilevax._status import Status
from bilevax.diagnostics._differences import (
    as_numpy,
    call,
    extrapolate,
    moves,
    random_directions,
    sample,
    tightened,
)
from bilevax.solvers import Solver

PyTree = Any


class HypergradientCheck(NamedTuple):
    """A hypergradient beside difference quotients, along unit directions d of y.

    Printed, it is a table. All fields but the last two are NumPy arrays of shape (directions,).

    Attributes:
      derivative: <dh/dy, d> by the rule, in the unit of h per unit of y.
      difference: the same by differences of h.
      error: the estimated error of `difference`.
      relative_error: |derivative - difference| / max(|derivative|, |difference|); 0 where equal.
      step: the smallest step along d behind `difference`, in the unit of y.
      status: the worst `Status` code of the inner solves behind `difference`. Black boxes do not
        tell: TRUNCATED.
      residual: the largest ||F(x, y)|| that those solves left.
      unit: |h(y)| / ||y||. Derivatives far below it hardly change h.
      epsilon: the machine epsilon of the least precise among h, x and y.

    Example:
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: 0.5 * y * x**2 - x)  # x*(y) = 1 / y
      >>> solve = bx.solution_map(problem, solver=bx.Newton())
      >>> check = check_hypergradient(lambda x, y: x, solve, 2.0, 0.0, directions=1)
      >>> check.agrees(rtol=1e-2), float(abs(check.derivative[0])), check.step.shape
      (True, 0.25, (1,))
    """

    derivative: np.ndarray
    difference: np.ndarray
    error: np.ndarray
    relative_error: np.ndarray
    step: np.ndarray
    status: np.ndarray
    residual: np.ndarray
    unit: float
    epsilon: float

    def agrees(self, rtol: float | None = None) -> bool:
        """Tell whether |derivative - difference| <= rtol max(|derivative|, |difference|) + error.

        It must hold in every direction. What is not finite never agrees; nor does a difference
        whose inner solves did not converge, or whose error is so large that it tells nothing: above
        max(rtol, epsilon^(1/3)) times the derivative and `unit`. None for rtol is epsilon^(1/3).
        """
        return not self._objections(rtol)

    def _objections(self, rtol: float | None) -> list[str]:
        """Return what speaks against agreement, a text for every direction that does not agree."""
        usual = self.epsilon ** (1 / 3)
        rtol = usual if rtol is None else rtol
        checks.not_negative("rtol", rtol)
        found = []
        for k, (rule, difference, error, *_) in enumerate(zip(*self[:6], strict=True)):
            size, status = max(abs(rule), abs(difference)), Status(int(self.status[k]))
            # An error that is common in this precision is no reason to doubt the difference.
            useless = max(rtol, usual) * max(size, self.unit)
            if not np.isfinite(rule + difference):
                reason = "a derivative is not finite"
            elif status >= Status.MAXITER:
                reason = f"the inner problem was not solved anew ({status.name}: {status.remedy})"
            elif not error <= useless:
                reason = f"an error above {useless:.1e} leaves the difference meaningless"
            elif not abs(rule - difference) <= rtol * size + error:
                reason = f"they are {abs(rule - difference):.3e} apart"
            else:
                continue
            found.append(
                f"Direction {k}: <dh/dy, d> is {rule:.9e} by the rule and {difference:.9e} by "
                f"differences of estimated error {error:.1e}; at rtol={rtol:.1e}, {reason}."
            )
        return found

    def __str__(self) -> str:
        lines = [
            f"{'d':>3} {'by the rule':>17} {'by differences':>17} {'est. error':>10} "
            f"{'rel. error':>10} {'step':>8}  inner solves"
        ]
        for k, row in enumerate(zip(*self[:5], strict=True)):
            numbers = "{:>17.9e} {:>17.9e} {:>10.1e} {:>10.1e} {:>8.1e}".format(*row)
            lines.append(f"{k:>3} {numbers}  {Status(int(self.status[k])).name}")
        return "\n".join(lines)


def check_hypergradient(
    outer: Callable[[PyTree, PyTree], jax.Array],
    solve: SolutionMap,
    y: PyTree,
    x0: PyTree,
    *,
    directions: int = 3,
    seed: int = 0,
) -> HypergradientCheck:
    """Compare the hypergradient through a solution map with differences of h(y) = g(x*(y), y).

        <dh/dy, d>   against   (h(y + t d) - h(y - t d)) / (2 t)

    for random unit vectors d. The left side is `jax.grad` of g(solve(x0, y), y). For the right side
    the inner problem is solved anew at every y + t d, from the solution at y: by the map's solver
    at tolerances of the size of rounding and a `maxiter` of at least 10 000, without the correction
    of a rule. So a map that is too loose for its rule shows. Where rounding ends such a solve
    early, it counts as converged at the default tolerance of its dtype. A black box is called as it
    is, from x0, and so is a run that `Unrolled` differentiates: truncation shows as an error.

    The steps t start near a tenth of ||y|| and are halved nine times, five times in float32.
    Ridders' method extrapolates to t = 0 and takes the result of least estimated error. That is
    never below four times the noise of h over the step, which the smallest steps show. Each leaf of
    y moves in proportion to its own size, or to 1 if it is zero.

    It takes 20 inner solves a direction (12 in float32), in one compiled program, and does not
    itself run under `jax.jit`. Only derivatives in y are checked, not those in values that
    functions close over.

    Args:
      outer: g, a function of (x, y) that returns a real scalar.
      solve: a `SolutionMap`, from `solution_map` or `implicit_function`.
      y: the outer variable, a pytree. Integer and key leaves stay fixed.
      x0: where the inner solver starts, a pytree of floating arrays.
      directions: the number of random directions.
      seed: of the directions.

    Returns:
      A `HypergradientCheck`.

    Raises:
      TypeError: for a wrong kind of argument, if `outer` does not return a scalar, if y has no
        floating entries, if y or x0 is traced, or for `Unrolled(mode="forward")`.
      ValueError: if `directions` is not positive or `seed` is negative.

    Example:
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: 0.5 * y * x**2 - x)  # x*(y) = 1 / y
      >>> loose = bx.solution_map(problem, solver=bx.GradientDescent(0.25, maxiter=1))
      >>> check = check_hypergradient(lambda x, y: x, loose, 2.0, 0.0, directions=1)
      >>> abs(round(float(check.derivative[0]), 4)), abs(round(float(check.difference[0]), 4))
      (0.125, 0.25)

    Source:
      C. J. F. Ridders, "Accurate computation of F'(x) and F'(x)F''(x)", 1982.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((y, x0))):
        raise TypeError(
            "`check_hypergradient` works with numbers, so it cannot run inside of `jax.jit`, "
            "`jax.grad` or `jax.vmap`, but `y` or `x0` is traced. Call it outside."
        )
    g = as_partial("outer", outer)
    checks.is_component("solve", solve, SolutionMap, "solution_map(problem, Newton())")
    checks.inner_variable(x0, "x0")
    checks.outer_variable(y)
    checks.positive("directions", directions, whole=True)
    checks.not_negative("seed", seed, whole=True)
    x0, y = trees.as_arrays(x0), trees.as_arrays(y)
    shape = call.eval_shape(g, x0, y)
    checks.scalar_output("outer", shape)
    if isinstance(solve.rule, IterativeRule) and solve.rule.mode == "forward":
        raise TypeError(
            "`solve` must go in reverse mode, which is checked here; got a rule with "
            'mode="forward". Check the same rule with mode="reverse".'
        )
    moving = [leaf for leaf in jax.tree.leaves(y) if moves(leaf)]
    if not moving:
        raise TypeError(f"`y` must have floating entries, got {checks.describe(y)}.")

    gradient = jax.grad(lambda y: call(g, solve(x0, y), y), allow_int=True)(y)
    units, length = random_directions(y, directions, seed)
    # A direction times a power of two is exact in every dtype. In float32 differences over short
    # steps are below the tolerance of the inner solves, and biased by it.
    epsilon = trees.epsilon((shape, x0, moving))
    count = 10 if epsilon < 1e-10 else 6
    steps = 2.0 ** (np.round(np.log2(0.1 * length)) - np.arange(count))
    signed = np.tile(np.stack([steps, -steps], axis=1).reshape(-1), directions)
    which = np.repeat(np.arange(directions), 2 * count)
    # First comes y itself; a solver starts at its solution then.
    points = np.append(0, which), np.append(0.0, signed)
    solver = solve.solve.args[0]
    warm = isinstance(solver, Solver)
    run = Partial(loop.run, tightened(solver, x0)) if warm else solve.solve
    samples = sample(g, solve.problem, run, x0, y, units, points, warm=warm)
    samples = [as_numpy(leaf) for leaf in samples]
    (value, status), shape = (leaf[0] for leaf in samples[:2]), (directions, count, 2)
    rows = zip(*(leaf[1:].reshape(shape) for leaf in samples), strict=True)
    with np.errstate(all="ignore"):  # what is not finite is judged, not warned of
        derivative = np.zeros(directions)
        for d, slope in zip(units, jax.tree.leaves(gradient), strict=True):
            if d is not None:
                derivative += as_numpy(d).reshape(directions, -1) @ as_numpy(slope).reshape(-1)
        chosen = [extrapolate(steps, h, codes, norms, epsilon) for h, codes, norms in rows]
        difference, error, step, worst, residual = np.array(chosen).T
        size = np.maximum(np.abs(derivative), np.abs(difference))
        relative = np.abs(derivative - difference) / np.where(size > 0, size, 1)
        worst, unit = np.maximum(worst, status).astype(np.int32), abs(value) / length
    return HypergradientCheck(
        derivative, difference, error, relative, step, worst, residual, unit, epsilon
    )


def assert_hypergradient(
    outer: Callable[[PyTree, PyTree], jax.Array],
    solve: SolutionMap,
    y: PyTree,
    x0: PyTree,
    *,
    rtol: float | None = None,
    directions: int = 3,
    seed: int = 0,
) -> None:
    """Raise unless the hypergradient through a solution map agrees with differences of h.

        |derivative - difference|  <=  rtol max(|derivative|, |difference|) + error

    in every direction of `check_hypergradient`, with `error` the estimated one of the difference;
    `HypergradientCheck.agrees` says what never agrees.

    Args:
      outer: g; this and what follows as in `check_hypergradient`.
      solve: a `SolutionMap`.
      y: the outer variable.
      x0: where the inner solver starts.
      rtol: relative tolerance, without unit. None is the cube root of the machine epsilon of the
        least precise among h, x and y: 6e-6 in float64, 5e-3 in float32.
      directions: the number of random directions.
      seed: of the directions.

    Returns:
      None.

    Raises:
      AssertionError: with the direction, the two numbers, the estimated error of the difference,
        the tolerance, and the reason.
      TypeError: as `check_hypergradient`.
      ValueError: as `check_hypergradient`; and for a negative `rtol`.

    Example:
      >>> import bilevax as bx
      >>> solve = bx.solution_map(bx.root(lambda x, y: x**3 + x - y), solver=bx.Newton())
      >>> assert_hypergradient(lambda x, y: x**2 + y, solve, 2.0, 0.5)

    Source:
      C. J. F. Ridders, "Accurate computation of F'(x) and F'(x)F''(x)", 1982.
    """
    if rtol is not None:
        checks.not_negative("rtol", rtol)
    check = check_hypergradient(outer, solve, y, x0, directions=directions, seed=seed)
    objections = check._objections(rtol)
    if objections:
        raise AssertionError("\n".join(["The hypergradient is in doubt.", *objections]))
