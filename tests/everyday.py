"""Which rows of a table run every day. The others compile more programs for what is tested already.

They are marked slow, and CI runs them.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def params(
    rows: Iterable[tuple], everyday: Callable[..., bool], name: Callable[[Any], str] = str
) -> list[Any]:
    """Return rows for `pytest.mark.parametrize`; those that are not for every day are slow.

    Args:
      rows: One tuple of arguments for each test.
      everyday: Whether a row runs every day, as a function of its arguments.
      name: Of one argument, for the name of the test.
    """
    return [
        pytest.param(
            *row,
            marks=() if everyday(*row) else pytest.mark.slow,
            id="-".join(name(argument) for argument in row),
        )
        for row in rows
    ]


def slow(*row: Any, id: str | None = None) -> Any:
    """Return a row for `pytest.mark.parametrize` that is for CI alone."""
    return pytest.param(*row, marks=pytest.mark.slow, id=id)
