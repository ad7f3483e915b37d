"""What is measured by the study of memory, each point in a process of its own."""

import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import bilevax as bx

DIM, ROWS = 20_000, 64
STEP_SIZE = 0.1
LAST = 10
MEGABYTE = 1e6

Gradient = Callable[[Any, Any, Any], jax.Array]  # of (y, x0, data)


class Point(NamedTuple):
    """A contender at one number of inner steps; memory in bytes.

    Attributes:
      predicted: by XLA, of temporaries.
      measured: growth of the peak of the process's resident memory during the first call; None if
        it was not run.
      gradient: the result.
    """

    name: str
    steps: int
    predicted: int
    measured: float | None = None
    gradient: float | None = None


def make_arguments() -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(ROWS, DIM)) / np.sqrt(DIM)).astype(np.float32)
    labels = np.sign(rng.normal(size=ROWS)).astype(np.float32)
    data = jnp.asarray(rows), jnp.asarray(labels)
    return jnp.float32(0), jnp.full(DIM, 0.1, jnp.float32), data


def objective(x: jax.Array, y: jax.Array, data: Any) -> jax.Array:
    rows, labels = data
    return jnp.mean(jnp.logaddexp(0.0, -labels * (rows @ x))) + jnp.exp(y) * jnp.sum(x**2) / 2


def outer(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.sum(x**2) / 2


def with_rule(rule: bx.Rule | bx.IterativeRule) -> Callable[[int], Gradient]:
    """Return what makes a gradient by bilevax for a number of steps; the data are closed over."""

    def make(steps: int) -> Gradient:
        def gradient(y: Any, x0: Any, data: Any) -> jax.Array:
            problem = bx.minimum(lambda x, y: objective(x, y, data))
            solver = bx.GradientDescent(STEP_SIZE, rtol=0.0, atol=0.0, maxiter=steps)
            engine = bx.value_and_hypergradient(outer, problem, solver, rule)
            return engine(y, bx.cold_start(x0)).gradient

        return gradient

    return make


def by_hand(steps: int) -> Gradient:
    """Differentiate a `scan` that takes all steps, with nothing said of what to keep."""

    def gradient(y: Any, x0: Any, data: Any) -> jax.Array:
        def value(y: Any) -> jax.Array:
            def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
                return x - STEP_SIZE * jax.grad(objective)(x, y, data), None

            return outer(jax.lax.scan(step, x0, None, length=steps)[0], y)

        return jax.grad(value)(y)

    return gradient


def by_jaxopt(steps: int) -> Gradient:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import jaxopt

    def gradient(y: Any, x0: Any, data: Any) -> jax.Array:
        def value(y: Any) -> jax.Array:
            solver = jaxopt.GradientDescent(
                Partial(objective, data=data),
                stepsize=STEP_SIZE,
                acceleration=False,
                implicit_diff=False,
                maxiter=steps,
                tol=0.0,
                unroll=True,
                jit=True,
            )
            return outer(solver.run(x0, y).params, y)

        return jax.grad(value)(y)

    return gradient


NEWTON = bx.Preconditioned(bx.Implicit(), step=bx.NewtonStep())
CONTENDERS: dict[str, Callable[[int], Gradient]] = {
    "Implicit()": with_rule(bx.Implicit()),
    "Preconditioned(Newton)": with_rule(NEWTON),
    "Reparameterized(exp)": with_rule(bx.Reparameterized(bx.Implicit(), change=bx.ExpChange())),
    "OneStep()": with_rule(bx.OneStep()),
    'Unrolled(mode="forward")': with_rule(bx.Unrolled(mode="forward")),
    f"Unrolled(last={LAST})": with_rule(bx.Unrolled(last=LAST)),
    'Unrolled(checkpoints="sqrt")': with_rule(bx.Unrolled(checkpoints="sqrt")),
    "Unrolled()": with_rule(bx.Unrolled()),
    "scan by hand": by_hand,
    "JAXopt, unrolled": by_jaxopt,
}


def compiled(name: str, steps: int, arguments: tuple[Any, Any, Any]) -> Any:
    return jax.jit(CONTENDERS[name](steps)).lower(*arguments).compile()


def temporaries(program: Any) -> int:
    return program.memory_analysis().temp_size_in_bytes


def measure(name: str, steps: int, most_steps: int, most_bytes: float) -> Point:
    """Compile a contender, and run it if that takes neither too long nor too much memory."""
    arguments = make_arguments()
    program = compiled(name, steps, arguments)
    predicted = temporaries(program)
    if steps > most_steps or predicted > most_bytes:
        return Point(name, steps, predicted)
    before = _reset_peak()
    gradient = float(program(*arguments))
    growth = _peak() - before if before is not None else None
    return Point(name, steps, predicted, growth, gradient)


def _reset_peak() -> float | None:
    """Let the peak of resident memory start from now; return it, or None where there is no /proc.

    Else it would be that of the compiler, which needs more than most programs.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _peak()
    except OSError:
        return None


def _peak() -> float:
    status = Path(f"/proc/{os.getpid()}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return 1024.0 * int(found[1])
