"""Data for the demo: two sets that come with scikit-learn, standardised and split."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_breast_cancer, load_digits

from bilevax._frontend.numbers import varies
from bilevax._frontend.words import DataError, clip

# A cell further from the mean than this, in deviations of the training rows, is refused: it would
# drown all other cells, and it overflows in the loss sooner or later.
MAX_DEVIATIONS = 1e6


class Table(NamedTuple):
    """Data as read.

    Attributes:
      name: a word for titles and file names.
      features: (rows, features), finite numbers.
      labels: (rows,), whole numbers from 0.
      feature_names: one per feature.
      class_names: one per class; labels count in their order.
      image_shape: (height, width) if the features are pixels.
    """

    name: str
    features: np.ndarray
    labels: np.ndarray
    feature_names: list[str]
    class_names: list[str]
    image_shape: tuple[int, int] | None = None


class Split(NamedTuple):
    """Some of the rows: standardised features, and labels."""

    features: jax.Array
    labels: jax.Array


@dataclasses.dataclass(frozen=True)
class Task:
    """A table, standardised and split into three parts."""

    name: str
    train: Split
    validation: Split
    test: Split
    feature_names: list[str]
    class_names: list[str]
    image_shape: tuple[int, int] | None
    constant: np.ndarray  # which features do not vary in the training rows

    @property
    def parts(self) -> dict[str, Split]:
        """The three parts by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def penalty_shape(self) -> tuple[int, int]:
        """One penalty per feature; with more than two classes, one per feature and class."""
        classes = len(self.class_names)
        return len(self.feature_names), 1 if classes == 2 else classes


def breast_cancer() -> Table:
    """Return the Wisconsin breast cancer data: 569 rows, 30 features, 2 classes."""
    return _from_sklearn("breast cancer", load_breast_cancer)


def digits() -> Table:
    """Return the handwritten digits: 1797 rows, 8 x 8 pixels, 10 classes."""
    return _from_sklearn("digits", load_digits, image_shape=(8, 8))


def prepare(table: Table, seed: int) -> Task:
    """Split a table into thirds and standardise it.

    Thirds, because the validation rows are what the penalties are fitted to: many penalties need
    many of them. Mean and deviation are those of the training rows.

    Raises:
      DataError: if a cell is too far from the training rows, or nothing varies in them.
    """
    train, validation, test = _split(table.labels, seed)
    with np.errstate(all="ignore"):  # what overflows here is refused below
        mean = table.features[train].mean(axis=0)
        deviation = table.features[train].std(axis=0)
        constant = ~varies(table.features[train])
        # The weight of a constant feature is zero, so that its values in other rows do not count.
        standardised = np.where(constant, 0, (table.features - mean) / deviation)
    _check_distance(table, standardised, deviation)
    if constant.all():
        raise DataError(f"no column of {table.name} varies in the training rows")

    def part(rows: np.ndarray) -> Split:
        return Split(jnp.asarray(standardised[rows]), jnp.asarray(table.labels[rows], jnp.int32))

    return Task(
        table.name,
        part(train),
        part(validation),
        part(test),
        table.feature_names,
        table.class_names,
        table.image_shape,
        constant,
    )


def _check_distance(table: Table, standardised: np.ndarray, deviation: np.ndarray) -> None:
    """Raise if a cell is too far from the training rows, and name it.

    A cell among the training rows enlarges their deviation and so is never far from their mean;
    it is refused if it is so large that their deviation overflows.
    """
    overflow = ~np.isfinite(deviation)
    far = overflow | ~(np.abs(standardised) <= MAX_DEVIATIONS)  # NaN is far too
    if not far.any():
        return
    column = int(far.any(axis=0).argmax())
    cells = table.features[far[:, column], column]
    cell = cells[np.abs(cells).argmax()]
    reason = (
        "so large that the deviation of the training rows overflows"
        if overflow[column]
        else f"more than {MAX_DEVIATIONS:.0e} deviations from the mean of the training rows"
    )
    raise DataError(
        f"column '{clip(table.feature_names[column])}' of {table.name} has a cell {cell:g}, "
        f"{reason}; correct it, or remove its row"
    )


def _split(labels: np.ndarray, seed: int) -> list[np.ndarray]:
    """Return the rows of three parts, which hold each class in equal shares."""
    generator = np.random.default_rng(seed)
    pieces = []
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        pieces.append(np.array_split(rows, 3))
    return [np.sort(np.concatenate(piece)) for piece in zip(*pieces, strict=True)]


def _from_sklearn(
    name: str, load: Callable[[], Any], image_shape: tuple[int, int] | None = None
) -> Table:
    bunch = load()
    feature_names = [str(feature) for feature in bunch.feature_names]
    class_names = [str(label) for label in bunch.target_names]
    return Table(name, bunch.data, bunch.target, feature_names, class_names, image_shape)
