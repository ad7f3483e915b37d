"""The parts of stochastic implicit differentiation; they run inside one trace.

Cotangents of y are lists of its floating leaves here, for loops cannot carry float0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax.tree
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax import _mesh as mesh
from bilevax import _trees as trees
from bilevax._problems import Problem
from bilevax.stochastic._averages import Average, average
from bilevax.stochastic._problems import StochasticProblem
from bilevax.stochastic._sampling import Sampler, SamplerState
from bilevax.stochastic._step_sizes import size_of

PyTree = Any


class Inner(NamedTuple):
    """The inner problem at y, and what draws its batches."""

    problem: StochasticProblem
    sampler: Sampler
    y: PyTree

    def check(self, x: PyTree, sampling: SamplerState) -> None:
        """Raise if the inner problem does not fit x."""
        batch, _ = jax.eval_shape(self.sampler.next, sampling)
        self.problem.check(x, self.y, batch)

    def varying(self, x: PyTree, sampling: SamplerState) -> PyTree:
        """Return x as it varies over the devices of a mesh; see `Problem.varying`."""

        def value(x: PyTree) -> PyTree:
            return self.problem.function(x, self.y, self.sampler.next(sampling)[0])

        return mesh.vary_with(x, value)

    def descend(
        self, x: PyTree, step_size: Any, steps: Any, sampling: SamplerState
    ) -> tuple[PyTree, jax.Array, SamplerState]:
        """Take steps on x; return it, ||F(x, y; batch)|| before the last one, and the sampler."""

        def optimality(problem: Problem, x: PyTree) -> PyTree:
            return problem.optimality(x, self.y)

        return self._iterate(optimality, x, step_size, steps, sampling)

    def solve_adjoint(
        self,
        x: PyTree,
        cotangent: PyTree,
        v: PyTree,
        step_size: Any,
        steps: Any,
        sampling: SamplerState,
    ) -> tuple[PyTree, jax.Array, SamplerState]:
        """Take steps on v towards F_1^T v = cotangent; return what `descend` does."""

        def residual(problem: Problem, v: PyTree) -> PyTree:
            jacobian = problem.linearize(x, self.y)[1]
            return optax.tree.sub(jacobian.transpose.matvec(v), cotangent)

        return self._iterate(residual, v, step_size, steps, sampling)

    def average_pullback(
        self, x: PyTree, v: PyTree, samples: Any, sampling: SamplerState
    ) -> tuple[Average, SamplerState]:
        """Average F_2(x, y; batch)^T v over batches."""

        def draw(sampling: SamplerState) -> tuple[list[jax.Array], SamplerState]:
            batch, sampling = self.sampler.next(sampling)
            _, cotangent = self.problem.on_batch(batch).pull_outer(x, self.y, v)
            return trees.floating(cotangent), sampling

        return average(draw, samples, sampling)

    def _iterate(
        self,
        direction: Callable[[Problem, PyTree], PyTree],
        u: PyTree,
        step_size: Any,
        steps: Any,
        sampling: SamplerState,
    ) -> tuple[PyTree, jax.Array, SamplerState]:
        def step(index: jax.Array, carry: Any) -> Any:
            u, _, sampling = carry
            batch, sampling = self.sampler.next(sampling)
            downhill = direction(self.problem.on_batch(batch), u)
            u = trees.add_scaled(u, -jnp.asarray(size_of(step_size, index)), downhill)
            return u, trees.norm(downhill), sampling

        unmeasured = jnp.full((), jnp.inf, trees.dtype(u))
        return mesh.fori_loop(steps, step, (u, unmeasured, sampling))


class OuterTerms(NamedTuple):
    """g(x, y), g_1 and g_2."""

    value: jax.Array
    x: PyTree
    y: list[jax.Array]


def check_outer(
    outer: Partial, sampler: Sampler | None, x: PyTree, y: PyTree, sampling: SamplerState | None
) -> None:
    """Raise if the outer objective does not return a scalar."""
    batch = () if sampler is None else jax.eval_shape(sampler.next, sampling)[:1]
    checks.scalar_output("outer", jax.eval_shape(outer, x, y, *batch))


def average_outer(
    outer: Partial,
    sampler: Sampler | None,
    x: PyTree,
    y: PyTree,
    samples: Any,
    sampling: SamplerState | None,
) -> tuple[Average, SamplerState | None]:
    """Average the `OuterTerms` over batches; without a sampler they are exact."""

    def terms(*batch: PyTree) -> OuterTerms:
        value, pull = jax.vjp(lambda x, y: outer(x, y, *batch), x, y)
        cotangent_x, cotangent_y = pull(jnp.ones_like(value))
        return OuterTerms(value, cotangent_x, trees.floating(cotangent_y))

    if sampler is None:
        exact = terms()
        return Average(exact, jax.tree.map(lambda u: jnp.zeros((), u.dtype), exact)), None

    def draw(sampling: Any) -> tuple[OuterTerms, SamplerState]:
        batch, sampling = sampler.next(sampling)
        return terms(batch), sampling

    return average(draw, samples, sampling)
