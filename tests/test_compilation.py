"""A second call with the same shapes traces and compiles nothing, whatever numbers have changed."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import bilevax as bx
from tests.everyday import params


@contextlib.contextmanager
def recorded_compilations():
    """Record the names of all events of JAX's compiler: tracing, lowering, compiling."""
    events = []

    def listen(event, duration, **details):
        if event.startswith("/jax/core/compile/"):
            events.append((event, details.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


class Counted:
    """A function that counts how often Python runs it, which is how often it is traced."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.function(*arguments)


def loss(x, y):
    return jnp.sum(jnp.exp(y) * x**2 / 2 - x)


def step_map(x, y):
    return x - 0.3 * (jnp.exp(y) * x - 1)


def closed_form(x0, y):
    return jnp.exp(-y) + 0 * x0


NUMBERS = ({"rate": 0.2, "rtol": 1e-8, "damping": 0.0, "maxiter": 300},
           {"rate": 0.3, "rtol": 1e-6, "damping": 0.1, "maxiter": 200})  # fmt: skip
X0 = np.zeros(2)
YS = (np.array([0.1, 0.2]), np.array([-0.3, 0.4]))


def solver_with(n):
    return bx.GradientDescent(n["rate"], n["rtol"], 1e-12, n["maxiter"])


def map_with(objective, n, mode="reverse"):
    rule = bx.Implicit(bx.CG(n["rtol"], maxiter=n["maxiter"], damping=n["damping"]), mode=mode)
    return bx.solution_map(bx.minimum(objective), solver_with(n), rule)


def gradient_of(solve):
    return lambda y: jax.grad(lambda y: jnp.sum(solve(X0, y) ** 2))(y)


def optax_map(objective, n):
    transformation = bx.Optax(SCALE_BY_ADAM, n["rate"], n["rtol"], 1e-12, n["maxiter"])
    return bx.solution_map(bx.minimum(objective), transformation)


SCALE_BY_ADAM = optax.scale_by_adam()


def precondition(v):
    return 0.9 * v


def to_x(z, y):
    return jnp.sinh(z)


def to_z(x, y):
    return jnp.arcsinh(x)


CHANGE = bx.ChangeOfVariables(to_x, to_z)


def map_with_functions(objective, n):
    cg = bx.CG(n["rtol"], preconditioner=precondition, damping=n["damping"])
    return bx.solution_map(bx.minimum(objective), solver_with(n), bx.Implicit(cg))


def map_with_change(objective, n):
    rule = bx.Reparameterized(bx.Implicit(bx.Dense(damping=n["damping"])), change=CHANGE)
    return bx.solution_map(bx.minimum(objective), solver_with(n), rule)


def preconditioned_map(objective, n):
    step = bx.GradientStep(n["rate"])
    return bx.solution_map(
        bx.minimum(objective), solver_with(n), bx.Preconditioned(bx.Implicit(), step)
    )


def map_with_data(objective, n):
    problem = bx.minimum(Partial(objective, np.array([n["rate"], n["damping"]])))
    return bx.solution_map(problem, solver_with(n))


def fixed_point_map(function, n):
    solver = bx.FixedPointIteration(n["rate"], n["rtol"], 1e-12, n["maxiter"])
    return bx.solution_map(bx.fixed_point(function), solver, bx.Implicit(bx.Neumann(steps=20)))


def unrolled_map(objective, n, rule=None):
    # The number of steps is a part of the program.
    solver = bx.GradientDescent(n["rate"], n["rtol"], 1e-12, 50)
    rule = bx.Unrolled(checkpoints="sqrt") if rule is None else rule
    return bx.solution_map(bx.minimum(objective), solver, rule)


def unrolled_engine(objective, n):
    def run(y):
        solver = bx.GradientDescent(n["rate"], n["rtol"], 1e-12, 50)
        engine = bx.value_and_hypergradient(
            outer_loss, bx.minimum(objective), solver, bx.Unrolled(3)
        )
        return engine(y, engine(y, bx.cold_start(X0)).warm)

    return run


def separable_map(objective, n, rule=None):
    tasks = n["rate"] * np.ones((2, 2))
    problem = bx.separable(bx.minimum(objective), tasks)
    solve = bx.solution_map(problem, solver_with(n), rule)
    return lambda y: jax.grad(lambda y: jnp.sum(solve(np.zeros((2, 2)), y) ** 2))(y)


def black_box(function, n):
    rule = bx.Implicit(bx.CG(n["rtol"], damping=n["damping"]))
    return bx.implicit_function(bx.minimum(function), closed_form, rule)


def engine_of(objective, n):
    def run(y):
        engine = bx.value_and_hypergradient(
            outer_loss, bx.minimum(objective), solver_with(n), bx.Implicit(bx.CG(n["rtol"]))
        )
        warm = engine(y, bx.cold_start(X0)).warm
        return engine(y, warm)

    return run


def outer_loss(x, y):
    return jnp.sum(x**2) + jnp.sum(y)


def pullback(objective, n):
    rule = bx.Implicit(bx.CG(n["rtol"], maxiter=n["maxiter"], damping=n["damping"]))
    return lambda y: rule.pullback(bx.minimum(objective), X0, y, np.ones(2))


def refine_and_push(objective, n):
    rule = bx.Preconditioned(
        bx.Implicit(bx.CG(n["rtol"], damping=n["damping"])), bx.GradientStep(n["rate"])
    )

    def run(y):
        x, _ = rule.refine(bx.minimum(objective), X0, y)
        return rule.pushforward(bx.minimum(objective), x, y, np.ones(2))

    return run


def forward_derivatives(objective, n):
    solve = map_with(objective, n, mode="forward")
    return lambda y: (
        jax.jvp(lambda y: solve(X0, y), (y,), (np.ones(2),)),
        jax.grad(lambda y: jnp.sum(solve(X0, y)))(y),
    )


def batched(function):
    return lambda y: jax.vmap(function)(np.stack([y, 2 * y]))


# Each row makes a function of y anew, from the user's function and the numbers of solver and rule.
CALLS = {
    "call": (loss, lambda f, n: lambda y: map_with(f, n)(X0, y)),
    "with_report": (loss, lambda f, n: lambda y: map_with(f, n).with_report(X0, y)),
    "grad": (loss, lambda f, n: gradient_of(map_with(f, n))),
    "vmap of grad": (loss, lambda f, n: batched(gradient_of(map_with(f, n)))),
    "forward": (loss, forward_derivatives),
    "fixed point": (step_map, lambda f, n: gradient_of(fixed_point_map(f, n))),
    "Optax": (loss, lambda f, n: gradient_of(optax_map(f, n))),
    "rule with functions": (loss, lambda f, n: gradient_of(map_with_functions(f, n))),
    "change of variables": (loss, lambda f, n: gradient_of(map_with_change(f, n))),
    "preconditioned": (loss, lambda f, n: gradient_of(preconditioned_map(f, n))),
    "data of a Partial": (
        lambda data, x, y: loss(x, y + data),
        lambda f, n: gradient_of(map_with_data(f, n)),
    ),
    "implicit_function": (loss, lambda f, n: gradient_of(black_box(f, n))),
    "engine": (loss, engine_of),
    "unrolled": (loss, lambda f, n: gradient_of(unrolled_map(f, n))),
    "last steps": (loss, lambda f, n: gradient_of(unrolled_map(f, n, bx.Unrolled(2)))),
    "one step": (loss, lambda f, n: gradient_of(unrolled_map(f, n, bx.OneStep()))),
    "unrolled engine": (loss, unrolled_engine),
    "separable": (lambda x, y, task: loss(x, y + task), separable_map),
    "pullback": (loss, pullback),
    "refine and pushforward": (loss, refine_and_push),
}


# The engine and the unrolled map have rows of their own.
REDUNDANT = ("last steps", "unrolled engine")


@pytest.mark.parametrize(
    "name", params(zip(CALLS, strict=True), lambda name: name not in REDUNDANT)
)
def test_a_second_eager_call_traces_and_compiles_nothing(name):
    function, make = CALLS[name]
    counted = Counted(function)
    with recorded_compilations() as events:
        jax.block_until_ready(make(counted, NUMBERS[0])(YS[0]))
    assert events and counted.calls > 0  # the counters count
    traced_before = counted.calls
    with recorded_compilations() as events:
        jax.block_until_ready(make(counted, NUMBERS[0])(YS[1]))
        jax.block_until_ready(make(counted, NUMBERS[1])(YS[0]))
    assert events == []
    assert counted.calls == traced_before


@pytest.mark.parametrize("name", ["grad", "engine"])
def test_a_second_jitted_call_traces_and_compiles_nothing(name):
    function, make = CALLS[name]
    counted = Counted(function)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(numbers, y):
        return make(counted, numbers)(y)

    chex.clear_trace_counter()
    with recorded_compilations() as events:
        jax.block_until_ready(run(NUMBERS[0], YS[0]))
    assert events and counted.calls > 0
    traced_before = counted.calls
    with recorded_compilations() as events:
        jax.block_until_ready(run(NUMBERS[0], YS[1]))
        jax.block_until_ready(run(NUMBERS[1], YS[0]))
    assert events == []
    assert counted.calls == traced_before


def test_an_objective_is_traced_a_fixed_number_of_times_by_a_loop_of_outer_steps():
    counted = Counted(loss)
    solve = map_with(counted, NUMBERS[0])
    gradient = jax.grad(lambda y: jnp.sum(solve(X0, y)))
    y = gradient(YS[0])
    traced_before = counted.calls
    for _ in range(5):
        y = y - 0.1 * gradient(y)
    assert counted.calls == traced_before


def test_another_shape_does_compile_anew():
    counted = Counted(loss)
    solve = map_with(counted, NUMBERS[0])
    solve(X0, YS[0])
    traced_before = counted.calls
    solve(np.zeros(3), np.zeros(3))
    assert counted.calls > traced_before
