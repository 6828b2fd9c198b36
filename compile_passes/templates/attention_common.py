"""What the attention kernels share: walking a list of tiles, block sizes, their constants, and the mask of their twins.

Shape letters: B batch, H query heads, G KV heads, N query tiles, M KV video tiles, U all KV tiles, R query rows,
T all KV slots (U * slots), D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.compile_passes.templates.rows import lengths


@triton.jit
def nth_tile(i, tiles, first, listed, absent, EXTRA: tl.constexpr):
    """The ``i``-th tile that is seen: ``first`` extra tiles, the listed ones, then the others, past those absent.

    Where all tiles are seen, none is listed and none absent. Without extra tiles all come from the list.
    """
    if EXTRA:
        inside = (i >= first) & (i < first + listed)
        index = tl.load(tiles + i - first, mask=inside, other=0)
        return tl.where(inside, first + index, tl.where(i < first, i, i + absent))
    return tl.load(tiles + i)


@triton.jit
def query_tile(row, bh, lists, counts, N, M, first_rows, capacity, QUERY_ROWS: tl.constexpr):
    """Of the query tile that holds a row: its number, whether it is a video tile, its list and what `nth_tile` takes."""
    tile = (row - first_rows) // QUERY_ROWS
    video = (row >= first_rows) & (tile < N)
    listed = tl.load(counts + bh * N + tile, mask=video, other=0)
    return tile, video, lists + (bh * N + tile) * capacity, listed, tl.where(video, M - listed, 0)


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Block sizes and launch options of one attention kernel.

    Attributes:
        rows: query rows of a block.
        keys: KV slots of a block.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int

    def meta(self) -> dict[str, int]:
        """As the kernels' keyword arguments."""
        return {"ROWS": self.rows, "KEYS": self.keys, "num_warps": self.num_warps, "num_stages": self.num_stages}

    def deeper(self, by_table: bool) -> Blocks:
        """For a walk whose rows are found by a table, a stage more: a tile's number, its tokens and their rows are loaded
        one after the other, each a step ahead of the next. It takes no more memory than the tokens.
        """
        pipelined = by_table and self.num_stages > 1
        return replace(self, num_stages=self.num_stages + 1) if pipelined else self


@dataclass(frozen=True, kw_only=True)
class CappedBlocks(Blocks):
    """Blocks of a kernel for which ptxas would take so few registers too many that a program less fits an SM.

    Attributes:
        registers: most registers of a thread.
    """

    registers: int

    def meta(self) -> dict[str, int]:
        """As the kernels' keyword arguments."""
        return super().meta() | {"maxnreg": self.registers}


def padded_dim(D: int) -> int:
    """Block width of a head dim."""
    return max(16, triton.next_power_of_2(D))


def unaccelerated_blocks(D: int, query_rows: int, slots: int) -> Blocks:
    """Block sizes in float32, where no tensor core multiplies and both operands pass through registers."""
    edge = 32 if D <= 64 else 16
    return Blocks(rows=min(query_rows, edge), keys=min(slots, edge), num_warps=4, num_stages=1)


def flags(
    q: Tensor,
    k: Tensor,
    bits: Tensor,
    query_rows: int,
    kv_video: int,
    slots: int,
    partial: bool,
    q_tokens: Tensor | None = None,
    kv_tokens: Tensor | None = None,
) -> dict[str, Any]:
    """The constants by which all attention kernels are specialised."""
    rows, keys = lengths(q, k, q_tokens, kv_tokens)
    return {
        "D": q.shape[3],
        "BLOCK_D": padded_dim(q.shape[3]),
        "QUERY_ROWS": query_rows,
        "SLOTS": slots,
        "EXTRA": keys > kv_video * slots or rows > bits.shape[2] * query_rows,
        "PARTIAL": partial,
    }


def seen_slots(
    bits: Tensor,
    kv_counts: Tensor,
    R: int,
    *,
    query_rows: int,
    first_rows: int,
    kv_first: int,
    kv_video: int,
    slots: int,
    partial: bool,
) -> Tensor:
    """Which KV slots each query row sees, for the plain-torch twins.

    Returns:
        Bool ``[B, H, R, T]``.
    """
    N = bits.shape[2]
    device = bits.device
    m = torch.arange(kv_video, device=device)
    kept = (bits[..., m // 32] >> (m % 32)) & 1 == 1
    query_tile = (torch.arange(R, device=device) - first_rows).div(query_rows, rounding_mode="floor")
    tile = torch.arange(kv_counts.shape[1], device=device) - kv_first
    video = ((query_tile >= 0) & (query_tile < N))[:, None] & ((tile >= 0) & (tile < kv_video))
    seen = kept[:, :, query_tile.clamp(0, N - 1)][..., tile.clamp(0, kv_video - 1)] | ~video
    valid = torch.arange(slots, device=device) < kv_counts[..., None]  # [B, U, slots]
    seen = seen[..., None].expand(*seen.shape, slots)
    return (seen & valid[:, None, None] if partial else seen).flatten(3)
