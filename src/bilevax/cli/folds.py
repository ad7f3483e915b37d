"""Which rows train and which are held out, as weights of all rows."""

from typing import NamedTuple

import numpy as np
from sklearn.model_selection import KFold, StratifiedKFold


class Folds(NamedTuple):
    """Weights of all rows, so that folds of all sizes have one shape.

    Attributes:
      train: (folds, rows), one over the number of training rows, or zero.
      held_out: (folds, rows), one over the number of held-out rows, or zero.
      variance: (folds, features), of the training rows; one where a feature does not vary in them,
        so that the penalty makes its weight zero.
    """

    train: np.ndarray
    held_out: np.ndarray
    variance: np.ndarray


def split(count: int, labels: np.ndarray | None, rows: int, seed: int) -> list[np.ndarray]:
    """Return which rows each of `count` folds holds out; each class in equal shares."""
    if labels is None:
        splits = KFold(count, shuffle=True, random_state=seed).split(np.zeros(rows))
    else:
        splitter = StratifiedKFold(count, shuffle=True, random_state=seed)
        splits = splitter.split(np.zeros(rows), labels)
    return [held_out for _, held_out in splits]


def cross_validation(features: np.ndarray, held_out: list[np.ndarray]) -> Folds:
    """Return folds that train on all rows but those they hold out."""
    masks = np.zeros((len(held_out), len(features)), dtype=bool)
    for mask, rows in zip(masks, held_out, strict=True):
        mask[rows] = True
    return _folds(features, ~masks, masks)


def one_split(features: np.ndarray, training: int) -> Folds:
    """Return one fold that trains on the first rows and holds out the others."""
    mask = np.arange(len(features))[None] < training
    return _folds(features, mask, ~mask)


def everything(features: np.ndarray, training: int) -> Folds:
    """Return one fold that trains on the first rows and holds out nothing."""
    mask = np.arange(len(features))[None] < training
    return _folds(features, mask, np.zeros_like(mask))


def _folds(features: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> Folds:
    parts = [features[mask] for mask in train]
    # Not by the variance, which rounding makes positive.
    constant = np.stack([part.max(axis=0) == part.min(axis=0) for part in parts])
    variance = np.where(constant, 1.0, np.stack([part.var(axis=0) for part in parts]))
    counts = np.maximum(held_out.sum(axis=1, keepdims=True), 1)
    return Folds(train / train.sum(axis=1, keepdims=True), held_out / counts, variance)
