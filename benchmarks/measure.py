"""What is measured: time, time to compile, work by XLA's cost analysis, memory."""

import gc
import importlib
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.backend import get_backend

# XLA's parser and cost analysis of single computations have no public name.
_hlo: Any = importlib.import_module("jaxlib._hlo")
_jax: Any = importlib.import_module("jaxlib._jax")

Compiled = Any
Trips = Sequence[Any]


class Work(NamedTuple):
    flops: float
    bytes: float


def paired(
    first: Callable[[], Any], second: Callable[[], Any], repeats: int, shortest: float = 0.02
) -> tuple[float, float, float]:
    """Return median seconds of a call of each, and the median of their paired ratios.

    Calls alternate, and so does the order within a pair. A sample of calls that are shorter than
    `shortest` seconds is the mean of several.
    """

    def sample(call: Callable[[], Any], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(call())
        return (time.perf_counter() - start) / calls

    calls = 1 + int(shortest / min(sample(call, 2) for call in (first, second)))
    pairs = []
    for repeat in range(repeats):
        if repeat % 2:
            b, a = sample(second, calls), sample(first, calls)
        else:
            a, b = sample(first, calls), sample(second, calls)
        pairs.append((a, b))
    return _medians(pairs)


def paired_compilations(
    first: Callable[[], Callable[..., Any]],
    second: Callable[[], Callable[..., Any]],
    args: tuple[Any, ...],
    repeats: int,
) -> tuple[float, float, float]:
    """Return median seconds to trace and compile what each makes anew, and the median ratio."""

    def sample(make: Callable[[], Callable[..., Any]]) -> float:
        function = make()
        gc.collect()
        start = time.perf_counter()
        jax.jit(function).lower(*args).compile()
        return time.perf_counter() - start

    for make in (first, second):  # JAX's own functions are traced once per process
        sample(make)
    pairs = []
    for repeat in range(repeats):
        if repeat % 2:
            b, a = sample(second), sample(first)
        else:
            a, b = sample(first), sample(second)
        pairs.append((a, b))
    return _medians(pairs)


def _medians(pairs: list[tuple[float, float]]) -> tuple[float, float, float]:
    first, second = zip(*pairs, strict=True)
    ratios = [a / b for a, b in pairs]
    return tuple(map(statistics.median, (first, second, ratios)))  # type: ignore[return-value]


def program_work(compiled: Compiled) -> Work:
    """Return XLA's cost analysis of a program. It counts the body of every loop once."""
    analysis = compiled.cost_analysis()
    return Work(analysis["flops"], analysis["bytes accessed"])


def executed_work(compiled: Compiled, trips: Trips) -> Work:
    """Return the work of a call: XLA's cost analysis with the body of every loop times its trips.

    Args:
      compiled: a compiled function.
      trips: one entry for each `while` in the order of the program: the number of trips, or a pair
        of it and the same for the loops inside (trips for each entry into the loop).
    """
    text = compiled.runtime_executable().hlo_modules()[0].to_string()
    entry = re.search(r"^ENTRY %?([\w.-]+)", text, re.MULTILINE)
    assert entry is not None
    bodies = _loop_bodies(text)

    def work(name: str, trips: Trips) -> Work:
        total = _computation_work(text, name)
        if len(bodies[name]) != len(trips):
            raise ValueError(f"{name} has {len(bodies[name])} loops, got trips for {len(trips)}")
        for body, trip in zip(bodies[name], trips, strict=True):
            count, inside = trip if isinstance(trip, tuple) else (trip, ())
            once, all_of_it = _computation_work(text, body), work(body, inside)
            total = Work(
                *(t - o + count * a for t, o, a in zip(total, once, all_of_it, strict=True))
            )
        return total

    return work(entry[1], trips)


def _loop_bodies(text: str) -> dict[str, list[str]]:
    """Return the names of the loop bodies that each computation of an HLO text runs."""
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        header = re.match(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if header:
            name = header[1]
            bodies[name] = []
        bodies.setdefault(name, []).extend(re.findall(r" while\(.*body=%?([\w.-]+)", line))
    return bodies


def _computation_work(text: str, name: str) -> Work:
    """Return the cost analysis of one computation of an HLO text."""
    text = re.sub(r"^ENTRY ", "", text, flags=re.MULTILINE)
    text = re.sub(rf"^%?{re.escape(name)} \(", rf"ENTRY %{name} (", text, flags=re.MULTILINE)
    text = re.sub(r", entry_computation_layout=\{.*?\}(?=, \w+=|$)", "", text, flags=re.MULTILINE)
    module = _hlo.hlo_module_from_text(text)
    analysis = _jax.hlo_module_cost_analysis(get_backend(), module)
    return Work(analysis["flops"], analysis["bytes accessed"])


def memory(compiled: Compiled) -> int:
    """Return the bytes that a call needs besides its arguments: temporaries and outputs."""
    analysis = compiled.memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes
