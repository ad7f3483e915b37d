"""Laws of stochastic hypergradients: bias, variance and standard error, against NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from tests.everyday import slow
from tests.stochastic.example import (
    ALL_OUTER,
    TRAIN,
    VALIDATION,
    X0,
    Y,
    exact_outer,
    jacobian,
    make,
    optimality,
    outer_terms,
    pullback,
    truth,
)

DRAWS = 10_000
KEYS = jax.random.split(jax.random.key(2024), DRAWS)


# At the exact x and v.


@pytest.mark.parametrize("replace", [True, slow(False)])
def test_at_the_exact_solution_the_hypergradient_has_no_bias_and_the_variance_of_a_mean(replace):
    x, v, value, gradient = truth(Y)
    samples, inner_batch, outer_batch = 3, 4, 2
    engine = make(
        sampler=bx.UniformSampler(TRAIN, inner_batch, replace=replace),
        outer_sampler=bx.UniformSampler(VALIDATION, outer_batch, replace=replace),
        inner_steps=0,
        adjoint_steps=0,
        samples=samples,
    )

    @jax.jit
    @jax.vmap
    def run(key):
        state = engine.init(X0, key)._replace(x=jnp.asarray(x), adjoint=jnp.asarray(v))
        result = engine(Y, state)
        return result.value, result.gradient, result.report.standard_error

    values, gradients, errors = (np.asarray(part) for part in run(KEYS))

    # The variance of a mean of `samples` batches, from all single examples.
    pulled = np.stack([pullback(x, Y, v, [i]) for i in range(12)])
    terms = [outer_terms(x, Y, [j]) for j in range(8)]
    explicit = np.stack([part[2] for part in terms])

    def variance_of_mean(examples, batch):
        count = len(examples)
        finite = 1 if replace else (count - batch) / (count - 1)  # fewer are left to be drawn
        return np.var(examples, axis=0) / batch * finite / samples

    variance = variance_of_mean(pulled, inner_batch) + variance_of_mean(explicit, outer_batch)
    value_variance = variance_of_mean(np.stack([part[0] for part in terms]), outer_batch)

    assert np.all(np.abs(gradients.mean(axis=0) - gradient) < 4 * np.sqrt(variance / DRAWS))
    assert np.abs(values.mean() - value) < 4 * np.sqrt(value_variance / DRAWS)
    # The variance of ten thousand draws has a relative error of about 1.4 %.
    np.testing.assert_allclose(gradients.var(axis=0), variance, rtol=0.06)
    np.testing.assert_allclose(values.var(), value_variance, rtol=0.06)
    np.testing.assert_allclose(np.mean(errors**2), variance.sum(), rtol=0.06)
    # Both parts count, and neither is the whole.
    shares = variance_of_mean(pulled, inner_batch).sum() / variance.sum()
    assert 0.1 < shares < 0.9


# The whole of SID.

STEPS, ADJOINT_STEPS, SAMPLES, SIZE, ADJOINT_SIZE = 6, 5, 2, 0.1, 0.15


def expected_hypergradient(y):
    """Return the expectation of SID with single examples, by its first two moments.

    With z = (x, 1) a step is z <- B_i z with a matrix B_i of the example, so E[z z^T] has a linear
    recursion. Given x, v has the expectation P z, for its steps are affine in v and in x.
    """
    penalty = np.exp(y)
    hessians = [jacobian(y, [i]) for i in range(12)]
    moments = np.outer(np.append(X0, 1), np.append(X0, 1))
    for _ in range(STEPS):
        following = np.zeros((4, 4))
        for i, hessian in enumerate(hessians):
            step = np.eye(4)
            step[:3, :3] -= SIZE * hessian
            step[:3, 3] = SIZE * TRAIN["a"][i] * TRAIN["b"][i]
            following += step @ moments @ step.T / 12
        moments = following
    c, e = VALIDATION["c"], VALIDATION["e"]
    cotangent = np.column_stack([c.T @ c / 8, -c.T @ e / 8])  # E[g_1] = cotangent z
    adjoint = np.zeros((3, 4))
    for _ in range(ADJOINT_STEPS):
        adjoint = adjoint - ADJOINT_SIZE * (np.mean(hessians, axis=0) @ adjoint - cotangent)
    products = np.diag(moments[:3] @ adjoint.T)  # E[x v], entry by entry
    return VALIDATION["u"].mean(axis=0) + y / 5 - TRAIN["w"].mean(axis=0) * penalty * products


def simulated_hypergradients(y, rng):
    """Run SID with single examples by NumPy, all draws at once."""
    a, b, w = TRAIN["a"], TRAIN["b"], TRAIN["w"] * np.exp(y)
    c, e, u = VALIDATION["c"], VALIDATION["e"], VALIDATION["u"]
    x = np.zeros((DRAWS, 3))
    for _ in range(STEPS):
        i = rng.integers(12, size=DRAWS)
        misfit = np.sum(a[i] * x, axis=1) - b[i]
        x = x - SIZE * (a[i] * misfit[:, None] + w[i] * x)
    j = rng.integers(8, size=(SAMPLES, DRAWS))
    misfit = np.sum(c[j] * x, axis=2) - e[j]
    cotangent = np.mean(c[j] * misfit[..., None], axis=0)
    v = np.zeros((DRAWS, 3))
    for _ in range(ADJOINT_STEPS):
        i = rng.integers(12, size=DRAWS)
        product = a[i] * np.sum(a[i] * v, axis=1)[:, None] + w[i] * v
        v = v - ADJOINT_SIZE * (product - cotangent)
    i = rng.integers(12, size=(SAMPLES, DRAWS))
    return u[j].mean(axis=0) + y / 5 - w[i].mean(axis=0) * x * v


def single_example_engine(**options):
    samplers = {
        "sampler": bx.UniformSampler(TRAIN, 1),
        "outer_sampler": bx.UniformSampler(VALIDATION, 1),
    }
    return make(**(samplers | options))


def test_mean_square_error_is_bias_squared_and_variance():
    engine = single_example_engine(
        inner_steps=STEPS,
        adjoint_steps=ADJOINT_STEPS,
        samples=SAMPLES,
        inner_step_size=SIZE,
        adjoint_step_size=ADJOINT_SIZE,
    )
    run = jax.jit(jax.vmap(lambda key: engine(Y, engine.init(X0, key)).gradient))
    gradients, exact = np.asarray(run(KEYS)), truth(Y)[3]

    # The bias: in closed form, and it is no accident of these draws.
    expected = expected_hypergradient(Y)
    error_of_mean = gradients.std(axis=0) / np.sqrt(DRAWS)
    assert np.all(np.abs(gradients.mean(axis=0) - expected) < 4 * error_of_mean)
    bias = expected - exact
    assert np.max(np.abs(bias) / error_of_mean) > 10

    # The variance: that of other draws, by NumPy.
    simulated = simulated_hypergradients(Y, np.random.default_rng(1))
    np.testing.assert_allclose(gradients.var(axis=0), simulated.var(axis=0), rtol=0.08)

    # Together they are the error.
    squared_error = np.mean(np.sum((gradients - exact) ** 2, axis=1))
    parts = np.sum(bias**2), np.sum(simulated.var(axis=0))
    np.testing.assert_allclose(squared_error, sum(parts), rtol=0.04)
    assert min(parts) > 0.04 * sum(parts)  # neither could be left out


@pytest.mark.slow  # what it is at the exact x and v is tested above
def test_the_standard_error_is_the_scatter_at_the_x_and_v_that_there_are():
    """It tells the error where x and v are exact. What x and v are off by, it does not see."""

    def errors(steps, **options):
        step_size = bx.decreasing(1.0, 10.0)
        engine = single_example_engine(
            inner_steps=steps,
            adjoint_steps=steps,
            samples=2,
            inner_step_size=step_size,
            adjoint_step_size=step_size,
            **options,
        )

        def run(key):
            result = engine(Y, engine.init(X0, key))
            return result.gradient, result.report.standard_error

        gradients, reported = jax.jit(jax.vmap(run))(KEYS[:300])
        error = np.sum((np.asarray(gradients) - truth(Y)[3]) ** 2, axis=1)
        return np.sqrt(np.mean(error)), np.sqrt(np.mean(np.asarray(reported) ** 2))

    exact = {"function": exact_outer, "outer_sampler": None}
    error, reported = errors(1500, **exact)
    np.testing.assert_allclose(reported, error, rtol=0.15)
    error, reported = errors(2, **exact)  # too few steps
    assert reported < 0.7 * error
    error, reported = errors(1500)  # v has the error of a g_1 from two examples
    assert reported < 0.7 * error


@pytest.mark.slow  # every single step is tested in test_engine.py
def test_the_mean_square_error_falls_like_one_over_the_counts():
    counts = np.array([50, 200, 800])
    engine = single_example_engine(
        inner_step_size=bx.decreasing(1.0, 10.0), adjoint_step_size=bx.decreasing(2.0, 20.0)
    )

    @jax.jit
    def squared_error(count):
        grown = dataclasses.replace(engine, inner_steps=count, adjoint_steps=count, samples=count)
        run = jax.vmap(lambda key: grown(Y, grown.init(X0, key)).gradient)
        return jnp.mean(jnp.sum((run(KEYS[:400]) - truth(Y)[3]) ** 2, axis=1))

    errors = np.array([squared_error(count) for count in counts])
    slopes = np.diff(np.log(errors)) / np.diff(np.log(counts))
    np.testing.assert_allclose(slopes, -1.0, atol=0.2)


# The oracles themselves.


def test_the_oracles_have_the_right_limits():
    x, v, _, gradient = truth(Y)
    assert np.linalg.norm(optimality(x, Y, np.arange(12))) < 1e-13
    terms = outer_terms(x, Y, ALL_OUTER)
    np.testing.assert_allclose(jacobian(Y, np.arange(12)) @ v, terms[1], rtol=1e-12)
    np.testing.assert_allclose(terms[2] - pullback(x, Y, v, np.arange(12)), gradient, rtol=1e-12)
    simulated = simulated_hypergradients(Y, np.random.default_rng(2))
    error_of_mean = simulated.std(axis=0) / np.sqrt(DRAWS)
    assert np.all(np.abs(simulated.mean(axis=0) - expected_hypergradient(Y)) < 4 * error_of_mean)


def test_samples_that_are_equal_have_no_error():
    # Examples that are one another's copies: rounding must not make a variance negative.
    data = jax.tree.map(lambda leaf: np.repeat(leaf[:1], 12, axis=0), TRAIN)
    engine = make(exact_outer, sampler=bx.UniformSampler(data, 1), outer_sampler=None, samples=7)
    run = jax.jit(jax.vmap(lambda key: engine(Y, engine.init(X0, key)).report.standard_error))
    errors = run(KEYS[:200])
    assert np.all((errors >= 0) & (errors < 1e-15))
