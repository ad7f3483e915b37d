"""The directory of a run: locked, of one problem, and with enough space."""

import contextlib
import errno
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bilevax.outer import Identity

try:
    import fcntl
except ImportError:  # not a Unix: nothing keeps two runs apart there
    fcntl: Any = None

FOLDER = "save"  # of a checkpoint: save_0, save_1, ...
PROBLEM = "problem.json"


def lock(directory: Path, resources: contextlib.ExitStack) -> None:
    """Keep other runs out of a directory, until this one ends in whatever way."""
    file = resources.enter_context((directory / "lock").open("a"))
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, "another run is using it") from None
    except OSError:
        pass  # a file system that knows no locks


def claim(directory: Path, identity: Identity, eps: float) -> None:
    """Write down of which problem the checkpoints are, or raise if they are of another one.

    Args:
      directory: of the run.
      identity: of its problem.
      eps: the rounding error of the numbers of the problem.

    Raises:
      ValueError: if the directory holds checkpoints of another problem, or of an unknown one.
      OSError: if the directory cannot be written.
    """
    path = directory / PROBLEM
    remedy = f"Use another directory than {directory}."
    if path.exists():
        try:
            got = Identity(**json.loads(path.read_text(encoding="utf-8")))
            what = difference(got, identity, eps)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"`directory` holds a {PROBLEM} that cannot be read ({error}). {remedy}"
            ) from error
        if what is not None:
            raise ValueError(f"`directory` holds a run of another problem: {what}. {remedy}")
    elif any(directory.glob(f"{FOLDER}_*")):
        raise ValueError(
            f"`directory` holds checkpoints, but no {PROBLEM} that says of which problem. {remedy}"
        )
    else:
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(identity._asdict(), indent=1) + "\n", encoding="utf-8")
        draft.replace(path)


def check_space(directory: Path, keep: int, size: int) -> None:
    """Raise unless there is space for the last ones, the best one, and one that is being written.

    Args:
      directory: of the run.
      keep: how many of the last checkpoints are kept.
      size: of a checkpoint, in bytes.

    Raises:
      OSError: if there is not.
    """
    missing = max(keep + 2 - len([*directory.glob(f"{FOLDER}_*")]), 1)
    free = shutil.disk_usage(directory).free
    if free < missing * size:
        raise OSError(
            errno.ENOSPC,
            f"it has {free / 1e6:.2f} MB of free space, expected at least "
            f"{missing * size / 1e6:.2f} MB for {missing} checkpoints",
        )


def failure(what: str, error: Exception) -> OSError:
    """Return an error of the same kind that says what could not be done."""
    cause = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    number = getattr(error, "errno", None) or errno.EIO
    return OSError(number, f"{what}: {cause}.")


def difference(got: Identity, expected: Identity, eps: float) -> str | None:
    """Say how one problem differs from the expected one, or return None if it does not.

    Machines round differently, so numbers of the start are equal if they are up to sqrt(eps) of
    them, or up to eps of the largest one: there is nothing else to measure a zero with.
    """
    leaves = [
        f"`{path}` is {got.shapes.get(path, 'missing')}, "
        f"expected {expected.shapes.get(path, 'no such leaf')}"
        for path in expected.shapes | got.shapes
        if got.shapes.get(path) != expected.shapes.get(path)
    ]
    if leaves:
        rest = f" (and {len(leaves) - 1} more leaves differ)" if leaves[1:] else ""
        return leaves[0] + rest
    return next(_different_numbers(got.start, expected.start, eps), None)


def _different_numbers(
    got: dict[str, list[float]], expected: dict[str, list[float]], eps: float
) -> Iterator[str]:
    numbers = [abs(number) for values in [*got.values(), *expected.values()] for number in values]
    largest = max(filter(math.isfinite, numbers), default=0.0)
    for name in expected | got:
        pair = got.get(name, []), expected.get(name, [])
        if len(pair[0]) != len(pair[1]):
            yield f"{name} at its start has {len(pair[0])} numbers, expected {len(pair[1])}"
        for one, other in zip(*pair, strict=False):
            if math.isnan(one) and math.isnan(other):
                continue
            if not math.isclose(one, other, rel_tol=math.sqrt(eps), abs_tol=eps * largest):
                yield f"{name} at its start is {one!r}, expected {other!r}"
