"""Custom ops that the compiler sees as one node each: what passes put into graphs, and templates implement on CUDA.

Between ops a selection is a bitmask and counts; lists are workspace inside of an op. Schemas are frozen, and tested
(`tests/ops/test_schemas.py`): kernels are built on them.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

MOST_TILES = 16384
"""KV tiles of a row that the selection templates take: 1,048,576 tokens at 64 slots."""
MOST_HEAD_DIM = 256
"""The head dim that templates take; above, those of the coarse stage's gradients need more shared memory than there is."""


_TRITON = importlib.util.find_spec("triton") is not None


def has_triton() -> bool:
    """Whether Triton is installed."""
    return _TRITON


def on_gpu(x: Tensor) -> bool:
    """Whether ops run the templates on a tensor. Tests put another function here, to run them in Triton's interpreter."""
    return x.is_cuda


def by_tokens(x: Tensor) -> Tensor:
    """New memory for ``x [B, H, S, D]`` that lies as a contiguous ``[B, S, H, D]``."""
    return rows_of_tokens(x, x.shape[2])


def rows_of_tokens(x: Tensor, length: int) -> Tensor:
    """As `by_tokens`, of other rows: no view of anything, as autograd lets nobody write to a view that an op returns."""
    B, H, _, D = x.shape
    return x.new_empty_strided((B, H, length, D), (length * H * D, D, H * D, 1))


def templates_select(x: Tensor, tiles: int, head_dim: int = 0) -> bool:
    """Whether the selection templates do a case; else plain torch computes it."""
    fits = tiles <= MOST_TILES and head_dim <= MOST_HEAD_DIM
    return on_gpu(x) and x.dtype != torch.float64 and fits and has_triton()
