"""Functions, x and y that do not fit are refused wherever they are used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from tests.bad_input.example import X0, Y, assert_fails, engine, quadratic, solve_map

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
