"""The truth of a bilevel problem, by dense matrices and NumPy's factorisations on the host."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial
from random_problems import Batch, outer


class Derivatives(NamedTuple):
    optimality: np.ndarray  # F
    jacobian: np.ndarray  # F_1
    mixed: np.ndarray  # F_2
    outer_x: np.ndarray  # g_1
    outer_y: np.ndarray  # g_2


class Truth:
    """One problem of a batch, solved to rounding.

    Attributes:
      x: the inner solution.
      gradient: the hypergradient.
      conditioning: of F_1 at x.
    """

    def __init__(self, batch: Batch, index: int, evaluate: Callable[..., Derivatives]) -> None:
        data, validation, self.y = jax.tree.map(
            lambda leaf: leaf[index], (batch.data, batch.validation, batch.y)
        )
        self._evaluate = lambda x: Derivatives(
            *map(np.asarray, evaluate(data, validation, x, self.y))
        )
        self.x = self._solve()
        self.gradient = self.implicit(self.x)
        self.conditioning = float(np.linalg.cond(self.derivatives(self.x).jacobian))

    def derivatives(self, x: np.ndarray) -> Derivatives:
        return self._evaluate(x)

    def newton_step(self, x: np.ndarray) -> np.ndarray:
        at = self.derivatives(x)
        return x - np.linalg.solve(at.jacobian, at.optimality)

    def implicit(self, x: np.ndarray) -> np.ndarray:
        """Return the implicit estimate g_2 - F_2^T F_1^{-T} g_1 at x."""
        at = self.derivatives(x)
        return at.outer_y - at.mixed.T @ np.linalg.solve(at.jacobian.T, at.outer_x)

    def error(self, gradient: np.ndarray) -> float:
        """Return the relative error of a hypergradient."""
        return float(np.linalg.norm(gradient - self.gradient) / np.linalg.norm(self.gradient))

    def _solve(self) -> np.ndarray:
        x = np.zeros(self.y.shape)
        norm = np.linalg.norm(self.derivatives(x).optimality)
        while True:
            move = self.newton_step(x) - x
            for shrink in 0.5 ** np.arange(30):
                trial = x + shrink * move
                trial_norm = np.linalg.norm(self.derivatives(trial).optimality)
                if trial_norm < norm:
                    break
            else:
                return x  # rounding lets no step improve it
            x, norm = trial, trial_norm


def solve_exactly(batch: Batch) -> list[Truth]:
    """Return the truth of every problem of a batch."""

    @jax.jit
    def evaluate(data: Any, validation: Any, x: jax.Array, y: jax.Array) -> Derivatives:
        problem = batch.problem(data)
        jacobian, mixed = jax.jacobian(problem.optimality, (0, 1))(x, y)
        outer_x, outer_y = jax.grad(Partial(outer, validation), (0, 1))(x, y)
        return Derivatives(problem.optimality(x, y), jacobian, mixed, outer_x, outer_y)

    return [Truth(batch, index, evaluate) for index in range(len(batch.y))]
