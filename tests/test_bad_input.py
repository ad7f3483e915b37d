"""Wrong arguments fail while tracing, and the message says what was got and what was expected."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import bilevax as bx
import bilevax.linear._lineax as lineax_adapter

X0, Y = np.zeros(2), np.ones(2)


def quadratic(x, y):
    return jnp.sum(y * x**2 / 2 - x)


def residual(x, y):
    return y * x - 1


def solve_map(problem=None, solver=None, rule=None, **options):
    problem = bx.minimum(quadratic) if problem is None else problem
    return bx.solution_map(
        problem, bx.GradientDescent(0.5) if solver is None else solver, rule, **options
    )


def engine(outer=lambda x, y: jnp.sum(x), problem=None, solver=None, rule=None, **options):
    problem = bx.minimum(quadratic) if problem is None else problem
    solver = bx.GradientDescent(0.5) if solver is None else solver
    return bx.value_and_hypergradient(outer, problem, solver, rule, **options)


def assert_fails(error, message, function, *arguments):
    with pytest.raises(error, match=re.escape(message)):
        function(*arguments)


# What the functions return. Every way to use a problem refuses it, eagerly and while tracing.

USES = {
    "call": lambda problem: solve_map(problem)(X0, Y),
    "with_report": lambda problem: solve_map(problem).with_report(X0, Y),
    "grad": lambda problem: jax.grad(lambda y: jnp.sum(solve_map(problem)(X0, y)))(Y),
    "jit": lambda problem: jax.eval_shape(lambda y: solve_map(problem)(X0, y), Y),
    "vmap": lambda problem: jax.vmap(lambda y: solve_map(problem)(X0, y))(np.ones((3, 2))),
    "forward": lambda problem: solve_map(problem, rule=bx.Implicit(mode="forward"))(X0, Y),
    "engine": lambda problem: engine(problem=problem)(Y, bx.cold_start(X0)),
    "black box": lambda problem: bx.implicit_function(problem, lambda x0, y: x0)(X0, Y),
    "refine": lambda problem: bx.Implicit().refine(problem, X0, Y),
    "pullback": lambda problem: bx.Implicit().pullback(problem, X0, Y, X0),
    "pushforward": lambda problem: bx.Implicit().pushforward(problem, X0, Y, Y),
}


@pytest.mark.parametrize("use", USES)
def test_functions_that_do_not_fit_are_refused_wherever_they_are_used(use):
    message = "`objective` must return a scalar, got float64[2]."
    assert_fails(TypeError, message, USES[use], bx.minimum(lambda x, y: x * y))
    message = "`residual` must return shapes and dtypes like `x`: `x` is float64[2], got float64[]."
    assert_fails(TypeError, message, USES[use], bx.root(lambda x, y: jnp.sum(x * y)))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda x, y: x, "`objective` must return a scalar, got float64[2]."),
        (lambda x, y: jnp.sum(x)[None], "`objective` must return a scalar, got float64[1]."),
        (lambda x, y: [jnp.sum(x)], "`objective` must return a scalar, got [float64[]]."),
        (
            lambda x, y: (jnp.sum(x), jnp.sum(y)),
            "`objective` must return a scalar, got (float64[], float64[]).",
        ),
        (lambda x, y: None, "`objective` must return a scalar, got None."),
        (
            lambda x, y: jnp.sum(x > y),
            "`objective` must return a real floating scalar, got int64[].",
        ),
        (
            lambda x, y: jnp.sum(x + 1j * y),
            "`objective` must return a real floating scalar, got complex128[].",
        ),
    ],
)
def test_objectives_that_are_not_scalar(objective, message):
    assert_fails(TypeError, message, solve_map(bx.minimum(objective)), X0, Y)


@pytest.mark.parametrize(
    ("make", "name"), [(bx.root, "residual"), (bx.fixed_point, "map")], ids=["root", "fixed_point"]
)
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda x, y: (x["a"], x["b"]),
            "must return a pytree like `x`, PyTreeDef({'a': *, 'b': *}); got PyTreeDef((*, *)).",
        ),
        (
            lambda x, y: {"a": x["a"]},
            "must return a pytree like `x`, PyTreeDef({'a': *, 'b': *}); got PyTreeDef({'a': *}).",
        ),
        (
            lambda x, y: x | {"b": x["b"][:, None]},
            "must return shapes and dtypes like `x`: `x['b']` is float64[3], got float64[3, 1].",
        ),
        (
            lambda x, y: x | {"a": x["a"].astype(jnp.float32)},
            "must return shapes and dtypes like `x`: `x['a']` is float64[], got float32[].",
        ),
    ],
    ids=["another container", "a leaf missing", "another shape", "another dtype"],
)
def test_residuals_and_maps_unlike_x(make, name, function, message):
    x0 = {"a": 0.0, "b": np.zeros(3)}
    solve = solve_map(make(function), rule=bx.Implicit(bx.Dense()))
    assert_fails(TypeError, f"`{name}` {message}", solve, x0, Y)


# x and y.


def entry_points(x0, y):
    """Yield calls of everything that takes x and y, and the name that x has there."""
    yield "x0", lambda: solve_map()(x0, y)
    yield "x0", lambda: solve_map().with_report(x0, y)
    yield "x0", lambda: solve_map(rule=bx.Implicit(mode="forward"))(x0, y)
    yield "x0", lambda: bx.implicit_function(bx.minimum(quadratic), lambda x0, y: x0)(x0, y)
    yield "warm.x", lambda: engine()(y, bx.WarmStart(x0, x0, x0))
    yield "x", lambda: bx.Implicit().refine(bx.minimum(quadratic), x0, y)
    yield "x", lambda: bx.Implicit().pullback(bx.minimum(quadratic), x0, y, X0)
    yield "x", lambda: bx.Implicit().pushforward(bx.minimum(quadratic), x0, y, Y)


def test_x_must_be_floating():
    for dtype in ("int64", "uint8", "bool"):
        for name, call in entry_points({"w": [np.zeros(2, dtype)]}, Y):
            message = (
                f"`{name}['w'][0]` must be a floating array to be solved for, got dtype {dtype}."
            )
            assert_fails(TypeError, message, call)
    assert_fails(TypeError, "`x0` must be a floating array", solve_map(), 0, Y)
    assert_fails(TypeError, "`x0` must be a floating array", bx.cold_start, np.zeros(2, int))
    traced = jax.jit(lambda x0: solve_map()(x0, Y))
    assert_fails(TypeError, "`x0` must be a floating array", traced, np.zeros(2, int))


def test_x_must_be_real():
    for name, call in entry_points({"w": np.zeros(2, complex)}, Y):
        message = f"`{name}['w']` is complex (complex128); only real floating arrays are supported."
        assert_fails(TypeError, message, call)
    assert_fails(TypeError, "two leaves", bx.cold_start, 1j)


def test_y_must_be_real():
    for _, call in entry_points(X0, {"rates": (1.0, np.ones(2, np.complex64))}):
        message = "`y['rates'][1]` is complex; only real arrays are supported."
        assert_fails(TypeError, message, call)


def test_x_and_y_must_be_arrays():
    for name, call in entry_points({"w": "b"}, Y):
        assert_fails(TypeError, f"`{name}['w']` must be an array or a number, got 'b'.", call)
    for _, call in entry_points(X0, {"w": "b"}):
        assert_fails(TypeError, "`y['w']` must be an array or a number, got 'b'.", call)


# Kinds of arguments.


def test_kinds_of_arguments_are_checked():
    problem, newton = bx.minimum(quadratic), bx.Newton()
    makers = {
        "solution_map": lambda problem, solver, rule: bx.solution_map(problem, solver, rule),
        "engine": lambda problem, solver, rule: bx.value_and_hypergradient(
            lambda x, y: jnp.sum(x), problem, solver, rule
        ),
    }
    for make in makers.values():
        message = "`problem` must be a Problem, for example `minimum(objective)`; got <function"
        assert_fails(TypeError, message, make, quadratic, newton, None)
        message = "`solver` must be a Solver, for example `Newton()`; got 'newton'."
        assert_fails(TypeError, message, make, problem, "newton", None)
        message = "`rule` must be a Rule, for example `Implicit()`; got CG("
        assert_fails(TypeError, message, make, problem, newton, bx.CG())
        # The class in place of an instance.
        for wrong in ((problem, bx.Newton, None), (problem, newton, bx.Implicit)):
            assert_fails(TypeError, "Did you forget the parentheses?", make, *wrong)
        assert_fails(TypeError, "got <class 'bilevax.", make, problem, bx.Newton, None)
    message = "`problem` must be a Problem"
    assert_fails(TypeError, message, bx.implicit_function, quadratic, lambda x0, y: x0)
    for method in ("refine", "pullback", "pushforward"):
        arguments = (quadratic, X0, Y, Y)[: 3 if method == "refine" else 4]
        assert_fails(TypeError, message, getattr(bx.Implicit(), method), *arguments)


def test_policies_are_checked():
    for make in (solve_map, engine):
        with pytest.raises(TypeError, match=r"`on_failure` must be a OnFailure, .* got 'nan'"):
            make(on_failure="nan")
    with pytest.raises(TypeError, match=r"`on_failure` must be a OnFailure, .*NAN`; got None"):
        bx.implicit_function(bx.minimum(quadratic), lambda x0, y: x0, on_failure=None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bx.Implicit("cg"), "`linear_solver` must be a LinearSolver, for example `CG()`"),
        (lambda: bx.Implicit(bx.CG), "Did you forget the parentheses?"),
        (lambda: bx.NewtonStep(bx.Newton()), "`linear_solver` must be a LinearSolver"),
        (lambda: bx.NewtonStep(bx.CG), "Did you forget the parentheses?"),
        (lambda: bx.Newton(bx.Newton()), "`linear_solver` must be a LinearSolver"),
        (lambda: bx.Newton(line_search=True), "`line_search` must be a Backtracking"),
        (lambda: bx.ConjugateGradient(line_search=bx.Backtracking), "Did you forget"),
        (
            lambda: bx.Preconditioned(bx.NewtonStep(), bx.NewtonStep()),
            "`rule` must be a Rule, for example `Implicit()`; got NewtonStep(",
        ),
        (lambda: bx.Preconditioned(bx.Implicit, bx.NewtonStep()), "`rule` must be a Rule"),
        (
            lambda: bx.Preconditioned(bx.Implicit(), bx.ExpChange()),
            "`step` must be a Step, for example `NewtonStep()`; got ExpChange()",
        ),
        (lambda: bx.Preconditioned(bx.Implicit(), bx.NewtonStep), "Did you forget"),
        (lambda: bx.Reparameterized(bx.ExpChange(), bx.ExpChange()), "`rule` must be a Rule"),
        (
            lambda: bx.Reparameterized(bx.Implicit(), bx.NewtonStep()),
            "`change` must be a Change, for example `ExpChange()`; got NewtonStep(",
        ),
        (lambda: bx.Reparameterized(bx.Implicit(), bx.ExpChange), "Did you forget"),
        (lambda: bx.ChangeOfVariables(1.0, lambda x, y: x), "`phi` must be a function, got 1.0."),
        (
            lambda: bx.ChangeOfVariables(lambda z, y: z, None),
            "`phi_inverse` must be a function, got None.",
        ),
        (lambda: bx.DiagonalChange(np.ones(2)), "`diagonal` must be a function"),
        (lambda: bx.JacobiStep(1.0), "`diagonal` must be a function, got 1.0."),
        (lambda: bx.CustomStep(None), "`step` must be a function, got None."),
        (
            lambda: bx.Optax(optax.adam),
            "`transformation` must be a GradientTransformation, for example `optax.adam(1e-2)`",
        ),
        (
            lambda: bx.minimum(quadratic, structure="symmetric"),
            "`structure` must be a Structure, for example `Structure.SYMMETRIC`; got 'symmetric'.",
        ),
        (lambda: bx.root(residual, structure=None), "`structure` must be a Structure"),
        (lambda: bx.fixed_point(residual, structure=None), "`structure` must be a Structure"),
        (lambda: bx.GradientDescent(None), "`learning_rate` must be a number, got None."),
        (lambda: bx.GradientDescent("fast"), "`learning_rate` must be a number, got 'fast'."),
        (lambda: bx.Newton(maxiter=None), "`maxiter` must be a number, got None."),
        (lambda: bx.Newton(rtol="tight"), "`rtol` must be a number, got 'tight'."),
        (lambda: bx.CG(damping="a"), "`damping` must be a number, got 'a'."),
        (lambda: bx.Newton(maxiter=2.5), "`maxiter` must be a whole number, got 2.5."),
        (lambda: bx.CG(maxiter=2.5), "`maxiter` must be a whole number, got 2.5."),
        (lambda: bx.Neumann(2.5), "`steps` must be a whole number, got 2.5."),
        (lambda: bx.GMRES(restart=2.5), "`restart` must be a whole number, got 2.5."),
        (lambda: bx.FixedPointIteration(memory=2.5), "`memory` must be a whole number, got 2.5."),
        (lambda: bx.minimum(None), "`objective` must be a function, got None."),
        (lambda: bx.root(1.0), "`residual` must be a function, got 1.0."),
        (lambda: bx.fixed_point("map"), "`map` must be a function, got 'map'."),
        (
            lambda: bx.implicit_function(bx.minimum(quadratic), 1.0),
            "`solve_fn` must be a function, got 1.0.",
        ),
        (lambda: engine(outer=1.0), "`outer` must be a function, got 1.0."),
    ],
)
def test_components_of_the_wrong_kind(call, message):
    assert_fails(TypeError, message, call)


class Unhashable:
    """A function with a comparison of its own, as data classes have."""

    def __call__(self, x, y):
        return quadratic(x, y)

    def __eq__(self, other):
        return self is other

    __hash__ = None


def test_functions_must_be_hashable():
    for call in (
        lambda: bx.minimum(Unhashable()),
        lambda: bx.root(Unhashable()),
        lambda: engine(outer=Unhashable()),
        lambda: bx.implicit_function(bx.minimum(quadratic), Unhashable()),
    ):
        with pytest.raises(TypeError, match=r"must be hashable.*Wrap it: `jax.tree_util.Partial\("):
            call()


# Numbers.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bx.GradientDescent(0.0), "`learning_rate` must be positive, got 0.0."),
        (lambda: bx.GradientDescent(-0.1), "`learning_rate` must be positive, got -0.1."),
        (lambda: bx.GradientDescent(float("nan")), "`learning_rate` must be positive, got nan."),
        (lambda: bx.AcceleratedGradient(-1.0), "`learning_rate` must be positive, got -1.0."),
        (lambda: bx.Optax(optax.sgd(1.0), -1.0), "`learning_rate` must be positive, got -1.0."),
        (lambda: bx.FixedPointIteration(0.0), "`damping` must be positive, got 0.0."),
        (lambda: bx.FixedPointIteration(memory=-1), "`memory` must not be negative, got -1."),
        (lambda: bx.GradientDescent(1.0, -1e-3), "`rtol` must not be negative, got -0.001."),
        (lambda: bx.Newton(rtol=float("nan")), "`rtol` must not be negative, got nan."),
        (lambda: bx.Newton(atol=-1.0), "`atol` must not be negative, got -1.0."),
        (lambda: bx.ConjugateGradient(atol=-1.0), "`atol` must not be negative, got -1.0."),
        (lambda: bx.Newton(maxiter=-1), "`maxiter` must not be negative, got -1."),
        (lambda: bx.FixedPointIteration(maxiter=-1), "`maxiter` must not be negative, got -1."),
        (lambda: bx.CG(-1.0), "`rtol` must not be negative, got -1.0."),
        (lambda: bx.GMRES(atol=-1.0), "`atol` must not be negative, got -1.0."),
        (lambda: bx.BiCGStab(maxiter=-1), "`maxiter` must not be negative, got -1."),
        (lambda: bx.NormalCG(damping=-1.0), "`damping` must not be negative, got -1.0."),
        (lambda: bx.Dense(damping=-1.0), "`damping` must not be negative, got -1.0."),
        (lambda: bx.Dense(batch_size=0), "`batch_size` must be positive, got 0."),
        (lambda: bx.GMRES(restart=0), "`restart` must be positive, got 0."),
        (lambda: bx.Neumann(steps=0), "`steps` must be positive, got 0."),
        (lambda: bx.Neumann(steps=3, step_size=-1.0), "`step_size` must be positive, got -1.0."),
        (lambda: bx.GradientStep(0.0), "`step_size` must be positive, got 0.0."),
        (lambda: bx.ExactDiagonal(batch_size=0), "`batch_size` must be positive, got 0."),
        (lambda: bx.HutchinsonDiagonal(0), "`probes` must be positive, got 0."),
        (lambda: bx.Backtracking(decrease=0.0), "`decrease` must be positive, got 0.0."),
        (lambda: bx.Backtracking(contraction=0.0), "`contraction` must be positive, got 0.0."),
        (lambda: bx.Backtracking(maxiter=0), "`maxiter` must be positive, got 0."),
        (
            lambda: bx.Implicit(mode="sideways"),
            "`mode` must be \"reverse\" or \"forward\", got 'sideways'.",
        ),
        (lambda: bx.Implicit(mode=None), '`mode` must be "reverse" or "forward", got None.'),
    ],
)  # fmt: skip
def test_numbers_and_words_out_of_range(call, message):
    assert_fails(ValueError, message, call)


# Solvers that need an objective.


@pytest.mark.parametrize(
    ("solver", "name"),
    [
        (bx.ConjugateGradient(), "ConjugateGradient"),
        (bx.GradientDescent(bx.Backtracking()), "Backtracking"),
        (bx.Optax(optax.lbfgs()), "Optax"),
    ],
    ids=["ConjugateGradient", "Backtracking", "Optax"],
)
def test_solvers_that_need_an_objective(solver, name):
    for problem, kind in ((bx.root(residual), "root"), (bx.fixed_point(residual), "fixed_point")):
        message = f"`{name}` evaluates an objective and needs `minimum(...)`, got `{kind}(...)`."
        assert_fails(TypeError, message, solve_map(problem, solver), X0, Y)


# Steps, diagonals and changes of variables.


def reparameterized(change):
    return bx.Reparameterized(bx.Implicit(bx.Dense()), change)


def test_a_custom_step_unlike_x():
    rule = bx.Preconditioned(bx.Implicit(), lambda x, y, v: v[:1])
    message = "`step` must return shapes and dtypes like `x`: `x` is float64[2], got float64[1]."
    assert_fails(TypeError, message, solve_map(rule=rule), X0, Y)
    rule = bx.Preconditioned(bx.Implicit(), lambda x, y, v: (v,))
    assert_fails(TypeError, "`step` must return a pytree like `x`", solve_map(rule=rule), X0, Y)


@pytest.mark.parametrize(
    "make",
    [
        lambda diagonal: bx.Preconditioned(bx.Implicit(), bx.JacobiStep(diagonal)),
        lambda diagonal: reparameterized(bx.DiagonalChange(diagonal)),
    ],
    ids=["JacobiStep", "DiagonalChange"],
)
def test_a_diagonal_unlike_x(make):
    message = "`diagonal` must return a pytree like `x`, PyTreeDef(*); got PyTreeDef({'d': *})."
    refine = make(lambda x, y: {"d": y}).pullback
    whole = jax.grad(lambda y: jnp.sum(solve_map(rule=make(lambda x, y: {"d": y}))(X0, y)))
    assert_fails(TypeError, message, whole, Y)
    if isinstance(make(lambda x, y: y), bx.Reparameterized):
        assert_fails(TypeError, message, refine, bx.minimum(quadratic), X0, Y, X0)
    message = "`diagonal` must return shapes and dtypes like `x`: `x` is float64[2], got float64[]."
    whole = jax.grad(lambda y: jnp.sum(solve_map(rule=make(lambda x, y: 1.0))(X0, y)))
    assert_fails(TypeError, message, whole, Y)


def test_a_phi_unlike_x():
    change = bx.ChangeOfVariables(lambda z, y: {"x": z}, lambda x, y: x)
    message = "`phi` must return a pytree like `x`, PyTreeDef(*); got PyTreeDef({'x': *})."
    assert_fails(TypeError, message, solve_map(rule=reparameterized(change)), X0, Y)
    traced = jax.jit(lambda y: solve_map(rule=reparameterized(change))(X0, y))
    assert_fails(TypeError, message, traced, Y)
    pullback = reparameterized(change).pullback
    assert_fails(TypeError, message, pullback, bx.minimum(quadratic), X0, Y, X0)
    change = bx.ChangeOfVariables(lambda z, y: z.astype(jnp.float32), lambda x, y: x)
    message = "`phi` must return shapes and dtypes like `x`: `x` is float64[2], got float32[2]."
    assert_fails(TypeError, message, solve_map(rule=reparameterized(change)), X0, Y)


def test_a_phi_inverse_with_another_number_of_entries():
    change = bx.ChangeOfVariables(lambda z, y: jnp.stack([z, z]), lambda x, y: x[0])
    message = "`phi_inverse` must return as many entries as `x` has, 2; got float64[]."
    assert_fails(TypeError, message, solve_map(rule=reparameterized(change)), X0, Y)


def test_a_change_inside_a_change_is_checked_in_its_variable():
    inside = bx.ChangeOfVariables(lambda z, y: z, lambda x, y: x[:1])
    rule = bx.Reparameterized(bx.Reparameterized(bx.Implicit(), inside), bx.ExpChange())
    message = "`phi_inverse` must return as many entries as `x` has, 2; got float64[1]."
    assert_fails(TypeError, message, solve_map(rule=rule), X0 + 1, Y)


def test_numbers_of_a_solver_are_single():
    message = "`learning_rate` of `GradientDescent` must be a single number, got float64[2]."
    assert_fails(TypeError, message, solve_map(solver=bx.GradientDescent(np.ones(2))), X0, Y)
    message = "`rtol` of `Newton` must be a single number, got float64[2]."
    assert_fails(TypeError, message, solve_map(solver=bx.Newton(rtol=np.ones(2))), X0, Y)


def test_a_phi_that_its_inverse_does_not_invert():
    change = bx.ChangeOfVariables(lambda z, y: 2 * z, lambda x, y: x)
    rule, x = reparameterized(change), np.array([1.0, -3.0])
    problem, message = bx.minimum(quadratic), "`phi(phi_inverse(x, y), y)`"
    for call in (
        lambda: solve_map(rule=rule)(x, Y),
        lambda: solve_map(rule=rule).with_report(x, Y),
        lambda: engine(rule=rule)(Y, bx.cold_start(x)),
        lambda: bx.implicit_function(problem, lambda x0, y: x0, rule)(x, Y),
        lambda: bx.Preconditioned(rule, bx.NewtonStep()).pullback(problem, x, Y, X0),
        lambda: rule.refine(problem, x, Y),
        lambda: rule.pullback(problem, x, Y, X0),
        lambda: rule.pushforward(problem, x, Y, Y),
    ):
        assert_fails(ValueError, message, call)
    assert_fails(ValueError, "off by 3", rule.pullback, problem, x, Y, X0)
    # The right inverse passes.
    change = bx.ChangeOfVariables(lambda z, y: 2 * z, lambda x, y: x / 2)
    gradient, _ = reparameterized(change).pullback(problem, 1 / Y, Y, np.ones(2))
    np.testing.assert_allclose(gradient, -np.ones(2), rtol=1e-10)


# Rules, warm starts, outer objectives and black boxes.


def test_a_cotangent_unlike_x():
    pullback = bx.Implicit().pullback
    problem = bx.minimum(quadratic)
    with pytest.raises(TypeError, match=r"`cotangent` must .* `x`, .*\(\*\); got .*\(\(\*,\)\)\."):
        pullback(problem, X0, Y, (X0,))
    assert_fails(TypeError, "got float64[3].", pullback, problem, X0, Y, np.ones(3))
    assert_fails(TypeError, "got float32[2].", pullback, problem, X0, Y, np.ones(2, np.float32))


def test_a_warm_start_of_the_wrong_kind():
    message = "`warm` must be a WarmStart, for example `cold_start(x0)`; got "
    assert_fails(TypeError, message, engine(), Y, X0)
    assert_fails(TypeError, message, engine(), Y, (X0, X0))
    assert_fails(TypeError, message, engine(), Y, None)
    warm = bx.WarmStart(X0, np.zeros(3), X0)
    message = "`warm.adjoint` must have shapes and dtypes like `warm.x`: `warm.x` is float64[2], "
    assert_fails(TypeError, message + "got float64[3].", engine(), Y, warm)


@pytest.mark.parametrize(
    ("outer", "has_aux", "message"),
    [
        (lambda x, y: x, False, "`outer` must return a scalar, got float64[2]."),
        (lambda x, y: (jnp.sum(x), y), False, "`outer` must return a scalar, got (float64[], f"),
        (lambda x, y: (x, y), True, "`outer` must return a scalar, got float64[2]."),
        (lambda x, y: jnp.sum(x > 0), False, "`outer` must return a real floating scalar, got int"),
        (lambda x, y: jnp.sum(x), True, "`outer` must return a pair (value, aux) with `has_aux"),
        (lambda x, y: (jnp.sum(x), y, y), True, "`outer` must return a pair (value, aux) with"),
    ],
)
def test_outer_objectives_that_are_not_scalar(outer, has_aux, message):
    assert_fails(TypeError, message, engine(outer, has_aux=has_aux), Y, bx.cold_start(X0))


def test_a_black_box_that_returns_something_unlike_x():
    problem = bx.minimum(quadratic)
    message = (
        "`solve_fn` must return shapes and dtypes like `x0`: `x0` is float64[2], got float64[3]."
    )
    solve = bx.implicit_function(problem, lambda x0, y: jnp.ones(3))
    assert_fails(TypeError, message, solve, X0, Y)
    assert_fails(TypeError, message, jax.jit(lambda y: solve(X0, y)), Y)
    message = "`solve_fn` must return a pytree like `x0`, PyTreeDef(*); got PyTreeDef((*, *))."
    assert_fails(TypeError, message, bx.implicit_function(problem, lambda x0, y: (x0, y)), X0, Y)


def test_lineax_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(lineax_adapter, "lineax", None)
    message = "`LineaxSolver` needs Lineax: install it with `pip install bilevax[lineax]`."
    assert_fails(ImportError, message, bx.LineaxSolver, object())


def test_numbers_that_are_traced_pass():
    # Their values are not known, and nothing is checked at run time.
    jax.eval_shape(lambda rate: solve_map(solver=bx.GradientDescent(rate))(X0, Y), 0.5)
    partial = bx.minimum(Partial(lambda data, x, y: quadratic(x, data * y), 2.0))
    np.testing.assert_allclose(solve_map(partial)(X0, Y), [0.5, 0.5], rtol=1e-10)
