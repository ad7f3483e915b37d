"""Stochastic problems: one batch is an ordinary problem, and the mean over batches is the whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from tests.stochastic.example import ALL, TRAIN, X0, Y, jacobian, objective, optimality, pullback

X, V = np.array([0.5, -1.0, 2.0]), np.array([1.0, 0.3, -0.7])


def one_by_one(tree):
    return [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], tree) for i in range(12)]


def test_a_minimum_on_a_batch():
    problem = bx.stochastic_minimum(objective).on_batch(TRAIN)
    assert isinstance(problem, type(bx.minimum(lambda x, y: 0.0)))
    assert problem.structure is bx.Structure.POSITIVE_DEFINITE
    np.testing.assert_allclose(problem.optimality(X, Y), optimality(X, Y, ALL), rtol=1e-13)
    value, operator = problem.linearize(X, Y)
    np.testing.assert_allclose(value, optimality(X, Y, ALL), rtol=1e-13)
    np.testing.assert_allclose(operator.matvec(V), jacobian(Y, ALL) @ V, rtol=1e-13)
    _, cotangent = problem.pull_outer(X, Y, V)
    np.testing.assert_allclose(cotangent, pullback(X, Y, V, ALL), rtol=1e-13)


def test_the_mean_over_all_examples_is_the_deterministic_problem():
    stochastic = bx.stochastic_minimum(objective)
    whole = bx.minimum(lambda x, y: objective(x, y, TRAIN))
    batches = [stochastic.on_batch(batch) for batch in one_by_one(TRAIN)]
    quantities = [
        lambda problem: problem.optimality(X, Y),
        lambda problem: problem.linearize(X, Y)[1].matvec(V),
        lambda problem: problem.pull_outer(X, Y, V)[1],
    ]
    for quantity in quantities:
        samples = np.stack([quantity(problem) for problem in batches])
        assert np.max(np.std(samples, axis=0)) > 0.1  # they do differ
        np.testing.assert_allclose(samples.mean(axis=0), quantity(whole), rtol=1e-12)


def test_a_fixed_point_on_a_batch():
    def step_map(x, y, batch):
        return batch @ x + y

    problem = bx.stochastic_fixed_point(step_map)
    matrices = np.random.default_rng(0).normal(size=(12, 3, 3))
    samples = []
    for matrix in matrices:
        on_batch = problem.on_batch(matrix)
        np.testing.assert_allclose(on_batch.image(X, Y), matrix @ X + Y, rtol=1e-13)
        samples.append(on_batch.optimality(X, Y))
        product = on_batch.linearize(X, Y)[1].transpose.matvec(V)
        np.testing.assert_allclose(product, V - matrix.T @ V, rtol=1e-12)
    whole = bx.fixed_point(lambda x, y: matrices.mean(axis=0) @ x + y)
    np.testing.assert_allclose(np.mean(samples, axis=0), whole.optimality(X, Y), rtol=1e-12)
    assert problem.structure is bx.Structure.GENERAL


def test_the_structure_is_handed_on():
    for make in (bx.stochastic_minimum, bx.stochastic_fixed_point):
        problem = make(lambda x, y, batch: x, structure=bx.Structure.SYMMETRIC)
        assert problem.on_batch(0.0).structure is bx.Structure.SYMMETRIC


def test_problems_are_pytrees_of_what_their_functions_hold():
    def shifted(shift, x, y, batch):
        return jnp.sum((x - y * batch - shift) ** 2) / 2

    def optimality(shift):
        problem = bx.stochastic_minimum(jax.tree_util.Partial(shifted, shift))
        assert len(jax.tree.leaves(problem)) == 1
        return jax.jit(lambda problem: problem.on_batch(2.0).optimality(1.0, 3.0))(problem)

    assert optimality(4.0) == -9 and optimality(5.0) == -10
    minimum, fixed_point = (make(shifted) for make in (bx.stochastic_minimum,
                                                       bx.stochastic_fixed_point))  # fmt: skip
    assert jax.tree.structure(minimum) != jax.tree.structure(
        dataclasses.replace(fixed_point, structure=minimum.structure)
    )


def test_functions_are_checked_on_shapes_alone():
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), TRAIN)
    bx.stochastic_minimum(objective).check(X0, Y, shapes)
    wrong = bx.stochastic_fixed_point(lambda x, y, batch: batch["b"])
    with pytest.raises(TypeError, match=r"`x` is float64\[3\], got float64\[12\]"):
        wrong.check(X0, Y, shapes)
