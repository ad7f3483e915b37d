"""Pytree algebra that `optax.tree` does not have.

Vectors of this package are pytrees of real floating arrays. Whatever `optax.tree` offers
(`vdot`, `norm`, `sub`, `zeros_like`, ...) is used directly; this module adds what is missing.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax.tree
from jax.ad_checkpoint import checkpoint_name
from jax.flatten_util import ravel_pytree

from bilevax import _mesh as mesh

PyTree = Any
DECISION = "decision"
_Class = TypeVar("_Class", bound=type)


def register(cls: _Class) -> _Class:
    """Make a frozen dataclass a pytree; fields with `metadata={"static": True}` are no leaves.

    Used in place of `jax.tree_util.register_dataclass`: tree structures made by that (in JAX 0.10)
    compare equal for two classes with equal fields, whereupon a compiled function can mistake one
    for the other.
    """
    fields = dataclasses.fields(cls)
    static = [field.name for field in fields if field.metadata.get("static", False)]
    names = [field.name for field in fields if field.name not in static]
    keys = [jax.tree_util.GetAttrKey(name) for name in names]

    def flatten(node: Any) -> tuple[list[Any], tuple[Any, ...]]:
        children = [getattr(node, name) for name in names]
        return children, tuple(getattr(node, name) for name in static)

    def flatten_with_keys(node: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        children, values = flatten(node)
        return list(zip(keys, children, strict=True)), values

    # Without `__init__`, whose checks are for what a person makes: JAX also puts placeholders into
    # the fields, and takes pytrees apart and together all the time.
    def unflatten(values: tuple[Any, ...], children: Iterable[Any]) -> Any:
        node = object.__new__(cls)
        for name, value in zip([*names, *static], [*children, *values], strict=True):
            object.__setattr__(node, name, value)
        return node

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def dtype(tree: PyTree) -> jnp.dtype:
    """Return the common floating dtype of the leaves (the default one if there are none)."""
    leaves = jax.tree.leaves(tree)
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*leaves) if leaves else jnp.result_type(float)


def at_least_single(dtype: Any) -> jnp.dtype:
    """Return the dtype, or float32 in place of a narrower one."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def epsilon(tree: PyTree) -> float:
    """Return the machine epsilon of the least precise leaf."""
    leaves = jax.tree.leaves(tree)
    return max((float(jnp.finfo(leaf.dtype).eps) for leaf in leaves), default=2.0**-52)


def dimension(tree: PyTree) -> int:
    """Return the total number of entries."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def as_arrays(tree: PyTree) -> PyTree:
    """Turn numbers into arrays, and weakly typed ones into arrays of their own dtype."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), tree)


def copied(tree: PyTree) -> PyTree:
    """Return a tree of arrays that share no memory, with one another or with those given.

    For states: a compiled step to which one is donated overwrites it.
    """
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


def ravel(tree: PyTree) -> tuple[jax.Array, Callable[[jax.Array], PyTree]]:
    """Return a tree as a flat vector, and the way back."""
    with jax.numpy_dtype_promotion("standard"):
        flat, unravel = ravel_pytree(mesh.whole(tree))
    return flat, lambda flat: mesh.cut_like(unravel(flat), tree)


def add_scaled(a: PyTree, scalar: Any, b: PyTree) -> PyTree:
    """Return a + scalar * b in the dtypes of a."""
    return jax.tree.map(lambda u, w: u + jnp.asarray(scalar, u.dtype) * w, a, b)


def scale(scalar: Any, a: PyTree) -> PyTree:
    """Return scalar * a in the dtypes of a."""
    return jax.tree.map(lambda u: jnp.asarray(scalar, u.dtype) * u, a)


def negative(a: PyTree) -> PyTree:
    """Return -a."""
    return jax.tree.map(jnp.negative, a)


def inner(a: PyTree, b: PyTree) -> jax.Array:
    """Return the Euclidean inner product as an array of the common dtype."""
    if any(map(mesh.is_cut, jax.tree.leaves((a, b)))):
        products = [jnp.sum(u * w) for u, w in zip(*map(jax.tree.leaves, (a, b)), strict=True)]
        total = jnp.zeros((), dtype(a))
        return sum((product.astype(total.dtype) for product in products), total)
    with jax.numpy_dtype_promotion("standard"):  # leaves may have several dtypes
        return jnp.asarray(optax.tree.vdot(a, b), dtype(a))


def norm(a: PyTree) -> jax.Array:
    """Return the Euclidean norm as an array of the common dtype, with derivative zero at zero.

    Where squares would be out of range, entries are taken in another unit: a power of two, so that
    no digit changes.
    """
    common = dtype(a)
    wide = at_least_single(common)
    exponent = int(jnp.finfo(wide).maxexp)
    size, one = max_abs(a).astype(wide), jnp.ones((), wide)
    factor = where(size > 2.0 ** (exponent // 4), one * 2.0 ** -(5 * exponent // 8), one)
    # Its square is in range: compilers may take it out of the sum of squares.
    factor = where(size < 2.0 ** -(exponent // 4), one * 2.0 ** (exponent // 2 - 2), factor)
    factor = jax.lax.stop_gradient(factor)
    scaled = jax.tree.map(lambda u: u.astype(wide) * factor, a)
    square = inner(scaled, scaled)
    positive = square > 0
    root = where(positive, jnp.sqrt(where(positive, square, one)), square)
    return (root / factor).astype(common)


def max_abs(a: PyTree) -> jax.Array:
    """Return the largest absolute entry (0 for an empty tree; NaN if an entry is NaN)."""
    result = jnp.zeros((), dtype(a))
    for leaf in jax.tree.leaves(a):
        result = jnp.maximum(result, jnp.max(jnp.abs(leaf), initial=0).astype(result.dtype))
    return result


def signs(count: int, like: jax.Array) -> jax.Array:
    """Return so many vectors of signs like a flat one: bits of scrambled indices, nine at most.

    They are as good as random, and always the same. Random numbers would take long to compile.
    """
    index = jax.lax.iota(jnp.uint32, like.size)
    bits = (index ^ (index >> 15)) * np.uint32(0x9E3779B1)
    bits = (bits ^ (bits >> 13)) * np.uint32(0x85EBCA77)
    rows = [((bits >> shift) & 1).astype(like.dtype) for shift in range(29, 29 - 3 * count, -3)]
    return 2 * jnp.stack(rows) - 1


def where(condition: jax.Array, a: PyTree, b: PyTree) -> PyTree:
    """Return a where the scalar condition holds and b elsewhere; both have arrays of equal types.

    Used for single numbers too, where there are many: `jnp.where` is a compiled function of its
    own, which takes longer to trace and to lower.
    """
    return jax.tree.map(lambda u, w: jax.lax.select(condition, u, w), a, b)


def decided(outcome: PyTree) -> PyTree:
    """Mark what a comparison led to, a constant under differentiation.

    Where numbers are near rounding, a comparison has two outcomes: compilers may form a product and
    a sum at once in one copy of a computation, and not in another. So a backward pass, which
    computes a step anew, must be told what was decided: it keeps what is marked here.
    """
    mark = functools.partial(checkpoint_name, name=DECISION)
    return jax.tree.map(mark, jax.lax.stop_gradient(outcome))


@jax.custom_batching.custom_vmap
def in_any_lane(condition: jax.Array) -> jax.Array:
    """Tell whether a condition holds in any lane of `jax.vmap`, so that `cond` stays a `cond`."""
    return condition


@in_any_lane.def_vmap
def _in_any_lane_of_a_batch(_: Any, is_batched: Any, condition: jax.Array) -> Any:
    return in_any_lane(jnp.any(condition, axis=0)), False


def is_float0(leaf: Any) -> bool:
    """Tell whether a cotangent belongs to an integer or PRNG-key leaf."""
    return getattr(leaf, "dtype", None) == jax.dtypes.float0


def add_cotangents(a: PyTree, b: PyTree) -> PyTree:
    """Return a + b; cotangents of integer and PRNG-key leaves (float0) stay as they are."""
    return jax.tree.map(lambda u, w: u if is_float0(u) else u + w, a, b)


def difference(a: PyTree, b: PyTree) -> PyTree:
    """Return a - b; cotangents of integer and PRNG-key leaves (float0) stay as they are."""
    return jax.tree.map(lambda u, w: u if is_float0(u) else u - w, a, b)


def with_floating(values: list[jax.Array], like: PyTree) -> PyTree:
    """Return a cotangent of `like` from its floating leaves; integer and key leaves get float0."""
    remaining = iter(values)

    def place(leaf: jax.Array) -> Any:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return next(remaining)
        return jax.custom_derivatives.zero_from_primal(leaf)

    return jax.tree.map(place, like)


def floating(tree: PyTree) -> list[jax.Array]:
    """Return the leaves of a cotangent but for those of integer and PRNG-key leaves (float0)."""
    return [leaf for leaf in jax.tree.leaves(tree) if not is_float0(leaf)]
