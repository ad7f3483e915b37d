"""Problems: F and its partial derivatives, and what wrong functions are told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

import bilevax as bx

X = {"a": jnp.array([0.4, -0.8]), "b": jnp.array([[0.6]])}
Y = (jnp.array([0.5, 1.5]), {"c": jnp.array(-0.3)})
V = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[0.5]])}
TANGENT = (jnp.array([0.7, -0.1]), {"c": jnp.array(0.9)})
FLAT_X, like_x = ravel_pytree(X)
FLAT_Y, like_y = ravel_pytree(Y)
FLAT_V, FLAT_TANGENT = ravel_pytree(V)[0], ravel_pytree(TANGENT)[0]


def objective(x, y):
    first, second = y
    product = x["a"] @ first * jnp.exp(x["b"][0, 0])
    return product + jnp.sum(x["a"] ** 4) + second["c"] * jnp.sin(x["b"][0, 0] * x["a"][0])


def vector(x, y):
    first, second = y
    return {
        "a": x["a"] ** 2 * first + second["c"] * x["b"][0],
        "b": jnp.sin(x["a"][:1] * x["b"]) * first[1],
    }


def gradient_by_hand(x, y):
    (a0, a1), b = x["a"], x["b"][0, 0]
    (y0, y1), c = y[0], y[1]["c"]
    wave = c * jnp.cos(b * a0)
    return np.array(
        [
            y0 * np.exp(b) + 4 * a0**3 + wave * b,
            y1 * np.exp(b) + 4 * a1**3,
            (a0 * y0 + a1 * y1) * np.exp(b) + wave * a0,
        ]
    )


PROBLEMS = {
    "minimum": bx.minimum(objective),
    "root": bx.root(vector),
    "fixed_point": bx.fixed_point(vector),
}
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())


def value(problem, flat_x=FLAT_X, flat_y=FLAT_Y):
    """Return F as a flat vector, by hand."""
    x, y = like_x(jnp.asarray(flat_x)), like_y(jnp.asarray(flat_y))
    if problem is PROBLEMS["minimum"]:
        return gradient_by_hand(x, y)
    image = np.asarray(ravel_pytree(vector(x, y))[0])
    return image if problem is PROBLEMS["root"] else np.asarray(flat_x) - image


def central(function, at, step=1e-6):
    columns = [
        (function(at + step * unit) - function(at - step * unit)) / (2 * step)
        for unit in np.eye(at.size)
    ]
    return np.stack(columns, axis=1)


def flat(tree):
    return ravel_pytree(tree)[0]


@problems
def test_optimality_and_its_partial_derivatives(problem):
    jacobian = central(lambda x: value(problem, x), np.asarray(FLAT_X))
    outer = central(lambda y: value(problem, flat_y=y), np.asarray(FLAT_Y))
    np.testing.assert_allclose(flat(problem.optimality(X, Y)), value(problem), rtol=1e-12)

    at, operator = problem.linearize(X, Y)
    np.testing.assert_allclose(flat(at), value(problem), rtol=1e-12)
    np.testing.assert_allclose(flat(operator.matvec(V)), jacobian @ FLAT_V, rtol=1e-7)
    np.testing.assert_allclose(flat(operator.transpose.matvec(V)), jacobian.T @ FLAT_V, rtol=1e-7)
    assert operator.structure is problem.structure

    cotangent_problem, cotangent = problem.pull_outer(X, Y, V)
    np.testing.assert_allclose(flat(cotangent), outer.T @ FLAT_V, rtol=1e-7)
    assert jax.tree.structure(cotangent) == jax.tree.structure(Y)
    assert jax.tree.leaves(cotangent_problem) == []
    pushed = problem.push_outer(X, Y, (problem, TANGENT))
    np.testing.assert_allclose(flat(pushed), outer @ FLAT_TANGENT, rtol=1e-7)


def scaled_objective(scale, x, y):
    return objective(x, y) * scale


def scaled_vector(scale, x, y):
    return jax.tree.map(lambda leaf: leaf * scale, vector(x, y))


@pytest.mark.parametrize(
    ("make", "function"),
    [(bx.minimum, scaled_objective), (bx.root, scaled_vector), (bx.fixed_point, scaled_vector)],
    ids=PROBLEMS.keys(),
)
def test_leaves_of_a_problem_are_differentiated_like_y(make, function):
    problem = make(Partial(function, 1.3))
    shift = lambda scale: flat(make(Partial(function, scale)).optimality(X, Y))  # noqa: E731
    derivative = (np.asarray(shift(1.3 + 1e-6)) - np.asarray(shift(1.3 - 1e-6))) / 2e-6
    (cotangent,) = jax.tree.leaves(problem.pull_outer(X, Y, V)[0])
    np.testing.assert_allclose(cotangent, derivative @ np.asarray(FLAT_V), rtol=1e-7)
    tangents = make(Partial(function, 2.0)), jax.tree.map(jnp.zeros_like, Y)
    np.testing.assert_allclose(flat(problem.push_outer(X, Y, tangents)), 2 * derivative, rtol=1e-7)


@problems
def test_integers_in_y_have_no_derivative(problem):
    make = {"Minimum": bx.minimum, "Root": bx.root, "FixedPoint": bx.fixed_point}
    extended = make[type(problem).__name__](lambda x, y: problem.function(x, y[0]))
    y = (Y, jnp.arange(3), jax.random.key(0))
    _, (cotangent, integers, keys) = extended.pull_outer(X, y, V)
    np.testing.assert_allclose(flat(cotangent), flat(problem.pull_outer(X, Y, V)[1]), rtol=1e-12)
    assert integers.dtype == keys.dtype == jax.dtypes.float0


def change(z, y):
    """x = phi(z, y), from a vector z to the pytree x."""
    return {"a": z[:2] * jnp.exp(y[0]), "b": jnp.sinh(z[2:]).reshape(1, 1) + y[1]["c"]}


Z = jnp.array([0.3, -0.2, 0.5])


@problems
def test_a_change_of_variables(problem):
    """G = phi_1^T F(phi)."""
    composed = problem.compose(Partial(change))
    image = np.asarray(flat(change(Z, Y)))
    jacobian = central(lambda z: np.asarray(flat(change(jnp.asarray(z), Y))), np.asarray(Z))
    expected = jacobian.T @ value(problem, image)
    is_symmetric = problem is PROBLEMS["minimum"]
    assert composed.structure.is_symmetric == is_symmetric
    assert composed.structure is not bx.Structure.POSITIVE_DEFINITE  # which G_1 need not be
    np.testing.assert_allclose(flat(composed.optimality(Z, Y)), expected, rtol=1e-7)


def test_value_and_optimality():
    got, gradient = PROBLEMS["minimum"].value_and_optimality(X, Y)
    np.testing.assert_allclose(got, objective(X, Y))
    np.testing.assert_allclose(flat(gradient), gradient_by_hand(X, Y), rtol=1e-12)


def test_declared_structures():
    assert [problem.structure.name for problem in PROBLEMS.values()] == [
        "POSITIVE_DEFINITE",
        "GENERAL",
        "GENERAL",
    ]
    for make in (bx.minimum, bx.root, bx.fixed_point):
        assert make(vector, structure=bx.Structure.SYMMETRIC).structure.is_symmetric


def test_problems_of_two_kinds_are_never_equal():
    kinds = bx.minimum, bx.root, bx.fixed_point
    structures = [
        jax.tree.structure(make(vector, structure=bx.Structure.GENERAL)) for make in kinds
    ]
    assert all(structures[i] != structures[j] for i, j in [(0, 1), (0, 2), (1, 2)])
    again = jax.tree.structure(bx.root(vector))
    assert structures[1] == again


class Unhashable:
    __hash__ = None

    def __call__(self, x, y):
        return x


makers = pytest.mark.parametrize(
    ("make", "name"), [(bx.minimum, "objective"), (bx.root, "residual"), (bx.fixed_point, "map")]
)


@makers
def test_a_function_must_be_one(make, name):
    with pytest.raises(TypeError, match=f"`{name}` must be a function, got 3"):
        make(3)


@makers
def test_a_function_must_be_hashable(make, name):
    message = rf"`{name}` must be hashable.*got Unhashable\. Wrap it: `jax.tree_util.Partial"
    with pytest.raises(TypeError, match=message):
        make(Unhashable())


def at(problem, x0):
    return bx.solution_map(problem, bx.GradientDescent(0.1))(x0, 1.0)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, y: x, r"`objective` must return a scalar, got float64\[2\]"),
        (lambda x, y: (x[0], x[1]), r"must return a scalar, got \(float64\[\], float64\[\]\)"),
        (lambda x, y: (x[0],), r"must return a scalar, got \(float64\[\],\)"),
        (lambda x, y: jnp.argmax(x), r"must return a real floating scalar, got int\d+\[\]"),
        (lambda x, y: x[0] + 1j, r"must return a real floating scalar, got complex128\[\]"),
    ],
)
def test_an_objective_that_is_no_real_scalar(function, message):
    with pytest.raises(TypeError, match=message):
        at(bx.minimum(function), jnp.ones(2))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, y: x["a"], r"`{}` must return a pytree like `x`, .*'a'.*; got PyTreeDef\(\*\)"),
        (lambda x, y: {"b": x["a"]}, r"`{}` must return a pytree like `x`, .*'a'.*; got .*'b'"),
        (
            lambda x, y: {"a": x["a"][:1]},
            r"`x\['a'\]` is float64\[2\], got float64\[1\]",
        ),
        (
            lambda x, y: {"a": x["a"].astype(jnp.float32)},
            r"`{}` must return shapes and dtypes like `x`: .* is float64\[2\], got float32\[2\]",
        ),
    ],
)
@pytest.mark.parametrize(("make", "name"), [(bx.root, "residual"), (bx.fixed_point, "map")])
def test_a_function_that_returns_something_unlike_x(make, name, function, message):
    with pytest.raises(TypeError, match=message.replace("{}", name)):
        at(make(function), {"a": jnp.ones(2)})


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (jnp.arange(2), r"`x0\['w'\]` must be a floating array to be solved for, got dtype int"),
        (3, r"`x0\['w'\]` must be a floating array to be solved for, got dtype int"),
        (True, r"`x0\['w'\]` must be a floating array to be solved for, got dtype bool"),
        (1j * jnp.ones(2), r"`x0\['w'\]` is complex \(complex128\).*as two leaves"),
    ],
)
@pytest.mark.parametrize("problem", [PROBLEMS["minimum"], PROBLEMS["root"]])
def test_inner_variables_are_real_and_floating(problem, leaf, message):
    with pytest.raises(TypeError, match=message):
        at(problem, {"w": leaf})


@problems
def test_check_names_the_leaf_of_x(problem):
    with pytest.raises(TypeError, match=r"`x\['a'\]` must be a floating array"):
        problem.check({"a": jnp.arange(2), "b": jnp.ones((1, 1))}, Y)
    assert problem.check(X, Y) is None
