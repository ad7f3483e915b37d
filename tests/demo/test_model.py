"""The demo's model against scikit-learn, its hypergradient against central differences."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss

import bilevax as bx
from bilevax.demo import model
from bilevax.demo.data import DataError, Table, breast_cancer, digits, prepare
from bilevax.demo.tuning import inner_problem, make_engine, outer_objective
from tests.everyday import slow


def small_task(classes, features=4, rows=90, seed=0):
    generator = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    centers = generator.normal(size=(classes, features))
    table = Table(
        "small",
        centers[labels] + generator.normal(size=(rows, features)),
        labels,
        [f"feature {i}" for i in range(features)],
        [f"class {i}" for i in range(classes)],
    )
    return prepare(table, seed)


def some_weights(task, seed=1):
    generator = np.random.default_rng(seed)
    zero = model.zero_weights(task)
    return jax.tree.map(lambda leaf: jnp.asarray(generator.normal(size=leaf.shape)), zero)


@pytest.fixture(scope="module", params=[2, 3], ids=["two classes", "three classes"])
def task(request):
    return small_task(request.param)


@pytest.fixture(scope="module")
def solve(task):
    """The exact weights as a function of the log-penalties."""
    solve = bx.solution_map(inner_problem(task), bx.Newton())
    return jax.jit(lambda log_penalties: solve(model.zero_weights(task), log_penalties))


def test_metrics_are_those_of_sklearn(task):
    weights = some_weights(task)
    features, labels = task.test
    probabilities = np.asarray(jax.nn.softmax(model.logits(weights, features)))
    expected = log_loss(labels, probabilities)
    np.testing.assert_allclose(model.cross_entropy(weights, task.test), expected, rtol=1e-12)
    expected = accuracy_score(labels, probabilities.argmax(axis=1))
    np.testing.assert_allclose(model.accuracy(weights, task.test), expected, rtol=1e-12)


def test_weights_are_those_of_sklearn(task, solve):
    # A penalty p_j on w_j is one common penalty on sqrt(p_j) w_j, the weight of x_j / sqrt(p_j).
    penalties = np.geomspace(0.003, 0.3, len(task.feature_names))
    features, labels = map(np.asarray, task.train)
    reference = LogisticRegression(C=1 / len(labels), tol=1e-12, solver="newton-cholesky")
    reference.fit(features / np.sqrt(penalties), labels)
    coefficients = reference.coef_.T / np.sqrt(penalties)[:, None]
    intercepts = reference.intercept_
    if len(intercepts) > 1:
        intercepts = intercepts[1:] - intercepts[0]

    log_penalties = jnp.broadcast_to(jnp.log(penalties)[:, None], task.penalty_shape)
    weights = solve(log_penalties)
    np.testing.assert_allclose(weights.coefficients, coefficients, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(weights.intercepts, intercepts, rtol=1e-6, atol=1e-6)


# Every day, two classes are tuned from the command line, in `test_demo.py`.
@pytest.mark.parametrize(
    "task",
    [
        slow(2, id="two classes"),
        pytest.param(3, id="three classes"),
    ],
    indirect=True,
)
def test_hypergradient_is_that_of_central_differences(task, solve):
    generator = np.random.default_rng(2)
    y = jnp.asarray(generator.normal(-4, 1, size=task.penalty_shape))
    direction = jnp.asarray(generator.normal(size=task.penalty_shape))

    def value(y):
        return outer_objective(task)(solve(y), y)

    step = 1e-4
    difference = (value(y + step * direction) - value(y - step * direction)) / (2 * step)
    result = make_engine(task)(y, bx.cold_start(model.zero_weights(task)))
    np.testing.assert_allclose(result.value, value(y), rtol=1e-7)
    np.testing.assert_allclose(jnp.vdot(result.gradient, direction), difference, rtol=1e-6)


@pytest.mark.parametrize("load", [breast_cancer, digits])
def test_data_sets(load):
    table = load()
    task = prepare(table, seed=0)
    sizes = [len(part.labels) for part in task.parts.values()]
    assert sum(sizes) == len(table.labels)
    assert max(sizes) - min(sizes) <= len(table.class_names)
    assert task.penalty_shape == ((30, 1) if load is breast_cancer else (64, 10))
    mean = np.asarray(task.train.features.mean(axis=0))
    deviation = np.asarray(task.train.features.std(axis=0))
    np.testing.assert_allclose(mean, 0, atol=1e-10)
    np.testing.assert_allclose(deviation, np.where(task.constant, 0, 1), atol=1e-10)
    shares = [np.bincount(part.labels) for part in task.parts.values()]
    assert np.ptp(shares, axis=0).max() <= 1


def test_split_is_a_partition_that_the_seed_determines():
    # The feature is the number of the row, which standardising can be undone to find.
    labels = np.arange(60) % 2
    table = Table("rows", np.arange(60.0)[:, None], labels, ["row"], ["even", "odd"])

    def order(seed):
        parts = prepare(table, seed).parts.values()
        features = np.concatenate([part.features[:, 0] for part in parts])
        rows = np.argsort(np.argsort(features))
        np.testing.assert_array_equal(np.sort(rows), np.arange(60))
        np.testing.assert_array_equal(np.concatenate([part.labels for part in parts]), labels[rows])
        return rows

    np.testing.assert_array_equal(order(3), order(3))
    assert np.any(order(3) != order(4))


def refuse(features, message):
    features = np.asarray(features, dtype=float)
    names = [f"column {i}" for i in range(features.shape[1])]
    table = Table("some", features, np.arange(len(features)) % 2, names, ["no", "yes"])
    with warnings.catch_warnings(), pytest.raises(DataError, match=re.escape(message)) as caught:
        warnings.simplefilter("error")
        prepare(table, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e100])
def test_data_that_do_not_vary_are_refused(value):
    refuse(np.full((60, 3), value), "no column of some varies in the training rows")


@pytest.mark.parametrize("row", range(6))  # some of them are in each part
@pytest.mark.parametrize("value", [1e200, -1e308])
def test_huge_cells_are_refused_in_every_part(row, value):
    features = np.random.default_rng(0).normal(size=(60, 3))
    features[row, 1] = value
    refuse(features, f"column 'column 1' of some has a cell {value:g}, ")


def test_the_reason_for_a_huge_cell_is_given():
    features = np.random.default_rng(0).normal(size=(60, 2))
    features[:, 1] *= 1e-8
    features[0, 1] = 1.0
    reasons = set()
    for seed in range(20):  # the cell is among the training rows of some seeds
        table = Table("some", features, np.arange(60) % 2, ["a", "b"], ["no", "yes"])
        try:
            task = prepare(table, seed)
        except DataError as error:
            reasons.add(str(error))
        else:
            assert np.abs(task.train.features).max() < np.sqrt(20)
    assert reasons == {
        "column 'b' of some has a cell 1, more than 1e+06 deviations from the mean of the "
        "training rows; correct it, or remove its row"
    }
    refuse([[1e308, i] for i in range(60)], "1e+308, so large that the deviation of the training")


def test_features_that_are_constant_in_training_rows_are_zero_in_all():
    features = np.random.default_rng(0).normal(size=(60, 2))
    features[:, 1] = 0.1
    table = Table("some", features, np.arange(60) % 2, ["a", "b"], ["no", "yes"])
    task = prepare(table, seed=0)
    np.testing.assert_array_equal(task.constant, [False, True])
    for part in task.parts.values():
        np.testing.assert_array_equal(part.features[:, 1], 0)
