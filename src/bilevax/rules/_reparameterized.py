"""The reparameterized implicit function theorem."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._failure import guard
from bilevax._problems import Problem
from bilevax._results import LinearReport, RuleReport
from bilevax._status import Status, code
from bilevax.rules._base import Settings, Wrapper
from bilevax.rules._changes import Change, allowed_mismatch

PyTree = Any


@trees.register
@dataclasses.dataclass(frozen=True)
class Reparameterized(Wrapper):
    """A rule applied in the variable z of a change x = phi(z, y).

        dx*/dy = phi_1 dz/dy + phi_2,   dz/dy = -G_1^{-1} G_2   (for `Implicit`)

    where z = phi^{-1}(x, y) and G(z, y) = phi_1^T F(phi(z, y), y), which for a minimum is
    d/dz f(phi(z, y), y). At x = x* all changes give the same derivative; at an inexact x a change
    with phi_1 = B^T is implicit differentiation of the root function B F.

    Away from the solution G_1 is symmetric for a minimum but need not be positive definite, so the
    default linear solver here is `GMRES()`; `Dense()` is the safe choice for small problems.

    Order of composition: `Reparameterized(Preconditioned(rule, step), change)` takes the step in z;
    `Preconditioned(Reparameterized(rule, change), step)` takes it in x.

    Args:
      rule: the rule that is applied in z.
      change: `ExpChange()`, `DiagonalChange()` or `ChangeOfVariables(phi, phi_inverse)`.

    Raises:
      TypeError: if `rule` is not a `Rule` or `change` not a `Change`.

    Example:
      >>> import bilevax as bx
      >>> problem = bx.minimum(lambda x, y: 0.5 * y * x**2 - x)  # x*(y) = 1 / y
      >>> rule = bx.Reparameterized(bx.Implicit(), change=bx.ExpChange())
      >>> round(float(rule.pullback(problem, 0.5, 2.0, 1.0)[0]), 4)
      -0.25

    Source:
      Z. Ye, G. Peyre, D. Cremers, P. Ablin, "Enhancing Hypergradients Estimation: A Study of
      Preconditioning and Reparameterization", 2024.
    """

    change: Change

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.is_component("change", self.change, Change, "ExpChange()")

    @property
    def adjoint_is_of_x(self) -> bool:  # type: ignore[override]
        """Never: it is that of z."""
        return False

    def check(self, problem: Problem, x: PyTree, y: PyTree) -> None:
        self.change.check(problem, x, y)

        def inside(x: PyTree, y: PyTree) -> None:
            phi = self.change.localise(problem, x)
            self.rule.check(problem.compose(phi), self.change.invert(problem, x, y), y)

        jax.eval_shape(inside, x, y)

    def check_values(self, x: PyTree, y: PyTree) -> None:
        self.change.check_values(x, y)

    def correct(
        self, problem: Problem, x: PyTree, y: PyTree, settings: Settings
    ) -> tuple[PyTree, LinearReport | None]:
        z = self.change.invert(problem, x, y)
        phi = self.change.localise(problem, x)
        corrected, report = self.rule.correct(problem.compose(phi), z, y, settings)
        if report is None:  # x stays what it is, to the last bit
            return x, None
        wrong, broken = _judge_inverse(phi(z, y), x)
        return phi(corrected, y), report._replace(status=jnp.where(wrong, broken, report.status))

    def pull(
        self,
        problem: Problem,
        x: PyTree,
        y: PyTree,
        cotangent: PyTree,
        guess: PyTree | None,
        settings: Settings,
    ) -> tuple[Problem, PyTree, RuleReport]:
        z = self.change.invert(problem, x, y)

        def transform(problem: Problem, y: PyTree, z: PyTree) -> tuple[PyTree, Problem]:
            phi = self.change.localise(problem, x)
            return phi(z, y), problem.compose(phi)

        # x = phi(z, y) depends on the problem and y directly (phi_2) and through z; the problem in
        # z depends on the problem too, by what its function closes over.
        (image, problem_in_z), pull_transform = jax.vjp(transform, problem, y, z)
        still = jax.tree.map(_zero_cotangent, problem_in_z)
        _, _, cotangent_z = pull_transform((cotangent, still))
        through_z, through_y, report = self.rule.pull(
            problem_in_z, z, y, cotangent_z, guess, settings
        )
        from_problem, from_y, _ = pull_transform((cotangent, through_z))
        cotangents = from_problem, trees.add_cotangents(from_y, through_y)
        # A phi that does not invert phi_inverse at x makes every number here meaningless.
        wrong, broken = _judge_inverse(image, x)
        cotangents = guard(settings.on_failure, "change of variables", wrong, broken, cotangents)
        solve = report.solve._replace(status=jnp.where(wrong, broken, report.solve.status))
        entries = report.identity_entries + self.change.identity_entries(x)
        return *cotangents, report._replace(solve=solve, identity_entries=entries)

    def push(
        self,
        problem: Problem,
        x: PyTree,
        y: PyTree,
        tangent: tuple[Problem, PyTree],
        settings: Settings,
    ) -> PyTree:
        z = self.change.invert(problem, x, y)
        tangent_problem, tangent_y = tangent

        def compose(problem: Problem) -> Problem:
            return problem.compose(self.change.localise(problem, x))

        def transform(problem: Problem, y: PyTree, z: PyTree) -> PyTree:
            return self.change.localise(problem, x)(z, y)

        problem_in_z, tangent_in_z = jax.jvp(compose, (problem,), (tangent_problem,))
        tangent_z = self.rule.push(problem_in_z, z, y, (tangent_in_z, tangent_y), settings)
        image, tangent_x = jax.jvp(
            transform, (problem, y, z), (tangent_problem, tangent_y, tangent_z)
        )
        wrong, broken = _judge_inverse(image, x)
        return guard(settings.on_failure, "change of variables", wrong, broken, tangent_x)


def _judge_inverse(image: PyTree, x: PyTree) -> tuple[jax.Array, jax.Array]:
    """Tell whether phi(phi_inverse(x, y), y) misses x, and the status that this deserves."""
    mismatch = trees.max_abs(trees.add_scaled(image, -1, x))
    wrong = ~(mismatch <= allowed_mismatch(x))
    finite = jnp.isfinite(trees.max_abs(x))
    return wrong, jnp.where(finite, code(Status.BREAKDOWN), code(Status.NONFINITE))


def _zero_cotangent(leaf: jax.Array) -> Any:
    return jax.custom_derivatives.zero_from_primal(leaf)
