"""Tile lists in both directions from the bitmask: workspace of the attention kernels, without atomics or host syncs.

Shape letters: B batch, H query heads, N query tiles, M KV video tiles, W words of a bitmask row, K capacity.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.compile_passes.templates.launch import Compilation, launch

ROW_BITS = 1024
"""Bits of a row that `ascending` expands at once."""
COLUMN_ROWS = 128
"""Query tiles that `transpose` expands at once, 32 columns each."""


@triton.jit(do_not_specialize=["M", "words", "capacity"])
def _ascending(bits, counts, lists, M, words, capacity, BLOCK: tl.constexpr):
    """List of one row."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + row)
    before = 0
    for start in range(0, tl.maximum(M, capacity), BLOCK):
        m = start + tl.arange(0, BLOCK)
        word = tl.load(bits + row * words + m // 32, mask=m < M, other=0)
        keep = (word >> (m % 32)) & 1
        rank = before + tl.cumsum(keep, 0) - keep  # kept tiles before this one
        position = tl.where(keep == 1, rank, count + m - rank)  # those not kept fill the list's end with index 0
        tl.store(lists + row * capacity + position, m * keep, mask=position < capacity)
        before += tl.sum(keep, 0)


@triton.jit(do_not_specialize=["N", "M", "words"])
def _count_columns(bits, columns, N, M, words, BLOCK: tl.constexpr):
    """Lengths of 32 columns of one head."""
    bh = (tl.program_id(0) // words).to(tl.int64)
    word = tl.program_id(0) % words
    bit = tl.arange(0, 32)
    total = tl.zeros([32], tl.int32)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        row = tl.load(bits + (bh * N + n) * words + word, mask=n < N, other=0)
        total += tl.sum((row[:, None] >> bit[None, :]) & 1, 0)
    m = word * 32 + bit
    tl.store(columns + bh * M + m, total, mask=m < M)


@triton.jit(do_not_specialize=["N", "M", "words"])
def _fill_columns(bits, offsets, indices, N, M, words, BLOCK: tl.constexpr):
    """Entries of 32 columns of one head, rows in order."""
    bh = (tl.program_id(0) // words).to(tl.int64)
    word = tl.program_id(0) % words
    bit = tl.arange(0, 32)
    m = word * 32 + bit
    end = tl.load(offsets + bh * M + m, mask=m < M, other=0)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        row = tl.load(bits + (bh * N + n) * words + word, mask=n < N, other=0)
        keep = (row[:, None] >> bit[None, :]) & 1
        keep = tl.where((m < M)[None, :], keep, 0)
        position = end[None, :] + tl.cumsum(keep, 0) - 1
        tl.store(indices + position, tl.broadcast_to(n[:, None], keep.shape), mask=keep == 1)
        end += tl.sum(keep, 0)


def ascending(bits: Tensor, counts: Tensor, M: int, capacity: int) -> Tensor:
    """Kept tiles of each row in ascending order; one launch.

    Args:
        bits: int32 ``[B, H, N, W]``.
        counts: int32 ``[B, H, N]``, at most ``capacity``.
        M: KV video tiles.
        capacity: length of the lists.

    Returns:
        int32 ``[B, H, N, capacity]``; 0 past the count.
    """
    lists = torch.empty((*counts.shape, capacity), dtype=torch.int32, device=bits.device)
    grid = (counts.numel() if capacity else 0,)
    meta = {"BLOCK": ROW_BITS, "num_warps": 4}
    launch(_ascending, grid, bits.contiguous(), counts.contiguous(), lists, M, bits.shape[-1], capacity, **meta)
    return lists


def transpose(bits: Tensor, counts: Tensor, M: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each KV tile the query tiles that keep it, ascending, as compressed sparse rows; two launches and a cumsum.

    Args:
        bits: int32 ``[B, H, N, W]``.
        counts: int32 ``[B, H, N]``, at most ``capacity``.
        M: KV video tiles.
        capacity: most tiles that a row keeps: it bounds the memory, as the number kept is on the device only.

    Returns:
        offsets int64 ``[B, H, M]``, counts int32 ``[B, H, M]``, and indices int32 ``[B * H * N * capacity]``, of which
        those past the last column's end are not written.
    """
    B, H, N = counts.shape
    words = bits.shape[-1]
    bits = bits.contiguous()
    columns = torch.empty((B, H, M), dtype=torch.int32, device=bits.device)
    grid, meta = (B * H * words,), {"BLOCK": COLUMN_ROWS, "num_warps": 4}
    launch(_count_columns, grid, bits, columns, N, M, words, **meta)
    offsets = torch.cumsum(columns.view(-1), 0).view(B, H, M) - columns
    indices = torch.empty(B * H * N * capacity, dtype=torch.int32, device=bits.device)
    launch(_fill_columns, grid, bits, offsets, indices, N, M, words, **meta)
    return offsets, columns, indices


def _unpack(bits: Tensor, M: int) -> Tensor:
    m = torch.arange(M, device=bits.device)
    return (bits[..., m // 32] >> (m % 32)) & 1 == 1


def ascending_reference(bits: Tensor, counts: Tensor, M: int, capacity: int) -> Tensor:
    """As `ascending`."""
    keep = _unpack(bits, M)
    order = torch.argsort((~keep).to(torch.int8), dim=-1, stable=True)[..., :capacity]
    order = torch.nn.functional.pad(order, (0, capacity - order.shape[-1]))
    position = torch.arange(capacity, device=bits.device)
    return torch.where(position < counts[..., None], order, 0).int()


def transpose_reference(bits: Tensor, counts: Tensor, M: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `transpose`; indices past the last column's end are 0."""
    columns = _unpack(bits, M).transpose(2, 3)  # [B, H, M, N]
    sizes = columns.sum(-1, dtype=torch.int32)
    offsets = sizes.view(-1).cumsum(0).view(sizes.shape) - sizes
    kept = columns.nonzero()[:, -1].int()
    indices = torch.zeros(counts.numel() * capacity, dtype=torch.int32, device=bits.device)
    indices[: len(kept)] = kept
    return offsets, sizes, indices


def compilations(long_tail: bool) -> list[Compilation]:
    """What to compile offline; these kernels have one configuration each, so ``long_tail`` adds none."""
    integers = {"M": "i32", "words": "i32", "BLOCK": "constexpr"}
    arrays = {
        "bits": "*i32",
        "counts": "*i32",
        "lists": "*i32",
        "columns": "*i32",
        "offsets": "*i64",
        "indices": "*i32",
    }
    found = []
    for kernel, names, block in (
        (_ascending, ("bits", "counts", "lists", "M", "words", "capacity"), ROW_BITS),
        (_count_columns, ("bits", "columns", "N", "M", "words"), COLUMN_ROWS),
        (_fill_columns, ("bits", "offsets", "indices", "N", "M", "words"), COLUMN_ROWS),
    ):
        found.append(
            Compilation(
                kernel=kernel,
                config={},
                signature={name: (arrays | integers).get(name, "i32") for name in (*names, "BLOCK")},
                constants={"BLOCK": block},
                aligned=tuple(name for name in names if name in arrays),
                num_stages=3,
                auto=True,
            )
        )
    return found
