"""Wrong arguments of stochastic problems, samplers, engines and descent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from tests.bad_input.example import X0, Y, assert_fails

KEY = jax.random.key(0)
DATA = np.ones((6, 2))
SGD = optax.sgd(0.1)


def objective(x, y, batch):
    return jnp.sum(y * x**2) / 2 - jnp.mean(batch @ x)


def make(outer=lambda x, y: jnp.sum(x), problem=None, **options):
    numbers = {
        "sampler": bx.UniformSampler(DATA, 2),
        "inner_steps": 1,
        "adjoint_steps": 1,
        "inner_step_size": 0.1,
        "adjoint_step_size": 0.1,
    }
    problem = bx.stochastic_minimum(objective) if problem is None else problem
    return bx.stochastic_hypergradient(outer, problem, **(numbers | options))


def run(engine, y=Y, x0=X0):
    return engine(y, engine.init(x0, KEY))


def descend(optimizer=SGD, y=Y, steps=2, engine=None, state=None, **options):
    engine = make() if engine is None else engine
    state = make().init(X0, KEY) if state is None else state
    return bx.sihd(engine, optimizer, y, state, steps, **options)


class Unhashable:
    __hash__ = None

    def __call__(self, *arguments):
        return 0.0


# Components and numbers.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bx.stochastic_minimum(1.0), "`objective` must be a function, got 1.0."),
        (lambda: bx.stochastic_fixed_point(None), "`map` must be a function, got None."),
        (lambda: bx.stochastic_minimum(Unhashable()), "`objective` must be hashable"),
        (
            lambda: bx.stochastic_minimum(objective, structure="symmetric"),
            "`structure` must be a Structure, for example `Structure.SYMMETRIC`; got 'symmetric'.",
        ),
        (
            lambda: bx.stochastic_fixed_point(objective, structure=None),
            "`structure` must be a Structure",
        ),
        (lambda: make(outer=1.0), "`outer` must be a function, got 1.0."),
        (
            lambda: make(problem=bx.minimum(lambda x, y: 0.0)),
            "`problem` must be a StochasticProblem, for example `stochastic_minimum(objective)`; "
            "got Minimum(",
        ),
        (
            lambda: make(sampler=DATA),
            "`sampler` must be a Sampler, for example `UniformSampler(data, batch_size)`; got ",
        ),
        (lambda: make(sampler=bx.EpochSampler), "Did you forget the parentheses?"),
        (lambda: make(sampler=None), "`sampler` must be a Sampler"),
        (lambda: make(outer_sampler=DATA), "`outer_sampler` must be a Sampler"),
        (lambda: make(inner_steps=None), "`inner_steps` must be a number, got None."),
        (lambda: make(inner_steps=2.5), "`inner_steps` must be a whole number, got 2.5."),
        (lambda: make(adjoint_steps=2.0), "`adjoint_steps` must be a whole number, got 2.0."),
        (lambda: make(samples="3"), "`samples` must be a number, got '3'."),
        (lambda: make(inner_step_size=None), "`inner_step_size` must be a number, got None."),
        (lambda: make(adjoint_step_size="a"), "`adjoint_step_size` must be a number, got 'a'."),
        (lambda: make(inner_step_size=Unhashable()), "`inner_step_size` must be hashable"),
        (lambda: bx.decreasing(None, 1.0), "`beta` must be a number, got None."),
        (lambda: bx.decreasing(1.0, "a"), "`gamma` must be a number, got 'a'."),
        (
            lambda: bx.EpochSampler(DATA, 2.5),
            "`batch_size` must be a whole number that is known while tracing, got 2.5.",
        ),
        (lambda: bx.UniformSampler(DATA, None), "known while tracing, got None."),
        (
            lambda: jax.jit(lambda size: bx.UniformSampler(DATA, size).init(KEY))(2),
            "`batch_size` must be a whole number that is known while tracing, got ",
        ),
        (
            lambda: bx.UniformSampler(DATA, 2, replace=None),
            "`replace` must be True or False, got None.",
        ),
        (
            lambda: bx.HostSampler([DATA], DATA),
            "`iterator` must be an iterator, for example `iter(loader)`; got list.",
        ),
        (
            lambda: bx.HostSampler(iter([DATA]), {"a": "float"}),
            "`example['a']` must be an array or a number, got 'float'.",
        ),
        (
            lambda: descend(engine=bx.Newton()),
            "`engine` must be a StochasticEngine, for example `stochastic_hypergradient(...)`; "
            "got Newton(",
        ),
        (
            lambda: descend(optax.sgd),
            "`optimizer` must be a GradientTransformation, for example `optax.sgd(0.1)`; got ",
        ),
        (lambda: descend(projection=1.0), "`projection` must be a function, got 1.0."),
        (lambda: descend(growth="fast"), "`growth` must be a number, got 'fast'."),
        (
            lambda: descend(growth=np.ones(2)),
            "`growth` must be a single number, got float64[2].",
        ),
        (
            lambda: descend(steps=2.5),
            "`steps` must be a whole number that is known while tracing, got 2.5.",
        ),
        (lambda: jax.jit(lambda steps: descend(steps=steps))(2), "`steps` must be a whole number"),
    ],
)
def test_components_of_the_wrong_kind(call, message):
    assert_fails(TypeError, message, call)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(inner_steps=-1), "`inner_steps` must not be negative, got -1."),
        (lambda: make(adjoint_steps=-1), "`adjoint_steps` must not be negative, got -1."),
        (lambda: make(samples=0), "`samples` must be positive, got 0."),
        (lambda: make(inner_step_size=0.0), "`inner_step_size` must be positive, got 0.0."),
        (lambda: make(adjoint_step_size=-1), "`adjoint_step_size` must be positive, got -1."),
        (lambda: bx.decreasing(0.0, 1.0), "`beta` must be positive, got 0.0."),
        (lambda: bx.decreasing(1.0, -1.0), "`gamma` must be positive, got -1.0."),
        (lambda: bx.EpochSampler(DATA, 0), "`batch_size` must be positive, got 0."),
        (lambda: bx.UniformSampler(DATA, -2), "`batch_size` must be positive, got -2."),
        (lambda: descend(steps=0), "`steps` must be positive, got 0."),
        (lambda: descend(growth=0.0), "`growth` must be positive, got 0.0."),
    ],
)
def test_numbers_out_of_range(call, message):
    assert_fails(ValueError, message, call)


def test_numbers_that_are_found_wrong_by_the_first_call():
    engine = make()

    def with_(**numbers):
        return lambda: run(dataclasses.replace(engine, **numbers))

    message = (
        "`samples` of `StochasticEngine` must be a single number, got int64[2]. "
        "For a batch of them, use `jax.vmap`."
    )
    assert_fails(TypeError, message, with_(samples=np.array([1, 2])))
    message = "`adjoint_step_size` of `StochasticEngine` must be a single number"
    assert_fails(TypeError, message, with_(adjoint_step_size=np.ones(2)))
    message = "`inner_steps` must be a whole number, got float64[]."
    assert_fails(TypeError, message, with_(inner_steps=jnp.asarray(2.0)))

    def step_size(size):
        return lambda: run(make(inner_step_size=lambda index: size))

    message = "`inner_step_size` must return a single number, got float64[2]."
    assert_fails(TypeError, message, step_size(np.ones(2)))
    assert_fails(TypeError, "must return a single number, got None.", step_size(None))
    message = "`inner_step_size` must return a real number, got complex128[]."
    assert_fails(TypeError, message, step_size(jnp.asarray(1j)))
    message = "`adjoint_step_size` must return a single number, got [float64[]]."
    wrong = make(adjoint_step_size=lambda index: [jnp.asarray(1.0)])
    assert_fails(TypeError, message, lambda: run(wrong))


# Data and keys.


@pytest.mark.parametrize("cls", [bx.EpochSampler, bx.UniformSampler])
def test_data_that_are_no_examples(cls):
    def start(data, batch_size=2):
        return lambda: cls(data, batch_size).init(KEY)

    message = "`batch_size` must be at most the number of examples in `data`, 6; got 7."
    assert_fails(ValueError, message, start(DATA, 7))
    assert_fails(ValueError, "`data` must have at least one array, got {}.", start({}))
    message = "`data` must have examples, got [float64[0, 2]]."
    assert_fails(ValueError, message, start([np.ones((0, 2))]))
    message = "`data[1]` must be an array with an axis of examples, got 3.0."
    assert_fails(TypeError, message, start((DATA, 3.0)))
    assert_fails(TypeError, "`data` must be an array with an axis", start(jnp.asarray(1.0)))
    message = (
        "The arrays in `data` must have one leading axis, that of the examples: "
        "`data['a']` is float64[6, 2], `data['b']` is float64[5]."
    )
    assert_fails(ValueError, message, start({"a": DATA, "b": np.ones(5)}))
    traced = jax.jit(lambda data: cls(data, 7).init(KEY))
    assert_fails(ValueError, "at most the number of examples in `data`, 6; got 7", traced, DATA)


def test_keys():
    starts = [
        bx.EpochSampler(DATA, 2).init,
        bx.HostSampler(iter([]), DATA).init,
        lambda key: make().init(X0, key),
    ]
    for start in starts:
        message = "`key` must be a PRNG key, for example `jax.random.key(0)`; got 0."
        assert_fails(TypeError, message, start, 0)
        message = (
            "`key` must be a single PRNG key, got key<fry>[3]. For a batch of them, use `jax.vmap`."
        )
        assert_fails(TypeError, message, start, jax.random.split(KEY, 3))


# States.


def test_states_of_samplers():
    for sampler in (bx.EpochSampler(DATA, 2), bx.HostSampler(iter([]), DATA)):
        message = "`state` must be a SamplerState, made by `sampler.init(key)`; got None."
        assert_fails(TypeError, message, sampler.next, None)
        message = (
            "`state` must be made by the sampler that it is used with, "
            f"`{type(sampler).__name__}`; got one of `UniformSampler`. "
            "Make a new state with `init`."
        )
        assert_fails(TypeError, message, sampler.next, bx.UniformSampler(DATA, 2).init(KEY))
    longer = bx.HostSampler(iter([]), np.ones(3))
    message = "`state` must belong to the data of the sampler, float64[3]; got one that was made"
    assert_fails(ValueError, message, longer.next, bx.HostSampler(iter([]), np.ones(2)).init(KEY))


def users(engine, y=Y):
    """Everything that takes an engine, y and a state."""
    return [
        lambda state: engine(y, state),
        lambda state: jax.jit(engine)(y, state),
        lambda state: bx.sihd(engine, SGD, y, state, 2),
    ]


def test_states_of_engines():
    engine = make()
    state = engine.init(X0, KEY)
    for use in (users(engine)[0], users(engine)[2]):
        message = (
            "`state` must be a StochasticState, made by `engine.init(x0, key)`; got WarmStart("
        )
        assert_fails(TypeError, message, use, bx.cold_start(X0))
    with_outer = make(lambda x, y, batch: jnp.sum(x), outer_sampler=bx.EpochSampler(DATA, 2))
    for use in users(engine):
        message = "`state.x` must be a floating array to be solved for, got dtype int64."
        assert_fails(TypeError, message, use, state._replace(x=np.zeros(2, int)))
        for name in ("adjoint", "start"):
            message = (
                f"`state.{name}` must have shapes and dtypes like `state.x`: "
                "`state.x` is float64[2], got float64[3]."
            )
            assert_fails(TypeError, message, use, state._replace(**{name: np.zeros(3)}))
        message = (
            "`state` must be made by `init` of this engine, which has no outer sampler; "
            "got a state with one."
        )
        assert_fails(TypeError, message, use, with_outer.init(X0, KEY))
        message = "`state.sampler` must be a SamplerState, made by `sampler.init(key)`; got None."
        assert_fails(TypeError, message, use, state._replace(sampler=None))
        message = "`state.sampler` must be made by the sampler that it is used with, `UniformSamp"
        other = bx.EpochSampler(DATA, 2).init(KEY)
        assert_fails(TypeError, message, use, state._replace(sampler=other))
    for use in users(with_outer):
        message = "which has an outer sampler; got a state with none."
        assert_fails(TypeError, message, use, state)


# Functions, x and y.


def test_functions_that_do_not_fit():
    outer_sampler = bx.EpochSampler(DATA, 2)
    minimum, fixed_point = bx.stochastic_minimum, bx.stochastic_fixed_point
    cases = {
        "`objective` must return a scalar, got float64[2].": make(
            problem=minimum(lambda x, y, batch: x * y)
        ),
        "`objective` must return a scalar, got float64[6].": make(
            problem=minimum(lambda x, y, batch: batch @ x), sampler=bx.EpochSampler(DATA, 6)
        ),
        "`map` must return shapes and dtypes like `x`: `x` is float64[2], got float64[].": make(
            problem=fixed_point(lambda x, y, batch: jnp.sum(x))
        ),
        "`outer` must return a scalar, got float64[2].": make(lambda x, y: x),
        "`outer` must return a scalar, got float64[3].": make(
            lambda x, y, batch: batch[:, 0], outer_sampler=bx.EpochSampler(DATA, 3)
        ),
        "`outer` must return a real floating scalar, got int64[].": make(
            lambda x, y, batch: jnp.sum(x > 0), outer_sampler=outer_sampler
        ),
    }
    for message, engine in cases.items():
        for use in users(engine):
            assert_fails(TypeError, message, use, engine.init(X0, KEY))


def test_x_and_y():
    message = "`x0['w']` must be a floating array to be solved for, got dtype int64."
    assert_fails(TypeError, message, make().init, {"w": np.zeros(2, int)}, KEY)
    assert_fails(TypeError, "`x0` is complex", make().init, 1j, KEY)
    message = "`y` is complex; only real arrays are supported."
    engine = make()
    assert_fails(TypeError, message, lambda: run(engine, Y + 1j))
    message = "`y['n']` must be a floating array to be solved for, got dtype int64."
    assert_fails(TypeError, message, lambda: descend(y={"w": Y, "n": 3}))


def test_projections_that_do_not_fit():
    message = (
        "`projection` must return shapes and dtypes like `y`: `y` is float64[2], got float64[]."
    )
    assert_fails(TypeError, message, lambda: descend(projection=jnp.sum))
    message = "`projection` must return a pytree like `y`, PyTreeDef(*); got PyTreeDef((*, *))."
    assert_fails(TypeError, message, lambda: descend(projection=lambda y: (y, y)))


def test_what_jax_makes_of_a_structure_is_accepted():
    """JAX puts bare objects into pytrees that it takes apart; nothing is checked then."""
    host = bx.HostSampler(iter([]), DATA)
    for node in (make(), bx.EpochSampler(DATA, 2), host, bx.stochastic_minimum(objective)):
        leaves, structure = jax.tree.flatten(node)
        again = jax.tree.unflatten(structure, [object()] * len(leaves))
        assert jax.tree.structure(again) == structure
        assert type(again) is type(node)
