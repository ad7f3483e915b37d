"""Folds, and the folds of folds that make a score honest."""

import numpy as np
import pytest

import bilevax as bx
from bilevax.cli.choices import Kind
from bilevax.cli.data import Data
from bilevax.cli.folds import Masks, cross_validation, make_folds, split, validation
from bilevax.cli.rows import as_rows, standardise
from bilevax.cli.search import Evaluator


def make_rows(features, target=None):
    names = [str(j) for j in range(features.shape[1])]
    target = np.arange(len(features)) ** 1.5 if target is None else target
    data = Data(names, features, target, None, [])
    return as_rows(data, standardise(data), Kind.RIDGE)


def test_folds_hold_out_each_row_once_and_each_class_in_equal_shares():
    labels = np.repeat([0, 1, 2], [30, 15, 9])
    rows = np.ones(54, bool)
    parts = split(3, labels, rows, seed=1)
    np.testing.assert_array_equal(np.sum(parts, axis=0), 1)
    for part in parts:
        np.testing.assert_array_equal(np.bincount(labels[part]), [10, 5, 3])
    again, other = split(3, labels, rows, seed=1), split(3, labels, rows, seed=2)
    np.testing.assert_array_equal(parts[0], again[0])
    assert not np.array_equal(parts[0], other[0])


def test_uneven_folds_weigh_the_same():
    rows = make_rows(np.random.default_rng(0).normal(size=(7, 2)))
    folds = make_folds(rows, cross_validation(None, 7, 3, 0).search)
    np.testing.assert_allclose(folds.train.sum(axis=1), 1)
    np.testing.assert_allclose(folds.held_out.sum(axis=1), [1, 1, 1, 0])
    assert sorted((folds.held_out[:-1] > 0).sum(axis=1)) == [2, 2, 3]
    assert not np.any((folds.train > 0) & (folds.held_out > 0))


@pytest.mark.parametrize("seed", range(20))
def test_nested_searches_never_see_the_rows_that_they_are_judged_by(seed):
    rng = np.random.default_rng(seed)
    count, classes = rng.integers(2, 7), rng.integers(1, 5)
    sizes = rng.integers(max(count, 4), 3 * count + 4, classes)
    labels = rng.permutation(np.repeat(np.arange(classes), sizes))
    total = len(labels)
    plan = cross_validation(labels, total, count, seed)
    assert len(plan.nested) == count and plan.scored.all()
    np.testing.assert_array_equal(sum(masks.held_out[-1] for masks in plan.nested), 1)
    assert plan.search.train[-1].all() and not plan.search.held_out[-1].any()
    for masks in [plan.search, *plan.nested]:
        assert masks.train.shape == (count + 1, total)
        scored, chosen = masks.held_out[-1], masks.held_out[:-1]
        assert not np.any(masks.train & scored) and not np.any(chosen & scored)
        np.testing.assert_array_equal(np.sum(chosen, axis=0), ~scored)
        np.testing.assert_array_equal(masks.train[-1], ~scored)
        np.testing.assert_array_equal(masks.train[:-1], ~scored & ~chosen)
        for train in masks.train:  # without a row of it, a class has no finite intercept
            assert set(labels[train]) == set(range(classes))


@pytest.mark.parametrize(("rows", "parts"), [(8, 2), (26, 5)])
def test_a_validation_file_is_split_to_judge_itself(rows, parts):
    plan = validation(6, rows, seed=0)
    train = np.arange(rows) < 6
    assert len(plan.nested) == parts
    np.testing.assert_array_equal(plan.scored, ~train)
    for masks in [plan.search, *plan.nested]:
        np.testing.assert_array_equal(masks.train, [train, train])
        chosen, scored = masks.held_out
        np.testing.assert_array_equal(chosen | scored, ~train)
        assert not np.any(chosen & scored)
    assert not plan.search.held_out[-1].any()
    assert validation(6, 7, seed=0).nested == []


@pytest.mark.parametrize("jump", [0.0, 1.0], ids=["exactly", "but-for-rounding"])
def test_a_feature_that_does_not_vary_in_a_fold_has_weight_zero_there(jump):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(50, 4))
    plan = cross_validation(None, 50, 3, 0)
    features[:, 2] = 0.3 + jump * rng.choice([0.0, 5.5e-17], 50)
    features[plan.search.held_out[1], 2] = rng.normal(size=plan.search.held_out[1].sum())
    rows = make_rows(features)
    folds = make_folds(rows, plan.search)
    assert folds.variance[1, 2] == 1.0
    losses = Evaluator(rows).evaluate(folds, np.full((1, 4), np.log(1e-3)), 1e-12)
    np.testing.assert_allclose(losses.weights[0, 1, 0, 2], 0, atol=1e-10)
    assert losses.status[0] == bx.Status.CONVERGED


def test_losses_of_rows_are_those_of_the_last_fit():
    rng = np.random.default_rng(1)
    rows = make_rows(rng.normal(size=(30, 2)))
    masks = Masks(np.arange(30) < [[10], [20]], (np.arange(30) >= 20)[None] & [[True], [False]])
    losses = Evaluator(rows).evaluate(make_folds(rows, masks), np.log([[0.1, 2.0]]), 1e-12)
    features, target = rows.features, rows.target[0]
    for j, count in enumerate([10, 20]):  # weighted least squares in closed form
        design = np.hstack([features, np.ones((30, 1))])
        penalties = np.append([0.1, 2.0] * features[:count].var(axis=0), 0)
        matrix = design[:count].T @ design[:count] / count + np.diag(penalties)
        weights = np.linalg.solve(matrix, design[:count].T @ target[:count] / count)
        expected = (design @ weights - target) ** 2 / 2
        if j == 1:
            np.testing.assert_allclose(losses.rows[0], expected, rtol=1e-8, atol=1e-12)
        else:
            np.testing.assert_allclose(losses.folds[0], [expected[20:].mean()], rtol=1e-8)
