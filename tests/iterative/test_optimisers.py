"""Optimisers whose derivative does not exist where an entry of the gradient is zero."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from tests.iterative.example import (
    exactly,
)


def flat_entry(x, y):
    return y * (x[0] - 1) ** 2 / 2 + y * x[1] ** 2 / 2  # F[1] = 0 along a run from x[1] = 0


@pytest.mark.parametrize(
    "rule", [bx.Unrolled(), bx.Unrolled(2), bx.Unrolled(mode="forward")], ids=repr
)
def test_adam_without_a_root_of_epsilon_warns_and_is_nan(rule):
    solver = bx.Optax(optax.adam(0.1), **exactly(3))
    solve = bx.solution_map(bx.minimum(flat_entry), solver, rule)
    with pytest.warns(UserWarning, match="set `eps_root=1e-12` or so"):
        _, tangent = jax.jvp(lambda y: solve(jnp.zeros(2), y), (1.0,), (1.0,))
    assert np.isfinite(tangent[0]) and np.isnan(tangent[1])


def test_adam_without_a_root_of_epsilon_in_reverse_mode_and_an_engine():
    solver = bx.Optax(optax.adam(0.1), **exactly(3))
    engine = bx.value_and_hypergradient(
        lambda x, y: jnp.sum(x), bx.minimum(flat_entry), solver, bx.Unrolled()
    )
    with pytest.warns(UserWarning, match="set `eps_root=1e-12` or so"):
        result = engine(1.0, bx.cold_start(jnp.zeros(2)))
    assert np.isnan(result.gradient) and np.isfinite(result.value)


@pytest.mark.parametrize(
    "transformation",
    [optax.adam(0.1, eps_root=1e-12), optax.sgd(0.1, momentum=0.9), optax.sgd(0.1)],
    ids=["eps_root", "momentum", "sgd"],
)
def test_no_warning_where_derivatives_exist(transformation):
    solver = bx.Optax(transformation, **exactly(3))
    solve = bx.solution_map(bx.minimum(flat_entry), solver, bx.Unrolled())
    jacobian = jax.jacrev(lambda y: solve(jnp.zeros(2), y))(1.0)  # warnings are errors
    assert np.isfinite(jacobian[0]) and jacobian[1] == 0
