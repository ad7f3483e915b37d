"""Rules in another variable, and their compositions with corrections, against dense formulas."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from bilevax import Status
from tests.everyday import params, slow
from tests.rules.changes import (
    FLAT_LINEAR,
    FLAT_SINH,
    LINEAR,
    SINH,
    diagonal,
    diagonal_in_exponential,
    exponential,
    flat_z,
    like_z,
    linear,
    linear_inverse,
    matrix_of,
    sinh,
    sinh_inverse,
)
from tests.rules.estimators import (
    COTANGENT,
    FIXED_POINT,
    MINIMUM,
    ROOT,
    TANGENT,
    U,
    W,
    X,
    Y,
    assert_close,
    changed,
    corrected,
    flat_x,
    flat_y,
    implicit,
    like_x,
    newton_in_new_variable,
    partials,
    solution,
)

# Dense solves with condition numbers below 1e3 are right to 1e3 roundings.
ROUNDING = 3e-13
DENSE = bx.Implicit(bx.Dense())


@dataclasses.dataclass(frozen=True)
class Row:
    """A rule, the flat change of a kind at a point, and where the rule is evaluated."""

    rule: bx.Rule
    change: Callable
    point: Callable = lambda kind, u: u


NEWTON = bx.NewtonStep(bx.Dense())
ROWS = {
    "exp": Row(bx.Reparameterized(DENSE, bx.ExpChange()), lambda kind, u: exponential(u)),
    "diagonal": Row(
        bx.Reparameterized(DENSE, bx.DiagonalChange()),
        lambda kind, u: diagonal(kind.optimality, u),
    ),
    "sinh": Row(bx.Reparameterized(DENSE, SINH), lambda kind, u: FLAT_SINH),
    "linear": Row(bx.Reparameterized(DENSE, LINEAR), lambda kind, u: FLAT_LINEAR),
    "diagonal_in_exp": Row(
        bx.Reparameterized(bx.Reparameterized(DENSE, bx.DiagonalChange()), bx.ExpChange()),
        diagonal_in_exponential,
    ),
    "step_of_change": Row(
        bx.Preconditioned(bx.Reparameterized(DENSE, SINH), NEWTON),
        lambda kind, u: FLAT_SINH,
        lambda kind, u: corrected(kind.optimality, None, u),
    ),
    "change_of_step": Row(
        bx.Reparameterized(bx.Preconditioned(DENSE, NEWTON), SINH),
        lambda kind, u: FLAT_SINH,
        lambda kind, u: newton_in_new_variable(kind, FLAT_SINH, u),
    ),
}
CASES = [
    *((MINIMUM, name) for name in ROWS),
    *((ROOT, name) for name in ("exp", "sinh", "linear", "step_of_change", "change_of_step")),
    *((FIXED_POINT, name) for name in ("diagonal", "sinh", "linear")),
]
# Each composition, and each kind of problem with a change; closed forms are in test_changes.py.
EVERYDAY = [
    *((MINIMUM, name) for name in ("sinh", "diagonal_in_exp", "step_of_change", "change_of_step")),
    (ROOT, "linear"),
    (FIXED_POINT, "diagonal"),
]
CHANGES = ["exp", "diagonal", "sinh", "linear"]


@functools.cache
def compiled(name, kind):
    rule = ROWS[name].rule

    @jax.jit
    def run(x, y):
        x, _ = rule.refine(kind.problem, x, y)
        pulled, report = rule.pullback(kind.problem, x, y, COTANGENT)
        pushed = rule.pushforward(kind.problem, x, y, TANGENT)
        return flat_x(x), flat_y(pulled), flat_x(pushed), report

    return run


def status_of(report):
    return Status(int(report.status))


@pytest.mark.parametrize(
    ("kind", "name"),
    params(CASES, lambda *case: case in EVERYDAY, lambda part: getattr(part, "name", part)),
)
def test_pullback_and_pushforward_are_the_dense_ones(kind, name):
    """In one test, for what takes its time is to compile the program."""
    x, pulled, pushed, report = compiled(name, kind)(X, Y)
    point = ROWS[name].point(kind, U)
    derivative = changed(kind, ROWS[name].change(kind, point), point)
    assert_close(x, point, ROUNDING)
    assert_close(pulled, derivative.T @ flat_x(COTANGENT), ROUNDING)
    assert_close(pushed, derivative @ flat_y(TANGENT), ROUNDING)
    assert status_of(report.solve) is Status.CONVERGED
    assert report.identity_entries == 0
    if name in CHANGES:
        np.testing.assert_array_equal(x, U)
        plain = implicit(kind.optimality, U).T @ flat_x(COTANGENT)
        assert np.linalg.norm(pulled - plain) > 1e-2 * np.linalg.norm(plain)
    at_the_solution_all_changes_and_orders_agree(kind, name)


def at_the_solution_all_changes_and_orders_agree(kind, name):
    star = solution(kind)
    x, pulled, pushed, _ = compiled(name, kind)(like_x(star), Y)
    derivative = implicit(kind.optimality, star)
    # F is not zero but rounding there, and a change multiplies it by up to 1 / min |x| = 20.
    assert_close(x, star, 1e-12)
    assert_close(pulled, derivative.T @ flat_x(COTANGENT), 1e-12)
    assert_close(pushed, derivative @ flat_y(TANGENT), 1e-12)


@pytest.mark.parametrize("kind", [slow(MINIMUM, id="minimum"), pytest.param(ROOT, id="root")])
def test_the_adjoint_is_that_of_the_new_variable(kind):
    report = compiled("linear", kind)(X, Y)[-1]
    z = linear_inverse(U, W)
    _, phi_1, _ = partials(linear, z)
    _, first, _ = partials(FLAT_LINEAR.optimality(kind), z)
    wanted = np.linalg.solve(first.T, phi_1.T @ flat_x(COTANGENT))
    assert jax.tree.structure(report.adjoint) == jax.tree.structure(like_z(U))
    assert_close(flat_z(report.adjoint), wanted, ROUNDING)


def test_the_orders_of_composition_differ():
    points = [ROWS[name].point(MINIMUM, U) for name in ("step_of_change", "change_of_step")]
    assert np.linalg.norm(points[0] - points[1]) > 1e-2
    results = [compiled(name, MINIMUM)(X, Y)[1] for name in ("step_of_change", "change_of_step")]
    assert np.linalg.norm(results[0] - results[1]) > 1e-2


@pytest.mark.parametrize(
    "kind", params([(MINIMUM,), (ROOT,), (FIXED_POINT,)], lambda k: k is ROOT, lambda k: k.name)
)
def test_a_linear_change_is_implicit_differentiation_of_b_times_f(kind):
    # B depends on y here; the constant one is below.
    _, pulled, pushed, _ = compiled("linear", kind)(X, Y)
    derivative = implicit(lambda u, w: matrix_of(w) @ kind.optimality(u, w), U)
    assert_close(pulled, derivative.T @ flat_x(COTANGENT), ROUNDING)
    assert_close(pushed, derivative @ flat_y(TANGENT), ROUNDING)


def test_a_nonlinear_change_is_implicit_differentiation_of_b_times_f():
    def root(u, w):
        phi_1 = jax.jacobian(sinh)(sinh_inverse(u, w), w)
        return phi_1.T @ MINIMUM.optimality(u, w)

    _, pulled, *_ = compiled("sinh", MINIMUM)(X, Y)
    assert_close(pulled, implicit(root, U).T @ flat_x(COTANGENT), ROUNDING)


def test_a_constant_linear_change_makes_no_difference():
    matrix = np.asarray(matrix_of(W))
    change = bx.ChangeOfVariables(
        lambda z, y: like_x(jnp.asarray(matrix.T) @ z),
        lambda x, y: jnp.asarray(np.linalg.inv(matrix.T)) @ flat_x(x),
    )
    pulled, _ = bx.Reparameterized(DENSE, change).pullback(MINIMUM.problem, X, Y, COTANGENT)
    for optimality in (MINIMUM.optimality, lambda u, w: matrix @ MINIMUM.optimality(u, w)):
        assert_close(flat_y(pulled), implicit(optimality, U).T @ flat_x(COTANGENT), ROUNDING)
