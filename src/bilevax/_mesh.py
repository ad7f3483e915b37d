"""Control flow that keeps its types where values vary over the devices of a mesh.

Inside `jax.shard_map`, the type of an array says over which axes of the mesh its values vary, and
loops insist that types stay. A constant at the start of a loop varies over none, and what a step
makes of it does. The functions below let both ends of a loop, and both branches, vary over what
either does. What varies over no axis stays so, for derivatives in it are sums over devices.
Elsewhere they are the functions of `jax.lax`.
"""

from collections.abc import Callable
from typing import Any

import jax

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
