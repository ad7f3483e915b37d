"""A run that is killed or interrupted, and goes on, has the bits of one that is left alone.

The short form of `make kills`.
"""

import random
from concurrent.futures import ThreadPoolExecutor
from signal import SIGINT, SIGKILL, SIGTERM

import numpy as np
import pytest

from benchmarks import kills
from tests.everyday import slow


@pytest.mark.parametrize(
    ("signals", "cached"),
    [
        pytest.param([SIGKILL, SIGINT, SIGTERM], True, id="each"),
        slow([SIGKILL, SIGINT, SIGKILL, SIGTERM, SIGKILL], False, id="more"),
    ],
)
def test_a_run_that_is_ended_by_force_goes_on_to_the_same_bits(
    signals, cached, tmp_path, monkeypatch
):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiles in half the time
    if cached:  # what one process has compiled, the next ones read
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))
        monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    steps = kills.enough_steps(signals)
    folders = killed, alone = tmp_path / "killed", tmp_path / "alone"
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor() as pool:
        left = pool.submit(kills.attempt, alone, steps)
        attempts = list(kills.endure(killed, signals, random.Random(0), steps))
    assert kills.faults(attempts) == []
    assert left.result() == kills.Attempt(None, 0, steps, "STEPS")
    # Every signal came in the middle of the run, and what was saved before it was used.
    starts = [attempt.first for attempt in attempts]
    assert starts == sorted(set(starts)) and 0 < starts[-1] < steps
    assert kills.differences(killed, alone) == []


def test_another_run_has_other_bits(tmp_path):
    # What is compared above can differ.
    for name, number in {"one": 0.0, "other": -0.0}.items():
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "result.npz", np.ones(2), np.array(number))
    found = kills.differences(tmp_path / "one", tmp_path / "other")
    assert found == ["arr_1 of the last state differs"]


def test_faults_are_found():
    good = [
        kills.Attempt(SIGKILL, 0, 20, "exit status -9"),
        kills.Attempt(SIGTERM, 15, 40, "INTERRUPTED"),
        kills.Attempt(None, 40, 60, "STEPS"),
    ]
    assert kills.faults(good) == []
    bad = [
        good[0]._replace(ending="STEPS"),
        good[1]._replace(first=10),
        good[2]._replace(first=35, ending="exit status 1"),
    ]
    assert kills.faults(bad) == [
        "attempt 1 ended with STEPS, expected exit status -9",
        "attempt 2 goes on from 10, but 20 was reached",
        "attempt 3 ended with exit status 1, expected STEPS",
        "attempt 3 goes on from 35, but 40 was reached",
    ]
