"""Checkpoints of `minimize` on disk, written by Orbax (the extra `checkpoint`).

`bilevax` does not import this package, for Orbax is optional.
"""

from bilevax.checkpoints._orbax import Checkpoints as Checkpoints
