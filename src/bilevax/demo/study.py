"""How accurate is a hypergradient where the inner problem is solved loosely?"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax.tree

import bilevax as bx
from bilevax.demo.data import Task
from bilevax.demo.model import Weights, zero_weights
from bilevax.demo.tuning import inner_problem, outer_objective, start_penalties

RTOLS = np.logspace(-1, -4, 7)  # where gradient descent stops: ||F(x, y)|| / ||F(x0, y)||
MAX_WEIGHTS = 1000  # of more weights, the matrices that are factored here get large

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
      iterations: how many steps it took, from the start on.
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
    first_norm = optax.tree.norm(problem.optimality(x0, y))

    def solve(x: Weights, rtol: jax.Array) -> tuple[Weights, jax.Array]:
        solver = bx.GradientDescent(step_size, rtol=0.0, atol=rtol * first_norm, maxiter=20_000)
        x, report = bx.solution_map(problem, solver).with_report(x, y)
        return x, report.iterations

    def hypergradient(rule: bx.Rule, x: Weights) -> jax.Array:
        x, _ = rule.refine(problem, x, y)
        slope = jax.grad(outer)(x, y)  # g_1; g_2 is zero, for the validation loss has no penalty
        return rule.pullback(problem, x, y, slope)[0]

    @jax.jit
    def everything() -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        exact = bx.solution_map(problem, bx.Newton(bx.Dense()))(x0, y)
        truth = hypergradient(RULES["Newton step"], exact)

        def compare(x: Weights, rtol: jax.Array) -> tuple[Weights, Any]:
            x, iterations = solve(x, rtol)  # goes on where the last, looser one has stopped
            estimates = {name: hypergradient(rule, x) for name, rule in RULES.items()}
            errors = {name: _relative(estimate, truth) for name, estimate in estimates.items()}
            return x, (iterations, _relative(x, exact), errors)

        _, (iterations, distance, errors) = jax.lax.scan(compare, x0, jnp.asarray(RTOLS))
        return jnp.cumsum(iterations), distance, errors

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
