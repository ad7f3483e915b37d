"""The records of a CSV file, and the lines where people find them."""

import csv
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Record(NamedTuple):
    """A record: the number of its first line, and its cells."""

    line: int
    cells: list[str]

    @property
    def is_blank(self) -> bool:
        """Whether it is an empty line, or one of white space."""
        return len(self.cells) < 2 and not "".join(self.cells).strip()


def records(lines: Iterable[str]) -> Iterator[Record]:
    """Return all records; those with line breaks in quotes span several lines.

    Args:
      lines: of the file, opened with `newline=""`.

    Raises:
      csv.Error: if a quote is not closed.
    """
    reader, line = csv.reader(lines, skipinitialspace=True, strict=True), 1
    try:
        for cells in reader:
            yield Record(line, cells)
            line = reader.line_num + 1
    except csv.Error as error:
        raise csv.Error(f"{error}, in the record that starts in line {line}") from None
