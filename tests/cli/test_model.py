"""The losses, the folds and the hypergradient, against scikit-learn, NumPy and differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import bilevax as bx
from bilevax.cli import folds as splits
from bilevax.cli.choices import RULES, Kind
from bilevax.cli.coordinates import curvatures, to_point, to_weights, zero_points
from bilevax.cli.data import Data, as_rows, standardise
from bilevax.cli.fitted import make_fitted
from bilevax.cli.model import Weights, row_losses, score_basis, score_curvatures, zero_weights
from bilevax.cli.report import loss_unit
from bilevax.cli.search import Evaluator
from bilevax.cli.tuning import make_engine

FOLDS = 3
NAMES = ["a", "b", "c", "d"]


class Case:
    """A small data set of one kind, with everything that is made from it."""

    def __init__(self, kind):
        generator = np.random.default_rng(0)
        features = generator.normal(size=(50, 4)) * [1, 10, 0.1, 3] + [0, 5, -2, 100]
        score = features @ [1.0, -0.2, 3.0, 0.1] + generator.normal(size=50)
        if kind is Kind.RIDGE:
            target, classes = 20 * score + 7, None
        else:
            count = 2 if kind is Kind.LOGISTIC else 3
            target = np.digitize(score, np.quantile(score, np.arange(1, count) / count))
            classes = [f"class {i}" for i in range(count)]
        self.kind = kind
        self.data = Data(NAMES, features, target, classes, [])
        self.scaling = standardise(self.data)
        self.rows = as_rows(self.data, self.scaling, kind)
        labels = None if classes is None else target
        self.held_out = splits.split(FOLDS, labels, 50, 0)
        self.folds = splits.cross_validation(self.rows.features, self.held_out)
        self.evaluator = Evaluator(self.rows, self.folds, splits.everything(self.rows.features, 50))

    def oracle(self, penalty, rows):
        """Return scikit-learn's model of a single penalty for so many rows."""
        if self.kind is Kind.RIDGE:
            model = Ridge(alpha=penalty * rows)
        else:
            model = LogisticRegression(C=1 / (penalty * rows), tol=1e-10, max_iter=10_000)
        return make_pipeline(StandardScaler(), model)

    def fit(self, log_penalties):
        losses = self.evaluator.evaluate(log_penalties[None], 1e-12)
        weights = Weights(*(leaf[0, -1] for leaf in losses.weights))
        penalties = np.exp(log_penalties)
        return losses, make_fitted(
            self.kind, "t", self.data, self.scaling, self.rows, penalties, weights
        )


@pytest.fixture(scope="module", params=list(Kind), ids=str)
def case(request):
    return Case(request.param)


@pytest.mark.parametrize("penalty", [0.003, 1.0])
def test_a_single_penalty_is_that_of_sklearn(case, penalty):
    _, model = case.fit(np.full(4, np.log(penalty)))
    features, target = case.data.features, case.data.target
    oracle = case.oracle(penalty, 50).fit(features, target)
    coefficients, intercepts = model.original()
    expected = np.atleast_2d(oracle[-1].coef_)
    scale = case.scaling.target_scale  # ridge standardises the target too, for the same minimum
    np.testing.assert_allclose(scale * model.coefficients, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(coefficients, expected / case.scaling.scales, rtol=1e-4, atol=1e-5)

    frame = model.predict(features)
    if case.kind is Kind.RIDGE:
        np.testing.assert_allclose(frame["prediction"], oracle.predict(features), rtol=1e-6)
        by_hand = features @ coefficients[0] + intercepts[0]
        np.testing.assert_allclose(frame["prediction"], by_hand, rtol=1e-9)
    else:
        expected = oracle.predict_proba(features)
        np.testing.assert_allclose(frame.to_numpy()[:, 1:].astype(float), expected, atol=1e-5)
        assert list(frame["prediction"]) == [case.data.classes[i] for i in expected.argmax(1)]


@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_the_loss_is_that_of_a_loop_over_folds(case, penalty):
    losses, _ = case.fit(np.full(4, np.log(penalty)))
    features, target = case.data.features, case.data.target
    expected = []
    for rows in case.held_out:
        train = np.setdiff1d(np.arange(50), rows)
        oracle = case.oracle(penalty, len(train)).fit(features[train], target[train])
        if case.kind is Kind.RIDGE:
            expected.append(np.mean((oracle.predict(features[rows]) - target[rows]) ** 2))
        else:
            labels = np.arange(len(case.data.classes))
            proba = oracle.predict_proba(features[rows])
            expected.append(log_loss(target[rows], proba, labels=labels))
    unit = loss_unit(case.kind, case.scaling)
    np.testing.assert_allclose(unit * losses.folds[0], expected, rtol=1e-5)
    np.testing.assert_allclose(losses.mean[0], losses.folds[0].mean())


def test_penalties_of_ridge_give_the_closed_form():
    case = Case(Kind.RIDGE)
    penalties = np.array([1e-4, 0.1, 10.0, 0.5])
    _, model = case.fit(np.log(penalties))
    features, target = np.asarray(case.rows.features), np.asarray(case.rows.target)[:, 0]
    expected = np.linalg.solve(
        features.T @ features / 50 + np.diag(penalties), features.T @ target / 50
    )
    np.testing.assert_allclose(model.coefficients[0], expected, rtol=1e-9)
    np.testing.assert_allclose(model.intercepts, 0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_the_hypergradient_is_that_of_differences(case, rule):
    index = np.array([0, 1, 1, 2])  # the penalty in the middle is shared
    weights = zero_weights(FOLDS, case.rows)
    matrices = curvatures(case.rows, case.folds, weights)
    engine = make_engine(
        case.rows, case.folds, matrices, index, rule, rtol=1e-13, adjoint_rtol=1e-12
    )
    y = np.log([0.01, 0.3, 0.05])

    @jax.jit
    def evaluate(y):
        result = engine(y, bx.cold_start(zero_points(FOLDS, case.rows)))
        return result.value, result.gradient

    gradient = np.asarray(evaluate(y)[1])
    step = 1e-5
    for j in range(3):
        shift = step * np.eye(3)[j]
        difference = (evaluate(y + shift)[0] - evaluate(y - shift)[0]) / (2 * step)
        np.testing.assert_allclose(gradient[j], difference, rtol=1e-5, atol=1e-9)
    loss = case.evaluator.evaluate(y[index][None], 1e-12).mean[0]
    np.testing.assert_allclose(evaluate(y)[0], loss, rtol=1e-9)


def test_in_the_coordinates_of_ridge_the_hessian_is_the_identity():
    case = Case(Kind.RIDGE)
    penalties = np.array([1e-4, 0.1, 10.0, 0.5])
    matrix = curvatures(case.rows, case.folds, zero_weights(FOLDS, case.rows))[0]
    features, share = np.asarray(case.rows.features), case.folds.train[0]
    extended = np.concatenate([features, np.ones((50, 1))], axis=1)
    hessian = (extended * share[:, None]).T @ extended + np.diag([*penalties, 0])

    def extended_weights(point):
        return jnp.append(*to_weights(point[:, None], matrix, penalties))

    to = jax.jacobian(extended_weights)(jnp.ones(5))
    np.testing.assert_allclose(to.T @ hessian @ to, np.eye(5), atol=1e-9)


def test_coordinates_of_weights_and_back(case):
    rng = np.random.default_rng(1)
    columns = case.rows.target.shape[1]
    weights = Weights(rng.normal(size=(4, columns)), rng.normal(size=columns))
    stacked = Weights(*(np.stack([leaf] * FOLDS) for leaf in weights))
    matrix = curvatures(case.rows, case.folds, stacked)[1]
    penalties = np.array([1e-5, 1e3, 1.0, 0.1])
    back = to_weights(to_point(weights, matrix, penalties), matrix, penalties)
    for one, other in zip(back, weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8)


def test_curvatures_of_scores_are_second_derivatives(case):
    columns = case.rows.target.shape[1]
    weights = Weights(np.full((4, columns), 0.3), np.arange(columns) / 10)

    def loss(shift):  # of the scores
        return jnp.sum(
            row_losses(weights._replace(intercepts=weights.intercepts + shift), case.rows)
        )

    found = score_curvatures(weights, case.rows)
    expected = jnp.trace(jax.hessian(loss)(jnp.zeros(columns))) / columns
    np.testing.assert_allclose(found.sum(), expected, rtol=1e-9)


def test_the_basis_is_orthonormal_and_sums_to_zero():
    basis = score_basis(Kind.MULTINOMIAL, 5)
    np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-14)
    np.testing.assert_allclose(basis.sum(axis=0), 0, atol=1e-14)


def test_folds_hold_out_each_row_once_and_each_class_in_equal_shares():
    labels = np.repeat([0, 1, 2], [30, 15, 9])
    held_out = splits.split(3, labels, 54, seed=1)
    np.testing.assert_array_equal(np.sort(np.concatenate(held_out)), np.arange(54))
    for rows in held_out:
        np.testing.assert_array_equal(np.bincount(labels[rows]), [10, 5, 3])
    again, other = splits.split(3, labels, 54, seed=1), splits.split(3, labels, 54, seed=2)
    np.testing.assert_array_equal(held_out[0], again[0])
    assert not np.array_equal(held_out[0], other[0])


def test_a_feature_that_does_not_vary_in_a_fold_has_weight_zero_there():
    case = Case(Kind.RIDGE)
    features = np.array(case.rows.features)
    features[:, 2] = 0.3
    features[case.held_out[1], 2] = 1.0  # varies in what fold 1 holds out, and in no other row
    folds = splits.cross_validation(features, case.held_out)
    assert folds.variance[1, 2] == 1.0
    rows = case.rows._replace(features=features)
    evaluator = Evaluator(rows, folds, splits.everything(features, 50))
    losses = evaluator.evaluate(np.full((1, 4), np.log(1e-3)), 1e-12)
    np.testing.assert_allclose(losses.weights.coefficients[0, 1, 2], 0, atol=1e-10)
    assert losses.status[0] == bx.Status.CONVERGED


def test_uneven_folds_weigh_the_same():
    features = np.random.default_rng(0).normal(size=(7, 2))
    folds = splits.cross_validation(features, splits.split(3, None, 7, 0))
    np.testing.assert_allclose(folds.train.sum(axis=1), 1)
    np.testing.assert_allclose(folds.held_out.sum(axis=1), 1)
    assert sorted((folds.held_out > 0).sum(axis=1)) == [2, 2, 3]
    assert not np.any((folds.train > 0) & (folds.held_out > 0))
