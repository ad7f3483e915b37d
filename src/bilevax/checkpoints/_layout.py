"""How the state of a run becomes named arrays on the host, and the other way round."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any

_HEADERS = 512  # bytes of a file besides the numbers of a leaf


class _Leaf(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    key: Any  # the implementation of a PRNG key, else None
    sharding: Any  # None where JAX may choose


class Layout:
    """The structure of states, and the shape, dtype and place of every leaf.

    Args:
      like: a state; its arrays are not kept.

    Attributes:
      size: bytes of a state in a file.
      eps: the rounding error of its coarsest floating dtype; zero if there is none.
    """

    def __init__(self, like: PyTree) -> None:
        entries, self._structure = jax.tree_util.tree_flatten_with_path(like)
        self._leaves = [_describe(index, *entry) for index, entry in enumerate(entries)]
        sizes = [math.prod(leaf.shape) * leaf.dtype.itemsize + _HEADERS for leaf in self._leaves]
        self.size = sum(sizes)
        dtypes = [leaf.dtype for leaf in self._leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
        self.eps = max((float(jnp.finfo(dtype).eps) for dtype in dtypes), default=0.0)

    def to_host(self, state: PyTree) -> dict[str, np.ndarray]:
        """Return NumPy's arrays by name; JAX does not reuse memory that they may share with it."""
        leaves = zip(self._leaves, jax.tree.leaves(state), strict=True)
        arrays = [leaf if like.key is None else jax.random.key_data(leaf) for like, leaf in leaves]
        host = map(np.asarray, jax.device_get(arrays))  # all transfers at once
        return {leaf.name: array for leaf, array in zip(self._leaves, host, strict=True)}

    def to_device(self, arrays: dict[str, np.ndarray]) -> PyTree:
        """Return the state again, with every leaf in its place."""
        leaves = [_restore(arrays[leaf.name], leaf) for leaf in self._leaves]
        return jax.tree.unflatten(self._structure, leaves)


def _describe(index: int, path: Any, leaf: jax.Array) -> _Leaf:
    name = f"{index}{jax.tree_util.keystr(path)}"  # with the index, for paths need not be unique
    sharding = leaf.sharding if leaf.committed else None
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return _Leaf(name, leaf.shape, leaf.dtype, None, sharding)
    data = jax.eval_shape(jax.random.key_data, leaf)
    return _Leaf(name, data.shape, data.dtype, jax.random.key_impl(leaf), sharding)


def _restore(array: np.ndarray, leaf: _Leaf) -> jax.Array:
    if array.dtype != leaf.dtype:  # NumPy's files have the bits of a bfloat16, but not its name
        array = array.view(leaf.dtype)
    if array.shape != leaf.shape:
        raise ValueError(f"`{leaf.name}` has the shape {array.shape}, expected {leaf.shape}")
    if leaf.key is None:
        return jax.device_put(array, leaf.sharding)
    key = jax.random.wrap_key_data(jnp.asarray(array), impl=leaf.key)
    return jax.device_put(key, leaf.sharding)
