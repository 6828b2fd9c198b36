"""Interleaved timing: all candidates in turn, so that a slow moment of the machine hits all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any


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
