"""What rounding makes of numbers."""

import numpy as np

# Numbers that were computed differ in their last bits where they should be equal, and a mean of n
# of them is off by about log2(n) units. A range of 64 units has some bits left to tell rows apart.
_UNITS = 64


def rounding(values: np.ndarray) -> np.ndarray:
    """Return the range below which columns are constant, (columns,): a few units of rounding.

    Args:
      values: (rows, columns), finite.
    """
    return _UNITS * np.finfo(np.float64).eps * np.abs(values).max(axis=0)


def varies(values: np.ndarray) -> np.ndarray:
    """Tell which columns vary by more than rounding, (columns,)."""
    # Halved, for the range of finite numbers may be infinite.
    half_range = values.max(axis=0) / 2 - values.min(axis=0) / 2
    return half_range > rounding(values) / 2
