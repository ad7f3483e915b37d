"""Types of options, for argparse."""

import argparse
from collections.abc import Callable
from pathlib import Path

from bilevax._frontend.words import clip


def folder(text: str) -> Path:
    """Return a path, which must not be empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must name a folder, got {text!r}")
    return Path(text)


def at_least(smallest: int) -> Callable[[str], int]:
    """Return a function from text to a whole number that is not smaller."""

    def whole_number(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            message = f"must be a whole number, got {clip(text)!r}"
            raise argparse.ArgumentTypeError(message) from None
        if number < smallest:
            raise argparse.ArgumentTypeError(f"must be {smallest} or more, got {number}")
        return number

    return whole_number
