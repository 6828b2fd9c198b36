"""Interleaved timing: all candidates in turn, so that a slow moment of the machine hits all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Milliseconds of one function, by the wall's clock and by the processor's.

    Attributes:
        wall_ms: what passed.
        cpu_ms: what this process computed: of one thread on a quiet machine the same, on a busy one without others' turns.
    """

    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)


def both_clocks(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Samples]:
    """As `interleaved`, by both clocks; samples are rounded to microseconds."""
    samples = {name: Samples() for name in functions}

    def timed(name: str, function: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            wall, cpu = time.perf_counter(), time.process_time()
            function()
            found = (time.perf_counter() - wall, time.process_time() - cpu)
            samples[name].wall_ms.append(round(found[0] * 1e3, 3))
            samples[name].cpu_ms.append(round(found[1] * 1e3, 3))

        return run

    interleaved({name: timed(name, function) for name, function in functions.items()}, repeats)
    for each in samples.values():
        del each.wall_ms[0], each.cpu_ms[0]  # the run before the first round
    return samples


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each function, ``repeats`` samples each; every function runs once before, untimed."""
    for function in functions.values():
        function()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeats):
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                samples[name].append((time.perf_counter() - start) * 1e3)
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return samples
