"""The equilibrium model of the study of rates, a contraction that is not symmetric, and its truth.

    z_i = tanh(W z_i + U u_i + b),   g = mean over i of ||C z_i - t_i||^2 / 2,   y = (W, U, b)

W is a Gaussian matrix scaled to a given spectral norm, an upper bound of the contraction factor.
T_1 = diag(1 - z_i^2) W has a smaller spectral radius, which is what counts in the end. The truth is
computed with NumPy alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import bilevax as bx

MEAN = 0.3  # of the entries of W, whose standard deviation is 1 before they are scaled
UNITS, INPUTS, OUTPUTS, BATCH = 64, 10, 5, 16


class Case(NamedTuple):
    inputs: Any  # (batch, inputs)
    targets: Any  # (batch, outputs)
    readout: Any  # C
    y: tuple[Any, Any, Any]  # W, U, b

    @property
    def x0(self) -> Any:
        return jnp.zeros((self.inputs.shape[0], self.readout.shape[1]))


class Truth(NamedTuple):
    """The solution of a case.

    Attributes:
      gradient: the hypergradient in (W, U, b), flat.
      contraction: the largest spectral radius of T_1 at the solution, over the batch.
      norm: the largest ||T_1|| there.
    """

    gradient: np.ndarray
    contraction: float
    norm: float


def draw(norm: float, seed: int, units: int = UNITS) -> Case:
    rng = np.random.default_rng(seed)
    weight = rng.normal(MEAN, size=(units, units))
    y = (
        norm * weight / np.linalg.norm(weight, 2),
        rng.normal(size=(units, INPUTS)) / np.sqrt(INPUTS) / 4,
        rng.normal(size=units) / 8,
    )
    inputs, targets = rng.normal(size=(BATCH, INPUTS)), rng.normal(size=(BATCH, OUTPUTS))
    return Case(inputs, targets, rng.normal(size=(OUTPUTS, units)) / np.sqrt(units), y)


def problem(case: Case) -> tuple[bx.Problem, Partial]:
    """Return the inner problem, one task for each row of the batch, and the outer objective."""
    tasks = bx.separable(bx.fixed_point(_layer), case.inputs)
    return tasks, Partial(_outer, case.readout, case.targets)


def _layer(z: jax.Array, y: Any, u: jax.Array) -> jax.Array:
    weight, input_weight, bias = y
    return jnp.tanh(weight @ z + input_weight @ u + bias)


def _outer(readout: jax.Array, targets: jax.Array, z: jax.Array, y: Any) -> jax.Array:
    return jnp.mean(jnp.sum((z @ readout.T - targets) ** 2, axis=1)) / 2


def equilibria(case: Case) -> np.ndarray:
    """Return the equilibrium of every row."""
    weight, input_weight, bias = case.y
    drive = case.inputs @ input_weight.T + bias
    z = np.zeros_like(drive)
    for _ in range(1000):  # 0.9^1000 = 1e-46
        z = np.tanh(z @ weight.T + drive)
    return z


def truth(case: Case) -> Truth:
    weight, z = case.y[0], equilibria(case)
    outer_z = (z @ case.readout.T - case.targets) @ case.readout / len(z)
    pulled, radii, norms = [], [], []
    for at, cotangent in zip(z, outer_z, strict=True):
        slope = 1 - at**2
        jacobian = slope[:, None] * weight
        pulled.append(slope * np.linalg.solve(np.eye(len(at)) - jacobian.T, cotangent))
        radii.append(np.abs(np.linalg.eigvals(jacobian)).max())
        norms.append(np.linalg.norm(jacobian, 2))
    before = np.stack(pulled)  # cotangents of what tanh is applied to
    parts = before.T @ z, before.T @ case.inputs, before.sum(axis=0)
    gradient = np.concatenate([part.ravel() for part in parts])
    return Truth(gradient, float(max(radii)), float(max(norms)))
