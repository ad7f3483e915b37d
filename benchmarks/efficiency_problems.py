"""The problems of the study of hypergradient errors: data, objectives, rules and estimators."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from sklearn.datasets import load_breast_cancer, load_diabetes, load_svmlight_file

import bilevax as bx

PyTree = Any
Rows = tuple[jax.Array, jax.Array]  # features, and targets or labels (-1 or 1)
MAX_FEATURES = 500  # the exact diagonal of a Hessian takes one product per feature
MAX_ENTRIES = 5_000_000  # of a file, once it is dense
MAX_CLASSES = 20  # whole numbers with no more distinct values are classes


class DataError(ValueError):
    """The user's data cannot be used; the message says why, in one line."""


class Data(NamedTuple):
    """Standardised rows.

    Attributes:
      name: for titles.
      inner: which inner problem they are for, a key of `INNER`.
      features: (rows, features).
      targets: (rows,), standardised for ridge, -1 or 1 for logistic regression.
    """

    name: str
    inner: str
    features: np.ndarray
    targets: np.ndarray


def diabetes() -> Data:
    bunch: Any = load_diabetes(scaled=False)
    return _prepare("diabetes", bunch.data, bunch.target)


def breast_cancer() -> Data:
    bunch: Any = load_breast_cancer()
    return _prepare("breast cancer", bunch.data, bunch.target)


def read_libsvm(path: Path) -> Data:
    """Read a LIBSVM file; two distinct targets make it a logistic regression, more a ridge one."""
    try:
        features, targets, *_ = load_svmlight_file(str(path))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not a LIBSVM file: {reason}") from None
    rows, columns = features.shape
    if columns > MAX_FEATURES or rows * columns > MAX_ENTRIES:
        raise DataError(
            f"{path} is too large: {rows} rows of {columns} features, at most {MAX_FEATURES} "
            f"features and {MAX_ENTRIES} entries"
        )
    if rows < 10:
        raise DataError(f"{path} has {rows} rows, at least 10 are needed")
    features = features.toarray()
    if not (np.isfinite(features).all() and np.isfinite(targets).all()):
        raise DataError(f"{path} has values that are not finite numbers")
    classes = np.unique(targets)
    if len(classes) == 1:
        raise DataError(f"{path} has one class only: every target is {classes[0]:g}")
    if 2 < len(classes) <= MAX_CLASSES and np.all(classes == np.round(classes)):
        raise DataError(
            f"{path} has {len(classes)} classes; two classes or real valued targets are needed"
        )
    if np.all(features == features[0]):
        raise DataError(f"{path} has no feature that varies")
    return _prepare(path.stem, features, targets)


def _prepare(name: str, features: np.ndarray, targets: np.ndarray) -> Data:
    # The weight of a constant feature is zero, where the exponential change is singular.
    features = _standardise(features[:, np.any(features != features[0], axis=0)])
    classes = np.unique(targets)
    if len(classes) == 2:
        return Data(name, "logistic", features, np.where(targets == classes[1], 1.0, -1.0))
    return Data(name, "ridge", features, _standardise(targets))


def _standardise(values: np.ndarray) -> np.ndarray:
    return (values - values.mean(axis=0)) / values.std(axis=0)


def ridge(rows: Rows, x: jax.Array, y: jax.Array) -> jax.Array:
    """||X x - t||^2 / (2 n) + sum(exp(y) x^2) / (2 d)."""
    features, targets = rows
    return jnp.mean((features @ x - targets) ** 2) / 2 + jnp.mean(jnp.exp(y) * x**2) / 2


def logistic(rows: Rows, x: jax.Array, y: jax.Array) -> jax.Array:
    """mean(log(1 + exp(-t X x))) + sum(exp(y) x^2) / (2 d)."""
    return logistic_outer(rows, x, y) + jnp.mean(jnp.exp(y) * x**2) / 2


def linear_outer(slope: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """b . x + ||y||^2."""
    return slope @ x + jnp.sum(y**2)


def quadratic_outer(data: Rows, x: jax.Array, y: jax.Array) -> jax.Array:
    """||A x - b||^2 / 2."""
    matrix, shift = data
    return jnp.sum((matrix @ x - shift) ** 2) / 2


def logistic_outer(rows: Rows, x: jax.Array, y: jax.Array) -> jax.Array:
    """mean(log(1 + exp(-t X x))), on validation rows."""
    features, labels = rows
    return jnp.mean(jnp.logaddexp(0.0, -labels * (features @ x)))


INNER = {"ridge": ridge, "logistic": logistic}
# The curvature of the data term over that of the mean square; a bound for the logistic one.
CURVATURE = {"ridge": 1.0, "logistic": 0.25}
OUTER: dict[str, Callable[..., jax.Array]] = {
    "linear": linear_outer,
    "quadratic": quadratic_outer,
    "logistic": logistic_outer,
}


class Draw(NamedTuple):
    """What a seed decides.

    Attributes:
      train: the rows of the inner problem.
      outer: the data of the outer objective.
      y: one log-penalty per feature.
      x0: where gradient descent starts; not zero, where the exponential change is singular.
    """

    train: Rows
    outer: PyTree
    y: jax.Array
    x0: jax.Array


def draw(data: Data, outer: str, seed: int) -> Draw:
    """Draw penalties, a start, the split into halves, and A and b of the outer objective."""
    rng = np.random.default_rng(seed)
    rows, size = data.features.shape
    y, x0, b = jnp.asarray(rng.normal(size=(3, size)))
    matrix = jnp.asarray(rng.normal(size=(size, size)))
    halves = np.array_split(rng.permutation(rows), 2)
    train, validation = (
        (jnp.asarray(data.features[half]), jnp.asarray(data.targets[half])) for half in halves
    )
    outer_data = {"linear": b, "quadratic": (matrix, b), "logistic": validation}[outer]
    return Draw(train, outer_data, y, x0)


def problems(inner: str, outer: str, draw: Draw) -> tuple[bx.Problem, Partial]:
    """Return the inner problem and the outer objective."""
    return bx.minimum(Partial(INNER[inner], draw.train)), Partial(OUTER[outer], draw.outer)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IdealChange(bx.Change):
    """x = x_hat + F_1(x_hat, y)^{-1} F(z, y_hat), with (x_hat, y_hat) the current point.

    Where F is affine in x and the outer objective in x too, it makes the hypergradient exact.
    """

    y: jax.Array  # y_hat: what is given to phi is differentiated, this is not

    def localise(self, problem: bx.Problem, x: PyTree) -> Partial:
        return Partial(_ideal, problem, x, self.y)

    def invert(self, problem: bx.Problem, x: PyTree, y: PyTree) -> PyTree:
        # phi maps z to x_hat = x where F(z, y_hat) = 0, which is one Newton step away.
        value, jacobian = problem.linearize(x, self.y)
        return x - bx.linear_solve(jacobian, value, TIGHT)[0]


def _ideal(
    problem: bx.Problem, x: jax.Array, y_hat: jax.Array, z: jax.Array, y: jax.Array
) -> jax.Array:
    _, jacobian = problem.linearize(x, y)
    return x + bx.linear_solve(jacobian, problem.optimality(z, y_hat), TIGHT)[0]


# Linear solves to rounding, so that only the inexact x is to blame for an error. Those of a change
# of variables need not be positive definite, but for the ideal one: phi_1 is the identity at the
# current point of a ridge regression. With the exponential change the matrix is diag(x) F_1 diag(x)
# at the solution, and GMRES makes no way on it after a restart.
TIGHT = bx.CG(rtol=1e-14)
GENERAL = bx.Implicit(bx.GMRES(restart=MAX_FEATURES))
VANILLA = bx.Implicit(TIGHT)
NEWTON = bx.Preconditioned(VANILLA, step=bx.NewtonStep(TIGHT))
RULES: dict[str, Callable[[jax.Array], bx.Rule]] = {  # by y, which the ideal change needs
    "vanilla": lambda y: VANILLA,
    "jacobi": lambda y: bx.Preconditioned(VANILLA, step=bx.JacobiStep()),
    "newton": lambda y: NEWTON,
    "diagonal_change": lambda y: bx.Reparameterized(GENERAL, change=bx.DiagonalChange()),
    "exp_change": lambda y: bx.Reparameterized(GENERAL, change=bx.ExpChange()),
    "ideal_change_affine": lambda y: bx.Reparameterized(VANILLA, change=IdealChange(y)),
}


def hypergradient(
    outer: Callable[..., jax.Array], problem: bx.Problem, rule: bx.Rule, x: jax.Array, y: jax.Array
) -> jax.Array:
    """Return Omega(x, y), the hypergradient as a rule estimates it at x; NaN if a solve fails."""
    x, _ = rule.refine(problem, x, y)
    g_1, g_2 = jax.grad(outer, (0, 1))(x, y)
    pulled, report = rule.pullback(problem, x, y, g_1)
    return jnp.where(report.solve.status == bx.Status.CONVERGED, g_2 + pulled, jnp.nan)
