"""Diagonals of F_1: exact ones, estimates by random signs, and a user's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from tests.rules.estimators import (
    KINDS,
    MINIMUM,
    ROOT,
    U,
    W,
    X,
    Y,
    assert_close,
    flat_x,
    flat_y,
    like_x,
    partials,
)

kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)

SEEDS, PROBES = 20_000, 3


@functools.partial(jax.jit, static_argnames="kind")
def evaluate(diagonal, kind, x, y):
    return diagonal.evaluate(kind.problem, x, y)


def dense_diagonal(kind, u=U):
    return np.diag(partials(kind.optimality, u)[1])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
@kinds
def test_the_exact_diagonal_is_that_of_the_dense_jacobian(kind, batch_size):
    diagonal = evaluate(bx.ExactDiagonal(batch_size=batch_size), kind, X, Y)
    assert jax.tree.map(np.shape, diagonal) == jax.tree.map(np.shape, X)
    assert_close(flat_x(diagonal), dense_diagonal(kind), 1e-14)


@pytest.mark.parametrize("batch_size", [1, 3, 11, 256])
def test_the_exact_diagonal_holds_as_many_products_at_once_as_asked_for(batch_size):
    problem = bx.root(lambda x, y: y * jnp.sinh(x))
    diagonal = bx.ExactDiagonal(batch_size=batch_size)
    program = str(jax.make_jaxpr(lambda x: diagonal.evaluate(problem, x, 2.0))(np.ones(11)))
    widest = max(width for width in range(1, 12) if f"f64[{width},11]" in program)
    assert widest == min(batch_size, 11)


@pytest.mark.parametrize("x", [np.zeros(0), {}], ids=["0", "{}"])
def test_the_diagonals_of_an_empty_x_are_empty(x):
    problem = bx.minimum(lambda x, y: sum((jnp.sum(u**2) for u in jax.tree.leaves(x)), y))
    for diagonal in (bx.ExactDiagonal(), bx.HutchinsonDiagonal(2)):
        got = diagonal.evaluate(problem, x, 1.0)
        assert jax.tree.map(np.shape, got) == jax.tree.map(np.shape, x)


@pytest.mark.parametrize("probes", [1, 4])
def test_random_signs_are_exact_on_a_diagonal_jacobian(probes):
    problem = bx.root(lambda x, y: jnp.sinh(x) * jnp.exp(y))
    x, y = np.array([0.3, -1.0, 2.0]), np.array([0.1, 0.7, -0.4])
    diagonal = jax.jit(lambda x, y: bx.HutchinsonDiagonal(probes, seed=5).evaluate(problem, x, y))(
        x, y
    )
    np.testing.assert_allclose(diagonal, np.cosh(x) * np.exp(y), rtol=1e-14)


@functools.cache
def samples(kind):
    """Return one estimate per seed, in rows."""

    @jax.jit
    @jax.vmap
    def estimate(seed):
        return flat_x(bx.HutchinsonDiagonal(PROBES, seed=seed).evaluate(kind.problem, X, Y))

    return np.asarray(estimate(jnp.arange(SEEDS)))


def stated_variance(kind):
    _, first, _ = partials(kind.optimality, U)
    return (np.sum(first**2, axis=1) - np.diag(first) ** 2) / PROBES


@pytest.mark.parametrize("kind", [MINIMUM, ROOT], ids=lambda kind: kind.name)
def test_random_signs_are_unbiased(kind):
    # Five standard errors of the mean: a chance of 1e-6 had the seeds not been fixed.
    error = np.abs(np.mean(samples(kind), axis=0) - dense_diagonal(kind))
    np.testing.assert_array_less(error, 5 * np.sqrt(stated_variance(kind) / SEEDS))


@pytest.mark.parametrize("kind", [MINIMUM, ROOT], ids=lambda kind: kind.name)
def test_random_signs_have_the_stated_variance(kind):
    # Sums of independent signs have a kurtosis of at most 3, so the standard error of a sampled
    # variance is at most sqrt(2 / SEEDS) = 1 % of it.
    variance = np.var(samples(kind) - dense_diagonal(kind), axis=0)
    np.testing.assert_allclose(variance, stated_variance(kind), rtol=5 * np.sqrt(2 / SEEDS))


def test_the_seed_decides_on_the_signs():
    diagonal = functools.partial(bx.HutchinsonDiagonal, PROBES)
    first, again, other = (flat_x(evaluate(diagonal(seed=seed), ROOT, X, Y)) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first, again)
    assert np.linalg.norm(first - other) > 1e-3
    # One lane of a batch of seeds is the estimate of that seed.
    np.testing.assert_allclose(samples(ROOT)[[7, 8]], [first, other], rtol=1e-13)


@pytest.mark.parametrize(
    "diagonal", [bx.ExactDiagonal(batch_size=3), bx.HutchinsonDiagonal(2)], ids=["exact", "signs"]
)
def test_lanes_of_a_batch_are_diagonals_of_their_own(diagonal):
    shifts = np.array([0.0, 0.4, -0.9])

    def at(shift):
        return flat_x(diagonal.evaluate(ROOT.problem, like_x(U + shift), Y))

    batch = jax.jit(jax.vmap(at))(shifts)
    one_by_one = [flat_x(evaluate(diagonal, ROOT, like_x(U + shift), Y)) for shift in shifts]
    np.testing.assert_allclose(batch, one_by_one, rtol=1e-13)
    assert np.linalg.norm(batch[0] - batch[1]) > 1e-3


def user(x, y):
    return like_x(1 + flat_x(x) ** 2 * flat_y(y)[0])


def flat_user(u, w):
    return 1 + u**2 * w[0]


def test_the_function_of_a_user_is_used_as_it_is():
    wanted = np.asarray(flat_user(U, W))
    step = bx.JacobiStep(user)
    np.testing.assert_allclose(flat_x(step.diagonal.evaluate(MINIMUM.problem, X, Y)), wanted)
    value, *_ = partials(MINIMUM.optimality, U)
    x, _ = bx.Preconditioned(bx.Implicit(), step=step).refine(MINIMUM.problem, X, Y)
    assert_close(flat_x(x), U - value / wanted, 1e-14)
    assert np.linalg.norm(wanted - dense_diagonal(MINIMUM)) > 0.1


def test_the_function_of_a_user_may_serve_a_change_of_variables():
    # x = z / P(y), so dx/dy = P^{-1} dz/dy + d(1/P)/dy z, with P held at the current point.
    rule = bx.Reparameterized(bx.Implicit(bx.Dense()), bx.DiagonalChange(user))
    c = np.array([0.3, -1.0, 0.5, 2.0])
    pulled, _ = rule.pullback(MINIMUM.problem, X, Y, like_x(c))
    value, first, second = partials(MINIMUM.optimality, U)
    v, slope = np.linalg.solve(first, c), np.zeros_like(second)
    slope[:, 0] = U**2  # P' is in the first entry of y alone
    divisor = np.asarray(flat_user(U, W))
    # G = P^{-1} F, and implicit differentiation of it is that of F with F_2 - P' P^{-1} F.
    wanted = -(second - slope * (value / divisor)[:, None]).T @ v
    assert_close(flat_y(pulled), wanted, 1e-13)
