"""Kernels of the fine stage's backward along the lists: delta and the gates' gradients, dq. Each result is written once.

Delta is ``sum(weights * d_weights)`` of a row, less the gradient of its log-sum-exp. It equals ``sum(grad * out)`` but for
what rounding took from out. `_delta` starts from that, and `_dq` finds on its walk what is missing: what
``weights * (d_weights - delta)`` sums to, which is to be nothing (or that gradient).

Those along the columns are in `column_kernels`. All recompute the weights from the logits exactly as the forward makes
them, and the log-sum-exp.
Shape letters: B batch, H query heads, G KV heads, N query tiles, M KV video tiles, U all KV tiles, R query rows, D head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flexsparse.compile_passes.templates.attention_common import nth_tile, query_tile
from flexsparse.compile_passes.templates.attention_shapes import NUMBERS
from flexsparse.compile_passes.templates.rows import load_rows, store_rows, tokens_again, tokens_at


@triton.jit(do_not_specialize=NUMBERS)
def _delta(
    grad_out,
    grad_lse,
    out,
    lse,
    coarse,
    gate,
    q_tokens,
    lse_log2,
    estimate,
    dcoarse,
    dgate,
    H,
    N,
    R,
    first_rows,
    grad_out_b,
    grad_out_h,
    out_b,
    out_h,
    gate_b,
    gate_h,
    dgate_b,
    dgate_h,
    grad_out_ROW: tl.constexpr,
    out_ROW: tl.constexpr,
    gate_ROW: tl.constexpr,
    dgate_ROW: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    COARSE: tl.constexpr,
    LSE_GRADIENT: tl.constexpr,
):
    """Of one query tile: delta as the output tells it, log-sum-exp as other kernels take it, gradients of coarse and gate."""
    BY_Q: tl.constexpr = q_tokens is not None
    first = tl.program_id(0) * QUERY_ROWS
    b, h = tl.program_id(2), tl.program_id(1)
    bh = b.to(tl.int64) * H + h
    tile = (first - first_rows) // QUERY_ROWS
    video = (first >= first_rows) & (tile < N)
    column = tl.arange(0, BLOCK_D)
    row = tl.arange(0, ROWS)
    if COARSE:
        coarse_row = tl.load(coarse + (bh * N + tile) * D + column, mask=video & (column < D), other=0.0)
        coarse_sum = tl.zeros([BLOCK_D], tl.float32)
    for piece in range(QUERY_ROWS // ROWS):
        start = first + piece * ROWS
        at = bh * R + start
        token = tokens_at(q_tokens, start, ROWS)
        grad_out_head = b * grad_out_b + h * grad_out_h
        g_block = load_rows(
            grad_out, grad_out_head, start, None, ROWS, grad_out_ROW, ALIGN, D, BLOCK_D, False, token, BY_Q
        ).to(tl.float32)
        fine = load_rows(out, b * out_b + h * out_h, start, None, ROWS, out_ROW, ALIGN, D, BLOCK_D, False, token, BY_Q)
        fine = fine.to(tl.float32)
        natural = tl.load(lse + at + row)
        # where a row saw nothing, all its weights shall be 0: -inf would make NaN of its masked logits
        lse_block = tl.where(natural == float("-inf"), float("inf"), natural * 1.4426950408889634)
        tl.store(lse_log2 + at + row, lse_block)
        if COARSE:
            gate_head, dgate_head = b * gate_b + h * gate_h, b * dgate_b + h * dgate_h
            gates = load_rows(gate, gate_head, start, None, ROWS, gate_ROW, ALIGN, D, BLOCK_D, False, token, BY_Q)
            gates = gates.to(tl.float32)
            fine = tl.where(video, fine - gates * coarse_row[None, :], fine)
            dgates = g_block * coarse_row[None, :]
            store_rows(dgate, dgate_head, start, dgates, ROWS, dgate_ROW, ALIGN, D, BLOCK_D, token, BY_Q)
            coarse_sum += tl.sum(gates * g_block, 0)
        result = tl.sum(g_block * fine, 1)
        if LSE_GRADIENT:
            result -= tl.load(grad_lse + at + row)
        tl.store(estimate + at + row, result)
    if COARSE:
        tl.store(dcoarse + (bh * N + tile) * D + column, coarse_sum, mask=video & (column < D))


@triton.jit(do_not_specialize=NUMBERS)
def _dq(
    grad_out,
    q,
    k,
    v,
    lse_log2,
    delta,
    estimate,
    grad_lse,
    lists,
    counts,
    kv_counts,
    q_tokens,
    kv_tokens,
    dq,
    scale,
    scale_log2,
    H,
    N,
    M,
    U,
    R,
    first_rows,
    kv_first,
    capacity,
    grad_out_b,
    grad_out_h,
    q_b,
    q_h,
    k_b,
    k_h,
    v_b,
    v_h,
    dq_b,
    dq_h,
    grad_out_ROW: tl.constexpr,
    q_ROW: tl.constexpr,
    k_ROW: tl.constexpr,
    v_ROW: tl.constexpr,
    dq_ROW: tl.constexpr,
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
    CORRECT: tl.constexpr,
    LSE_GRADIENT: tl.constexpr,
):
    """dq of ROWS query rows of one head; CORRECT: also their delta, of which the estimate is taken to be a bit off."""
    PIECES: tl.constexpr = SLOTS // KEYS
    BY_Q: tl.constexpr = q_tokens is not None
    BY_KV: tl.constexpr = kv_tokens is not None
    block = tl.program_id(0)
    if EXTRA:  # as in the forward: the longest first
        block = (block + (first_rows + N * QUERY_ROWS) // ROWS) % tl.num_programs(0)
    b, h = tl.program_id(2), tl.program_id(1)
    bh = b.to(tl.int64) * H + h
    _, _, tiles, listed, absent = query_tile(block * ROWS, bh, lists, counts, N, M, first_rows, capacity, QUERY_ROWS)
    k_head = b * k_b + h // GROUP * k_h
    v_head = b * v_b + h // GROUP * v_h
    tokens = kv_counts + b.to(tl.int64) * U

    start = block * ROWS
    row = tl.arange(0, ROWS)
    slot = tl.arange(0, KEYS)
    q_token = tokens_at(q_tokens, start, ROWS)
    q_block = load_rows(q, b * q_b + h * q_h, start, None, ROWS, q_ROW, ALIGN, D, BLOCK_D, False, q_token, BY_Q)
    grad_out_head = b * grad_out_b + h * grad_out_h
    g_block = load_rows(
        grad_out, grad_out_head, start, None, ROWS, grad_out_ROW, ALIGN, D, BLOCK_D, False, q_token, BY_Q
    )
    lse_block = tl.load(lse_log2 + bh * R + start + row)
    delta_block = tl.load(estimate + bh * R + start + row)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if CORRECT:
        mean_key = tl.zeros([ROWS, BLOCK_D], tl.float32)
        missing = tl.zeros([ROWS], tl.float32)
    for step in tl.range(0, (U - absent) * PIECES):
        index = nth_tile(step // PIECES, tiles, kv_first, listed, absent, EXTRA)
        key = step % PIECES * KEYS
        valid = slot < SLOTS
        if PARTIAL:
            valid = key + slot < tl.load(tokens + index)
        token = tokens_at(kv_tokens, index * SLOTS + key, KEYS)
        k_block = load_rows(
            k, k_head, index * SLOTS + key, valid, KEYS, k_ROW, ALIGN, D, BLOCK_D, PARTIAL, token, BY_KV
        )
        v_block = load_rows(
            v, v_head, index * SLOTS + key, valid, KEYS, v_ROW, ALIGN, D, BLOCK_D, PARTIAL, token, BY_KV
        )
        logits = tl.dot(q_block, tl.trans(k_block), input_precision="ieee") * scale_log2
        if PARTIAL:
            logits = tl.where(valid[None, :], logits, float("-inf"))
        weights = tl.exp2(logits - lse_block[:, None])
        d_weights = tl.dot(g_block, tl.trans(v_block), input_precision="ieee")
        d_logits = weights * (d_weights - delta_block[:, None])
        acc = tl.dot(d_logits.to(k_block.dtype), k_block, acc, input_precision="ieee")
        if CORRECT:
            mean_key = tl.dot(weights.to(k_block.dtype), k_block, mean_key, input_precision="ieee")
            missing += tl.sum(d_logits, 1)
    if CORRECT:
        if LSE_GRADIENT:
            missing -= tl.load(grad_lse + bh * R + start + row)
        tl.store(delta + bh * R + start + row, delta_block + missing)
        acc -= missing[:, None] * mean_key
    q_token = tokens_again(q_tokens, start, ROWS)
    store_rows(dq, b * dq_b + h * dq_h, start, acc * scale, ROWS, dq_ROW, ALIGN, D, BLOCK_D, q_token, BY_Q)
