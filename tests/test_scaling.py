"""Scalings of rows and columns: from products alone, the same in any units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from bilevax._scaling import scaled, without_scaling

SIZE = 12


def positive(rng):
    rows = rng.normal(size=(3 * SIZE, SIZE))
    return rows.T @ rows / len(rows)


def general(rng):
    return np.eye(SIZE) + 0.3 * rng.normal(size=(SIZE, SIZE))


@jax.jit
def of_minimum(matrix, x):
    problem = bx.minimum(lambda x, y: x @ y @ x / 2 - jnp.sum(x))
    return scaled(problem, x, matrix).scaling


@jax.jit
def of_root(matrix, x):
    return scaled(bx.root(lambda x, y: y @ x - 1.0), x, matrix).scaling


def is_power_of_two(numbers):
    return np.all(np.frexp(np.asarray(numbers))[0] == 0.5)


def test_what_is_in_comparable_units_stays_as_it_is():
    rng = np.random.default_rng(0)
    for find, draw in ((of_minimum, positive), (of_root, general)):
        for _ in range(20):
            scaling = find(draw(rng), np.zeros(SIZE))
            np.testing.assert_array_equal(scaling.rows, np.ones(SIZE))
            np.testing.assert_array_equal(scaling.columns, np.ones(SIZE))


def test_random_units_are_found_again():
    """R A C has rows and columns of one size, whatever units A had; numbers are powers of two."""
    rng = np.random.default_rng(1)
    for trial in range(40):
        units = 10.0 ** rng.integers(-6, 7, SIZE)
        if trial % 2:
            matrix = units[:, None] * positive(rng) * units
            scaling = of_minimum(matrix, np.zeros(SIZE))
            np.testing.assert_array_equal(scaling.rows, scaling.columns)
        else:
            equations = 10.0 ** rng.integers(-6, 7, SIZE)
            matrix = equations[:, None] * general(rng) * units
            scaling = of_root(matrix, np.zeros(SIZE))
        assert is_power_of_two(scaling.rows) and is_power_of_two(scaling.columns)
        balanced = np.asarray(scaling.rows)[:, None] * matrix * np.asarray(scaling.columns)
        for axis in (0, 1):
            sizes = np.linalg.norm(balanced, axis=axis)
            # Three probes see a size within a factor of some five, powers of two within two.
            assert sizes.max() / sizes.min() < 100


def test_a_scaling_is_found_once_and_taken_away():
    units = 10.0 ** np.random.default_rng(2).integers(-6, 7, SIZE)
    matrix = units[:, None] * positive(np.random.default_rng(2)) * units
    problem = bx.minimum(lambda x, y: x @ y @ x / 2 - jnp.sum(x))
    found = scaled(problem, jnp.zeros(SIZE), matrix)
    wanted = np.linalg.norm(np.asarray(found.scaling.rows))
    np.testing.assert_allclose(found.norm(-jnp.ones(SIZE)), wanted, rtol=1e-12)
    assert without_scaling(found).scaling is None
    assert scaled(found, jnp.ones(SIZE), matrix) is found


def test_single_numbers_and_what_is_not_finite():
    problem = bx.minimum(lambda x, y: jnp.sum(y * x**2))
    assert scaled(problem, jnp.zeros(1), 1e-9).scaling is None
    for y in (np.nan, np.inf, 0.0):
        scaling = scaled(problem, jnp.zeros(3), y).scaling
        np.testing.assert_array_equal(scaling.columns, np.ones(3))
        np.testing.assert_array_equal(scaling.rows, np.ones(3))


# What is solved, said and counted does not depend on units.

BASE = positive(np.random.default_rng(3)) + 0.02 * np.eye(SIZE)
SHIFT = np.random.default_rng(4).normal(size=SIZE)
AIM = np.random.default_rng(5).normal(size=SIZE)
SKEW = np.triu(np.ones((SIZE, SIZE)), 1) - np.tril(np.ones((SIZE, SIZE)), -1)


def objective(units, unit, x, y):
    x = x / units
    penalty = jnp.sum(jnp.exp(y) * x**2) / 2 + jnp.sum(x**4) / 10
    return unit * (x @ BASE @ x / 2 - SHIFT @ x + penalty)


def residual(units, equations, x, y):
    x = x / units
    return equations * ((BASE + 0.05 * SKEW) @ x - SHIFT + jnp.exp(y) * jnp.tanh(x))


def loss(units, unit, x, y):
    return unit * jnp.sum((x / units - AIM) ** 2)


def in_units(pose, function, accuracy):
    """Return a compiled function of units, with what a first solve returns."""

    @jax.jit
    def run(units, inner_unit, outer_unit):
        engine = bx.value_and_hypergradient(
            lambda x, y: loss(units, outer_unit, x, y),
            pose(lambda x, y: function(units, inner_unit, x, y)),
            bx.Newton(),
            accuracy=accuracy,
        )
        result = engine(-jnp.ones(SIZE), bx.cold_start(jnp.zeros(SIZE)))
        return result.gradient / outer_unit, result.report

    return run


@pytest.mark.parametrize("accuracy", [None, bx.RelativeAccuracy(1e-3)], ids=["rtol", "accuracy"])
@pytest.mark.parametrize("kind", ["minimum", "root"])
def test_units_of_x_f_g_and_equations_change_nothing(kind, accuracy):
    rng = np.random.default_rng(6)
    pose, function = (bx.minimum, objective) if kind == "minimum" else (bx.root, residual)
    run = in_units(pose, function, accuracy)
    ones = np.ones(SIZE)
    plain, report = run(ones, ones if kind == "root" else 1.0, 1.0)
    exact, _ = in_units(pose, function, bx.RelativeAccuracy(1e-9))(
        ones, ones if kind == "root" else 1.0, 1.0
    )
    tolerance = 1e-7 if accuracy is None else 1e-3
    assert np.linalg.norm(plain - exact) <= tolerance * np.linalg.norm(exact)
    counts = []
    for _ in range(8):
        units = 10.0 ** rng.integers(-6, 7, SIZE)
        inner_unit = 10.0 ** (rng.integers(-6, 7, SIZE) if kind == "root" else rng.integers(-6, 7))
        gradient, other = run(units, inner_unit, 10.0 ** rng.integers(-6, 7))
        assert np.linalg.norm(gradient - exact) <= tolerance * np.linalg.norm(exact)
        assert other.inner.status == report.inner.status == bx.Status.CONVERGED
        assert other.adjoint.status == bx.Status.CONVERGED
        assert abs(int(other.inner.iterations) - int(report.inner.iterations)) <= 1
        counts.append(int(other.adjoint.products))
    # Scalings that are powers of two, from probes, are not all the same.
    assert np.mean(counts) <= 1.25 * report.adjoint.products + 2


def test_a_linear_solve_is_judged_in_scaled_rows():
    """A residual that is small in the unit of stiff rows alone is no solution."""
    curvatures = np.array([1e8, 1e8, 1e-8, 1e-8])
    problem = bx.minimum(lambda x, y: jnp.sum(y * curvatures * x**2) / 2)
    v, report = bx.Implicit(bx.CG(rtol=1e-3)).pullback(
        problem, jnp.ones(4), jnp.ones(4), jnp.array([1.0, 1.0, 1e-6, 1e-6])
    )
    np.testing.assert_allclose(
        report.adjoint, np.array([1.0, 1.0, 1e-6, 1e-6]) / curvatures, rtol=1e-2
    )
    assert report.solve.status == bx.Status.CONVERGED
    assert np.all(np.isfinite(v))


def test_float32_and_pytrees():
    units = {"a": np.float32([1e-3, 1e3]), "b": np.float32(1e2)}

    def in_tree(x, y):
        a, b = x["a"] / units["a"], x["b"] / units["b"]
        return y * (jnp.sum(a**2) + b**2 + a[0] * b) / 2 - jnp.sum(a) - b

    x = {"a": jnp.zeros(2, jnp.float32), "b": jnp.zeros((), jnp.float32)}
    scaling = scaled(bx.minimum(in_tree), x, jnp.float32(2.0)).scaling
    columns = jax.tree.map(lambda c, u: np.asarray(c / u), scaling.columns, units)
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(columns)])
    assert flat.max() / flat.min() < 10
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(scaling))
