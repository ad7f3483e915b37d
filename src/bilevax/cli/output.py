"""The folder OUT: results, and the checkpoints of a run that is not finished."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bilevax._frontend.words import DataError
from bilevax.cli.identity import FILE

SCORES = "honest.json"  # next to the checkpoints, for a run that goes on
RESULTS = ("model.json", "report.json", "report.html")


def checkpoints(out: Path) -> Path:
    """Return the folder of the checkpoints."""
    return out / "checkpoints"


def is_unfinished(out: Path) -> bool:
    """Tell whether there is a run to go on with."""
    return any(checkpoints(out).glob("save_*"))


def check_folder(out: Path, resume: bool) -> None:
    """Raise if the folder cannot be written to, or has an unfinished run and should not."""
    if resume and not is_unfinished(out):
        raise DataError(f"there is nothing to --resume in {out}: it has no checkpoints")
    if not resume and is_unfinished(out):
        raise DataError(
            f"{out} has a run that is not finished: go on with --resume, choose another --out, "
            f"or remove {checkpoints(out)}"
        )
    with _explained(out):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # fails now, not after all the work
            pass


def begin(out: Path, identity: str) -> None:
    """Remove what earlier runs have left, and write down of what run the checkpoints will be."""
    # Of a run that ended before its first checkpoint.
    shutil.rmtree(checkpoints(out), ignore_errors=True)
    with _explained(out):
        for name in RESULTS:
            (out / name).unlink(missing_ok=True)
        checkpoints(out).mkdir()
        write(checkpoints(out) / FILE, identity)


def clear(out: Path) -> None:
    """Remove a run that has no checkpoint, and the folder if nothing else is in it."""
    if is_unfinished(out):
        return
    shutil.rmtree(checkpoints(out), ignore_errors=True)
    with contextlib.suppress(OSError):  # it is not empty
        out.rmdir()


def finish(out: Path, results: dict[str, str]) -> None:
    """Write the results, texts by the names of their files."""
    with _explained(out):
        for name, text in results.items():
            write(out / name, text)


def write(path: Path, text: str) -> None:
    """Write a file that is never half written."""
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text(text + "\n", encoding="utf-8")
    draft.replace(path)


@contextlib.contextmanager
def _explained(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write to the folder {out}: {error.strerror}") from None
