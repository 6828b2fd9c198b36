"""The two walks of the backward: dq along the lists of query tiles, dk and dv along the columns of KV tiles.

By plain Triton, or by the Hopper kernels where a measurement chose them (`tuned`).
Shape letters: B batch, H query heads, G KV heads, N query tiles, M KV video tiles, U all KV tiles, R query rows, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flexsparse.compile_passes.templates import tuned
from flexsparse.compile_passes.templates.attention_common import Blocks, CappedBlocks, padded_dim, unaccelerated_blocks
from flexsparse.compile_passes.templates.backward_kernels import _dq
from flexsparse.compile_passes.templates.column_kernels import _add_pieces, _dkdv
from flexsparse.compile_passes.templates.columns import most_pieces, pieces
from flexsparse.compile_passes.templates.launch import LOG2E, launch
from flexsparse.compile_passes.templates.rows import lengths, strides


def row_blocks(dtype: torch.dtype, D: int, query_rows: int, slots: int) -> Blocks:
    """Block sizes of the kernel of delta, and for the most part of dq's."""
    if dtype == torch.float32:
        return unaccelerated_blocks(D, query_rows, slots)
    if D > 128:
        return Blocks(rows=min(query_rows, 64), keys=min(slots, 32), num_warps=4, num_stages=2)
    rows = min(query_rows, 128)
    return Blocks(rows=rows, keys=min(slots, 64), num_warps=8 if rows == 128 else 4, num_stages=3)


def dq_blocks(dtype: torch.dtype, D: int, query_rows: int, slots: int) -> Blocks:
    """Block sizes of the kernel of dq: in low precision it has two accumulators, for which wider blocks would spill."""
    size = row_blocks(dtype, D, query_rows, slots)
    if dtype == torch.float32:
        return size
    if D > 128:
        return replace(size, rows=min(query_rows, 32))
    return replace(size, keys=min(slots, 32)) if D > 64 and size.rows <= 64 else size


def column_blocks(dtype: torch.dtype, D: int, query_rows: int, slots: int, group: int, partial: bool) -> Blocks:
    """Block sizes of the kernel that walks the columns of KV tiles: its two accumulators leave few registers."""
    if dtype == torch.float32:
        return unaccelerated_blocks(D, query_rows, slots)
    if D > 128:
        return Blocks(rows=min(query_rows, 32), keys=min(slots, 32), num_warps=4, num_stages=2)
    keys = min(slots, 128)
    crowded = D > 64 and (group > 1 or padded_dim(D) > D)  # a second loop or more masks: 64 rows would spill
    stages = 2 if D > 64 and partial and keys < 128 else 3
    rows = min(query_rows, 32 if crowded else 64)
    size = Blocks(rows=rows, keys=keys, num_warps=8 if keys == 128 else 4, num_stages=stages)
    return CappedBlocks(**vars(size), registers=168) if D == rows == keys == 64 and not partial else size


@dataclass(frozen=True, kw_only=True)
class Walk:
    """What the kernels of dq and of dk, dv read besides lists and columns.

    Attributes:
        rows: ``grad_out``, ``q``, ``k`` and ``v`` by name, as `backward` takes them; the last stride is 1.
        lse_log2: float32 ``[B, H, R]``, the log-sum-exp in base 2, inf for a row that saw nothing.
        delta: float32 ``[B, H, R]``, what d_weights are lessened by; written by `dq_of` where the estimate is another tensor.
        estimate: float32 ``[B, H, R]``, delta as the output tells it; delta itself where that is all of it.
        grad_lse: float32 ``[B, H, R]``, or None.
        counts: int32 ``[B, H, N]``.
        kv_counts: int32 ``[B, U]``.
        query_rows: as in `backward`, like all that follow.
        first_rows: extra rows before the video rows.
        kv_first: extra KV tiles before the video tiles.
        kv_video: M.
        slots: slots of a KV tile.
        capacity: most video tiles that a row keeps.
        scale: softmax scale.
        partial: False promises that every KV tile is full.
        q_tokens: int32 ``[R]`` or None, as in `backward`, like the next.
        kv_tokens: int32 ``[U * slots]`` or None.
        constants: by which all kernels are specialised.
    """

    rows: dict[str, Tensor]
    lse_log2: Tensor
    delta: Tensor
    estimate: Tensor
    grad_lse: Tensor | None
    counts: Tensor
    kv_counts: Tensor
    query_rows: int
    first_rows: int
    kv_first: int
    kv_video: int
    slots: int
    capacity: int
    scale: float
    partial: bool
    constants: dict[str, Any]
    q_tokens: Tensor | None = None
    kv_tokens: Tensor | None = None

    @property
    def by_table(self) -> bool:
        """Whether any rows are found by a table."""
        return self.q_tokens is not None or self.kv_tokens is not None

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """The kernels' first arguments."""
        return *self.rows.values(), self.lse_log2, self.delta


def _hopper(choice: tuned.Choice) -> ModuleType:
    """Where a Hopper kernel's `dq` and `dkdv` are."""
    from flexsparse.compile_passes.templates import hopper_backward, hopper_specialized

    return hopper_specialized if choice.kernel == "hopper_specialized" else hopper_backward


def dq_of(walk: Walk, lists: Tensor) -> Tensor:
    """dq, from the kept tiles of each row, int32 ``[B, H, N, capacity]``; and delta, which `dkdv_of` reads."""
    q, k = walk.rows["q"], walk.rows["k"]
    B, H, _, D = q.shape
    R, keys = lengths(q, k, walk.q_tokens, walk.kv_tokens)
    hopper = tuned.hopper_choice("dq", q, walk.query_rows, walk.slots, walk.by_table)
    if hopper is not None:
        return _hopper(hopper).dq(walk, lists, hopper.blocks)
    dq = torch.empty_like(q)
    size = dq_blocks(q.dtype, D, walk.query_rows, walk.slots).deeper(walk.kv_tokens is not None)
    launch(
        _dq,
        (R // size.rows, H, B),
        *walk.operands,
        *(walk.estimate, walk.grad_lse),
        lists,
        walk.counts,
        walk.kv_counts,
        *(walk.q_tokens, walk.kv_tokens),
        dq,
        *(walk.scale, walk.scale * LOG2E),
        *(H, walk.counts.shape[2], walk.kv_video, keys // walk.slots, R),
        *(walk.first_rows, walk.kv_first, walk.capacity),
        CORRECT=walk.estimate is not walk.delta,
        LSE_GRADIENT=walk.grad_lse is not None,
        **strides(**walk.rows, dq=dq),
        **walk.constants,
        **size.meta(),
    )
    return dq


def counts_rows(D: int, query_rows: int) -> bool:
    """Whether dk and dv find packed queries by a table that counts them, where they find keys and values by a table.

    With the one table ptxas spills at 64 rows of D=128; with both it does not, as in attention that packs nothing.
    """
    return D > 64 and query_rows >= 64


def dkdv_of(walk: Walk, offsets: Tensor, columns: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """dk and dv, from the query tiles that keep each KV tile, as `transpose` says them."""
    q, k, v = (walk.rows[name] for name in "qkv")
    (B, H, _, D), G, N = q.shape, k.shape[1], walk.counts.shape[2]
    R, keys = lengths(q, k, walk.q_tokens, walk.kv_tokens)
    q_tokens = walk.q_tokens
    if q_tokens is None and walk.kv_tokens is not None and counts_rows(D, walk.query_rows):
        q_tokens = torch.arange(R, dtype=torch.int32, device=q.device)
    U, M, query_tiles = keys // walk.slots, walk.kv_video, R // walk.query_rows
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    hopper = tuned.hopper_choice("dkdv", q, walk.query_rows, walk.slots, walk.by_table)
    if hopper is not None:
        size = hopper.blocks
    else:
        size = column_blocks(q.dtype, D, walk.query_rows, walk.slots, H // G, walk.partial)
        size = size.deeper(q_tokens is not None)
    halves = walk.slots // size.keys
    entries = N * min(walk.capacity, M) + (query_tiles - N) * M + (U - M) * query_tiles
    most = most_pieces(B * G, halves, U, H // G * entries, H // G * query_tiles)
    where = {"kv_first": walk.kv_first, "U": U, "query_tiles": query_tiles, "N": N}
    work = pieces(columns, group=H // G, most=most, **where)
    shape = (2, B, G, most, walk.slots, D)
    workspace = torch.empty(shape, dtype=torch.float32, device=q.device) if most else None
    if hopper is not None:
        _hopper(hopper).dkdv(walk, offsets, columns, indices, work, dk, dv, workspace, size)
    else:
        launch(
            _dkdv,
            ((U + most) * halves, G, B),
            *walk.operands,
            *(offsets, columns, indices, work),
            walk.kv_counts,
            *(q_tokens, walk.kv_tokens),
            *(dk, dv, workspace),
            *(walk.scale, walk.scale * LOG2E),
            *(N, M, U, R, walk.first_rows // walk.query_rows, walk.kv_first, G, most),
            **strides(**walk.rows, dk=dk, dv=dv),
            **walk.constants,
            SPLIT=most > 0,
            **size.meta(),
        )
    if workspace is not None:
        add_pieces(work, workspace, dk, dv, walk.scale, walk.kv_tokens)
    return dk, dv


def add_pieces(
    work: Tensor, workspace: Tensor, dk: Tensor, dv: Tensor, scale: float, kv_tokens: Tensor | None = None
) -> None:
    """Write dk and dv of the columns that were split, their pieces added in order.

    Args:
        work: as `columns.pieces` returned it.
        workspace: float32 ``[2, B, G, most, slots, D]``, sums of the first ``most`` pieces: dk before the scale, and dv.
        dk: ``[B, G, U * slots, D]``, written in place.
        dv: as dk.
        scale: softmax scale.
        kv_tokens: int32 ``[U * slots]``, the token in each slot, where dk and dv are in the order of tokens.
    """
    _, B, G, most, slots, D = workspace.shape
    keys = min(slots, 32)
    launch(
        _add_pieces,
        (most * (slots // keys), G, B),
        *(work, workspace, kv_tokens, dk, dv, scale, work.shape[2] - most, G, most),
        **strides(dk=dk, dv=dv),
        D=D,
        BLOCK_D=padded_dim(D),
        SLOTS=slots,
        KEYS=keys,
        num_warps=4,
    )


def add_pieces_reference(work: Tensor, workspace: Tensor, dk: Tensor, dv: Tensor, scale: float) -> None:
    """As `add_pieces`."""
    _, B, G, most, slots, _ = workspace.shape
    for b in range(B):
        for g in range(G):
            for row, (u, begin, _, parts) in enumerate(work[b, g, :most].tolist()):
                if parts and begin == 0:
                    at = slice(u * slots, (u + 1) * slots)
                    total = torch.zeros_like(workspace[:, b, g, row])
                    for part in range(parts):
                        total += workspace[:, b, g, row + part]
                    dk[b, g, at], dv[b, g, at] = total[0] * scale, total[1]
