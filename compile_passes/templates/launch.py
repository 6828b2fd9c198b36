"""What every template shares: launching, counting launches, and what to compile without a GPU."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton

LOG2E = 1.4426950408889634
MOST_PROGRAMS = 65535
"""Along the second and the third axis of a grid."""

SIZES = (
    *("blocks", "rows", "heads", "group", "N", "M", "words", "min_tiles", "capacity", "value"),
    *("allowed_stride_b", "allowed_stride_h", "counts_stride_b", "value_stride_b", "value_stride_h", "value_stride_n"),
)
"""Integers of the coarse stage's kernels that follow the grid: Triton would compile anew for a one or a multiple of 16."""

_launched: list[list[str]] = []


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run a kernel on the device of its first tensor; an empty grid launches nothing.

    Raises:
        ValueError: a grid that CUDA does not take, or of so many programs that Triton would launch none and not say so.
    """
    if 0 in grid:
        return
    name = kernel.fn.__name__ if hasattr(kernel, "fn") else kernel.__name__
    if math.prod(grid) >= 2**31 or max(grid[1:], default=1) > MOST_PROGRAMS:
        raise ValueError(
            f"{name} would run on a grid of {grid}, beyond what a GPU takes (samples and heads: {MOST_PROGRAMS} each): give "
            "fewer samples at a time"
        )
    for names in _launched:
        names.append(name)
    tensor = next(x for x in args if isinstance(x, torch.Tensor))
    with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
        kernel[grid](*args, **meta)


@contextlib.contextmanager
def count_launches() -> Iterator[list[str]]:
    """Collect the name of every kernel launched inside of the block."""
    names: list[str] = []
    _launched.append(names)
    try:
        yield names
    finally:
        _launched.remove(names)


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """One kernel in one configuration, to be compiled for a GPU that need not be there.

    Attributes:
        kernel: the jitted function.
        config: what tells this configuration from others of the kernel, for the report.
        signature: Triton type of every argument by name (``"*bf16"``, ``"i32"``, ``"constexpr"``).
        constants: value of every constexpr argument.
        aligned: names of arguments that are multiples of 16 (pointers, strides), as the launcher finds them.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        auto: whether ``backend="auto"`` can choose it; a spill or a serialised wgmma is an error then.
    """

    kernel: Any
    config: dict[str, Any]
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...] = field(default=())
    num_warps: int = 4
    num_stages: int = 2
    auto: bool = False

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.__name__)
