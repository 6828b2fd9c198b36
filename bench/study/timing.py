"""Seconds of a training step, each method beside dense: one step of either in turn, so that both see the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from bench.study.batch import Batch
from bench.study.presets import DENSE, Timing
from bench.study.rows import Row
from bench.study.settings import Method, Run
from bench.study.train import Training, start, step

WARM = 2


def measure(
    timing: Timing,
    batch: Batch,
    channels: int,
    *,
    device: str,
    compiled: bool,
    bf16: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Row]:
    """Rows "timing", one a method.

    Args:
        timing: which methods of which size, and how often.
        batch: what every step trains on, on the device.
        channels: of the batch.
        device: "cpu" or "cuda".
        compiled: as in the trainings.
        bf16: as in the trainings.
        stop: asked before each method.
    """

    def fresh(method: Method) -> Training:
        run = Run(size=timing.size, method=method, seed=0, steps=1, question="timing")
        training = start(run, channels, device=device, compiled=compiled, weights=None, bf16=bf16)
        for number in range(WARM):
            step(training, batch, number)
        return training

    dense = fresh(DENSE)
    for method in timing.methods:
        if method.attention == "dense":
            continue
        if stop():
            return
        own = fresh(method)
        pairs = [(_seconds(own, batch, device), _seconds(dense, batch, device)) for _ in range(timing.repeats)]
        yield {
            "kind": "timing",
            "size": timing.size.name,
            "method": method.name,
            "seconds": [mine for mine, _ in pairs],
            "dense_seconds": [other for _, other in pairs],
        }


def _seconds(training: Training, batch: Batch, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step(training, batch, WARM)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin
