"""The table of rules against true errors, from formulas in NumPy and from the reference data.

A table takes ten programs. Every day most tests share those of one family of small problems, with
CG; the default linear solvers are those of the example of `recommend_rule`.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import bilevax as bx
from bilevax.diagnostics import _recommend
from bilevax.diagnostics import recommend_rule as recommend
from tests.bad_input.example import assert_fails
from tests.rules import estimators
from tests.rules.estimators import FIXED_POINT
from tests.test_compilation import recorded_compilations
from tests.test_reference import CASES, DIRECTORY

NAMES = ("Implicit", "JacobiStep", "NewtonStep", "DiagonalChange", "ExpChange")
IMPLICIT, JACOBI, NEWTON, DIAGONAL, EXP = range(5)
DENSE = bx.Dense()
CASE = {case.name: case for case in CASES}
RIDGE = CASE["ridge_regression-quadratic"]
LOGISTIC = CASE["logistic_regression-logistic"]

# Small problems whose numbers are known. Of the first x* = 1 / y.
Y = np.array([0.5, 1.5, 1.0])


def small(x, y):
    return jnp.sum(y * x**2 / 2 - x)


def family(numbers, x, y):
    """Return the problem above where both numbers are zero; one program serves all."""
    coupling, quartic = numbers
    return small(x, y) + coupling * jnp.sum(x) ** 2 / 4 + quartic * jnp.sum(x**4) / 4


SEPARATE, COUPLED = np.zeros(2), np.array([0.5, 0.3])


def cubic(x, y):
    return jnp.sum(x**3) / 3


SOLVER = bx.CG(rtol=1e-10, maxiter=10, damping=0.0)


def small_table(x, accuracy=None, numbers=SEPARATE, **limits):
    # Numbers alone change, so that one compiled program serves all.
    problem, solver = bx.minimum(Partial(family, numbers)), dataclasses.replace(SOLVER, **limits)
    return recommend(cubic, problem, x, Y, accuracy, linear_solver=solver)


def coupled_table(x, accuracy=None):
    return small_table(x, accuracy, COUPLED)


def table_at(case, k, accuracy=None):
    """Return the table at iterate k: at distances 0.1, 0.01, 0.001 from the solution."""
    solver = None if case is RIDGE else DENSE  # the defaults once; they take longer to compile
    x = case.iterates[k]
    return recommend(case.outer, case.problem, x, case.y, accuracy, linear_solver=solver)


def assert_predicts(table, estimates, truth, floor=1e-9):
    """Compare predicted with true errors: to 10 %, or both at rounding."""
    size = np.linalg.norm(truth)
    true = np.array([np.linalg.norm(estimate - truth) for estimate in estimates])
    absolute, relative = table.absolute_error, table.relative_error
    np.testing.assert_allclose(absolute, true, rtol=0.1, atol=floor * size)
    np.testing.assert_allclose(relative, true / size, rtol=0.1, atol=floor)
    assert np.all(table.status == bx.Status.CONVERGED)
    return true / size


# Predicted errors. The estimators are closed forms in u = x, for
# F(u) = loss'(u) + exp(y) u / d, F_1 = loss''(u) + diag(exp(y) / d), F_2 = diag(exp(y) u / d).


def ridge_loss(data, u):
    """Return the gradient and the Hessian of the loss at u, and g_1 there."""
    features, targets = np.array(data["X"]), np.array(data["t"])
    matrix, shift = np.array(data["A_out"]), np.array(data["b_out"])
    hessian = features.T @ features / len(features)
    slope = features.T @ (features @ u - targets) / len(features)
    return slope, hessian, matrix.T @ (matrix @ u - shift)


def logistic_loss(data, u):
    def probabilities(features, labels):
        signed = np.array(labels)[:, None] * np.array(features)
        return signed, 1 / (1 + np.exp(signed @ u))

    signed, p = probabilities(data["X"], data["t"])
    hessian = signed.T @ ((p * (1 - p))[:, None] * signed) / len(signed)
    outer_signed, q = probabilities(data["X_val"], data["t_val"])
    return -signed.T @ p / len(signed), hessian, -outer_signed.T @ q / len(outer_signed)


def closed_forms(loss, penalty, u):
    """Return the five estimates at u; `penalty` is exp(y) / d."""

    def partials(u):
        slope, hessian, outer_slope = loss(u)
        return slope + penalty * u, hessian + np.diag(penalty), outer_slope

    def implicit(u):
        _, hessian, outer_slope = partials(u)
        return -penalty * u * np.linalg.solve(hessian, outer_slope)

    optimality, hessian, outer_slope = partials(u)
    scale = np.diagonal(hessian)
    adjoint = np.linalg.solve(hessian, outer_slope)
    shifted = hessian + np.diag(optimality / u)
    return [
        implicit(u),
        implicit(u - optimality / scale),
        implicit(u - np.linalg.solve(hessian, optimality)),
        # g_2,k - v^T (F_2,k - P'_k P^{-1} F) with P'_k = penalty_k in entry k
        -(penalty * u - penalty * optimality / scale) * adjoint,
        -penalty * u * np.linalg.solve(shifted, outer_slope),
    ]


def coupled_loss(u):
    coupling, quartic = COUPLED
    slope = coupling * np.sum(u) / 2 + quartic * u**3 - 1
    return slope, coupling / 2 + np.diag(3 * quartic * u**2), u**2


def coupled_estimates(u):
    # The closed forms are with respect to the logarithms of the penalties.
    return [estimate / Y for estimate in closed_forms(coupled_loss, Y, u)]


def coupled_solution():
    u = np.ones(3)
    for _ in range(30):
        slope, hessian, _ = coupled_loss(u)
        u = u - np.linalg.solve(hessian + np.diag(Y), slope + Y * u)
    return u


SOLUTION = coupled_solution()
FAR, NEARER = (SOLUTION + d * np.array([-1.0, -0.5, -0.2]) for d in (2e-2, 5e-4))
# There, a Jacobi step leads astray.
ASTRAY = SOLUTION + 2e-2 * np.array([-0.1, -1.0, -0.2])


@pytest.mark.parametrize("u", [FAR, NEARER, ASTRAY], ids=["far", "nearer", "astray"])
def test_predicted_errors_of_a_small_problem(u):
    table = coupled_table(u)
    true = assert_predicts(table, coupled_estimates(u), coupled_estimates(SOLUTION)[NEWTON])
    # There is something to predict; the error of a Newton step is of second order.
    assert np.all(true[[IMPLICIT, JACOBI, DIAGONAL, EXP]] > 1e-4)
    assert 1e-7 < true[NEWTON] < 1e-3 and np.argmin(table.relative_error) == NEWTON
    is_worse = table.absolute_error[JACOBI] > 1.2 * table.absolute_error[IMPLICIT]
    assert is_worse == (u is ASTRAY) == (true[JACOBI] > 1.2 * true[IMPLICIT])


@pytest.mark.slow
@pytest.mark.parametrize("k", [0, 1, 2])
@pytest.mark.parametrize(
    ("case", "file", "loss"),
    [
        (RIDGE, "diabetes_ridge.json", ridge_loss),
        (LOGISTIC, "synthetic_logistic.json", logistic_loss),
    ],
    ids=["ridge", "logistic"],
)
def test_predicted_errors_are_true_ones(case, file, loss, k):
    loss = functools.partial(loss, json.loads((DIRECTORY / file).read_text()))
    penalty = np.exp(np.array(case.y)) / len(case.y)
    solution = np.array(case.x_star)
    truth = closed_forms(loss, penalty, solution)[NEWTON]
    table = table_at(case, k)
    true = assert_predicts(table, closed_forms(loss, penalty, np.array(case.iterates[k])), truth)
    assert np.all(true[[IMPLICIT, JACOBI, DIAGONAL, EXP]] > 3e-5)  # there is something to predict
    if case is RIDGE:  # where Newton's step ends at the solution
        assert table.relative_error[NEWTON] < 1e-12
        assert np.argmin(table.relative_error) == NEWTON
    else:
        # Two Newton steps are needed to see the error of one: of size distance^2.
        assert 0.04 < table.relative_error[NEWTON] / 0.1 ** (2 * (k + 1)) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("k", range(3))
def test_a_correction_that_is_worse_than_none_is_seen(k):
    names = ("vanilla", "jacobi", "newton", "diagonal_change", "exp_change")
    stored = [np.linalg.norm(RIDGE.estimates[name][k] - RIDGE.exact) for name in names]
    table = table_at(RIDGE, k)
    assert stored[JACOBI] > 1.2 * stored[IMPLICIT]
    ratio = table.absolute_error[JACOBI] / table.absolute_error[IMPLICIT]
    assert ratio == pytest.approx(stored[JACOBI] / stored[IMPLICIT], rel=0.1)
    np.testing.assert_allclose(table.absolute_error, stored, rtol=0.1, atol=1e-12)


@pytest.mark.slow
def test_pytrees_an_integer_leaf_and_a_jacobian_without_symmetry():
    F, solution = FIXED_POINT.optimality, np.asarray(estimators.solution(FIXED_POINT))
    u = solution + 0.02 * np.array([1.0, -0.5, 0.8, -1.2])
    value, F_1, F_2 = estimators.partials(F, u)
    assert np.linalg.norm(F_1 - F_1.T) > 0.1
    P, _, P_2 = estimators.partials(lambda u, w: jnp.diagonal(jax.jacobian(F)(u, w)), u)

    def implicit(u):
        return estimators.hypergradient(estimators.implicit(F, u), u)

    def changed(first, second):  # by a change that adds terms to F_1 and F_2
        return estimators.hypergradient(-np.linalg.solve(F_1 + first, F_2 + second), u)

    estimates = [
        implicit(u),
        implicit(u - value / P),
        implicit(estimators.corrected(F, None, u)),
        changed(0, -P_2 * (value / P)[:, None]),
        changed(np.diag(value / u), 0),
    ]
    table = recommend(
        estimators.outer_on_trees,
        FIXED_POINT.problem,
        estimators.like_x(u),
        estimators.Y,
        bx.RelativeAccuracy(1e-2),
        linear_solver=DENSE,
    )
    true = assert_predicts(table, estimates, implicit(solution))
    assert np.all(true > 1e-6)
    # By hand: 7 products for a dense solve, 4 for a diagonal, 1 for the residual of a JacobiStep.
    assert table.cost.tolist() == [
        2 * 7 + 2,
        1 + 2 * (4 + 1) + 2 * 7 + 2,
        1 + 2 * 7 + 2 * 7 + 2,
        2 * 4 + 2 * 4 + 2 * 7 + 2,
        2 * 7 + 2,
    ]
    good = true <= 1e-2
    assert table.accurate.tolist() == good.tolist()
    assert table.cheapest == np.argmin(np.where(good, table.cost, np.inf))


def test_float32(monkeypatch):
    monkeypatch.setattr(_recommend, "_CANDIDATES", _recommend._CANDIDATES[:3])
    matrix = np.diag(Y) + 0.5
    solution = np.linalg.solve(matrix, np.ones(3))
    x = np.float32(solution + np.array([0.05, -0.02, 0.03]))
    u = np.asarray(x, np.float64)

    def implicit(u):
        return -u * np.linalg.solve(matrix, u**2)

    jacobi = u - (matrix @ u - 1) / np.diagonal(matrix)
    table = recommend(
        cubic,
        bx.minimum(Partial(family, np.float32([1.0, 0.0]))),
        x,
        np.float32(Y),
        bx.RelativeAccuracy(1e-4),
        linear_solver=DENSE,
    )
    truth = implicit(solution)
    assert_predicts(table, [implicit(u), implicit(jacobi), truth], truth, floor=2e-6)
    assert table.accurate.tolist() == [False, False, True]
    assert table.cheapest == NEWTON


# Costs, for a linear solver whose products are known.

NEAR = 1 / Y + np.array([0.1, 0.05, -0.1])


def test_costs_are_those_counted_by_hand():
    table = small_table(NEAR)
    # Three eigenvalues are three steps of CG, and one product measures the residual.
    solve, extra = 4, 2
    assert table.cost.tolist() == [
        2 * solve + extra,
        1 + 2 * (3 + 1) + 2 * solve + extra,
        1 + 2 * solve + 2 * solve + extra,
        2 * 3 + 2 * 3 + 2 * solve + extra,
        2 * solve + extra,
    ]


def test_an_entry_at_zero_keeps_the_identity():
    x = NEAR * np.array([0.0, 1.0, 1.0])
    slope, matrix = x**2, Y + np.where(x == 0, 0, (Y * x - 1) / np.where(x == 0, 1, x))
    exact = -((1 / Y) ** 4)
    changed, implicit = -x * slope / matrix, -x * slope / Y
    table = small_table(x)
    assert np.all(table.status == bx.Status.CONVERGED)
    for row, estimate in ((EXP, changed), (IMPLICIT, implicit)):
        true = np.linalg.norm(estimate - exact)
        assert table.absolute_error[row] == pytest.approx(true, rel=1e-6)


# The choice.


@pytest.mark.parametrize(
    ("value", "chosen", "rule"),
    [
        (0.1, IMPLICIT, bx.Implicit(SOLVER)),
        (0.03, EXP, bx.Reparameterized(bx.Implicit(SOLVER), bx.ExpChange())),
        (0.012, JACOBI, bx.Preconditioned(bx.Implicit(SOLVER), bx.JacobiStep())),
        (1e-3, NEWTON, bx.Preconditioned(bx.Implicit(SOLVER), bx.NewtonStep(SOLVER))),
    ],
)
def test_the_cheapest_rule_of_an_accuracy(value, chosen, rule):
    table = coupled_table(FAR, bx.RelativeAccuracy(value))
    assert table.cheapest == chosen and table.rule == rule
    assert table.accurate.tolist() == (table.relative_error <= value).tolist()
    assert table.cost[chosen] == np.min(table.cost[table.accurate])
    assert f"{NAMES[chosen]} is the cheapest with RelativeAccuracy" in str(table)


def test_an_absolute_accuracy_is_in_the_unit_of_the_hypergradient():
    table = coupled_table(FAR)
    for k in (IMPLICIT, JACOBI, NEWTON):
        error, contraction = table.absolute_error[k], table.contraction[k]
        above, below = (
            coupled_table(FAR, bx.AbsoluteAccuracy(factor * error))
            for factor in (1.02 + contraction, 0.9)
        )
        assert above.accurate[k] and not below.accurate[k]


def test_where_none_is_accurate_enough_nothing_is_chosen():
    table = coupled_table(FAR, bx.RelativeAccuracy(1e-6))
    assert table.cheapest == -1 and not np.any(table.accurate)
    message = "none is that accurate at this x: run the inner solver longer"
    assert str(table).splitlines()[-1] == message
    with pytest.raises(ValueError, match=f"There is no rule to recommend: {message}") as error:
        _ = table.rule
    assert str(table) in str(error.value)
    # Nearer to the solution, one is.
    assert coupled_table(NEARER, bx.RelativeAccuracy(1e-6)).cheapest == NEWTON


def test_without_an_accuracy_nothing_is_chosen():
    table = coupled_table(FAR)
    assert table.cheapest == -1 and table.accuracy is None and not np.any(table.accurate)
    assert_fails(ValueError, "no `accuracy` was asked for", lambda: table.rule)
    assert str(table).splitlines()[-1] == "no `accuracy` was asked for"


def test_an_error_of_zero_is_accurate():
    table = small_table(1 / Y, bx.RelativeAccuracy(1e-12))
    assert table.cheapest == IMPLICIT
    assert np.all(table.relative_error < 1e-12)


def test_other_numbers_compile_nothing():
    small_table(NEAR, bx.RelativeAccuracy(1e-2))
    with recorded_compilations() as events:
        small_table(1.01 * NEAR, bx.RelativeAccuracy(1e-3), maxiter=9)
    assert events == []


# Failures.


def test_failed_solves_are_shown_and_not_recommended():
    table = small_table(NEAR, bx.AbsoluteAccuracy(1e9), maxiter=1)
    assert np.all(table.status == bx.Status.MAXITER)
    assert np.all(table.absolute_error < 1e9)  # so it is the status that speaks against them
    assert table.cheapest == -1 and not np.any(table.accurate)
    text = str(table)
    assert text.count("MAXITER") == 5
    assert "a rule that is not CONVERGED is not recommended" in text
    message = "no rule is CONVERGED: try another `linear_solver`, or an x nearer to x*"
    assert text.splitlines()[-1] == message
    assert_fails(ValueError, f"There is no rule to recommend: {message}", lambda: table.rule)


def test_one_failed_solve_leaves_the_others():
    # F_1 + diag(F / x) has the entry 2 y - 1 / x, which is negative for a small x.
    table = small_table(NEAR * np.array([0.1, 1.0, 1.0]), bx.AbsoluteAccuracy(1e9))
    assert table.status.tolist() == [0, 0, 0, 0, bx.Status.INDEFINITE]
    assert table.accurate.tolist() == [True] * 4 + [False]
    assert table.cheapest == IMPLICIT
    # The cost of it would have been no more than that of the one chosen.
    assert table.cost[EXP] <= table.cost[IMPLICIT]
    assert str(table).splitlines()[5].endswith("INDEFINITE")


def test_what_a_rule_loses_by_its_own_solves_is_in_its_error():
    accuracy = bx.RelativeAccuracy(1e-3)
    assert small_table(1 / Y, accuracy).accurate[IMPLICIT]
    # At the solution only the adjoint is wrong: c / (y + damping) in place of c / y.
    slope = 1 / Y**2
    true = np.linalg.norm(slope / Y * (1 / Y - 1 / (Y + 0.3))) / np.linalg.norm(1 / Y**4)
    table = small_table(1 / Y, accuracy, damping=0.3)
    assert table.relative_error[IMPLICIT] == pytest.approx(true, rel=1e-6)
    assert not table.accurate[IMPLICIT]
    loose = small_table(1 / Y, accuracy, rtol=0.3)
    assert loose.status[IMPLICIT] == bx.Status.CONVERGED
    assert loose.relative_error[IMPLICIT] > 1e-2 and not loose.accurate[IMPLICIT]


# What is printed.


def test_the_printed_table():
    table = coupled_table(FAR, bx.RelativeAccuracy(1e-3))
    lines = str(table).splitlines()
    assert lines[0].split() == ["rule", "rel.", "error", "abs.", "error", "cost", "status"]
    assert table.names == NAMES and len(table.rules) == 5
    for k, (name, line) in enumerate(zip(NAMES, lines[1:6], strict=True)):
        relative, absolute = table.relative_error[k], table.absolute_error[k]
        wanted = f"{name} {relative:.1e} {absolute:.1e} {table.cost[k]:.0f} CONVERGED"
        assert line.split() == wanted.split()
    assert lines[6:] == ["NewtonStep is the cheapest with RelativeAccuracy(value=0.001)"]
    # Columns end where their titles end.
    for title in ("rel. error", "abs. error", "cost"):
        end = lines[0].index(title) + len(title)
        assert all(line[end - 1] != " " and line[end] == " " for line in lines[1:6])


def test_products_that_are_not_counted(monkeypatch):
    monkeypatch.setattr(_recommend, "_CANDIDATES", _recommend._CANDIDATES[:2])

    def table(value):
        accuracy = bx.RelativeAccuracy(value)
        problem = bx.minimum(Partial(family, np.array([1.0, 0.0])))
        return recommend(cubic, problem, near, Y, accuracy, linear_solver=bx.BiCGStab())

    near = np.linalg.solve(np.diag(Y) + 0.5, np.ones(3)) + np.array([0.1, 0.05, -0.1])
    both = table(10.0)
    one = table(float(np.sqrt(np.prod(both.relative_error))))
    assert np.all(np.isnan(both.cost)) and np.all(both.status == 0)
    # Which of two is cheaper is not known, but one alone is the cheapest.
    assert both.accurate.tolist() == [True, True] and both.cheapest == -1
    text = str(both).splitlines()
    assert [line.split()[-2] for line in text[1:3]] == ["unknown", "unknown"]
    assert text[3] == "cost unknown: the linear solver does not count its products"
    assert text[4] == "the cheapest of Implicit, JacobiStep is not known"
    assert_fails(ValueError, "the cheapest of Implicit, JacobiStep", lambda: both.rule)
    best = int(np.argmin(both.relative_error))
    assert np.flatnonzero(one.accurate).tolist() == [best] and one.cheapest == best


# Wrong arguments.


def at_point(x=NEAR, y=Y, accuracy=None, outer=cubic, problem=None, **options):
    problem = bx.minimum(small) if problem is None else problem
    return recommend(outer, problem, x, y, accuracy, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"outer": 3}, "`outer` must be a function, got 3"),
        ({"problem": small}, "`problem` must be a Problem, for example `minimum(objective)`"),
        ({"x": np.array([1, 2])}, "`x` must be a floating array to be solved for, got dtype int64"),
        ({"y": np.array([1, 2, 3])}, "`y` must have floating entries, got int64[3]."),
        ({"accuracy": 1e-3}, "`accuracy` must be an Accuracy, for example"),
        ({"accuracy": bx.RelativeAccuracy}, "Did you forget the parentheses?"),
        ({"linear_solver": "cg"}, "`linear_solver` must be a LinearSolver, for example `CG()`"),
        ({"outer": lambda x, y: x}, "`outer` must return a scalar, got float64[3]"),
        ({"problem": bx.minimum(lambda x, y: x)}, "`objective` must return a scalar"),
    ],
)
def test_wrong_arguments(arguments, message):
    assert_fails(TypeError, message, lambda: at_point(**arguments))


@pytest.mark.parametrize("transform", [jax.jit, jax.grad, lambda f: jax.vmap(lambda v: f(v[0]))])
@pytest.mark.parametrize("name", ["x", "y"])
def test_a_traced_point_is_refused(transform, name):
    def function(value):
        at_point(**{name: value * np.ones(3)})
        return 0.0

    value = np.ones((2, 1)) if "lambda" in getattr(transform, "__name__", "") else 1.0
    message = (
        "`recommend_rule` decides in Python, so it cannot run inside of `jax.jit`, `jax.grad` or "
        f"`jax.vmap`, but `{name}` is traced."
    )
    assert_fails(TypeError, message, transform(function), value)


def test_everything_else_that_is_traced_is_refused():
    message = "but something else, or what a function closes over, is traced"
    calls = [
        lambda a: at_point(outer=lambda x, y: a * jnp.sum(x)),
        lambda a: at_point(problem=bx.minimum(Partial(lambda b, x, y: b * small(x, y), a))),
        lambda a: at_point(accuracy=bx.RelativeAccuracy(a)),
    ]
    for call in calls:
        assert_fails(TypeError, message, jax.jit(lambda a, call=call: call(a) and 0.0), 1.0)
