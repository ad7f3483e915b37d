"""What engines take from call to call, and what they return."""

from typing import Any, NamedTuple

import jax
import optax.tree

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._results import LinearReport, SolveReport
from bilevax.certificates import Certificate

PyTree = Any


class WarmStart(NamedTuple):
    """Where the next inner and adjoint solves start.

    Attributes:
      x: the inner variable.
      adjoint: v of the adjoint system, a pytree like x (for a `Reparameterized` rule the entries
        are those of its z).
      start: the cold start x0. The relative tolerance of the inner solver refers to ||F(x0, y)||,
        for relative to what is small already no tolerance could be met; and after a failed inner
        solve the next one starts here.
    """

    x: PyTree
    adjoint: PyTree
    start: PyTree


class HypergradientReport(NamedTuple):
    """How the solves behind a hypergradient ended.

    Attributes:
      inner: the `SolveReport` of the inner solve, with the correction of a `Preconditioned` rule.
      adjoint: the `LinearReport` of the adjoint solve; None for rules without one (`Unrolled`).
      identity_entries: see `RuleReport`; None for rules without an adjoint solve.
      certificate: with `accuracy=` or `certified=True`, the `Certificate` of this very gradient, at
        the point and with the adjoint behind it; else None.
      dropped: under `OnFailure.DROP`, which tasks are no part of the gradient because a solve of
        theirs failed: a boolean per task, whose sum counts them. Else None.

    With `accuracy=` the inner solver stops by the certificate, so `inner.status` tells whether the
    accuracy was reached: CONVERGED; MAXITER; STALLED where this precision allows no more. Costs are
    those of all rounds together. For a `separable` problem, reports have one entry per task.
    """

    inner: SolveReport
    adjoint: LinearReport | None
    identity_entries: jax.Array | None
    certificate: Certificate | None = None
    dropped: jax.Array | None = None


class Hypergradient(NamedTuple):
    """The result of an engine.

    Attributes:
      value: g(x, y), a scalar.
      gradient: Omega(x, y), a pytree like y (float0 for integer and key leaves).
      x: the point at which both are evaluated, after a correction if the rule makes one.
      warm: the `WarmStart` for a nearby y.
      report: a `HypergradientReport`.
      aux: what the outer objective returns besides, with `has_aux=True`; else None.
    """

    value: jax.Array
    gradient: PyTree
    x: PyTree
    warm: WarmStart
    report: HypergradientReport
    aux: Any


def cold_start(x0: PyTree) -> WarmStart:
    """Return the warm start of a first call: x0, and zero for the adjoint.

    Args:
      x0: where the inner solver starts, a pytree of floating arrays.

    Returns:
      A `WarmStart`.

    Raises:
      TypeError: if x0 has leaves that are not real floating arrays.

    Example:
      >>> import bilevax as bx
      >>> warm = bx.cold_start(1.0)
      >>> float(warm.x), float(warm.adjoint)
      (1.0, 0.0)
    """
    checks.inner_variable(x0, "x0")
    x0 = trees.as_arrays(x0)
    return WarmStart(x0, optax.tree.zeros_like(x0), x0)
