"""Honest scores, against NumPy and limits."""

from types import SimpleNamespace

import numpy as np
import pytest

import bilevax as bx
from bilevax.cli import honest, tuning
from bilevax.cli.choices import Kind
from bilevax.cli.data import Data
from bilevax.cli.folds import cross_validation
from bilevax.cli.rows import as_rows, standardise
from bilevax.cli.search import BATCH, GRID, Evaluator

ROWS, FEATURES, FOLDS = 24, 3, 3


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(ROWS, FEATURES))
    target = features[:, 0] + rng.normal(size=ROWS)
    data = Data(["a", "b", "c"], features, target, None, [])
    return as_rows(data, standardise(data), Kind.RIDGE)


def loss(rows, penalty, train, held_out):
    """Return the losses of rows by ridge regression in closed form."""
    mean, scale = rows.features[train].mean(axis=0), rows.features[train].std(axis=0)
    design = (rows.features - mean) / scale
    target = rows.target[0] - rows.target[0][train].mean()
    matrix = design[train].T @ design[train] / train.sum() + penalty * np.eye(FEATURES)
    weights = np.linalg.solve(matrix, design[train].T @ target[train] / train.sum())
    return (design[held_out] @ weights - target[held_out]) ** 2 / 2


def test_scores_are_those_of_a_loop_over_nested_folds(rows):
    plan = cross_validation(None, ROWS, FOLDS, 0)
    settings = tuning.Settings("implicit", 0.1, 50)
    # The strongest pull leaves nothing but the best single penalty.
    found = honest.score(
        Evaluator(rows), rows, plan, np.arange(FEATURES), settings, shrinks=(1e6, 0.0)
    )
    total = 0.0
    for masks in plan.nested:
        *folds, last = zip(masks.train, masks.held_out, strict=True)

        def mean(penalty, folds=folds):
            return np.mean([loss(rows, penalty, *masks).mean() for masks in folds])

        best = int(np.argmin([mean(penalty) for penalty in GRID]))
        ends = GRID[max(best - 1, 0)], GRID[min(best + 1, len(GRID) - 1)]
        fine = [*GRID, *np.geomspace(*ends, BATCH)]
        penalty = fine[int(np.argmin([mean(penalty) for penalty in fine]))]
        total += loss(rows, penalty, *last).sum() / ROWS
    np.testing.assert_allclose(found.single, total, rtol=1e-6)
    np.testing.assert_allclose(found.tuned[0], total, rtol=1e-3)
    assert abs(found.tuned[1] / total - 1) > 1e-2  # and no pull leaves more
    assert found.spreads[0] < 1e-3 * total < found.spreads[1]


def test_a_pull_that_is_stronger_ends_nearer(rows):
    plan = cross_validation(None, ROWS, FOLDS, 0)
    folds, index = honest.make_folds(rows, plan.search), np.arange(FEATURES)
    grid = tuning.search_grid(Evaluator(rows), folds, FEATURES)
    settings = tuning.Settings("implicit", 1e-2, 300)
    ends = [
        np.asarray(tuning.tune(rows, folds, index, grid, settings, shrink).y) - np.log(grid.best)
        for shrink in (10.0, 0.1, 0.001)
    ]
    assert np.all(np.diff([np.abs(end).max() for end in ends]) > 0.1)


def test_a_signal_ends_it(rows, monkeypatch):
    interrupted = SimpleNamespace(outcome=bx.Outcome.INTERRUPTED)
    monkeypatch.setattr(tuning, "search_grid", lambda *arguments: None)
    monkeypatch.setattr(tuning, "tune", lambda *arguments, **options: interrupted)
    plan = cross_validation(None, ROWS, FOLDS, 0)
    settings = tuning.Settings("implicit", 0.1, 50)
    with pytest.raises(KeyboardInterrupt):
        honest.score(Evaluator(rows), rows, plan, np.arange(FEATURES), settings, (1.0,))


@pytest.mark.parametrize("seed", range(10))
def test_the_choice_of_a_pull_by_the_definition(seed):
    rng = np.random.default_rng(seed)
    count = rng.integers(5, 60)
    losses = rng.exponential(size=(5, count)) ** 2 + np.linspace(0, rng.normal(), 5)[:, None]
    losses[1] = losses[0] + 0.01 * rng.normal(size=count)  # a strong pull changes little
    found = honest.summarise(losses, np.array([1.0, 0.1, 0.01, 0.0]))
    means = losses.mean(axis=1)
    np.testing.assert_allclose([found.single, *found.tuned], means)

    def spread(a, b):
        return 2 * np.sqrt(np.var(losses[a] - losses[b], ddof=1) / count)

    np.testing.assert_allclose(found.spreads, [spread(j, 0) for j in range(1, 5)])
    lowest = 1 + int(np.argmin(means[1:]))
    good = [j for j in range(1, 5) if means[j] - means[lowest] <= spread(j, lowest)]
    assert 1 + found.best == good[0]
    assert found.is_better == (means[0] - means[good[0]] > spread(good[0], 0))
    again = honest.Honest.from_json(found.to_json())
    for before, after in zip(found, again, strict=True):
        np.testing.assert_array_equal(before, after)
