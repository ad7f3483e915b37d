"""The stochastic engine: hypergradients from samples, by stochastic implicit differentiation."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax.tree
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._closures import as_partial
from bilevax._status import Status, code, is_failure
from bilevax.stochastic import _parts as parts
from bilevax.stochastic._averages import squared_error
from bilevax.stochastic._host import HostSampler
from bilevax.stochastic._problems import StochasticProblem
from bilevax.stochastic._results import (
    StochasticHypergradient,
    StochasticReport,
    StochasticState,
    anonymous,
    named,
)
from bilevax.stochastic._sampling import Sampler, single_key
from bilevax.stochastic._step_sizes import as_step_size, check_step_size

PyTree = Any


@trees.register
@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, for `jax.jit(engine)`
class StochasticEngine:
    """A pure function (y, state) -> `StochasticHypergradient`; see `stochastic_hypergradient`.

    It is a pytree: `dataclasses.replace(engine, inner_steps=n)` has other counts, which may be
    traced, and compiles nothing.

    Attributes:
      outer: the outer objective.
      problem: the inner problem.
      sampler: draws batches of the inner problem.
      outer_sampler: draws batches of the outer objective; None if it takes none.
      inner_steps: steps on x.
      adjoint_steps: steps on v.
      samples: batches in the last averages.
      inner_step_size: of the steps on x.
      adjoint_step_size: of the steps on v.
    """

    outer: Partial
    problem: StochasticProblem
    sampler: Sampler
    outer_sampler: Sampler | None
    inner_steps: Any
    adjoint_steps: Any
    samples: Any
    inner_step_size: Any
    adjoint_step_size: Any

    def init(self, x0: PyTree, key: jax.Array) -> StochasticState:
        """Return the state of a cold start: x0, zero for the adjoint, samplers at their starts."""
        checks.inner_variable(x0, "x0")
        x0 = trees.as_arrays(x0)
        inner, outer = jax.random.split(single_key(key))
        outer_state = None if self.outer_sampler is None else self.outer_sampler.init(outer)
        adjoint = optax.tree.zeros_like(x0)
        state = StochasticState(x0, adjoint, self.sampler.init(inner), outer_state, x0)
        return trees.copied(state)

    def __call__(self, y: PyTree, state: StochasticState) -> StochasticHypergradient:
        """Return value, hypergradient, next state and report at y."""
        y, state = self.checked(y, state)
        result = _evaluate(self, y, anonymous(state))
        return result._replace(state=named(result.state, state))

    def checked(self, y: PyTree, state: StochasticState) -> tuple[PyTree, StochasticState]:
        """Return y and the state as arrays, or raise if they do not fit this engine."""
        if not isinstance(state, StochasticState):
            raise TypeError(
                f"`state` must be a StochasticState, made by `engine.init(x0, key)`; got {state!r}."
            )
        checks.inner_variable(state.x, "state.x")
        checks.outer_variable(y)
        y, state = trees.as_arrays(y), trees.as_arrays(state)
        for name in ("adjoint", "start"):
            checks.same_structure(
                f"state.{name}", getattr(state, name), state.x, expected="state.x", argument=True
            )
        if (state.outer_sampler is None) != (self.outer_sampler is None):
            has, had = ("an", "none") if state.outer_sampler is None else ("no", "one")
            raise TypeError(
                f"`state` must be made by `init` of this engine, which has {has} outer sampler; "
                f"got a state with {had}."
            )
        for name in ("sampler", "outer_sampler"):
            sampler = getattr(self, name)
            if sampler is not None:
                sampler.check(getattr(state, name), f"state.{name}")
                y, state = sampler.alone((y, state))
        return y, state


def stochastic_hypergradient(
    outer: Callable[..., jax.Array],
    problem: StochasticProblem,
    *,
    sampler: Sampler,
    outer_sampler: Sampler | None = None,
    inner_steps: Any,
    adjoint_steps: Any,
    samples: Any = 1,
    inner_step_size: Any,
    adjoint_step_size: Any,
) -> StochasticEngine:
    """Make the stochastic engine: hypergradients of h(y) = g(x*(y), y) from batches alone.

        engine = stochastic_hypergradient(outer, problem, sampler=..., ...)
        result = engine(y, engine.init(x0, key))
        result = engine(y, result.state)

    Stochastic implicit differentiation (SID), each step with a new batch:

        x <- x - inner_step_size F(x, y; batch)                          inner_steps times
        g, g_1, g_2 <- averages over batches of the outer objective      samples batches
        v <- v - adjoint_step_size (F_1(x, y; batch)^T v - g_1)          adjoint_steps times
        gradient = g_2 - average of F_2(x, y; batch)^T v                 samples batches

    On a fixed point that is x <- (1 - step) x + step T(x, y; batch), and so for v with T_1^T.
    Every call starts from the x and v of its state. The engine is pure and compiled once per
    shape; `jit`, `vmap` over keys or y, and `scan` go through it.

    Args:
      outer: g, a function of (x, y) that returns a real scalar; with `outer_sampler` a function of
        (x, y, batch) whose mean over batches is g(x, y).
      problem: `stochastic_minimum(f)` or `stochastic_fixed_point(T)`.
      sampler: draws the batches of the inner problem, for x, v and F_2.
      outer_sampler: draws the batches of the outer objective.
      inner_steps: a whole number, which may be traced.
      adjoint_steps: a whole number, which may be traced.
      samples: batches in an average, a whole number, which may be traced. From 2 on, the report
        has a standard error.
      inner_step_size: a number, or a function of the index 0, 1, ... of the step, such as
        `decreasing(beta, gamma)` or a schedule of Optax. Every call starts at 0.
      adjoint_step_size: the same, for v.

    Returns:
      A `StochasticEngine`, called as engine(y, state).

    Raises:
      TypeError: for a wrong kind of argument; and, at the first call, if `outer` does not return a
        scalar or the problem does not fit x.
      ValueError: for a step size or a number of samples that is not positive, for a negative
        number of steps, for two samplers of one iterator; and for a state that belongs to other
        data.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import bilevax as bx
      >>> problem = bx.stochastic_minimum(  # x*(y) = mean of the data / (1 + y)
      ...     lambda x, y, batch: jnp.mean((x - batch) ** 2) / 2 + y * x**2 / 2
      ... )
      >>> engine = bx.stochastic_hypergradient(
      ...     lambda x, y: x,
      ...     problem,
      ...     sampler=bx.UniformSampler(jnp.arange(5.0), batch_size=2),
      ...     inner_steps=2000,
      ...     adjoint_steps=100,
      ...     samples=100,
      ...     inner_step_size=bx.decreasing(1.0, 2.0),
      ...     adjoint_step_size=0.5,
      ... )
      >>> result = engine(1.0, engine.init(0.0, jax.random.key(0)))
      >>> print(f"{result.value:.1f} {result.gradient:.1f}")  # 2 / (1 + y), - 2 / (1 + y)^2
      1.0 -0.5

    Source:
      R. Grazzi, M. Pontil, S. Salzo, "Convergence Properties of Stochastic Hypergradients", 2021;
      with averages: "Bilevel Optimization with a Lower-level Contraction: Optimal Sample
      Complexity without Warm-start", 2023.
    """
    outer = as_partial("outer", outer)
    checks.is_component("problem", problem, StochasticProblem, "stochastic_minimum(objective)")
    example = "UniformSampler(data, batch_size)"
    checks.is_component("sampler", sampler, Sampler, example)
    if outer_sampler is not None:
        checks.is_component("outer_sampler", outer_sampler, Sampler, example)
        if isinstance(sampler, HostSampler) and isinstance(outer_sampler, HostSampler):
            sampler.check_apart(outer_sampler)
    checks.not_negative("inner_steps", inner_steps, whole=True)
    checks.not_negative("adjoint_steps", adjoint_steps, whole=True)
    checks.positive("samples", samples, whole=True)
    return StochasticEngine(
        outer,
        problem,
        sampler,
        outer_sampler,
        inner_steps,
        adjoint_steps,
        samples,
        as_step_size("inner_step_size", inner_step_size),
        as_step_size("adjoint_step_size", adjoint_step_size),
    )


@jax.jit
def _evaluate(
    engine: StochasticEngine, y: PyTree, state: StochasticState
) -> StochasticHypergradient:
    check_numbers(engine)
    inner = parts.Inner(engine.problem, engine.sampler, y)
    inner.check(state.x, state.sampler)
    varying = {
        name: inner.varying(getattr(state, name), state.sampler)
        for name in ("x", "adjoint", "start")
    }
    state = state._replace(**varying)
    parts.check_outer(engine.outer, engine.outer_sampler, state.x, y, state.outer_sampler)
    x, inner_residual, sampling = inner.descend(
        state.x, engine.inner_step_size, engine.inner_steps, state.sampler
    )
    explicit, outer_sampling = parts.average_outer(
        engine.outer, engine.outer_sampler, x, y, engine.samples, state.outer_sampler
    )
    value, cotangent_x, cotangent_y = explicit.mean
    adjoint, residual, sampling = inner.solve_adjoint(
        x, cotangent_x, state.adjoint, engine.adjoint_step_size, engine.adjoint_steps, sampling
    )
    implicit, sampling = inner.average_pullback(x, adjoint, engine.samples, sampling)
    gradient = optax.tree.sub(cotangent_y, implicit.mean)

    size = trees.norm(cotangent_x)
    adjoint_residual = residual / jnp.where(size > 0, size, 1)
    measured = jnp.where(engine.adjoint_steps > 0, adjoint_residual, 0)
    status = _judge(x, state.start, measured, (value, adjoint, gradient))
    variance = squared_error(implicit.spread, engine.samples)
    if engine.outer_sampler is not None:
        variance += squared_error(explicit.spread.y, engine.samples)
    report = StochasticReport(status, inner_residual, adjoint_residual, jnp.sqrt(variance))
    following = StochasticState(x, adjoint, sampling, outer_sampling, state.start)
    # What has been lost is no start for the next call.
    cold, failed = following.cold(), is_failure(status)
    x_next, adjoint_next = trees.where(failed, (cold.x, cold.adjoint), (x, adjoint))
    following = following._replace(x=x_next, adjoint=adjoint_next)
    return StochasticHypergradient(value, trees.with_floating(gradient, y), x, following, report)


def _judge(x: PyTree, start: PyTree, adjoint_residual: jax.Array, others: PyTree) -> jax.Array:
    epsilon = trees.epsilon(x)
    # The 1 is for a start at zero.
    diverged = trees.norm(x) * epsilon - 1 > trees.norm(start)
    diverged |= adjoint_residual * epsilon > 1
    status = jnp.where(diverged, code(Status.DIVERGED), code(Status.TRUNCATED))
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((x, others))]
    return jnp.where(jnp.stack(finite).all(), status, code(Status.NONFINITE))


def check_numbers(engine: StochasticEngine) -> None:
    """Raise if a count is not one whole number, or a step size not one number."""
    checks.single_numbers(engine)
    for name in ("inner_steps", "adjoint_steps", "samples"):
        value = getattr(engine, name)
        if not jnp.issubdtype(jnp.result_type(value), jnp.integer):
            raise TypeError(f"`{name}` must be a whole number, got {checks.describe(value)}.")
    for name in ("inner_step_size", "adjoint_step_size"):
        check_step_size(name, getattr(engine, name))
