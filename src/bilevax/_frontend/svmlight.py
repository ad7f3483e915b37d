"""Reading svmlight (LIBSVM) files: 'label index:value index:value ...' on each line."""

import itertools
from typing import NamedTuple

import numpy as np

from bilevax._frontend.words import counted, is_number, quote


class FormatError(ValueError):
    """A file is not what it should be; the message says where, in the user's words."""


class Sparse(NamedTuple):
    """The lines of a file.

    Attributes:
      labels: the texts in front, which are numbers.
      rows: (entries,), the row of each entry.
      indices: (entries,), its index as written.
      values: (entries,).
    """

    labels: list[str]
    rows: np.ndarray
    indices: np.ndarray
    values: np.ndarray

    def dense(self, first: int, limit: int) -> np.ndarray:
        """Return all entries, zeros too, (rows, columns); the index of the first column is given.

        Raises:
          FormatError: if they are more than the limit.
        """
        rows, columns = len(self.labels), int(self.indices.max(initial=first - 1)) + 1 - first
        if rows * columns > limit:
            raise FormatError(
                f"has {counted(rows, 'row')} and {counted(columns, 'feature')}, too many: at most "
                f"{limit} numbers are kept in memory"
            )
        features = np.zeros((rows, columns))
        features[self.rows, self.indices - first] = self.values
        return features


def parse(text: str) -> Sparse:
    """Read the text of a file.

    Raises:
      FormatError: if a line is wrong.
    """
    labels: list[str] = []
    rows, keys, values = [], [], []
    for number, line in enumerate(text.split("\n"), start=1):
        label, *pairs = line.partition("#")[0].split() or [""]
        if not label:
            continue
        if pairs and pairs[0].startswith("qid:"):
            pairs = pairs[1:]
        here, cells = [], []
        for pair in pairs:
            key, _, cell = pair.partition(":")
            here.append(int(key) if key.isdecimal() and len(key) < 10 else -1)
            cells.append(cell)
        if -1 in here or not all(map(is_number, [label, *cells])):
            raise FormatError(
                f"line {number} is {quote(line)}, expected 'label index:value index:value ...'"
            )
        if any(a >= b for a, b in itertools.pairwise(here)):
            raise FormatError(f"the indices in line {number} must increase, got {quote(line)}")
        rows.extend([len(labels)] * len(here))
        keys.extend(here)
        values.extend(map(float, cells))
        labels.append(label)
    return Sparse(labels, np.array(rows, int), np.array(keys, int), np.array(values, float))
