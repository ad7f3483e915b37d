"""Any Optax optimiser as an inner solver."""

import dataclasses
import warnings
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import optax.tree
from jax.core import Tracer
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._problems import Minimum, Problem
from bilevax.solvers import _base as base

PyTree = Any


class _Evaluation(NamedTuple):
    optimality: PyTree
    value: jax.Array | None


@trees.register
@dataclasses.dataclass(frozen=True)
class Optax(base.Solver):
    """Any `optax.GradientTransformation`, fed with F(x, y) as the gradient.

    Args:
      transformation: the optimiser. Transformations with extra arguments (line searches) also
        get `value`, `grad` and `value_fn` on a minimum.
      learning_rate: None where the transformation has its own, as `optax.adam(1e-2)`. A number
        here steps along -learning_rate * update, for bare directions such as
        `optax.scale_by_adam()`; it may be traced, batched or computed from y, and changing it
        does not compile again. Not both: two changes of sign would lead uphill.
      rtol: stop at ||F(x, y)|| <= max(rtol ||F(x0, y)||, atol).
      atol: see `rtol`; in the unit of F. None is the rounding error of F, see `Solver`.
      maxiter: steps at most.

    Raises:
      TypeError: if `transformation` is not an `optax.GradientTransformation`.
      ValueError: for a rate that is not positive, a negative tolerance or a negative `maxiter`.

    Example:
      >>> import optax
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: 0.5 * (x - y) ** 2)
      >>> solve = bx.solution_map(problem, solver=bx.Optax(optax.sgd(0.3, momentum=0.5)))
      >>> round(float(solve(0.0, 3.0)), 4)
      3.0

    Source:
      DeepMind et al., "The DeepMind JAX Ecosystem", 2020 (Optax).
    """

    transformation: optax.GradientTransformation
    learning_rate: Any = None
    rtol: Any = None
    atol: Any = None
    maxiter: Any = 10_000

    def __post_init__(self) -> None:
        base.check_stopping(self)
        if self.learning_rate is not None:
            checks.positive("learning_rate", self.learning_rate)
        checks.is_component(
            "transformation", self.transformation, optax.GradientTransformation, "optax.adam(1e-2)"
        )
        # As Partials the two functions are pytrees without leaves, like all functions here.
        if _is_plain(self.transformation):
            functions = (Partial(function) for function in self.transformation)
            wrapped = type(self.transformation)(*functions)
            object.__setattr__(self, "transformation", wrapped)

    def differentiable(self, problem: Problem, x: PyTree) -> "Optax":
        zero = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), x)
        one = jax.tree.map(np.ones_like, zero)

        def update(gradient: PyTree) -> PyTree:
            return self.transformation.update(gradient, self.transformation.init(zero), zero)[0]

        with jax.ensure_compile_time_eval():
            try:
                leaves = jax.tree.leaves(jax.jvp(update, (zero,), (one,))[1])
            except TypeError:  # it evaluates an objective
                return self
        # A rate that is traced makes everything traced, and nothing is known here.
        known = [leaf for leaf in leaves if not isinstance(leaf, Tracer)]
        if not all(np.all(np.isfinite(leaf)) for leaf in known):
            warnings.warn(
                "`Unrolled` differentiates this optimiser, whose derivative is not finite where an "
                "entry of the gradient is zero. For Adam and its kin set `eps_root=1e-12` or so.",
                stacklevel=2,
            )
        return self

    def evaluate(self, problem: Problem, x: PyTree, y: PyTree) -> tuple[PyTree, jax.Array]:
        wants_value = isinstance(self.transformation, optax.GradientTransformationExtraArgs)
        if wants_value and isinstance(problem, Minimum):
            value, optimality = problem.value_and_optimality(x, y)
        else:
            value, optimality = None, problem.optimality(x, y)
        return _Evaluation(optimality, value), trees.norm(optimality)

    def init(self, problem: Problem, x: PyTree, y: PyTree) -> base.Iterate:
        return base.Iterate(x, *self.evaluate(problem, x, y), self.transformation.init(x))

    def step(self, problem: Problem, iterate: base.Iterate, y: PyTree) -> base.Iterate:
        optimality, value = iterate.evaluation
        extra = {}
        if value is not None and isinstance(problem, Minimum):
            objective = problem.function
            extra = {
                "value": value,
                "grad": optimality,
                "value_fn": lambda x: objective(x, y),
            }
        try:
            with jax.numpy_dtype_promotion("standard"):  # Optax counts on it
                updates, optimizer = self.transformation.update(
                    optimality, iterate.state, iterate.x, **extra
                )
        except TypeError:
            # Which transformations evaluate an objective, only their signatures tell.
            if not extra:
                base.require_minimum(problem, "Optax")
            raise
        if self.learning_rate is not None:
            updates = trees.scale(-jax.numpy.asarray(self.learning_rate), updates)
        x = optax.apply_updates(iterate.x, updates)
        return base.Iterate(x, *self.evaluate(problem, x, y), optimizer)


def _is_plain(transformation: Any) -> bool:
    return isinstance(transformation, optax.GradientTransformation) and not isinstance(
        transformation.init, Partial
    )
