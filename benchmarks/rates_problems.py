"""The inner problems of the study of rates, as contractions, and their truth.

Section 4 of R. Grazzi, L. Franceschi, M. Pontil, S. Salzo, "On the Iteration Complexity of
Hypergradient Computation", 2020. X, t are training rows and targets, X', t' validation ones:

  logistic   f = mean log(1 + exp(-t X x)) + sum y x^2 / 2,       g = mean log(1 + exp(-t' X' x))
  kernel     f = (x . (K + y_0 I) x) / 2 - x . t,                 g = ||K' x - t'||^2 / 2
             K_ij = exp(-sum over features k of y_k (X_ik - X_jk)^2), and K' between X' and X
  biased     f = ||X x - t||^2 / 2 + lambda ||x - y||^2 / 2,      g = ||X' x - t'||^2 / 2
  features   f = ||X y x - t||^2 / 2 + lambda ||x||^2 / 2,        g = ||X' y x - t'||^2 / 2

So y has one penalty per feature; a ridge y_0 and one inverse bandwidth per feature; the point that
x is drawn to; a matrix that makes features out of others. Rows are divided by the square root of
their number, which the formulas leave out. All are solved by gradient steps,

  T(x, y) = x - alpha grad_x f(x, y),   alpha = 1 / L,

L being the largest curvature, so that T_1 is symmetric with eigenvalues in [0, 1): with
alpha = 2 / (L + mu) the smallest would be the negative of the largest, and errors would depend on
whether t is even. alpha is a number: it does not follow y.

The smallest curvature stands apart from the others, so that its rate is seen long before rounding:
the last feature is weak (`logistic`, `biased`), or the last feature made (`features`), or two
points nearly coincide (`kernel`).

What the estimates are held against is computed with NumPy alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rates_contractions import Data, Derivatives, Draw, Setting

ROWS, VALIDATION_ROWS, FEATURES = 200, 50, 40
POINTS = 40  # of the kernel
WEAK = 0.1  # size of what has the smallest curvature by far
MADE = 10  # features that `features` makes out of those
NOISE = 0.5
KERNEL_FEATURES = 8
PENALTY = 0.2  # lambda


def _half_square(residual: jax.Array) -> jax.Array:
    return jnp.sum(residual**2) / 2


# Logistic regression. Labels are -1 or 1; the rows are not divided, for the loss is a mean.
def _logistic_loss(rows: jax.Array, labels: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.logaddexp(0.0, -labels * (rows @ x)))


def _logistic(data: Data, x: jax.Array, y: jax.Array) -> jax.Array:
    return _logistic_loss(data.rows, data.targets, x) + jnp.sum(y * x**2) / 2


def _logistic_outer(data: Data, x: jax.Array, y: jax.Array) -> jax.Array:
    return _logistic_loss(data.validation_rows, data.validation_targets, x)


def _draw_logistic(seed: int) -> Draw:
    rng, rows, scores = _regression_rows(seed, divide=False, weak=WEAK)
    labels = [np.where(part > 0, 1.0, -1.0) for part in scores]
    y = 0.1 * np.exp(0.3 * rng.normal(size=FEATURES))
    y[-1] = 0.07
    return Data(rows[0], labels[0], rows[1], labels[1], 0.0), y, FEATURES


def _logistic_derivatives(data: Data, y: np.ndarray, x: np.ndarray) -> Derivatives:
    def terms(rows: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        wrong = 1 / (1 + np.exp(labels * (rows @ x)))
        hessian = rows.T @ ((wrong * (1 - wrong))[:, None] * rows) / len(rows)
        return -rows.T @ (labels * wrong) / len(rows), hessian

    gradient, hessian = terms(data.rows, data.targets)
    outer_x, _ = terms(data.validation_rows, data.validation_targets)
    return Derivatives(gradient + y * x, hessian + np.diag(y), np.diag(x), outer_x, 0 * y)


# Kernel ridge regression.
def _kernel_ridge(data: Data, x: jax.Array, y: jax.Array) -> jax.Array:
    smooth = _gaussian(data.rows, data.rows, y[1:]) @ x
    return x @ (smooth + y[0] * x) / 2 - x @ data.targets


def _kernel_outer(data: Data, x: jax.Array, y: jax.Array) -> jax.Array:
    predicted = _gaussian(data.validation_rows, data.rows, y[1:]) @ x
    return _half_square(predicted - data.validation_targets)


def _gaussian(left: jax.Array, right: jax.Array, bandwidths: jax.Array) -> jax.Array:
    return jnp.exp(-((left[:, None, :] - right[None, :, :]) ** 2) @ bandwidths)


def _draw_kernel(seed: int) -> Draw:
    rng = np.random.default_rng(seed)
    rows, validation = rng.normal(size=(2, POINTS, KERNEL_FEATURES))
    rows[-1] = rows[0] + WEAK * rng.normal(size=KERNEL_FEATURES)
    slope = rng.normal(size=KERNEL_FEATURES)
    targets, held_out = (
        np.sin(part @ slope) + NOISE * rng.normal(size=POINTS) for part in (rows, validation)
    )
    y = np.append(0.5, 0.4 * np.exp(0.3 * rng.normal(size=KERNEL_FEATURES)))
    return Data(rows, targets, validation, held_out, 0.0), y, POINTS


def _kernel_derivatives(data: Data, y: np.ndarray, x: np.ndarray) -> Derivatives:
    def with_slopes(left: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return K, and the derivative of K x in each bandwidth, a column for each."""
        squares = (left[:, None, :] - data.rows[None, :, :]) ** 2
        kernel = np.exp(-squares @ y[1:])
        return kernel, -np.einsum("ij,ijk,j->ik", kernel, squares, x)

    kernel, slopes = with_slopes(data.rows)
    hessian = kernel + y[0] * np.eye(len(x))
    outer_kernel, outer_slopes = with_slopes(data.validation_rows)
    residual = outer_kernel @ x - data.validation_targets
    return Derivatives(
        hessian @ x - data.targets,
        hessian,
        np.column_stack([x, slopes]),
        outer_kernel.T @ residual,
        np.append(0.0, residual @ outer_slopes),
    )


# Biased regularisation.
def _biased(data: Data, x: jax.Array, y: jax.Array) -> jax.Array:
    return _half_square(data.rows @ x - data.targets) + data.penalty * _half_square(x - y)


def _biased_outer(data: Data, x: jax.Array, y: jax.Array) -> jax.Array:
    return _half_square(data.validation_rows @ x - data.validation_targets)


def _draw_biased(seed: int) -> Draw:
    rng, rows, targets = _regression_rows(seed, weak=WEAK)
    y = rng.normal(size=FEATURES)
    return Data(rows[0], targets[0], rows[1], targets[1], PENALTY), y, FEATURES


def _biased_derivatives(data: Data, y: np.ndarray, x: np.ndarray) -> Derivatives:
    eye, held_out = data.penalty * np.eye(len(x)), data.validation_rows
    return Derivatives(
        data.rows.T @ (data.rows @ x - data.targets) + data.penalty * (x - y),
        data.rows.T @ data.rows + eye,
        -eye,
        held_out.T @ (held_out @ x - data.validation_targets),
        0 * y,
    )


# Hyper-representation: y is the matrix that makes features.
def _features(data: Data, x: jax.Array, y: jax.Array) -> jax.Array:
    return _half_square(data.rows @ (y @ x) - data.targets) + data.penalty * _half_square(x)


def _features_outer(data: Data, x: jax.Array, y: jax.Array) -> jax.Array:
    return _half_square(data.validation_rows @ (y @ x) - data.validation_targets)


def _draw_features(seed: int) -> Draw:
    rng, rows, targets = _regression_rows(seed)
    y = rng.normal(size=(FEATURES, MADE)) / np.sqrt(FEATURES)
    y[:, -1] *= 0.4
    return Data(rows[0], targets[0], rows[1], targets[1], PENALTY), y, MADE


def _features_derivatives(data: Data, y: np.ndarray, x: np.ndarray) -> Derivatives:
    rows, held_out = data.rows, data.validation_rows
    made = rows @ y
    slope = rows.T @ (made @ x - data.targets)
    outer_slope = held_out.T @ (held_out @ (y @ x) - data.validation_targets)
    # grad_x f is y^T slope + lambda x, and slope depends on y too.
    mixed = np.einsum("cb,a->cab", np.eye(len(x)), slope)
    mixed += np.einsum("ca,b->cab", made.T @ rows, x)
    return Derivatives(
        y.T @ slope + data.penalty * x,
        made.T @ made + data.penalty * np.eye(len(x)),
        mixed.reshape(len(x), -1),
        y.T @ outer_slope,
        np.outer(outer_slope, x).ravel(),
    )


def _regression_rows(
    seed: int, divide: bool = True, weak: float = 1.0
) -> tuple[Any, list[Any], list[Any]]:
    """Return a generator, and rows and noisy linear targets for training and validation."""
    rng = np.random.default_rng(seed)
    slope = rng.normal(size=FEATURES) / np.sqrt(FEATURES)
    rows, targets = [], []
    for count in (ROWS, VALIDATION_ROWS):
        part = rng.normal(size=(count, FEATURES))
        part[:, -1] *= weak
        target = part @ slope + NOISE * rng.normal(size=count)
        size = np.sqrt(count) if divide else 1.0
        rows.append(part / size)
        targets.append(target / size)
    return rng, rows, targets


SETTINGS = {
    "logistic": Setting(
        "logistic regression", _logistic, _logistic_outer, _draw_logistic, _logistic_derivatives
    ),
    "kernel": Setting(
        "kernel ridge regression", _kernel_ridge, _kernel_outer, _draw_kernel, _kernel_derivatives
    ),
    "biased": Setting(
        "biased regularisation",
        _biased,
        _biased_outer,
        _draw_biased,
        _biased_derivatives,
        affine=True,
    ),
    "features": Setting(
        "hyper-representation", _features, _features_outer, _draw_features, _features_derivatives
    ),
}
