"""The user's own data: CSV and svmlight files, with a clear error for whatever is wrong."""

import csv
import io
import re
from collections import Counter
from pathlib import Path
from typing import NoReturn

import numpy as np

from bilevax._frontend.records import records
from bilevax._frontend.svmlight import FormatError, parse
from bilevax._frontend.words import (
    DataError,
    in_order,
    is_number,
    one_line,
    other_separator,
    quote,
    shorten,
)
from bilevax.demo.data import Table

MISSING = {"", "?", "na", "n/a", "nan", "none", "null"}
MAX_CLASSES = 30  # a numeric target with more values is taken for a quantity
MIN_ROWS = 30
MIN_ROWS_PER_CLASS = 6  # two in each part
MAX_ENTRIES = 20_000_000  # rows times features; 160 MB in float64

_SVMLIGHT_SUFFIXES = {".svm", ".svmlight", ".libsvm"}
_SVMLIGHT_LINE = re.compile(r"\s*[-+\d.eE]+(\s+qid:\d+)?(\s+\d+:\S+)+\s*(#.*)?")


def read_table(path: Path, target: str | None) -> Table:
    """Read a CSV file with a header line, or a svmlight (LIBSVM) file.

    Args:
      path: the file; which of the two it is shows in its first line, or in the end of its name.
      target: the CSV column that holds the classes. A svmlight file has its target in front.

    Returns:
      A `Table`.

    Raises:
      DataError: if the file cannot be read, or is not data for classification.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not a text file (in UTF-8)") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if "\0" in text:
        raise DataError(f"{path} is not a text file: it has bytes that are zero")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not lines:
        raise DataError(f"{path} is empty")
    if path.suffix.lower() in _SVMLIGHT_SUFFIXES or _SVMLIGHT_LINE.fullmatch(lines[0]):
        return _read_svmlight(path, text, target)
    return _read_csv(path, text, target)


def _read_svmlight(path: Path, text: str, target: str | None) -> Table:
    if target is not None:
        raise DataError(
            f"{path} is a svmlight file, whose target stands in front of each line: "
            "leave out --target"
        )
    try:
        sparse = parse(text)
    except FormatError as error:
        raise DataError(f"{path} is not a valid svmlight file: {error}") from None
    try:
        # An index 0 tells that indices start there.
        features = sparse.dense(first=0 if 0 in sparse.indices else 1, limit=MAX_ENTRIES)
    except FormatError as error:
        raise DataError(f"{path} {error}") from None
    names = [f"feature {i + 1}" for i in range(features.shape[1])]
    _check_finite(path, names, ~np.isfinite(features).T)
    wrong = [not np.isfinite(float(label)) for label in sparse.labels]
    _check_finite(path, ["the target"], np.array([wrong]))
    return _table(path, features, sparse.labels, names)


def _read_csv(path: Path, text: str, target: str | None) -> Table:
    header, rows = _parse_csv(path, text)
    target = _check_header(path, header, target)
    position = header.index(target)
    labels = [one_line(row[position]) for row in rows]
    features = [j for j in range(len(header)) if j != position]
    if not features:
        raise DataError(f"{path} has no column besides the target {quote(target)}")
    _check_size(path, len(rows), len(features))

    names = [header[j] for j in features]
    numbers = np.empty((len(rows), len(features)))
    texts = []
    for i, j in enumerate(features):
        for k, row in enumerate(rows):
            cell = row[j].strip()
            try:
                numbers[k, i] = np.nan if cell.lower() in MISSING else float(cell)
            except ValueError:
                texts.append(f"{quote(header[j])} (for example {quote(cell)})")
                break
    if texts:
        raise DataError(
            f"{path} has columns that are not numbers: {shorten(texts)}; "
            "turn them into numbers, or remove them"
        )
    _check_finite(path, [quote(name) for name in names], ~np.isfinite(numbers).T)
    without = np.array([label.lower() in MISSING for label in labels])
    _check_finite(path, [f"the target {quote(target)}"], without[None])
    return _table(path, numbers, labels, names)


def _parse_csv(path: Path, text: str) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows, all of one length."""
    try:
        found = records(io.StringIO(text, newline=""))
        lines = [(line, row) for line, row in found if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise DataError(f"{path} is not a valid CSV file: {error}") from None
    header = [one_line(name) for name in lines[0][1]]
    if len(header) == 1:
        if (separator := other_separator(lines[0][1][0])) is not None:
            raise DataError(f"{path} is separated by {separator}; this demo reads commas")
        if re.search(r"\S\s+\S", lines[0][1][0]) and len(lines) > 1 and len(lines[1][1]) == 1:
            raise DataError(f"{path} has one column, no commas; this demo reads commas")
    if all(is_number(name) for name in header):
        raise DataError(f"the first line of {path} must hold the names of the columns")
    for number, row in lines[1:]:
        if len(row) != len(header):
            raise DataError(
                f"line {number} of {path} has {len(row)} cells, the first line has {len(header)}"
            )
    return header, [row for _, row in lines[1:]]


def _check_header(path: Path, header: list[str], target: str | None) -> str:
    """Return the name of the target column."""
    columns = shorten([quote(name) for name in header])
    repeated = [quote(name) for name, count in Counter(header).items() if count > 1]
    if "" in header:
        problem = f"column {header.index('') + 1} of {path} has no name; remove or name it"
    elif repeated:
        problem = f"{path} has columns of the same name: {shorten(repeated)}"
    elif target is None:
        problem = f"say with --target which column of {path} holds the classes: {columns}"
    elif target in header:
        return target
    else:
        problem = f"{path} has no column {quote(target)}; its columns are {columns}"
    if any(map(is_number, header)):  # a name may be a number, but data in its place is more likely
        problem += " (does the first line hold the names of the columns?)"
    raise DataError(problem)


def _check_size(path: Path, rows: int, columns: int) -> None:
    if rows * columns > MAX_ENTRIES:
        raise DataError(
            f"{path} has {rows} rows and {columns} features, too many for this demo, "
            f"which keeps at most {MAX_ENTRIES} numbers in memory"
        )


def _check_finite(path: Path, names: list[str], bad: np.ndarray) -> None:
    """Raise if a column of numbers, a row of `bad`, has gaps."""
    counts = zip(names, bad.sum(axis=1), strict=True)
    gaps = [f"{name} ({count})" for name, count in counts if count]
    if gaps:
        raise DataError(
            f"{path} has missing or infinite values in {shorten(gaps)}; "
            "fill them in, or remove these rows"
        )


def _table(path: Path, features: np.ndarray, labels: list[str], names: list[str]) -> Table:
    """Number the classes and check that there are enough rows of each."""
    counts, classes = Counter(labels), in_order(labels)
    numeric = all(map(is_number, classes))

    def refuse(problem: str) -> NoReturn:
        raise DataError(f"{path} {problem}")

    if len(labels) < MIN_ROWS:
        refuse(f"has {len(labels)} rows, too few: this demo needs {MIN_ROWS}")
    if len(classes) == 1:
        refuse(f"has only one class, {quote(classes[0])}, in its target; two or more are needed")
    if numeric and len(classes) > MAX_CLASSES:
        refuse(
            f"has {len(classes)} different numbers in its target, which looks like a quantity; "
            f"this demo does classification, with at most {MAX_CLASSES} numeric classes"
        )
    few = [name for name in classes if counts[name] < MIN_ROWS_PER_CLASS]
    rare = [f"{quote(name)} ({counts[name]})" for name in few]
    if rare:
        refuse(f"has classes with too few rows, under {MIN_ROWS_PER_CLASS}: {shorten(rare)}")
    index = {name: i for i, name in enumerate(classes)}
    return Table(path.stem, features, np.array([index[label] for label in labels]), names, classes)
