"""The same hypergradients through `solution_map`, and through the engine for its report."""

from typing import Any

import jax
import jax.numpy as jnp
import problems

import bilevax as bx

Report = bx.HypergradientReport


def ridge(
    log_penalty: jax.Array, train: problems.Data, validation: problems.Data, *, report: bool = False
) -> Any:
    return _hypergradient(
        bx.minimum(lambda w, y: problems.ridge_objective(w, y, train)),
        bx.GradientDescent(0.5, rtol=problems.RTOL, atol=0.0),
        bx.Implicit(bx.CG(rtol=problems.RTOL)),
        lambda w: problems.least_squares(w, validation),
        jnp.zeros_like(log_penalty),
        log_penalty,
        report,
    )


def logistic(
    log_penalty: jax.Array, train: problems.Data, validation: problems.Data, *, report: bool = False
) -> Any:
    return _hypergradient(
        bx.minimum(lambda w, y: problems.logistic_objective(w, y, train)),
        bx.Newton(rtol=problems.RTOL, atol=0.0),
        bx.Implicit(bx.CG(rtol=problems.RTOL)),
        lambda w: problems.logistic(w, validation),
        jnp.zeros_like(log_penalty),
        log_penalty,
        report,
    )


def equilibrium(
    layer: problems.Layer,
    inputs: jax.Array,
    readout: jax.Array,
    targets: jax.Array,
    terms: int,
    *,
    report: bool = False,
) -> Any:
    return _hypergradient(
        bx.fixed_point(lambda z, layer: problems.apply_layer(z, layer, inputs)),
        bx.FixedPointIteration(rtol=problems.RTOL, atol=0.0),
        bx.Implicit(bx.Neumann(steps=terms)),
        lambda z: problems.readout_loss(z, readout, targets),
        jnp.zeros((inputs.shape[0], layer.bias.size)),
        layer,
        report,
    )


def _hypergradient(
    problem: bx.Problem,
    solver: bx.Solver,
    rule: bx.Rule,
    outer: Any,
    x0: jax.Array,
    y: Any,
    report: bool,
) -> Any:
    if report:
        engine = bx.value_and_hypergradient(lambda x, y: outer(x), problem, solver, rule)
        return engine(y, bx.cold_start(x0)).report
    solve = bx.solution_map(problem, solver=solver, rule=rule)
    return jax.grad(lambda y: outer(solve(x0, y)))(y)
