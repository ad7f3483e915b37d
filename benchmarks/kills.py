"""A training run that is killed again and again ends as one that is left alone: `make kills`.

The run, `killed_run.py`, trains the penalties of a ridge regression by Adam, with random data in
every step and inner solves that get more accurate; it saves its state every five steps. It is ended
at random moments, in a step or while it saves, and started again with the same directory:

  SIGKILL           as often as asked for; it must lose no more than the last checkpoint
  SIGINT, SIGTERM   once each; it must end with the current chunk, its state saved

Then every leaf of its last state is compared, byte by byte, with that of a run left alone.

Whatever is not so is listed as missed, and then the exit status is 1.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, Signals
from typing import NamedTuple

import numpy as np

RUN = Path(__file__).with_name("killed_run.py")
CHUNK = 5  # steps between two checkpoints, as there
CHUNKS = 12  # between a start and a signal, at most
DELAY = 0.03  # seconds between a chunk and a signal, at most


class Attempt(NamedTuple):
    """One process: the signal it got, the step it went on from, the last it told of, its end."""

    sent: Signals | None
    first: int
    last: int
    ending: str


def enough_steps(signals: list[Signals]) -> int:
    """Return the length of a run that is not over before it got all signals."""
    return CHUNK * CHUNKS * (len(signals) + 1)


def endure(
    folder: Path, signals: list[Signals], moments: random.Random, steps: int
) -> Iterator[Attempt]:
    """Send a run one signal after the other, and then let it come to its end."""
    for sent in [*signals, None]:
        yield attempt(folder, steps, sent, moments.randint(1, CHUNKS), moments.uniform(0, DELAY))


def attempt(
    folder: Path, steps: int, sent: Signals | None = None, chunks: int = 0, delay: float = 0.0
) -> Attempt:
    """Start a run, or go on with it, and send it a signal after some chunks and a delay."""
    command = [sys.executable, RUN, folder / "checkpoints", folder / "result.npz", str(steps)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line.strip())
            if sent is not None and len(lines) == chunks:
                time.sleep(delay)
                process.send_signal(sent)
    told = [int(line) for line in lines if line.isdigit()] or [0]
    ending = lines[-1] if process.returncode == 0 else f"exit status {process.returncode}"
    return Attempt(sent, told[0] - CHUNK, told[-1], ending)


def faults(attempts: list[Attempt]) -> list[str]:
    """Say what went wrong on the way."""
    found = []
    endings = {None: "STEPS", SIGKILL: f"exit status {-SIGKILL}"}
    before = Attempt(None, 0, 0, "")
    for number, now in enumerate(attempts, 1):
        expected = endings.get(now.sent, "INTERRUPTED")
        if now.ending != expected:
            found.append(f"attempt {number} ended with {now.ending}, expected {expected}")
        # The state that a killed process told of last may have been in the writing.
        lost = before.last - now.first
        if lost > (CHUNK if before.sent == SIGKILL else 0):
            found.append(
                f"attempt {number} goes on from {now.first}, but {before.last} was reached"
            )
        before = now
    return found


def differences(folder: Path, other: Path) -> list[str]:
    """Name the leaves of two last states that do not have the same bytes."""
    with np.load(folder / "result.npz") as ours, np.load(other / "result.npz") as theirs:
        pairs = {name: (ours[name], theirs[name]) for name in theirs.files}
    return [
        f"{name} of the last state differs"
        for name, (one, other) in pairs.items()
        if (one.dtype, one.shape, one.tobytes()) != (other.dtype, other.shape, other.tobytes())
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: %(default)s")
    options = parser.parse_args()
    if options.kills < 1:
        parser.error("--kills must be at least 1")
    began = time.perf_counter()
    moments = random.Random(options.seed)
    signals = [SIGKILL] * options.kills + [SIGINT, SIGTERM]
    moments.shuffle(signals)
    steps = enough_steps(signals)
    with tempfile.TemporaryDirectory() as name:
        killed, alone = Path(name, "killed"), Path(name, "alone")
        killed.mkdir()
        alone.mkdir()
        print(f"A run of {steps} steps, a checkpoint every {CHUNK}\n")
        attempts = []
        for number, now in enumerate(endure(killed, signals, moments, steps), 1):
            attempts.append(now)
            sent = now.sent.name if now.sent else "no signal"
            print(
                f"{number:3}  from step {now.first:5}, {sent:9} after step {now.last:5}: "
                f"{now.ending}",
                flush=True,
            )
        missed = faults(attempts)
        left = attempt(alone, steps)
        if left.ending != "STEPS":
            missed.append(f"the run left alone ended with {left.ending}, expected STEPS")
        missed += differences(killed, alone)
    print("\nMissed:" if missed else "\nThe last state has the bits of that of a run left alone.")
    for line in missed:
        print(f"  {line}")
    print(f"\n{time.perf_counter() - began:.0f} seconds")
    if missed:
        parser.exit(1)


if __name__ == "__main__":
    main()
