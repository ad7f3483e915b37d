"""Closed-over traced values become explicit arguments.

A `custom_vjp` function may not depend on tracers it closes over: gradients would not reach them.
`hoist` turns such a function into a `Partial` that carries them as leaves.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.tree_util import Partial

from bilevax import _checks as checks

PyTree = Any

# Signatures of functions without closed-over tracers. Those with tracers are not remembered, for
# that would keep the tracers alive.
_CLOSES_OVER_NOTHING: set[tuple[Any, tuple[Any, ...]]] = set()
_CAPACITY = 512


def as_partial(name: str, function: Any) -> Partial:
    """Return a user's function as a `Partial`, which can be a part of a pytree."""
    checks.is_callable(name, function)
    return function if isinstance(function, Partial) else Partial(function)


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
    signature = (structure, tuple(jax.typeof(leaf) for leaf in leaves))
    if signature in _CLOSES_OVER_NOTHING:
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
        if len(_CLOSES_OVER_NOTHING) >= _CAPACITY:
            _CLOSES_OVER_NOTHING.clear()
        _CLOSES_OVER_NOTHING.add(signature)
        return function
    return Partial(explicit.func, captured, flat)


def make_explicit(function: Callable[..., PyTree], *arguments: PyTree) -> Partial:
    """Return an equal function as a `Partial` whose one argument is its closed-over tracers."""
    traced, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    constants = traced.consts
    is_tracer = [isinstance(constant, Tracer) for constant in constants]
    concrete = [None if is_tracer[i] else c for i, c in enumerate(constants)]
    captured = [c for i, c in enumerate(constants) if is_tracer[i]]
    output_structure = jax.tree.structure(shape)

    # What is compiled for this function keeps it alive, so it must not hold on to the tracers. From
    # JAX 0.11 on the jaxpr has its constants inside.
    jaxpr = ClosedJaxpr(traced.jaxpr, concrete).jaxpr

    def explicit(captured: list[jax.Array], *arguments: PyTree) -> PyTree:
        values = iter(captured)
        constants = [next(values) if is_tracer[i] else c for i, c in enumerate(concrete)]
        evaluate = jaxpr_as_fun(ClosedJaxpr(jaxpr, constants))
        return jax.tree.unflatten(output_structure, evaluate(*jax.tree.leaves(arguments)))

    return Partial(explicit, captured)


def has_functions(tree: PyTree) -> bool:
    """Tell whether a pytree holds functions of the user's, which might close over tracers."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Partial))
    return any(isinstance(leaf, Partial) for leaf in leaves)
