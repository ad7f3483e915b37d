"""What a study leaves behind: results as JSON, and words on what is not as theory has it."""

import json
from pathlib import Path
from typing import Any

import numpy as np


def write(results: dict[str, Any], folder: Path) -> None:
    """Write results.json."""
    text = json.dumps(for_json(results), indent=1, allow_nan=False)
    (folder / "results.json").write_text(text + "\n")


def for_json(value: Any) -> Any:
    """Return lists for arrays, and None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: for_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [for_json(entry) for entry in value]
    value = np.asarray(value).tolist()
    if isinstance(value, list):
        return for_json(value)
    return None if isinstance(value, float) and not np.isfinite(value) else value


def tell(missed: list[str]) -> None:
    """Print what is missed."""
    print("\nMissed:" if missed else "\nEverything is as theory has it.")
    for line in missed:
        print(f"  {line}")
