"""How accurate is a hypergradient where the inner problem is solved loosely?"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax.tree

import bilevax as bx
from bilevax.demo.data import Task
from bilevax.demo.model import Weights, zero_weights
from bilevax.demo.tuning import inner_problem, outer_objective, start_penalties

RTOLS = np.logspace(-1, -5, 9)  # where gradient descent stops: ||F(x, y)|| / ||F(x0, y)||
MAX_WEIGHTS = 400  # of more weights, the matrices that are factored here get large

# Linear systems are solved directly, so that only the inexact weights are to blame for an error.
_IMPLICIT = bx.Implicit(bx.Dense())
RULES = {
    "implicit": _IMPLICIT,
    "Jacobi step": bx.Preconditioned(_IMPLICIT, step=bx.JacobiStep()),
    "Newton step": bx.Preconditioned(_IMPLICIT, step=bx.NewtonStep(bx.Dense())),
    "diagonal change": bx.Reparameterized(_IMPLICIT, change=bx.DiagonalChange()),
    "exponential change": bx.Reparameterized(_IMPLICIT, change=bx.ExpChange()),
}


class Study(NamedTuple):
    """Errors of hypergradients at the start penalties, one entry per inexact solution.

    Attributes:
      rtol: where gradient descent stopped.
      iterations: how many steps it took.
      distance: ||x - x*|| / ||x*||.
      error: by rule, ||estimate - hypergradient|| / ||hypergradient||.
    """

    rtol: np.ndarray
    iterations: np.ndarray
    distance: np.ndarray
    error: dict[str, np.ndarray]


def is_small(task: Task) -> bool:
    """Tell whether the study takes no more than seconds."""
    return task.penalty_shape[0] * task.penalty_shape[1] <= MAX_WEIGHTS


def measure_errors(task: Task) -> Study:
    """Stop gradient descent early, and compare each rule there with the exact hypergradient."""
    problem, outer = inner_problem(task), outer_objective(task)
    x0, y = zero_weights(task), start_penalties(task)
    step_size = 1 / _largest_curvature(task, y)

    def solve(rtol: jax.Array) -> tuple[Weights, jax.Array]:
        solver = bx.GradientDescent(step_size, rtol=rtol, maxiter=20_000)
        x, report = bx.solution_map(problem, solver).with_report(x0, y)
        return x, report.iterations

    def hypergradient(rule: bx.Rule, x: Weights) -> jax.Array:
        x, _ = rule.refine(problem, x, y)
        slope = jax.grad(outer)(x, y)  # g_1; g_2 is zero, for the validation loss has no penalty
        return rule.pullback(problem, x, y, slope)[0]

    @jax.jit
    def everything() -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        exact = bx.solution_map(problem, bx.Newton(bx.Dense()))(x0, y)
        truth = hypergradient(RULES["Newton step"], exact)

        def compare(rtol: jax.Array) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
            x, iterations = solve(rtol)
            estimates = {name: hypergradient(rule, x) for name, rule in RULES.items()}
            errors = {name: _relative(estimate, truth) for name, estimate in estimates.items()}
            return iterations, _relative(x, exact), errors

        return jax.lax.map(compare, jnp.asarray(RTOLS))

    iterations, distance, errors = jax.tree.map(np.asarray, everything())
    return Study(RTOLS, iterations, distance, {name: errors[name] for name in RULES})


def _relative(value: object, truth: object) -> jax.Array:
    return optax.tree.norm(optax.tree.sub(value, truth)) / optax.tree.norm(truth)


def _largest_curvature(task: Task, log_penalties: jax.Array) -> jax.Array:
    """Return an upper bound of the Hessian's eigenvalues: gradient descent steps by its inverse.

    The cross entropy has at most 1/4 of the mean square of the features (with a column of ones)
    for two classes, and at most 1/2 for more (D. Boehning, "Multinomial Logistic Regression
    Algorithm", 1992).
    """
    features = task.train.features
    extended = jnp.pad(features, ((0, 0), (0, 1)), constant_values=1)
    largest = jnp.linalg.norm(extended, 2) ** 2 / len(features)
    share = 0.25 if len(task.class_names) == 2 else 0.5
    return share * largest + jnp.exp(log_penalties).max()
