"""The machine that is measured. `Host` stands in for a GPU where there is none, so that everything else can be tested."""

from __future__ import annotations

import gc
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

LEAD_CYCLES = 2_000_000
"""The GPU idles this long before each sample (1 ms), while the host queues the sample's kernels behind: what is timed is the
GPU's work, not the launches."""


class Device(Protocol):
    """What the suite asks of a machine.

    Attributes:
        torch: where tensors live.
        arch: as the table of tuned configurations names it, such as ``sm_90a``.
        backend: of `fs.sparse_attention`.
        modes: how whole attentions run: ``compiled``, ``eager``.
        l2_bytes: inputs larger than this are not rotated.
        compile_options: further options of `fs.backend` and `fs.wrap`.
    """

    torch: torch.device
    arch: str
    backend: str
    modes: tuple[str, ...]
    l2_bytes: int
    compile_options: dict[str, Any]

    def header(self) -> dict[str, Any]:
        """``gpu``, ``driver``, ``cudnn`` and what else names the machine."""
        ...

    def synchronize(self) -> None:
        """Wait; raises where something failed on the way."""
        ...

    def round(self, functions: Sequence[Callable[[], Any]]) -> list[float]:
        """Milliseconds of each function, one after the other."""
        ...

    def reset(self) -> None:
        """Forget compiled code and free memory: one case must not slow the next."""
        ...


def _reset() -> None:
    torch._dynamo.reset()
    gc.collect()


class Cuda:
    """The current CUDA device, timed by events."""

    backend = "triton"
    modes = ("compiled", "eager")

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.torch = torch.device("cuda", torch.cuda.current_device())
        self.arch = f"sm_{properties.major}{properties.minor}" + ("a" if properties.major >= 9 else "")
        self.l2_bytes = int(getattr(properties, "L2_cache_size", 0)) or 64 * 2**20
        self.compile_options: dict[str, Any] = {}

    def header(self) -> dict[str, Any]:
        """Names and versions."""
        return {
            "gpu": torch.cuda.get_device_name(self.torch),
            "driver": driver(),
            "cudnn": torch.backends.cudnn.version(),
            "cuda": torch.version.cuda,
        }

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self.torch)

    def round(self, functions: Sequence[Callable[[], Any]]) -> list[float]:
        """One sample of each, without waiting in between."""
        events = []
        for function in functions:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(LEAD_CYCLES)
            start.record()
            function()
            end.record()
            events.append((start, end))
        self.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def reset(self) -> None:
        """Drop compiled code and cached memory."""
        _reset()
        torch.cuda.empty_cache()


class Host:
    """The CPU in a GPU's place, for tests: the same rows, and numbers that mean nothing."""

    backend = "gather"
    arch = "host"
    l2_bytes = 0

    def __init__(self, modes: tuple[str, ...] = ("eager",), clock: Callable[[], float] = time.perf_counter) -> None:
        self.torch = torch.device("cpu")
        self.modes, self.clock = modes, clock
        self.compile_options: dict[str, Any] = {"inner": "aot_eager"}

    def header(self) -> dict[str, Any]:
        """No GPU."""
        return {"gpu": None, "driver": None, "cudnn": None, "cuda": None}

    def synchronize(self) -> None:
        """Nothing runs behind."""

    def round(self, functions: Sequence[Callable[[], Any]]) -> list[float]:
        """One sample of each."""
        found = []
        for function in functions:
            start = self.clock()
            function()
            found.append((self.clock() - start) * 1e3)
        return found

    def reset(self) -> None:
        """Drop compiled code."""
        _reset()


def driver() -> str | None:
    """Version of the NVIDIA driver; None where `nvidia-smi` does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.split("\n")[0].strip() or None
