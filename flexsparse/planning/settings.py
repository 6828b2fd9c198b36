"""What is planned: the arguments of `flexsparse plan`, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from flexsparse.grids import Grid
from flexsparse.planning.attention import Builder
from flexsparse.planning.counting import PlanError
from flexsparse.planning.machines import CPU, Machine, check_results, machine_of

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One plan.

    Attributes:
        model: a preset, or the path of a transformer's folder or config.json.
        grid: tokens (T, H, W); or None, and ``pixels``.
        pixels: (frames, rows, columns).
        builder: of the sparse calls.
        tile: as `flexsparse.wrap`.
        gates: whether each sparse call has a gate.
        batch: samples of one replica: of the GPUs that share a sequence.
        text: tokens of the first text input; the pipeline's by default.
        training: a forward and a backward with AdamW, or a forward.
        checkpointing: whether blocks are computed again in backward.
        compiled: whether what lies between matrix products is fused; else each op reads and writes by itself.
        dtype: in which the model computes.
        gpus: all of them.
        ulysses: GPUs that share a sequence.
        fsdp: GPUs that share the weights.
        gpu: a name of `machines.MACHINES`, or ``cpu``: the one that a file of ``results`` was measured on.
        results: folder of result files, or one of them; the checkout's folder by default.

    Raises:
        PlanError: what makes no sense.
    """

    model: str
    builder: Builder
    grid: Grid | None = None
    pixels: tuple[int, int, int] | None = None
    tile: tuple[int, int, int] | str = (4, 4, 4)
    gates: bool = False
    batch: int = 1
    text: int | None = None
    training: bool = True
    checkpointing: bool = True
    compiled: bool = True
    dtype: str = "bfloat16"
    gpus: int = 1
    ulysses: int = 1
    fsdp: int = 1
    gpu: str = "h200"
    results: Path | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "gpus", "ulysses", "fsdp"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} is {getattr(self, name)}: give at least 1")
        for name in ("ulysses", "fsdp"):
            if self.gpus % getattr(self, name):
                raise PlanError(
                    f"{name} is {getattr(self, name)}, which does not divide {self.gpus} GPUs: give gpus a multiple of "
                    f"{math.lcm(self.ulysses, self.fsdp)}, or {name} a divisor of them"
                )
        if self.text is not None and self.text < 1:
            raise PlanError(f"text is {self.text}: give at least 1 token")
        if (self.grid is None) == (self.pixels is None):
            raise PlanError("give either the grid in tokens, or frames, height and width in pixels")
        if self.grid is not None and min(self.grid) < 1:
            raise PlanError(f"grid is {self.grid}: give sizes of at least 1")
        if self.gates and not self.builder.has_coarse:
            raise PlanError(f"gates are on, but {type(self.builder).__name__} has no coarse output: leave them out")
        if self.dtype not in DTYPES:
            raise PlanError(f"dtype is {self.dtype!r}: give one of {', '.join(DTYPES)}")
        if self.results is not None:
            check_results(self.results)
        if self.gpu == CPU and self.gpus > 1:
            raise PlanError(f"gpus is {self.gpus}, but between CPUs nothing was measured: plan with one, or name a GPU")
        if self.dtype not in self.machine.products:
            known = ", ".join(self.machine.products)
            raise PlanError(
                f"dtype is {self.dtype!r}, which was not measured on {self.machine.name}: give one of {known}"
            )

    @property
    def machine(self) -> Machine:
        """The GPU or CPU."""
        return machine_of(self.gpu, self.results)

    @property
    def torch_dtype(self) -> torch.dtype:
        """In which the model computes."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def forwards(self) -> int:
        """How often a step computes its forward."""
        return 2 if self.training and self.checkpointing else 1
