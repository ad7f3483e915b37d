"""Components of the wrong kind, and numbers out of their range."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from tests.bad_input.example import X0, Y, assert_fails, engine, quadratic, residual, solve_map

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
        with pytest.raises(TypeError, match=r"`on_failure` must be an OnFailure, .* got 'nan'"):
            make(on_failure="nan")
    with pytest.raises(TypeError, match=r"`on_failure` must be an OnFailure, .*NAN`; got None"):
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
