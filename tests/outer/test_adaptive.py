"""The adaptive schedule, on a problem that is not quadratic: f + sum(x^4) / 4."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from tests.outer.example import X0, A, B, C, E, Y, inner, make_engine, outer, scanned

DEFAULT = np.finfo(float).eps ** 0.75


def quartic(x, y):
    return inner(x, y) + jnp.sum(x**4) / 4


def hypergradient(y):
    """Return the gradient of h, by Newton's method in NumPy."""
    x = np.zeros(3)
    for _ in range(60):
        matrix = A.T @ A + np.diag(np.exp(y) + 3 * x**2)
        x = x - np.linalg.solve(matrix, A.T @ (A @ x - B) + np.exp(y) * x + x**3)
    matrix = A.T @ A + np.diag(np.exp(y) + 3 * x**2)
    return y / 10 - np.exp(y) * x * np.linalg.solve(matrix, C.T @ (C @ x - E))


FIRST_ORDER = bx.Implicit(bx.CG())
SECOND_ORDER = bx.Preconditioned(bx.Implicit(bx.CG()), bx.NewtonStep(bx.CG()))
SLOW = bx.GradientDescent(0.05)


def _keeping(optimizer):
    """Return an optimiser whose state has the gradient itself."""
    keep = optax.GradientTransformation(
        lambda params: params, lambda updates, state, params=None: (updates, updates)
    )
    return optax.chain(keep, optimizer)


DESCENDING, ADAPTING = _keeping(optax.sgd(0.1)), _keeping(optax.adam(0.02))


def adaptive_run(schedule, rule=FIRST_ORDER, x0=X0, optimizer=DESCENDING, steps=80):
    """Return the history, and of all gradients the errors and norms."""
    engine = make_engine(SLOW, rule, bx.minimum(quartic), outer)
    step = bx.make_step(engine, optimizer, schedule=schedule)
    start = step.init(Y, x0, history=steps)
    states = scanned(step, start, steps)
    gradients = np.asarray(states.optimizer[0])
    points = np.concatenate([start.y[None], states.y[:-1]])
    errors = gradients - np.array([hypergradient(y) for y in points])
    errors, sizes = np.linalg.norm(errors, axis=1), np.linalg.norm(gradients, axis=1)
    # A gradient that was not accepted has moved nothing, and the optimiser does not know it.
    held = np.all(points == np.asarray(states.y), axis=1)
    errors, sizes = (
        np.where(held, 0, errors),
        np.where(held, states.history.gradient_norm[-1], sizes),
    )
    return jax.tree.map(lambda leaf: np.asarray(leaf[-1]), states.history), errors, sizes


@pytest.mark.parametrize("rule", [FIRST_ORDER, SECOND_ORDER], ids=["first", "second"])
def test_an_adaptive_error_stays_a_fraction_of_the_gradient(rule):
    history, errors, sizes = adaptive_run(bx.Adaptive(0.1, every=10, first=0.05), rule)
    certified = np.isfinite(history.certificate)
    # Counted from a certificate that finds the error small, the next comes after 2, 4, 8, 10 steps.
    steps = np.flatnonzero(certified)
    # The square of the contraction, at most 0.4^2, counts as error.
    small = 1.16 * history.certificate[steps] <= 0.1 * sizes[steps]
    gaps = np.diff(steps)
    assert np.all(gaps[small[:-1]] >= 2) and np.all(gaps <= 10) and steps[0] == 0
    assert np.all(gaps[-3:] == 10)
    assert np.mean(errors <= 0.1 * sizes) >= 0.95
    assert np.all((errors <= 0.1 * sizes)[certified][1:])
    seen = certified & (errors > 1e-8)  # the rest is rounding
    assert np.sum(seen) >= 2
    ratio = history.certificate[seen] / errors[seen]
    assert np.all((ratio > 0.5) & (ratio < 2))
    assert np.all(history.products[certified] > history.adjoint_iterations[certified])
    assert np.all(history.status == bx.Status.CONVERGED)
    # Between certificates the tolerance follows the gradient down.
    assert sizes[-1] < 0.2 * sizes[0] and steps[-1] <= 76
    np.testing.assert_allclose(
        history.rtol[-1] / history.rtol[-3], (sizes[-2] / sizes[-4]) ** (1 / rule.order), rtol=1e-12
    )


def fabricated(**numbers):
    """Return what a history and a certificate say of a step."""
    number = jnp.asarray
    entry = bx.BilevelHistory(*(number(np.nan) for _ in bx.BilevelHistory._fields))
    entry = entry._replace(stationarity=number(3.0), rtol=number(0.1))
    certificate = bx.Certificate(*(number(np.nan) for _ in bx.Certificate._fields))
    certificate = certificate._replace(
        contraction=number(0.25), status=number(int(bx.Status.CONVERGED))
    )
    of_certificate = {k: value for k, value in numbers.items() if k in certificate._fields}
    of_entry = {k: value for k, value in numbers.items() if k not in of_certificate}
    return (
        entry._replace(**{name: number(value) for name, value in of_entry.items()}),
        certificate._replace(**{name: number(value) for name, value in of_certificate.items()}),
    )


@pytest.mark.parametrize("order", [1, 2])
def test_an_adaptive_schedule_gives_both_parts_of_the_error_their_share(order):
    schedule = bx.Adaptive(0.4, every=10, first=0.1)
    inner, adjoint, contraction, number = 0.2, 0.2, 0.25, jnp.asarray
    entry, certificate = fabricated(
        inner_residual=0.02 * 5, adjoint_residual=0.07, inner=inner, adjoint=adjoint, absolute=0.22
    )
    first = schedule.init(float)
    state = schedule.update(first, number(0), entry, certificate, number(5.0), order)
    # Half of the error allowed is aimed at, and each part gets half of that.
    share = 0.5 * 0.5 * 0.4 * 3.0 / (1 + contraction**2)
    rtol, adjoint_rtol = 0.02 * (share / inner) ** (1 / order), 0.07 * share / adjoint
    effort = schedule.effort(state, number(1), X0)
    np.testing.assert_allclose([effort.rtol, effort.adjoint_rtol], [rtol, adjoint_rtol], rtol=1e-12)
    assert not effort.certified and schedule.effort(state, number(2), X0).certified

    # A step later the gradient is smaller, and so is what is allowed.
    entry = entry._replace(stationarity=number(0.75))
    state = schedule.update(state, number(1), entry, certificate, number(5.0), order)
    effort = schedule.effort(state, number(2), X0)
    wanted = [rtol / 4 ** (1 / order), adjoint_rtol / 4]
    np.testing.assert_allclose([effort.rtol, effort.adjoint_rtol], wanted, rtol=1e-12)

    # What a certificate does not tell makes both tighter.
    unknown = certificate._replace(status=number(int(bx.Status.STALLED)))
    state = schedule.update(state, number(2), entry, unknown, number(5.0), order)
    effort = schedule.effort(state, number(3), X0)
    wanted = [wanted[0] / 10, wanted[1] / 10]
    np.testing.assert_allclose([effort.rtol, effort.adjoint_rtol], wanted, rtol=1e-12)
    assert effort.certified


@pytest.mark.parametrize(("excess", "factor"), [(1.2, 1.2), (50, 1.5), (3e3, 3e3**0.5), (1e9, 1e2)])
def test_an_adaptive_tolerance_is_loosened_slowly_unless_it_is_far_too_tight(excess, factor):
    """No certificate counts for more than 1e4."""
    schedule = bx.Adaptive(0.4, first=1e-6)
    share = 0.5 * 0.5 * 0.4 * 3.0 / (1 + 0.25**2)
    entry, certificate = fabricated(
        inner_residual=1e-6 * 5,
        adjoint_residual=1e-6,
        inner=share / excess,
        adjoint=share / excess,
        absolute=share / excess,
    )
    state = schedule.init(float)
    state = schedule.update(state, jnp.asarray(0), entry, certificate, jnp.asarray(5.0), 1)
    effort = schedule.effort(state, jnp.asarray(1), X0)
    np.testing.assert_allclose([effort.rtol, effort.adjoint_rtol], 1e-6 * factor, rtol=1e-12)


def test_y_waits_for_a_tolerance_that_can_be_tightened():
    schedule = bx.Adaptive(0.1, every=4, first=0.1)
    state, stalled = schedule.init(float), int(bx.Status.STALLED)

    def moves(step=0, **numbers):
        numbers = {"adjoint_residual": 0.09, "adjoint": 0.0, "absolute": 1.0} | numbers
        return bool(schedule.accepts(state, jnp.asarray(step), *fabricated(**numbers)))

    assert moves(inner=0.1, absolute=0.1) and not moves(inner=1.0)
    assert not moves(inner=0.1, absolute=0.1, status=stalled) and not moves(inner=np.nan)
    assert moves(inner=1.0, rtol=1e-8)  # as tight as it gets
    assert not moves(inner=0.1, adjoint=1.0)
    assert moves(inner=0.1, adjoint=1.0, adjoint_residual=0.3)  # which does not follow
    assert moves(inner=1.0, stationarity=0.0)
    later = schedule.update(
        state, jnp.asarray(0), *fabricated(inner=0.1, absolute=0.1), jnp.asarray(5.0), 1
    )
    assert schedule.accepts(later, jnp.asarray(1), *fabricated(absolute=np.nan))  # is not judged


@pytest.mark.parametrize(
    "linear_solver",
    [bx.CG(rtol=0.3), bx.CG(damping=0.3), bx.Neumann(3)],
    ids=["tolerance", "damping", "terms"],
)
def test_an_adjoint_with_limits_of_its_own_does_not_hold_y_for_ever(linear_solver):
    engine = make_engine(bx.Newton(), bx.Implicit(linear_solver))
    step = bx.make_step(engine, optax.sgd(0.3), schedule=bx.Adaptive(0.1))
    states = scanned(step, step.init(Y, X0, history=40), 40)
    points = np.asarray(states.y)
    assert np.all(np.any(points[21:] != points[20:-1], axis=1))


def test_an_adaptive_schedule_is_cheaper_than_a_tight_tolerance():
    adaptive = adaptive_run(bx.Adaptive(0.1))[0]
    tight = adaptive_run(bx.Constant(1e-6))[0]
    assert np.sum(adaptive.inner_iterations) < 0.5 * np.sum(tight.inner_iterations)
    assert np.all(np.isinf(tight.certificate)) and np.all(np.isfinite(adaptive.certificate[:1]))


@pytest.mark.parametrize("first", [1e9, 1e-15])
def test_an_adaptive_schedule_recovers_from_a_bad_first_tolerance(first):
    history, errors, sizes = adaptive_run(bx.Adaptive(0.02, first=first))
    np.testing.assert_allclose(history.rtol[0], min(max(first, DEFAULT), 0.3))
    if first > 1:
        assert history.certificate[0] > 0.02 * sizes[0] and np.isfinite(history.certificate[1])
        assert errors[0] == 0 < np.max(errors[1:5])  # y has waited
    assert np.mean(errors <= 0.02 * sizes) >= 0.9
    assert np.all(errors[40:] <= 0.02 * sizes[40:])
    if first < 1:  # it loosens: most of the work is done at first
        assert history.inner_iterations[0] > 5 * np.max(history.inner_iterations[40:])


def test_an_adaptive_schedule_recovers_from_a_start_far_away():
    history, errors, sizes = adaptive_run(bx.Adaptive(0.1), x0=X0 + 2.5, optimizer=ADAPTING)
    # Relative to ||F(x0, y)||, the first tolerance is no good: y waits for a better one.
    assert history.certificate[0] > 0.5 * sizes[0] and errors[0] == 0 < np.max(errors[1:5])
    assert np.all(errors <= 0.1 * sizes)
    assert history.rtol[1] < 0.1 * history.rtol[0]


def test_an_adaptive_schedule_at_a_stationary_point():
    engine = bx.value_and_hypergradient(
        lambda x, y: (x - 3.0) ** 2, bx.minimum(lambda x, y: (x - y) ** 2), bx.Newton()
    )
    step = bx.make_step(engine, optax.sgd(0.5), schedule=bx.Adaptive())
    states = scanned(step, step.init(1.0, 0.0, history=4), 4)
    np.testing.assert_array_equal(states.y, 3.0)  # the first step leads there
    np.testing.assert_array_equal(states.history.gradient_norm[-1][1:], 0.0)
    np.testing.assert_array_equal(states.outcome, bx.Outcome.RUNNING)
    np.testing.assert_array_equal(np.isfinite(states.schedule.now), True)
