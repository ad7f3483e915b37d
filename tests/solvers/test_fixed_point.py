"""Fixed-point iteration: Picard, damped, Anderson."""

import jax.numpy as jnp
import numpy as np
import optimistix
import pytest

import bilevax as bx
from bilevax import Status
from tests.linear.systems import with_spectrum
from tests.solvers.problems import AFFINE, CONTRACTION, MATRIX, SIZE, X0, B, exactly, solve

GENERATOR = np.random.default_rng(3)
MAPS = {
    "symmetric": with_spectrum(np.array([-0.8, -0.2, 0.5, 0.9])),
    "nonsymmetric": GENERATOR.normal(size=(SIZE, SIZE)) / 4,
    "expanding": with_spectrum(np.array([-2.0, -1.5, 0.5, 3.0])),  # Picard diverges
}


@pytest.mark.parametrize("damping", [1.0, 0.6, 1.2])
@pytest.mark.parametrize("steps", [0, 1, 6])
def test_iterates_of_the_damped_iteration(steps, damping):
    matrix = MAPS["nonsymmetric"]
    x = X0.copy()
    for _ in range(steps):
        x = (1 - damping) * x + damping * (matrix @ x + B)
    got, report = solve(
        bx.FixedPointIteration(damping, **exactly(steps)), CONTRACTION, y=(matrix, B)
    )
    np.testing.assert_allclose(got, x, rtol=1e-12)
    assert (report.status, report.iterations) == (Status.TRUNCATED, steps)
    np.testing.assert_allclose(report.residual, np.linalg.norm(x - matrix @ x - B))


@pytest.mark.parametrize("matrix", MAPS.values(), ids=MAPS.keys())
@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_anderson_ends_on_an_affine_map_like_gmres(matrix, damping):
    """With a memory of dim(x) the differences span the space after dim(x) steps."""
    solver = bx.FixedPointIteration(damping, rtol=1e-7, atol=0.0, maxiter=50, memory=SIZE)
    x, report = solve(solver, CONTRACTION, y=(matrix, B))
    assert report.status is Status.CONVERGED
    assert report.iterations <= SIZE + 2
    np.testing.assert_allclose(x, np.linalg.solve(np.eye(SIZE) - matrix, B), rtol=1e-5)


def anderson(matrix, b, x, memory, damping, steps):
    """Return the iterate of Anderson's method as Walker and Ni write it, by least squares."""
    xs, fs = [x], [matrix @ x + b - x]
    for _ in range(steps):
        kept = min(memory, len(xs) - 1)
        move = damping * fs[-1]
        if kept:
            dx = np.stack([xs[-i] - xs[-i - 1] for i in range(1, kept + 1)], axis=1)
            df = np.stack([fs[-i] - fs[-i - 1] for i in range(1, kept + 1)], axis=1)
            gamma = np.linalg.lstsq(df, fs[-1])[0]
            move = move - (dx + damping * df) @ gamma
        xs.append(xs[-1] + move)
        fs.append(matrix @ xs[-1] + b - xs[-1])
    return xs[-1]


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_iterates_of_anderson(steps):
    matrix = MAPS["nonsymmetric"]
    solver = bx.FixedPointIteration(0.7, **exactly(steps), memory=2)
    x, _ = solve(solver, CONTRACTION, y=(matrix, B))
    np.testing.assert_allclose(x, anderson(matrix, B, X0, 2, 0.7, steps), rtol=1e-8)


@pytest.mark.parametrize("memory", [0, 3])
def test_on_a_root_it_steps_along_the_residual(memory):
    solver = bx.FixedPointIteration(0.3, rtol=1e-10, atol=0.0, maxiter=1000, memory=memory)
    x, report = solve(solver, AFFINE)
    assert report.status is Status.CONVERGED
    np.testing.assert_allclose(x, np.linalg.solve(MATRIX, B), rtol=1e-8)


def layer(x, y):
    return jnp.tanh(y[0] @ x + y[1])


@pytest.mark.parametrize("memory", [0, 3])
def test_an_equilibrium_agrees_with_optimistix(memory):
    y = (MAPS["nonsymmetric"], B)
    solver = bx.FixedPointIteration(1.0, rtol=1e-12, atol=0.0, maxiter=1000, memory=memory)
    x, report = solve(solver, bx.fixed_point(layer), y=y)
    theirs = optimistix.fixed_point(
        layer,
        optimistix.FixedPointIteration(rtol=1e-12, atol=1e-12),
        jnp.asarray(X0),
        args=y,
        max_steps=1000,
    ).value
    assert report.status is Status.CONVERGED
    np.testing.assert_allclose(x, theirs, rtol=1e-9)


def test_picard_diverges_on_an_expanding_map():
    solver = bx.FixedPointIteration(1.0, rtol=1e-7, atol=0.0, maxiter=1000)
    _, report = solve(solver, CONTRACTION, y=(MAPS["expanding"], B))
    assert report.status is Status.DIVERGED


@pytest.mark.parametrize("damping", [0, -0.5])
def test_damping_must_be_positive(damping):
    with pytest.raises(ValueError, match=f"`damping` must be positive, got {damping}"):
        bx.FixedPointIteration(damping)


def test_memory_must_not_be_negative():
    with pytest.raises(ValueError, match="`memory` must not be negative, got -1"):
        bx.FixedPointIteration(memory=-1)
