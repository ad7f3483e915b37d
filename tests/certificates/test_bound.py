"""Bounds hold: against hypergradients and values in long double, and by hand."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import bilevax as bx
from bilevax.certificates import bound as bound_at
from tests.certificates.bound_problems import FAMILIES, SIZE, truth
from tests.everyday import params

COUNT = 250  # of each kind


def draw(family, dtype, seed):
    """Return problems at points far from x*, near it, and at it; and what is true there.

    Half of them are in other units, entry by entry; most are near a stationary point of h.
    """
    rng = np.random.default_rng(seed)
    exponents = rng.uniform(-6, 6, (COUNT, SIZE)) * (rng.random((COUNT, 1)) < 0.5)
    units = 10 ** (exponents if dtype == np.float64 else exponents / 2)
    data, y = family.draw(rng, COUNT, units)
    data, y = {name: leaf.astype(dtype) for name, leaf in data.items()}, y.astype(dtype)
    _, _, gradient = truth(family, data, y)
    gap = 10 ** rng.uniform(-8, 0, (COUNT, 1)) * (rng.random((COUNT, 1)) < 0.8)
    prior = data["prior"] - (1 - gap) * gradient / data.get("scale", np.ones(COUNT))[:, None]
    data["prior"] = prior.astype(dtype)
    x, value, gradient = truth(family, data, y)
    size = 10 ** rng.uniform(-18, 0.5, (COUNT, 1))
    points = x * (1 + size * rng.normal(size=x.shape))
    points[::6] = 0  # cold
    return data, y, points.astype(dtype), value, gradient


@functools.partial(jax.jit, static_argnums=0)
def judged(family, data, x, y):
    """Return bounds, hypergradients, and values."""

    def one(data, x, y):
        problem, g = bx.minimum(Partial(family.inner, data)), Partial(family.outer, data)
        rule = bx.Implicit(bx.CG(rtol=data["rtol"]))
        direct, explicit = jax.grad(g, argnums=(0, 1))(x, y)
        implicit, _ = rule.pullback(problem, x, y, direct)
        bound = bx.hypergradient_bound(g, problem, rule, x, y, family.constants(data))
        return bound, explicit + implicit, g(x, y)

    return jax.vmap(one)(data, x, y)


@pytest.mark.parametrize(
    "name, dtype, seed",
    params(
        [(name, dtype, 0) for name in FAMILIES for dtype in (np.float32, np.float64)],
        everyday=lambda name, dtype, seed: name in ("convex", "poisson") or dtype == np.float64,
        name=lambda value: getattr(value, "__name__", str(value)),
    ),
)
def test_no_bound_is_below_the_true_error(name, dtype, seed):
    family = FAMILIES[name]
    data, y, x, value, gradient = draw(family, dtype, seed)
    rng = np.random.default_rng([1, seed])
    data["rtol"] = (10 ** rng.uniform(-7, -0.5, COUNT)).astype(dtype)  # of the adjoint
    bound, got, at = judged(family, data, x, y)
    errors = {
        "absolute": np.linalg.norm(np.asarray(got, np.longdouble) - gradient, axis=1),
        "value": np.abs(np.asarray(at, np.longdouble) - value),
        "corrected": np.abs(np.asarray(bound.corrected_value, np.longdouble) - value),
    }
    for field, error in errors.items():
        bounded = np.asarray(getattr(bound, field), np.longdouble)
        assert np.all(np.isfinite(error))
        assert np.all(bounded >= error), field
        # They say something: most are finite, some are nearly attained.
        assert np.mean(np.isfinite(bounded)) > 0.8
        assert np.min(bounded[error > 0] / error[error > 0]) < 10, field
    parts = bound.measured + bound.inner + bound.adjoint + bound.rounding
    known = np.isfinite(bound.absolute)
    np.testing.assert_allclose(bound.absolute[known], parts[known], rtol=1e-2)
    if name != "poisson":
        assert known.all()


# A problem of one number, x*(y) = 1 / y, at (0.6, 2): see the example of `hypergradient_bound`.

CONSTANTS = bx.BoundConstants(2.0, 0.0, 0.6 / 2**0.5, 0.5, 1.0, 0.0, 1.0, 2.0, 1.0, 3)
# Those of all x up to 0.7.
WIDE = bx.BoundConstants(2.0, 0.0, 0.7 / 2**0.5, 0.5, 1.0, 0.0, 1.0, 2.0, 1.0, 3)


def scalar_problem():
    return bx.minimum(lambda x, y: 0.5 * y * x**2 - x)


def square(x, y):
    return x**2


def at_the_point(v, constants=CONSTANTS, x=0.6):
    x, y, v = jnp.asarray(x), jnp.asarray(2.0), jnp.asarray(v)
    return bound_at(square, scalar_problem(), x, y, -x * v, v, constants)


def test_the_bound_at_the_point_itself():
    bound = at_the_point(0.6)
    # F = 0.2, v = 0.6; in the norms with mu = 2, e = 0.2 / sqrt(2) and ||v|| = 0.6 sqrt(2).
    e, v = 0.2 / np.sqrt(2), 0.6 * np.sqrt(2)
    np.testing.assert_allclose(bound.distance, e, rtol=1e-10)
    np.testing.assert_allclose(bound.inner, 0.5 * e * v + (0.6 / np.sqrt(2) + 0.5 * e) * e)
    np.testing.assert_allclose(bound.absolute, 0.13, rtol=1e-10)
    assert bound.adjoint < 1e-14 and 0 < bound.rounding < 1e-13 and bound.measured == 0
    # g = 0.36 for h = 0.25: <v, F> = 0.12, and half of e^2 bounds what that leaves.
    np.testing.assert_allclose(bound.corrected_value, 0.24, rtol=1e-12)
    np.testing.assert_allclose(bound.corrected, 0.01, rtol=1e-10)
    np.testing.assert_allclose(bound.value, 0.13, rtol=1e-10)


def test_a_rough_adjoint_at_the_point_itself():
    v = 0.3  # half of what it should be
    bound = at_the_point(v)
    assert bound.absolute >= abs(-0.6 * v + 0.25) and bound.adjoint > 0.1


def test_newton_steps_make_it_sharp():
    bound = bx.hypergradient_bound(square, scalar_problem(), bx.Implicit(), 0.6, 2.0, WIDE)
    np.testing.assert_allclose(bound.absolute, 0.11, rtol=1e-10)
    np.testing.assert_allclose(bound.measured, 0.11, rtol=1e-10)
    np.testing.assert_allclose(bound.value, 0.11, rtol=1e-10)
    np.testing.assert_allclose(bound.corrected_value, 0.25, rtol=1e-10)
    # An adjoint solve that stops at once, at half of v.
    rule = bx.Implicit(bx.CG(maxiter=0))
    rough = bx.hypergradient_bound(square, scalar_problem(), rule, 0.6, 2.0, WIDE, adjoint=0.3)
    np.testing.assert_allclose(rough.absolute, abs(-0.6 * 0.3 + 0.25), rtol=1e-10)


@pytest.mark.parametrize(
    "rule",
    [
        bx.Preconditioned(bx.Implicit(), step=bx.NewtonStep()),
        bx.Reparameterized(bx.Implicit(), change=bx.ExpChange()),
    ],
    ids=["corrected", "in another variable"],
)
def test_bounds_hold_for_every_rule(rule):
    bound = bx.hypergradient_bound(square, scalar_problem(), rule, 0.6, 2.0, WIDE)
    x, _ = rule.refine(scalar_problem(), 0.6, 2.0)
    gradient, _ = rule.pullback(scalar_problem(), x, 2.0, 2 * x)
    error = abs(float(gradient) + 0.25)
    assert error <= bound.absolute <= error + 1e-12


def test_nothing_is_known_beyond_the_radius():
    near, far = (
        at_the_point(0.6, dataclasses.replace(CONSTANTS, radius=radius)) for radius in (0.2, 0.1)
    )
    assert np.isfinite(near.absolute) and np.isfinite(near.corrected)
    assert np.isinf(far.absolute) and np.isinf(far.value) and np.isinf(far.corrected)


def test_a_point_that_is_not_finite_has_no_bound():
    bound = bx.hypergradient_bound(square, scalar_problem(), bx.Implicit(), jnp.nan, 2.0, WIDE)
    assert np.isinf(bound.absolute) and np.isinf(bound.value) and np.isinf(bound.corrected)


@pytest.mark.parametrize("shared", [True, False])
def test_pytrees_with_a_convexity_per_entry(shared):
    """Two numbers in two leaves: x*_a = 1 / y, x*_b = 3 / (2 y), g = x_a + x_b."""

    def objective(x, y):
        return 0.5 * y["p"] * (x["a"] ** 2 + 2 * x["b"] ** 2) - x["a"] - 3 * x["b"]

    convexity = 2.0 if shared else {"a": 2.0, "b": 4.0}  # at y = 2
    sizes = np.array([2.0, 2.0] if shared else [2.0, 4.0])
    x = {"a": jnp.array(0.6), "b": jnp.array(0.7)}
    # F_2^T v = x_a v_a + 2 x_b v_b, with x up to (0.6, 0.75).
    mixed = np.linalg.norm(np.array([0.6, 1.5]) / np.sqrt(sizes))
    change = np.max(np.array([1.0, 2.0]) / sizes)
    constants = bx.BoundConstants(convexity, 0.0, mixed, change, 0.0, 0.0, 2.0, 6.0, 2.0, 4)
    problem, y = bx.minimum(objective), {"p": jnp.array(2.0)}
    v = {"a": jnp.array(0.5), "b": jnp.array(0.25)}
    gradient = {"p": jnp.array(-0.6 * 0.5 - 1.4 * 0.25)}

    def total(x, y):
        return x["a"] + x["b"]

    bound = bound_at(total, problem, x, y, gradient, v, constants)
    # F = (0.2, -0.2).
    e = np.linalg.norm(np.array([0.2, -0.2]) / np.sqrt(sizes))
    size = np.linalg.norm(np.array([0.5, 0.25]) * np.sqrt(sizes))
    np.testing.assert_allclose(bound.distance, e, rtol=1e-10)
    np.testing.assert_allclose(bound.inner, change * size * e, rtol=1e-10)
    sharp = bx.hypergradient_bound(total, problem, bx.Implicit(), x, y, constants)
    true = abs((-0.6 * 0.5 - 1.4 * 0.25) + (1 / 4 + 3 / 8))
    assert bound.absolute >= sharp.absolute >= true
    np.testing.assert_allclose(sharp.absolute, true, rtol=1e-10)


def test_one_penalty_for_all_weights():
    """By hand: A = C = 1 at one row, so F = x - b + exp(y) x for each of two equal entries."""
    train, validation = (jnp.eye(2), jnp.array([1.0, 2.0])), (jnp.eye(2), jnp.zeros(2))
    constants = bx.BoundConstants.ridge(train, validation)(jnp.array([3.0, 4.0]), jnp.array(0.0))
    # ||F_2^T v|| = |3 v_1 + 4 v_2|, at most 5 ||v||.
    np.testing.assert_allclose(constants.mixed, 5.0)
    np.testing.assert_allclose(constants.strong_convexity, 1.0)
    np.testing.assert_allclose(constants.outer_x, 0.5)
    assert constants.jacobian == 0 and constants.radius == np.inf
    each = bx.BoundConstants.ridge(train, validation)(jnp.array([3.0, 4.0]), jnp.zeros(2))
    np.testing.assert_allclose(each.mixed, 4.0)


NO_CONSTANTS: Any = "ridge"
NO_FUNCTION_OF_CONSTANTS: Any = lambda x, y: 1.0  # noqa: E731


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: bx.BoundConstants(0.0, *range(9)), "`strong_convexity` must be positive, got 0.0"),
        (lambda: bx.BoundConstants(1.0, -1.0, *range(8)), "`jacobian` must not be negative"),
        (
            lambda: bx.BoundConstants.ridge(jnp.eye(2), (jnp.eye(2), jnp.ones(2))),
            "`train` must be a pair",
        ),
        (
            lambda: bx.BoundConstants.logistic((jnp.eye(2), jnp.ones(3)), None),
            r"`train` must be a matrix of features and a vector of as many targets, got .*\[3\]",
        ),
        (
            lambda: bx.BoundConstants.poisson(
                (jnp.eye(2), jnp.ones(2)), (jnp.ones((2, 3)), jnp.ones(2))
            ),
            "as many columns, got 2 and 3",
        ),
        (
            lambda: bx.hypergradient_bound(
                square, scalar_problem(), bx.Implicit(), 0.6, 2.0, NO_CONSTANTS
            ),
            "`constants` must be a BoundConstants, for example",
        ),
        (
            lambda: bx.hypergradient_bound(
                square, scalar_problem(), bx.Implicit(), 0.6, 2.0, NO_FUNCTION_OF_CONSTANTS
            ),
            r"`constants\(x, y\)` must be a BoundConstants",
        ),
        (
            lambda: bx.hypergradient_bound(
                square, scalar_problem(), bx.Implicit(), 0.6, 2.0, CONSTANTS, adjoint=jnp.ones(2)
            ),
            "`adjoint` must have as many entries as `x`, 1",
        ),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
