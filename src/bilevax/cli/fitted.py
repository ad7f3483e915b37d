"""A fitted model: model.json, and its predictions."""

import json
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import softmax

from bilevax._frontend.words import DataError, quote
from bilevax.cli.choices import Kind
from bilevax.cli.data import Data
from bilevax.cli.rows import Rows, Scaling

_FORMAT = "bilevax model 1"


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
        """Return predictions for rows of features in the user's units."""
        scaling = self.scaling
        standardised = (features - scaling.means) / scaling.scales
        scores = standardised @ self.coefficients.T + self.intercepts
        if self.classes is None:
            values = scores[:, 0] * scaling.target_scale + scaling.target_mean
            return pd.DataFrame({"prediction": values})
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
        "format": _FORMAT,
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
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:  # no JSON, or no text
        raise DataError(f"{path} is not a model: it is not a JSON file") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise DataError(
            f"{path} is not a model: its format is not {quote(_FORMAT)}; give the model.json that "
            "bilevax tune wrote"
        )
    try:
        return _from_json(content)
    except (KeyError, TypeError, ValueError) as error:
        fault = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path} is not a whole model: {fault}") from None


def _from_json(content: dict[str, Any]) -> Fitted:
    preprocessing, standardised = content["preprocessing"], content["standardised"]
    model = Fitted(
        Kind(content["model"]),
        content["target"],
        content["classes"],
        content["features"],
        content["constant_features"],
        Scaling(
            np.array(preprocessing["means"], dtype=float),
            np.array(preprocessing["scales"], dtype=float),
            float(preprocessing["target_mean"]),
            float(preprocessing["target_scale"]),
        ),
        np.array(content["penalties"], dtype=float),
        np.array(standardised["coefficients"], dtype=float),
        np.array(standardised["intercepts"], dtype=float),
    )
    count = len(model.features)
    outputs = len(model.classes or [None]) if model.kind is Kind.MULTINOMIAL else 1
    shapes = {
        "means": (model.scaling.means, (count,)),
        "scales": (model.scaling.scales, (count,)),
        "penalties": (model.penalties, (count,)),
        "coefficients": (model.coefficients, (outputs, count)),
        "intercepts": (model.intercepts, (outputs,)),
    }
    for name, (value, shape) in shapes.items():
        if value.shape != shape:
            raise ValueError(f"its {name} have the shape {value.shape}, expected {shape}")
    return model
