"""Programs for each device (`jax.shard_map`) and meshes with explicit axes.

Types are checked while tracing, on any number of devices: a mesh of one serves every day. Values
are compared on two devices, in a process of its own.
"""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

import bilevax as bx
from bilevax import _mesh as mesh
from tests.everyday import params
from tests.problems_table import PROBLEMS, RULES, SOLVERS, X0, Y, fits, objective, outer

ONE_DEVICE = Mesh(np.array(jax.devices()[:1]), ("i",))
PER_DEVICE = PartitionSpec("i")


def trace(function):
    """Trace a function of y, which each device has its own of, from a start that they share."""

    def on_device(ys):
        result = function(jax.tree.map(lambda leaf: leaf[0], ys))
        return jax.tree.map(lambda leaf: leaf[None], mesh.vary_like(result, ys))

    program = jax.shard_map(
        on_device, mesh=ONE_DEVICE, in_specs=PER_DEVICE, out_specs=PER_DEVICE, check_vma=True
    )
    return jax.make_jaxpr(program)(jax.tree.map(lambda leaf: leaf[None], Y))


ROWS = [
    *((p, s, RULES[0]) for p in PROBLEMS for s in SOLVERS if fits(p, s)),
    *((p, SOLVERS[3], r) for p in PROBLEMS for r in RULES[1:] if fits(p, r)),
]
# Every day each solver is met once, and each rule by one problem.
_MET = {}
for _row in sorted(ROWS, key=lambda row: PROBLEMS.index(row[0])):
    _MET.setdefault(_row[1] if _row[2] is RULES[0] else _row[2], _row)


@pytest.mark.parametrize(
    ("problem", "solver", "rule"),
    params(ROWS, lambda *row: row in _MET.values(), lambda row: row.name),
)
def test_solvers_and_rules_inside_of_shard_map(problem, solver, rule):
    def gradient(y):
        solve = bx.solution_map(problem.problem, solver.solver, rule.make("reverse"))
        return jax.grad(lambda y: outer(solve(X0, y), y))(y)

    if solver.name == "lbfgs":  # loops of Optax start as constants
        with pytest.raises(TypeError, match="cond branches must have equal output types"):
            trace(gradient)
    else:
        trace(gradient)


MINIMUM = PROBLEMS[0].problem
FIXED = bx.GradientDescent(0.8, rtol=0.0, atol=0.0, maxiter=3)


def engine(**options):
    return bx.value_and_hypergradient(outer, MINIMUM, bx.GradientDescent(0.8), **options)


def step(**options):
    def steps(y):
        take = bx.make_step(engine(), optax.adam(0.1), **options)
        start = take.init(y, X0, history=2)
        return jax.lax.scan(lambda state, _: (take(state), None), start, length=2)[0].y

    return steps


def stochastic(make_sampler):
    def evaluate(y):
        problem = bx.stochastic_minimum(lambda x, y, b: jnp.mean((x - b) ** 2) * jnp.exp(y[1][0]))
        sampler = make_sampler(jnp.arange(6.0))
        single = bx.stochastic_hypergradient(
            lambda x, y, b: jnp.mean((x - b) ** 2),
            problem,
            sampler=sampler,
            outer_sampler=sampler,
            inner_steps=2,
            adjoint_steps=2,
            inner_step_size=0.1,
            adjoint_step_size=0.1,
        )
        state = single.init(jnp.zeros(()), jax.random.key(0))
        result = bx.sihd(single, optax.sgd(0.1), y, state, steps=2, growth=1.0)
        return single(y, result.state).gradient

    return evaluate


TASKS = bx.separable(
    bx.minimum(lambda x, y, t: objective(x, y) + t * jnp.sum(x["a"] ** 2)), jnp.array([0.1, 0.2])
)
X0S = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), X0)
PROGRAMS = {
    "engine": lambda y: engine()(y, bx.cold_start(X0)).gradient,
    "certified": lambda y: engine(certified=True)(y, bx.cold_start(X0)).gradient,
    "unrolled": lambda y: jax.grad(
        lambda y: outer(bx.solution_map(MINIMUM, FIXED, bx.Unrolled())(X0, y), y)
    )(y),
    "last steps": lambda y: jax.grad(
        lambda y: outer(bx.solution_map(MINIMUM, FIXED, bx.Unrolled(2))(X0, y), y)
    )(y),
    "tasks": lambda y: bx.solution_map(TASKS, FIXED)(X0S, y),
    "pullback": lambda y: bx.Implicit().pullback(MINIMUM, X0, y, X0)[0],
    "efficiency": lambda y: bx.efficiency_constant(outer, MINIMUM, bx.Implicit(), X0, y).value,
    "step": step(),
    "uniform": stochastic(lambda data: bx.UniformSampler(data, 2)),
    "distinct": stochastic(lambda data: bx.UniformSampler(data, 2, replace=False)),
    "epochs": stochastic(lambda data: bx.EpochSampler(data, 2)),
}
SLOW_PROGRAMS = {
    "accuracy": lambda y: engine(accuracy=bx.RelativeAccuracy(1e-3))(y, bx.cold_start(X0)).gradient,
    "adaptive": step(schedule=bx.Adaptive()),
    "error": lambda y: bx.hypergradient_error(outer, MINIMUM, bx.Implicit(), X0, y).absolute,
}
SLOW = {"last steps", "distinct", "certified", *SLOW_PROGRAMS}


@pytest.mark.parametrize(
    "name", params(((name,) for name in PROGRAMS | SLOW_PROGRAMS), lambda name: name not in SLOW)
)
def test_programs_inside_of_shard_map(name):
    trace((PROGRAMS | SLOW_PROGRAMS)[name])


def test_loops_vary_as_what_their_steps_make_of_them():
    """Carries that start as constants, that vary in turn, and branches of different kinds."""

    def program(y):
        def turn(carry):
            a, b, _, count = carry
            return y[1], a, b, count + 1

        start = (jnp.zeros(1), jnp.ones(1), jnp.ones(1), 0)
        *abc, count = mesh.while_loop(lambda carry: carry[3] < 5, turn, start)
        assert [jax.typeof(u).mat.varying for u in abc] == [{"i"}] * 3
        assert not jax.typeof(count).mat.varying  # no more than it has to
        branches = mesh.cond(count > 2, lambda: (y[1], 1.0), lambda: (jnp.zeros(1), 2.0))
        assert [jax.typeof(u).mat.varying for u in branches] == [{"i"}, set()]
        total = mesh.fori_loop(3, lambda i, s: s + y[1] * i, jnp.zeros(1))
        last, all_ = mesh.scan(lambda s, x: (s * y[1] + x, s), jnp.zeros(1), jnp.ones(3))
        return abc, branches, total, last, all_

    trace(program)


TWO_DEVICES = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
import bilevax as bx

jax.config.update("jax_enable_x64", True)
results, data = {}, jnp.arange(1.0, 9.0)

# x*(y) = mean of the data / (1 + exp y), and g = x^2.
def objective(x, y, data):
    return jnp.mean((x - data) ** 2) / 2 + jnp.exp(y) * x**2 / 2

def square(problem, y):
    solve = bx.solution_map(problem, bx.Newton())
    engine = bx.value_and_hypergradient(lambda x, y: x**2, problem, bx.GradientDescent(0.3))
    by_map = jax.grad(lambda y: solve(0.0, y) ** 2)(y)
    return by_map, engine(y, bx.cold_start(0.0)).gradient

manual = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,))
def together(y, data):
    return square(bx.minimum(lambda x, y: jax.lax.pmean(objective(x, y, data), "i")), y)
def apart(y, data):
    return square(bx.minimum(lambda x, y: objective(x, y, data)), y)
def own(y, data):
    return jax.tree.map(lambda leaf: leaf[None], apart(y[0], data))
for name, function, ins, outs, y in (
    ("together", together, (P(), P("i")), P(), jnp.asarray(0.3)),
    ("apart", apart, (P(), P("i")), P(), jnp.asarray(0.3)),
    ("own", own, (P("i"), P("i")), P("i"), jnp.array([0.3, -0.2])),
):
    program = jax.shard_map(function, mesh=manual, in_specs=ins, out_specs=outs)
    results[name] = jax.tree.map(lambda u: np.asarray(u).tolist(), jax.jit(program)(y, data))

mesh = jax.make_mesh((2,), ("i",))
jax.set_mesh(mesh)
def cut(array, *spec):
    return jax.device_put(jnp.asarray(array), jax.NamedSharding(mesh, P(*spec)))
vector = bx.minimum(lambda x, y: jnp.sum((x - y) ** 2) / 2 + jnp.sum(x**2) / 2)  # x* = y / 2
x0, y = cut(np.zeros(4), "i"), cut(np.arange(4.0), "i")
solve = bx.solution_map(vector, bx.Newton())
def note(name, array):
    results[name] = np.asarray(array).tolist()
note("cut x", solve(x0, y))
note("cut gradient", jax.grad(lambda y: jnp.sum(solve(x0, y) ** 2))(y))
outer = lambda x, y: jnp.sum(x**2)
engine = bx.value_and_hypergradient(outer, vector, bx.Newton(), certified=True)
note("cut engine", engine(y, bx.cold_start(x0)).gradient)
one = bx.minimum(lambda x, y, t: jnp.sum((x - t) ** 2) / 2 + y * jnp.sum(x**2) / 2)
tasks = bx.separable(one, cut(np.arange(4.0), "i"))
solve = bx.solution_map(tasks, bx.Newton())
note("cut tasks", solve(cut(np.zeros((4, 2)), "i"), jnp.asarray(1.0)))
total = lambda y: jnp.sum(solve(jnp.zeros((4, 2)), y))
note("cut tasks gradient", jax.grad(total)(jnp.asarray(1.0)))
for name, sampler in {
    "uniform": bx.UniformSampler(cut(np.arange(6.0), "i"), 6, replace=False),
    "epoch": bx.EpochSampler(cut(np.arange(6.0), "i"), 6),
}.items():
    note(name, jnp.sort(sampler.next(sampler.init(jax.random.key(0)))[0]))
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def on_two_devices():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, "-W", "error", "-c", TWO_DEVICES]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def slope(y, mean):
    """Return dh/dy of h = (mean / (1 + exp y))^2."""
    return -2 * mean**2 * np.exp(y) / (1 + np.exp(y)) ** 3


@pytest.mark.slow
def test_values_on_two_devices(on_two_devices):
    """A shared problem has the derivative of one device; own ones with a shared y, their sum."""
    wholly, first, second = 4.5, 2.5, 6.5  # means of the data
    expected = {
        "together": [slope(0.3, wholly)] * 2,
        "apart": [slope(0.3, first) + slope(0.3, second)] * 2,
        "own": [[slope(0.3, first), slope(-0.2, second)]] * 2,
        "cut x": np.arange(4) / 2,
        "cut gradient": np.arange(4) / 2,
        "cut engine": np.arange(4) / 2,
        "cut tasks": np.arange(4)[:, None] / 2 * np.ones(2),
        "cut tasks gradient": -2 * sum(range(4)) / 4,
        "uniform": np.arange(6),
        "epoch": np.arange(6),
    }
    assert expected.keys() == on_two_devices.keys()
    for name, value in expected.items():
        # Solves end at a relative residual of 1.8e-12.
        np.testing.assert_allclose(on_two_devices[name], value, rtol=1e-10, atol=1e-10)
