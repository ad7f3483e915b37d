"""The study of rates: its truth is right, and so are its fits."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import rates
import rates_contractions
import rates_equilibrium
import rates_fits
import rates_problems
import rates_stochastic

pytestmark = pytest.mark.slow  # it compiles as many programs as a study does


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def differences(h, y, step=1e-5):
    """Return central differences of h at a flat y."""
    moves = step * np.eye(len(y))
    return np.array([(h(y + move) - h(y - move)) / (2 * step) for move in moves])


@pytest.mark.parametrize("name", rates_problems.SETTINGS)
def test_truth_of_contractions(name):
    setting = rates_problems.SETTINGS[name]
    case = setting.case(seed=0)
    truth = setting.truth(case)
    y, unravel = ravel_pytree(jnp.asarray(case.y))
    solve = jax.jit(lambda y: setting.problem(case)[0].image(jnp.asarray(truth.x), unravel(y)))
    assert np.allclose(solve(y), truth.x, rtol=0, atol=1e-13)

    def h(y):
        at = case._replace(y=np.asarray(y).reshape(np.shape(case.y)))
        x = setting.truth(at).x
        return float(setting.outer(at.data, x, at.y))

    # The first entries will do where there are many.
    some = differences(lambda part: h(np.append(part, y[6:])), np.asarray(y[:6]))
    assert np.allclose(some, truth.gradient[:6], rtol=1e-6, atol=1e-8)
    problem, _ = setting.problem(case)
    jacobian = jax.jacobian(problem.image)(jnp.asarray(truth.x), jnp.asarray(case.y))
    radius = np.abs(np.linalg.eigvals(jacobian)).max()
    assert radius == pytest.approx(truth.contraction, rel=1e-12)


def test_truth_of_the_equilibrium_model():
    case = rates_equilibrium.draw(0.7, seed=1, units=5)
    truth = rates_equilibrium.truth(case)
    flat, unravel = ravel_pytree(case.y)
    _, outer = rates_equilibrium.problem(case)

    def h(y):
        at = case._replace(y=jax.tree.map(np.asarray, unravel(jnp.asarray(y))))
        return float(outer(jnp.asarray(rates_equilibrium.equilibria(at)), at.y))

    expected = differences(h, np.asarray(flat))
    assert np.allclose(truth.gradient, expected, rtol=1e-6, atol=1e-9)
    assert truth.contraction <= truth.norm <= 0.7


def test_truth_of_the_digits():
    problem = rates_stochastic.digits()
    truth = rates_stochastic.truth(problem)
    weights, penalties = problem.y

    def value(y):
        moved = problem._replace(y=(y[:2], np.append(y[2:], penalties[3:])))
        return float(rates_stochastic.outer(solution(moved), moved.y, problem.validation))

    def solution(moved):
        return rates_stochastic.truth(moved).x

    expected = differences(value, np.append(weights, penalties[:3]), step=1e-4)
    assert np.allclose(truth.gradient[:5], expected, rtol=1e-5, atol=1e-10)
    slope = jax.grad(rates_stochastic.inner)(jnp.asarray(truth.x), problem.y, problem.train)
    assert np.abs(slope).max() <= 1e-13


def test_fits_find_the_rates_of_exact_data():
    t = np.array([1, 10, 120, 140, 160, 180, 200, 220, 320])
    decay = 0.9**t
    rounding = 1e-14
    assert rates_fits.fit_factor(t, 3 * decay + rounding) == pytest.approx(0.9, rel=1e-3)
    both = (3 + 0.5 * t) * decay + rounding
    assert rates_fits.fit_factor(t, both, with_t=True) == pytest.approx(0.9, rel=1e-3)
    assert rates_fits.fit_factor(t, both) > 0.904  # without t in the fit
    # Where there is no factor t, none is found.
    assert rates_fits.fit_factor(t, decay, with_t=True) == pytest.approx(0.9, rel=1e-4)
    assert np.isnan(rates_fits.fit_factor(t[:4], decay[:4]))
    assert rates_fits.speed_ratio(np.array([0.81]), np.array([0.9])) == pytest.approx(2.0)
    steps = np.array([1.0, 10.0, 100.0, 1000.0])
    assert rates_fits.fit_slope(steps, 7 / steps, first=10) == pytest.approx(-1.0)


def small_errors(name, method, steps):
    setting = rates_problems.SETTINGS[name]
    cases = [setting.case(seed) for seed in range(2)]
    exact = [setting.truth(case).gradient for case in cases]
    return rates.relative_errors(setting.problem, rates.METHODS[method], cases, exact, steps)


def test_errors_of_iterative_differentiation_are_above_those_of_the_fixed_point():
    steps = [1, 5, 20, 80]
    itd, fixed_point = (small_errors("logistic", name, steps) for name in ("ITD", "AID-FP"))
    assert np.all(itd > fixed_point)
    assert rates.order_of(itd, fixed_point, "above") == (1.0, True)
    assert rates.order_of(fixed_point, itd, "above") == (0.0, False)
    assert np.all(fixed_point[:, -1] < 1e-3)


def test_both_are_the_same_where_the_contraction_is_affine():
    itd, fixed_point = (small_errors("biased", name, [3, 30]) for name in ("ITD", "AID-FP"))
    assert rates.order_of(itd, fixed_point, "equal")[1]


def test_conjugate_gradients_keep_their_bound():
    setting = rates_problems.SETTINGS["kernel"]
    case = setting.case(seed=0)
    truth = setting.truth(case)
    steps = [1, 4, 16, 64]
    errors = small_errors("kernel", "AID-CG", steps)[0]
    bound = setting.conjugate_gradient_bound(case, truth, steps) / np.linalg.norm(truth.gradient)
    assert rates.below(errors, bound)
    assert not rates.below(errors, bound / 2)  # it is sharp
    at = setting.derivatives(case.data, case.y, truth.x)
    alone = rates_contractions.adjoint_bound(at, np.array(steps))
    assert np.all(np.diff(alone) < 0)


def test_more_samples_make_stochastic_hypergradients_better():
    estimator = rates_stochastic.Estimator(rates_stochastic.digits(), keys=20)
    study = rates_stochastic.STUDIES["J"]
    few, many = (
        estimator.errors(study.run(n, "decreasing")._replace(k=300)).mean() for n in (10, 160)
    )
    assert 8 < few / many < 32
