"""The fine stage: each query tile attends to the tiles of its list. One launch for the lists, one for all the rest.

Shape letters: B batch, H query heads, G KV heads, N query tiles, M KV video tiles, U all KV tiles, W = ceil(M / 32),
R query rows, D head dim.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.compile_passes.templates import tuned
from flexsparse.compile_passes.templates.attention_common import (
    Blocks,
    CappedBlocks,
    flags,
    nth_tile,
    query_tile,
    seen_slots,
)
from flexsparse.compile_passes.templates.attention_shapes import NUMBERS, Shape, compilation, raster_shapes, shapes
from flexsparse.compile_passes.templates.launch import LOG2E, Compilation, launch
from flexsparse.compile_passes.templates.lists import ascending
from flexsparse.compile_passes.templates.rows import (
    dense_rows,
    lengths,
    load_rows,
    new_rows,
    store_rows,
    strides,
    tokens_again,
    tokens_at,
)


@triton.jit(do_not_specialize=NUMBERS)
def _forward(
    q,
    k,
    v,
    lists,
    counts,
    kv_counts,
    coarse,
    gate,
    q_tokens,
    kv_tokens,
    out,
    lse,
    scale_log2,
    H,
    N,
    M,
    U,
    R,
    first_rows,
    kv_first,
    capacity,
    count_stride,
    q_b,
    q_h,
    k_b,
    k_h,
    v_b,
    v_h,
    gate_b,
    gate_h,
    out_b,
    out_h,
    q_ROW: tl.constexpr,
    k_ROW: tl.constexpr,
    v_ROW: tl.constexpr,
    gate_ROW: tl.constexpr,
    out_ROW: tl.constexpr,
    ALIGN: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    EXTRA: tl.constexpr,
    PARTIAL: tl.constexpr,
    COARSE: tl.constexpr,
):
    """Output and log-sum-exp of ROWS query rows of one head."""
    PIECES: tl.constexpr = SLOTS // KEYS
    BY_Q: tl.constexpr = q_tokens is not None
    BY_KV: tl.constexpr = kv_tokens is not None
    block = tl.program_id(0)
    if EXTRA:  # the last extra rows come first: they see every tile, so that they take longest
        block = (block + (first_rows + N * QUERY_ROWS) // ROWS) % tl.num_programs(0)
    b, h = tl.program_id(2), tl.program_id(1)
    bh = b.to(tl.int64) * H + h
    tile, video, tiles, listed, absent = query_tile(
        block * ROWS, bh, lists, counts, N, M, first_rows, capacity, QUERY_ROWS
    )
    k_head = b * k_b + h // GROUP * k_h
    v_head = b * v_b + h // GROUP * v_h
    tokens = kv_counts + b.to(tl.int64) * count_stride

    start = block * ROWS
    slot = tl.arange(0, KEYS)
    q_token = tokens_at(q_tokens, start, ROWS)
    q_block = load_rows(q, b * q_b + h * q_h, start, None, ROWS, q_ROW, ALIGN, D, BLOCK_D, False, q_token, BY_Q)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for step in tl.range(0, (U - absent) * PIECES):
        index = nth_tile(step // PIECES, tiles, kv_first, listed, absent, EXTRA)
        piece = step % PIECES * KEYS
        valid = slot < SLOTS
        if PARTIAL:
            valid = piece + slot < tl.load(tokens + index)
        token = tokens_at(kv_tokens, index * SLOTS + piece, KEYS)
        k_block = load_rows(
            k, k_head, index * SLOTS + piece, valid, KEYS, k_ROW, ALIGN, D, BLOCK_D, PARTIAL, token, BY_KV
        )
        v_block = load_rows(
            v, v_head, index * SLOTS + piece, valid, KEYS, v_ROW, ALIGN, D, BLOCK_D, PARTIAL, token, BY_KV
        )
        logits = tl.dot(q_block, tl.trans(k_block), input_precision="ieee") * scale_log2
        if PARTIAL:
            logits = tl.where(valid[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shift = new_top
        if PARTIAL:  # nothing seen yet: -inf minus -inf would be NaN
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(logits - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v_block.dtype), v_block, acc * decay[:, None], input_precision="ieee")
        top = new_top

    q_token = tokens_again(q_tokens, start, ROWS)
    blank = total == 0.0
    acc = acc / tl.where(blank, 1.0, total)[:, None]
    if COARSE and video:
        column = tl.arange(0, BLOCK_D)
        coarse_row = tl.load(coarse + (bh * N + tile) * D + column, mask=column < D, other=0.0)
        gate_head = b * gate_b + h * gate_h
        gates = load_rows(gate, gate_head, start, None, ROWS, gate_ROW, ALIGN, D, BLOCK_D, False, q_token, BY_Q)
        acc += gates.to(tl.float32) * coarse_row[None, :]
    store_rows(out, b * out_b + h * out_h, start, acc, ROWS, out_ROW, ALIGN, D, BLOCK_D, q_token, BY_Q)
    natural = (top + tl.log2(tl.where(blank, 1.0, total))) * 0.6931471805599453
    tl.store(lse + bh * R + start + tl.arange(0, ROWS), tl.where(blank, float("-inf"), natural))


def _choose(q: Tensor, query_rows: int, slots: int, scale: float, by_table: bool) -> tuned.Choice:
    """`tuned.chosen`, but for scales of which the Hopper kernels take none: plain Triton, unless it is forced."""
    arch = tuned.arch_of(q)
    choice = tuned.chosen(arch, q.dtype, q.shape[3], query_rows, slots, by_table=by_table)
    if choice.kernel != "triton":
        if arch != "sm_90a":
            raise ValueError(
                f"a Hopper kernel of forward is forced on {arch or 'a CPU tensor'}: it needs a GPU of sm_90a"
            )
        if scale <= 0 and not tuned.forced("forward", (q.dtype, q.shape[3], query_rows, slots)):
            return tuned.candidates(None, q.dtype, q.shape[3], query_rows, slots)[0]
    elif query_rows % choice.rows or slots % choice.keys:
        raise ValueError(
            f"blocks of {choice.rows} rows and {choice.keys} slots are forced on tiles of {query_rows} rows and {slots} "
            "slots, which they do not divide: force one of `tuned.candidates`"
        )
    return choice


def _blocks(size: Blocks, D: int, by_table: bool) -> Blocks:
    """The blocks as they are launched: by a table deeper, and with D=64 still three programs an SM."""
    deeper = size.deeper(by_table)
    if by_table and 16 < D <= 64 and size.rows == size.keys == 64:
        return CappedBlocks(**vars(deeper), registers=168)
    return deeper


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    frame_tiles: int = 1,
    q_tokens: Tensor | None = None,
    kv_tokens: Tensor | None = None,
    token_major: bool = False,
) -> tuple[Tensor, Tensor]:
    """Block-sparse attention over tiles, with the gated coarse output added to it.

    Args:
        q: ``[B, H, R, D]``: ``first_rows`` extra rows, ``N * query_rows`` video rows, the other extra rows. Like k, v and
            gate it is copied only where its last stride is not 1.
        k: ``[B, G, U * slots, D]``: ``kv_first`` extra tiles, ``kv_video`` video tiles, the other extra tiles.
        v: as k.
        bits: int32 ``[B, H, N, W]``, the video tiles that each query tile keeps.
        counts: int32 ``[B, H, N]``.
        kv_counts: int32 ``[B, U]``, valid tokens of each KV tile; copied only where its last stride is not 1.
        coarse: float32 ``[B, H, N, D]``, or None.
        gate: as q, or None like ``coarse``.
        query_rows: rows of a query tile, a power of two of 16 to 256.
        first_rows: extra rows before the video rows.
        kv_first: extra KV tiles before the video tiles.
        kv_video: M.
        slots: slots of a KV tile, a power of two of 16 to 256.
        capacity: most video tiles that a row keeps.
        scale: softmax scale.
        partial: False promises that every KV tile is full.
        frame_tiles: query tiles n and n + frame_tiles are neighbours in time; a kernel that reads for two tiles at once pairs
            these.
        q_tokens: int32 ``[R]``, the token in each query row, -1 for none: q, gate and the output are ``[B, H, S, D]`` in the
            order of tokens then, each of which is in one row; the log-sum-exp stays that of rows. None: they are rows.
        kv_tokens: int32 ``[U * slots]``, as that for k and v.
        token_major: the output's memory is that of a contiguous ``[B, R or S, H, D]``.

    Returns:
        Output, in q's memory format (`torch.empty_like`) unless it is ``token_major``, and the fine stage's log-sum-exp
        (natural), float32 ``[B, H, R]``.

    Raises:
        ValueError: a kernel is forced (`tuned.using`) that does not do the case.
    """
    B, H = q.shape[:2]
    R, keys = lengths(q, k, q_tokens, kv_tokens)
    kv_counts = dense_rows(kv_counts)
    choice = _choose(q, query_rows, slots, scale, by_table=q_tokens is not None or kv_tokens is not None)
    if choice.kernel != "triton":
        from flexsparse.compile_passes.templates import hopper_forward, hopper_pairs

        if choice.kernel == "hopper":
            run = hopper_forward.forward
        else:
            run = functools.partial(hopper_pairs.forward, frame_tiles=frame_tiles)
        return run(
            q,
            k,
            v,
            bits,
            counts,
            kv_counts,
            coarse,
            gate,
            size=choice.blocks,
            query_rows=query_rows,
            first_rows=first_rows,
            kv_first=kv_first,
            kv_video=kv_video,
            slots=slots,
            capacity=capacity,
            scale=scale,
            partial=partial,
            token_major=token_major,
        )
    N, U = counts.shape[2], keys // slots
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    gate = None if gate is None else dense_rows(gate)
    out = new_rows(q, token_major)
    lse = torch.empty((B, H, R), dtype=torch.float32, device=q.device)
    size = _blocks(choice.blocks, q.shape[3], kv_tokens is not None)
    launch(
        _forward,
        (R // size.rows, H, B),
        q,
        k,
        v,
        ascending(bits, counts, kv_video, capacity),
        counts.contiguous(),
        kv_counts,
        None if coarse is None else coarse.contiguous(),
        gate,
        q_tokens,
        kv_tokens,
        out,
        lse,
        scale * LOG2E,
        H,
        N,
        kv_video,
        U,
        R,
        first_rows,
        kv_first,
        capacity,
        kv_counts.stride(0),  # 0 where all samples share one row: a copy would be another launch
        GROUP=H // k.shape[1],
        COARSE=coarse is not None,
        **strides(q=q, k=k, v=v, gate=gate, out=out),
        **flags(q, k, bits, query_rows, kv_video, slots, partial, q_tokens, kv_tokens),
        **size.meta(),
    )
    return out, lse


def forward_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    counts: Tensor,
    kv_counts: Tensor,
    coarse: Tensor | None,
    gate: Tensor | None,
    *,
    scale: float,
    capacity: int,
    frame_tiles: int = 1,
    **geometry: Any,
) -> tuple[Tensor, Tensor]:
    """As `forward`: dense masked softmax in float32."""
    seen = seen_slots(bits, kv_counts, q.shape[2], **geometry)
    group = q.shape[1] // k.shape[1]
    used = seen.any(2).any(1)[:, None, :, None]  # what no row sees may be NaN
    keys, values = (x.float().where(used, 0).repeat_interleave(group, 1) for x in (k, v))
    logits = (q.float() @ keys.mT * scale).masked_fill(~seen, -math.inf)
    lse = logits.logsumexp(-1)
    out = torch.softmax(logits, -1).masked_fill(~seen.any(-1, keepdim=True), 0) @ values
    if coarse is not None and gate is not None:
        first, query_rows = geometry["first_rows"], geometry["query_rows"]
        rows = slice(first, first + counts.shape[2] * query_rows)
        out[:, :, rows] += gate[:, :, rows].float() * coarse.repeat_interleave(query_rows, 2)
    return out.to(q.dtype), lse


def compilations(long_tail: bool) -> list[Compilation]:
    """What to compile offline."""
    found: list[Compilation] = []
    # fp16 compiles as bf16 does, and the larger of two tiles or without partial tiles to less than what is left
    alike = (
        Shape(dtype=torch.float16),
        Shape(D=64, query_rows=128, slots=128),
        Shape(query_rows=128, slots=128, full=True),
    )
    for shape in (*shapes(long_tail), *raster_shapes(long_tail)):
        if shape in alike and not long_tail:
            continue
        size = tuned.default_blocks(shape.dtype, shape.D, shape.query_rows, shape.slots)
        size = _blocks(size, shape.D, bool(shape.raster))
        absent = {"coarse": None, "gate": None} if shape.full else {}
        found.append(compilation(_forward, shape, size, COARSE=not shape.full, **absent))
    return found
