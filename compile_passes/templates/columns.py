"""Order and pieces of the columns that the dk, dv kernel walks: the longest first, the very long ones in pieces.

A column is what one KV tile has to add up: the query tiles that see it, of every query head of its group, head after head.
Shape letters: B batch, H query heads, G KV heads, N query tiles, M KV video tiles, U all KV tiles, D head dim,
C pieces at most (U + most).
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.compile_passes.templates.attention_shapes import ARGUMENT_TYPES, NUMBERS
from flexsparse.compile_passes.templates.launch import Compilation, launch

PROGRAMS = 264
"""Programs that run at once: two on each of 132 SMs. Not asked of the GPU at hand, so that results depend on shapes alone."""
SHARE = 16
"""A piece may take two of so many parts of what a machine evenly loaded does in all: the last one to end costs no more."""
SHORTEST = 8
"""Query tiles of a piece at least: its partial sums cost as much memory traffic as about four."""
BLOCK = 64
TOTAL_BLOCK = 1024


@triton.jit
def column_lengths(u, columns, bg, N, M, U, kv_first, query_tiles, GROUP: tl.constexpr):
    """Query tiles that see each KV tile ``u`` of a KV head, over its query heads; 0 past the last tile."""
    m = u - kv_first
    video = (m >= 0) & (m < M)
    found = tl.where(video, (query_tiles - N) * GROUP, query_tiles * GROUP)
    for member in range(GROUP):
        found += tl.load(columns + (bg * GROUP + member) * M + m, mask=video, other=0)
    return tl.where(u < U, found, 0)


@triton.jit(do_not_specialize=NUMBERS)
def _pieces(
    columns,
    pieces,
    N,
    M,
    U,
    G,
    kv_first,
    query_tiles,
    most,
    GROUP: tl.constexpr,
    SHORTEST: tl.constexpr,
    BLOCK: tl.constexpr,
    TOTAL_BLOCK: tl.constexpr,
):
    """Rows of BLOCK columns of one KV head: each column counts the pieces that come before its own."""
    bg = tl.program_id(2).to(tl.int64) * G + tl.program_id(1)
    limit = 1
    if most > 0:
        total = tl.zeros([TOTAL_BLOCK], tl.int64)
        for start in range(0, U, TOTAL_BLOCK):
            u = start + tl.arange(0, TOTAL_BLOCK)
            total += column_lengths(u, columns, bg, N, M, U, kv_first, query_tiles, GROUP)
        limit = tl.maximum((tl.sum(total, 0) + most - 1) // most, SHORTEST).to(tl.int32)
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    length = column_lengths(mine, columns, bg, N, M, U, kv_first, query_tiles, GROUP)
    before = tl.zeros([BLOCK], tl.int32)
    used = tl.zeros([BLOCK], tl.int32)
    for start in range(0, U, BLOCK):
        u = start + tl.arange(0, BLOCK)
        other = column_lengths(u, columns, bg, N, M, U, kv_first, query_tiles, GROUP)
        parts = tl.where(u < U, tl.where(most > 0, tl.maximum(other // limit, 1), 1), 0)
        same = other[:, None] == length[None, :]
        earlier = (other[:, None] > length[None, :]) | (same & (u[:, None] < mine[None, :]))
        before += tl.sum(tl.where(earlier, parts[:, None], 0), 0)
        used += parts
    parts = tl.where(mine < U, tl.where(most > 0, tl.maximum(length // limit, 1), 1), 0)
    each, left = length // tl.maximum(parts, 1), length % tl.maximum(parts, 1)
    for part in range(tl.max(parts, 0)):
        at = pieces + (bg * (U + most) + before + part) * 4
        begin = part * each + tl.minimum(part, left)
        some = part < parts
        tl.store(at, mine, mask=some)
        tl.store(at + 1, begin, mask=some)
        tl.store(at + 2, begin + each + (part < left).to(tl.int32), mask=some)
        tl.store(at + 3, tl.where(parts > 1, parts, 0), mask=some)
    if tl.program_id(0) == 0:
        column = tl.arange(0, BLOCK) % 4
        for start in range(tl.sum(used, 0) * 4, (U + most) * 4, BLOCK):
            at = start + tl.arange(0, BLOCK)  # a multiple of 4: each starts a row
            tl.store(pieces + bg * (U + most) * 4 + at, tl.where(column == 0, -1, 0), mask=at < (U + most) * 4)


def most_pieces(heads: int, halves: int, U: int, total: int, longest: int) -> int:
    """How many pieces the split columns of a KV head may have together, from shapes alone: nothing waits for the device.

    A column is split into ``length // limit`` pieces, ``limit`` being the head's sum of lengths over this number. So the
    split columns have no more pieces than this, and no piece is as long as ``2 * limit``.

    Without popular tiles to fear for (many heads, whose columns fill the machine to the end) it is 0. The partial sums are
    float32 ``[2, heads, most, slots, D]``: no more than dk and dv of a 16-bit type take, or than ``2 * PROGRAMS`` pieces take
    (35 MB at 64 slots of 128 values), whichever is the larger.

    Args:
        heads: B * G.
        halves: programs that share a KV tile.
        U: KV tiles.
        total: an upper bound of the sum of a head's column lengths.
        longest: query tiles that can see one KV tile, over a group's heads.
    """
    if heads == 0:
        return 0
    room = max(heads * U * halves // 2, 2 * PROGRAMS)
    most = min(min(SHARE * PROGRAMS, room) // (heads * halves), total // SHORTEST)
    if most == 0 or longest < 2 * max(-(-total // most), SHORTEST):
        return 0  # no column can be longer than two pieces
    return most


def pieces(columns: Tensor, *, group: int, kv_first: int, U: int, query_tiles: int, N: int, most: int) -> Tensor:
    """Work of the dk, dv kernel in the order in which it shall start, one launch.

    Heads stay in their order, as the programs of one head read the same queries, which the L2 cache holds; within a head
    the longest columns come first, ties in order of their tiles. A sort by `torch.argsort` would be several launches with
    64-bit indices; here each column counts those before it, which for 1,200 tiles takes as long as a launch.

    Args:
        columns: int32 ``[B, H, M]``, query tiles that keep each KV video tile.
        group: query heads of a KV head.
        kv_first: extra KV tiles before the video tiles.
        U: KV tiles.
        query_tiles: query tiles, extra ones included.
        N: video query tiles.
        most: as `most_pieces` says.

    Returns:
        int32 ``[B, G, U + most, 4]``; a row is KV tile, first entry, end, and pieces of its column (0 where it is whole).
        Entries of a column count query tiles of the group's first head, then of the next. Pieces of a column follow each
        other; rows of split columns are among the first ``most``. Rows past the last piece have tile -1.
    """
    B, H, M = columns.shape
    found = torch.empty((B, H // group, U + most, 4), dtype=torch.int32, device=columns.device)
    sizes = (N, M, U, H // group, kv_first, query_tiles, most)
    meta = {"GROUP": group, "SHORTEST": SHORTEST, "BLOCK": BLOCK, "TOTAL_BLOCK": TOTAL_BLOCK, "num_warps": 4}
    launch(_pieces, (triton.cdiv(U, BLOCK), H // group, B), columns, found, *sizes, **meta)
    return found


def pieces_reference(
    columns: Tensor, *, group: int, kv_first: int, U: int, query_tiles: int, N: int, most: int
) -> Tensor:
    """As `pieces`."""
    B, H, M = columns.shape
    lengths = torch.full((B, H // group, U), query_tiles * group, dtype=torch.int64)
    seen = columns.cpu().long().unflatten(1, (-1, group)).sum(2)
    lengths[..., kv_first : kv_first + M] = seen + (query_tiles - N) * group
    found = torch.tensor([-1, 0, 0, 0], dtype=torch.int32).repeat(B, H // group, U + most, 1)
    for b in range(B):
        for g in range(H // group):
            limit = max(-(-int(lengths[b, g].sum()) // most), SHORTEST) if most else None
            rows = []
            for u in torch.argsort(lengths[b, g], descending=True, stable=True).tolist():
                length = int(lengths[b, g, u])
                parts = max(1, length // limit) if limit else 1
                ends = [length // parts * i + min(i, length % parts) for i in range(parts + 1)]
                rows += [[u, begin, end, parts if parts > 1 else 0] for begin, end in itertools.pairwise(ends)]
            found[b, g, : len(rows)] = torch.tensor(rows, dtype=torch.int32)
    return found.to(columns.device)


def compilations(long_tail: bool) -> list[Compilation]:
    """What to compile offline."""
    constants = {"SHORTEST": SHORTEST, "BLOCK": BLOCK, "TOTAL_BLOCK": TOTAL_BLOCK}
    return [
        Compilation(
            kernel=_pieces,
            config={"group": group},
            signature={n: "constexpr" if n.isupper() and len(n) > 1 else ARGUMENT_TYPES[n] for n in _pieces.arg_names},
            constants={"GROUP": group, **constants},
            aligned=("columns", "pieces"),
            num_stages=3,
            auto=True,
        )
        for group in ((1, 4) if long_tail else (1,))
    ]
