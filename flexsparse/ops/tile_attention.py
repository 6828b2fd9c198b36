"""`flexsparse::tile_attention`: the fine stage as one op, with the gated coarse output in its epilogue.

Triton templates on CUDA, `gathered` elsewhere: both do work in proportion to the density.
Shape letters: B batch, H query heads, G KV heads, N query tiles, U all KV tiles, R query rows (extra and video), D head dim,
W words of a bitmask row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexsparse import ops
from flexsparse.ops import gathered
from flexsparse.ops.tile_tokens import inverse, rows_at

HEAD_DIMS = range(8, 257, 8)
ROWS = (16, 32, 64, 128, 256)


def templates_refuse(dtype: torch.dtype, head_dim: int, query_rows: int, slots: int) -> str | None:
    """Why the Triton templates cannot do a case, with the remedy; None where they can."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the templates compute no {dtype}; use 'gather' or 'reference'"
    if head_dim not in HEAD_DIMS:
        return f"the templates take head dims that are multiples of 8 up to 256, not {head_dim}; use 'gather'"
    if query_rows not in ROWS or slots not in ROWS:
        return (
            f"the templates take tiles of 16 to 256 slots, not {max(query_rows, slots)}; use a smaller tile or 'gather'"
        )
    return None


@torch.library.custom_op("flexsparse::tile_attention", mutates_args=(), device_types="cpu")
def tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coarse: Tensor | None,
    gate: Tensor | None,
    bits: Tensor,
    counts: Tensor,
    kv_counts: Tensor,
    query_rows: int,
    first_rows: int,
    last_rows: int,
    kv_first: int,
    kv_video: int,
    slots: int,
    capacity: int,
    frame_tiles: int,
    partial: bool,
    scale: float,
    wants_lse: bool,
    q_tokens: Tensor | None = None,
    kv_tokens: Tensor | None = None,
    token_major: bool = False,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the tokens of the kept tiles and the extra tokens, plus ``gate * coarse``.

    Args:
        q: ``[B, H, R, D]``: ``first_rows`` extra rows, ``N * query_rows`` video rows, ``last_rows`` extra rows.
        k: ``[B, G, U * slots, D]``: ``kv_first`` extra tiles, ``kv_video`` video tiles, the other extra tiles.
        v: as k.
        coarse: ``[B, H, N, D]``, or None.
        gate: ``[B, H, R, D]`` factor of the coarse output of a row's tile (extra rows have none), given with ``coarse``.
        bits: int32 ``[B, H, N, W]``, the video tiles that each query tile keeps.
        counts: int32 ``[B, H, N]``.
        kv_counts: int32 ``[U]`` or ``[B, U]``, valid tokens of each KV tile; slots past them may hold anything on CUDA, and
            must be zero elsewhere.
        query_rows: rows of a query tile as computed.
        first_rows: extra rows before the video rows.
        last_rows: extra rows after them.
        kv_first: extra KV tiles before the video tiles.
        kv_video: KV video tiles.
        slots: slots of a KV tile.
        capacity: no count is larger; the length of the lists that kernels make for themselves.
        frame_tiles: query tiles n and n + frame_tiles are neighbours in time, whose lists have most in common: which tiles
            kernels may let share what they read. At least 1; results do not depend on it, but for rounding.
        partial: whether a KV tile may have fewer valid tokens than slots.
        scale: softmax scale.
        wants_lse: whether the log-sum-exp is computed; the backward needs it.
        q_tokens: int32 ``[R]``, the token in each row, -1 for none. With it q, the gate and the output are in raster order,
            ``[B, H, S, D]``, each token in one row, so that nobody brings them to tile order; without, as said above.
        kv_tokens: int32 ``[U * slots]``, the same for k and v. Kernels read them by these tables.
        token_major: whether the heads of a token lie side by side in the output's memory, as the projection after attention
            reads them, whatever q's memory format.

    Returns:
        Output as q, and log-sum-exp (natural) of the fine stage ``[B, H, R]`` in at least float32, or ``[B, H, 0]``.
        The output, unless it is ``token_major``, is contiguous, as each gradient of the backward; on CUDA they have the memory
        formats of their inputs.
    """
    sizes = (query_rows, first_rows, kv_first, kv_video, slots)
    high = torch.promote_types(q.dtype, torch.float32)
    tokens = q.shape[2]
    (q, gate), (k, v) = _in_rows(q_tokens, q, gate), _in_rows(kv_tokens, k, v)
    out, lse = gathered.forward(
        q, k, v, bits, counts, kv_counts, *sizes, scale, wants_lse, out_dtype=q.dtype if gate is None else high
    )
    if gate is not None and coarse is not None:
        video = out.narrow(2, first_rows, counts.shape[2] * query_rows).unflatten(2, (-1, query_rows))
        video.addcmul_(_video_rows(gate, first_rows, last_rows, query_rows).to(high), coarse[:, :, :, None].to(high))
        out = out.to(q.dtype)
    out = _in_raster(q_tokens, tokens, out)[0]
    return ops.by_tokens(out).copy_(out) if token_major else out, lse


def _in_rows(tokens: Tensor | None, *xs: Any) -> list[Any]:
    """Tensors as they are computed: brought to the order of a table where there is one."""
    return [x if tokens is None or x is None else rows_at(x, tokens) for x in xs]


def _in_raster(tokens: Tensor | None, length: int, *xs: Tensor) -> list[Tensor]:
    """Results in the order of their inputs."""
    if tokens is None:
        return list(xs)
    back = inverse(tokens, length)
    return [x.index_select(2, back) if x.numel() else x for x in xs]


def _video_rows(x: Tensor, first_rows: int, last_rows: int, query_rows: int) -> Tensor:
    """``[B, H, R, D]`` to the video rows ``[B, H, N, query_rows, D]``."""
    return x.narrow(2, first_rows, x.shape[2] - first_rows - last_rows).unflatten(2, (-1, query_rows))


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coarse: Tensor | None,
    gate: Tensor | None,
    bits: Tensor,
    counts: Tensor,
    kv_counts: Tensor,
    *sizes: Any,
) -> tuple[Tensor, Tensor]:
    """`tile_attention` by the Triton templates: on CUDA, and in Triton's interpreter."""
    from flexsparse.compile_passes.templates.forward import forward

    numbers, (q_tokens, kv_tokens, token_major) = sizes[:11], _optional(*sizes[11:])
    operands = (q, k, v, bits, counts, kv_counts.expand(q.shape[0], -1), coarse, gate)
    return forward(
        *operands,
        **_keywords(*numbers[:-1]),
        frame_tiles=numbers[7],
        q_tokens=q_tokens,
        kv_tokens=kv_tokens,
        token_major=token_major,
    )


def _optional(q_tokens: Any = None, kv_tokens: Any = None, token_major: bool = False) -> tuple[Any, Any, bool]:
    """The op's last arguments, which may be left out."""
    return q_tokens, kv_tokens, token_major


def _keywords(
    query_rows: int,
    first_rows: int,
    last_rows: int,
    kv_first: int,
    kv_video: int,
    slots: int,
    capacity: int,
    frame_tiles: int,
    partial: bool,
    scale: float,
) -> dict[str, Any]:
    """The op's sizes as all templates name them; they find the last extra rows themselves."""
    return {
        "query_rows": query_rows,
        "first_rows": first_rows,
        "kv_first": kv_first,
        "kv_video": kv_video,
        "slots": slots,
        "capacity": capacity,
        "scale": scale,
        "partial": partial,
    }


tile_attention.register_kernel("cuda", run_forward)


def result_like(x: Tensor) -> Tensor:
    """What the kernels make in the shape of an input: the templates keep its memory format if they need not copy it."""
    return torch.empty_like(x) if ops.on_gpu(x) and x.stride(-1) == 1 else x.new_empty(x.shape)


@tile_attention.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    wants_lse, (q_tokens, _, token_major) = args[17], _optional(*args[18:])
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows = (q.shape[2] if q_tokens is None else q_tokens.shape[0]) if wants_lse or ops.on_gpu(q) else 0
    return ops.by_tokens(q) if token_major else result_like(q), q.new_empty((*q.shape[:2], rows), dtype=dtype)


@torch.library.custom_op("flexsparse::tile_attention_backward", mutates_args=(), device_types="cpu")
def tile_attention_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor,
    coarse: Tensor | None,
    gate: Tensor | None,
    bits: Tensor,
    counts: Tensor,
    kv_counts: Tensor,
    query_rows: int,
    first_rows: int,
    last_rows: int,
    kv_first: int,
    kv_video: int,
    slots: int,
    capacity: int,
    frame_tiles: int,
    partial: bool,
    scale: float,
    q_tokens: Tensor | None = None,
    kv_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `tile_attention` with respect to q, k, v, coarse and gate (of size 0 where there are none).

    ``out`` as `tile_attention` returned it, the gated coarse output included. Off CUDA only float32 without a gate reads it,
    and needs it not: None is allowed.
    """
    sizes = (query_rows, first_rows, kv_first, kv_video, slots)
    lengths = q.shape[2], k.shape[2]
    (grad, q, out, gate), (k, v) = _in_rows(q_tokens, grad, q, out, gate), _in_rows(kv_tokens, k, v)
    fine = out if gate is None else None  # with a gate, out is not the fine stage's alone
    dq, dk, dv = gathered.backward(grad, grad_lse, q, k, v, fine, lse, bits, counts, kv_counts, *sizes, scale)
    (dq,), (dk, dv) = _in_raster(q_tokens, lengths[0], dq), _in_raster(kv_tokens, lengths[1], dk, dv)
    if gate is None or coarse is None:
        return dq, dk, dv, q.new_empty(0), q.new_empty(0)
    g = _video_rows(grad, first_rows, last_rows, query_rows).to(lse.dtype)
    d_coarse = (g * _video_rows(gate, first_rows, last_rows, query_rows)).sum(3)
    d_gate = torch.zeros_like(gate, memory_format=torch.contiguous_format)
    _video_rows(d_gate, first_rows, last_rows, query_rows).copy_(g * coarse[:, :, :, None])
    return dq, dk, dv, d_coarse.to(coarse.dtype), _in_raster(q_tokens, lengths[0], d_gate)[0]


def run_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor,
    coarse: Tensor | None,
    gate: Tensor | None,
    bits: Tensor,
    counts: Tensor,
    kv_counts: Tensor,
    *sizes: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`tile_attention_backward` by the Triton templates: on CUDA, and in Triton's interpreter.

    Raises:
        ValueError: no output.
    """
    from flexsparse.compile_passes.templates.backward import backward

    if out is None:
        raise ValueError("out is None, and the templates' backward reads it: give what tile_attention returned")
    numbers, (q_tokens, kv_tokens) = sizes[:10], (*sizes[10:], None, None)[:2]
    operands = (grad, grad_lse, q, k, v, out, lse, bits, counts, kv_counts.expand(q.shape[0], -1), coarse, gate)
    keywords = _keywords(*numbers)
    dq, dk, dv, d_coarse, d_gate = backward(*operands, **keywords, q_tokens=q_tokens, kv_tokens=kv_tokens)
    none = q.new_empty(0)
    return dq, dk, dv, none if d_coarse is None else d_coarse, none.clone() if d_gate is None else d_gate


tile_attention_backward.register_kernel("cuda", run_backward)


@tile_attention_backward.register_fake
def _(grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, ...]:
    coarse, gate = args[2:4]
    d_coarse = q.new_empty(0) if coarse is None else coarse.new_empty(coarse.shape)
    d_gate = q.new_empty(0) if gate is None else result_like(gate)
    return result_like(q), result_like(k), result_like(v), d_coarse, d_gate


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, coarse, gate, bits, counts, kv_counts, *ctx.rest, _wants_lse, q_tokens, kv_tokens, _token_major = inputs
    out, lse = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, coarse, gate, bits, counts, kv_counts, q_tokens, kv_tokens)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    *saved, q_tokens, kv_tokens = ctx.saved_tensors
    q, *_, coarse, gate, _bits, _counts, _kv_counts = saved
    grad = torch.zeros_like(q) if grad is None else grad
    dq, dk, dv, d_coarse, d_gate = torch.ops.flexsparse.tile_attention_backward(
        grad, grad_lse, *saved, *ctx.rest, q_tokens, kv_tokens
    )
    return (dq, dk, dv, None if coarse is None else d_coarse, None if gate is None else d_gate, *(None,) * 17)


tile_attention.register_autograd(_backward, setup_context=_setup)
