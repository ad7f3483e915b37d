"""The losses, the folds and the hypergradient, against scikit-learn, NumPy and differences."""

import itertools

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
from bilevax.cli import search
from bilevax.cli.choices import LOWEST, RULES, Kind
from bilevax.cli.data import Data
from bilevax.cli.fitted import make_fitted
from bilevax.cli.model import zero_weights
from bilevax.cli.preconditioner import curvatures, inverses
from bilevax.cli.report import loss_unit
from bilevax.cli.rows import as_rows, score_basis, standardise
from bilevax.cli.search import Evaluator, inner_problem
from bilevax.cli.tuning import make_engine
from tests.everyday import params, slow

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
        plan = splits.cross_validation(labels, 50, FOLDS, 0)
        self.held_out = [np.flatnonzero(mask) for mask in plan.search.held_out[:-1]]
        self.tasks = splits.make_folds(self.rows, plan.search)
        self.folds = self.tasks.choosing
        self.evaluator = Evaluator(self.rows)

    def oracle(self, penalty, rows):
        """Return scikit-learn's model of a single penalty for so many rows."""
        if self.kind is Kind.RIDGE:
            model = Ridge(alpha=penalty * rows)
        else:
            model = LogisticRegression(C=1 / (penalty * rows), tol=1e-10, max_iter=10_000)
        return make_pipeline(StandardScaler(), model)

    def fit(self, log_penalties):
        losses = self.evaluator.evaluate(self.tasks, log_penalties[None], 1e-12)
        penalties, weights = np.exp(log_penalties), losses.weights[0, -1]
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
    features, target = case.rows.features, case.rows.target[0]
    expected = np.linalg.solve(
        features.T @ features / 50 + np.diag(penalties), features.T @ target / 50
    )
    np.testing.assert_allclose(model.coefficients[0], expected, rtol=1e-9)
    np.testing.assert_allclose(model.intercepts, 0, atol=1e-12)


# Each kind and each rule once a day; with the kinds outside, for they are those of a fixture.
HYPERGRADIENTS = params(
    itertools.product(Kind, RULES), lambda *pair: pair in zip(Kind, RULES, strict=True)
)


PULL, CENTRE = 0.2, -3.0


@pytest.mark.parametrize(("case", "rule"), HYPERGRADIENTS, indirect=["case"])
def test_the_hypergradient_is_that_of_differences(case, rule):
    index = np.array([0, 1, 1, 2])  # the penalty in the middle is shared
    weights = zero_weights(FOLDS, case.rows)
    matrices = curvatures(case.rows, case.folds, weights)
    engine = make_engine(
        case.rows, case.folds, matrices, index, rule, PULL, CENTRE, rtol=1e-13, adjoint_rtol=1e-12
    )
    y = np.log([0.01, 0.3, 0.05])

    @jax.jit
    def evaluate(y):
        result = engine(y, bx.cold_start(weights))
        return result.value, result.gradient

    gradient = np.asarray(evaluate(y)[1])
    step = 1e-5
    for j in range(3):
        shift = step * np.eye(3)[j]
        difference = (evaluate(y + shift)[0] - evaluate(y - shift)[0]) / (2 * step)
        np.testing.assert_allclose(gradient[j], difference, rtol=1e-5, atol=1e-9)
    loss = case.evaluator.evaluate(case.tasks, y[index][None], 1e-12).mean[0]
    pull = PULL / 2 * np.mean((y - CENTRE) ** 2)
    np.testing.assert_allclose(evaluate(y)[0] - pull, loss, rtol=1e-9)


@pytest.mark.parametrize(
    "kind",
    [
        slow(Kind.RIDGE, id="ridge"),  # the easier of the two
        pytest.param(Kind.MULTINOMIAL, id="multinomial"),
    ],
)
def test_hypergradients_are_accurate_with_more_features_than_rows(kind):
    """By default, at the smallest penalties, where the Hessian is worst."""
    rng = np.random.default_rng(3)
    features = rng.normal(size=(30, 50))
    score = features[:, :5].sum(axis=1) + rng.normal(size=30)
    is_ridge = kind is Kind.RIDGE
    target = score if is_ridge else np.digitize(score, np.quantile(score, [1 / 3, 2 / 3]))
    names = [str(j) for j in range(50)]
    data = Data(names, features, target, None if is_ridge else ["a", "b", "c"], [])
    rows = as_rows(data, standardise(data), kind)
    plan = splits.cross_validation(None if is_ridge else target, 30, FOLDS, 0)
    folds = splits.make_folds(rows, plan.search).choosing
    weights = zero_weights(FOLDS, rows)
    matrices, y = curvatures(rows, folds, weights), np.full(50, np.log(LOWEST))

    def gradient(**tolerances):
        engine = make_engine(rows, folds, matrices, np.arange(50), RULES[0], **tolerances)
        return np.asarray(engine(y, bx.cold_start(weights)).gradient)

    expected = gradient(rtol=1e-12, adjoint_rtol=1e-11)
    wrong = np.linalg.norm(gradient() - expected)
    assert wrong < 5e-3 * np.linalg.norm(expected)


def test_curvatures_are_those_of_single_classes(case):
    rng = np.random.default_rng(1)
    # Small, so that no row has a curvature that is too small to be taken as it is.
    weights = 0.3 * rng.normal(size=zero_weights(FOLDS, case.rows).shape)
    found = curvatures(case.rows, case.folds, weights)
    basis = np.ones((1, 1)) if case.rows.basis is None else case.rows.basis

    def loss(logit, fold, c):  # of each row, with one logit moved
        moved = basis @ weights[fold] @ case.rows.design
        if case.rows.basis is None:
            return 0.5 * (moved[0] + logit - case.rows.target[0]) ** 2
        moved = jnp.asarray(moved).at[c].add(logit)
        return jax.nn.logsumexp(moved, axis=0) - jnp.sum(moved * case.rows.target, axis=0)

    for c in range(len(basis)):
        expected = 0.0
        for fold in range(FOLDS):
            curvature = jax.jacfwd(jax.jacfwd(lambda z, fold=fold, c=c: loss(z, fold, c)))(0.0)
            shares = case.folds.train[fold] * np.asarray(curvature) / FOLDS
            expected = expected + (case.rows.design * shares) @ case.rows.design.T
        np.testing.assert_allclose(found[c], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("penalties", [[0.01] * 4, [1e-5, 1e3, 1.0, 0.1]])
def test_preconditioned_hessians_are_near_the_identity(case, penalties):
    """For ridge and two classes at the weights of a fit; for more classes by a factor."""
    logs = np.log(penalties)
    weights = case.evaluator.evaluate(case.tasks, logs[None], 1e-10).weights[0, :-1]
    everything = case.folds._replace(
        train=np.full((1, 50), 0.02), variance=np.ones((1, 4)), held_out=np.zeros((1, 50))
    )
    matrices = curvatures(case.rows, everything, weights[:1])
    problem = inner_problem(case.rows, everything, matrices, np.arange(4))
    task = problem.task(jax.tree.map(lambda leaf: leaf[0], problem.tasks))
    shape = weights[0].shape

    def product(flat):  # P^{-1} H v
        jacobian = task.linearize(weights[0], logs)[1]
        return jacobian.preconditioner(jacobian.matvec(flat.reshape(shape))).ravel()

    matrix = jax.vmap(product)(np.eye(weights[0].size)).T
    values = np.linalg.eigvals(matrix).real
    if case.kind is Kind.MULTINOMIAL:
        assert 0.3 < values.min() < values.max() < 3
    elif case.kind is Kind.LOGISTIC:  # but for rows that the fit is sure of
        np.testing.assert_allclose(values, 1, rtol=0.02)
    else:
        np.testing.assert_allclose(values, 1, rtol=1e-9)


def test_inverses_by_sweeps_are_those_of_numpy():
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(3, 20, 30))
    matrices = factors @ factors.transpose(0, 2, 1) / 30 + np.diag(np.logspace(-5, 3, 20))
    expected = np.linalg.inv(matrices)
    scale = np.sqrt(np.einsum("cii,cjj->cij", expected, expected))
    for block in (1, 16, 20):
        found = inverses(jnp.asarray(matrices), block)
        assert np.max(np.abs(found - expected) / scale) < 1e-12


def test_the_basis_is_orthonormal_and_sums_to_zero():
    basis = score_basis(Kind.MULTINOMIAL, 5)
    np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-14)
    np.testing.assert_allclose(basis.sum(axis=0), 0, atol=1e-14)


def test_programs_do_not_hold_the_data():
    """Of constants XLA makes more constants, slowly and with alarms."""
    case = Case(Kind.LOGISTIC)

    def texts(repeats):
        design = np.repeat(case.rows.design, repeats, axis=1)
        rows = case.rows._replace(design=design, target=np.repeat(case.rows.target, repeats, 1))
        folds = case.tasks._replace(
            train=np.repeat(case.tasks.train, repeats, 1),
            held_out=np.repeat(case.tasks.held_out, repeats, 1),
        )
        zero, index, logs = zero_weights(FOLDS + 1, rows), np.arange(4), np.zeros((2, 4))
        matrices = curvatures(rows, folds, zero)
        arguments = rows, folds, matrices, zero, logs, 1e-3
        grid = jax.jit(search._scan).lower(*arguments).as_text()
        engine = make_engine(rows, folds, matrices, index, RULES[0])
        step = jax.jit(lambda engine, y, warm: engine(y, warm))
        return grid, step.lower(engine, logs[0], bx.cold_start(zero)).as_text()

    for small, large in zip(texts(1), texts(100), strict=True):
        assert len(large) < 1.1 * len(small)
