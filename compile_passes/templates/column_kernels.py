"""Kernels of the fine stage's backward along the columns: dk with dv, and the sums of long columns' pieces.

What they walk is made in `columns`. Logits and weights are made exactly as the forward makes them.
Shape letters: B batch, H query heads, G KV heads, N query tiles, M KV video tiles, U all KV tiles, R query rows, D head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flexsparse.compile_passes.templates.attention_common import nth_tile
from flexsparse.compile_passes.templates.attention_shapes import NUMBERS
from flexsparse.compile_passes.templates.rows import load_rows, store_rows, tokens_again, tokens_at


@triton.jit(do_not_specialize=NUMBERS)
def _dkdv(
    grad_out,
    q,
    k,
    v,
    lse_log2,
    delta,
    offsets,
    columns,
    indices,
    pieces,
    kv_counts,
    q_tokens,
    kv_tokens,
    dk,
    dv,
    workspace,
    scale,
    scale_log2,
    N,
    M,
    U,
    R,
    first_tiles,
    kv_first,
    G,
    most,
    grad_out_b,
    grad_out_h,
    q_b,
    q_h,
    k_b,
    k_h,
    v_b,
    v_h,
    dk_b,
    dk_h,
    dv_b,
    dv_h,
    grad_out_ROW: tl.constexpr,
    q_ROW: tl.constexpr,
    k_ROW: tl.constexpr,
    v_ROW: tl.constexpr,
    dk_ROW: tl.constexpr,
    dv_ROW: tl.constexpr,
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
    SPLIT: tl.constexpr,
):
    """dk and dv of KEYS slots of one KV head, over the query heads that read it, in their order; or a piece of these sums."""
    STEPS: tl.constexpr = QUERY_ROWS // ROWS
    BY_Q: tl.constexpr = q_tokens is not None
    BY_KV: tl.constexpr = kv_tokens is not None
    b, g = tl.program_id(2), tl.program_id(1)
    bg = b.to(tl.int64) * G + g
    number = tl.program_id(0) // (SLOTS // KEYS)
    within = tl.program_id(0) % (SLOTS // KEYS) * KEYS
    piece = pieces + (bg * (U + most) + number) * 4
    u = tl.load(piece)
    if SPLIT and u < 0:  # fewer pieces than there is room for
        return
    begin, end = tl.load(piece + 1), tl.load(piece + 2)
    if SPLIT:  # where its sums go; worked out here, as one number costs fewer registers through the loop than its parts
        place = tl.where(tl.load(piece + 3) > 0, (bg * most + number).to(tl.int32) * SLOTS + within, -1)
    m = u - kv_first
    video = (m >= 0) & (m < M)
    slot = tl.arange(0, KEYS)
    row = tl.arange(0, ROWS)
    key = u * SLOTS + within
    valid = slot < SLOTS
    if PARTIAL:
        valid = within + slot < tl.load(kv_counts + b.to(tl.int64) * U + u)
    kv_token = tokens_at(kv_tokens, key, KEYS)
    k_block = load_rows(k, b * k_b + g * k_h, key, valid, KEYS, k_ROW, ALIGN, D, BLOCK_D, PARTIAL, kv_token, BY_KV)
    v_block = load_rows(v, b * v_b + g * v_h, key, valid, KEYS, v_ROW, ALIGN, D, BLOCK_D, PARTIAL, kv_token, BY_KV)
    dk_block = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv_block = tl.zeros([KEYS, BLOCK_D], tl.float32)
    for member in range(GROUP):
        bh = bg * GROUP + member
        q_head = b * q_b + (g * GROUP + member) * q_h
        grad_out_head = b * grad_out_b + (g * GROUP + member) * grad_out_h
        listed = tl.load(columns + bh * M + m, mask=video, other=0)
        absent = tl.where(video, N - listed, 0)
        tiles = indices + tl.load(offsets + bh * M + m, mask=video, other=0)
        first, last = begin, end
        if GROUP > 1:  # this head's share of the piece
            entries = R // QUERY_ROWS - absent
            first, last = tl.maximum(begin, 0), tl.minimum(end, entries)
            begin -= entries
            end -= entries
        for nth in tl.range(0, (last - first) * STEPS):  # a loop that starts elsewhere costs registers
            step = first * STEPS + nth
            index = nth_tile(step // STEPS, tiles, first_tiles, listed, absent, EXTRA)
            start = index * QUERY_ROWS + step % STEPS * ROWS
            token = tokens_at(q_tokens, start, ROWS)
            q_block = load_rows(q, q_head, start, None, ROWS, q_ROW, ALIGN, D, BLOCK_D, False, token, BY_Q)
            g_block = load_rows(
                grad_out, grad_out_head, start, None, ROWS, grad_out_ROW, ALIGN, D, BLOCK_D, False, token, BY_Q
            )
            lse_block = tl.load(lse_log2 + bh * R + start + row)
            logits = tl.dot(k_block, tl.trans(q_block), input_precision="ieee") * scale_log2  # [KEYS, ROWS]
            weights = tl.exp2(logits - lse_block[None, :])
            dv_block = tl.dot(weights.to(g_block.dtype), g_block, dv_block, input_precision="ieee")
            d_weights = tl.dot(v_block, tl.trans(g_block), input_precision="ieee")
            delta_block = tl.load(delta + bh * R + start + row)
            d_logits = weights * (d_weights - delta_block[None, :])
            dk_block = tl.dot(d_logits.to(q_block.dtype), q_block, dk_block, input_precision="ieee")
    if PARTIAL:  # slots past the count made results of their own, which go nowhere else
        dk_block = tl.where(valid[:, None], dk_block, 0.0)
        dv_block = tl.where(valid[:, None], dv_block, 0.0)
    if SPLIT and place >= 0:
        at = place.to(tl.int64)
        store_rows(workspace, 0, at, dk_block, KEYS, D, 8, D, BLOCK_D)
        at += tl.num_programs(2).to(tl.int64) * G * most * SLOTS
        store_rows(workspace, 0, at, dv_block, KEYS, D, 8, D, BLOCK_D)
        return
    kv_token = tokens_again(kv_tokens, key, KEYS)
    store_rows(dk, b * dk_b + g * dk_h, key, dk_block * scale, KEYS, dk_ROW, ALIGN, D, BLOCK_D, kv_token, BY_KV)
    store_rows(dv, b * dv_b + g * dv_h, key, dv_block, KEYS, dv_ROW, ALIGN, D, BLOCK_D, kv_token, BY_KV)


@triton.jit(do_not_specialize=NUMBERS)
def _add_pieces(
    pieces,
    workspace,
    kv_tokens,
    dk,
    dv,
    scale,
    U,
    G,
    most,
    dk_b,
    dk_h,
    dv_b,
    dv_h,
    dk_ROW: tl.constexpr,
    dv_ROW: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLOTS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """dk and dv of KEYS slots of a split column: its pieces' sums, added in their order."""
    BY_KV: tl.constexpr = kv_tokens is not None
    b, g = tl.program_id(2), tl.program_id(1)
    bg = b.to(tl.int64) * G + g
    number = tl.program_id(0) // (SLOTS // KEYS)
    within = tl.program_id(0) % (SLOTS // KEYS) * KEYS
    piece = pieces + (bg * (U + most) + number) * 4
    u, parts = tl.load(piece), tl.load(piece + 3)
    if (parts == 0) | (tl.load(piece + 1) > 0):  # a whole column, no column, or not the first piece of one
        return
    other = tl.num_programs(2).to(tl.int64) * G * most * SLOTS
    dk_block = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv_block = tl.zeros([KEYS, BLOCK_D], tl.float32)
    for part in range(parts):
        at = (bg * most + number + part) * SLOTS + within
        dk_block += load_rows(workspace, 0, at, None, KEYS, D, 8, D, BLOCK_D, False)
        dv_block += load_rows(workspace, 0, at + other, None, KEYS, D, 8, D, BLOCK_D, False)
    key = u * SLOTS + within
    kv_token = tokens_at(kv_tokens, key, KEYS)
    store_rows(dk, b * dk_b + g * dk_h, key, dk_block * scale, KEYS, dk_ROW, ALIGN, D, BLOCK_D, kv_token, BY_KV)
    store_rows(dv, b * dv_b + g * dv_h, key, dv_block, KEYS, dv_ROW, ALIGN, D, BLOCK_D, kv_token, BY_KV)
