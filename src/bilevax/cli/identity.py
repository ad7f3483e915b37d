"""What must be the same when a run goes on: run.json, next to the checkpoints."""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from bilevax._frontend.words import DataError
from bilevax.cli.choices import PENALTIES
from bilevax.cli.data import Data
from bilevax.cli.penalties import Penalties

FILE = "run.json"


def identify(
    options: argparse.Namespace, data: Data, training: int, penalties: Penalties
) -> dict[str, Any]:
    """Return the options that must not change, and digests of what is in the files.

    Args:
      options: of the command line.
      data: all rows, those of a validation file last.
      training: how many of them are in DATA.
      penalties: which are tuned.
    """
    words = data.names, data.classes
    parts = slice(training), slice(training, None)
    train, validation = (_digest(words, data.features[part], data.target[part]) for part in parts)
    return {
        "options": {
            "--target": options.target,
            "--model": options.model,
            # Files may have other names: what is in them counts.
            "--penalty": options.penalty if options.penalty in PENALTIES else "FILE.csv",
            "--validation": None if options.validation is None else "FILE",
            "--cv": None if options.validation else options.cv,
            "--rule": options.rule,
            "--shrink": options.shrink,
            "--no-honest-score": None if options.honest_score else "given",
            "--seed": options.seed,
        },
        "data": train,
        "validation": validation,
        "groups": _digest(penalties.names, penalties.positions),
    }


def check_same(folder: Path, identity: dict[str, Any], options: argparse.Namespace) -> None:
    """Raise unless the run in the folder of checkpoints was started as this one.

    Raises:
      DataError: names what differs.
    """
    try:
        before = json.loads((folder / FILE).read_text(encoding="utf-8"))
        change = _change(before, identity, options)
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"cannot --resume: {folder / FILE} cannot be read; choose another --out, or remove "
            f"{folder} to start again"
        ) from None
    if change:
        raise DataError(
            f"cannot --resume: {change}. Only --steps and --accuracy may change; to start again, "
            f"choose another --out, or remove {folder}"
        )


def _change(
    before: dict[str, Any], identity: dict[str, Any], options: argparse.Namespace
) -> str | None:
    was, now = before["options"], identity["options"]
    changes = [
        f"{name} was {_word(was[name])}, is {_word(now[name])}"
        for name in now
        if was[name] != now[name]
    ]
    if changes:
        return "; ".join(changes)
    files = {
        "data": f"the data in {options.data} have changed since",
        "validation": f"the data in {options.validation} have changed since",
        "groups": f"the groups in {options.penalty} are others",
    }
    # The first one alone: what data have changed may change what is grouped.
    return next((what for name, what in files.items() if before[name] != identity[name]), None)


def _digest(words: Any, *arrays: np.ndarray) -> str:
    digest = hashlib.sha256(json.dumps(words).encode())
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()


def _word(value: Any) -> str:
    return "not given" if value is None else str(value)
