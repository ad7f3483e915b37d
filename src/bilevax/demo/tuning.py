"""The bilevel problem, solved in two ways: a grid over one penalty, and Adam on all of them."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import bilevax as bx
from bilevax.demo.data import Task
from bilevax.demo.model import Weights, accuracy, cross_entropy, penalised_loss, zero_weights

START = 0.01  # every penalty, before tuning
GRID = np.logspace(1, -6, 50)  # single penalties to compare with, from strong to weak
LEARNING_RATE = 0.1  # of Adam; a step changes each penalty by about 10 % at most

# The rule takes one Newton step more and squares the error that the solver leaves, so that the
# solver may stop early.
SOLVER = bx.Newton(rtol=1e-4)
RULE = bx.Preconditioned(bx.Implicit(), step=bx.NewtonStep())


class Run(NamedTuple):
    """What was tried: one entry per inner solve.

    Attributes:
      penalties: (solves, features, columns).
      loss: the cross entropy by part, each (solves,).
      accuracy: the share of right answers by part, each (solves,).
      iterations: Newton steps of each solve.
      status: the worst `Status` code among the solves of an entry.
      run_seconds: wall time of the solves.
      compile_seconds: wall time of the compilation before them.
    """

    penalties: np.ndarray
    loss: dict[str, np.ndarray]
    accuracy: dict[str, np.ndarray]
    iterations: np.ndarray
    status: np.ndarray
    run_seconds: float
    compile_seconds: float

    @property
    def best(self) -> int:
        """The entry with the lowest validation loss."""
        return int(np.nanargmin(self.loss["validation"]))


def inner_problem(task: Task) -> bx.Problem:
    """Return the inner problem: fit the weights to the training rows, for given log-penalties."""

    def train_loss(weights: Weights, log_penalties: jax.Array) -> jax.Array:
        return penalised_loss(weights, log_penalties, task.train)

    return bx.minimum(train_loss)


def outer_objective(task: Task) -> Callable[[Weights, jax.Array], jax.Array]:
    """Return the outer objective: the cross entropy on the validation rows."""

    def validation_loss(weights: Weights, log_penalties: jax.Array) -> jax.Array:
        return cross_entropy(weights, task.validation)

    return validation_loss


def make_engine(task: Task) -> bx.Engine:
    """Return the function from log-penalties to the validation loss and its gradient."""
    return bx.value_and_hypergradient(outer_objective(task), inner_problem(task), SOLVER, RULE)


def start_penalties(task: Task) -> jax.Array:
    """Return the log-penalties before tuning."""
    return jnp.full(task.penalty_shape, np.log(START), dtype=float)


def tune(task: Task, steps: int) -> Run:
    """Minimise the validation loss over all penalties, by Adam on hypergradients.

    Each step starts both of its solves, for the weights and for the adjoint, from the last ones.
    """
    outer_step = bx.make_step(make_engine(task), optax.adam(LEARNING_RATE))

    def step(state: bx.BilevelState, _: None) -> tuple[bx.BilevelState, Any]:
        following = outer_step(state)
        last = jax.tree.map(lambda entries: entries[0], following.history)
        weights = following.warm.x  # the solution for the penalties before the step
        return following, _measure(task, state.y, weights, last.inner_iterations, last.status)

    # Compiled in chunks, between which the progress bar moves.
    chunk = max(size for size in range(1, 11) if steps % size == 0)
    state = outer_step.init(start_penalties(task), zero_weights(task), history=1)
    records = []
    with tqdm(total=steps, desc=task.name, unit="step", leave=False, disable=None) as bar:
        compiled, compile_seconds = _compile(lambda s: jax.lax.scan(step, s, length=chunk), state)
        began = time.perf_counter()
        for _ in range(steps // chunk):
            state, record = jax.block_until_ready(compiled(state))
            records.append(record)
            bar.update(chunk)
        run_seconds = time.perf_counter() - began
    record = jax.tree.map(lambda *leaves: np.concatenate(leaves), *records)
    return Run(**record, run_seconds=run_seconds, compile_seconds=compile_seconds)


def search_grid(task: Task) -> Run:
    """Solve for one common penalty at a time, from strong to weak, each from the last solution."""
    solve = bx.solution_map(inner_problem(task), SOLVER)

    def step(weights: Weights, log_penalty: jax.Array) -> tuple[Weights, Any]:
        log_penalties = jnp.full(task.penalty_shape, log_penalty)
        weights, report = solve.with_report(weights, log_penalties)
        return weights, _measure(task, log_penalties, weights, report.iterations, report.status)

    arguments = zero_weights(task), jnp.log(GRID)
    compiled, compile_seconds = _compile(lambda x, xs: jax.lax.scan(step, x, xs), *arguments)
    began = time.perf_counter()
    _, record = jax.block_until_ready(compiled(*arguments))
    run_seconds = time.perf_counter() - began
    record = jax.tree.map(np.asarray, record)
    return Run(**record, run_seconds=run_seconds, compile_seconds=compile_seconds)


def _measure(
    task: Task, log_penalties: jax.Array, weights: Weights, iterations: Any, status: Any
) -> dict[str, Any]:
    """Return one solve's entry of a `Run`, without the times."""
    return {
        "penalties": jnp.exp(log_penalties),
        "loss": {name: cross_entropy(weights, part) for name, part in task.parts.items()},
        "accuracy": {name: accuracy(weights, part) for name, part in task.parts.items()},
        "iterations": iterations,
        "status": status,
    }


def _compile(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any], float]:
    """Compile ahead, so that compilation and computation are timed apart."""
    began = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled, time.perf_counter() - began
