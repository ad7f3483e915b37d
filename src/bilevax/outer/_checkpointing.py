"""What `minimize` asks of a place that keeps the state of a run."""

import abc
from typing import Any, NamedTuple

PyTree = Any


class Identity(NamedTuple):
    """What tells one bilevel problem from another, as far as a run can tell.

    Attributes:
      start: numbers at the start of the run: g(x0, y0), and the inner products of its gradient, of
        F there and at another x, and of y0 with a fixed vector.
      shapes: by the path of each leaf of the state, its dtype and shape, such as "float32[3, 2]".
    """

    start: dict[str, list[float]]
    shapes: dict[str, str]


class Checkpointer(abc.ABC):
    """Where `minimize` keeps the state of a run; see `bilevax.checkpoints.Checkpoints`."""

    @abc.abstractmethod
    def open(self, identity: Identity, like: PyTree) -> "OpenCheckpoints":
        """Return what reads and writes states like `like`, or raise before the run begins."""


class OpenCheckpoints(abc.ABC):
    """The checkpoints of one run, while it lasts."""

    @abc.abstractmethod
    def restore(self) -> PyTree | None:
        """Return the newest complete state, or None if there is none."""

    @abc.abstractmethod
    def is_due(self, step: int) -> bool:
        """Tell whether it is time to save."""

    @abc.abstractmethod
    def steps_until_due(self, step: int) -> int | None:
        """Return after how many more steps it is time to save; None if steps do not matter."""

    @abc.abstractmethod
    def save(self, step: int, state: PyTree, value: float) -> None:
        """Save a state; returns before it is written. `value` says which state is the best."""

    @abc.abstractmethod
    def close(self) -> None:
        """Wait until everything is written."""
