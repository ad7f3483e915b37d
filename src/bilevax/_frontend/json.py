"""Results as JSON can hold them."""

import math
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """Turn arrays into lists; JSON has no infinities and no NaN, so these become null."""
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
