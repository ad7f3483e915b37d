"""Engines with `accuracy=` against the true error, by a dense gradient of h."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import bilevax as bx
from tests.bad_input.example import assert_fails
from tests.certificates.test_efficiency import LOGISTIC, PENALTY, RIDGE, validation
from tests.everyday import params, slow
from tests.rules.estimators import W, image, outer
from tests.test_compilation import recorded_compilations

Status = bx.Status
SOLVER = bx.GradientDescent(0.2)
RULES = {
    "implicit": bx.Implicit(),
    "newton": bx.Preconditioned(bx.Implicit(), bx.NewtonStep()),
    "diagonal_change": bx.Reparameterized(bx.Implicit(bx.Dense()), bx.DiagonalChange()),
}


@functools.partial(jax.jit, static_argnums=0)
def _derivatives(function, u, w):
    return function(u, w), *jax.jacobian(function, (0, 1))(u, w)


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem on flat vectors of four entries, its dense truth and a solver that converges."""

    name: str
    problem: bx.Problem
    optimality: Callable
    g: Callable
    y: np.ndarray
    solver: bx.Solver = SOLVER

    def truth(self, y):
        """Return x* and the gradient of h."""
        u = np.zeros(4)
        for _ in range(40):
            value, first, second = (np.asarray(a) for a in _derivatives(self.optimality, u, y))
            u = u - np.linalg.solve(first, value)
        assert np.linalg.norm(value) < 1e-12
        _, outer_1, outer_2 = (np.asarray(a) for a in _derivatives(self.g, u, y))
        return u, outer_2 - second.T @ np.linalg.solve(first.T, outer_1)

    def run(self, accuracy, rule=None, y=None, warm=None, solver=None, **options):
        engine = bx.value_and_hypergradient(
            self.g,
            self.problem,
            self.solver if solver is None else solver,
            rule,
            accuracy=accuracy,
            **options,
        )
        warm = bx.cold_start(np.zeros(4)) if warm is None else warm
        return engine(self.y if y is None else y, warm)

    def relative_error(self, result, y=None):
        truth = self.truth(self.y if y is None else y)[1]
        return np.linalg.norm(np.asarray(result.gradient) - truth) / np.linalg.norm(truth)


RIDGE = Case("ridge", RIDGE.problem, RIDGE.optimality, validation, PENALTY)
LOGISTIC = Case("logistic", LOGISTIC.problem, LOGISTIC.optimality, validation, PENALTY)
CONTRACTION = Case(
    "contraction",
    bx.fixed_point(image),
    lambda u, w: u - image(u, w),
    outer,
    np.asarray(W, np.float64),
    bx.FixedPointIteration(0.2),
)
CASES = [RIDGE, LOGISTIC, CONTRACTION]
EPSILONS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def assert_sound(result, allowed):
    """Check what holds of every result: CONVERGED has a certificate, and costs were counted."""
    certificate, inner = result.report.certificate, result.report.inner
    if inner.status == Status.CONVERGED:
        assert certificate.absolute <= allowed and certificate.status == Status.CONVERGED
    for count in (certificate.products, result.report.adjoint.products, inner.iterations):
        assert count.dtype == np.int32 and count.shape == () and count >= 0
    assert certificate.products > 0 and result.report.adjoint.products > 0


# What is asked for is what is got.

# Every day a rule of first and one of second order, on the regressions, which share their
# programs. The fixed point is in the next test, the other rule in the last but one.
PAIRS = params(
    itertools.product(CASES, RULES),
    lambda case, name: case is not CONTRACTION and name != "diagonal_change",
    lambda part: getattr(part, "name", part),
)


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_relative_accuracy(case, name):
    size = np.linalg.norm(case.truth(case.y)[1])
    # The inner solver runs as far for every rule.
    default, iterations = case.run(None), []
    assert default.report.inner.status == Status.CONVERGED and default.report.certificate is None
    for epsilon in EPSILONS:
        result = case.run(bx.RelativeAccuracy(epsilon), RULES[name])
        assert case.relative_error(result) <= epsilon
        assert result.report.inner.status == result.report.adjoint.status == Status.CONVERGED
        assert result.report.certificate.relative <= epsilon
        assert_sound(result, epsilon * size * (1 + epsilon))
        iterations.append(int(result.report.inner.iterations))
    assert iterations[-1] < default.report.inner.iterations
    assert iterations[0] < iterations[-1]
    np.testing.assert_array_equal(result.warm.x, result.x)
    np.testing.assert_allclose(result.value, case.g(result.x, case.y), rtol=1e-12)


LANES = 200


@functools.partial(jax.jit, static_argnums=(0, 1))
def dense_gradients(optimality, g, ys):
    """Return all gradients of h, and the largest ||F|| of the solutions."""

    def gradient(y):
        def step(_, u):
            return u - jnp.linalg.solve(jax.jacobian(optimality)(u, y), optimality(u, y))

        u = jax.lax.fori_loop(0, 50, step, jnp.zeros(4))
        first, second = jax.jacobian(optimality, (0, 1))(u, y)
        outer_1, outer_2 = jax.grad(g, (0, 1))(u, y)
        v = jnp.linalg.solve(first.T, outer_1)
        return outer_2 - second.T @ v, jnp.linalg.norm(optimality(u, y))

    return jax.vmap(gradient)(ys)


def test_many_problems_starts_and_accuracies():
    """Conditioning and curvature vary widely; CONVERGED is never said too early."""
    random = np.random.default_rng(0)
    case, spread = CONTRACTION, np.array([0.7, 0.7, 0.7, 0.0])
    ys = case.y + random.normal(size=(LANES, 4)) * spread
    starts = 3 * random.normal(size=(LANES, 4))
    epsilons = 10 ** random.uniform(-6, -0.3, size=LANES)

    def run(y, start, epsilon):
        warm, accuracy = bx.cold_start(start), bx.RelativeAccuracy(epsilon)
        return case.run(accuracy, RULES["newton"], y=y, warm=warm)

    result = jax.jit(jax.vmap(run))(ys, starts, epsilons)
    truth, residual = dense_gradients(case.optimality, case.g, ys)
    errors = np.linalg.norm(result.gradient - truth, axis=1) / np.linalg.norm(truth, axis=1)
    said = np.asarray(result.report.inner.status) == Status.CONVERGED
    judged = said & (np.asarray(residual) < 1e-11)
    assert np.mean(said) > 0.95 and np.mean(judged) > 0.9
    wrong = [(k, epsilons[k], errors[k]) for k in np.flatnonzero(judged & (errors > epsilons))]
    assert not wrong


def test_absolute_accuracy():
    for case in (RIDGE, LOGISTIC):
        truth, products = case.truth(case.y)[1], []
        for value in (1e1, 1e-2, 1e-4, 1e-6, 1e-8):
            result = case.run(bx.AbsoluteAccuracy(value))
            assert np.linalg.norm(np.asarray(result.gradient) - truth) <= value
            assert result.report.inner.status == Status.CONVERGED
            assert_sound(result, value)
            report = result.report
            products.append(int(report.adjoint.products + report.certificate.products))
        # Four unknowns take four products, whatever is left of the residual.
        assert products[0] <= products[-1] <= 2 * products[0]


def test_the_point_of_a_correction_and_its_costs():
    result = LOGISTIC.run(bx.RelativeAccuracy(1e-6), RULES["newton"])
    correction = result.report.inner.correction
    assert correction.products > 0 and correction.status == Status.CONVERGED
    # The error is of second order, so the solver need not go as far.
    before = LOGISTIC.run(bx.RelativeAccuracy(1e-6)).report.inner
    assert result.report.inner.iterations < 0.7 * before.iterations


# An accuracy is a number like others.


def assert_equal_results(got, wanted):
    np.testing.assert_allclose(got.gradient, wanted.gradient, rtol=1e-9)
    np.testing.assert_allclose(got.x, wanted.x, rtol=1e-10)
    np.testing.assert_allclose(got.value, wanted.value, rtol=1e-10)
    a, b = got.report, wanted.report
    assert a.inner.status == b.inner.status and a.inner.iterations == b.inner.iterations
    assert a.adjoint.status == b.adjoint.status and a.adjoint.products == b.adjoint.products
    assert a.certificate.status == b.certificate.status
    assert a.certificate.products == b.certificate.products
    np.testing.assert_allclose(
        a.certificate.relative, b.certificate.relative, rtol=1e-5, atol=1e-12
    )


def test_another_accuracy_compiles_nothing():
    LOGISTIC.run(bx.RelativeAccuracy(1e-3))
    with recorded_compilations() as events:
        LOGISTIC.run(bx.RelativeAccuracy(1e-5))
        RIDGE.run(bx.RelativeAccuracy(1e-1), y=PENALTY + 0.1)
    assert events == []


# Transformations.


def test_jit_and_vmap_equal_a_loop():
    """Each lane has its own problem and its own accuracy."""
    y = PENALTY + np.array([0.0, 0.0, -1.0, 1.0, np.nan, 4.0])[:, None]
    epsilons = np.array([1e-2, 1e-6, 1e-1, 1e-4, 1e-3, 1e-3])

    def run(y, epsilon):
        return LOGISTIC.run(bx.RelativeAccuracy(epsilon), y=y)

    together = jax.jit(jax.vmap(run))(y, epsilons)
    for lane in range(6):
        alone = run(y[lane], epsilons[lane])
        got = jax.tree.map(lambda leaf, lane=lane: leaf[lane], together)
        assert got.report.inner.status == alone.report.inner.status
        if lane < 4:
            assert_equal_results(got, alone)
            assert alone.report.inner.status == Status.CONVERGED
            assert LOGISTIC.relative_error(alone, y[lane]) <= epsilons[lane]
    # At the last y the rate is far above 2 / L.
    assert together.report.inner.status[4] == Status.NONFINITE
    assert together.report.inner.status[5] in (Status.DIVERGED, Status.NONFINITE)


@pytest.mark.slow  # the tests before and after it compile engines in larger programs
def test_jit_equals_eager():
    def run(y, epsilon):
        return LOGISTIC.run(bx.RelativeAccuracy(epsilon), y=y)

    assert_equal_results(jax.jit(run)(PENALTY, 1e-4), run(PENALTY, 1e-4))


def test_warm_starts_in_scan():
    accuracy = bx.RelativeAccuracy(1e-3)

    def step(carry, _):
        y, warm = carry
        result = LOGISTIC.run(accuracy, y=y, warm=warm)
        return (y - 0.3 * result.gradient, result.warm), (y, result.gradient, result.report)

    start = jnp.asarray(PENALTY), bx.cold_start(np.zeros(4))
    _, (ys, gradients, reports) = jax.jit(lambda s: jax.lax.scan(step, s, length=8))(start)
    assert np.all(reports.inner.status == Status.CONVERGED)
    cold = 0
    for y, gradient in zip(ys, gradients, strict=True):
        truth = LOGISTIC.truth(np.asarray(y))[1]
        assert np.linalg.norm(gradient - truth) <= 1e-3 * np.linalg.norm(truth)
        cold += int(LOGISTIC.run(accuracy, y=y).report.inner.iterations)
    assert np.sum(reports.inner.iterations) < 0.7 * cold
    assert np.all(reports.inner.iterations[1:] < reports.inner.iterations[0])


def test_a_second_call_at_the_same_y_costs_next_to_nothing():
    first = LOGISTIC.run(bx.RelativeAccuracy(1e-4))
    again = LOGISTIC.run(bx.RelativeAccuracy(1e-4), warm=first.warm)
    assert again.report.inner.iterations == 0
    assert again.report.inner.status == Status.CONVERGED
    assert LOGISTIC.relative_error(again) <= 1e-4


# What cannot be met.


def test_few_iterations_are_enough_where_corrections_converge():
    size = np.linalg.norm(LOGISTIC.truth(LOGISTIC.y)[1])
    for maxiter in (0, 1, 5, 20):
        solver = bx.GradientDescent(0.2, maxiter=maxiter)
        result = LOGISTIC.run(bx.RelativeAccuracy(1e-5), solver=solver)
        assert result.report.inner.iterations <= maxiter
        assert result.report.inner.status == Status.CONVERGED
        assert LOGISTIC.relative_error(result) <= 1e-5
        assert_sound(result, 1e-5 * size * (1 + 1e-5))


def test_too_few_iterations():
    """Far to the right Newton's method is slow, and each of its steps changes Omega by more."""
    few = bx.GradientDescent(1e-9, maxiter=5)
    result = scalar(misleading_outer, bx.RelativeAccuracy(1e-3), 20.0, 1.0, exponential, few)
    assert result.report.inner.status == Status.MAXITER
    assert result.report.inner.iterations == 5
    assert result.report.certificate.status == Status.STALLED


@pytest.mark.parametrize("epsilon", [1e-11, 1e-12, 1e-13, 1e-14, 1e-15, 1e-18])
@pytest.mark.parametrize("case", [RIDGE, LOGISTIC], ids=lambda case: case.name)
def test_what_this_precision_does_not_allow(case, epsilon):
    size = np.linalg.norm(case.truth(case.y)[1])
    result = case.run(bx.RelativeAccuracy(epsilon))
    assert result.report.inner.status in (Status.CONVERGED, Status.STALLED, Status.MAXITER)
    if result.report.inner.status == Status.CONVERGED:
        # The dense truth itself is accurate to some 1e-15.
        assert case.relative_error(result) <= epsilon + 2e-15
    elif epsilon > np.finfo(float).eps ** 0.75:  # what linear solves can vouch for
        assert result.report.certificate.absolute > 0.3 * epsilon * size
    if epsilon == 1e-18:
        assert result.report.inner.status != Status.CONVERGED
    assert case.relative_error(result) <= 1e-11


def test_an_atol_bounds_the_steps_of_the_solver_and_not_the_accuracy():
    iterations = []
    for atol in (1e-1, 1e-9):
        solver = bx.GradientDescent(0.2, atol=atol)
        result = LOGISTIC.run(bx.RelativeAccuracy(1e-4), solver=solver)
        assert result.report.inner.status == Status.CONVERGED
        assert LOGISTIC.relative_error(result) <= 1e-4
        iterations.append(int(result.report.inner.iterations))
    assert iterations[0] < iterations[1]


def test_a_rate_that_is_too_large():
    for rate in (3.0, 1e10):
        for case in (RIDGE, LOGISTIC):
            result = case.run(bx.RelativeAccuracy(1e-3), solver=bx.GradientDescent(rate))
            assert result.report.inner.status in (Status.DIVERGED, Status.NONFINITE)
            np.testing.assert_array_equal(result.warm.x, np.zeros(4))


def test_what_is_not_finite():
    result = LOGISTIC.run(bx.RelativeAccuracy(1e-3), y=PENALTY * np.nan)
    assert result.report.inner.status == Status.NONFINITE
    result = LOGISTIC.run(bx.RelativeAccuracy(1e-3), warm=bx.cold_start(np.full(4, np.nan)))
    assert result.report.inner.status == Status.NONFINITE


def test_an_accuracy_that_is_no_number_is_never_reached():
    for value in (jnp.asarray(jnp.nan), jnp.asarray(-1.0), jnp.asarray(0.0)):
        result = RIDGE.run(bx.RelativeAccuracy(value))
        assert result.report.inner.status != Status.CONVERGED


# Rules with solvers of their own, and wrong ones. Numbers alone change: they are compiled once.


def own_solver(rtol, damping):
    return bx.Implicit(bx.CG(rtol=rtol, damping=damping))


def test_a_rule_whose_own_tolerance_is_loose():
    for case in (RIDGE, LOGISTIC):
        for epsilon in (1e-1, 1e-3, 1e-6):
            result = case.run(bx.RelativeAccuracy(epsilon), own_solver(0.3, 0.0))
            if result.report.inner.status == Status.CONVERGED:
                assert case.relative_error(result) <= epsilon
            assert_sound(result, epsilon * np.linalg.norm(case.truth(case.y)[1]) * (1 + epsilon))


def test_a_rule_that_cannot_be_accurate():
    """Damping is an error that no inner iteration and no tolerance reduces; corrections do."""
    rule = bx.Implicit(bx.CG(damping=0.1))
    assert RIDGE.relative_error(RIDGE.run(None, rule)) > 1e-2
    result = RIDGE.run(bx.RelativeAccuracy(1e-3), rule)
    assert result.report.inner.status == Status.CONVERGED
    assert RIDGE.relative_error(result) <= 1e-3


def test_forward_mode():
    result = LOGISTIC.run(bx.RelativeAccuracy(1e-4), bx.Implicit(mode="forward"))
    reverse = LOGISTIC.run(bx.RelativeAccuracy(1e-4))
    np.testing.assert_allclose(result.gradient, reverse.gradient, rtol=1e-12)
    assert LOGISTIC.relative_error(result) <= 1e-4
    assert result.report.inner.status == Status.CONVERGED


# An adjoint whose residual is small and whose error is not.

CURVATURE = 1e-6


def ill_conditioned(x, y):
    first = (x[0] - 1 - 1e-6 * y[0]) ** 2 / 2
    return first + CURVATURE * (x[1] - jnp.exp(y[1])) ** 2 / 2


def small_outer(x, y):
    return x[0] + 1e-5 * x[1]


@pytest.mark.parametrize("offset", [0.0, 1e-6])
def test_an_ill_conditioned_adjoint_system(offset):
    """The gradient of h is (1e-6, 1e-5); v = (1, 10) of g_1 = (1, 1e-5) makes the larger entry.

    A residual of 1e-4 hides that entry: a tolerance of the rule's own holds in the certificate too.
    """
    x = np.array([1.0, 1.0 + offset])
    engine = bx.value_and_hypergradient(
        small_outer,
        bx.minimum(ill_conditioned),
        bx.Newton(bx.Dense()),
        bx.Implicit(bx.CG(rtol=1e-9)),
        accuracy=bx.RelativeAccuracy(1e-2),
    )
    result = engine(np.zeros(2), bx.cold_start(x))
    np.testing.assert_allclose(result.gradient, [1e-6, 1e-5], rtol=1e-2)
    assert result.report.inner.status == Status.CONVERGED


# Scalar problems by hand.


def quadratic(x, y):  # x* = 1 / y
    return y * x**2 / 2 - x


def bowl(x, y):  # x* = y, and x F_1 = 0 at x = 0
    return jnp.cosh(x - y)


def exponential(x, y):  # x* = log y
    return jnp.exp(x) - y * x


def square(x, y):
    return x**2


def square_of_y(x, y):
    return y**2


def constant(x, y):
    return 1.0 + 0 * x


def exponential_outer(x, y):  # with x* = log y, h = y and Omega = 1
    return jnp.exp(x)


def misleading_outer(x, y):  # with x* = log y, Omega = 1 + exp(-x)
    return jnp.exp(x) + x


OBJECTIVES = [quadratic, bowl, exponential]
OUTER = [square, square_of_y, constant, exponential_outer, misleading_outer]


def scalar_objective(which, x, y):
    return jax.lax.switch(which, OBJECTIVES, x, y)


def scalar_outer(which, x, y):
    return jax.lax.switch(which, OUTER, x, y)


def scalar(g, accuracy, x0, y, objective=quadratic, solver=bx.GradientDescent(0.1), **options):
    """Run a scalar problem; all are compiled once per class of solver and of accuracy."""
    if g in OUTER:
        g = Partial(scalar_outer, np.array(OUTER.index(g)))
    problem = bx.minimum(Partial(scalar_objective, np.array(OBJECTIVES.index(objective))))
    engine = bx.value_and_hypergradient(g, problem, solver, accuracy=accuracy, **options)
    return engine(y, bx.cold_start(x0))


def test_policies():
    accuracy, options = bx.RelativeAccuracy(1e-3), {"on_failure": bx.OnFailure.NAN}
    few = bx.GradientDescent(1e-9, maxiter=5)  # no failure: what there is, is returned
    result = scalar(misleading_outer, accuracy, 20.0, 1.0, exponential, few, **options)
    assert result.report.inner.status == Status.MAXITER
    assert np.isfinite(result.gradient)
    result = scalar(square, accuracy, 0.0, 2.0, solver=bx.GradientDescent(3.0), **options)
    assert result.report.inner.status in (Status.DIVERGED, Status.NONFINITE)
    assert np.isnan(result.value) and np.isnan(result.gradient) and np.isnan(result.x)
    good = scalar(square, accuracy, 0.0, 2.0, **options)
    assert abs(good.gradient + 0.25) <= 1e-3 * 0.25


def test_raising():
    def run(rate):
        solver, options = bx.GradientDescent(rate), {"on_failure": bx.OnFailure.RAISE}
        return scalar(
            square, bx.RelativeAccuracy(1e-3), 0.0, 2.0, solver=solver, **options
        ).gradient

    assert np.isfinite(run(0.1))
    with pytest.raises((RuntimeError, ValueError), match=r"DIVERGED|NONFINITE"):
        jax.block_until_ready(run(3.0))


BOTH = [bx.RelativeAccuracy(1e-2), bx.AbsoluteAccuracy(1e-3)]
ACCURACIES = pytest.mark.parametrize("accuracy", BOTH, ids=["relative", "absolute"])


@ACCURACIES
def test_starts_at_zero_and_at_the_solution(accuracy):
    for x0, few in ((0.0, 200), (0.5, 0), (0.5 * (1 + 1e-15), 0)):  # dh/dy = -2 / y^3
        result = scalar(square, accuracy, x0, 2.0)
        assert abs(result.gradient + 0.25) <= 1e-2 * 0.25
        assert result.report.inner.status == Status.CONVERGED
        assert result.report.inner.iterations <= few
    result = scalar(square, accuracy, 0.0, 0.5, bowl)  # x0 is where even F_1 x0 is zero
    assert abs(result.gradient - 1.0) <= 1e-2
    assert result.report.inner.status == Status.CONVERGED


@ACCURACIES
@pytest.mark.parametrize("x0", [0.0, 0.2, 0.5])
def test_an_outer_objective_that_ignores_x(accuracy, x0):
    """Then Omega is g_2, which is exact at any x."""
    result = scalar(square_of_y, accuracy, x0, 2.0)
    assert result.gradient == 4.0
    assert result.report.inner.status == Status.CONVERGED
    assert result.report.certificate.absolute <= 1e-14  # rounding of g_2


@ACCURACIES
def test_a_stationary_point_of_h(accuracy):
    # x* = y, g = x^2, dh/dy = 2 y = 0, and Omega = 2 x: never relatively accurate but at x = 0.
    for x0 in (1.0, 1e-8):
        result = scalar(square, accuracy, x0, 0.0, bowl)
        error = abs(float(result.gradient))
        status = result.report.inner.status
        if isinstance(accuracy, bx.AbsoluteAccuracy):
            assert status == Status.CONVERGED and error <= 1e-3
        elif status == Status.CONVERGED:
            assert error == 0
        else:
            assert status in (Status.STALLED, Status.MAXITER)
            assert not result.report.certificate.relative <= 1e-2
    # Nothing depends on y: zero is the gradient, and is as accurate as can be.
    result = scalar(constant, accuracy, 0.2, 2.0)
    assert result.gradient == 0
    assert result.report.inner.status in (Status.CONVERGED, Status.STALLED)


SLOW = bx.GradientDescent(1e-9, maxiter=3000)


NEWTON = bx.Newton()


@pytest.mark.parametrize(
    ("solver", "accuracy"),
    [
        pytest.param(SLOW, BOTH[0], id="gradient_descent-relative"),
        pytest.param(SLOW, BOTH[1], id="gradient_descent-absolute"),
        pytest.param(NEWTON, BOTH[0], id="newton-relative"),
        # The next test has Newton's method and an absolute accuracy.
        slow(NEWTON, BOTH[1], id="newton-absolute"),
    ],
)
def test_a_start_where_newton_steps_are_misleading(solver, accuracy):
    """Far to the right Omega = 1 + exp(-x) hardly changes from step to step; at x* it is 2."""
    result = scalar(misleading_outer, accuracy, 20.0, 1.0, exponential, solver)
    error = abs(float(result.gradient) - 2)
    if result.report.inner.status == Status.CONVERGED:
        assert error <= (1e-3 if isinstance(accuracy, bx.AbsoluteAccuracy) else 2e-2)
    if solver is not SLOW:
        assert result.report.inner.status == Status.CONVERGED


def test_a_poisson_regression_from_a_distant_start():
    random = np.random.default_rng(0)
    features = random.normal(size=(30, 4))
    counts = random.poisson(np.exp(features @ np.array([1.0, -0.5, 0.3, 0.2])))

    def likelihood(u, w):
        return jnp.mean(jnp.exp(features @ u) - counts * (features @ u)) + 1e-3 * jnp.exp(
            w[0]
        ) * jnp.sum(u**2)

    def distance(u, w):
        return jnp.sum((u - 1) ** 2)

    case = Case(
        "poisson",
        bx.minimum(likelihood),
        jax.grad(likelihood),
        distance,
        np.zeros(1),
        bx.Newton(),
    )
    truth = case.truth(case.y)[1]
    for start in (0.0, 3.0, 6.0, 9.0):
        warm = bx.cold_start(np.full(4, start))
        result = case.run(bx.AbsoluteAccuracy(1e-6), warm=warm)
        assert result.report.inner.status == Status.CONVERGED
        assert abs(result.gradient[0] - truth[0]) <= 1e-6


def oscillation(x, y):  # 100 at a cold start from 50
    return jnp.sin(x) - y + 100 * jnp.exp(-((x - 50) ** 2))


def logarithm(x, y):  # x* = e^y
    return jnp.log(x) - y


def scalar_residual(is_logarithm, x, y):
    return jax.lax.cond(is_logarithm, logarithm, oscillation, x, y)


def square_and_more(x, y):
    return x**2 + x


def from_a_warm_start(residual, x, cold, maxiter):
    """Run from x, where the cold start was another point; both residuals are compiled once."""
    engine = bx.value_and_hypergradient(
        square_and_more,
        bx.root(Partial(scalar_residual, np.array(residual is logarithm))),
        bx.GradientDescent(0.5, maxiter=maxiter),
        accuracy=bx.RelativeAccuracy(1e-3),
    )
    return engine(0.0, bx.WarmStart(jnp.asarray(x), jnp.asarray(0.0), jnp.asarray(cold)))


def test_an_early_reference_at_another_root():
    """From 1.5 Newton's method leaps to -4 pi, where the gradient is another one."""
    for x in (1.5, 1.2, 0.5):
        result = from_a_warm_start(oscillation, x, 50.0, maxiter=500)
        assert abs(result.gradient - 1) <= 1e-3
        assert result.report.inner.status == Status.CONVERGED
        assert result.report.inner.iterations < 100


def test_a_cold_start_that_is_not_finite_is_no_scale():
    for start in (-1.0, 0.0):
        result = from_a_warm_start(logarithm, 0.8, start, maxiter=10_000)
        assert result.report.inner.status == Status.CONVERGED
        assert result.report.inner.iterations < 100
        assert abs(result.gradient - 3.0) <= 3e-3


def test_other_solvers():
    for solver in (bx.Newton(), bx.GradientDescent(bx.Backtracking())):
        for epsilon in (1e-2, 1e-8):
            accuracy = bx.RelativeAccuracy(epsilon)
            result = scalar(exponential_outer, accuracy, 0.0, 2.0, exponential, solver)
            assert abs(result.gradient - 1) <= epsilon
            assert result.report.inner.status == Status.CONVERGED


def test_auxiliary_output():
    def with_aux(x, y):
        return x**2, {"x": x, "count": jnp.int32(3)}

    result = scalar(with_aux, bx.RelativeAccuracy(1e-3), 0.0, 2.0, has_aux=True)
    assert abs(result.gradient + 0.25) <= 1e-3 * 0.25
    np.testing.assert_array_equal(result.aux["x"], result.x)
    assert result.aux["count"] == 3 and result.report.inner.status == Status.CONVERGED


def scaled_validation(unit, u, w):
    return unit * validation(u, w)


def run_float32(epsilon, unit=1.0):
    """Run the logistic regression with an outer objective in some unit; all compile once."""
    engine = bx.value_and_hypergradient(
        Partial(scaled_validation, np.float32(unit)),
        LOGISTIC.problem,
        SOLVER,
        accuracy=bx.RelativeAccuracy(np.float32(epsilon)),
    )
    return engine(PENALTY.astype(np.float32), bx.cold_start(np.zeros(4, np.float32)))


def test_float32():
    for epsilon in (1e-1, 1e-3, 1e-4, 1e-7, 1e-9):
        result = run_float32(epsilon)
        for leaf in jax.tree.leaves(result):
            assert leaf.dtype in (np.float32, np.int32)
        status, true = result.report.inner.status, LOGISTIC.relative_error(result)
        if epsilon >= 1e-3:
            assert status == Status.CONVERGED
        if status == Status.CONVERGED:
            assert true <= epsilon + 1e-7 and result.report.certificate.relative <= epsilon
        else:
            assert status in (Status.STALLED, Status.MAXITER)
        assert true <= max(epsilon, 1e-4)
    assert status != Status.CONVERGED


def test_units_change_nothing_in_float32():
    """Norms of gradients of 1e20 or 1e-20 must neither overflow nor vanish."""
    for unit in (1e-20, 1.0, 1e20):
        result = run_float32(1e-3, unit)
        scaled = result._replace(gradient=np.asarray(result.gradient, np.float64) / unit)
        assert LOGISTIC.relative_error(scaled) <= 1e-3
        assert result.report.inner.status == Status.CONVERGED


# Wrong arguments.


@pytest.mark.parametrize(
    ("error", "make", "message"),
    [
        (
            TypeError,
            lambda: RIDGE.run(1e-2),
            "`accuracy` must be an Accuracy, for example `RelativeAccuracy(1e-2)`; got 0.01.",
        ),
        (TypeError, lambda: RIDGE.run(bx.RelativeAccuracy), "Did you forget the parentheses?"),
        (ValueError, lambda: bx.RelativeAccuracy(-0.1), "`value` must be positive, got -0.1."),
        (ValueError, lambda: bx.RelativeAccuracy(0), "`value` must be positive, got 0."),
        (ValueError, lambda: bx.AbsoluteAccuracy(0.0), "`value` must be positive, got 0.0."),
        (ValueError, lambda: bx.AbsoluteAccuracy(np.nan), "`value` must be positive, got nan."),
        (TypeError, lambda: bx.AbsoluteAccuracy(None), "`value` must be a number, got None."),
        (TypeError, lambda: bx.RelativeAccuracy("1e-2"), "`value` must be a number, got '1e-2'."),
        (
            TypeError,
            lambda: RIDGE.run(bx.RelativeAccuracy(np.array([1e-2, 1e-3]))),
            "`value` of `RelativeAccuracy` must be a single number, got float64[2].",
        ),
        (
            TypeError,
            lambda: RIDGE.run(bx.RelativeAccuracy(1e-2), has_aux=True),
            "`outer` must return a pair (value, aux) with `has_aux=True`, got float64[].",
        ),
    ],
)
def test_wrong_arguments(error, make, message):
    assert_fails(error, message, make)


# Ill-conditioned, with the solution 1 + y / sqrt(CURVATURES), so that dh/dy = SLOPE / sqrt(...).
CURVATURES = np.logspace(0, -6, 20)
SLOPE = CURVATURES**0.6 * np.random.default_rng(1).normal(size=20)


def many_scales(x, y):
    return jnp.sum(CURVATURES * x**2) / 2 - jnp.sum((CURVATURES + y * np.sqrt(CURVATURES)) * x)


def weighted_sum(x, y):
    return jnp.sum(SLOPE * x)


@pytest.mark.parametrize("epsilon", [1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize(
    "rule",
    [
        slow(bx.Implicit(), id="implicit"),
        pytest.param(bx.Reparameterized(bx.Implicit(), bx.DiagonalChange()), id="diagonal"),
    ],
)
def test_the_certificate_is_that_of_the_gradient_returned(rule, epsilon):
    """x is exact, so that the adjoint alone is to blame."""
    engine = bx.value_and_hypergradient(
        weighted_sum,
        bx.minimum(many_scales),
        bx.Newton(),
        rule,
        accuracy=bx.RelativeAccuracy(epsilon),
    )
    result = engine(np.zeros(20), bx.cold_start(np.zeros(20)))
    wanted = SLOPE / np.sqrt(CURVATURES)
    true = np.linalg.norm(result.gradient - wanted) / np.linalg.norm(wanted)
    assert result.report.inner.status == Status.CONVERGED
    assert true <= epsilon
    # Far below the accuracy asked for, both may be anything.
    assert result.report.certificate.relative >= 0.8 * true or true < 1e-3 * epsilon


def test_a_diverged_solve_is_not_certified():
    engine = bx.value_and_hypergradient(
        lambda x, y: jnp.sum((x - 1) ** 2),
        bx.minimum(lambda x, y: jnp.sum((x - y) ** 2) / 2 + jnp.sum(x**4) / 4),
        bx.GradientDescent(10.0),
        accuracy=bx.RelativeAccuracy(1e-2),
    )
    report = engine(np.ones(3), bx.cold_start(np.zeros(3))).report
    assert report.inner.status in (Status.DIVERGED, Status.NONFINITE)
    assert report.certificate.status != Status.CONVERGED
