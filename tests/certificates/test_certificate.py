"""Certificates against the true error, which is Omega(x, y) - dh/dy in dense form.

Dense forms are written for flat vectors u and w, with `jax.jacobian` and NumPy's solves; x* is
found by Newton's method on dense matrices.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest
from jax.tree_util import Partial

import bilevax as bx
from tests.bad_input.example import assert_fails
from tests.certificates.test_efficiency import LOGISTIC, PENALTY, RIDGE, validation
from tests.everyday import params
from tests.rules.estimators import FIXED_POINT, FLOATING, ROOT, W, Y, like_x, outer, outer_on_trees
from tests.test_compilation import Counted, recorded_compilations

CONVERGED = bx.Status.CONVERGED
DENSE = bx.Implicit(bx.Dense())
RULES = {
    "implicit": DENSE,
    "jacobi": bx.Preconditioned(DENSE, bx.JacobiStep()),
    "newton": bx.Preconditioned(DENSE, bx.NewtonStep(bx.Dense())),
    "diagonal_change": bx.Reparameterized(DENSE, bx.DiagonalChange()),
    "exponential_change": bx.Reparameterized(DENSE, bx.ExpChange()),
}


@functools.partial(jax.jit, static_argnums=0)
def _derivatives(function, u, w):
    return function(u, w), *jax.jacobian(function, (0, 1))(u, w)


@functools.partial(jax.jit, static_argnums=0)
def _slopes_of_the_diagonal(optimality, u, w):
    return jax.jacobian(lambda w: jnp.diagonal(jax.jacobian(optimality)(u, w)))(w)


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem and an outer objective, on trees for the package and on flat vectors."""

    name: str
    problem: bx.Problem
    outer: Callable
    y: Any
    like_x: Callable
    optimality: Callable
    g: Callable
    w: np.ndarray
    floating: int  # entries of w that y has as floating ones; they come first

    def partials(self, function, u):
        value, first, second = (np.asarray(a) for a in _derivatives(function, u, self.w))
        return value, first, second[..., : self.floating]

    def certificate(self, rule, u, **options):
        return bx.hypergradient_error(
            self.outer, self.problem, rule, self.like_x(u), self.y, **options
        )

    @functools.cached_property
    def solution(self):
        u = np.zeros(4)
        for _ in range(40):
            value, first, _ = self.partials(self.optimality, u)
            u = u - np.linalg.solve(first, value)
        assert np.linalg.norm(self.partials(self.optimality, u)[0]) < 1e-13
        return u

    @functools.cached_property
    def truth(self):
        return self.estimate("implicit", self.solution)

    def solve_adjoint(self, u, damping=0.0):
        """Return v with (F_1 + damping I)^T v = g_1."""
        _, first, _ = self.partials(self.optimality, u)
        _, cotangent, _ = self.partials(self.g, u)
        return np.linalg.solve(first.T + damping * np.eye(len(u)), cotangent)

    def assemble(self, u, v):
        """Return g_2 - F_2^T v."""
        return self.partials(self.g, u)[2] - self.partials(self.optimality, u)[2].T @ v

    def estimate(self, name, u):
        """Return Omega(u, w) of a rule."""
        value, first, second = self.partials(self.optimality, u)
        if name in ("jacobi", "newton"):
            matrix = np.diag(np.diagonal(first)) if name == "jacobi" else first
            return self.estimate("implicit", u - np.linalg.solve(matrix, value))
        if name == "exponential_change":  # dx/dw = -(F_1 + diag(F / x))^{-1} F_2
            first = first + np.diag(value / u)
        if name == "diagonal_change":  # dx/dw = -F_1^{-1} (F_2 - diag(F / P) dP/dw)
            slopes = np.asarray(_slopes_of_the_diagonal(self.optimality, u, self.w))
            second = second - (value / np.diagonal(first))[:, None] * slopes[:, : self.floating]
        _, outer_1, outer_2 = self.partials(self.g, u)
        return outer_2 - second.T @ np.linalg.solve(first.T, outer_1)


def regression(name, case):
    return Case(
        name, case.problem, validation, PENALTY, np.asarray, case.optimality, validation, PENALTY, 4
    )


def on_trees(kind):
    return Case(
        kind.name, kind.problem, outer_on_trees, Y, like_x, kind.optimality, outer, W, FLOATING
    )


RIDGE, LOGISTIC = regression("ridge", RIDGE), regression("logistic", LOGISTIC)
CASES = [LOGISTIC, on_trees(ROOT), on_trees(FIXED_POINT)]
DIRECTION = np.array([0.5, -0.3, 0.7, 0.4])


def flat(tree):
    """Return the floating entries; those of y are in the order of w."""
    if isinstance(tree, dict):
        return np.append(tree["gain"], tree["shift"])
    return np.asarray(tree)


def assert_near(got, wanted, rtol, atol=0.0):
    """Compare two vectors in norm."""
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert got.shape == wanted.shape
    assert np.linalg.norm(got - wanted) <= rtol * np.linalg.norm(wanted) + atol


def assert_consistent(found):
    """Check what holds of every certificate."""
    # Rounding of the terms, here of the size of the gradient, is a part of the number.
    rounding = 1e-12 * float(found.absolute / found.relative) if found.relative > 0 else 0.0
    slack = 1e-12 * float(found.absolute) + rounding + 1e-300
    assert abs(found.absolute - np.linalg.norm(flat(found.error))) <= slack
    assert abs(found.inner - found.adjoint) - slack <= found.absolute
    assert found.absolute <= found.inner + found.adjoint + slack
    for number in (found.absolute, found.relative, found.inner, found.adjoint, found.contraction):
        assert number.shape == () and number.dtype == np.float64 and number >= 0
    for number in (found.products, found.status):
        assert number.shape == () and number.dtype == np.int32


# It is asymptotically exact.


# All rules on a minimum; on each of the others those that meet its Jacobian in another way.
PAIRS = [
    *((LOGISTIC, name) for name in RULES),
    *((CASES[1], name) for name in ("implicit", "newton", "diagonal_change")),
    *((CASES[2], name) for name in ("implicit", "jacobi", "exponential_change")),
]
# Each rule and each kind of problem once; the changes of variables where F_1 is not symmetric.
EVERYDAY = [
    *((LOGISTIC, name) for name in ("implicit", "jacobi", "newton")),
    (CASES[1], "diagonal_change"),
    (CASES[2], "exponential_change"),
]
pairs = pytest.mark.parametrize(
    ("case", "name"),
    params(PAIRS, lambda *pair: pair in EVERYDAY, lambda part: getattr(part, "name", part)),
)


@pairs
def test_its_own_error_falls_faster_than_the_error_it_estimates(case, name):
    deviations, size = [], np.linalg.norm(case.truth)
    for distance in (1e-1, 1e-2, 1e-3):
        u = case.solution + distance * DIRECTION
        true = case.estimate(name, u) - case.truth
        found = case.certificate(RULES[name], u)
        assert_consistent(found)
        # An entry whose first change was small by chance makes a certificate cautious.
        assert found.products > 0 and (distance == 1e-1 or found.contraction < 0.2)
        assert found.status == CONVERGED or distance == 1e-1
        noise = 1e-11 * size / np.linalg.norm(true)
        deviations.append((np.linalg.norm(flat(found.error) - true) / np.linalg.norm(true), noise))
        # Third order in the distance, for the error at the reference is of fourth order.
        assert deviations[-1][0] <= 10 * distance**3 + noise
        np.testing.assert_allclose(
            found.relative, np.linalg.norm(true) / size, rtol=3 * distance + noise
        )
        # The part of the adjoint is what the dense solve of the rule leaves.
        assert found.adjoint <= 1e-11 * size
    for (before, _), (after, noise) in itertools.pairwise(deviations):
        assert after <= 0.2 * before + noise


def test_the_jacobians_are_not_symmetric():
    for case in CASES[1:]:
        _, first, _ = case.partials(case.optimality, case.solution)
        assert np.linalg.norm(first - first.T) > 0.1 * np.linalg.norm(first)


def test_it_is_exact_for_a_quadratic():
    for distance in (1e-6, 1e-3, 1.0, 1e3):
        u = RIDGE.solution + distance * DIRECTION
        true = RIDGE.estimate("implicit", u) - RIDGE.truth
        found = RIDGE.certificate(DENSE, u)
        assert_near(found.error, true, 1e-8)
        np.testing.assert_allclose(found.absolute, np.linalg.norm(true), rtol=1e-8)
        assert found.status == CONVERGED


def test_at_the_solution_nothing_is_left():
    for case in (RIDGE, LOGISTIC):
        found = case.certificate(DENSE, case.solution)
        assert found.absolute <= 1e-12 * np.linalg.norm(case.truth)
        assert found.status == CONVERGED
        assert np.isfinite(found.contraction)


# Its two parts.


def conjugate_gradients(matrix, b, steps):
    """Return the iterate of the textbook."""
    v, r = np.zeros_like(b), b
    p = r
    for _ in range(steps):
        alpha = (r @ r) / (p @ matrix @ p)
        v, following = v + alpha * p, r - alpha * matrix @ p
        p, r = following + (following @ following) / (r @ r) * p, following
    return v


def truncated(case, u, steps):
    _, first, _ = case.partials(case.optimality, u)
    return conjugate_gradients(first, case.partials(case.g, u)[1], steps)


def limited(rtol=1e-12, maxiter=100, damping=0.0):
    """Return a rule with limits of its own; numbers alone change, so all are compiled once."""
    return bx.Implicit(bx.CG(rtol=rtol, maxiter=maxiter, damping=damping))


TWO_STEPS = limited(maxiter=2)


@pytest.mark.parametrize("case", [RIDGE, LOGISTIC], ids=["ridge", "logistic"])
def test_with_an_exact_x_all_is_of_the_adjoint(case):
    u = case.solution
    true = case.assemble(u, truncated(case, u, 2)) - case.truth
    assert np.linalg.norm(true) > 1e-3 * np.linalg.norm(case.truth)
    found = case.certificate(TWO_STEPS, u)
    assert_consistent(found)
    assert_near(found.error, true, 1e-9)
    np.testing.assert_allclose(found.adjoint, np.linalg.norm(true), rtol=1e-9)
    assert found.inner <= 1e-11 * np.linalg.norm(case.truth)
    assert found.status == CONVERGED  # the solve of the rule is judged, and is not at fault here


def test_a_loose_tolerance_is_of_the_adjoint():
    u = LOGISTIC.solution
    for rtol in (1e-1, 1e-2):
        rule = limited(rtol)
        cotangent = LOGISTIC.partials(validation, u)[1]
        _, report = rule.pullback(LOGISTIC.problem, u, PENALTY, cotangent)
        true = LOGISTIC.assemble(u, np.asarray(report.adjoint)) - LOGISTIC.truth
        found = LOGISTIC.certificate(rule, u)
        assert_near(found.error, true, 1e-9, 1e-12)
        np.testing.assert_allclose(found.adjoint, np.linalg.norm(true), rtol=1e-9, atol=1e-12)
        assert found.inner <= 1e-11


def test_damping_is_of_the_adjoint():
    u = LOGISTIC.solution
    for damping in (0.1, 10.0):
        true = LOGISTIC.assemble(u, LOGISTIC.solve_adjoint(u, damping)) - LOGISTIC.truth
        found = LOGISTIC.certificate(limited(damping=damping), u)
        assert_near(found.error, true, 1e-9)
        np.testing.assert_allclose(found.adjoint, found.absolute, rtol=1e-9)
        assert found.inner <= 1e-11
        assert found.status == CONVERGED


def test_a_short_series_is_of_the_adjoint():
    case = CASES[2]
    u, rule = case.solution, bx.Implicit(bx.Neumann(steps=3))
    _, report = rule.pullback(
        case.problem, case.like_x(u), case.y, case.like_x(case.partials(case.g, u)[1])
    )
    v = np.append(report.adjoint["left"], report.adjoint["right"])
    true = case.assemble(u, v) - case.truth
    assert np.linalg.norm(true) > 1e-3 * np.linalg.norm(case.truth)
    found = case.certificate(rule, u)
    assert_near(flat(found.error), true, 1e-9)
    np.testing.assert_allclose(found.adjoint, np.linalg.norm(true), rtol=1e-9)
    assert found.inner <= 1e-11 * np.linalg.norm(case.truth) and found.status == CONVERGED


def test_with_an_inexact_x_and_adjoint_the_parts_sum_to_the_whole():
    for distance in (1e-1, 1e-3):
        u = LOGISTIC.solution + distance * DIRECTION
        here = LOGISTIC.estimate("implicit", u)
        of_adjoint = LOGISTIC.assemble(u, truncated(LOGISTIC, u, 2)) - here
        of_inner = here - LOGISTIC.truth
        found = LOGISTIC.certificate(TWO_STEPS, u)
        assert_consistent(found)
        # At the same point both are known, so this part has no error of second order.
        np.testing.assert_allclose(found.adjoint, np.linalg.norm(of_adjoint), rtol=1e-8)
        np.testing.assert_allclose(found.inner, np.linalg.norm(of_inner), rtol=distance)
        assert_near(found.error, of_adjoint + of_inner, distance)


WRAPPED = {
    "preconditioned": bx.Preconditioned(TWO_STEPS, bx.NewtonStep(bx.Dense())),
    "reparameterized": bx.Reparameterized(
        bx.Implicit(bx.Dense(damping=0.1)),
        bx.ChangeOfVariables(lambda z, y: z / 2, lambda x, y: 2 * x),
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_rule_inside_a_wrapper_is_judged_with_its_own_solver(name):
    u = LOGISTIC.solution + 1e-2 * DIRECTION
    value, first, _ = LOGISTIC.partials(LOGISTIC.optimality, u)
    if name == "preconditioned":
        u_rule = u - np.linalg.solve(first, value)
        estimate = LOGISTIC.assemble(u_rule, truncated(LOGISTIC, u_rule, 2))
    else:  # phi_1 = I / 2, so that G_1 + 0.1 I = (F_1 + 0.4 I) / 4
        u_rule = u
        estimate = LOGISTIC.assemble(u, LOGISTIC.solve_adjoint(u, 0.4))
    of_adjoint = estimate - LOGISTIC.estimate("implicit", u_rule)
    found = LOGISTIC.certificate(WRAPPED[name], u)
    assert_near(found.error, estimate - LOGISTIC.truth, 1e-2)
    np.testing.assert_allclose(found.adjoint, np.linalg.norm(of_adjoint), rtol=1e-8)
    assert found.status == CONVERGED


def test_the_solves_take_another_solver():
    u = LOGISTIC.solution + 1e-2 * DIRECTION
    default = LOGISTIC.certificate(TWO_STEPS, u)
    for solver in (bx.Dense(),):
        other = LOGISTIC.certificate(TWO_STEPS, u, linear_solver=solver)
        # Solves of the second step leave a tenth of what the first one has left, 1e-2 or less.
        assert_near(other.error, default.error, 1e-3)
        np.testing.assert_allclose(other.inner, default.inner, rtol=1e-3)
        np.testing.assert_allclose(other.adjoint, default.adjoint, rtol=1e-8)
        assert other.status == CONVERGED


def test_the_limits_of_that_solver_are_set_aside():
    u = LOGISTIC.solution + 1e-2 * DIRECTION
    default = LOGISTIC.certificate(bx.Implicit(), u)
    solver = bx.CG(rtol=0.5, maxiter=1, damping=1.0)
    other = LOGISTIC.certificate(bx.Implicit(), u, linear_solver=solver)
    assert_near(other.error, default.error, 1e-9)
    assert other.status == CONVERGED


def adjoint_of(case, rule, u):
    cotangent = case.partials(case.g, u)[1]
    gradient, report = rule.pullback(case.problem, u, case.y, cotangent)
    return case.partials(case.g, u)[2] + gradient, report.adjoint


def test_a_known_adjoint_saves_work_and_changes_nothing():
    u = LOGISTIC.solution + 1e-2 * DIRECTION
    for rule in (bx.Implicit(), limited(rtol=1e-2)):
        alone = LOGISTIC.certificate(rule, u)
        _, v = adjoint_of(LOGISTIC, rule, u)
        known = LOGISTIC.certificate(rule, u, adjoint=v)
        assert_near(known.error, alone.error, 1e-9)
        np.testing.assert_allclose(known.adjoint, alone.adjoint, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(known.inner, alone.inner, rtol=1e-9)
        assert known.products <= alone.products and known.status == CONVERGED


def test_what_is_judged_with_a_known_adjoint_is_the_hypergradient_made_of_it():
    u = LOGISTIC.solution + 1e-2 * DIRECTION
    gradient, v = adjoint_of(LOGISTIC, TWO_STEPS, u)
    found = LOGISTIC.certificate(TWO_STEPS, u, adjoint=v)
    assert_near(found.error, gradient - LOGISTIC.truth, 1e-2)
    assert_near(found.error, LOGISTIC.certificate(TWO_STEPS, u).error, 1e-9)


@pytest.mark.parametrize("adjoint", [1e9, np.nan])
def test_an_adjoint_that_is_none(adjoint):
    u = LOGISTIC.solution + 1e-2 * DIRECTION
    found = LOGISTIC.certificate(bx.Implicit(), u, adjoint=np.full(4, adjoint))
    assert found.status == bx.Status.NONFINITE and np.isnan(found.absolute)


# Costs.


def test_products_by_hand():
    def quadratic(x, y):  # F_1 has two distinct eigenvalues
        return jnp.sum(jnp.array([1.0, 3.0, 3.0]) * x**2) / 2 - y * jnp.sum(x)

    def square(x, y):
        return jnp.sum(x**2)

    problem, x = bx.minimum(quadratic), np.array([1.0, -2.0, 0.3])
    found = bx.hypergradient_error(square, problem, bx.Implicit(), x, 2.0)
    # The guess at x is accurate: one check. A Newton step from zero: two steps and a check. The
    # residual of the adjoint is one product, its correction two steps and a check. The second time
    # there is nothing left: CG sees it with a step and a check, twice, or solves for rounding.
    least = 1 + 3 + (1 + 3) + 2 + (1 + 2)
    assert least <= found.products <= least + 2 * 3
    found = bx.hypergradient_error(square, problem, bx.Implicit(bx.CG(maxiter=1)), x, 2.0)
    assert least + 3 <= found.products <= least + 3 + 2 * 3  # a guess that is not accurate
    found = bx.hypergradient_error(square, problem, bx.Implicit(), x, 2.0, linear_solver=bx.Dense())
    assert found.products == 5 * (3 + 3) + 2
    # Newton's method has nothing to do at the solution, nor have corrections of the adjoint.
    found = bx.hypergradient_error(square, problem, bx.Implicit(), 2 / np.array([1.0, 3, 3]), 2.0)
    assert 1 + 2 * (2 + 1 + 2) <= found.products <= 1 + 2 * (2 + 1 + 2) + 4 * 3
    # Terms of size ten cancel nothing, and have their rounding error.
    assert 0 < found.absolute <= 1e-13


def test_products_that_are_not_counted():
    problem, x = bx.root(lambda x, y: x**2 - y), 1.1
    for solver in (bx.LineaxSolver(lineax.LU()), bx.BiCGStab()):
        found = bx.hypergradient_error(
            lambda x, y: x**2, problem, bx.Implicit(), x, 1.0, linear_solver=solver
        )
        assert found.products == -1 and found.status == CONVERGED
    # Without a solver of its own the certificate takes that of the rule.
    found = bx.hypergradient_error(
        lambda x, y: x**2, problem, bx.Implicit(bx.BiCGStab()), x, 1.0, linear_solver=bx.Dense()
    )
    assert found.products == 5 * (1 + 3) + 2


# Failures, and what looks like success. Each is a scalar problem with its truth dh/dy.

CYCLE = 1.3917452002707347  # where Newton's method on arctan goes to and fro


def first(x, y):
    return x


def exponential(x, y):  # x* = log y
    return jnp.exp(x) - y


def exponential_outer(x, y):  # Omega = 1 + exp(-x)
    return jnp.exp(x) + x


def bend(x, y):  # x* = tan y
    return jnp.arctan(x) - y


# Each residual with an outer objective.
SCALAR = [
    (exponential, first),
    (exponential, exponential_outer),
    (bend, first),
    (lambda x, y: x**2 - y, first),
    (lambda x, y: x**3 - y, lambda x, y: x**3 + x),  # Omega = 1 + x^-2 / 3
    (lambda x, y: x**9 - y, lambda x, y: x**9 + x**7),  # Omega = 1 + 7 x^-2 / 9
    (lambda x, y: x**2 + y, first),  # no root at y = 1
]


def scalar_residual(which, x, y):
    return jax.lax.switch(which, [residual for residual, _ in SCALAR], x, y)


def scalar_outer(which, x, y):
    return jax.lax.switch(which, [g for _, g in SCALAR], x, y)


def scalar_certificate(which, x, y):
    """Return the certificate of one of them; all are compiled once."""
    which = np.array(which)
    problem = bx.root(Partial(scalar_residual, which))
    return bx.hypergradient_error(Partial(scalar_outer, which), problem, DENSE, x, y)


# The pair, x, y, Omega at x, and dh/dy.
COUNTEREXAMPLES = {
    # Newton's steps have a constant length, though each shrinks F by e.
    "exponential_right": (1, 20.0, 1.0, 1 + np.exp(-20), 2.0),
    "exponential_right_itself": (0, 20.0, 1.0, np.exp(-20), 1.0),
    # Newton's steps shrink by 1 / p only.
    "cube": (4, 1e3, 1.0, 1 + 1e-6 / 3, 4 / 3),
    "ninth_power": (5, 1e3, 1.0, 1 + 7e-6 / 9, 16 / 9),
    # Two estimates at the two ends of a cycle agree.
    "cycle": (2, CYCLE, 0.0, 1 + CYCLE**2, 1.0),
    **{
        f"arctan_{x}": (2, x, 0.0, 1 + x**2, 1.0)
        for x in (0.1, 1.2, 1.3, 1.35, 1.4, 1.5, 3.0, 100.0, 1e6)
    },
    **{f"exponential_left_{x}": (0, x, 1.0, np.exp(-x), 1.0) for x in (-0.5, -3.0, -20.0)},
    **{f"square_root_{x}": (3, x, 1.0, 0.5 / x, 0.5) for x in (0.01, 0.3, 3.0, 100.0)},
}


def assert_honest(found, true):
    """Check that a certificate that says so can be trusted; it need not say so."""
    assert found.status in (CONVERGED, bx.Status.STALLED, bx.Status.NONFINITE)
    if found.status == CONVERGED:
        # "Wrong by about that factor, relatively."
        wrong = np.linalg.norm(np.asarray(found.error) - true)
        assert wrong <= (10 * found.contraction + 1e-8) * np.linalg.norm(true)


@pytest.mark.parametrize("name", COUNTEREXAMPLES)
def test_converged_means_that_the_estimate_can_be_trusted(name):
    which, x, y, estimate, truth = COUNTEREXAMPLES[name]
    found = scalar_certificate(which, x, y)
    assert_honest(found, estimate - truth)
    if name in ("arctan_0.1", "exponential_left_-0.5"):
        assert found.status == CONVERGED


def test_the_same_for_a_convex_minimum():
    problem = bx.minimum(lambda x, y: jnp.exp(x) - y * x)
    for x in (20.0, 0.1):
        found = bx.hypergradient_error(exponential_outer, problem, bx.Implicit(), x, 1.0)
        assert_honest(found, 1 + np.exp(-x) - 2.0)
    assert found.status == CONVERGED


def test_a_small_residual_hidden_behind_a_large_one():
    """Newton's method reduces the norm of F a thousandfold, and not what matters."""
    problem = bx.root(lambda x, y: jnp.stack([1e3 * (x[0] - 1), bend(x[1], y)]))

    def second(x, y):
        return x[1]

    for b in (CYCLE, 1.35, 1.42):
        found = bx.hypergradient_error(second, problem, DENSE, np.array([0.0, b]), 0.0)
        assert_honest(found, b**2)


@pytest.mark.parametrize("x", [0.3, 3.0, 30.0, 1e4])
def test_without_a_root_it_does_not_converge(x):
    assert scalar_certificate(6, x, 1.0).status != CONVERGED


def ill_conditioned(curvature, x, y):
    return (x[0] - 1) ** 2 / 2 + curvature * (x[1] - jnp.exp(y)) ** 2 / 2


def test_an_ill_conditioned_quadratic():
    """The entry of small curvature has a small residual, and all of the hypergradient, 2."""

    def g(x, y):
        return x[0] + x[1] ** 2

    loose = bx.Implicit(bx.CG(rtol=1e-3))
    for curvature in (1e-4, 1e-8):
        problem = bx.minimum(Partial(ill_conditioned, np.array(curvature)))
        for x0, x1, rule in (
            (1, 1, bx.Implicit()),
            (1, 1.1, bx.Implicit()),
            (0.5, 1.1, loose),
            (1, 1, loose),
        ):
            x = np.array([x0, x1], float)
            found = bx.hypergradient_error(g, problem, rule, x, 0.0)
            gradient, _ = rule.pullback(problem, x, 0.0, np.array([1.0, 2 * x1]))
            np.testing.assert_allclose(found.error, gradient - 2.0, rtol=1e-6, atol=1e-8)
            assert found.status == CONVERGED


def in_units(units, x, y):
    return units[1] * (0.5 * y * (x / units[0]) ** 2 - x / units[0])


def outer_in_units(units, x, y):
    return units[2] * (x / units[0]) ** 2


@pytest.mark.parametrize("which", ["x", "objective", "outer"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_units_change_nothing(dtype, which):
    exponents = {np.float32: 20, np.float64: 100}[dtype]
    for exponent in (-exponents, exponents):
        if which == "x":  # F_1 has the unit 1 / x^2
            exponent /= 4
        units = np.ones(3, dtype)
        units[["x", "objective", "outer"].index(which)] = 10.0**exponent
        problem = bx.minimum(Partial(in_units, units))
        found = bx.hypergradient_error(
            Partial(outer_in_units, units), problem, bx.Implicit(), 0.6 * units[0], dtype(2.0)
        )
        tolerance = 1e-4 if dtype is np.float32 else 1e-10
        np.testing.assert_allclose(found.error / units[2], -0.11, rtol=tolerance)
        np.testing.assert_allclose(found.absolute / units[2], 0.11, rtol=tolerance)
        np.testing.assert_allclose(found.relative, 0.44, rtol=tolerance)
        assert found.status == CONVERGED


def test_starts_at_zero_and_at_the_solution():
    problem, g = bx.minimum(lambda x, y: 0.5 * y * x**2 - x), lambda x, y: x**2
    for x, wanted in ((0.0, 0.25), (0.5, 0.0)):  # Omega = -2 x^2 / y
        found = bx.hypergradient_error(g, problem, bx.Implicit(), x, 2.0)
        np.testing.assert_allclose(found.error, wanted, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(
            found.relative, wanted / 0.25, rtol=1e-12, atol=1e-14
        )  # rounding
        assert found.status == CONVERGED and found.contraction == 0
    # x* = 0 = F(0, y), where even ||F_1 x|| is zero.
    found = bx.hypergradient_error(
        lambda x, y: x, bx.root(lambda x, y: jnp.sinh(x) * y), bx.Implicit(), 0.0, 2.0
    )
    assert found.absolute == 0 and found.status == CONVERGED


def test_a_failed_solve_is_propagated():
    # Minimal residuals along one direction stand still where F_1 only turns a vector.
    turn = bx.root(lambda x, y: jnp.stack([x[1], -x[0]]) - y)
    found = bx.hypergradient_error(
        lambda x, y: x[0] - x[1],
        turn,
        DENSE,
        np.ones(2),
        np.array([1.0, 2.0]),
        linear_solver=bx.GMRES(restart=1),
    )
    assert found.status in (bx.Status.BREAKDOWN, bx.Status.NONFINITE)
    singular = bx.root(lambda x, y: jnp.stack([x[0] + x[1], x[0] + x[1]]) - y)
    found = bx.hypergradient_error(
        lambda x, y: x[0] - x[1], singular, DENSE, np.zeros(2), np.array([1.0, 2.0])
    )
    assert found.status >= bx.Status.MAXITER and not np.isfinite(found.absolute)
    indefinite = bx.minimum(lambda x, y: jnp.cos(x) + 0 * y)
    found = bx.hypergradient_error(first, indefinite, bx.Implicit(), 0.3, 1.0)
    assert found.status in (bx.Status.INDEFINITE, bx.Status.NONFINITE)


@pytest.mark.parametrize("name", ["x", "y", "objective"])
def test_what_is_not_finite(name):
    x, y = LOGISTIC.solution.copy(), PENALTY.copy()
    if name == "objective":
        found = bx.hypergradient_error(
            first, bx.root(lambda x, y: jnp.log(x) - y), bx.Implicit(), -1.0, 1.0
        )
    else:
        {"x": x, "y": y}[name][1] = np.nan
        found = bx.hypergradient_error(validation, LOGISTIC.problem, bx.Implicit(), x, y)
    assert found.status == bx.Status.NONFINITE
    assert not np.isfinite(found.absolute) and not found.relative < 1


def test_a_stationary_point_of_h_has_no_relative_error():
    problem = bx.minimum(lambda x, y: (x - y) ** 2)  # x* = y, and with g = x^2, dh/dy = 2 y
    found = bx.hypergradient_error(lambda x, y: x**2, problem, bx.Implicit(), 0.1, 0.0)
    np.testing.assert_allclose([found.error, found.absolute], 0.2, rtol=1e-12)
    assert found.relative > 1e10 and found.status == CONVERGED


# Kinds of x and y, precision, transformations.


def test_leaves_of_integers_and_keys():
    def shifted(x, y):
        noise = jax.random.normal(y["key"], (2,))
        misfit = jnp.append(x["a"], x["b"]) - y["w"][y["index"]] * noise
        return jnp.sum(jnp.cosh(misfit))

    y = {"w": jnp.arange(1.0, 4.0), "index": jnp.array([2, 0]), "key": jax.random.key(0)}
    noise = np.asarray(jax.random.normal(y["key"], (2,)))
    x_star = np.array([3.0, 1.0]) * noise
    x = {"a": x_star[0] + 1e-3, "b": np.array([x_star[1] - 1e-3])}
    found = bx.hypergradient_error(
        lambda x, y: x["a"] ** 2 + jnp.sum(jnp.exp(x["b"])),
        bx.minimum(shifted),
        bx.Implicit(),
        x,
        y,
    )
    # dx_i/dw is noise_i, so that Omega - dh/dy is the change of g_1 times it.
    wanted = np.array([np.exp(x_star[1]) * np.expm1(-1e-3) * noise[1], 0.0, 2e-3 * noise[0]])
    assert jax.tree.structure(found.error) == jax.tree.structure(y)
    for name in ("index", "key"):
        assert found.error[name].dtype == jax.dtypes.float0
        assert found.error[name].shape == y[name].shape
    assert_near(found.error["w"], wanted, 1e-5)
    np.testing.assert_allclose(found.absolute, np.linalg.norm(wanted), rtol=1e-5)
    assert found.status == CONVERGED


def test_float32():
    u = LOGISTIC.solution + 0.1 * DIRECTION
    true = LOGISTIC.estimate("implicit", u) - LOGISTIC.truth
    low = u.astype(np.float32), PENALTY.astype(np.float32)
    found = bx.hypergradient_error(validation, LOGISTIC.problem, bx.Implicit(), *low)
    for number in (found.absolute, found.relative, found.error, found.inner, found.contraction):
        assert number.dtype == np.float32
    assert_near(found.error, true, 2e-2)
    assert found.adjoint <= 1e-3 * found.absolute and found.status == CONVERGED
    low = LOGISTIC.solution.astype(np.float32), low[1]
    found = bx.hypergradient_error(validation, LOGISTIC.problem, bx.Implicit(), *low)
    assert found.relative < 1e-5 and found.status == CONVERGED


def test_jit_and_vmap_equal_a_loop():
    problem = bx.minimum(lambda x, y: x * jnp.arctan(x) - jnp.log(1 + x**2) / 2 - y * x)

    def g(x, y):
        return x**2 + y

    def certificate(x, y):
        return bx.hypergradient_error(g, problem, bx.Implicit(), x, y)

    xs = np.array([0.5, 3.0, np.nan, 0.0, 1.3, -0.7])
    ys = np.array([0.1, 0.0, 0.2, 0.0, 0.0, 0.3])
    together = jax.jit(jax.vmap(certificate))(xs, ys)
    for k in range(len(xs)):
        alone = certificate(xs[k], ys[k])
        # Compiled programs round differently: terms are up to about a hundred, and a residual that
        # is zero in one of them takes two products in the other.
        assert abs(int(together.products[k]) - int(alone.products)) <= 4
        alone = alone._replace(products=together.products[k])
        for got, wanted in zip(together, alone, strict=True):
            np.testing.assert_allclose(got[k], wanted, rtol=1e-9, atol=1e-12)
    statuses = together.status.tolist()
    assert statuses[0] == statuses[3] == statuses[5] == CONVERGED
    assert (statuses[1], statuses[2]) == (bx.Status.STALLED, bx.Status.NONFINITE)


def test_a_second_call_traces_and_compiles_nothing():
    residual, g = Counted(exponential), Counted(exponential_outer)

    def run(x, y, rtol):
        rule = bx.Implicit(bx.CG(rtol=rtol))
        solver = bx.GMRES(rtol=0.1 * rtol)
        return bx.hypergradient_error(g, bx.root(residual), rule, x, y, linear_solver=solver)

    with recorded_compilations() as events:
        run(0.1, 1.0, 1e-8)
    assert events
    traced = residual.calls, g.calls
    with recorded_compilations() as events:
        jax.block_until_ready(run(0.5, 2.0, 1e-10))
    assert events == [] and (residual.calls, g.calls) == traced


def test_data_of_a_partial_compile_nothing():
    problem = bx.minimum(Partial(in_units, np.ones(3)))
    for unit in (1.0, 2.0):
        with recorded_compilations() as events:
            g = Partial(outer_in_units, np.array([1.0, 1.0, unit]))
            found = bx.hypergradient_error(g, problem, bx.Implicit(), 0.6, 2.0)
        np.testing.assert_allclose(found.error, -0.11 * unit, rtol=1e-10)
    assert events == []


@pytest.mark.parametrize(
    ("error", "changes", "message"),
    [
        (TypeError, {"outer": 1.0}, "`outer` must be a function, got 1.0."),
        (TypeError, {"outer": lambda x, y: x}, "`outer` must return a scalar, got float64[4]."),
        (
            TypeError,
            {"problem": validation},
            "`problem` must be a Problem, for example `minimum(objective)`; got",
        ),
        (
            TypeError,
            {"problem": bx.root(lambda x, y: x[:2])},
            "`residual` must return shapes and dtypes like `x`: `x` is float64[4], got float64[2].",
        ),
        (TypeError, {"rule": None}, "`rule` must be a Rule, for example `Implicit()`; got None."),
        (TypeError, {"rule": bx.Implicit}, "Did you forget the parentheses?"),
        (
            TypeError,
            {"x": np.zeros(4, int)},
            "`x` must be a floating array to be solved for, got dtype int64.",
        ),
        (TypeError, {"y": np.zeros(4, complex)}, "`y` is complex; only real arrays are supported."),
        (
            TypeError,
            {"linear_solver": "cg"},
            "`linear_solver` must be a LinearSolver, for example `CG()`; got 'cg'.",
        ),
        (TypeError, {"linear_solver": bx.CG}, "Did you forget the parentheses?"),
        (
            TypeError,
            {"adjoint": np.zeros(3)},
            "`adjoint` must have as many entries as `x`, 4; got float64[3].",
        ),
        (
            ValueError,
            {
                "rule": bx.Reparameterized(
                    DENSE, bx.ChangeOfVariables(lambda z, y: 2 * z, lambda x, y: x)
                )
            },
            "`phi(phi_inverse(x, y), y)`",
        ),
    ],
)
def test_wrong_arguments(error, changes, message):
    arguments = {
        "outer": validation,
        "problem": RIDGE.problem,
        "rule": bx.Implicit(),
        "x": np.ones(4),
        "y": PENALTY,
    }
    assert_fails(error, message, lambda: bx.hypergradient_error(**(arguments | changes)))


def test_a_y_without_floating_entries():
    message = "`y` must have floating entries, got int64[]."
    problem = bx.minimum(lambda x, y: (x - y) ** 2)
    y = jnp.asarray(3)
    assert_fails(
        TypeError,
        message,
        lambda: bx.hypergradient_error(lambda x, y: x, problem, bx.Implicit(), 1.0, y),
    )
