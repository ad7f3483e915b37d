"""What JAX wants to be told where arrays are spread over the devices of a mesh.

Inside `jax.shard_map`, the type of an array says over which axes of the mesh its values vary, and
loops insist that types stay. A constant at the start of a loop varies over none, and what a step
makes of it does. The loops and branches below let both ends vary over what either does. What
varies over no axis stays so, for derivatives in it are sums over devices.

On a mesh with explicit axes, the type says how an array is cut, and where an operation could go
several ways, one must be chosen: the functions at the end of this module choose.

Elsewhere they are the functions of `jax.lax` and `jax.vmap`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
_Axes = list[frozenset[str]]  # of each leaf of a pytree


def while_loop(proceed: Callable[[Any], jax.Array], step: Callable[[Any], Any], start: Any) -> Any:
    """Return what steps make of a start while they are to go on."""

    def loop(keep: Callable[[Any], Any], start: Any) -> Any:
        return jax.lax.while_loop(proceed, lambda state: keep(step(state)), start)

    return _keeping_types(loop, start)


def fori_loop(count: Any, step: Callable[[jax.Array, Any], Any], start: Any) -> Any:
    """Return what that many steps make of a start; a step is told its number."""

    def loop(keep: Callable[[Any], Any], start: Any) -> Any:
        return jax.lax.fori_loop(0, count, lambda i, state: keep(step(i, state)), start)

    return _keeping_types(loop, start)


def scan(
    step: Callable[[Any, Any], tuple[Any, Any]], start: Any, xs: Any, *, length: int | None = None
) -> tuple[Any, Any]:
    """Return what steps along the leading axis of xs make of a start, and what each one gave."""

    def loop(keep: Callable[[Any], Any], start: Any) -> Any:
        def kept(state: Any, x: Any) -> tuple[Any, Any]:
            state, given = step(state, x)
            return keep(state), given

        return jax.lax.scan(kept, start, xs, length=length)

    return _keeping_types(loop, start)


def cond(
    condition: Any, on_true: Callable[..., Any], on_false: Callable[..., Any], *of: Any
) -> Any:
    """Return what one of two functions makes of arguments."""
    if not _is_inside():
        return jax.lax.cond(condition, on_true, on_false, *of)
    axes = _joined(_axes_of(on_true, *of), _axes_of(on_false, *of))

    def kept(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *of: _vary(function(*of), axes)

    return jax.lax.cond(condition, kept(on_true), kept(on_false), *of)


def settled(step: Callable[[PyTree], PyTree], start: PyTree) -> PyTree:
    """Return a start in the types that it has after any number of steps, for loops of users."""
    if not _is_inside():
        return start
    axes = _axes(start)
    while (following := _joined(axes, _axes_of(step, _vary(start, axes)))) != axes:
        axes = following
    return _vary(start, axes)


def vary_like(tree: PyTree, other: PyTree) -> PyTree:
    """Return a tree that varies over all axes over which another one does."""
    return vary_with(tree, lambda _: other)


def vary_with(tree: PyTree, function: Callable[[PyTree], PyTree]) -> PyTree:
    """Return a tree that varies over all axes over which the function of it does."""
    if not _is_inside():
        return tree
    axes = frozenset().union(*_axes_of(function, tree))
    return _vary(tree, [axes] * len(jax.tree.leaves(tree)))


def _is_inside() -> bool:
    """Tell whether this is a part of a program for each device."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def is_cut(array: Any) -> bool:
    """Tell whether an array is spread over the devices of a mesh with explicit axes."""
    return any(axis is not None for axis in _cuts(array))


def whole(tree: PyTree) -> PyTree:
    """Return a tree of which every device has all entries."""
    return jax.tree.map(lambda leaf: _cut(leaf, [None] * jnp.ndim(leaf)), tree)


def cut_like(tree: PyTree, other: PyTree) -> PyTree:
    """Return a tree that is spread as another one of its shapes is."""
    return jax.tree.map(lambda leaf, like: _cut(leaf, _cuts(like)), tree, other)


def take(array: jax.Array, index: Any) -> jax.Array:
    """Return entries along the leading axis, which every device gets; indices are in bounds."""
    where: dict[str, Any] = {}
    if is_cut(array):
        cuts = [None] * jnp.ndim(index) + _cuts(array)[1:]
        where = {"out_sharding": jax.sharding.PartitionSpec(*cuts)}
    return array.at[index].get(mode="promise_in_bounds", **where)


def vmap(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of batches; its results are cut along their leading axis if a batch is.

    Loops cannot be batched along an explicit axis in JAX 0.10 and 0.11, so every device does all of
    it. With the axis in `AxisType.Auto`, or inside `jax.shard_map`, each does its share.
    """

    def batched(*arguments: Any) -> Any:
        leaves = jax.tree.leaves(arguments)
        cuts = [_cuts(leaf)[0] for leaf in leaves if is_cut(leaf)]
        cut = next((axis for axis in cuts if axis is not None), None)
        if cut is None:
            return jax.vmap(function)(*arguments)
        results = jax.vmap(function)(*whole(arguments))
        return jax.tree.map(lambda leaf: _cut(leaf, [cut, *_cuts(leaf)[1:]]), results)

    return batched


class _Unsettled(Exception):
    """A step makes something vary over more axes than its carry did."""

    def __init__(self, axes: _Axes) -> None:
        self.axes = axes


def _keeping_types(loop: Callable[[Callable[[Any], Any], Any], Any], start: Any) -> Any:
    """Return what a loop makes of a start, where it hands each state to the function it gets."""
    if not _is_inside():
        return loop(lambda state: state, start)
    axes = _axes(start)

    def keep(state: Any) -> Any:
        following = _joined(axes, _axes(state))
        if following != axes:
            raise _Unsettled(following)
        return _vary(state, axes)

    while True:  # more axes every time, until there are no more
        try:
            return loop(keep, _vary(start, axes))
        except _Unsettled as unsettled:
            axes = unsettled.axes


def _joined(a: _Axes, b: _Axes) -> _Axes:
    return [u | w for u, w in zip(a, b, strict=True)]


def _axes(tree: PyTree) -> _Axes:
    """Return over which axes of the mesh the leaves of a tree vary."""
    return [jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(tree)]  # type: ignore[attr-defined]


def _cuts(array: Any) -> list[Any]:
    """Return the explicit axes of the mesh along which each axis of an array is cut."""
    spec = jax.typeof(array).sharding.spec
    return [*spec, *[None] * (jnp.ndim(array) - len(spec))]


def _cut(array: Any, cuts: list[Any]) -> Any:
    if _cuts(array) == cuts:
        return array
    return jax.reshard(array, jax.sharding.PartitionSpec(*cuts))


def _axes_of(function: Callable[..., Any], *arguments: Any) -> _Axes:
    """Return over which axes of the mesh the leaves of a result vary."""
    return [aval.mat.varying for aval in jax.make_jaxpr(function)(*arguments).out_avals]


def _vary(tree: PyTree, axes: _Axes) -> PyTree:
    """Return a tree whose leaves vary over these axes too."""

    def cast(leaf: Any, axes: frozenset[str]) -> Any:
        missing = axes - jax.typeof(leaf).mat.varying  # type: ignore[attr-defined]
        return jax.lax.pcast(leaf, tuple(missing), to="varying") if missing else leaf

    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten([cast(leaf, a) for leaf, a in zip(leaves, axes, strict=True)])
