"""HOAG: inexact hypergradient descent with a step size that adapts to inexact values."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.tree

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax.hypergradient import Engine
from bilevax.outer._schedules import Geometric, Schedule
from bilevax.outer._step import OuterStep, make_step

PyTree = Any

# After progress the step gets longer by 5 %, and after a rise of the value it is halved.
_LENGTHEN = 0.95
_SHORTEN = 2.0


def hoag(
    engine: Engine | Callable[[jax.Array], Engine],
    *,
    schedule: Schedule = Geometric(0.1, 0.9),
    projection: Callable[[PyTree], PyTree] | None = None,
    first_step: Any = 1.0,
) -> OuterStep:
    """Make the outer step of HOAG, hyperparameter optimisation with approximate gradient.

        y_{s+1} = P(y_s - Omega_s / L_s)

    The tolerance falls with the schedule, the solves start warm, and L_s estimates the curvature of
    h from values that are as inexact as the tolerances e_s are. With d_s = ||y_s - y_{s-1}||,

        L_s = 0.95 L_{s-1}  if g_s <= g_{s-1} + e_s + e_{s-1} (1 + d_s) - L_{s-1} d_s^2 / 2,
              L_{s-1}       else, if g_s <= g_{s-1},
              2 L_{s-1}     else.

    The tolerances, which have no unit, stand for errors of the value: scale g to be about 1.

    Args:
      engine: made by `value_and_hypergradient`, or a function of a PRNG key that returns one.
      schedule: how the tolerance falls. Its tolerances must have a finite sum for convergence, as
        those of `Geometric` and of `Harmonic` with a power above 1 have.
      projection: P; None for none.
      first_step: the length of the first step, in the unit of y: L_0 is ||Omega_0|| over it.

    Returns:
      An `OuterStep` for `minimize`.

    Raises:
      TypeError: as `make_step` does; for an engine with an `accuracy`, which has no tolerance.
      ValueError: if `first_step` is not positive.

    Example:
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: 0.5 * (x - y) ** 2)  # x*(y) = y
      >>> engine = bx.value_and_hypergradient(lambda x, y: (x - 3.0) ** 2, problem, bx.Newton())
      >>> result = bx.minimize(bx.hoag(engine), 1.0, 0.0, steps=100)
      >>> round(float(result.y), 2)
      3.0

    Source:
      F. Pedregosa, "Hyperparameter Optimization with Approximate Gradient", 2016.
    """
    checks.positive("first_step", first_step)
    if isinstance(engine, Engine) and engine.accuracy is not None:
        raise TypeError("`hoag` adapts to tolerances: take an engine without `accuracy`.")
    return make_step(engine, _descent(first_step), schedule=schedule, projection=projection)


class _State(NamedTuple):
    curvature: jax.Array  # L
    y: PyTree  # of the step before, and what was known there:
    value: jax.Array
    tolerance: jax.Array


def _descent(first_step: Any) -> optax.GradientTransformationExtraArgs:
    """Return steps of length 1 / L, where L follows from the values and tolerances of steps."""

    def init(params: PyTree) -> _State:
        zero = jnp.zeros((), trees.dtype(params))
        return _State(zero, params, jnp.full_like(zero, jnp.inf), zero)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, _State]:
        dtype = state.curvature.dtype
        value, tolerance = extra["value"].astype(dtype), extra["tolerance"].astype(dtype)
        distance = trees.norm(optax.tree.sub(params, state.y))
        slack = tolerance + state.tolerance * (1 + distance)
        progress = value <= state.value + slack - state.curvature * distance**2 / 2
        factor = jnp.where(value <= state.value, 1, _SHORTEN)
        curvature = state.curvature * jnp.where(progress, _LENGTHEN, factor)
        norm = trees.norm(updates).astype(dtype)
        first = jnp.where(norm > 0, norm, 1) / first_step
        curvature = jnp.where(jnp.isinf(state.value), first, curvature).astype(dtype)
        return trees.scale(-1 / curvature, updates), _State(curvature, params, value, tolerance)

    return optax.GradientTransformationExtraArgs(init, update)
