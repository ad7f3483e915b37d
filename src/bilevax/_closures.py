"""Closed-over traced values become explicit arguments.

A `custom_vjp` function may not depend on tracers it closes over: gradients would not reach them.
`hoist` turns such a function into a `Partial` that carries them as leaves.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
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
    explicit = make_explicit(
        lambda flat, *arguments: jax.tree.unflatten(function_structure, flat)(*arguments),
        flat,
        *arguments,
    )
    captured = explicit.args[0]
    if not captured:
        memory.closes_over_nothing = True
        return function
    return Partial(explicit.func, captured, flat)


def make_explicit(function: Callable[..., PyTree], *arguments: PyTree) -> Partial:
    """Return an equal function as a `Partial` whose one argument is its closed-over tracers."""
    traced, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    is_tracer = [isinstance(constant, Tracer) for constant in traced.consts]
    concrete = [None if is_tracer[i] else c for i, c in enumerate(traced.consts)]
    output_structure = jax.tree.structure(shape)

    def explicit(captured: list[jax.Array], *arguments: PyTree) -> PyTree:
        values = iter(captured)
        constants = [next(values) if is_tracer[i] else c for i, c in enumerate(concrete)]
        evaluate = jaxpr_as_fun(ClosedJaxpr(traced.jaxpr, constants))
        return jax.tree.unflatten(output_structure, evaluate(*jax.tree.leaves(arguments)))

    return Partial(explicit, [c for i, c in enumerate(traced.consts) if is_tracer[i]])


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
