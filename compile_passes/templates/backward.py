"""Gradients of the fine stage and of the gated coarse output: delta, dq along the lists, dk and dv along the columns.

Shape letters: B batch, H query heads, G KV heads, N query tiles, M KV video tiles, U all KV tiles, W words of a bitmask row,
R query rows, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flexsparse.compile_passes.templates.attention_common import Blocks, flags, seen_slots
from flexsparse.compile_passes.templates.attention_shapes import compilation, raster_shapes, shapes
from flexsparse.compile_passes.templates.backward_kernels import _delta, _dq
from flexsparse.compile_passes.templates.column_kernels import _add_pieces, _dkdv
from flexsparse.compile_passes.templates.launch import Compilation, launch
from flexsparse.compile_passes.templates.lists import ascending, transpose
from flexsparse.compile_passes.templates.rows import dense_rows, lengths, strides
from flexsparse.compile_passes.templates.walks import (
    Walk,
    column_blocks,
    counts_rows,
    dkdv_of,
    dq_blocks,
    dq_of,
    row_blocks,
)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bits: Tensor,
    counts: Tensor,
    kv_counts: Tensor,
    coarse: Tensor | None,
    gate: Tensor | None,
    *,
    query_rows: int,
    first_rows: int,
    kv_first: int,
    kv_video: int,
    slots: int,
    capacity: int,
    scale: float,
    partial: bool,
    q_tokens: Tensor | None = None,
    kv_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of `forward`; deterministic.

    Args:
        grad_out: as q. It, q, k, v, out and gate are copied only where their last stride is not 1.
        grad_lse: float32 ``[B, H, R]``, or None.
        q: ``[B, H, R, D]``, and so on as `forward` took them.
        k: ``[B, G, U * slots, D]``.
        v: as k.
        out: as `forward` returned it.
        lse: as `forward` returned it.
        bits: int32 ``[B, H, N, W]``.
        counts: int32 ``[B, H, N]``.
        kv_counts: int32 ``[B, U]``.
        coarse: float32 ``[B, H, N, D]``, or None.
        gate: as q, or None.
        query_rows: as in `forward`, like all that follow.
        first_rows: extra rows before the video rows.
        kv_first: extra KV tiles before the video tiles.
        kv_video: M.
        slots: slots of a KV tile.
        capacity: most video tiles that a row keeps.
        scale: softmax scale.
        partial: False promises that every KV tile is full.
        q_tokens: int32 ``[R]`` or None; with it grad_out and all that is as q are in the order of tokens.
        kv_tokens: int32 ``[U * slots]`` or None.

    Returns:
        Gradients of q, k, v and gate (in their dtypes and memory formats) and, before gate's, of coarse (float32); None for
        the last two without them.
    """
    B, H, _, D = q.shape
    R, _ = lengths(q, k, q_tokens, kv_tokens)
    G, N = k.shape[1], counts.shape[2]
    grad_out, q, k, v, out = (dense_rows(x) for x in (grad_out, q, k, v, out))
    gate, lse = None if gate is None else dense_rows(gate), lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    bits, counts, kv_counts = bits.contiguous(), counts.contiguous(), kv_counts.contiguous()
    gated = coarse is not None and gate is not None
    # out was rounded, or holds the coarse output too: where one weight is near 1, its difference to d_weights is all that
    # counts, and a rounding of out is larger than it
    correct = q.dtype != torch.float32 or gated
    lse_log2, delta = torch.empty_like(lse), torch.empty_like(lse)
    estimate = torch.empty_like(delta) if correct else delta
    dcoarse = torch.empty_like(coarse, memory_format=torch.contiguous_format) if coarse is not None else None
    dgate = torch.empty_like(gate) if gate is not None else None
    walk = Walk(
        rows={"grad_out": grad_out, "q": q, "k": k, "v": v},
        lse_log2=lse_log2,
        delta=delta,
        estimate=estimate,
        grad_lse=grad_lse,
        counts=counts,
        kv_counts=kv_counts,
        query_rows=query_rows,
        first_rows=first_rows,
        kv_first=kv_first,
        kv_video=kv_video,
        slots=slots,
        capacity=capacity,
        scale=scale,
        partial=partial,
        q_tokens=q_tokens,
        kv_tokens=kv_tokens,
        constants={
            "GROUP": H // G,
            **flags(q, k, bits, query_rows, kv_video, slots, partial, q_tokens, kv_tokens),
        },
    )
    size = row_blocks(q.dtype, D, query_rows, slots)
    launch(
        _delta,
        (R // query_rows, H, B),
        grad_out,
        grad_lse,
        out,
        lse,
        None if coarse is None else coarse.contiguous(),
        gate,
        q_tokens,
        *(lse_log2, estimate, dcoarse, dgate),
        *(H, N, R, first_rows),
        COARSE=gated,
        LSE_GRADIENT=grad_lse is not None,
        ROWS=size.rows,
        num_warps=size.num_warps,
        **strides(grad_out=grad_out, out=out, gate=gate, dgate=dgate),
        **{name: walk.constants[name] for name in ("D", "BLOCK_D", "QUERY_ROWS")},
    )
    lists = ascending(bits, counts, kv_video, capacity)
    dq = dq_of(walk, lists)
    del lists  # before the lists of the other direction take their memory
    dk, dv = dkdv_of(walk, *transpose(bits, counts, kv_video, capacity))
    return dq, dk, dv, dcoarse, dgate


def backward_reference(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bits: Tensor,
    counts: Tensor,
    kv_counts: Tensor,
    coarse: Tensor | None,
    gate: Tensor | None,
    *,
    scale: float,
    capacity: int,
    **geometry: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """As `backward`: dense, in float32; ``out`` is not needed, as the sum that it stands for is taken exactly."""
    H, G, N = q.shape[1], k.shape[1], counts.shape[2]
    seen = seen_slots(bits, kv_counts, q.shape[2], **geometry)
    used = seen.any(2).any(1)[:, None, :, None]
    keys, values = (x.float().where(used, 0).repeat_interleave(H // G, 1) for x in (k, v))
    queries, grad = q.float(), grad_out.float()
    logits = (queries @ keys.mT * scale).masked_fill(~seen, -math.inf)
    weights = (logits - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
    d_weights = grad @ values.mT
    delta = (weights * d_weights).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    d_logits = weights * (d_weights - delta[..., None]) * scale
    dq = (d_logits @ keys).to(q.dtype)
    dk, dv = ((x.mT @ y).unflatten(1, (G, H // G)).sum(2) for x, y in ((d_logits, queries), (weights, grad)))
    if coarse is None or gate is None:
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None
    first, query_rows = geometry["first_rows"], geometry["query_rows"]
    rows = slice(first, first + N * query_rows)
    dgate = torch.zeros_like(gate)
    dgate[:, :, rows] = (grad[:, :, rows] * coarse.repeat_interleave(query_rows, 2)).to(gate.dtype)
    dcoarse = (grad[:, :, rows] * gate[:, :, rows].float()).unflatten(2, (N, query_rows)).sum(3)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dcoarse, dgate


def compilations(long_tail: bool) -> list[Compilation]:
    """What to compile offline."""
    found: list[Compilation] = []
    for shape in (*shapes(long_tail), *raster_shapes(long_tail)):
        sizes = (shape.dtype, shape.D, shape.query_rows, shape.slots)
        correct = shape.dtype != torch.float32 or not shape.full
        absent = dict.fromkeys(("coarse", "gate", "dcoarse", "dgate", "grad_lse") if shape.full else ("grad_lse",))
        constants = {"COARSE": not shape.full, "LSE_GRADIENT": False, **absent}
        found.append(compilation(_delta, shape, row_blocks(*sizes), **constants))
        constants = {"CORRECT": correct, "LSE_GRADIENT": False, "grad_lse": None}
        size = dq_blocks(*sizes).deeper(bool(shape.raster))
        found.append(compilation(_dq, shape, size, **constants))
        if shape.raster != "kv" or not counts_rows(shape.D, shape.query_rows):  # else it is that of "qkv"
            size = column_blocks(*sizes, shape.group, not shape.full).deeper(shape.raster == "qkv")
            found.append(compilation(_dkdv, shape, size, SPLIT=False, workspace=None))
            split = compilation(_dkdv, shape, size, SPLIT=True)
            found.append(replace(split, config=split.config | {"split": True}))
        found.append(
            compilation(_add_pieces, shape, Blocks(rows=0, keys=min(shape.slots, 32), num_warps=4, num_stages=2))
        )
    return found
