"""Iterative rules and separable problems with arguments that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from tests.bad_input.example import X0, Y, assert_fails, engine, quadratic, solve_map


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bx.Unrolled(0), ValueError, "`last` must be positive, got 0."),
        (lambda: bx.Unrolled(-3), ValueError, "`last` must be positive, got -3."),
        (lambda: bx.Unrolled(2.5), TypeError, "`last` must be a whole number, got 2.5."),
        (lambda: bx.Unrolled("all"), TypeError, "`last` must be a number, got 'all'."),
        (
            lambda: bx.Unrolled(checkpoints=0),
            ValueError,
            "`checkpoints` must be positive, got 0.",
        ),
        (
            lambda: bx.Unrolled(checkpoints=2.5),
            TypeError,
            "`checkpoints` must be a whole number, got 2.5.",
        ),
        (
            lambda: bx.Unrolled(checkpoints="foo"),
            ValueError,
            "`checkpoints` must be a whole number, \"sqrt\" or None, got 'foo'.",
        ),
        (
            lambda: bx.Unrolled(mode="x"),
            ValueError,
            '`mode` must be "reverse" or "forward", got \'x\'.',
        ),
        (
            lambda: bx.Preconditioned(bx.Unrolled(), bx.NewtonStep()),
            TypeError,
            "`rule` must be a Rule, for example `Implicit()`; got Unrolled(",
        ),
        (
            lambda: bx.Reparameterized(bx.OneStep(), bx.ExpChange()),
            TypeError,
            "`rule` must be a Rule, for example `Implicit()`; got OneStep(",
        ),
        (
            lambda: bx.implicit_function(
                bx.minimum(quadratic), lambda x0, y: 1 / y, rule=bx.Unrolled()
            ),
            TypeError,
            "`rule` must be a Rule, for example `Implicit()`; got Unrolled(",
        ),
        (
            lambda: engine(rule=bx.Unrolled(), accuracy=bx.RelativeAccuracy(1e-2)),
            TypeError,
            "`accuracy` needs a rule with certificates, such as `Implicit()`; got Unrolled(",
        ),
        (
            lambda: engine(rule=bx.OneStep(), accuracy=bx.AbsoluteAccuracy(1e-2)),
            TypeError,
            "`accuracy` needs a rule with certificates, such as `Implicit()`; got OneStep(",
        ),
    ],
)
def test_rules_out_of_their_range_or_place(call, error, message):
    assert_fails(error, message, call)


def test_positional_arguments_beyond_the_number_of_steps():
    with pytest.raises(TypeError, match="positional argument"):
        bx.Unrolled(3, "sqrt")


@pytest.mark.parametrize("rule", [bx.Unrolled, bx.OneStep])
def test_classes_in_place_of_instances(rule):
    for make in (solve_map, engine):
        assert_fails(TypeError, "Did you forget the parentheses?", lambda m=make: m(rule=rule))


def test_more_last_steps_than_a_run_can_have():
    message = "`last` must not exceed the run: 4 steps of at most 3 (`maxiter` of the solver)."
    solver = bx.GradientDescent(0.5, maxiter=3)
    assert_fails(ValueError, message, lambda: solve_map(solver=solver, rule=bx.Unrolled(4)))
    assert_fails(ValueError, message, lambda: engine(solver=solver, rule=bx.Unrolled(4)))
    solve_map(solver=solver, rule=bx.Unrolled(3))


@pytest.mark.parametrize("rule", [bx.Unrolled(), bx.Unrolled(2), bx.Unrolled(2, mode="forward")])
def test_a_number_of_steps_that_is_traced(rule):
    message = (
        "`Unrolled` must know how long a run can be: `maxiter` of the solver must be a Python int, "
        "got JitTracer("
    )

    @jax.jit
    def run(steps):
        return solve_map(solver=bx.GradientDescent(0.5, maxiter=steps), rule=rule)(X0, Y)

    assert_fails(TypeError, message, run, 3)

    @jax.jit
    def run_engine(steps):
        solver = bx.GradientDescent(0.5, maxiter=steps)
        return engine(solver=solver, rule=rule)(Y, bx.cold_start(X0)).value

    assert_fails(TypeError, message, run_engine, 3)


def test_a_number_of_steps_that_is_whole_but_no_int():
    for steps in (np.int64(3), jnp.asarray(3)):
        solver = bx.GradientDescent(0.5, rtol=0.0, atol=0.0, maxiter=steps)
        _, report = solve_map(solver=solver, rule=bx.Unrolled()).with_report(X0, Y)
        assert report.iterations == 3


def test_reverse_mode_through_a_rule_of_forward_mode():
    solve = solve_map(rule=bx.Unrolled(mode="forward"))
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.grad(lambda y: jnp.sum(solve(X0, y)))(Y)


def test_solvers_that_need_an_objective():
    root = bx.root(lambda x, y: y * x - 1)
    for rule in (bx.Unrolled(), bx.OneStep()):
        message = "`ConjugateGradient` evaluates an objective and needs `minimum(...)`, got"
        assert_fails(TypeError, message, solve_map(root, bx.ConjugateGradient(), rule), X0, Y)


def test_an_objective_that_is_no_scalar():
    problem = bx.minimum(lambda x, y: x)
    for rule in (bx.Unrolled(), bx.OneStep()):
        message = "`objective` must return a scalar, got float64[2]."
        assert_fails(TypeError, message, solve_map(problem, rule=rule), X0, Y)
        one = engine(problem=problem, rule=rule)
        assert_fails(TypeError, message, one, Y, bx.cold_start(X0))


# Separable problems.


def shifted(x, y, data):
    return jnp.sum((x - y * data) ** 2) / 2


TASK = bx.minimum(shifted)
SEPARABLE = bx.separable(TASK, np.ones(3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: bx.separable(shifted, np.ones(3)),
            TypeError,
            "`problem` must be a Problem, for example `minimum(objective)`; got <function",
        ),
        (
            lambda: bx.separable(SEPARABLE, np.ones(3)),
            TypeError,
            "`problem` must be the problem of a single task, got a separable one.",
        ),
        (
            lambda: bx.separable(TASK, {"a": np.ones(3), "b": 2.0}),
            TypeError,
            "`tasks['b']` must have a leading axis, one entry per task; got float64[].",
        ),
        (
            lambda: bx.separable(TASK, 1.0),
            TypeError,
            "`tasks` must have a leading axis, one entry per task; got float64[].",
        ),
        (
            lambda: bx.separable(TASK, [1.0, 2.0]),
            TypeError,
            "`tasks[0]` must have a leading axis, one entry per task; got float64[].",
        ),
        (
            lambda: bx.separable(TASK, (np.ones(3), np.ones((2, 3)))),
            ValueError,
            "with one common leading axis that is not empty, got (float64[3], float64[2, 3]).",
        ),
        (
            lambda: bx.separable(TASK, np.ones((0, 3))),
            ValueError,
            "with one common leading axis that is not empty, got float64[0, 3].",
        ),
        (lambda: bx.separable(TASK, {}), ValueError, "that is not empty, got {}."),
        (lambda: bx.separable(TASK, None), ValueError, "that is not empty, got None."),
        (
            lambda: engine(problem=SEPARABLE, accuracy=bx.RelativeAccuracy(1e-2)),
            TypeError,
            "`problem` must not be separable here: certificates judge one inner problem. "
            "Certify single tasks: `minimum(lambda x, y: f(x, y, task))`.",
        ),
    ],
)
def test_separable_problems_that_do_not_fit(call, error, message):
    assert_fails(error, message, call)


def test_an_x_without_the_axis_of_the_tasks():
    message = "`x` must have a leading axis of 3, one entry per task; got float64[2]."
    for rule in (None, bx.Unrolled(), bx.OneStep()):
        assert_fails(TypeError, message, solve_map(SEPARABLE, rule=rule), np.zeros(2), 1.0)
        one = engine(problem=SEPARABLE, rule=rule)
        assert_fails(TypeError, message, one, 1.0, bx.cold_start(np.zeros(2)))
    assert_fails(
        TypeError, message, bx.Implicit().pullback, SEPARABLE, np.zeros(2), 1.0, np.zeros(2)
    )
    message = "`x['b']` must have a leading axis of 3, one entry per task; got float64[]."
    problem = bx.separable(bx.minimum(lambda x, y, d: jnp.sum(x["a"] ** 2) * d), np.ones(3))
    assert_fails(TypeError, message, solve_map(problem), {"a": np.ones(3), "b": 1.0}, 1.0)


def test_a_function_of_a_task_that_does_not_fit():
    vector = bx.separable(bx.minimum(lambda x, y, d: x), np.ones(3))
    message = "`objective` must return a scalar, got float64[2]."
    assert_fails(TypeError, message, solve_map(vector), np.zeros((3, 2)), 1.0)
    root = bx.separable(bx.root(lambda x, y, d: x[:1]), np.ones(3))
    message = "`residual` must return shapes and dtypes like `x`: `x` is float64[2], got float64[1]"
    assert_fails(TypeError, message, solve_map(root), np.zeros((3, 2)), 1.0)
    two_arguments = bx.separable(bx.minimum(quadratic), np.ones(3))
    with pytest.raises(TypeError, match="positional arguments"):
        solve_map(two_arguments)(np.zeros(3), 1.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda g, x: bx.hypergradient_error(g, SEPARABLE, bx.Implicit(), x, 1.0),
        lambda g, x: bx.efficiency_constant(g, SEPARABLE, bx.Implicit(), x, 1.0),
        lambda g, x: bx.recommend_rule(g, SEPARABLE, x, 1.0, bx.RelativeAccuracy(1e-2)),
    ],
    ids=["hypergradient_error", "efficiency_constant", "recommend_rule"],
)
def test_certificates_judge_one_inner_problem(call):
    message = "`problem` must not be separable here: certificates judge one inner problem."
    assert_fails(TypeError, message, call, lambda x, y: jnp.sum(x), np.ones(3))


@pytest.mark.parametrize("rule", [bx.Unrolled(), bx.OneStep()], ids=lambda r: type(r).__name__)
def test_certificates_need_a_rule_with_an_adjoint(rule):
    problem = bx.minimum(quadratic)
    message = "`rule` must be a Rule, for example `Implicit()`; got"
    for call in (bx.hypergradient_error, bx.efficiency_constant):
        assert_fails(TypeError, message, call, lambda x, y: jnp.sum(x), problem, rule, X0, Y)


def test_a_check_in_forward_mode():
    problem = bx.minimum(lambda x, y: (x - y) ** 2)
    solve = bx.solution_map(problem, bx.GradientDescent(0.1), bx.Unrolled(mode="forward"))
    with pytest.raises(TypeError, match="`solve` must go in reverse mode"):
        bx.check_hypergradient(lambda x, y: x, solve, 1.0, 0.0)
