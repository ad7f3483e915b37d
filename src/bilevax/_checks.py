"""Checks of arguments while tracing: what was got, what was expected, and the argument's name."""

import contextlib
import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def is_callable(name: str, value: Any) -> None:
    """Raise unless the value can be called and serve as a static part of a compiled function."""
    if not callable(value):
        raise TypeError(f"`{name}` must be a function, got {value!r}.")
    try:
        hash(value)
    except TypeError as error:
        raise TypeError(
            f"`{name}` must be hashable, so that a second call need not compile again; "
            f"got {type(value).__name__}. Wrap it: `jax.tree_util.Partial(function, arrays)`."
        ) from error


def is_component(name: str, value: Any, expected: type, example: str) -> None:
    """Raise unless the value is an instance of the expected class."""
    if not isinstance(value, expected):
        hint = " Did you forget the parentheses?" if isinstance(value, type) else ""
        article = "an" if expected.__name__[0] in "AEIOU" else "a"
        raise TypeError(
            f"`{name}` must be {article} {expected.__name__}, for example `{example}`; "
            f"got {value!r}.{hint}"
        )


def inner_variable(x: PyTree, name: str = "x") -> None:
    """Raise unless every leaf of x is a real floating array."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(x):
        where = f"`{name}{jax.tree_util.keystr(path)}`"
        dtype = _dtype(where, leaf)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"{where} is complex ({dtype}); only real floating arrays are supported. "
                "Pass the real and imaginary parts as two leaves."
            )
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{where} must be a floating array to be solved for, got dtype {dtype}. "
                "Convert it, for example with `jnp.asarray(x, float)`."
            )


def outer_variable(y: PyTree) -> None:
    """Raise if a leaf of y is complex."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(y):
        where = f"`y{jax.tree_util.keystr(path)}`"
        if jnp.issubdtype(_dtype(where, leaf), jnp.complexfloating):
            raise TypeError(
                f"{where} is complex; only real arrays are supported. "
                "Pass the real and imaginary parts as two leaves."
            )


def _dtype(where: str, leaf: Any) -> Any:
    if not isinstance(leaf, str):  # the name of a dtype is no array of it
        with contextlib.suppress(TypeError):
            return jnp.result_type(leaf)
    raise TypeError(f"{where} must be an array or a number, got {leaf!r}.")


def scalar_output(name: str, output: PyTree) -> None:
    """Raise unless a function's abstract output is one real floating scalar."""
    leaves = jax.tree.leaves(output)
    if len(leaves) != 1 or leaves[0] is not output or output.shape != ():
        raise TypeError(f"`{name}` must return a scalar, got {describe(output)}.")
    if not jnp.issubdtype(output.dtype, jnp.floating):
        raise TypeError(f"`{name}` must return a real floating scalar, got {describe(output)}.")


def same_structure(
    name: str, output: PyTree, x: PyTree, *, expected: str = "x", argument: bool = False
) -> None:
    """Raise unless an abstract output (or an argument) has the structure, shapes, dtypes of x."""
    pytree, leaves = ("be a pytree", "have") if argument else ("return a pytree", "return")
    if jax.tree.structure(output) != jax.tree.structure(x):
        raise TypeError(
            f"`{name}` must {pytree} like `{expected}`, {jax.tree.structure(x)}; "
            f"got {jax.tree.structure(output)}."
        )
    expected_leaves = jax.tree_util.tree_leaves_with_path(x)
    for (path, want), got in zip(expected_leaves, jax.tree.leaves(output), strict=True):
        if got.shape != jnp.shape(want) or got.dtype != jnp.result_type(want):
            raise TypeError(
                f"`{name}` must {leaves} shapes and dtypes like `{expected}`: "
                f"`{expected}{jax.tree_util.keystr(path)}` is {describe(want)}, "
                f"got {describe(got)}."
            )


def positive(name: str, value: Any, *, whole: bool = False) -> None:
    """Raise if a plain number is not above zero, or not whole (traced values pass)."""
    _number(name, value)
    if isinstance(value, int | float) and not value > 0:
        raise ValueError(f"`{name}` must be positive, got {value!r}.")
    _whole(name, value, whole)


def not_negative(name: str, value: Any, *, whole: bool = False) -> None:
    """Raise if a plain number is negative or NaN, or not whole (traced values pass)."""
    _number(name, value)
    if isinstance(value, int | float) and not value >= 0:
        raise ValueError(f"`{name}` must not be negative, got {value!r}.")
    _whole(name, value, whole)


def known_whole(name: str, value: Any) -> int:
    """Return a positive whole number that decides upon shapes, or raise; it may not be traced."""
    try:
        whole = operator.index(value)
    except TypeError as error:
        raise TypeError(
            f"`{name}` must be a whole number that is known while tracing, got {value!r}."
        ) from error
    positive(name, whole)
    return whole


def mode(value: Any) -> None:
    """Raise if a rule's mode is not one of the two."""
    if value not in ("reverse", "forward"):
        raise ValueError(f'`mode` must be "reverse" or "forward", got {value!r}.')


def _whole(name: str, value: Any, whole: bool) -> None:
    if whole and isinstance(value, float):
        raise TypeError(f"`{name}` must be a whole number, got {value!r}.")


def _number(name: str, value: Any) -> None:
    if value is None or isinstance(value, str):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")


def single_numbers(component: Any) -> None:
    """Raise if a number among the fields of a solver is an array: batches are for `jax.vmap`."""
    for field in dataclasses.fields(component):
        value = getattr(component, field.name)
        if isinstance(value, np.ndarray | jax.Array) and value.shape != ():
            raise TypeError(
                f"`{field.name}` of `{type(component).__name__}` must be a single number, got "
                f"{describe(value)}. For a batch of them, use `jax.vmap`."
            )


def describe(value: PyTree) -> str:
    """Describe a pytree of arrays in a few characters: float32[3,2]."""
    return str(
        jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", value)
    ).replace("'", "")
