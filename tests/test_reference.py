"""Every estimator equals an independent implementation, at iterates far from and near x*.

The data in `reference/` were made in float64 by the dense code published with Ye, Peyre, Cremers,
Ablin, "Enhancing Hypergradients Estimation", AISTATS 2024. `X`, `t` are features and targets of the
inner problem, `y` is one log-penalty per feature; `cases[].iterates[].estimates` holds the
hypergradients at x by the name of the estimator, `cases[].exact` the one at the solution `x_star`.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from tests.everyday import params

DIRECTORY = pathlib.Path(__file__).parent / "reference"


@dataclasses.dataclass(frozen=True)
class Case:
    """One inner problem with one outer objective; arrays have one row per iterate."""

    name: str
    problem: bx.Problem
    outer: Callable[[jax.Array, jax.Array], jax.Array]
    y: jax.Array
    x_star: jax.Array
    exact: np.ndarray
    iterates: jax.Array
    estimates: dict[str, np.ndarray]


def ridge(data):
    features, targets = jnp.array(data["X"]), jnp.array(data["t"])
    count, dimension = features.shape

    def objective(x, y):
        fit = jnp.sum((features @ x - targets) ** 2) / (2 * count)
        return fit + jnp.sum(jnp.exp(y) * x**2) / (2 * dimension)

    return objective


def logistic(data):
    features, labels = jnp.array(data["X"]), jnp.array(data["t"])

    def objective(x, y):
        fit = jnp.mean(jnp.logaddexp(0.0, -labels * (features @ x)))
        return fit + jnp.mean(jnp.exp(y) * x**2) / 2

    return objective


def linear_outer(data):
    slope = jnp.array(data["b_out"])
    return lambda x, y: slope @ x + jnp.sum(y**2)


def quadratic_outer(data):
    matrix, shift = jnp.array(data["A_out"]), jnp.array(data["b_out"])
    return lambda x, y: jnp.sum((matrix @ x - shift) ** 2) / 2


def logistic_outer(data):
    features, labels = jnp.array(data["X_val"]), jnp.array(data["t_val"])
    return lambda x, y: jnp.mean(jnp.logaddexp(0.0, -labels * (features @ x)))


INNER = {"ridge_regression": ridge, "logistic_regression": logistic}
OUTER = {"linear": linear_outer, "quadratic": quadratic_outer, "logistic": logistic_outer}


def load(file):
    data = json.loads((DIRECTORY / file).read_text())
    problem = bx.minimum(INNER[data["inner"]](data))
    for case in data["cases"]:
        iterates = case["iterates"]
        yield Case(
            name=f"{data['inner']}-{case['outer']}",
            problem=problem,
            outer=OUTER[case["outer"]](data),
            y=jnp.array(data["y"]),
            x_star=jnp.array(data["x_star"]),
            exact=np.array(case["exact"]),
            iterates=jnp.array([iterate["x"] for iterate in iterates]),
            estimates={
                name: np.array([iterate["estimates"][name] for iterate in iterates])
                for name in iterates[0]["estimates"]
            },
        )


CASES = [*load("diabetes_ridge.json"), *load("synthetic_logistic.json")]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def crossed(names, everyday):
    """Return all pairs of a case and an estimator, of which some run every day."""
    rows = params(
        itertools.product(CASES, names),
        lambda case, name: (case.name, name) in everyday,
        lambda part: getattr(part, "name", part),
    )
    return pytest.mark.parametrize(("case", "name"), rows)


# Linear solves to rounding, so that what is compared is the estimator.
TIGHT = bx.CG(rtol=1e-14)
ESTIMATORS = {
    "vanilla": bx.Implicit(TIGHT),
    "newton": bx.Preconditioned(bx.Implicit(TIGHT), step=bx.NewtonStep(TIGHT)),
    "jacobi": bx.Preconditioned(bx.Implicit(TIGHT), step=bx.JacobiStep()),
    "diagonal_change": bx.Reparameterized(bx.Implicit(bx.Dense()), change=bx.DiagonalChange()),
    "exp_change": bx.Reparameterized(bx.Implicit(bx.Dense()), change=bx.ExpChange()),
}
DEFAULTS = {
    "vanilla": bx.Implicit(),
    "newton": bx.Preconditioned(bx.Implicit(), step=bx.NewtonStep()),
    "jacobi": bx.Preconditioned(bx.Implicit(), step=bx.JacobiStep()),
    "diagonal_change": bx.Reparameterized(bx.Implicit(), change=bx.DiagonalChange()),
    "exp_change": bx.Reparameterized(bx.Implicit(), change=bx.ExpChange()),
}


def assert_close(got, reference):
    """Compare rows to 1e-8 of their norm, and every entry to 1e-8 of its own size.

    An entry that is a small difference of large ones cannot be more accurate than these, so the
    scale of an entry is at least 1e-4 of the norm.
    """
    got, reference = np.atleast_2d(got), np.atleast_2d(reference)
    assert got.shape == reference.shape
    norms = np.linalg.norm(reference, axis=1, keepdims=True)
    np.testing.assert_array_less(
        np.linalg.norm(got - reference, axis=1, keepdims=True), 1e-8 * norms
    )
    scales = np.maximum(np.abs(reference), 1e-4 * norms)
    np.testing.assert_array_less(np.abs(got - reference), 1e-8 * scales)


def by_rule(case, rule, x):
    """refine, then g_2 plus the pullback of g_1."""
    x, _ = rule.refine(case.problem, x, case.y)
    g_1, g_2 = jax.grad(case.outer, (0, 1))(x, case.y)
    pulled, _ = rule.pullback(case.problem, x, case.y, g_1)
    return g_2 + pulled


# A solver that stops where it starts: the solution map is then evaluated at the iterate itself.
STANDSTILL = bx.GradientDescent(0.1, maxiter=0)


def by_gradient(case, rule, x):
    """jax.grad through a solution map."""
    solve = bx.solution_map(case.problem, STANDSTILL, rule)
    return jax.grad(lambda y: case.outer(solve(x, y), y))(case.y)


def by_engine(case, rule, x):
    """The gradient of `value_and_hypergradient`."""
    engine = bx.value_and_hypergradient(case.outer, case.problem, STANDSTILL, rule)
    return engine(case.y, bx.cold_start(x)).gradient


# Each estimator once; those that differ most where the problem is not quadratic.
EVERYDAY = {
    ("logistic_regression-logistic", "newton"),
    ("logistic_regression-logistic", "diagonal_change"),
    ("logistic_regression-logistic", "exp_change"),
    ("ridge_regression-linear", "vanilla"),
    ("ridge_regression-quadratic", "jacobi"),
}
# Here each estimator once.
EVERYDAY_WITH_DEFAULTS = {
    ("logistic_regression-logistic", "vanilla"),
    ("logistic_regression-logistic", "diagonal_change"),
    ("ridge_regression-linear", "newton"),
    ("ridge_regression-quadratic", "jacobi"),
    ("ridge_regression-quadratic", "exp_change"),
}


@crossed(ESTIMATORS, EVERYDAY)
def test_estimators(case, name):
    rule = ESTIMATORS[name]
    ways = (by_rule, by_gradient, by_engine)

    @jax.jit
    def evaluate(iterates):
        return [jax.vmap(functools.partial(way, case, rule))(iterates) for way in ways]

    for got in evaluate(case.iterates):
        assert_close(got, case.estimates[name])


@crossed(DEFAULTS, EVERYDAY_WITH_DEFAULTS)
def test_default_linear_solvers_are_as_accurate(case, name):
    evaluate = jax.jit(jax.vmap(functools.partial(by_rule, case, DEFAULTS[name])))
    assert_close(evaluate(case.iterates), case.estimates[name])


@cases
def test_exact_hypergradient_with_defaults(case):
    solve = bx.solution_map(case.problem, bx.Newton())

    @jax.jit
    def evaluate(y):
        def value(y):
            x = solve(jnp.zeros_like(case.x_star), y)
            return case.outer(x, y), x

        return jax.grad(value, has_aux=True)(y)

    gradient, x = evaluate(case.y)
    assert_close(x, case.x_star)
    assert_close(gradient, case.exact)


def test_ideal_change_for_an_affine_outer_objective():
    """x = x_hat + F_1(x_hat, y)^{-1} F(z, y_hat), a change of the user's that makes ridge exact."""
    case = next(case for case in CASES if "ideal_change_affine" in case.estimates)
    optimality = jax.grad(case.problem.function)
    hessian = jax.hessian(case.problem.function)

    def estimate(x_hat):
        y_hat = case.y
        hessian_hat = hessian(x_hat, y_hat)

        def phi(z, y):
            return x_hat + jnp.linalg.solve(hessian(x_hat, y), optimality(z, y_hat))

        def phi_inverse(x, y):  # F(z, y_hat) is affine in z, with slope F_1(., y_hat)
            image = hessian(x_hat, y) @ (x - x_hat) - optimality(x_hat, y_hat)
            return x_hat + jnp.linalg.solve(hessian_hat, image)

        change = bx.ChangeOfVariables(phi, phi_inverse)
        rule = bx.Reparameterized(bx.Implicit(bx.Dense()), change=change)
        return by_gradient(case, rule, x_hat)

    got = jax.jit(jax.vmap(estimate))(case.iterates)
    assert_close(got, case.estimates["ideal_change_affine"])
    # What makes it ideal.
    assert_close(got, np.broadcast_to(case.exact, got.shape))
