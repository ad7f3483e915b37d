"""Which features share a penalty."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from bilevax.cli.files import read_groups


class Penalties(NamedTuple):
    """The penalties that are tuned.

    Attributes:
      names: one per penalty.
      positions: (features,), which of them is that of a feature.
    """

    names: list[str]
    positions: np.ndarray

    @property
    def is_single(self) -> bool:
        """Whether all features share one."""
        return len(self.names) == 1


def read_penalties(choice: str, features: list[str], kept: list[str]) -> Penalties:
    """Return the penalties for single, per-feature or the name of a CSV file.

    Args:
      choice: what the user gave.
      features: the names of all features.
      kept: the names of those that are fitted.

    Raises:
      DataError: if the file does not name each feature once.
    """
    if choice == "single":
        return Penalties(["all features"], np.zeros(len(kept), dtype=int))
    if choice == "per-feature":
        return Penalties(kept, np.arange(len(kept)))
    groups = read_groups(Path(choice), features)
    names = list(dict.fromkeys(groups[name] for name in kept))  # in the order of the features
    return Penalties(names, np.array([names.index(groups[name]) for name in kept]))
