"""Custom ops that the compiler sees as one node each: what passes put into graphs, and templates implement on CUDA.

Between ops a selection is a bitmask and counts; lists are workspace inside of an op. Schemas are frozen, and tested
(`tests/ops/test_schemas.py`): kernels are built on them.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

MOST_TILES = 16384
"""KV tiles of a row that the selection templates take: 1,048,576 tokens at 64 slots."""


_TRITON = importlib.util.find_spec("triton") is not None


def has_triton() -> bool:
    """Whether Triton is installed."""
    return _TRITON


def templates_for(x: Tensor, tiles: int) -> Any:
    """The selection templates where they can do the case; None where plain torch computes it."""
    if not x.is_cuda or x.dtype == torch.float64 or tiles > MOST_TILES or not has_triton():
        return None
    from flexsparse.compile_passes.templates import select

    return select
