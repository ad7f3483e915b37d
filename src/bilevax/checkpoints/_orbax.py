"""States of runs as numbered checkpoints of Orbax."""

import contextlib
import dataclasses
import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bilevax import _checks as checks
from bilevax.checkpoints._directory import FOLDER, check_space, claim, failure, lock
from bilevax.checkpoints._layout import Layout
from bilevax.outer import Checkpointer, Identity, OpenCheckpoints

try:
    import orbax.checkpoint as ocp
except ImportError as error:
    raise ImportError(
        "`bilevax.checkpoints` needs Orbax: install it with `pip install 'bilevax[checkpoint]'`."
    ) from error

PyTree = Any

_FILE = "state.npz"
_ORBAX = str(Path(ocp.__file__).parent)


@dataclasses.dataclass(frozen=True)
class Checkpoints(Checkpointer):
    """Checkpoints of a run in a directory of a local file system.

    A checkpoint is written in the background into a temporary folder, which gets its name when it
    is complete, so a process that is killed leaves complete ones only. A run with the same
    directory goes on from the newest of them, to the same bits.

    A run of another problem is refused: other shapes, another y or x0 at the start, objectives that
    have other values or slopes there. Step sizes, schedules, projections and tolerances may change:
    the run goes on with the new ones, from the old state.

    The last `keep` are kept, and the one with the smallest value. Each is a folder `save_0`,
    `save_1`, ... with the arrays of a state in an `.npz` file.

    Args:
      directory: of one run; made if it does not exist.
      every_steps: save where a multiple of it has been passed; None for never.
      every_seconds: save after so many seconds, unless the last one is still being written; None
        for never.
      keep: how many of the last checkpoints are kept.

    Raises:
      TypeError: if `directory` is not a path, or a number is not one.
      ValueError: if a number is not positive, or if both `every_steps` and `every_seconds` are
        None; when a run begins, if the directory holds checkpoints of another problem.
      OSError: when a run begins, if the directory cannot be made or written, is in use, has not
        enough space, or holds checkpoints none of which can be read; later on, if a checkpoint
        could not be written.

    Example:
      >>> import tempfile
      >>> import optax
      >>> import bilevax as bx
      >>> from bilevax.checkpoints import Checkpoints
      >>> problem = bx.minimum(lambda x, y: 0.5 * (x - y) ** 2)  # x*(y) = y
      >>> engine = bx.value_and_hypergradient(lambda x, y: (x - 3.0) ** 2, problem, bx.Newton())
      >>> step = bx.make_step(engine, optax.sgd(0.25))
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     checkpoint = Checkpoints(directory, every_steps=5)
      ...     first = bx.minimize(step, 1.0, 0.0, steps=2, checkpoint=checkpoint)
      ...     second = bx.minimize(step, 1.0, 0.0, steps=4, checkpoint=checkpoint)  # two more
      >>> float(first.state.y), float(second.state.y)
      (2.5, 2.875)
    """

    directory: str | os.PathLike[str]
    _: dataclasses.KW_ONLY
    every_steps: int | None = None
    every_seconds: float | None = 60.0
    keep: int = 3

    def __post_init__(self) -> None:
        if not isinstance(self.directory, str | os.PathLike):
            raise TypeError(f"`directory` must be a path, got {self.directory!r}.")
        if self.every_steps is None and self.every_seconds is None:
            raise ValueError("One of `every_steps` and `every_seconds` must be a number, got None.")
        if self.every_steps is not None:
            checks.positive("every_steps", self.every_steps, whole=True)
        if self.every_seconds is not None:
            checks.positive("every_seconds", self.every_seconds)
        checks.positive("keep", self.keep, whole=True)

    def open(self, identity: Identity, like: PyTree) -> "OpenCheckpoints":
        """Return the checkpoints of a run, or raise before it begins; see the class."""
        directory = Path(self.directory).expanduser().absolute()
        layout = Layout(like)
        with contextlib.ExitStack() as stack:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                lock(directory, stack)
                _remove_temporary(directory)
                claim(directory, identity, layout.eps)
                check_space(directory, self.keep, layout.size)
            except OSError as error:
                raise failure(f"`directory` {directory} cannot be used", error) from error
            silence = _Silence()
            logger = logging.getLogger("absl")
            logger.addFilter(silence)
            stack.callback(logger.removeFilter, silence)
            return _Open(self, directory, layout, stack)


class _Open(OpenCheckpoints):
    """Numbered checkpoints: a step may be saved twice, first in its turn and then as the last."""

    def __init__(
        self,
        settings: Checkpoints,
        directory: Path,
        layout: Layout,
        resources: contextlib.ExitStack,
    ) -> None:
        self._settings, self._directory, self._layout = settings, directory, layout
        self._values: dict[int, float] = {}  # by number of the checkpoint
        options = ocp.CheckpointManagerOptions(
            step_prefix=FOLDER,
            create=False,
            enable_async_checkpointing=False,
            preservation_policy=_NewestAndBest(settings.keep, self._values),
        )
        self._manager = ocp.CheckpointManager(directory, options=options, item_handlers=_Arrays())
        resources.callback(self._manager.close)
        # Orbax has threads of its own, but to start them takes several milliseconds of training.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        resources.callback(self._writer.shutdown)
        for number in self._manager.all_steps():
            with contextlib.suppress(Exception):  # `restore` tells of those that cannot be read
                self._values[number] = float(self._read(number, only="value")["value"])
        self._number = max(self._manager.all_steps(), default=-1)
        self._step, self._time = 0, time.monotonic()  # of the last one
        self._writing: Future[bool] | None = None
        self._written: int | None = None  # the step of the last one that is complete
        self._resources = resources.pop_all()

    def restore(self) -> PyTree | None:
        numbers = sorted(self._manager.all_steps(), reverse=True)
        for number in numbers:
            try:
                arrays = self._read(number)
                state, step = self._layout.to_device(arrays), int(arrays["step"])
            except Exception as error:  # whatever a broken file makes NumPy or Orbax raise
                folder = self._directory / f"{FOLDER}_{number}"
                cause = f"{type(error).__name__}: {error}"
                if number == numbers[-1]:
                    raise OSError(
                        f"None of the {len(numbers)} checkpoints in {self._directory} can be read; "
                        f"the last that was tried is {folder} ({cause})."
                    ) from error
                warnings.warn(
                    f"The checkpoint {folder} cannot be read ({cause}); trying the one before.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            else:
                self._step = self._written = step
                return state
        return None

    def steps_until_due(self, step: int) -> int | None:
        steps = self._settings.every_steps
        return None if steps is None else steps - step % steps

    def is_due(self, step: int) -> bool:
        steps, seconds = self._settings.every_steps, self._settings.every_seconds
        if steps is not None and step // steps > self._step // steps:
            return True
        if seconds is None or time.monotonic() - self._time < seconds:
            return False
        return self._writing is None or self._writing.done()  # training waits for no slow disk

    def save(self, step: int, state: PyTree, value: float) -> None:
        self._finish()
        arrays = self._layout.to_host(state)
        arrays |= {"step": np.asarray(step), "value": np.asarray(value, float)}
        self._number += 1
        self._values[self._number] = float(value)
        self._step, self._time = step, time.monotonic()
        self._writing = self._writer.submit(
            self._manager.save, self._number, args=_SaveArrays(arrays), force=True
        )

    def close(self) -> None:
        try:
            self._finish()
        finally:
            self._resources.close()

    def _read(self, number: int, only: str | None = None) -> Any:
        return self._manager.restore(number, args=_RestoreArrays(only))

    def _finish(self) -> None:
        """Wait for the last checkpoint, and raise if it failed."""
        if self._writing is None:
            return
        try:
            self._writing.result()
        except Exception as error:
            self._writing = None
            del self._values[self._number]
            with contextlib.suppress(OSError):  # the next run tries it again
                _remove_temporary(self._directory)
            self._manager.reload()  # it may have forgotten some that it had no time to delete
            what = f"The checkpoint of step {self._step} could not be written to {self._directory}"
            if self._written is not None:
                what += f" (that of step {self._written} is intact)"
            raise failure(what, error) from error
        self._writing, self._written = None, self._step


class _Arrays(ocp.CheckpointHandler):
    """Writes arrays into one `.npz` file, with a checksum of each.

    The handlers of Orbax for pytrees write a dozen files, which takes them several times as long.
    """

    def save(self, directory: Path, args: "_SaveArrays") -> None:
        _write(Path(directory) / _FILE, args.arrays)

    def restore(self, directory: Path, args: "_RestoreArrays") -> dict[str, np.ndarray]:
        # Opened here, for NumPy does not close a file that is broken.
        with (Path(directory) / _FILE).open("rb") as file, np.load(file) as arrays:
            names = arrays.files if args.only is None else [args.only]
            return {name: arrays[name] for name in names}


@ocp.args.register_with_handler(_Arrays, for_save=True)
@dataclasses.dataclass
class _SaveArrays(ocp.args.CheckpointArgs):
    arrays: dict[str, np.ndarray]


@ocp.args.register_with_handler(_Arrays, for_restore=True)
@dataclasses.dataclass
class _RestoreArrays(ocp.args.CheckpointArgs):
    only: str | None = None  # the name of one array


@dataclasses.dataclass
class _NewestAndBest:
    """Which checkpoints Orbax is to keep."""

    keep: int
    values: dict[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        numbers = [checkpoint.step for checkpoint in checkpoints]
        known = [number for number in numbers if not math.isnan(self.values.get(number, math.nan))]
        kept = {*numbers[-self.keep :], *sorted(known, key=self.values.__getitem__)[:1]}
        return [number in kept for number in numbers]


class _Silence(logging.Filter):
    """Drops what Orbax logs: failures arrive as exceptions."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.pathname.startswith(_ORBAX)


def _write(path: Path, arrays: dict[str, Any]) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())  # before its folder gets its name, whatever happens to the machine


def _remove_temporary(directory: Path) -> None:
    """Remove what failed, or what a process that was killed had begun to write."""
    for folder in directory.glob(f"{FOLDER}_*{ocp.path.step.TMP_DIR_SUFFIX}*"):
        shutil.rmtree(folder)
