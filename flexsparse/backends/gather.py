"""Gathers each query tile's KV tiles and runs dense attention on them (`ops.gathered`). Any device.

One custom op with a hand-written backward: autograd over the gathered copies would keep them all alive.
Shape letters: B batch, H query heads, G KV heads, N query tiles, U all KV tiles, R query rows (video and extra),
s slots of a KV tile, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexsparse.ops import gathered
from flexsparse.packing import pack_queries, unpack_lse, unpack_rows
from flexsparse.selection import TileSelection


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: TileSelection,
    scale: float,
    q_tiles: Tensor | None = None,
    wants_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Fine-stage attention.

    Args:
        q: ``[B, H, S, D]`` raster order.
        k: ``[B, G, U * s, D]`` tile order, padding zero.
        v: as k.
        selection: which KV tiles each query tile keeps.
        scale: softmax scale.
        q_tiles: q in tile order where it is at hand.
        wants_lse: whether to return the log-sum-exp.

    Returns:
        Output ``[B, H, S, D]`` in q's dtype and log-sum-exp ``[B, H, S]`` or None, both raster.
    """
    layout, kv_layout = selection.layout, selection.kv_layout
    gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    rows, lse = torch.ops.flexsparse.gather_attention(
        pack_queries(q, q_tiles, selection),
        k,
        v,
        selection.bits,
        selection.counts,
        selection.kv_tile_counts(),
        selection.query_rows,
        layout.tiles_first * layout.slots,
        kv_layout.tiles_first,
        kv_layout.num_tiles,
        kv_layout.slots,
        scale,
        wants_lse or gradients,
    )
    return unpack_rows(rows, selection, like=q), unpack_lse(lse, selection) if wants_lse else None


@torch.library.custom_op("flexsparse::gather_attention", mutates_args=())
def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    counts: Tensor,
    kv_counts: Tensor,
    query_rows: int,
    first_rows: int,
    kv_first: int,
    kv_video: int,
    slots: int,
    scale: float,
    wants_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Block-sparse attention over tiles.

    Args:
        q: ``[B, H, R, D]``: ``first_rows`` extra rows, ``N * query_rows`` video rows, the other extra rows.
        k: ``[B, G, U * slots, D]``: ``kv_first`` extra tiles, ``kv_video`` video tiles, the other extra tiles.
        v: as k.
        bits: int32 ``[B, H, N, ceil(kv_video / 32)]``, the video tiles that each query tile keeps.
        counts: int32 ``[B, H, N]``.
        kv_counts: int32 ``[U]`` or ``[B, U]``, valid tokens of each KV tile.
        query_rows: rows of a query tile.
        first_rows: extra rows before the video rows.
        kv_first: extra KV tiles before the video tiles.
        kv_video: M.
        slots: slots of a KV tile.
        scale: softmax scale.
        wants_lse: whether the log-sum-exp is computed; the backward needs it.

    Returns:
        Output as q, and log-sum-exp (natural) ``[B, H, R]`` in at least float32, or ``[B, H, 0]``.
    """
    return gathered.forward(
        q, k, v, bits, counts, kv_counts, query_rows, first_rows, kv_first, kv_video, slots, scale, wants_lse
    )


@gather_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((*q.shape[:2], q.shape[2] if args[-1] else 0), dtype=dtype)


@torch.library.custom_op("flexsparse::gather_attention_backward", mutates_args=())
def gather_attention_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bits: Tensor,
    counts: Tensor,
    kv_counts: Tensor,
    query_rows: int,
    first_rows: int,
    kv_first: int,
    kv_video: int,
    slots: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `gather_attention` with respect to q, k and v; logits are recomputed as the forward does."""
    return gathered.backward(
        *(grad, grad_lse, q, k, v, out, lse, bits, counts, kv_counts),
        *(query_rows, first_rows, kv_first, kv_video, slots, scale),
    )


@gather_attention_backward.register_fake
def _(grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bits, counts, kv_counts, *ctx.rest, _ = inputs
    ctx.save_for_backward(q, k, v, *output, bits, counts, kv_counts)


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    grads = torch.ops.flexsparse.gather_attention_backward(grad, grad_lse, *ctx.saved_tensors, *ctx.rest)
    return (*grads, *(None,) * 10)


gather_attention.register_autograd(_backward, setup_context=_setup)
