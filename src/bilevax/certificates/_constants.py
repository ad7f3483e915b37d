"""What a bound needs to know of a problem."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from bilevax import _checks as checks
from bilevax import _trees as trees
from bilevax._closures import as_partial
from bilevax.certificates import _glm as glm

PyTree = Any


@trees.register
@dataclasses.dataclass(frozen=True)
class BoundConstants:
    """What is known of a problem whose F is strongly monotone in x, as the gradient of a strongly
    convex f is.

    The strong convexity makes the norms: with mu per entry of x, or one for all,

        ||u||^2 = sum mu u^2  of what is like x or v,      ||w||_*^2 = sum w^2 / mu  of F, g_1,

    and the norm of what is like y is Euclidean. In units of their own for every entry, mu and the
    other constants change so that nothing else does. All constants hold for y as it is, and for x
    in a ball of `radius`, in that norm, about a point.

    Args:
      strong_convexity: mu, with <F(a) - F(b), a - b> >= ||a - b||^2; a positive number, or a pytree
        like x.
      jacobian: Lipschitz constant of F_1: ||(F_1(a) - F_1(b))^T v||_* <= jacobian ||a - b|| ||v||.
        Zero where F is affine in x.
      mixed: ||F_2(x)^T v|| <= mixed ||v|| at the point.
      mixed_change: Lipschitz constant of F_2: ||(F_2(a) - F_2(b))^T v|| <= mixed_change ||a - b||
        ||v||.
      outer_x: Lipschitz constant of g_1: ||g_1(a) - g_1(b)||_* <= outer_x ||a - b||.
      outer_y: Lipschitz constant of g_2: ||g_2(a) - g_2(b)|| <= outer_y ||a - b||. Zero where g
        is a loss of x plus a prior of y.
      smoothness: ||F_1 v||_* <= smoothness ||v||. This and the next three are for rounding alone:
        they bound sums of *absolute* terms, as Frobenius norms do and eigenvalues need not.
      optimality_terms: ||.||_* of the absolute terms that add up to F(x).
      outer_terms: ||.||_* of those that add up to g_1(x).
      roundings: how many roundings a number goes through, one by one: the lengths of all sums on
        the way to an entry of F, g or a derivative, added.
      radius: of the ball; a bound that needs a larger one is infinite.

    Raises:
      ValueError: if `strong_convexity` is a number that is not positive, or another one negative.

    Example:
      >>> import jax.numpy as jnp
      >>> import bilevax as bx
      >>> train = validation = jnp.eye(2), jnp.array([1.0, 2.0])
      >>> constants = bx.BoundConstants.ridge(train, validation)
      >>> log_penalties = jnp.log(jnp.array([0.5, 2.0]))
      >>> at = constants(jnp.array([1.0, 2.0]), log_penalties)
      >>> [round(float(mu), 3) for mu in at.strong_convexity], float(at.jacobian)
      ([0.5, 2.0], 0.0)
    """

    strong_convexity: Any
    jacobian: Any
    mixed: Any
    mixed_change: Any
    outer_x: Any
    outer_y: Any
    smoothness: Any
    optimality_terms: Any
    outer_terms: Any
    roundings: Any
    radius: Any = jnp.inf

    def __post_init__(self) -> None:
        checks.positive("strong_convexity", self.strong_convexity)
        for field in dataclasses.fields(self)[1:]:
            checks.not_negative(field.name, getattr(self, field.name))

    @staticmethod
    def ridge(train: Any, validation: Any) -> Partial:
        """Return the constants of ridge regression, tuned on validation rows.

            f(x, y) = mean((A x - b)^2) / 2 + sum(exp(y) x^2) / 2
            g(x, y) = mean((C x - d)^2) / 2 + any function of y

        y is an array that broadcasts against x: one log-penalty for all, or one for each entry.

        Args:
          train: the pair (A, b).
          validation: the pair (C, d).

        Returns:
          A function of (x, y) for `hypergradient_bound` and `maid`.

        Raises:
          TypeError: if A and C are no matrices with as many columns.
        """
        return _of_glm(train, validation, Partial(glm.squares))

    @staticmethod
    def logistic(train: Any, validation: Any) -> Partial:
        """Return the constants of logistic regression with labels of -1 and 1.

            f(x, y) = mean(log(1 + exp(-b (A x)))) + sum(exp(y) x^2) / 2
            g(x, y) = mean(log(1 + exp(-d (C x)))) + any function of y

        For arguments, returns and raises see `ridge`.
        """
        return _of_glm(train, validation, Partial(glm.logistic))

    @staticmethod
    def poisson(train: Any, validation: Any) -> Partial:
        """Return the constants of Poisson regression, on a ball about the point.

            f(x, y) = mean(exp(A x) - b (A x)) + sum(exp(y) x^2) / 2
            g(x, y) = mean(exp(C x) - d (C x)) + any function of y

        There are none that hold everywhere. The ball has twice the radius that contains x*, and
        far away from x* the bounds are as large as exp makes them. For arguments, returns and
        raises see `ridge`.
        """
        return _of_glm(train, validation, Partial(glm.poisson))


def checked_constants(constants: Any) -> BoundConstants | Partial:
    """Return constants, or the function that makes them; raise if they are neither."""
    if isinstance(constants, BoundConstants):
        return constants
    if not callable(constants) or isinstance(constants, type):
        checks.is_component(
            "constants", constants, BoundConstants, "BoundConstants.ridge(train, validation)"
        )
    return as_partial("constants", constants)


def _of_glm(train: Any, validation: Any, loss: Partial) -> Partial:
    train, validation = glm.checked("train", train), glm.checked("validation", validation)
    if train[0].shape[1] != validation[0].shape[1]:
        raise TypeError(
            "`train` and `validation` must have as many columns, "
            f"got {train[0].shape[1]} and {validation[0].shape[1]}."
        )
    return Partial(_glm_constants, train, validation, loss)


def _glm_constants(
    train: Any, validation: Any, loss: Partial, x: jax.Array, y: jax.Array
) -> BoundConstants:
    return BoundConstants(**glm.constants(train, validation, loss, x, y))
