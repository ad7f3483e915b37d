"""Step sizes: numbers and functions of the index, whose numbers are leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevax as bx
from tests.stochastic.example import X0, Y, make

KEY = jax.random.key(5)


def test_decreasing_step_sizes():
    step_size = bx.decreasing(3.0, 2.0)
    got = [step_size(index) for index in range(5)]
    np.testing.assert_allclose(got, [3 / 2, 3 / 3, 3 / 4, 3 / 5, 3 / 6], rtol=1e-15)
    assert jax.tree.leaves(step_size) == [3.0, 2.0]
    batched = jax.vmap(lambda beta: bx.decreasing(beta, 2.0)(1))(jnp.array([3.0, 6.0]))
    np.testing.assert_allclose(batched, [1.0, 2.0])


def test_numbers_and_functions_of_equal_values_give_equal_results():
    ways = [0.1, jnp.asarray(0.1), lambda index: 0.1, optax.constant_schedule(0.1)]
    results = []
    for step_size in ways:
        engine = make(inner_step_size=step_size, adjoint_step_size=step_size)
        results.append(engine(Y, engine.init(X0, KEY)).gradient)
    for gradient in results[1:]:
        np.testing.assert_allclose(gradient, results[0], rtol=1e-14)


def test_schedules_of_optax_are_called_with_the_index():
    schedule = optax.piecewise_constant_schedule(0.1, {2: 0.5})  # 0.1, 0.1, 0.05, ...
    schedules = (schedule, lambda index: jnp.where(index < 2, 0.1, 0.05))
    results = []
    for step_size in schedules:
        engine = make(inner_step_size=step_size, adjoint_step_size=step_size)
        results.append(engine(Y, engine.init(X0, KEY)).gradient)
    np.testing.assert_allclose(*results, rtol=1e-7)  # the schedule is in float32
    constant = make(inner_step_size=0.1, adjoint_step_size=0.1)
    assert np.max(np.abs(constant(Y, constant.init(X0, KEY)).gradient - results[0])) > 1e-3
