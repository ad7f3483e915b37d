"""What a sampler's state belongs to: data are told apart by their shapes and a fingerprint."""

import dataclasses
import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bilevax import _checks as checks

PyTree = Any
_LOOKED_AT = 1000  # entries of the data


@dataclasses.dataclass(frozen=True)
class Layout:
    """Structure, shapes and dtypes of a pytree, as a hashable value."""

    structure: Any
    shapes: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of(cls, tree: PyTree) -> "Layout":
        """Return the layout of a pytree of arrays, in the dtypes that JAX gives them."""
        leaves, structure = jax.tree.flatten(tree)
        shapes = (jax.ShapeDtypeStruct(jnp.shape(u), jnp.result_type(u)) for u in leaves)
        return cls(structure, tuple(shapes))

    @property
    def tree(self) -> PyTree:
        """The pytree, with shapes for arrays."""
        return jax.tree.unflatten(self.structure, self.shapes)


@dataclasses.dataclass(frozen=True)
class Source:
    """What a sampler's state belongs to.

    Attributes:
      kind: the name of the sampler's class.
      layout: of the data.
      fingerprint: of the values of the data; None where they are traced or on the host.
    """

    kind: str
    layout: Layout
    fingerprint: str | None = None

    def check(self, name: str, expected: "Source") -> None:
        """Raise unless a state with this source fits a sampler with that one."""
        again = "Make a new state with `init`."
        if self.kind != expected.kind:
            raise TypeError(
                f"`{name}` must be made by the sampler that it is used with, `{expected.kind}`; "
                f"got one of `{self.kind}`. {again}"
            )
        if self.layout != expected.layout:
            raise ValueError(
                f"`{name}` must belong to the data of the sampler, "
                f"{checks.describe(expected.layout.tree)}; got one that was made for "
                f"{checks.describe(self.layout.tree)}. {again}"
            )
        if None not in (self.fingerprint, expected.fingerprint) and self != expected:
            raise ValueError(
                f"`{name}` must belong to the data of the sampler; got one that was made for other "
                f"data of the same shapes, {checks.describe(self.layout.tree)}. {again}"
            )


def source_of(kind: str, data: PyTree) -> Source:
    """Return the source of a sampler of data in memory."""
    leaves = jax.tree.leaves(data)
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        return Source(kind, Layout.of(data))
    digest = hashlib.blake2b(digest_size=8)
    for leaf in leaves:
        digest.update(_entries(leaf, max(1, _LOOKED_AT // len(leaves))).tobytes())
    return Source(kind, Layout.of(data), digest.hexdigest())


def _entries(leaf: Any, count: int) -> np.ndarray:
    """Return about `count` entries from all over an array."""
    with jax.ensure_compile_time_eval():  # also where a program is being traced
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        stride = max(1, math.ceil(leaf.size / count))
        row = max(1, math.prod(leaf.shape[1:]))
        while math.gcd(stride, row) > 1:  # or some columns would never be looked at
            stride += 1
        flat = leaf.flat if isinstance(leaf, np.ndarray) else leaf.reshape(-1)
        # Equal data are recognised as NumPy's and as JAX's, which may be less precise.
        return np.asarray(flat[::stride]).astype(jnp.result_type(leaf))
