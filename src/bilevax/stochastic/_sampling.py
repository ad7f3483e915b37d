"""Samplers of data in memory: they draw batches, and their state is explicit and pure."""

import abc
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import _checks as checks
from bilevax import _mesh as mesh
from bilevax import _trees as trees
from bilevax.stochastic._source import Source, source_of

PyTree = Any


@trees.register
@dataclasses.dataclass(frozen=True)
class SamplerState:
    """Where a sampler stands; made by `Sampler.init`, and a carry of `jax.lax.scan`.

    Attributes:
      content: what the sampler carries from batch to batch.
      source: which kind of sampler this belongs to, and which data; a static part, so that the
        state of other data is refused while tracing.
    """

    content: PyTree
    source: Source = dataclasses.field(metadata={"static": True})


class Sampler(abc.ABC):
    """Base class of samplers: frozen pytrees that draw batches.

    A new sampler implements `source`, `init` and `next`. Its batches have the same structure,
    shapes and dtypes every time.
    """

    @property
    @abc.abstractmethod
    def source(self) -> Source:
        """What its states must belong to."""

    @abc.abstractmethod
    def init(self, key: jax.Array) -> SamplerState:
        """Return the state of a start; the key decides upon all batches."""

    @abc.abstractmethod
    def next(self, state: SamplerState) -> tuple[PyTree, SamplerState]:
        """Return a batch and the state after it."""

    def alone(self, tree: PyTree) -> PyTree:
        """Return a pytree as it is; a sampler that cannot be batched raises if `vmap` does so."""
        return tree

    def check(self, state: SamplerState, name: str = "state") -> None:
        """Raise unless a state belongs to this sampler, as far as its data are known."""
        if not isinstance(state, SamplerState):
            raise TypeError(
                f"`{name}` must be a SamplerState, made by `sampler.init(key)`; got {state!r}."
            )
        state.source.check(name, self.source)


@dataclasses.dataclass(frozen=True, eq=False)
class StoredSampler(Sampler):
    """Base class of samplers of data in memory; a subclass draws the indices of a batch.

    Like arrays, these samplers are not compared by value.

    Args:
      data: a pytree of arrays with one leading axis, that of the examples.
      batch_size: how many examples a batch has.
    """

    data: PyTree
    batch_size: int = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", checks.known_whole("batch_size", self.batch_size))

    @property
    def source(self) -> Source:
        # What is found is kept, for a look at the data takes time on an accelerator.
        if "_source" not in self.__dict__:
            source = source_of(type(self).__name__, self.data)
            object.__setattr__(self, "_source", source)
        return self.__dict__["_source"]

    def init(self, key: jax.Array) -> SamplerState:
        count = _count_examples(self.data)
        if self.batch_size > count:
            raise ValueError(
                f"`batch_size` must be at most the number of examples in `data`, {count}; "
                f"got {self.batch_size}."
            )
        return trees.copied(SamplerState(self.start(single_key(key), count), self.source))

    def next(self, state: SamplerState) -> tuple[PyTree, SamplerState]:
        self.check(state)
        indices, content = self.draw(state.content, _count_examples(self.data))

        batch = jax.tree.map(lambda leaf: mesh.take(jnp.asarray(leaf), indices), self.data)
        return batch, dataclasses.replace(state, content=content)

    @abc.abstractmethod
    def start(self, key: jax.Array, count: int) -> PyTree:
        """Return the content of the first state, for that many examples."""

    @abc.abstractmethod
    def draw(self, content: PyTree, count: int) -> tuple[jax.Array, PyTree]:
        """Return the indices of a batch and the next content."""


class _Epoch(NamedTuple):
    key: jax.Array
    order: jax.Array
    batches: jax.Array  # taken from this order


# Functions of the module, which a Python loop over batches does not compile anew every time.
def _shuffled_where(is_over: jax.Array, epoch: _Epoch) -> _Epoch:
    key, subkey = jax.random.split(epoch.key)
    order = jax.random.permutation(subkey, epoch.order)
    return trees.where(is_over, _Epoch(key, order, jnp.zeros_like(epoch.batches)), epoch)


def _unchanged(is_over: jax.Array, epoch: _Epoch) -> _Epoch:
    return epoch


@trees.register
@dataclasses.dataclass(frozen=True, eq=False)
class EpochSampler(StoredSampler):
    """Every example once per epoch, in a new random order every time.

    What does not fill a batch at the end of an epoch is left out; which examples these are changes
    from epoch to epoch. Batches of one epoch are not independent: averages over them are more
    accurate than the standard errors of a `StochasticReport` say, which count on independence.

    Args:
      data: a pytree of arrays with one leading axis, that of the examples. Those of NumPy are
        copied to the device by every call; `jax.device_put` does it once.
      batch_size: how many examples a batch has, a plain number.

    Raises:
      TypeError: if `batch_size` is not a whole number; from `init`, if `key` is not a key.
      ValueError: if `batch_size` is below 1; from `init`, if it is above the number of examples or
        `data` has no examples or leading axes that differ; from `next`, for a state of other data.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import bilevax as bx
      >>> sampler = bx.EpochSampler(jnp.arange(4), batch_size=2)
      >>> first, state = sampler.next(sampler.init(jax.random.key(0)))
      >>> second, state = sampler.next(state)
      >>> sorted([*first.tolist(), *second.tolist()])
      [0, 1, 2, 3]
    """

    def start(self, key: jax.Array, count: int) -> _Epoch:
        # An epoch that is over, so that the first batch begins a new one.
        order = jnp.arange(count, dtype=jnp.int32)
        return _Epoch(key, order, jnp.asarray(count // self.batch_size, jnp.int32))

    def draw(self, content: _Epoch, count: int) -> tuple[jax.Array, _Epoch]:
        is_over = content.batches >= count // self.batch_size
        # Under `vmap`, a condition of its own in each lane would shuffle them all in every draw.
        any_is_over = trees.in_any_lane(is_over)
        content = mesh.cond(any_is_over, _shuffled_where, _unchanged, is_over, content)
        first = content.batches * self.batch_size
        indices = jax.lax.dynamic_slice(content.order, (first,), (self.batch_size,))
        return indices, content._replace(batches=content.batches + 1)


@trees.register
@dataclasses.dataclass(frozen=True, eq=False)
class UniformSampler(StoredSampler):
    """Batches that do not depend on one another.

    Args:
      data: a pytree of arrays with one leading axis, that of the examples. Those of NumPy are
        copied to the device by every call; `jax.device_put` does it once.
      batch_size: how many examples a batch has, a plain number.
      replace: whether an example may occur twice in one batch. False is more accurate, and takes
        longer where a batch has more than half of all examples.

    Raises:
      TypeError: if `batch_size` is not a whole number or `replace` not a boolean; from `init`, if
        `key` is not a key.
      ValueError: if `batch_size` is below 1; from `init`, if it is above the number of examples or
        `data` has no examples or leading axes that differ; from `next`, for a state of other data.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import bilevax as bx
      >>> sampler = bx.UniformSampler(jnp.arange(4), batch_size=4, replace=False)
      >>> batch, state = sampler.next(sampler.init(jax.random.key(0)))
      >>> sorted(batch.tolist())
      [0, 1, 2, 3]
    """

    _: dataclasses.KW_ONLY
    replace: bool = dataclasses.field(default=True, metadata={"static": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.replace, bool):
            raise TypeError(f"`replace` must be True or False, got {self.replace!r}.")

    def start(self, key: jax.Array, count: int) -> jax.Array:
        return key

    def draw(self, content: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        key, subkey = jax.random.split(content)
        if self.replace:
            return jax.random.randint(subkey, (self.batch_size,), 0, count), key
        return _draw_distinct(subkey, self.batch_size, count), key


@functools.partial(jax.jit, static_argnames=("size", "count"))
def _draw_distinct(key: jax.Array, size: int, count: int) -> jax.Array:
    """Draw distinct indices below `count`; every sequence of them is as likely as any other one."""
    if 2 * size > count:
        return jax.random.permutation(key, count)[:size]

    # Repeated ones are drawn again until there are none, which takes a few rounds, where a
    # permutation would sort all examples. It is fair, for no index is treated unlike another one.
    def redraw(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        key, indices, repeated = carry
        key, subkey = jax.random.split(key)
        indices = jnp.where(repeated, jax.random.randint(subkey, (size,), 0, count), indices)
        order = jnp.argsort(indices, stable=True)
        ordered = indices[order]
        follows_its_equal = jnp.concatenate([jnp.zeros(1, bool), ordered[1:] == ordered[:-1]])
        return key, indices, jnp.zeros(size, bool).at[order].set(follows_its_equal)

    start = (key, jnp.zeros(size, int), jnp.ones(size, bool))
    return mesh.while_loop(lambda carry: jnp.any(carry[2]), redraw, start)[1]


def single_key(key: Any) -> jax.Array:
    """Return a PRNG key of the new kind, or raise."""
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        if key.shape != ():
            raise TypeError(
                f"`key` must be a single PRNG key, got {checks.describe(key)}. "
                "For a batch of them, use `jax.vmap`."
            )
        return key
    if dtype == jnp.uint32 and key.ndim == 1:  # one of `jax.random.PRNGKey`
        return jax.random.wrap_key_data(key)
    raise TypeError(f"`key` must be a PRNG key, for example `jax.random.key(0)`; got {key!r}.")


def _count_examples(data: PyTree) -> int:
    """Return the length of the leading axis that all arrays share, or raise."""
    leaves = jax.tree_util.tree_leaves_with_path(data)
    if not leaves:
        raise ValueError(f"`data` must have at least one array, got {data!r}.")
    first = ""
    for path, leaf in leaves:
        where = f"`data{jax.tree_util.keystr(path)}`"
        if not hasattr(leaf, "shape") or leaf.ndim == 0:
            raise TypeError(f"{where} must be an array with an axis of examples, got {leaf!r}.")
        first = first or where
        if leaf.shape[0] != leaves[0][1].shape[0]:
            raise ValueError(
                "The arrays in `data` must have one leading axis, that of the examples: "
                f"{first} is {checks.describe(leaves[0][1])}, {where} is {checks.describe(leaf)}."
            )
    count = leaves[0][1].shape[0]
    if count == 0:
        raise ValueError(f"`data` must have examples, got {checks.describe(data)}.")
    return count
