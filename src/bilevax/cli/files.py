"""Reading CSV, Parquet and LIBSVM files, with a clear error for whatever is wrong."""

import csv
import re
import warnings
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from bilevax._frontend.records import Record, records
from bilevax._frontend.svmlight import FormatError, parse
from bilevax._frontend.words import (
    DataError,
    counted,
    is_number,
    one_line,
    other_separator,
    quote,
    shorten,
)
from bilevax.cli.choices import MISSING

CSV, PARQUET, LIBSVM = {".csv"}, {".parquet", ".pq"}, {".svm", ".svmlight", ".libsvm"}
MAX_ENTRIES = 20_000_000  # rows times features of a LIBSVM file; 160 MB in float64


class Table(NamedTuple):
    """A file as read.

    Attributes:
      path: where it came from, for messages.
      columns: of a CSV or Parquet file all of them; of a LIBSVM file the features.
      target: that of a LIBSVM file; None elsewhere, where it is one of the columns.
    """

    path: Path
    columns: pd.DataFrame
    target: pd.Series | None

    @property
    def is_csv(self) -> bool:
        """Whether it was a CSV file."""
        return self.path.suffix.lower() in CSV

    def first(self, wrong: np.ndarray) -> list[str]:
        """Say where each column of a mask, (rows, columns), is first true, as people count."""
        rows = wrong.argmax(axis=0)
        if not self.is_csv:
            return [f"the first in row {row + 1}" for row in rows]
        # Blank lines are left out, but where they are the missing values of one column.
        is_single = self.columns.shape[1] == 1
        lines = [r.line for r in _records(self.path) if is_single or not r.is_blank]
        return [f"the first in line {lines[row + 1]}" for row in rows]  # after the header


def read_table(
    path: Path, texts: Collection[str] = (), missing: Collection[str] = MISSING
) -> Table:
    """Read a file; its extension says what it is.

    Args:
      path: the file.
      texts: columns of a CSV file that stay texts, whatever they look like.
      missing: what stands for a missing value in a CSV file, besides an empty cell.

    Raises:
      DataError: if it cannot be read, or its columns cannot be told apart.
    """
    suffix = path.suffix.lower()
    if suffix not in CSV | PARQUET | LIBSVM:
        raise DataError(
            f"cannot tell what {path} is by its extension {quote(suffix)}; known are .csv, "
            ".parquet, .pq, .svm, .svmlight and .libsvm"
        )
    try:
        if not path.exists():
            raise DataError(f"there is no file {path}")
        if suffix in LIBSVM:
            return _read_libsvm(path)
        table = _read_csv(path, texts, missing) if suffix in CSV else _read_parquet(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not a text file (in UTF-8)") from None
    if not len(table):
        raise DataError(f"{path} has no rows")
    return Table(path, table, None)


def read_groups(path: Path, names: list[str]) -> dict[str, str]:
    """Read which group each feature belongs to.

    Args:
      path: a CSV file with the columns feature and group.
      names: the features of the data.

    Raises:
      DataError: if the file is not that, or does not name each feature once.
    """
    if path.suffix.lower() not in CSV:
        raise DataError(
            f"--penalty must be single, per-feature or a CSV file, got {quote(str(path))}"
        )
    table = read_table(path, ("feature", "group"), missing=())
    columns = table.columns
    lacking = [quote(name) for name in ("feature", "group") if name not in columns]
    if lacking:
        raise DataError(f"{path} has no column {' and no column '.join(lacking)}")
    gaps = (columns["feature"].isna() | columns["group"].isna()).to_numpy()[:, None]
    if gaps.any():
        raise DataError(
            f"{path} has {counted(gaps.sum(), 'row')} without a feature or a group, "
            f"{table.first(gaps)[0]}"
        )
    features = [one_line(name) for name in columns["feature"].astype(str)]
    repeated = [quote(name) for name, count in Counter(features).items() if count > 1]
    unknown = [quote(name) for name in features if name not in set(names)]
    missing = [quote(name) for name in names if name not in set(features)]
    if repeated:
        raise DataError(f"{path} names features more than once: {shorten(repeated)}")
    if unknown:
        raise DataError(f"{path} names features that the data does not have: {shorten(unknown)}")
    if missing:
        raise DataError(f"{path} lacks features of the data: {shorten(missing)}")
    groups = [one_line(group) for group in columns["group"].astype(str)]
    return dict(zip(features, groups, strict=True))


def _records(path: Path) -> list[Record]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(records(file))
    except csv.Error as error:
        raise DataError(f"{path} is not a valid CSV file: {error}") from None


def _read_csv(path: Path, texts: Collection[str], missing: Collection[str]) -> pd.DataFrame:
    # Not by pandas' own header, which renames columns of the same name.
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            header = next((r.cells for r in records(file) if not r.is_blank), None)
        except csv.Error as error:
            raise DataError(f"{path} is not a valid CSV file: {error}") from None
    if header is None:
        raise DataError(f"{path} is empty")
    names = [one_line(name) for name in header]
    _check_header(path, names, header[0])
    options: dict[str, Any] = {"encoding": "utf-8-sig", "skipinitialspace": True}
    options |= {"header": 0, "names": names, "index_col": False, "low_memory": False}
    # In one column a blank line is no line to leave out: it is a missing value.
    options |= {"skip_blank_lines": len(names) > 1, "keep_default_na": False}
    gaps, kept = ["", *missing], [name for name in names if name in texts]
    options |= {"na_values": gaps, "dtype": dict.fromkeys(kept, str)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # that cells are left out
            table = pd.read_csv(path, **options)
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        fault = _find_fault(path, header) or re.sub(r".*C error: ", "", one_line(str(error)))
        raise DataError(f"{path} is not a valid CSV file: {fault}") from None
    for name in kept:  # 'yes' and 'yes ' look alike
        cells = table[name].map(one_line, na_action="ignore")
        table[name] = cells.where(~cells.isin(gaps))
    return table


def _find_fault(path: Path, header: list[str]) -> str | None:
    """Say which line has too many cells: pandas counts records, and some of them span lines."""
    for record in _records(path):
        if len(record.cells) > len(header):
            found = f"Expected {len(header)} fields in line {record.line}, saw {len(record.cells)}"
            if separator := other_separator(",".join(header)):
                found += f" (is it separated by {separator}?)"
            return found
    return None


def _check_header(path: Path, names: list[str], first: str) -> None:
    """Raise if the first line cannot hold the names of columns."""
    if len(names) == 1 and (separator := other_separator(first)) is not None:
        raise DataError(
            f"{path} is separated by {separator}; turn them into commas "
            "(and decimal commas into points)"
        )
    if all(map(is_number, names)):
        raise DataError(f"the first line of {path} must hold the names of the columns")
    if "" in names:
        raise DataError(f"column {names.index('') + 1} of {path} has no name; remove or name it")
    _check_repeated(path, names)


def _check_repeated(path: Path, names: list[str]) -> None:
    repeated = [quote(name) for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise DataError(f"{path} has columns of the same name: {shorten(repeated)}")


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_parquet(path, engine="pyarrow")
    except ValueError as error:  # pyarrow's errors are ValueErrors
        fault = one_line(str(error)).partition(". ")[0]
        raise DataError(f"{path} is not a valid Parquet file: {fault}") from None
    table.columns = [one_line(str(name)) for name in table.columns]
    _check_repeated(path, list(table.columns))
    return table


def _read_libsvm(path: Path) -> Table:
    text = path.read_text(encoding="utf-8")
    if not any(line.partition("#")[0].strip() for line in text.split("\n")):
        raise DataError(f"{path} is empty")
    try:
        sparse = parse(text)
    except FormatError as error:
        raise DataError(f"{path} is not a valid LIBSVM file: {error}") from None
    # Without a guess of the first index, which could differ between two files of one kind.
    if 0 in sparse.indices:
        raise DataError(f"{path} has an index 0; the indices of a LIBSVM file start at 1")
    try:
        features = sparse.dense(first=1, limit=MAX_ENTRIES)
    except FormatError as error:
        raise DataError(f"{path} {error}") from None
    columns = features.shape[1]
    if not columns:
        raise DataError(f"{path} has no features")
    names = libsvm_names(columns)
    return Table(path, pd.DataFrame(features, columns=names), pd.Series(sparse.labels, dtype=str))


def libsvm_names(count: int) -> list[str]:
    """Return the names of the features of a LIBSVM file."""
    return [f"feature {i + 1}" for i in range(count)]
