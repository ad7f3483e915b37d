"""Standardised rows, as the losses take them."""

from typing import NamedTuple

import numpy as np

from bilevax._frontend.numbers import rounding
from bilevax._frontend.words import DataError, quote, shorten
from bilevax.cli.choices import Kind
from bilevax.cli.data import Data


class Scaling(NamedTuple):
    """Means and standard deviations of the training rows.

    Attributes:
      means: (features,).
      scales: (features,).
      target_mean: zero for classes.
      target_scale: one for classes.
    """

    means: np.ndarray
    scales: np.ndarray
    target_mean: float
    target_scale: float


class Rows(NamedTuple):
    """All rows, as the losses take them. Rows are the last axis, which makes products fast.

    Attributes:
      design: (features + 1, rows), standardised features, and ones for the intercept.
      target: (1, rows), the standardised target of ridge; (classes, rows), one for the class of a
        row, elsewhere zero.
      basis: (classes, columns), by which scores become logits; None for ridge.
      noise: (features,), the rounding error of a standardised feature: what varies by no more is
        constant.
    """

    design: np.ndarray
    target: np.ndarray
    basis: np.ndarray | None
    noise: np.ndarray

    @property
    def features(self) -> np.ndarray:
        """The standardised features, (rows, features)."""
        return self.design[:-1].T


def standardise(data: Data) -> Scaling:
    """Return the means and scales of the rows.

    Raises:
      DataError: if a column is too large for them.
    """
    with np.errstate(all="ignore"):  # what overflows here is refused below
        means, scales = data.features.mean(axis=0), data.features.std(axis=0)
        target_mean, target_scale = data.target.mean(), data.target.std()
    if data.classes is not None:
        target_mean, target_scale = 0.0, 1.0
    columns = zip([*data.names, "the target"], [*scales, target_scale], strict=True)
    bad = [quote(name) for name, scale in columns if not (np.isfinite(scale) and scale > 0)]
    if bad:
        raise DataError(
            f"the standard deviation of {shorten(bad)} overflows or vanishes; rescale the column"
        )
    return Scaling(means, scales, float(target_mean), float(target_scale))


def as_rows(data: Data, scaling: Scaling, kind: Kind) -> Rows:
    """Return the standardised rows."""
    features = (data.features - scaling.means) / scaling.scales
    design = np.concatenate([features.T, np.ones((1, len(features)))])
    noise = rounding(data.features) / scaling.scales
    if data.classes is None:
        target = (data.target - scaling.target_mean) / scaling.target_scale
        return Rows(design, target[None], None, noise)
    classes = np.arange(len(data.classes))
    target = (classes[:, None] == data.target).astype(np.float64)
    return Rows(design, target, score_basis(kind, len(classes)), noise)


def score_basis(kind: Kind, classes: int) -> np.ndarray:
    """Return what turns scores into logits, (classes, columns).

    Two classes of a logistic regression have one column, the log-odds of the second. The logits of
    a multinomial one count up to a constant, and a penalty shared by all classes makes their
    coefficients sum to zero. So there is an orthonormal basis of what sums to zero: the penalty is
    the same in it, and the Hessian has no null space.
    """
    if kind is Kind.LOGISTIC:
        return np.array([[0.0], [1.0]])
    spanning = np.hstack([np.ones((classes, 1)), np.eye(classes)[:, 1:]])
    return np.linalg.qr(spanning)[0][:, 1:]
