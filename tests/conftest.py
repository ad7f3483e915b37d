"""Truth is measured in float64, and programs that run once are compiled in a hurry.

With XLA_FLAGS= and JAX_DISABLE_MOST_OPTIMIZATIONS=0 in the environment, the tests compile as users'
programs do; that takes several times as long and must give the same verdicts.
"""

import itertools
import os
import signal
from importlib.metadata import version
from pathlib import Path

import pytest

if version("jaxlib").startswith("0.10."):
    # Halves the time to compile. Later versions do not know the flag, and end without a word.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import jax

jax.config.update("jax_enable_x64", True)
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

_MAPS = Path("/proc/self/maps")
_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def few_memory_maps():
    """Drop what was compiled before the process runs out of memory maps.

    Every program of XLA takes some of the 65 530 that Linux allows, and without one it crashes.
    """
    yield
    if next(_tests) % 20 == 0 and _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture
def write(tmp_path):
    """Return a function that writes lines to a file."""

    def write(lines, name="data.csv"):
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write
