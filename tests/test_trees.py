"""Pytree algebra, against NumPy on flat vectors."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevax import _trees as trees

A = {"a": jnp.array([1.0, -2.0]), "b": (jnp.array([[3.0]]), jnp.array(0.5))}
B = {"a": jnp.array([0.25, 4.0]), "b": (jnp.array([[-1.0]]), jnp.array(8.0))}
MIXED = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones((), jnp.float64)}


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_algebra():
    np.testing.assert_allclose(flat(trees.add_scaled(A, 0.3, B)), flat(A) + 0.3 * flat(B))
    np.testing.assert_allclose(flat(trees.scale(-0.7, A)), -0.7 * flat(A))
    np.testing.assert_array_equal(flat(trees.negative(A)), -flat(A))
    np.testing.assert_allclose(trees.inner(A, B), flat(A) @ flat(B))
    np.testing.assert_allclose(trees.norm(A), np.linalg.norm(flat(A)))
    assert trees.max_abs(A) == 3.0
    assert trees.dimension(A) == 4


@pytest.mark.parametrize("condition", [True, False])
def test_where(condition):
    chosen = trees.where(jnp.asarray(condition), A, B)
    np.testing.assert_array_equal(flat(chosen), flat(A if condition else B))


def test_dtypes_are_kept():
    for tree in (trees.add_scaled(MIXED, 2.0, MIXED), trees.scale(2.0, MIXED)):
        assert jax.tree.map(lambda leaf: leaf.dtype, tree) == jax.tree.map(
            lambda leaf: leaf.dtype, MIXED
        )
    scaled = trees.scale(jnp.float64(2.0), MIXED["a"])
    assert scaled.dtype == jnp.float32


def test_the_least_precise_leaf_sets_epsilon_and_the_common_dtype_the_norm():
    assert trees.epsilon(MIXED) == np.finfo(np.float32).eps
    assert trees.epsilon(A) == np.finfo(np.float64).eps
    assert trees.dtype(MIXED) == jnp.float64
    assert trees.norm(MIXED).dtype == jnp.float64
    np.testing.assert_allclose(trees.norm(MIXED), np.sqrt(3))


@pytest.mark.parametrize("empty", [{}, (), {"a": jnp.zeros((0, 2))}], ids=str)
def test_empty_trees(empty):
    assert trees.dimension(empty) == 0
    assert trees.norm(empty) == trees.max_abs(empty) == trees.inner(empty, empty) == 0
    assert trees.norm(empty).shape == ()
    assert trees.epsilon(empty) == 2.0**-52


def test_a_nan_is_never_lost():
    tree = {"a": jnp.array([1.0, jnp.nan]), "b": jnp.array(7.0)}
    assert jnp.isnan(trees.max_abs(tree))
    assert jnp.isnan(trees.norm(tree))


def test_numbers_become_strongly_typed_arrays():
    tree = trees.as_arrays({"a": 1.5, "b": jnp.float32(2), "c": np.ones(2)})
    assert [leaf.dtype for leaf in jax.tree.leaves(tree)] == [
        jnp.float64,
        jnp.float32,
        jnp.float64,
    ]
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(tree))


def test_cotangents_of_integers_stay():
    zero = np.zeros(2, jax.dtypes.float0)
    total = trees.add_cotangents({"x": jnp.ones(2), "n": zero}, {"x": jnp.ones(2), "n": zero})
    np.testing.assert_array_equal(total["x"], 2)
    assert total["n"] is zero
    assert trees.is_float0(zero)
    assert not trees.is_float0(jnp.ones(2))
    assert not trees.is_float0(1.0)


@trees.register
@dataclasses.dataclass(frozen=True)
class First:
    number: Any
    label: str = dataclasses.field(default="", metadata={"static": True})


@trees.register
@dataclasses.dataclass(frozen=True)
class Second:
    number: Any
    label: str = dataclasses.field(default="", metadata={"static": True})


def test_registered_classes_are_pytrees_with_static_fields():
    leaves, structure = jax.tree.flatten(First(1.5, "a"))
    assert leaves == [1.5]
    assert jax.tree.unflatten(structure, [2.5]) == First(2.5, "a")
    assert structure == jax.tree.structure(First(7.0, "a"))
    assert structure != jax.tree.structure(First(1.5, "b"))
    ((path, _),) = jax.tree_util.tree_leaves_with_path(First(1.5))
    assert jax.tree_util.keystr(path) == ".number"


def test_structures_of_classes_with_equal_fields_differ():
    """Where they are equal, a compiled function can take one class for the other."""
    assert jax.tree.structure(First(1.0)) != jax.tree.structure(Second(1.0))
    which = jax.jit(lambda node: float(isinstance(node, First)) * jnp.ones(()))
    assert (which(First(1.0)), which(Second(1.0))) == (1.0, 0.0)


RANGES = [
    (np.float64, 1e-12, [1e-307, 1e-160, 1e-77, 1.0, 1e77, 1e160, 1e300]),
    (np.float32, 1e-6, [1e-36, 1e-20, 1e-10, 1.0, 1e10, 1e20, 1e37]),
    (jnp.bfloat16, 2e-2, [1e-36, 1.0, 1e37]),
    (np.float16, 2e-3, [1e-3, 1.0, 1e4]),
]


@pytest.mark.parametrize(
    ("dtype", "rtol", "unit"),
    [(kind, rtol, unit) for kind, rtol, units in RANGES for unit in units],
)
def test_a_norm_whose_squares_are_out_of_range(dtype, rtol, unit):
    tree = jax.tree.map(lambda leaf: jnp.asarray(leaf * unit, dtype), A)
    assert trees.norm(tree).dtype == dtype
    expected = np.linalg.norm(flat(A)) * unit
    np.testing.assert_allclose(np.asarray(trees.norm(tree), np.float64), expected, rtol=rtol)


def test_powers_of_two_change_no_digit_of_a_norm():
    entries = np.random.default_rng(0).normal(size=100)
    expected = np.sqrt(entries @ entries)
    for power in (-900, -300, -256, -200, 0, 200, 256, 300, 900):
        got = trees.norm(jnp.asarray(entries * 2.0**power)) / 2.0**power
        np.testing.assert_allclose(got, expected, rtol=1e-15)
        assert got == trees.norm(jnp.asarray(entries))


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_norm_of_what_is_not_finite(value):
    assert not np.isfinite(trees.norm({"a": jnp.array([1.0, value])}))


def test_the_norm_of_nothing_and_of_zero():
    assert trees.norm({}) == trees.norm(jnp.zeros(3)) == 0


def test_the_norm_of_a_zero_that_compilers_know():
    """They may take the unit out of the sum of squares, where its own square must be in range."""
    for dtype in (np.float32, np.float64):
        assert jax.jit(lambda dtype=dtype: trees.norm([jnp.zeros(2, dtype)]))() == 0


@pytest.mark.parametrize("unit", [1e-200, 1.0, 1e200])
def test_the_derivative_of_a_norm_is_the_unit_vector_and_zero_at_zero(unit):
    vector = np.array([3.0, -4.0])
    np.testing.assert_allclose(jax.grad(trees.norm)(jnp.asarray(unit * vector)), vector / 5)
    np.testing.assert_array_equal(jax.grad(trees.norm)(jnp.zeros(2)), 0)


def test_cotangents_of_integers_stay_as_they_are():
    nothing = np.zeros(2, jax.dtypes.float0)
    a, b = {"u": jnp.array([3.0]), "k": nothing}, {"u": jnp.array([1.0]), "k": nothing}
    difference = trees.difference(a, b)
    assert difference["u"] == 2 and difference["k"] is nothing
    (leaf,) = trees.floating(a)
    assert leaf is a["u"]
