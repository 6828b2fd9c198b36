"""Kernels of the fine stage's backward along the lists: delta and the gates' gradients, dq. Each result is written once.

Those along the columns are in `column_kernels`. All recompute the weights from the logits exactly as the forward makes
them, and the log-sum-exp.
Shape letters: B batch, H query heads, G KV heads, N query tiles, M KV video tiles, U all KV tiles, R query rows, D head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flexsparse.compile_passes.templates.attention_common import (
    NUMBERS,
    load_rows,
    nth_tile,
    query_tile,
    store_rows,
)


@triton.jit(do_not_specialize=NUMBERS)
def _delta(
    grad_out,
    grad_lse,
    q,
    k,
    v,
    out,
    lse,
    lists,
    counts,
    kv_counts,
    coarse,
    gate,
    lse_log2,
    delta,
    dcoarse,
    dgate,
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
    out_b,
    out_h,
    gate_b,
    gate_h,
    dgate_b,
    dgate_h,
    grad_out_ROW: tl.constexpr,
    q_ROW: tl.constexpr,
    k_ROW: tl.constexpr,
    v_ROW: tl.constexpr,
    out_ROW: tl.constexpr,
    gate_ROW: tl.constexpr,
    dgate_ROW: tl.constexpr,
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
    EXACT: tl.constexpr,
    LSE_GRADIENT: tl.constexpr,
):
    """Of one query tile: delta, the log-sum-exp as the other kernels take it, gradients of coarse output and gate."""
    PIECES: tl.constexpr = SLOTS // KEYS
    first = tl.program_id(0) * QUERY_ROWS
    b, h = tl.program_id(2), tl.program_id(1)
    bh = b.to(tl.int64) * H + h
    tile, video, tiles, listed, absent = query_tile(first, bh, lists, counts, N, M, first_rows, capacity, QUERY_ROWS)
    column = tl.arange(0, BLOCK_D)
    row = tl.arange(0, ROWS)
    slot = tl.arange(0, KEYS)
    grad_out_head = b * grad_out_b + h * grad_out_h
    if EXACT:
        q_head = b * q_b + h * q_h
        k_head = b * k_b + h // GROUP * k_h
        v_head = b * v_b + h // GROUP * v_h
        tokens = kv_counts + b.to(tl.int64) * U
    else:
        out_head = b * out_b + h * out_h
    if COARSE:
        coarse_row = tl.load(coarse + (bh * N + tile) * D + column, mask=video & (column < D), other=0.0)
        coarse_sum = tl.zeros([BLOCK_D], tl.float32)
    for piece in range(QUERY_ROWS // ROWS):
        start = first + piece * ROWS
        at = bh * R + start
        g_block = load_rows(grad_out, grad_out_head, start, None, ROWS, grad_out_ROW, ALIGN, D, BLOCK_D, False)
        natural = tl.load(lse + at + row)
        # where a row saw nothing, all its weights shall be 0: -inf would make NaN of its masked logits
        lse_block = tl.where(natural == float("-inf"), float("inf"), natural * 1.4426950408889634)
        tl.store(lse_log2 + at + row, lse_block)
        if EXACT:
            q_block = load_rows(q, q_head, start, None, ROWS, q_ROW, ALIGN, D, BLOCK_D, False)
            total = tl.zeros([ROWS], tl.float32)
            result = tl.zeros([ROWS], tl.float32)
            for step in tl.range(0, (U - absent) * PIECES):
                index = nth_tile(step // PIECES, tiles, kv_first, listed, absent, EXTRA)
                key = step % PIECES * KEYS
                valid = slot < SLOTS
                if PARTIAL:
                    valid = key + slot < tl.load(tokens + index)
                k_block = load_rows(k, k_head, index * SLOTS + key, valid, KEYS, k_ROW, ALIGN, D, BLOCK_D, PARTIAL)
                v_block = load_rows(v, v_head, index * SLOTS + key, valid, KEYS, v_ROW, ALIGN, D, BLOCK_D, PARTIAL)
                logits = tl.dot(q_block, tl.trans(k_block), input_precision="ieee") * scale_log2
                if PARTIAL:
                    logits = tl.where(valid[None, :], logits, float("-inf"))
                weights = tl.exp2(logits - lse_block[:, None])
                d_weights = tl.dot(g_block, tl.trans(v_block), input_precision="ieee")
                total += tl.sum(weights, 1)
                result += tl.sum(weights * d_weights, 1)
            result /= tl.where(total == 0.0, 1.0, total)  # 1 but for the log-sum-exp's rounding, which it divides away
        else:
            out_block = load_rows(out, out_head, start, None, ROWS, out_ROW, ALIGN, D, BLOCK_D, False)
            result = tl.sum(g_block.to(tl.float32) * out_block.to(tl.float32), 1)
        if LSE_GRADIENT:
            result -= tl.load(grad_lse + at + row)
        tl.store(delta + at + row, result)
        if COARSE:
            g_block = g_block.to(tl.float32)
            gate_head, dgate_head = b * gate_b + h * gate_h, b * dgate_b + h * dgate_h
            gates = load_rows(gate, gate_head, start, None, ROWS, gate_ROW, ALIGN, D, BLOCK_D, False)
            dgates = g_block * coarse_row[None, :]
            store_rows(dgate, dgate_head, start, dgates, ROWS, dgate_ROW, ALIGN, D, BLOCK_D)
            coarse_sum += tl.sum(gates.to(tl.float32) * g_block, 0)
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
    lists,
    counts,
    kv_counts,
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
):
    """dq of ROWS query rows of one head."""
    PIECES: tl.constexpr = SLOTS // KEYS
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
    q_block = load_rows(q, b * q_b + h * q_h, start, None, ROWS, q_ROW, ALIGN, D, BLOCK_D, False)
    grad_out_head = b * grad_out_b + h * grad_out_h
    g_block = load_rows(grad_out, grad_out_head, start, None, ROWS, grad_out_ROW, ALIGN, D, BLOCK_D, False)
    lse_block = tl.load(lse_log2 + bh * R + start + row)
    delta_block = tl.load(delta + bh * R + start + row)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for step in tl.range(0, (U - absent) * PIECES):
        index = nth_tile(step // PIECES, tiles, kv_first, listed, absent, EXTRA)
        key = step % PIECES * KEYS
        valid = slot < SLOTS
        if PARTIAL:
            valid = key + slot < tl.load(tokens + index)
        k_block = load_rows(k, k_head, index * SLOTS + key, valid, KEYS, k_ROW, ALIGN, D, BLOCK_D, PARTIAL)
        v_block = load_rows(v, v_head, index * SLOTS + key, valid, KEYS, v_ROW, ALIGN, D, BLOCK_D, PARTIAL)
        logits = tl.dot(q_block, tl.trans(k_block), input_precision="ieee") * scale_log2
        if PARTIAL:
            logits = tl.where(valid[None, :], logits, float("-inf"))
        weights = tl.exp2(logits - lse_block[:, None])
        d_weights = tl.dot(g_block, tl.trans(v_block), input_precision="ieee")
        d_logits = weights * (d_weights - delta_block[:, None])
        acc = tl.dot(d_logits.to(k_block.dtype), k_block, acc, input_precision="ieee")
    store_rows(dq, b * dq_b + h * dq_h, start, acc * scale, ROWS, dq_ROW, ALIGN, D, BLOCK_D)
