"""Checks and classes: from a table to numbers."""

import difflib
from typing import NamedTuple

import numpy as np
import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from bilevax._frontend.numbers import varies
from bilevax._frontend.words import (
    DataError,
    counted,
    in_order,
    is_number,
    one_line,
    quote,
    shorten,
)
from bilevax.cli.choices import MISSING, Kind
from bilevax.cli.files import Table

_MISSING = f"{shorten(list(MISSING), 8)} (see bilevax tune --help)"


class Data(NamedTuple):
    """Numbers, checked.

    Attributes:
      names: of the features that vary.
      features: (rows, features), in the user's units.
      target: (rows,): numbers for ridge, else the index of the class.
      classes: their names in order; None for ridge.
      dropped: the names of the constant columns, which are left out.
    """

    names: list[str]
    features: np.ndarray
    target: np.ndarray
    classes: list[str] | None
    dropped: list[str]


def feature_names(table: Table, target: str | None) -> list[str]:
    """Return the names of all features, constant ones too.

    Raises:
      DataError: if the target does not fit the file.
    """
    names = list(table.columns.columns)
    if table.target is not None:
        if target is not None:
            raise DataError(
                f"{table.path} is a LIBSVM file, whose target stands in front of each line: "
                "leave out --target"
            )
        return names
    columns = shorten([quote(name) for name in names])
    if target is None:
        raise DataError(f"say with --target which column of {table.path} is the target: {columns}")
    if target not in names:
        lower = {name.lower(): name for name in names}
        likely = difflib.get_close_matches(target.lower(), lower, 1)
        hint = f"; did you mean {quote(lower[likely[0]])}?" if likely else ""
        raise DataError(
            f"{table.path} has no column {quote(target)}; its columns are {columns}{hint}"
        )
    names.remove(target)
    if not names:
        raise DataError(f"{table.path} has no column besides the target {quote(target)}")
    return names


def prepare(table: Table, target: str | None, kind: Kind) -> Data:
    """Return the numbers of a table.

    Raises:
      DataError: if they cannot be used.
    """
    names = feature_names(table, target)
    features = numbers(table, names)
    column = _target(table, target)
    if len(features) == 1:
        raise DataError(f"{table.path} has 1 row; more are needed")
    if kind is Kind.RIDGE:
        classes, values = None, _quantity(table, column)
    else:
        labels = _labels(column)
        classes = in_order(labels)
        values = _class_indices(table, labels, classes)
        _check_classes(table, classes, kind)
    kept = varies(features)
    if not kept.any():
        raise DataError(f"no feature of {table.path} varies")
    fitted = [name for name, keep in zip(names, kept, strict=True) if keep]
    dropped = [name for name, keep in zip(names, kept, strict=True) if not keep]
    return Data(fitted, features[:, kept], values, classes, dropped)


def prepare_validation(table: Table, target: str | None, data: Data) -> Data:
    """Return the numbers of a validation file, with the features and classes of the data.

    Raises:
      DataError: if they cannot be used.
    """
    feature_names(table, target)
    features = select(table, data.names, data.dropped)
    column = _target(table, target)
    if data.classes is None:
        values = _quantity(table, column)
    else:
        values = _class_indices(table, _labels(column), data.classes)
    return data._replace(features=features, target=values)


def select(table: Table, names: list[str], dropped: list[str]) -> np.ndarray:
    """Return the features that are fitted, in this order.

    A LIBSVM file does not tell how many features it has: those at the end may all be zero.

    Args:
      table: with these columns, and perhaps others.
      names: of the features.
      dropped: the names of those that were constant in the training rows.

    Raises:
      DataError: if the columns are not all there, or are not finite numbers; if a LIBSVM file has
        more features than the training rows have.
    """
    columns = table.columns
    if table.target is not None:
        count = len(names) + len(dropped)
        found = len(columns.columns)
        if found > count:
            raise DataError(f"{table.path} has {found} features, the model was trained on {count}")
        known = {name for name in names if name.startswith("feature ")}
        columns = columns.reindex(columns=[*columns.columns, *sorted(known - set(columns))])
        columns = columns.fillna(0.0)
    missing = [quote(name) for name in names if name not in columns]
    if missing:
        raise DataError(f"{table.path} lacks columns: {shorten(missing)}")
    return numbers(table._replace(columns=columns), names)


def numbers(table: Table, names: list[str]) -> np.ndarray:
    """Return columns as numbers.

    Raises:
      DataError: if they are not, or are not finite.
    """
    columns = table.columns[names]
    texts = [name for name in names if not is_numeric_dtype(columns[name])]
    if texts:
        examples = [
            f"{quote(name)} (for example {_example(pd.Series(columns[name]))})" for name in texts
        ]
        raise DataError(
            f"{table.path} has columns that are not numbers: {shorten(examples)}; "
            "turn them into numbers, or remove them"
        )
    values = columns.to_numpy(dtype=np.float64, na_value=np.nan)
    wrong = ~np.isfinite(values)
    counts = wrong.sum(axis=0)
    if counts.any():
        found = zip(names, counts, table.first(wrong), strict=True)
        gaps = [f"{quote(name)} ({count}, {first})" for name, count, first in found if count]
        raise DataError(
            f"{table.path} has missing or infinite values in {shorten(gaps)}; "
            "fill them in, or remove these rows"
        )
    return values


def _target(table: Table, target: str | None) -> pd.Series:
    column = pd.Series(table.columns[target]) if table.target is None else table.target
    gaps = column.isna().to_numpy()[:, None]
    if gaps.any():
        texts = f", or rename a class that counts as missing: {_MISSING}" if table.is_csv else ""
        raise DataError(
            f"{table.path} has {counted(gaps.sum(), 'row')} without a target, "
            f"{table.first(gaps)[0]}; remove such rows{texts}"
        )
    return column


def _example(column: pd.Series) -> str:
    texts = [str(cell) for cell in column.dropna() if not is_number(str(cell))]
    return quote(texts[0] if texts else str(column.iloc[0]))


def _quantity(table: Table, column: pd.Series) -> np.ndarray:
    is_text = not is_numeric_dtype(column) and not all(is_number(str(cell)) for cell in column)
    if is_text or is_bool_dtype(column):
        raise DataError(
            f"the target of {table.path} is not a number (for example {_example(column)}); "
            "ridge predicts numbers, use --model logistic or multinomial for classes"
        )
    values = column.to_numpy(dtype=np.float64)
    if not np.isfinite(values).all():
        raise DataError(f"the target of {table.path} has infinite values; remove these rows")
    if not varies(values[:, None])[0]:
        raise DataError(f"the target of {table.path} is {values[0]:g} in all rows")
    return values


def _labels(column: pd.Series) -> list[str]:
    """Return the classes as texts, which they stay; a whole number has no point."""
    cells = column.tolist()
    whole = [isinstance(cell, float) and cell.is_integer() for cell in cells]
    return [
        str(int(cell)) if is_whole else one_line(str(cell))
        for cell, is_whole in zip(cells, whole, strict=True)
    ]


def _class_indices(table: Table, labels: list[str], classes: list[str]) -> np.ndarray:
    index = {name: i for i, name in enumerate(classes)}
    unknown = sorted(set(labels) - set(index))
    if unknown:
        raise DataError(
            f"{table.path} has classes that the data does not have: "
            f"{shorten([quote(name) for name in unknown])}"
        )
    return np.array([index[label] for label in labels])


def _check_classes(table: Table, classes: list[str], kind: Kind) -> None:
    names = shorten([quote(name) for name in classes])
    if len(classes) == 1:
        raise DataError(f"{table.path} has only one class, {names}, in its target")
    if kind is Kind.LOGISTIC and len(classes) > 2:
        raise DataError(
            f"{table.path} has {len(classes)} classes ({names}); --model logistic takes two, "
            "use --model multinomial"
        )
