"""A sampler that takes its batches from an iterator on the host."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental import io_callback

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax.stochastic._sampling import Sampler, SamplerState, single_key
from bilevax.stochastic._source import Layout, Source

PyTree = Any


class _Feed:
    """An iterator, and how many batches it has given."""

    def __init__(self, iterator: Any) -> None:
        self.iterator, self.given = iterator, 0

    def position(self) -> np.ndarray:
        return np.asarray(self.given, np.int32)

    def next(self, layout: Layout, position: Any) -> PyTree:
        if int(position) != self.given:
            raise RuntimeError(
                f"This state of a `HostSampler` stands after {int(position)} batches, but its "
                f"iterator has given {self.given} and cannot go back. "
                "Use every state once, or make a new one with `init`."
            )
        try:
            batch = next(self.iterator)
        except StopIteration:
            raise RuntimeError(
                f"The iterator of a `HostSampler` ended: it had given {self.given} batches."
            ) from None
        except Exception as error:
            raise RuntimeError(
                f"The iterator of a `HostSampler` raised {type(error).__name__}: {error}; "
                f"it had given {self.given} batches."
            ) from error
        batch = self._checked(batch, layout)
        self.given += 1
        return batch

    def _checked(self, batch: PyTree, layout: Layout) -> PyTree:
        arrays = jax.tree.map(np.asarray, batch)
        # In the dtypes that JAX gives them, as those of the example are.
        got = [(u.shape, jax.dtypes.canonicalize_dtype(u.dtype)) for u in jax.tree.leaves(arrays)]
        want = [(u.shape, u.dtype) for u in layout.shapes]
        if jax.tree.structure(arrays) != layout.structure or got != want:
            raise RuntimeError(
                f"The iterator of a `HostSampler` must give batches like `example`, "
                f"{checks.describe(layout.tree)}; got {checks.describe(arrays)} "
                f"after {self.given} batches."
            )
        return arrays


@trees.register
@dataclasses.dataclass(frozen=True)
class HostSampler(Sampler):
    """Batches from an iterator on the host, such as a data loader.

    A compiled program fetches them through an ordered callback, so under `jit`, in `scan` and in
    `fori_loop` they come one after the other, as in a Python loop. An iterator cannot go back: its
    states must be used in order and once each, and they ignore the key. It cannot be batched by
    `jax.vmap`, for it gives one batch at a time; `jax.lax.map` is a loop. An error of the iterator
    arrives as a `jax.errors.JaxRuntimeError`, which is a `RuntimeError`.

    Args:
      iterator: an iterator, such as `itertools.chain.from_iterable(itertools.repeat(loader))`,
        which goes through a loader again and again. It must give NumPy arrays: a callback must not
        call JAX. Programs are compiled anew for a new iterator.
      example: a pytree of arrays or `jax.ShapeDtypeStruct`; batches have the structure, shapes and
        dtypes of it.

    Raises:
      TypeError: if `iterator` is not an iterator, or `example` not a pytree of arrays.
      ValueError: from `jax.vmap`.
      RuntimeError: while running, if the iterator ends or raises, if a batch is not like `example`,
        or if a state is used for a second time.

    Example:
      >>> import jax
      >>> import numpy as np
      >>> import bilevax as bx
      >>> batches = (np.full(2, float(number)) for number in range(10))
      >>> sampler = bx.HostSampler(batches, example=np.zeros(2))
      >>> batch, state = sampler.next(sampler.init(jax.random.key(0)))
      >>> batch, state = sampler.next(state)
      >>> batch.tolist()
      [1.0, 1.0]
    """

    iterator: Any = dataclasses.field(metadata={"static": True})
    example: PyTree = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        # Both become hashable values, which a static part of a pytree must be.
        if not isinstance(self.iterator, _Feed):
            if not hasattr(self.iterator, "__next__"):
                raise TypeError(
                    "`iterator` must be an iterator, for example `iter(loader)`; "
                    f"got {type(self.iterator).__name__}."
                )
            object.__setattr__(self, "iterator", _Feed(self.iterator))
        if not isinstance(self.example, Layout):
            for path, leaf in jax.tree_util.tree_leaves_with_path(self.example):
                if not hasattr(leaf, "shape") and not isinstance(leaf, int | float):
                    where = f"`example{jax.tree_util.keystr(path)}`"
                    raise TypeError(f"{where} must be an array or a number, got {leaf!r}.")
            object.__setattr__(self, "example", Layout.of(self.example))

    @property
    def source(self) -> Source:
        return Source(type(self).__name__, self.example)

    def init(self, key: jax.Array) -> SamplerState:
        self.alone(single_key(key))
        shape = jax.ShapeDtypeStruct((), jnp.int32)
        position = io_callback(self.iterator.position, shape, ordered=True)
        return SamplerState(position, self.source)

    def next(self, state: SamplerState) -> tuple[PyTree, SamplerState]:
        self.check(state)
        position = self.alone(state.content)
        fetch = functools.partial(self.iterator.next, self.example)
        batch = io_callback(fetch, self.example.tree, position, ordered=True)
        return batch, dataclasses.replace(state, content=position + 1)

    def alone(self, tree: PyTree) -> PyTree:
        return _alone(tree)

    def check_apart(self, other: "HostSampler") -> None:
        """Raise if another sampler takes its batches from the same iterator."""
        if self.iterator.iterator is other.iterator.iterator:
            raise ValueError(
                "`sampler` and `outer_sampler` must have iterators of their own, got one for both."
            )


@custom_vmap
def _alone(tree: PyTree) -> PyTree:
    return tree


@_alone.def_vmap
def _refuse(size: int, is_batched: Any, tree: PyTree) -> Any:
    raise ValueError(
        "A `HostSampler` cannot be batched by `jax.vmap`: its iterator gives one batch at a time. "
        "Use `jax.lax.map`, or an `EpochSampler` or `UniformSampler` of data in memory."
    )
