"""The check of hypergradients against closed forms, and of what it must not let pass."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import bilevax as bx
from bilevax.diagnostics import assert_hypergradient, check_hypergradient
from tests.bad_input.example import assert_fails
from tests.test_compilation import Counted, recorded_compilations

C = np.array([1.0, -2.0, 0.5])
X0, Y = np.zeros(3), np.array([0.5, 1.5, 1.0])


def quadratic(x, y):
    return jnp.sum(y * x**2 / 2 - x)  # x* = 1 / y


def linear(x, y):
    return jnp.asarray(C, x.dtype) @ x  # h = C . (1 / y)


def solution_map(solver=None, rule=None, problem=None, **options):
    problem = bx.minimum(quadratic) if problem is None else problem
    return bx.solution_map(problem, bx.Newton() if solver is None else solver, rule, **options)


@functools.cache
def unit_vectors():
    """Return the three directions of seed 0 at Y as columns: <d, e_k> is the derivative of y_k."""

    def entry(k, x, y):
        return y[k] + 0 * x[0]

    checks = [check_hypergradient(Partial(entry, k), solution_map(), Y, X0) for k in range(3)]
    return np.stack([check.difference for check in checks])


# Agreement with closed forms. In one dimension the unit vectors are 1 and -1.


@pytest.mark.parametrize(
    ("problem", "truth"),
    [
        (bx.minimum(lambda x, y: 0.5 * y * x**2 - x), -2 / 0.8**3 + 3),
        (bx.root(lambda x, y: x * y - 1), -2 / 0.8**3 + 3),
        (bx.fixed_point(lambda x, y: x - 0.4 * (y * x - 1)), -2 / 0.8**3 + 3),
    ],
    ids=["minimum", "root", "fixed_point"],
)
def test_a_closed_form_in_one_dimension(problem, truth):
    solver = bx.FixedPointIteration(0.9) if "Fixed" in type(problem).__name__ else None
    solve = solution_map(solver, problem=problem)
    check = check_hypergradient(lambda x, y: x**2 + 3 * y, solve, 0.8, 0.0, directions=4)
    for got in (check.derivative, check.difference):
        np.testing.assert_allclose(np.abs(got), np.full(4, abs(truth)), rtol=1e-8)
        assert set(np.sign(got)) == {-1.0, 1.0}  # both unit vectors
    np.testing.assert_array_equal(np.sign(check.derivative), np.sign(check.difference))
    assert np.all(np.abs(np.abs(check.difference) - abs(truth)) <= 2 * check.error)
    assert np.all(check.error < 1e-8) and np.all(check.relative_error < 1e-8)
    assert np.all(check.status == bx.Status.CONVERGED) and np.all(check.residual < 1e-12)
    assert np.all((check.step > 0) & (check.step <= 0.2))
    assert check.agrees() and check.agrees(1e-8)
    np.testing.assert_allclose(check.unit, (1 / 0.8**2 + 2.4) / 0.8, rtol=1e-10)


def test_vectors():
    check = check_hypergradient(linear, solution_map(), Y, X0, directions=5, seed=3)
    assert check.agrees(1e-8) and np.all(check.relative_error < 1e-8)
    assert check.derivative.shape == (5,) and len(set(check.derivative)) == 5
    # Unit vectors cannot see more than the norm of the gradient, -C / y^2.
    assert np.all(np.abs(check.derivative) < np.linalg.norm(C / Y**2))
    again = check_hypergradient(linear, solution_map(), Y, X0, directions=5, seed=3)
    np.testing.assert_array_equal(again.difference, check.difference)
    other = check_hypergradient(linear, solution_map(), Y, X0, directions=5, seed=4)
    assert not np.any(other.derivative == check.derivative)


def test_directions_are_unit_vectors():
    np.testing.assert_allclose(np.linalg.norm(unit_vectors(), axis=0), np.ones(3), rtol=1e-9)


def test_an_exact_map_of_first_order_solvers_agrees():
    for solver in (bx.GradientDescent(0.6), bx.FixedPointIteration(0.6, memory=2)):
        assert check_hypergradient(linear, solution_map(solver), Y, X0).agrees(1e-8)
    forward = solution_map(rule=bx.Implicit(mode="forward"))
    assert check_hypergradient(linear, forward, Y, X0).agrees(1e-8)


def test_pytrees_with_leaves_that_stay_fixed():
    def objective(x, y):
        curvature = jnp.exp(y["log"]) * y["power"]
        noise = jax.random.normal(y["key"], (2,))
        return jnp.sum(curvature * x["w"] ** 2 / 2 - (y["shift"] + noise) * x["w"])

    def outer(x, y):
        return jnp.sum(x["w"] ** 2) + y["shift"] ** 3 * y["power"]

    y = {"log": np.array([-2.0, 0.3]), "shift": 0.7, "power": np.array(3), "key": jax.random.key(1)}
    solve = solution_map(problem=bx.minimum(objective))
    x0 = {"w": np.zeros(2), "empty": np.zeros(0)}
    check = check_hypergradient(outer, solve, y | {"none": np.zeros(0)}, x0, directions=2)
    assert check.agrees(1e-8) and np.all(check.relative_error < 1e-8)
    # Of y only its size counts: ||(log, shift)||.
    w = (0.7 + np.asarray(jax.random.normal(y["key"], (2,)))) / (3 * np.exp(y["log"]))
    size = np.sqrt(np.sum(y["log"] ** 2) + 0.7**2)
    np.testing.assert_allclose(check.unit, (np.sum(w**2) + 3 * 0.7**3) / size, rtol=1e-8)


def test_every_leaf_moves_in_proportion_to_its_size():
    # One step for both leaves would be 1e6 times too long for one of them, whose log ends at 0.
    def outer(x, y):
        return jnp.log(y["small"]) + y["large"] * 1e-3 + x

    solve = solution_map(problem=bx.minimum(lambda x, y: (x - y["large"] / 1e3) ** 2))
    check = check_hypergradient(outer, solve, {"small": 1e-3, "large": 1e3}, 0.0)
    assert check.agrees(1e-8)
    assert np.all(np.isfinite(check.difference)) and np.all(check.error < 1e-8)


def test_a_zero_moves_by_steps_of_size_one():
    solve = solution_map(problem=bx.minimum(lambda x, y: (x - jnp.sin(y)) ** 2))
    check = check_hypergradient(lambda x, y: x, solve, np.zeros(()), 0.0, directions=1)
    np.testing.assert_allclose(np.abs(check.difference), 1.0, rtol=1e-10)
    assert 1e-4 < check.step[0] < 0.2


def test_steps_out_of_the_domain_are_left_out():
    # A curvature of NaN for longer steps.
    problem = bx.minimum(lambda x, y: jnp.sqrt(y - 0.95) * x**2 / 2 - x)
    check = check_hypergradient(lambda x, y: x, solution_map(problem=problem), 1.0, 0.0)
    np.testing.assert_allclose(np.abs(check.difference), 0.5 * 0.05**-1.5, rtol=1e-6)
    assert np.all(check.status == bx.Status.CONVERGED) and check.agrees(1e-4)
    assert np.all(check.step < 0.05)


@pytest.mark.parametrize("solver", [bx.Newton(), bx.GradientDescent(0.6)], ids=["newton", "gd"])
def test_float32(solver):
    y, x0 = Y.astype(np.float32), X0.astype(np.float32)
    check = check_hypergradient(linear, solution_map(solver), y, x0)
    exact = check_hypergradient(linear, solution_map(), Y, X0)
    assert check.agrees() and check.epsilon == 2.0**-23
    # The difference is crude, says so, and an error that it explains is none.
    wrong = np.abs(check.difference - exact.derivative)
    assert np.all(wrong <= check.error + 1e-6 * np.abs(exact.derivative))
    assert np.all((check.error > 1e-7) & (check.error < 1e-3))
    assert check.agrees(1e-6)
    assert not check._replace(derivative=1.01 * check.derivative).agrees(1e-4)


def test_the_least_precise_of_all_arrays_counts():
    solve = solution_map(problem=bx.minimum(lambda x, y: jnp.sum(y.astype(x.dtype) * x**2 / 2 - x)))
    check = check_hypergradient(lambda x, y: jnp.sum(x), solve, Y.astype(np.float32), X0)
    assert check.epsilon == 2.0**-23 and check.agrees()


# What is wrong, and by how much.


def test_a_loose_map_is_wrong_by_a_known_amount():
    # After t steps of rate r from 0: x = (1 - (1 - r y)^t) / y, and the rule's dx/dy is -x / y.
    rate, steps = 0.4, 3
    solve = solution_map(bx.GradientDescent(rate, maxiter=steps))
    left = (1 - rate * Y) ** steps
    check = check_hypergradient(linear, solve, Y, X0)
    exact = check_hypergradient(linear, solution_map(), Y, X0)
    np.testing.assert_allclose(check.difference, exact.difference, rtol=1e-8)  # of x*, not of x
    assert np.all(check.status == bx.Status.CONVERGED)
    # The gradient is too small by left * C / y^2.
    amount = (left * C / Y**2) @ unit_vectors()
    np.testing.assert_allclose(check.derivative - check.difference, amount, rtol=1e-7)
    size = np.maximum(np.abs(check.derivative), np.abs(check.difference))
    np.testing.assert_allclose(check.relative_error, np.abs(amount) / size, rtol=1e-7)
    assert not check.agrees()
    assert check.agrees(rtol=1.01 * np.max(check.relative_error))
    assert not check.agrees(rtol=0.99 * np.max(check.relative_error))


def test_the_correction_of_a_rule_is_not_in_the_differences():
    # It moves the solution away.
    rule = bx.Preconditioned(bx.Implicit(), lambda x, y, v: v + 0.1)
    check = check_hypergradient(linear, solution_map(rule=rule), Y, X0)
    exact = check_hypergradient(linear, solution_map(), Y, X0)
    np.testing.assert_allclose(check.difference, exact.difference, rtol=1e-10)
    assert not check.agrees(1e-3)


def test_a_newton_step_makes_a_loose_map_agree():
    rule = bx.Preconditioned(bx.Implicit(), bx.NewtonStep())
    solve = solution_map(bx.GradientDescent(0.4, maxiter=3), rule)
    assert check_hypergradient(linear, solve, Y, X0).agrees(1e-8)


def test_an_adjoint_cut_short_is_caught():
    rule = bx.Implicit(bx.CG(maxiter=1))
    solve = solution_map(rule=rule, on_failure=bx.OnFailure.RETURN)
    check = check_hypergradient(linear, solve, Y, X0)
    assert not check.agrees(1e-2) and np.all(np.isfinite(check.derivative))
    # By default it is NaN, which never agrees.
    check = check_hypergradient(linear, solution_map(rule=rule), Y, X0)
    assert np.all(np.isnan(check.derivative)) and np.all(np.isfinite(check.difference))
    assert np.all(np.isnan(check.relative_error))
    assert not check.agrees(rtol=1e6)
    message = "nan by the rule and "
    assert_disagrees(message, linear, solution_map(rule=rule), Y, X0)
    assert_disagrees("a derivative is not finite", linear, solution_map(rule=rule), Y, X0)


def test_black_boxes():
    right = bx.implicit_function(bx.minimum(quadratic), lambda x0, y: 1 / y)
    check = check_hypergradient(linear, right, Y, X0)
    assert check.agrees(1e-8) and np.all(check.status == bx.Status.TRUNCATED)
    assert np.all(check.residual < 1e-14)
    # This one solves another problem, with x* = 1 / y + y.
    wrong = bx.implicit_function(bx.minimum(quadratic), lambda x0, y: 1 / y + y)
    check = check_hypergradient(linear, wrong, Y, X0)
    assert not check.agrees(1e-2) and np.all(check.residual > 0.1)


def test_a_black_box_is_called_as_it_is():
    # From x0, always: one step that depends on where it starts.
    def one_step(x0, y):
        return x0 - 0.4 * (y * x0 - 1)

    solve = bx.implicit_function(bx.minimum(quadratic), one_step)
    check = check_hypergradient(lambda x, y: jnp.sum(x), solve, np.ones(1), np.full(1, 2.0))
    np.testing.assert_allclose(np.abs(check.difference), 0.8, rtol=1e-10)


def test_a_random_black_box_tells_nothing():
    random = np.random.default_rng(0)

    def noisy(x0, y):
        def on_host(y):
            return np.asarray((1 + 1e-3 * random.normal()) / y)

        return jax.pure_callback(on_host, jax.ShapeDtypeStruct((), y.dtype), y)

    solve = bx.implicit_function(bx.minimum(lambda x, y: y * x**2 / 2 - x), noisy)
    check = check_hypergradient(lambda x, y: x, solve, 1.0, 0.0)
    assert np.all(np.abs(np.abs(check.difference) - 1) <= check.error)
    assert np.all(check.error > 1e-3) and not check.agrees()
    assert check.agrees(rtol=np.max(check.error))
    message = "leaves the difference meaningless"
    assert_disagrees(message, lambda x, y: x, solve, 1.0, 0.0)


def test_a_derivative_of_zero_agrees_with_noise():
    # h = sin^2 + cos^2 + x (1 - y x) is constant to rounding.
    def outer(x, y):
        return jnp.sin(y) ** 2 + jnp.cos(y) ** 2 + x * (1 - y * x)

    solve = solution_map(problem=bx.minimum(lambda x, y: y * x**2 / 2 - x))
    check = check_hypergradient(outer, solve, 0.7, 0.0)
    assert np.all(np.abs(check.derivative) < 1e-8) and np.all(np.abs(check.difference) < 1e-8)
    assert check.agrees(1e-6)
    check = check_hypergradient(lambda x, y: jnp.zeros(()), solve, 0.7, 0.0)
    assert check.agrees(0.0) and np.all(check.relative_error == 0)


# Inner problems that cannot be solved anew.


@pytest.mark.parametrize(
    ("problem", "solver", "status"),
    [
        # The gradient flattens out: no 10 000 steps reach the tolerance.
        (bx.minimum(lambda x, y: (x - y) ** 4), bx.GradientDescent(1e-4), bx.Status.MAXITER),
        (bx.root(lambda x, y: x**2 + y), bx.Newton(bx.Dense()), bx.Status.STALLED),
        (bx.minimum(lambda x, y: -y * x**2), bx.GradientDescent(1.0), bx.Status.DIVERGED),
        (bx.root(lambda x, y: jnp.log(x) + y), bx.GradientDescent(9.0), bx.Status.NONFINITE),
    ],
)
def test_inner_solves_that_do_not_converge_are_reported(problem, solver, status):
    solve = solution_map(solver, bx.Implicit(bx.Dense()), problem, on_failure=bx.OnFailure.RETURN)
    check = check_hypergradient(lambda x, y: x, solve, 2.0, 1.0, directions=1)
    np.testing.assert_array_equal(check.status, [status])
    assert not check.agrees(rtol=1e6)
    assert status.name in str(check)
    if np.isfinite(check.derivative + check.difference):
        reason = f"the inner problem was not solved anew ({status.name}: {status.remedy})"
        assert_disagrees(reason, lambda x, y: x, solve, 2.0, 1.0, rtol=1e6, directions=1)


def test_a_solver_that_rounding_stops_early_has_converged():
    # ||F|| never falls below 1e-12, where a solver is told to reach 4e-15.
    def residual(x, y):
        return x - y + jnp.where(x > y, 1e-12, -1e-12)

    solve = solution_map(bx.GradientDescent(0.5, rtol=1e-9), problem=bx.root(residual))
    check = check_hypergradient(lambda x, y: x**2, solve, 2.0, 0.0, directions=1)
    assert check.residual[0] >= 1e-12
    assert check.status[0] == bx.Status.CONVERGED and check.agrees()


def test_solves_that_converged_are_preferred():
    # For steps above 0.05, x hardly moves: differences of zero, in perfect agreement.
    def residual(x, y):
        return jnp.where(jnp.abs(y - 1) > 0.05, 1e-9 * (x - 7), x - 3 * y**3)

    solve = solution_map(bx.GradientDescent(0.5), problem=bx.root(residual))
    check = check_hypergradient(lambda x, y: x, solve, 1.0, 3.0, directions=1)
    np.testing.assert_allclose(np.abs(check.difference), 9.0, rtol=1e-8)
    assert check.status[0] == bx.Status.CONVERGED and check.agrees()


@pytest.mark.parametrize(("dtype", "solves"), [(np.float64, 20), (np.float32, 12)])
def test_the_number_of_inner_solves(dtype, solves):
    starts = []

    def solve_fn(x0, y):
        def on_host(x0, y):
            starts.append(float(y))
            return np.asarray(1 / y, x0.dtype)

        return jax.pure_callback(on_host, x0, x0, y)

    solve = bx.implicit_function(bx.minimum(lambda x, y: y * x**2 / 2 - x), solve_fn)
    check = check_hypergradient(lambda x, y: x, solve, dtype(2.0), dtype(0.0), directions=2)
    assert check.agrees()
    # One for the gradient, one at y itself.
    assert len(starts) == 2 + 2 * solves
    moves = np.abs(np.array(starts[2 : 2 + solves]) - 2.0)
    np.testing.assert_array_equal(moves, np.repeat(0.25 * 0.5 ** np.arange(solves // 2), 2))


# What is said.


def assert_disagrees(message, *arguments, **options):
    with pytest.raises(AssertionError, match=re.escape(message)):
        assert_hypergradient(*arguments, **options)


def test_the_assertion_names_everything():
    assert_hypergradient(linear, solution_map(), Y, X0)
    assert_hypergradient(linear, solution_map(), Y, X0, rtol=1e-8, directions=2, seed=1)
    loose = solution_map(bx.GradientDescent(0.4, maxiter=3))
    with pytest.raises(AssertionError) as caught:
        assert_hypergradient(linear, loose, Y, X0, rtol=1e-4, directions=2, seed=1)
    check = check_hypergradient(linear, loose, Y, X0, directions=2, seed=1)
    head, *lines = str(caught.value).split("\n")
    assert head == "The hypergradient is in doubt." and len(lines) == 2
    for k, line in enumerate(lines):
        rule, difference = check.derivative[k], check.difference[k]
        assert line == (
            f"Direction {k}: <dh/dy, d> is {rule:.9e} by the rule and {difference:.9e} by "
            f"differences of estimated error {check.error[k]:.1e}; at rtol=1.0e-04, "
            f"they are {abs(rule - difference):.3e} apart."
        )


def test_only_directions_that_disagree_are_named():
    check = check_hypergradient(linear, solution_map(), Y, X0)
    wrong = check._replace(derivative=check.derivative * np.array([1.0, 1.1, 1.0]))
    assert not wrong.agrees()
    assert [text[:12] for text in wrong._objections(None)] == ["Direction 1:"]
    assert f"rtol={2.0 ** (-52 / 3):.1e}" in wrong._objections(None)[0]


def test_it_prints_as_a_table():
    check = check_hypergradient(linear, solution_map(), Y, X0, directions=2)
    head, *rows = str(check).split("\n")
    assert head.split("  ")[-1] == "inner solves" and len(rows) == 2
    for k, row in enumerate(rows):
        cells = row.split()
        assert cells[0] == str(k) and cells[-1] == "CONVERGED"
        np.testing.assert_allclose(float(cells[1]), check.derivative[k], rtol=1e-9)
        np.testing.assert_allclose(float(cells[2]), check.difference[k], rtol=1e-9)
        np.testing.assert_allclose(float(cells[3]), check.error[k], rtol=0.1)
        np.testing.assert_allclose(float(cells[5]), check.step[k], rtol=0.1)


def test_a_second_check_traces_and_compiles_nothing():
    objective, outer = Counted(quadratic), Counted(linear)
    maps = [solution_map(bx.GradientDescent(r), problem=bx.minimum(objective)) for r in (0.5, 0.4)]
    with recorded_compilations() as events:
        check_hypergradient(outer, maps[0], Y, X0)
    assert events
    traced = outer.calls, objective.calls
    with recorded_compilations() as events:
        check_hypergradient(outer, maps[1], 0.9 * Y, X0 + 0.1, seed=2)
    assert events == [] and (outer.calls, objective.calls) == traced


# Wrong arguments.


@pytest.mark.parametrize("function", [check_hypergradient, assert_hypergradient])
@pytest.mark.parametrize(
    ("error", "changes", "message"),
    [
        (TypeError, {"outer": 1.0}, "`outer` must be a function, got 1.0."),
        (
            TypeError,
            {"outer": lambda x, y: x},
            "`outer` must return a scalar, got float64[3].",
        ),
        (
            TypeError,
            {"outer": lambda x, y: jnp.sum(x > 0)},
            "`outer` must return a real floating scalar, got int64[].",
        ),
        (
            TypeError,
            {"solve": quadratic},
            "`solve` must be a SolutionMap, for example `solution_map(problem, Newton())`; got",
        ),
        (TypeError, {"y": np.arange(3)}, "`y` must have floating entries, got int64[3]."),
        (
            TypeError,
            {"y": {"a": np.zeros(0), "k": np.array(1)}},
            "`y` must have floating entries, got {a: float64[0], k: int64[]}.",
        ),
        (TypeError, {"y": np.zeros(3, complex)}, "`y` is complex; only real arrays are supported."),
        (TypeError, {"y": "b"}, "`y` must be an array or a number, got 'b'."),
        (
            TypeError,
            {"x0": np.zeros(3, int)},
            "`x0` must be a floating array to be solved for, got dtype int64.",
        ),
        (ValueError, {"directions": 0}, "`directions` must be positive, got 0."),
        (TypeError, {"directions": 2.5}, "`directions` must be a whole number, got 2.5."),
        (TypeError, {"directions": None}, "`directions` must be a number, got None."),
        (ValueError, {"seed": -1}, "`seed` must not be negative, got -1."),
        (TypeError, {"seed": 0.5}, "`seed` must be a whole number, got 0.5."),
    ],
)
def test_wrong_arguments(function, error, changes, message):
    arguments = {"outer": lambda x, y: jnp.sum(x), "solve": solution_map(), "y": Y, "x0": X0}
    assert_fails(error, message, lambda: function(**(arguments | changes)))


def test_wrong_tolerances():
    message = "`rtol` must not be negative, got -0.1."
    arguments = (linear, solution_map(), Y, X0)
    assert_fails(ValueError, message, lambda: assert_hypergradient(*arguments, rtol=-0.1))
    check = check_hypergradient(*arguments)
    assert_fails(ValueError, message, check.agrees, -0.1)
    assert_fails(TypeError, "`rtol` must be a number, got '1'.", check.agrees, "1")


def test_it_refuses_traced_values():
    solve = bx.solution_map(bx.minimum(lambda x, y: (x - y) ** 2), bx.Newton())

    def inside(y):
        return bx.check_hypergradient(lambda x, y: x, solve, y, 0.0).derivative

    with pytest.raises(TypeError, match=r"cannot run inside of `jax\.jit`"):
        jax.jit(inside)(1.0)
