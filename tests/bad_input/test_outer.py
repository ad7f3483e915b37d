"""Wrong arguments of outer steps, schedules, runs, HOAG and the adapter for SciPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from tests.bad_input.example import X0, Y, assert_fails, engine, quadratic, residual

ENGINE, SGD = engine(), optax.sgd(0.1)
STEP = bx.make_step(ENGINE, SGD)
KEYED = bx.make_step(lambda key: ENGINE, SGD)


def make(first=ENGINE, optimizer=SGD, **options):
    return bx.make_step(first, optimizer, **options)


def minimize(step=STEP, y=Y, x0=X0, steps=2, **options):
    return bx.minimize(step, y, x0, steps, **options)


# Kinds of arguments.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: make(bx.Newton()),
            "`engine` must be an Engine, for example `value_and_hypergradient(...)`; got Newton(",
        ),
        (lambda: make(None), "`engine` must be an Engine"),
        (
            lambda: make(optimizer=optax.sgd),
            "`optimizer` must be a GradientTransformation, for example `optax.adam(0.1)`; got ",
        ),
        (
            lambda: make(schedule=0.1),
            "`schedule` must be a Schedule, for example `Constant(1e-6)`; got 0.1.",
        ),
        (lambda: make(schedule=bx.Adaptive), "Did you forget the parentheses?"),
        (lambda: make(projection=1.0), "`projection` must be a function, got 1.0."),
        (
            lambda: minimize(make(lambda key: bx.Newton())),
            "`engine(key)` must be an Engine, for example `value_and_hypergradient(...)`; got "
            "Newton(",
        ),
        (
            lambda: STEP(STEP.init(Y, X0).y),
            "`state` must be a BilevelState, for example `step.init(y, x0)`; got ",
        ),
        (lambda: STEP.init(np.arange(2), X0), "`y` must be a floating array"),
        (lambda: STEP.init({"a": 1j}, X0), "`y['a']` is complex"),
        (lambda: STEP.init(Y, np.arange(2)), "`x0` must be a floating array to be solved for"),
        (lambda: STEP.init(Y, X0, key=0), "`key` must be a PRNG key from `jax.random.key`, got 0."),
        (
            lambda: STEP.init(Y, X0, key=jax.random.split(jax.random.key(0))),
            "`key` must be a PRNG key from `jax.random.key`, got ",
        ),
        (
            lambda: STEP.init(Y, X0, history=2.5),
            "`history` must be a whole number that is known while tracing, got 2.5.",
        ),
        (
            lambda: make(projection=lambda y: {"y": y}).init(Y, X0),
            "`projection` must return a pytree like `y`, ",
        ),
        (
            lambda: make(projection=lambda y: y[:1]).init(Y, X0),
            "`projection` must return shapes and dtypes like `y`: `y` is float64[2], got "
            "float64[1].",
        ),
        (
            lambda: minimize(
                make(optimizer=optax.GradientTransformation(lambda y: y, lambda u, s, p: (u, ())))
            ),
            "`optimizer` must return a pytree like `its state`, ",
        ),
        (
            lambda: minimize(ENGINE),
            "`step` must be an OuterStep, for example `make_step(engine, optax.adam(0.1))`; got ",
        ),
        (lambda: minimize(steps=None), "`steps` must be a whole number that is known"),
        (lambda: minimize(chunk=1.5), "`chunk` must be a whole number that is known"),
        (lambda: minimize(patience=2.0), "`patience` must be a whole number, got 2.0."),
        (lambda: minimize(patience="a"), "`patience` must be a number, got 'a'."),
        (lambda: minimize(rtol=None), "`rtol` must be a number, got None."),
        (lambda: minimize(callback=1), "`callback` must be a function, got 1."),
        (
            lambda: minimize(checkpoint="runs/1"),
            '`checkpoint` must be a Checkpointer, for example `Checkpoints("runs/1")`; got '
            "'runs/1'.",
        ),
        (lambda: minimize(key=1), "`key` must be a PRNG key from `jax.random.key`, got 1."),
        (
            lambda: minimize(y=np.ones((3, 2)), batched=True, key=1),
            "`key` must be a PRNG key from `jax.random.key`, got 1.",
        ),
        (
            lambda: minimize(y=np.ones((3, 2)), batched=True, key=jax.random.PRNGKey(0)),
            "`key` must be a PRNG key from `jax.random.key`, got Array(",
        ),
        (lambda: bx.hoag(None), "`engine` must be an Engine"),
        (lambda: bx.hoag(ENGINE, first_step=None), "`first_step` must be a number, got None."),
        (lambda: bx.scipy_objective(STEP, Y, X0), "`engine` must be an Engine"),
        (lambda: bx.scipy_objective(ENGINE, np.arange(2), X0), "`y` must be a floating array"),
        (lambda: bx.scipy_objective(ENGINE, Y, np.arange(2)), "`x0` must be a floating array"),
        (lambda: bx.Constant("a"), "`rtol` must be a number, got 'a'."),
        (lambda: bx.Geometric(None), "`first` must be a number, got None."),
        (lambda: bx.Adaptive(every=2.5), "`every` must be a whole number, got 2.5."),
        (lambda: bx.Logarithmic(None), "`kappa` must be a number, got None."),
    ],
)
def test_a_wrong_kind_of_argument_is_named(call, message):
    assert_fails(TypeError, message, call)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bx.Constant(-1e-3), "`rtol` must not be negative, got -0.001."),
        (lambda: bx.Geometric(0.0), "`first` must be positive, got 0.0."),
        (lambda: bx.Geometric(factor=-0.5), "`factor` must be positive, got -0.5."),
        (lambda: bx.Geometric(factor=1.0), "`factor` must be below 1, got 1.0."),
        (lambda: bx.Geometric(smallest=0.0), "`smallest` must be positive, got 0.0."),
        (lambda: bx.Harmonic(power=0), "`power` must be positive, got 0."),
        (lambda: bx.Harmonic(first=-1.0), "`first` must be positive, got -1.0."),
        (lambda: bx.Logarithmic(0.0), "`kappa` must be positive, got 0.0."),
        (lambda: bx.Adaptive(0.0), "`fraction` must be positive, got 0.0."),
        (lambda: bx.Adaptive(1.0), "`fraction` must be below 1, got 1.0."),
        (lambda: bx.Adaptive(every=0), "`every` must be positive, got 0."),
        (lambda: bx.Adaptive(first=0.0), "`first` must be positive, got 0.0."),
        (lambda: STEP.init(Y, X0, history=0), "`history` must be positive, got 0."),
        (lambda: minimize(steps=0), "`steps` must be positive, got 0."),
        (lambda: minimize(chunk=0), "`chunk` must be positive, got 0."),
        (lambda: minimize(patience=0), "`patience` must be positive, got 0."),
        (lambda: minimize(rtol=-1.0), "`rtol` must not be negative, got -1.0."),
        (lambda: minimize(atol=float("nan")), "`atol` must not be negative, got nan."),
        (lambda: minimize(min_improvement=-0.1), "`min_improvement` must not be negative"),
        (lambda: bx.hoag(ENGINE, first_step=0.0), "`first_step` must be positive, got 0.0."),
        (
            lambda: minimize(y={"a": np.ones((3, 2)), "b": np.ones(2)}, batched=True),
            "`y` must have arrays with one common leading axis of runs with `batched=True`, got "
            "{a: float64[3, 2], b: float64[2]}.",
        ),
        (lambda: minimize(y=1.0, batched=True), "with `batched=True`, got float64[]."),
        (lambda: minimize(y=np.ones((0, 2)), batched=True), "got float64[0, 2]."),
    ],
)
def test_a_wrong_number_is_named(call, message):
    assert_fails(ValueError, message, call)


# What does not fit together.

SEPARABLE = engine(
    problem=bx.separable(bx.minimum(lambda x, y, task: task * (x - y[0]) ** 2), np.ones(2))
)
ITERATIVE = engine(
    solver=bx.GradientDescent(0.5, rtol=0.0, atol=0.0, maxiter=3), rule=bx.Unrolled()
)
ACCURATE = engine(accuracy=bx.RelativeAccuracy(0.1))
SCHEDULES = [
    bx.Constant(1e-3), bx.Geometric(), bx.Harmonic(), bx.Logarithmic(2.0), bx.Adaptive(),
]  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_a_schedule_of_tolerances_does_not_fit_runs_and_accuracies(schedule):
    name = type(schedule).__name__
    message = (
        f"`{name}` changes tolerances, and `Unrolled` differentiates a fixed run of the solver; "
        "take `schedule=Constant()`."
    )
    assert_fails(TypeError, message, lambda: make(ITERATIVE, schedule=schedule))
    message = (
        f"`{name}` and the `accuracy` of the engine both say when the inner solver stops; take "
        "`schedule=Constant()`, or an engine without `accuracy`."
    )
    assert_fails(TypeError, message, lambda: make(ACCURATE, schedule=schedule))
    # An engine that is made from a key is known in the step only.
    later = make(lambda key: ACCURATE, schedule=schedule)
    assert_fails(TypeError, message, lambda: later.init(Y, X0))


def test_there_are_no_certificates_of_many_tasks_or_of_runs():
    assert_fails(
        TypeError,
        "`problem` must not be separable here: certificates judge one inner problem.",
        lambda: make(SEPARABLE, schedule=bx.Adaptive()),
    )
    assert_fails(
        TypeError,
        "`certified` needs a rule with certificates, such as `Implicit()`; got Unrolled(",
        lambda: engine(solver=ITERATIVE.solver, rule=bx.Unrolled(), certified=True),
    )
    assert_fails(
        TypeError,
        "`problem` must not be separable here",
        lambda: engine(problem=SEPARABLE.problem, certified=True),
    )


def test_steps_of_some_linear_solvers_are_not_counted():
    schedule = bx.Logarithmic(2.0)
    for linear_solver, name in ((bx.GMRES(), "GMRES"), (bx.Dense(), "Dense")):
        with_it = engine(rule=bx.Implicit(linear_solver))
        message = f"`{name}` does not count steps; take `CG()` or `Neumann`."
        assert_fails(TypeError, message, lambda e=with_it: make(e, schedule=schedule))
    default = engine(problem=bx.root(residual))  # which is GMRES
    assert_fails(TypeError, "`GMRES` does not count", lambda: make(default, schedule=schedule))


def test_products_with_the_hessian_need_a_forward_rule():
    for rule in (bx.Implicit(), bx.OneStep()):
        objective = bx.scipy_objective(engine(rule=rule), Y, X0)
        assert_fails(
            TypeError,
            'Hessian-vector products need a rule with `mode="forward"`, such as '
            f'`Implicit(mode="forward")`; got {rule!r}.',
            lambda o=objective: o.hessian_product(Y, Y),
        )


def test_what_scipy_cannot_use_is_an_error():
    objective = bx.scipy_objective(engine(solver=bx.GradientDescent(9.0)), Y, X0)
    assert_fails(
        bx.SolveError,
        f"the inner solve ended DIVERGED in evaluation 1: {bx.Status.DIVERGED.remedy}",
        objective,
        Y,
    )
    nothing = engine(outer=lambda x, y: jnp.log(jnp.sum(x) - 9.0) * 0 + jnp.sum(x))
    objective = bx.scipy_objective(nothing, Y, X0)
    assert_fails(bx.SolveError, "the outer objective is not finite: nan", objective, Y)
    singular = bx.minimum(lambda x, y: quadratic(x, y) + 0 * y[0] ** 0.5)
    forward = engine(problem=singular, rule=bx.Implicit(bx.Dense(), mode="forward"))
    objective = bx.scipy_objective(forward, Y, X0)
    assert_fails(
        bx.SolveError,
        "a Hessian-vector product of h is not finite: a linear solve failed",
        objective.hessian_product,
        np.zeros(2),
        Y,
    )


def test_outcomes_and_steps_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        STEP.warm_x = False
