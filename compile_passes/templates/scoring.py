"""Scores between pooled tiles, as the kernels of the coarse stage compute them forward and backward.

Shape letters: B batch, H query heads, G KV heads, N query tiles, M KV tiles, D head dim, W words of a bitmask row.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.tile_bits import unpack_bits


@triton.jit
def load_rows(x, row, end, D: tl.constexpr, D_HALF: tl.constexpr):
    """Rows of a contiguous ``[end, D]``, zero past the end, as two halves ``[rows, D_HALF]``."""
    d = tl.arange(0, D_HALF)
    at = x + row[:, None] * D + d[None, :]
    inside = (row < end)[:, None]
    low = tl.load(at, mask=inside & (d < D)[None, :], other=0.0)
    high = tl.load(at + D_HALF, mask=inside & (d < D - D_HALF)[None, :], other=0.0)
    return low, high


@triton.jit
def store_rows(x, low, high, row, end, D: tl.constexpr, D_HALF: tl.constexpr):
    """Inverse of `load_rows`."""
    d = tl.arange(0, D_HALF)
    at = x + row[:, None] * D + d[None, :]
    inside = (row < end)[:, None]
    tl.store(at, low, mask=inside & (d < D)[None, :])
    tl.store(at + D_HALF, high, mask=inside & (d < D - D_HALF)[None, :])


@triton.jit
def dot_rows(x_low, x_high, y_low, y_high):
    """Products of all rows of x with all rows of y, from halves: 3xTF32 holds its operands twice, whole ones spill."""
    product = tl.dot(x_low, tl.trans(y_low), input_precision="tf32x3")
    return tl.dot(x_high, tl.trans(y_high), product, input_precision="tf32x3")


@triton.jit
def score_block(
    x_low,
    x_high,
    y_low,
    y_high,
    row,
    column,
    first,
    allowed,
    kv_counts,
    scale,
    N,
    M,
    words,
    ALLOWED: tl.constexpr,
    ALIVE: tl.constexpr,
    COUNT_BIAS: tl.constexpr,
):
    """Scores of a block of rows and columns, either way round, and which of them are allowed.

    ``row`` and ``column`` are the indices as 2-d tensors that broadcast to the result: ``[rows, 1]`` and
    ``[1, columns]`` where x holds queries, ``[1, rows]`` and ``[columns, 1]`` where it holds keys. Columns
    start at ``first`` and stay in one word of the bitmask.
    """
    scores = dot_rows(x_low, x_high, y_low, y_high) * scale
    inside = (row < N) & (column < M)
    if ALIVE or COUNT_BIAS:
        count = tl.load(kv_counts + column, mask=column < M, other=0)
        if COUNT_BIAS:
            scores += tl.log(tl.maximum(count, 1).to(tl.float32))
        if ALIVE:
            inside = inside & (count > 0)
    if ALLOWED:
        word = tl.load(allowed + row * words + first // 32, mask=row < N, other=0)
        inside = inside & (((word >> (column % 32)) & 1) != 0)
    return scores, inside


def half_of(D: int) -> int:
    """D_HALF: a power of two that holds half of a head dim; below 32, warps would repeat each other's products."""
    return max(32, triton.next_power_of_2(D) // 2)


def scores_reference(
    q_c: Tensor,
    k_c: Tensor,
    kv_counts: Tensor | None,
    count_bias: bool,
    alive: bool,
    allowed: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Scores ``[B, H, N, M]`` in the dtype of ``q_c``, and bool ``[B, H, N, M]`` which of them are allowed."""
    B, H, N, _ = q_c.shape
    M = k_c.shape[2]
    scores = (q_c @ k_c.repeat_interleave(H // k_c.shape[1], 1).transpose(-1, -2)) * scale
    mask = torch.ones((B, H, N, M), dtype=torch.bool, device=q_c.device)
    if kv_counts is not None:
        count = kv_counts.expand(B, M)[:, None, None]
        if count_bias:
            scores = scores + count.clamp_min(1).to(scores.dtype).log()
        if alive:
            mask = mask & (count > 0)
    return scores, mask if allowed is None else mask & unpack_bits(allowed, M)


def coarse_reference(scores: Tensor, mask: Tensor, v_c: Tensor) -> tuple[Tensor, Tensor]:
    """Coarse output ``[B, H, N, D]`` and log-sum-exp ``[B, H, N]`` from `scores_reference`; differentiable."""
    some = mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~mask & some, -math.inf)  # a finite row where none is allowed keeps gradients finite
    coarse = scores.softmax(-1).masked_fill(~mask, 0) @ v_c.repeat_interleave(scores.shape[1] // v_c.shape[1], 1)
    return coarse, scores.logsumexp(-1).masked_fill(~some[..., 0], -math.inf)
