"""Names from a user's data, made fit for a message in one line."""

import re
from collections.abc import Iterable
from typing import Any


class DataError(ValueError):
    """The user's data cannot be used; the message says why, in one line."""


def clip(name: str, limit: int = 40) -> str:
    """Cut the middle out of a long name, for a figure or a message."""
    return name if len(name) <= limit else f"{name[: limit - 15]}...{name[-12:]}"


def one_line(cell: str) -> str:
    """Turn all white space into single spaces."""
    return " ".join(cell.split())


def quote(name: str) -> str:
    """Return a name in quotes, in one line and not too long."""
    return f"'{clip(one_line(name))}'"


def shorten(items: list[str], limit: int = 10) -> str:
    """Join items into one line; the command line shows no page-long lists."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """Return a number of things, such as '1 row' or '2 rows'."""
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def is_number(cell: str) -> bool:
    """Tell whether a cell can be read as a number."""
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell  # which are Python's, as in 1_000


def in_order(names: Iterable[str]) -> list[str]:
    """Return texts in the order of people: by size if all are numbers, else natural; never merged.

    As numbers, 1 and 01, or two ids of 20 digits, would be one.
    """
    distinct = sorted(set(names), key=natural)
    return sorted(distinct, key=float) if all(map(is_number, distinct)) else distinct


def natural(name: str) -> tuple[list[Any], str]:
    """Return a key that orders names as people do: class-2 before class-10."""
    pieces: list[Any] = re.split(r"(\d+)", name)
    for i in range(1, len(pieces), 2):
        digits = pieces[i].lstrip("0")
        pieces[i] = len(digits), digits
    return pieces, name


def other_separator(line: str) -> str | None:
    """Return the name of what separates a header line rather than commas, if it is that."""
    for separator, word in {";": "semicolons", "\t": "tabs", "|": "bars"}.items():
        if line.count(separator) > line.count(","):
            return word
    return None
