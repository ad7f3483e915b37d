"""Directories: of which problem they are, and whether they can be used."""

import importlib.util
import json
import re
import shutil
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from bilevax.checkpoints import Checkpoints
from bilevax.checkpoints import _orbax as checkpoints
from bilevax.outer import Identity
from tests.checkpoints.example import IDENTITY, Y, opened, restored_step, saved, step_of

# Another problem.


def other(start=None, **shapes):
    """Return an identity with other numbers, or with other leaves of y."""
    shapes = IDENTITY.shapes | {f".y['{name}']": shape for name, shape in shapes.items()}
    shapes = {path: shape for path, shape in shapes.items() if shape is not None}
    return Identity(IDENTITY.start | (start or {}), shapes)


OTHERS = {
    "shape": (other(w="float64[4]"), "`.y['w']` is float64[3], expected float64[4]. Use"),
    "dtype": (other(b="float64[]"), "`.y['b']` is float32[], expected float64[]. Use"),
    "new leaf": (other(c="bool[]"), "`.y['c']` is missing, expected bool[]. Use"),
    "no leaf": (other(w=None), "`.y['w']` is float64[3], expected no such leaf. Use"),
    "several": (
        other(b="float64[]", w="float64[4]"),
        "`.y['b']` is float32[], expected float64[] (and 1 more leaves differ). Use",
    ),
    "number": (
        other({"the outer objective": [1.5, 1001.0]}),
        "the outer objective at its start is 1000.0, expected 1001.0. Use",
    ),
    "NaN": (
        other({"the norm of F": [np.nan, 0.0]}),
        "the norm of F at its start is 2.0, expected nan. Use",
    ),
    "infinite": (
        other({"the norm of F": [np.inf, 0.0]}),
        "the norm of F at its start is 2.0, expected inf. Use",
    ),
    "runs": (
        other({"the outer objective": [1.5]}),
        "the outer objective at its start has 2 numbers, expected 1. Use",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_of_another_problem_is_refused(tmp_path, name):
    identity, message = OTHERS[name]
    saved(tmp_path, [1.0])
    before = sorted(tmp_path.rglob("*"))
    message = f"`directory` holds a run of another problem: {message} another directory than"
    with pytest.raises(ValueError, match=re.escape(f"{message} {tmp_path}.")):
        Checkpoints(tmp_path).open(identity, Y)
    assert sorted(tmp_path.rglob("*")) == before
    assert restored_step(tmp_path) == 1  # the directory is free again


def test_other_rounding_is_the_same_problem(tmp_path):
    saved(tmp_path, [1.0])
    # In float32, the coarsest dtype of the state, and with a zero that is but a rounding error.
    start = {"the outer objective": [1.5001, 1000.1], "the norm of F": [1.9999, 1e-4]}
    with opened(tmp_path, identity=other(start)) as run:
        assert step_of(run.restore()) == 1
    with (
        pytest.raises(ValueError, match=r"at its start is 1\.5, expected"),
        opened(tmp_path, jnp.ones(3), other(start)),
    ):
        pass  # in float64 they differ


def test_numbers_that_are_not_finite_are_equal_to_themselves(tmp_path):
    identity = other({"the outer objective": [np.nan, np.inf]})
    for _ in range(2):
        with opened(tmp_path, identity=identity):
            pass


def test_a_problem_file_that_cannot_be_read(tmp_path):
    saved(tmp_path, [1.0])
    odd = json.dumps(IDENTITY._asdict() | {"start": 1})
    for text in ("{", "[1]", odd, '{"beginning": {}}'):
        (tmp_path / "problem.json").write_text(text)
        with pytest.raises(ValueError, match=r"holds a problem.json that cannot be read \("):
            Checkpoints(tmp_path).open(IDENTITY, Y)
    (tmp_path / "problem.json").unlink()
    message = "holds checkpoints, but no problem.json that says of which problem. Use another"
    with pytest.raises(ValueError, match=message):
        Checkpoints(tmp_path).open(IDENTITY, Y)


# A directory that cannot be used.


def test_a_directory_that_cannot_be_used_is_refused_before_the_run(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for directory, kind, cause in [
        (file, FileExistsError, "File exists"),
        (file / "run", NotADirectoryError, "Not a directory"),
        ("/proc/no/run", OSError, "No such file or directory"),
        ("/proc/self", OSError, "No such file or directory"),  # is there, but cannot be written
    ]:
        message = f"`directory` {directory} cannot be used: {cause}."
        with pytest.raises(kind, match=re.escape(message)):
            Checkpoints(directory).open(IDENTITY, Y)


def test_too_little_space_is_refused_before_the_run(tmp_path, monkeypatch):
    like, free = jnp.zeros(1_000_000), 39_000_000  # bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))
    message = (
        f"`directory` {tmp_path} cannot be used: it has 39.00 MB of free space, "
        "expected at least 40.00 MB for 5 checkpoints."
    )
    with pytest.raises(OSError, match=re.escape(message)):
        Checkpoints(tmp_path).open(IDENTITY, like)
    with opened(tmp_path, like, keep=2) as run:
        run.save(1, like, 0.0)
    with opened(tmp_path, like) as run:  # one of the five is there already
        run.save(1, like, 0.0)


def test_a_directory_in_use_is_refused(tmp_path):
    message = f"`directory` {tmp_path} cannot be used: another run is using it."
    with opened(tmp_path), pytest.raises(BlockingIOError, match=re.escape(message)):
        Checkpoints(tmp_path).open(IDENTITY, Y)
    assert restored_step(tmp_path) is None


def test_a_relative_directory_and_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    saved("a/b", [1.0])
    saved("~/c", [1.0])
    assert restored_step(tmp_path / "a" / "b") == restored_step(tmp_path / "c") == 1


# Arguments.

ARGUMENTS = {
    "directory": (dict(directory=3), TypeError, "`directory` must be a path, got 3."),
    "never": (
        dict(every_seconds=None),
        ValueError,
        "One of `every_steps` and `every_seconds` must be a number, got None.",
    ),
    "steps": (dict(every_steps=0), ValueError, "`every_steps` must be positive, got 0."),
    "half a step": (dict(every_steps=0.5), TypeError, "`every_steps` must be a whole number"),
    "seconds": (dict(every_seconds=-1.0), ValueError, "`every_seconds` must be positive, got -1.0"),
    "keep": (dict(keep=0), ValueError, "`keep` must be positive, got 0."),
    "no keep": (dict(keep=None), TypeError, "`keep` must be a number, got None."),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_wrong_arguments(tmp_path, name):
    arguments, kind, message = ARGUMENTS[name]
    with pytest.raises(kind, match=re.escape(message)):
        Checkpoints(**{"directory": tmp_path} | arguments)


def test_without_orbax(monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    spec = importlib.util.spec_from_file_location("bilevax_checkpoints_again", checkpoints.__file__)
    message = "needs Orbax: install it with `pip install 'bilevax[checkpoint]'`."
    with pytest.raises(ImportError, match=re.escape(message)):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
