"""Which rows train and which are held out, as weights of all rows."""

from typing import NamedTuple

import numpy as np

from bilevax.cli.rows import Rows

_VALIDATION_PARTS = 5  # of a validation file, each of which scores what the others have chosen


class Folds(NamedTuple):
    """The fits of one search, its tasks: folds that choose penalties, and last a fit with them.

    Weights of all rows, so that folds of all sizes have one shape.

    Attributes:
      train: (tasks, rows), one over the number of training rows, or zero.
      held_out: (tasks, rows), one over the number of held-out rows, or zero. What the last task
        holds out has no part in the choice: its loss is honest.
      variance: (tasks, features), of the training rows; one where a feature does not vary in them,
        so that the penalty makes its weight zero.
    """

    train: np.ndarray
    held_out: np.ndarray
    variance: np.ndarray

    @property
    def choosing(self) -> "Folds":
        """The tasks but the last."""
        return Folds(*(part[:-1] for part in self))


class Masks(NamedTuple):
    """The same as yes or no, of which many take little memory: (tasks, rows) each."""

    train: np.ndarray
    held_out: np.ndarray


class Plan(NamedTuple):
    """The search for penalties, and the searches that score it.

    Attributes:
      search: with all training rows in its last fit.
      nested: the same search without some rows, which its last fit holds out; each row of the
        data, or of the validation file, is held out by one of them.
    """

    search: Masks
    nested: list[Masks]

    @property
    def scored(self) -> np.ndarray:
        """A mask of the rows that nested searches hold out, (rows,)."""
        return np.any([masks.held_out[-1] for masks in self.nested], axis=0)


def split(count: int, labels: np.ndarray | None, rows: np.ndarray, seed: int) -> list[np.ndarray]:
    """Return masks of `count` parts of the rows of a mask, with each class in equal shares.

    Args:
      count: of the parts, whose sizes differ by one at most.
      labels: of all rows; None if they have none.
      rows: (rows,), a mask: which of them to split.
      seed: of the order in which they are dealt out.
    """
    order = np.random.default_rng(seed).permutation(np.flatnonzero(rows))
    if labels is not None:
        order = order[np.argsort(labels[order], kind="stable")]
    parts = np.zeros((count, len(rows)), dtype=bool)
    parts[np.arange(len(order)) % count, order] = True
    return list(parts)


def cross_validation(labels: np.ndarray | None, rows: int, count: int, seed: int) -> Plan:
    """Return folds that train on all rows but those they hold out.

    The nested searches have as many folds, of the rows that are left.
    """
    everything, nothing = np.ones(rows, dtype=bool), np.zeros(rows, dtype=bool)
    parts = split(count, labels, everything, seed)

    def search(kept: np.ndarray, parts: list[np.ndarray], scored: np.ndarray) -> Masks:
        return Masks(
            np.stack([*(kept & ~part for part in parts), kept]), np.stack([*parts, scored])
        )

    nested = [search(~part, split(count, labels, ~part, seed), part) for part in parts]
    return Plan(search(everything, parts, nothing), nested)


def validation(training: int, rows: int, seed: int) -> Plan:
    """Return one fold that trains on the first rows and holds out the others.

    The nested searches hold out some of the others, and choose by the rest.
    """
    train, nothing = np.arange(rows) < training, np.zeros(rows, dtype=bool)
    count = min(_VALIDATION_PARTS, rows - training)

    def search(scored: np.ndarray) -> Masks:
        return Masks(np.stack([train, train]), np.stack([~train & ~scored, scored]))

    parts = split(count, None, ~train, seed) if count > 1 else []
    return Plan(search(nothing), [search(part) for part in parts])


def make_folds(rows: Rows, masks: Masks) -> Folds:
    """Return the weights of the rows in some masks."""
    variance = np.empty((len(masks.train), len(rows.noise)))
    for j, mask in enumerate(masks.train):
        part = rows.features[mask]
        # Not by the variance, which rounding makes positive.
        variance[j] = np.where(np.ptp(part, axis=0) <= rows.noise, 1.0, part.var(axis=0))
    counts = np.maximum(masks.held_out.sum(axis=1, keepdims=True), 1)
    train = masks.train / masks.train.sum(axis=1, keepdims=True)
    return Folds(train, masks.held_out / counts, variance)
