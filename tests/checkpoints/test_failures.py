"""What fails later on: writes, damaged files, processes that end in the middle."""

import logging
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest

from bilevax.checkpoints import Checkpoints
from bilevax.checkpoints import _orbax as checkpoints
from bilevax.outer import Identity
from tests.checkpoints.example import (
    IDENTITY,
    NO_SPACE,
    Y,
    opened,
    restored_step,
    saved,
    state_of,
    step_of,
    steps_on_disk,
)

# Failures later on.


def failing_write(path, arrays):
    path.write_bytes(b"half of it")
    raise NO_SPACE


def test_a_write_that_fails_is_told_at_the_next_save_and_leaves_the_others(tmp_path, monkeypatch):
    saved(tmp_path, [0.0, 1.0, 2.0], keep=2)
    with opened(tmp_path, keep=2) as run:
        assert step_of(run.restore()) == 3
        with monkeypatch.context() as patched:
            patched.setattr(checkpoints, "_write", failing_write)
            run.save(4, state_of(4), -1.0)  # fails in the background
            message = (
                f"[Errno 28] The checkpoint of step 4 could not be written to {tmp_path} "
                "(that of step 3 is intact): No space left on device."
            )
            with pytest.raises(OSError, match=re.escape(message)) as caught:
                run.save(5, state_of(5), 0.0)
        assert caught.value.errno == 28
        assert sorted(path.name for path in tmp_path.glob("save*")) == [
            "save_0",
            "save_1",
            "save_2",
        ]
        run.save(6, state_of(6), 3.0)
    assert steps_on_disk(tmp_path) == [1, 3, 6]
    assert restored_step(tmp_path) == 6


def test_a_write_that_fails_is_told_by_close(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_write", failing_write)
    message = f"The checkpoint of step 4 could not be written to {tmp_path}: No space left"
    run = Checkpoints(tmp_path).open(IDENTITY, Y)
    run.save(4, state_of(4), 1.0)
    with pytest.raises(OSError, match=re.escape(message)):
        run.close()
    run.close()  # told once
    assert restored_step(tmp_path) is None


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    directory = tmp_path / "run"
    run = Checkpoints(directory).open(IDENTITY, Y)
    shutil.rmtree(directory)
    directory.touch()
    run.save(1, state_of(1), 0.0)
    message = f"The checkpoint of step 1 could not be written to {directory}: Not a directory."
    with pytest.raises(NotADirectoryError, match=re.escape(message)):
        run.close()


def damaged(kind):
    def damage(file):
        content = file.read_bytes()
        middle = len(content) // 2
        if kind == "missing":
            file.unlink()
        elif kind == "bit":
            flipped = bytes([content[middle] ^ 1])
            file.write_bytes(content[:middle] + flipped + content[middle + 1 :])
        else:
            file.write_bytes(content[: {"empty": 0, "short": middle}[kind]])

    return damage


@pytest.mark.parametrize("kind", ["missing", "empty", "short", "bit"])
def test_a_checkpoint_that_cannot_be_read_gives_way_to_the_one_before(tmp_path, kind):
    like = jnp.zeros(1000)  # half of the file is numbers
    with opened(tmp_path, like) as run:
        for step in (1, 2, 3):
            run.save(step, like + step, float(step))
    newest = tmp_path / "save_2"
    damaged(kind)(next(newest.rglob("state.npz")))
    with opened(tmp_path, like) as run:
        message = rf"The checkpoint {newest} cannot be read \(.*\); trying the one before"
        with pytest.warns(RuntimeWarning, match=message):
            assert step_of(run.restore()) == 2
        run.save(4, like + 4, 4.0)
    with opened(tmp_path, like) as run:
        assert step_of(run.restore()) == 4
    damage = damaged(kind)
    for file in tmp_path.rglob("state.npz"):
        if file.exists() and newest not in file.parents:
            damage(file)
    message = rf"None of the 4 checkpoints in {tmp_path} can be read; the last that was tried is"
    with (
        opened(tmp_path, like) as run,
        pytest.warns(RuntimeWarning),
        pytest.raises(OSError, match=message),
    ):
        run.restore()


@pytest.mark.parametrize("kind", ["missing", "empty", "short"])
def test_damage_to_what_orbax_keeps_for_itself_does_no_harm(tmp_path, kind):
    saved(tmp_path, [1.0, 2.0])
    for file in [*(tmp_path / "save_1").rglob("*")]:
        if file.is_file() and file.name != "state.npz":
            damaged(kind)(file)
    with opened(tmp_path) as run:
        assert step_of(run.restore()) in (1, 2)
        run.save(3, state_of(3), 3.0)
    assert restored_step(tmp_path) == 3


def test_what_a_killed_process_had_begun_does_not_count_and_is_removed(tmp_path):
    saved(tmp_path, [1.0, 2.0])
    shutil.copytree(tmp_path / "save_1", tmp_path / "save_2.orbax-checkpoint-tmp")
    (tmp_path / "mine.txt").touch()
    assert restored_step(tmp_path) == 2
    assert {path.name for path in tmp_path.iterdir()} == {
        *("save_0", "save_1", "lock", "problem.json", "mine.txt")
    }


def test_nothing_is_printed_and_the_logs_of_others_stay(tmp_path, monkeypatch, capfd, caplog):
    with opened(tmp_path) as run:
        run.save(1, state_of(1), 0.0)
        run._finish()
        with monkeypatch.context() as patched:
            patched.setattr(checkpoints, "_write", failing_write)
            run.save(2, state_of(2), 0.0)
            with pytest.raises(OSError, match="step 2"):
                run._finish()
        assert not caplog.records
        logging.getLogger("absl").warning("from someone else")
    assert [record.message for record in caplog.records] == ["from someone else"]
    assert capfd.readouterr() == ("", "")
    assert not logging.getLogger("absl").filters


# Processes that end in the middle.

LOOP = """
import sys
import jax.numpy as jnp
from bilevax.checkpoints import Checkpoints
from bilevax.outer import Identity

like = (*(jnp.zeros(size) for size in (1, 10, 200_000)), jnp.zeros((), jnp.int32))
run = Checkpoints(sys.argv[1], keep=2).open(Identity({}, {}), like)
state, count = run.restore() or like, 0
while True:
    state, count = tuple(leaf + 1 for leaf in state), count + 1
    run.save(int(state[0][0]), state, float(-state[0][0]))
    if count == 2:
        print("one is written", flush=True)
"""


def start(folder, program, *arguments):
    script = folder / "program.py"
    script.write_text(program)
    command = [sys.executable, "-W", "error", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_process_that_is_killed_leaves_a_complete_checkpoint(tmp_path):
    moments = random.Random(0)
    directory, step = tmp_path / "run", 0
    like = (*(jnp.zeros(size, jnp.float32) for size in (1, 10, 200_000)), jnp.int32(0))
    for _ in range(2):  # `make kills` does so more often
        process = start(tmp_path, LOOP, directory)
        assert process.stdout.readline() == "one is written\n", process.communicate()
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        assert process.communicate()[1] == "" and process.returncode == -signal.SIGKILL
        with opened(directory, like, Identity({}, {})) as run:  # which is no longer in use
            previous, step = step, step_of(run.restore())
        assert step > previous


LIMITED = """
import resource, sys
import jax.numpy as jnp
from bilevax.checkpoints import Checkpoints
from bilevax.outer import Identity

like = jnp.zeros(10_000)
run = Checkpoints(sys.argv[1]).open(Identity({}, {}), like)
run.save(1, like + 1, 0.0)
run._finish()
for step, limit in ((2, 20_000), (3, 0)):
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
        run.save(step, like + step, 0.0)
        run._finish()
    except OSError as error:
        print(error)
run.close()
"""


def test_a_limit_of_the_system_is_told(tmp_path):
    # No file may get longer than this: half of the state can be written, and then nothing at all.
    directory = tmp_path / "run"
    output, errors = start(tmp_path, LIMITED, directory).communicate()
    assert errors == ""
    assert output.splitlines() == [
        f"[Errno 27] The checkpoint of step {step} could not be written to {directory} "
        f"(that of step {before} is intact): File too large."
        for step, before in ((2, 1), (3, 1))
    ]
    with opened(directory, jnp.zeros(10_000, jnp.float32), Identity({}, {})) as run:
        assert step_of(run.restore()) == 1
