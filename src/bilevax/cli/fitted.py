"""A fitted model: model.json, and its predictions."""

from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import softmax

from bilevax._frontend.words import DataError
from bilevax.cli.choices import Kind
from bilevax.cli.data import Data
from bilevax.cli.rows import Rows, Scaling
from bilevax.cli.schema import FORMAT, Content


class Fitted(NamedTuple):
    """What `tune` finds and `predict` needs.

    Attributes:
      kind: of the model.
      target: the name of the target column; None for a LIBSVM file.
      classes: their names in order; None for ridge.
      features: their names.
      dropped: the names of those that are left out, for they were constant in the training rows.
      scaling: means and scales of the training rows.
      penalties: (features,).
      coefficients: (outputs, features), of standardised features; one output for ridge and for two
        classes of a logistic regression, else one per class.
      intercepts: (outputs,).
    """

    kind: Kind
    target: str | None
    classes: list[str] | None
    features: list[str]
    dropped: list[str]
    scaling: Scaling
    penalties: np.ndarray
    coefficients: np.ndarray
    intercepts: np.ndarray

    def predict(self, features: np.ndarray) -> pd.DataFrame:
        """Return predictions for rows of features in the user's units.

        Raises:
          DataError: if a feature is so far from those of the training rows that numbers overflow.
        """
        scaling = self.scaling
        with np.errstate(all="ignore"):  # what overflows here is refused below
            standardised = (features - scaling.means) / scaling.scales
            scores = standardised @ self.coefficients.T + self.intercepts
            scores = scores * scaling.target_scale + scaling.target_mean
        wrong = ~np.isfinite(scores).all(axis=1)
        if wrong.any():
            raise DataError(
                f"the prediction of row {wrong.argmax() + 1} overflows: its features are too far "
                "from those that the model was trained on"
            )
        if self.classes is None:
            return pd.DataFrame({"prediction": scores[:, 0]})
        logits = np.hstack([np.zeros_like(scores), scores]) if scores.shape[1] == 1 else scores
        columns = {"prediction": np.array(self.classes)[logits.argmax(axis=1)]}
        for name, probability in zip(self.classes, softmax(logits, axis=1).T, strict=True):
            columns[f"probability {name}"] = probability
        return pd.DataFrame(columns)

    def original(self) -> tuple[np.ndarray, np.ndarray]:
        """Return coefficients and intercepts in the user's units."""
        scaling = self.scaling
        coefficients = scaling.target_scale * self.coefficients / scaling.scales
        intercepts = scaling.target_scale * self.intercepts + scaling.target_mean
        return coefficients, intercepts - coefficients @ scaling.means


def make_fitted(
    kind: Kind,
    target: str | None,
    data: Data,
    scaling: Scaling,
    rows: Rows,
    penalties: np.ndarray,
    weights: np.ndarray,
) -> Fitted:
    """Return a model from weights of one task."""
    if kind is Kind.MULTINOMIAL and rows.basis is not None:
        weights = rows.basis @ weights
    return Fitted(
        kind,
        target,
        data.classes,
        data.names,
        data.dropped,
        scaling,
        penalties,
        weights[:, :-1],
        weights[:, -1],
    )


def to_json(model: Fitted) -> dict[str, Any]:
    """Return what model.json holds."""
    coefficients, intercepts = model.original()
    scaling = model.scaling
    return {
        "format": FORMAT,
        "version": metadata.version("bilevax"),
        "model": model.kind.value,
        "target": model.target,
        "classes": model.classes,
        "features": model.features,
        "constant_features": model.dropped,
        "penalties": model.penalties.tolist(),
        "preprocessing": {
            "means": scaling.means.tolist(),
            "scales": scaling.scales.tolist(),
            "target_mean": scaling.target_mean,
            "target_scale": scaling.target_scale,
        },
        "standardised": {
            "coefficients": model.coefficients.tolist(),
            "intercepts": model.intercepts.tolist(),
        },
        "original": {
            "coefficients": coefficients.tolist(),
            "intercepts": intercepts.tolist(),
        },
    }


def read_model(path: Path) -> Fitted:
    """Read model.json.

    Raises:
      DataError: if the file is not one.
    """
    found = Content(path)
    return Fitted(
        found.kind,
        found.target,
        found.classes,
        found.features,
        found.dropped,
        Scaling(found.means, found.scales, found.target_mean, found.target_scale),
        found.penalties,
        found.coefficients,
        found.intercepts,
    )
