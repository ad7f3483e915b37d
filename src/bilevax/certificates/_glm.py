"""The constants of generalised linear models with quadratic penalties.

f(x, y) = mean_i l(a_i . x, b_i) + sum_j exp(y_j) x_j^2 / 2
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from bilevax import _checks as checks

PyTree = Any


class Loss(NamedTuple):
    """What bounds need of l on the way from x to the edge of a ball, the largest over all rows.

    Attributes:
      slope_terms: the absolute terms that add up to l', per row, at x itself.
      second: |l''|.
      third: |l'''|.
      slope: l' at x, per row.
      is_local: whether these bounds hold in the ball only.
    """

    slope_terms: jax.Array
    second: Any
    third: Any
    slope: jax.Array
    is_local: bool = False


def squares(scores: jax.Array, targets: jax.Array, reach: jax.Array) -> Loss:
    """Return what is known of (score - target)^2 / 2."""
    return Loss(jnp.abs(scores) + jnp.abs(targets), 1.0, 0.0, scores - targets)


def logistic(scores: jax.Array, labels: jax.Array, reach: jax.Array) -> Loss:
    """Return what is known of log(1 + exp(-label score)); |l'''| is largest where l'' is 1 / 6."""
    slope = -labels * jax.nn.sigmoid(-labels * scores)
    return Loss(jnp.abs(slope), 0.25, 0.0962251, slope)  # 1 / (6 sqrt(3)), rounded up


def poisson(scores: jax.Array, counts: jax.Array, reach: jax.Array) -> Loss:
    """Return what is known of exp(score) - count score, where scores change by `reach` at most."""
    largest = jnp.max(jnp.exp(scores + reach))
    rates = jnp.exp(scores)
    return Loss(rates + jnp.abs(counts), largest, largest, rates - counts, True)


def checked(name: str, data: Any) -> tuple[jax.Array, jax.Array]:
    """Return a pair (features, targets), or raise if it is none."""
    if not (isinstance(data, tuple | list) and len(data) == 2):
        raise TypeError(f"`{name}` must be a pair (features, targets), got {type(data).__name__}.")
    features, targets = map(jnp.asarray, data)
    if features.ndim != 2 or targets.shape != features.shape[:1]:
        raise TypeError(
            f"`{name}` must be a matrix of features and a vector of as many targets, "
            f"got {checks.describe((features, targets))}."
        )
    return features, targets


class _Part(NamedTuple):
    """A mean loss over rows, in the norm in which the penalty has curvature 1."""

    rows: jax.Array  # ||a_i||_*, per row
    gram: jax.Array  # the largest eigenvalue of mean a_i a_i^T, at most
    trace: jax.Array  # its trace


def _part(features: jax.Array, convexity: jax.Array) -> _Part:
    scaled = jnp.abs(features) / jnp.sqrt(convexity)
    squares = jnp.sum(scaled**2, axis=1)
    trace = jnp.mean(squares)
    # ||A||_2^2 <= ||A||_1 ||A||_inf.
    both = jnp.max(jnp.sum(scaled, axis=1)) * jnp.max(jnp.mean(scaled, axis=0))
    return _Part(jnp.sqrt(squares), jnp.minimum(trace, both), trace)


def constants(
    train: tuple[jax.Array, jax.Array],
    validation: tuple[jax.Array, jax.Array],
    loss: Partial,
    x: jax.Array,
    y: jax.Array,
) -> dict[str, Any]:
    """Return the fields of a `BoundConstants` at (x, y)."""
    dtype = x.dtype
    # Rounding of the data by less than eps is in the count of roundings.
    (rows, targets), (others, other_targets) = jax.tree.map(
        lambda leaf: leaf.astype(dtype), (train, validation)
    )
    penalty, pull = jax.vjp(lambda y: jnp.broadcast_to(y, x.shape), y.astype(dtype))
    penalty = jnp.exp(penalty)
    inner, outer = _part(rows, penalty), _part(others, penalty)

    def at(features: jax.Array, targets: jax.Array, reach: jax.Array) -> Loss:
        return loss(features @ x, targets, reach)

    # x* is in the ball of radius ||F||_*, with room for rounding and for zero.
    nowhere = jnp.zeros((), dtype)
    optimality = rows.T @ at(rows, targets, nowhere).slope / len(targets) + penalty * x
    here = jnp.linalg.norm(optimality / jnp.sqrt(penalty))
    radius = 2 * here + jnp.finfo(dtype).eps ** 0.5 / jnp.max(inner.rows)
    own, other = (
        at(features, labels, part.rows * radius)
        for features, labels, part in (
            (rows, targets, inner),
            (others, other_targets, outer),
        )
    )

    # F_2 = diag(penalty x), summed over the entries that share a log-penalty: by Cauchy-Schwarz
    # ||F_2^T v||^2 <= max over y_k of sum penalty^2 x^2 / penalty, times ||v||^2. The change of
    # F_2^T v from a to b is at most sum |penalty (a - b) v| <= ||a - b|| ||v||.
    (shared,) = pull(penalty * x**2)
    # Terms of a score: |a_i| |x|. They reach F by l''.
    reach_own = own.slope_terms + own.second * (jnp.abs(rows) @ jnp.abs(x))
    reach_other = other.slope_terms + other.second * (jnp.abs(others) @ jnp.abs(x))
    length = sum(rows.shape) + sum(others.shape)
    return {
        "strong_convexity": penalty,
        "jacobian": own.third * jnp.max(inner.rows) * inner.gram,
        "mixed": jnp.sqrt(jnp.max(shared)),
        "mixed_change": jnp.ones((), dtype),
        "outer_x": other.second * outer.gram,
        "outer_y": nowhere,
        "smoothness": own.second * inner.trace + 1,
        "optimality_terms": jnp.mean(inner.rows * reach_own)
        + jnp.linalg.norm(jnp.sqrt(penalty) * x),
        "outer_terms": jnp.mean(outer.rows * reach_other),
        "roundings": length,
        "radius": radius if own.is_local else jnp.inf,
    }
