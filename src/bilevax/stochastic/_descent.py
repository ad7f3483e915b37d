"""Stochastic inexact hypergradient descent: an outer loop around the stochastic engine."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax import _mesh as mesh
from bilevax import _trees as trees
from bilevax._closures import as_partial
from bilevax._status import is_failure
from bilevax.stochastic._engine import StochasticEngine
from bilevax.stochastic._results import StochasticState, anonymous, named

PyTree = Any


class DescentHistory(NamedTuple):
    """What happened in each outer step: arrays with one entry per step.

    Attributes:
      value: g(x, y) at the y before the step.
      gradient_norm: the norm of the hypergradient there.
      standard_error: of the hypergradient; see `StochasticReport`.
      status: of the hypergradient, int32. Where it is a failure, the step left y as it was.
      inner_steps: steps on x, int32.
      adjoint_steps: steps on v, int32.
      samples: batches in an average, int32.
    """

    value: jax.Array
    gradient_norm: jax.Array
    standard_error: jax.Array
    status: jax.Array
    inner_steps: jax.Array
    adjoint_steps: jax.Array
    samples: jax.Array


class DescentResult(NamedTuple):
    """The result of `sihd`.

    Attributes:
      y: the outer variable after the last step.
      state: the `StochasticState` after the last step.
      history: a `DescentHistory`.
    """

    y: PyTree
    state: StochasticState
    history: DescentHistory


def sihd(
    engine: StochasticEngine,
    optimizer: optax.GradientTransformation,
    y: PyTree,
    state: StochasticState,
    steps: int,
    *,
    growth: Any = None,
    projection: Callable[[PyTree], PyTree] | None = None,
) -> DescentResult:
    """Minimise h(y) = g(x*(y), y) by stochastic inexact hypergradient descent (SIHD).

    All outer steps are one compiled `scan`. With `growth=c`, the outer step s = 1, 2, ... takes
    ceil(c s) inner steps, adjoint steps and samples in place of the engine's, and starts cold: its
    hypergradient has an error that falls as s grows, so a constant outer step size will do, and
    nothing is presumed of how x*(y) moves. With `growth=None` every step has the counts of the
    engine and starts from the x and v of the last one.

    Args:
      engine: made by `stochastic_hypergradient`.
      optimizer: any Optax optimiser, such as `optax.sgd(0.1)`. Make it once: a new one is compiled
        anew.
      y: where to start, a pytree of floating arrays.
      state: the state of the engine, from `engine.init(x0, key)`.
      steps: the number of outer steps, a plain number.
      growth: c, which may be traced; None for warm starts and constant counts.
      projection: a function of y, applied after every step; it returns a pytree like y.

    Returns:
      A `DescentResult`.

    Raises:
      TypeError: for a wrong kind of argument; if y has leaves that are not floating; if what
        `projection` returns has not the structure, shapes and dtypes of y.
      ValueError: if `steps` or `growth` is not positive; and whatever the engine raises.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import bilevax as bx
      >>> problem = bx.stochastic_minimum(lambda x, y, batch: jnp.mean((x - y * batch) ** 2) / 2)
      >>> engine = bx.stochastic_hypergradient(
      ...     lambda x, y: (x - 4.0) ** 2 / 2,  # x*(y) = 2 y
      ...     problem,
      ...     sampler=bx.UniformSampler(jnp.arange(5.0), batch_size=4),
      ...     inner_steps=1,
      ...     adjoint_steps=1,
      ...     inner_step_size=bx.decreasing(1.0, 1.0),
      ...     adjoint_step_size=0.5,
      ... )
      >>> state = engine.init(0.0, jax.random.key(0))
      >>> result = bx.sihd(engine, optax.sgd(0.1), 0.0, state, steps=100, growth=2.0)
      >>> print(f"{result.y:.1f}", result.history.samples[-1])
      2.0 200

    Source:
      R. Grazzi, M. Pontil, S. Salzo, "Bilevel Optimization with a Lower-level Contraction: Optimal
      Sample Complexity without Warm-start", 2023.
    """
    checks.is_component("engine", engine, StochasticEngine, "stochastic_hypergradient(...)")
    checks.is_component("optimizer", optimizer, optax.GradientTransformation, "optax.sgd(0.1)")
    checks.inner_variable(y, "y")
    if growth is not None:
        checks.positive("growth", growth)
        if jnp.shape(growth) != ():
            raise TypeError(f"`growth` must be a single number, got {checks.describe(growth)}.")
    if projection is not None:
        projection = as_partial("projection", projection)
    steps = checks.known_whole("steps", steps)
    y, state = engine.checked(y, state)
    # As Partials the two functions are pytrees without leaves, like all functions here.
    init, update = Partial(optimizer.init), Partial(optimizer.update)
    result = _run(engine, init, update, y, anonymous(state), growth, projection, steps=steps)
    return result._replace(state=named(result.state, state))


@functools.partial(jax.jit, static_argnames="steps")
def _run(
    engine: StochasticEngine,
    init: Partial,
    update: Partial,
    y: PyTree,
    state: StochasticState,
    growth: Any,
    projection: Partial | None,
    steps: int,
) -> DescentResult:
    if projection is not None:
        image = jax.eval_shape(projection, y)
        checks.same_structure("projection", image, y, expected="y")

    def step(carry: Any, number: jax.Array) -> tuple[Any, DescentHistory]:
        y, optimizer, state = carry
        current = engine
        if growth is not None:
            current, state = _grown(engine, growth, number), state.cold()
        result = current(y, state)
        with jax.numpy_dtype_promotion("standard"):  # Optax counts on it
            updates, next_optimizer = update(result.gradient, optimizer, y)
        next_y = optax.apply_updates(y, updates)
        if projection is not None:
            next_y = projection(next_y)
        failed = is_failure(result.report.status)
        following = trees.where(failed, (y, optimizer), trees.as_arrays((next_y, next_optimizer)))
        history = DescentHistory(
            result.value,
            trees.norm(result.gradient),
            result.report.standard_error,
            result.report.status,
            *(jnp.asarray(getattr(current, name), jnp.int32) for name in _COUNTS),
        )
        return (*following, result.state), history

    start = (y, trees.as_arrays(init(y)), state)
    (y, _, state), history = mesh.scan(step, start, jnp.arange(1, steps + 1))
    return DescentResult(y, state, history)


_COUNTS = ("inner_steps", "adjoint_steps", "samples")


def _grown(engine: StochasticEngine, growth: Any, number: jax.Array) -> StochasticEngine:
    """Return the engine with ceil(growth * number) for all counts."""
    kind = jnp.result_type(float)
    product = jnp.asarray(growth, kind) * number.astype(kind)
    # A product that is whole but for rounding, as 0.1 * 30 can be, is not rounded up.
    count = jnp.ceil(product * (1 - 4 * jnp.finfo(product.dtype).eps)).astype(jnp.int32)
    return dataclasses.replace(engine, **dict.fromkeys(_COUNTS, count))
