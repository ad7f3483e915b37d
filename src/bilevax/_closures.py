"""Closed-over traced values become explicit arguments.

A `custom_vjp` function may not depend on tracers it closes over: gradients would not reach them.
`hoist` turns such a function into a `Partial` that carries them as leaves.
"""

import functools
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.tree_util import Partial

PyTree = Any


def hoist(function: Partial, *arguments: PyTree) -> Partial:
    """Return an equal function whose closed-over tracers are leaves of the `Partial`.

    A function that closes over no tracer is returned as it is, so that what was compiled for it
    is found again, and this is remembered: the function is traced once per signature. Concrete
    arrays stay where they are. As under `jax.jit`, functions must be pure.

    Args:
      function: called as function(*arguments).
      arguments: pytrees that give structure, shapes and dtypes; their values do not matter.
    """
    leaves, structure = jax.tree.flatten((function, arguments))
    memory = _memory(structure, tuple(jax.typeof(leaf) for leaf in leaves))
    if memory.closes_over_nothing:
        return function
    # The tracers among the leaves of the function are explicit already.
    flat, function_structure = jax.tree.flatten(function)

    def call(flat: list[Any], *arguments: PyTree) -> PyTree:
        return jax.tree.unflatten(function_structure, flat)(*arguments)

    traced, shape = jax.make_jaxpr(call, return_shape=True)(flat, *arguments)
    positions = [i for i, c in enumerate(traced.consts) if isinstance(c, jax.core.Tracer)]
    if not positions:
        memory.closes_over_nothing = True
        return function
    concrete = [None if i in positions else c for i, c in enumerate(traced.consts)]
    output_structure = jax.tree.structure(shape)

    def explicit(captured: list[jax.Array], flat: list[Any], *arguments: PyTree) -> PyTree:
        consts = list(concrete)
        for position, value in zip(positions, captured, strict=True):
            consts[position] = value
        outputs = jaxpr_as_fun(ClosedJaxpr(traced.jaxpr, consts))(
            *jax.tree.leaves((flat, *arguments))
        )
        return jax.tree.unflatten(output_structure, outputs)

    return Partial(explicit, [traced.consts[i] for i in positions], flat)


def has_functions(tree: PyTree) -> bool:
    """Tell whether a pytree holds functions of the user's, which might close over tracers."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Partial))
    return any(isinstance(leaf, Partial) for leaf in leaves)


class _Memory:
    closes_over_nothing = False


@functools.lru_cache(maxsize=512)
def _memory(structure: Any, types: tuple[Any, ...]) -> _Memory:
    """Return what is remembered of a function and its signature."""
    return _Memory()
