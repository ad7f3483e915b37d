"""Engines with a certificate at the tolerance of their solver, which schedules read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from tests.everyday import params
from tests.outer.example import LARGEST, X0, Y, inner, make_engine, outer, truth

PROBLEM = bx.minimum(inner)
ROUGH = bx.GradientDescent(LARGEST / 2, rtol=1e-2)
RULES = {
    "dense": bx.Implicit(bx.Dense()),
    "conjugate gradients": bx.Implicit(bx.CG()),
    "gradient step": bx.Preconditioned(bx.Implicit(bx.Dense()), bx.GradientStep(LARGEST / 2)),
}


def test_the_adjoint_solve_may_have_a_tolerance_of_its_own():
    """One that follows is set aside, one that the user gave is kept."""
    rng = np.random.default_rng(3)
    roots = rng.normal(size=(60, 40))
    matrix, weights = roots.T @ roots, rng.normal(size=40)
    problem = bx.minimum(lambda x, y: 0.5 * x @ (matrix @ x) + 0.5 * jnp.exp(y) @ x**2 - x.sum())
    y, warm = np.zeros(40), bx.cold_start(np.zeros(40))

    def weighted(x, y):  # one function, so that a rule is compiled once
        return weights @ x

    def residual(adjoint_rtol, rule):
        solver = bx.Newton(rtol=1e-8)
        engine = bx.value_and_hypergradient(weighted, problem, solver, rule)
        result = dataclasses.replace(engine, adjoint_rtol=adjoint_rtol)(y, warm)
        v = np.linalg.solve(matrix + np.eye(40), weights)
        error = np.linalg.norm((matrix + np.eye(40)) @ (result.warm.adjoint - v))
        np.testing.assert_allclose(
            result.report.adjoint.residual, error / np.linalg.norm(weights), rtol=1e-3, atol=1e-14
        )
        return float(result.report.adjoint.residual)

    for rule in (bx.Implicit(), bx.Preconditioned(bx.Implicit(), bx.NewtonStep())):
        assert residual(None, rule) <= 1e-8
        assert 1e-3 < residual(1e-1, rule) <= 1e-1
        assert residual(1e-12, rule) <= 1e-12
    assert residual(1e-1, bx.Implicit(bx.CG(rtol=1e-6))) <= 1e-6


# The gradient step has a dense solve too.
@pytest.mark.parametrize("name", params(zip(RULES, strict=True), lambda name: name != "dense"))
def test_a_certificate_is_that_of_the_point_and_tells_the_true_error(name):
    rule = RULES[name]
    result = make_engine(ROUGH, rule, certified=True)(Y, bx.cold_start(X0))
    certificate = result.report.certificate
    plain = make_engine(ROUGH, rule)(Y, bx.cold_start(X0))
    assert plain.report.certificate is None
    for got, want in zip(
        jax.tree.leaves(result._replace(report=None)),
        jax.tree.leaves(plain._replace(report=None)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)

    error = result.gradient - truth(Y)[3]
    size = np.linalg.norm(error)
    assert size > 1e-4
    np.testing.assert_allclose(certificate.absolute, size, rtol=0.05)
    np.testing.assert_allclose(certificate.error, error, atol=0.05 * size)
    np.testing.assert_allclose(certificate.relative, size / np.linalg.norm(truth(Y)[3]), rtol=0.05)
    assert certificate.status == bx.Status.CONVERGED and certificate.products > 0

    # The point before a correction is that of the solver alone.
    x = plain.x if name != "gradient step" else make_engine(ROUGH)(Y, bx.cold_start(X0)).x
    judged = bx.hypergradient_error(outer, PROBLEM, rule, x, Y, adjoint=result.warm.adjoint)
    np.testing.assert_allclose(certificate.absolute, judged.absolute, rtol=5e-3)
    np.testing.assert_allclose(certificate.error, judged.error, atol=5e-3 * size)
    np.testing.assert_allclose(certificate.inner, judged.inner, rtol=5e-3)


def test_a_certificate_sees_the_error_of_the_adjoint():
    rule = bx.Implicit(bx.CG(rtol=0.3))
    engine = make_engine(bx.GradientDescent(LARGEST / 2, rtol=1e-10), rule, certified=True)
    result = engine(Y, bx.cold_start(X0))
    certificate = result.report.certificate
    error = np.linalg.norm(result.gradient - truth(Y)[3])
    # The solve that tells the parts apart leaves a hundredth of the residual.
    np.testing.assert_allclose(certificate.adjoint, error, rtol=0.05)
    np.testing.assert_allclose(certificate.absolute, error, rtol=0.01)
    assert certificate.adjoint > 20 * certificate.inner


def test_whether_to_certify_may_be_traced():
    engine = make_engine(ROUGH, RULES["conjugate gradients"], certified=True)

    @jax.jit
    def run(certified):
        return dataclasses.replace(engine, certified=certified)(Y, bx.cold_start(X0))

    with_one, without = run(True), run(False)
    np.testing.assert_array_equal(with_one.gradient, without.gradient)
    want = engine(Y, bx.cold_start(X0)).report.certificate
    np.testing.assert_allclose(with_one.report.certificate.absolute, want.absolute, rtol=1e-9)
    assert np.isinf(without.report.certificate.absolute)
    assert without.report.certificate.products == 0
