"""Memory of unrolled runs: a few vectors per step, and never the data."""

import jax
import jax.numpy as jnp
import numpy as np

import bilevax as bx
from tests.iterative.example import (
    exactly,
)

FEATURES = 16


def fit(x, y):
    return jnp.mean((DATA @ x - 1) ** 2) / 2 + jnp.exp(y) * jnp.sum(x**2) / 2


DATA = np.random.default_rng(0).normal(size=(2048, FEATURES))
BYTES = 8 * FEATURES


def temporary_bytes(rule, steps, derivative=jax.grad):
    solver = bx.GradientDescent(0.1, **exactly(steps))
    solve = bx.solution_map(bx.minimum(fit), solver, rule)
    program = jax.jit(derivative(lambda y: jnp.sum(solve(jnp.zeros(FEATURES), y))))
    return program.lower(0.1).compile().memory_analysis().temp_size_in_bytes


def test_memory_is_a_few_vectors_per_step_and_never_the_data():
    few, many = (temporary_bytes(bx.Unrolled(), steps) for steps in (100, 400))
    per_step = (many - few) / 300
    assert BYTES <= per_step < 8 * BYTES < DATA.nbytes / 100


def test_memory_of_checkpoints_grows_as_the_root_of_the_number_of_steps():
    few, many = (temporary_bytes(bx.Unrolled(checkpoints="sqrt"), n) for n in (100, 10_000))
    # 10 checkpoints and 10 steps between two of them; 100 and 100.
    assert 90 * BYTES < many - few < 90 * 2 * 8 * BYTES
    truncated = [temporary_bytes(bx.Unrolled(10), steps) for steps in (100, 10_000)]
    assert truncated[0] == truncated[1]


def test_memory_of_forward_mode_does_not_depend_on_the_number_of_steps():
    rule = bx.Unrolled(mode="forward")
    sizes = {temporary_bytes(rule, steps, jax.jacfwd) for steps in (100, 10_000)}
    assert len(sizes) == 1
