"""Settings of JAX under which everything works: strict promotion, the search for NaN; few bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from tests.everyday import params, slow
from tests.problems_table import PROBLEMS, RULES, SOLVERS, X0, Y, fits, outer

MINIMUM = PROBLEMS[0].problem
FIXED = bx.GradientDescent(0.8, rtol=0.0, atol=0.0, maxiter=3)
SAMPLER = bx.UniformSampler(jnp.arange(6.0), 2)
STOCHASTIC = bx.stochastic_hypergradient(
    lambda x, y: x**2,
    bx.stochastic_minimum(lambda x, y, batch: jnp.mean((x - batch) ** 2) * jnp.exp(y)),
    sampler=SAMPLER,
    inner_steps=0,
    adjoint_steps=0,
    inner_step_size=0.1,
    adjoint_step_size=0.1,
)


def engine(rule=None, **options):
    solver = FIXED if isinstance(rule, bx.Unrolled) else bx.GradientDescent(0.8)
    return bx.value_and_hypergradient(outer, MINIMUM, solver, rule, **options)


def steps(step):
    state = step.init(Y, X0, history=3)
    return step(step(state))


USES = {
    "engine": lambda: engine()(Y, bx.cold_start(X0)),
    "certified": lambda: engine(certified=True)(Y, bx.cold_start(X0)),
    "accuracy": lambda: engine(accuracy=bx.RelativeAccuracy(1e-3))(Y, bx.cold_start(X0)),
    "unrolled": lambda: engine(bx.Unrolled())(Y, bx.cold_start(X0)),
    "step": lambda: steps(bx.make_step(engine(), optax.adam(0.1))),
    "unrolled step": lambda: steps(bx.make_step(engine(bx.Unrolled()), optax.adam(0.1))),
    "harmonic": lambda: steps(bx.make_step(engine(), optax.sgd(0.1), schedule=bx.Harmonic())),
    "geometric": lambda: steps(bx.make_step(engine(), optax.sgd(0.1), schedule=bx.Geometric())),
    "adaptive": lambda: steps(bx.make_step(engine(), optax.adam(0.1), schedule=bx.Adaptive())),
    "hoag": lambda: steps(bx.hoag(engine())),
    "error": lambda: bx.hypergradient_error(outer, MINIMUM, bx.Implicit(), X0, Y),
    "efficiency": lambda: bx.efficiency_constant(outer, MINIMUM, bx.Implicit(), X0, Y),
    "stochastic": lambda: STOCHASTIC(0.0, STOCHASTIC.init(1.0, jax.random.key(0))),
    "sihd": lambda: bx.sihd(
        STOCHASTIC, optax.adam(0.1), 0.0, STOCHASTIC.init(1.0, jax.random.key(0)), 2, growth=1.0
    ),
}
EVERYDAY = {"step", "sihd", "unrolled step"}


@pytest.mark.parametrize("name", params(((name,) for name in USES), lambda n: n in EVERYDAY))
def test_what_is_not_known_is_no_nan(name):
    """No state and no result of a solve that went well holds NaN, which JAX would stop at."""
    with jax.debug_nans(True):
        result = USES[name]()
    for leaf in jax.tree.leaves(result):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert not jnp.any(jnp.isnan(leaf))


def test_real_nan_is_found():
    solve = bx.solution_map(bx.minimum(lambda x, y: -y * x**2), bx.GradientDescent(1.0))
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        solve(1.0, 1.0)


@pytest.mark.parametrize("name", params(((name,) for name in USES), lambda n: n in EVERYDAY))
def test_strict_promotion(name):
    with jax.numpy_dtype_promotion("strict"):
        jax.make_jaxpr(USES[name])()  # types are checked while tracing


@pytest.mark.parametrize(
    ("problem", "row"),
    params(
        ((p, r) for p in PROBLEMS for r in (*SOLVERS, *RULES) if fits(p, r)),
        lambda problem, row: problem.is_minimum,
        lambda row: row.name,
    ),
)
def test_strict_promotion_of_solvers_and_rules(problem, row):
    solver, rule = getattr(row, "solver", bx.GradientDescent(0.8)), None
    if row in RULES:
        rule = row.make("reverse")

    def value(y):
        return outer(bx.solution_map(problem.problem, solver, rule)(X0, y), y)

    with jax.numpy_dtype_promotion("strict"):
        jax.make_jaxpr(jax.grad(value))(Y)


def test_strict_promotion_with_leaves_of_two_precisions():
    mixed = {"a": jnp.zeros(2, jnp.float32), "b": jnp.zeros(2)}
    problem = bx.minimum(
        lambda x, y: jnp.sum((x["a"].astype(y.dtype) - y) ** 2) + jnp.sum((x["b"] - y) ** 2)
    )
    with jax.numpy_dtype_promotion("strict"):
        x = bx.solution_map(problem, bx.Newton())(mixed, jnp.asarray(2.0))
    np.testing.assert_allclose(x["a"], 2.0, rtol=1e-5)
    np.testing.assert_allclose(x["b"], 2.0, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, slow(jnp.float16)])
def test_anderson_in_half_precision(dtype):
    """x = (tanh(y x) + c) / 2 at the y of a table of two digits, as bfloat16 has them."""

    def contract(x, y):
        return (0.5 * jnp.tanh(y * x) + jnp.asarray([0.25, 0.5], dtype)).astype(dtype)

    solve = bx.solution_map(bx.fixed_point(contract), bx.FixedPointIteration(memory=2))
    x, report = solve.with_report(jnp.zeros(2, dtype), jnp.asarray(0.8, dtype))
    truth = np.zeros(2)
    for _ in range(200):
        truth = 0.5 * np.tanh(float(jnp.asarray(0.8, dtype)) * truth) + [0.25, 0.5]
    assert x.dtype == dtype and not bx.Status(int(report.status)) >= bx.Status.DIVERGED
    # T contracts by 0.4, so that x is off by what T(x) - x is, over 0.6: some roundings.
    np.testing.assert_allclose(x.astype(float), truth, rtol=8 * float(jnp.finfo(dtype).eps))


@jax.custom_vjp
def energy(x):
    return jnp.sum(x**2) / 2


energy.defvjp(lambda x: (energy(x), x), lambda x, cotangent: (cotangent * x,))


@jax.custom_vjp
def slope_of_energy(x):
    return x


slope_of_energy.defvjp(lambda x: (x, None), lambda _, cotangent: (cotangent,))


@pytest.mark.parametrize("kind", ["minimum", "root"])
def test_the_default_atol_needs_no_derivative_in_forward_mode(kind):
    """x*(y) = y / 2, by functions that have derivatives in reverse mode alone."""
    if kind == "minimum":
        problem = bx.minimum(lambda x, y: energy(x - y) + energy(x))
    else:
        problem = bx.root(lambda x, y: slope_of_energy(2 * x - y))
    y = jnp.arange(3.0)
    x, report = bx.solution_map(problem, bx.GradientDescent(0.4)).with_report(jnp.ones(3), y)
    assert report.status == bx.Status.CONVERGED
    np.testing.assert_allclose(x, y / 2, atol=1e-11)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_size_of_terms(scale):
    """||F_1 x|| of a linear F, to the root of eps, whatever the constant term is."""
    rng = np.random.default_rng(0)
    matrix, x, b = rng.normal(size=(4, 4)) * scale, rng.normal(size=4), rng.normal(size=4) * scale
    problem = bx.root(lambda x, y: matrix @ x - b)
    size = problem.terms_norm(jnp.asarray(x), 0.0)
    np.testing.assert_allclose(size, np.linalg.norm(matrix @ x), rtol=1e-6)


def test_an_epoch_sampler_draws_in_batches_what_it_draws_alone():
    """Lanes that stand at different places of their epochs, which only some of them end."""
    sampler = bx.EpochSampler(jnp.arange(7), 2)
    draw, draws = jax.jit(sampler.next), jax.jit(jax.vmap(sampler.next))
    states = [sampler.init(jax.random.key(seed)) for seed in range(3)]
    for lane, ahead in enumerate([0, 1, 2]):
        for _ in range(ahead):
            states[lane] = draw(states[lane])[1]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    for _ in range(7):
        batches, together = draws(together)
        for lane in range(3):
            batch, states[lane] = draw(states[lane])
            np.testing.assert_array_equal(batches[lane], batch)


def test_an_epoch_sampler_in_batches_shuffles_only_where_an_epoch_is_over():
    sampler = bx.EpochSampler(jnp.arange(6), 2)
    states = jax.vmap(sampler.init)(jax.random.split(jax.random.key(0), 3))
    program = str(jax.make_jaxpr(jax.vmap(sampler.next))(states))
    assert "cond[" in program  # under `vmap`, a condition that differs between lanes is none
