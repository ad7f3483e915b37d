"""Any Optax optimiser as an inner solver."""

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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

    def differentiable(self, problem: Problem, x: PyTree) -> base.Solver:
        zero = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), x)
        if _stops_gradients(self.transformation, zero):
            warnings.warn(
                "`Unrolled` differentiates this optimiser, which takes a part of its own update "
                "for a constant (`stop_gradient`). So its derivative is not that of the run until "
                "the run has converged.",
                stacklevel=2,
            )
        with jax.ensure_compile_time_eval():
            try:
                is_finite, is_smooth = _slopes_at_a_solution(self.transformation, zero)
            except TypeError:  # it evaluates an objective, for a line search
                return _RunToRounding(self, False)
        # A rate that is traced makes everything traced, and nothing is known here.
        if not isinstance(is_finite, Tracer) and not is_finite:
            warnings.warn(
                "`Unrolled` differentiates this optimiser, whose derivative is not finite where an "
                "entry of the gradient is zero. For Adam and its kin set `eps_root=1e-12` or so.",
                stacklevel=2,
            )
        if not isinstance(is_smooth, Tracer) and is_smooth:
            return self
        return _RunToRounding(self, is_smooth)

    def evaluate(self, problem: Problem, x: PyTree, y: PyTree) -> tuple[PyTree, jax.Array]:
        wants_value = isinstance(self.transformation, optax.GradientTransformationExtraArgs)
        if wants_value and isinstance(problem, Minimum):
            value, optimality = problem.value_and_optimality(x, y)
        else:
            value, optimality = None, problem.optimality(x, y)
        return _Evaluation(optimality, value), problem.norm(optimality)

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
            updates, optimizer = self.transformation.update(
                optimality, iterate.state, iterate.x, **extra
            )
        except TypeError:
            # Which transformations evaluate an objective, only their signatures tell.
            if not extra:
                base.require_minimum(problem, "Optax")
            raise
        if self.learning_rate is not None:
            updates = trees.scale(-jnp.asarray(self.learning_rate), updates)
        x = optax.apply_updates(iterate.x, updates)
        return base.Iterate(x, *self.evaluate(problem, x, y), optimizer)


@trees.register
@dataclasses.dataclass(frozen=True)
class _RunToRounding(base.Solver):
    """An optimiser whose steps have no derivatives at a solution, to be run up to there.

    A line search decides by rounding there, and quasi-Newton methods divide differences of rounding
    by one another: in floating point the derivatives of such steps grow without bounds.
    """

    optimiser: Optax
    is_smooth: Any

    @property
    def rtol(self) -> Any:  # type: ignore[override]
        return self.optimiser.rtol

    @property
    def atol(self) -> Any:  # type: ignore[override]
        return self.optimiser.atol

    @property
    def maxiter(self) -> Any:  # type: ignore[override]
        return self.optimiser.maxiter

    def evaluate(self, problem: Problem, x: PyTree, y: PyTree) -> tuple[PyTree, jax.Array]:
        return self.optimiser.evaluate(problem, x, y)

    def init(self, problem: Problem, x: PyTree, y: PyTree) -> base.Iterate:
        return self.optimiser.init(problem, x, y)

    def step(self, problem: Problem, iterate: base.Iterate, y: PyTree) -> base.Iterate:
        return self.optimiser.step(problem, iterate, y)


def _slopes_at_a_solution(
    transformation: optax.GradientTransformation, zero: PyTree
) -> tuple[Any, Any]:
    """Tell whether an update has a finite derivative at a zero gradient, and a continuous one."""
    one = jax.tree.map(np.ones_like, zero)
    random = np.random.default_rng(0)

    def tiny(leaf: np.ndarray) -> np.ndarray:
        size = float(jnp.finfo(leaf.dtype).tiny) ** 0.4  # squares are in range
        return (size * random.normal(size=leaf.shape)).astype(leaf.dtype)

    def first(gradient: PyTree) -> tuple[PyTree, PyTree]:
        return transformation.update(gradient, transformation.init(zero), zero)

    def second(gradients: tuple[PyTree, PyTree], x: PyTree) -> PyTree:
        return transformation.update(gradients[1], first(gradients[0])[1], x)[0]

    slope = jax.jvp(lambda gradient: first(gradient)[0], (zero,), (one,))[1]
    is_finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(slope)]
    # Two ways to a solution, by gradients and points that are all but zero.
    slopes = []
    for _ in range(2):
        gradients = jax.tree.map(tiny, zero), jax.tree.map(tiny, zero)
        arguments = gradients, jax.tree.map(tiny, zero)
        slopes.append(jax.jvp(second, arguments, ((one, one), one))[1])
    is_close = [
        jnp.all(jnp.abs(u - w) <= 1e-3 * (jnp.abs(u) + jnp.abs(w)))
        for u, w in zip(*map(jax.tree.leaves, slopes), strict=True)
    ]
    return jnp.stack(is_finite).all(), jnp.stack(is_close).all()


def _stops_gradients(transformation: optax.GradientTransformation, zero: PyTree) -> bool:
    """Tell whether an update has `stop_gradient` in it."""
    extra: dict[str, Any] = {}
    if isinstance(transformation, optax.GradientTransformationExtraArgs):
        value = np.zeros((), trees.dtype(zero))
        extra = {"value": value, "grad": zero, "value_fn": lambda x: optax.tree.norm(x) ** 2}
    try:
        jaxpr = jax.make_jaxpr(
            lambda x: transformation.update(x, transformation.init(x), x, **extra)
        )
        return any(name == "stop_gradient" for name in _primitives(jaxpr(zero).jaxpr))
    except TypeError:  # it takes arguments of its own, and will tell
        return False


def _primitives(jaxpr: Any) -> Iterator[str]:
    """Yield the names of what a program is made of, however deep."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for parameter in jax.tree.leaves(tuple(equation.params.values())):
            inside = getattr(parameter, "jaxpr", parameter)
            if hasattr(inside, "eqns"):
                yield from _primitives(inside)


def _is_plain(transformation: Any) -> bool:
    return isinstance(transformation, optax.GradientTransformation) and not isinstance(
        transformation.init, Partial
    )
