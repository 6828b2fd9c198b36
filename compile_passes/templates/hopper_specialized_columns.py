"""The fine stage's dk, dv kernel for Hopper with warps that only copy, in Gluon; `hopper_specialized` launches it.

It computes what `hopper_backward_columns` computes, in the same order, so that the bits are the same. There the warps that
multiply also walk the lists, start copies and move log-sum-exp and delta through shared memory, with barriers of all
warps between. Here one more warp (the producer) walks and copies, all four, into a ring of buffers; those that multiply (the
consumer) wait for a buffer to be filled and say when it is drained.

Why it cannot hang: producer and consumer take the same number of steps in the same order, each step one buffer; the producer
waits for what the consumer drained STAGES steps before, the consumer for nothing that lies behind its own step.

Shape letters: B batch, H query heads, G KV heads, N query tiles, M KV video tiles, U all KV tiles, R query rows,
D head dim.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flexsparse.compile_passes.templates.hopper_backward_rows import _matrix
from flexsparse.compile_passes.templates.hopper_kernels import _nth_tile
from flexsparse.compile_passes.templates.hopper_tma import copy_in, copy_out


@gluon.jit
def _copy_with_line(rows, line, b, h, row, barrier, buffer, line_buffer):
    """Start to copy rows of one head of a ``[B, H, R, D]`` array, and of a ``[B, H, R]`` array."""
    mbarrier.expect(barrier, rows.block_type.nbytes + line.block_type.nbytes)
    copy_in(rows, [b, h, row, 0], barrier, buffer)
    copy_in(line, [b, h, row], barrier, line_buffer)


@gluon.jit
def _produce(
    queries,
    grads,
    keys,
    values,
    shifts,
    means,
    k_box,
    v_box,
    ready,
    q_ring,
    g_ring,
    shift_ring,
    mean_ring,
    q_filled,
    g_filled,
    drained,
    offsets,
    columns,
    indices,
    b,
    g,
    bg,
    u,
    slot,
    m,
    video,
    begin,
    end,
    N,
    M,
    R,
    first_tiles,
    GROUP: gl.constexpr,
    QUERY_ROWS: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    EXTRA: gl.constexpr,
):
    """Copy the column's keys and values, then what its steps read: rows of the tiles that see it, head after head."""
    PIECES: gl.constexpr = QUERY_ROWS // ROWS
    mbarrier.expect(ready, keys.block_type.nbytes + values.block_type.nbytes)
    copy_in(keys, [b, g, u, slot, 0], ready, k_box)
    copy_in(values, [b, g, u, slot, 0], ready, v_box)
    place = 0
    for member in range(GROUP):
        h = g * GROUP + member
        bh = bg * GROUP + member
        listed = gl.load(columns + bh * M + m, mask=video, other=0)
        absent = gl.where(video, N - listed, 0)
        tiles = indices + gl.load(offsets + bh * M + m, mask=video, other=0)
        first, last = begin, end
        if GROUP > 1:  # this head's share of the piece
            entries = R // QUERY_ROWS - absent
            first, last = gl.maximum(begin, 0), gl.minimum(end, entries)
            begin -= entries
            end -= entries
        for j in range((last - first) * PIECES):
            tile = _nth_tile(first + j // PIECES, tiles, first_tiles, listed, absent, last, EXTRA)
            row = tile * QUERY_ROWS + j % PIECES * ROWS
            at = place % STAGES
            # the first round finds every buffer drained
            mbarrier.wait(drained.index(at), (place // STAGES + 1) % 2)
            _copy_with_line(queries, shifts, b, h, row, q_filled.index(at), q_ring.index(at), shift_ring.index(at))
            _copy_with_line(grads, means, b, h, row, g_filled.index(at), g_ring.index(at), mean_ring.index(at))
            place += 1


@gluon.jit
def _consume(
    d_keys,
    d_values,
    k_box,
    v_box,
    ready,
    order,
    q_ring,
    g_ring,
    shift_ring,
    mean_ring,
    q_filled,
    g_filled,
    drained,
    workspace,
    scale,
    scale_log2,
    b,
    g,
    bg,
    u,
    slot,
    number,
    valid,
    steps,
    parts,
    G,
    most,
    D: gl.constexpr,
    SLOTS: gl.constexpr,
    ROWS: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    PARTIAL: gl.constexpr,
    SPLIT: gl.constexpr,
):
    """dk and dv of the column over so many steps."""
    DTYPE: gl.constexpr = d_keys.dtype
    WARPS: gl.constexpr = [gl.num_warps(), 1]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=WARPS, instr_shape=[16, ROWS, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=WARPS, instr_shape=[16, D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUTPUT, k_width=2)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, LOGITS)
    zeros = gl.zeros([KEYS, ROWS], gl.float32, LOGITS)
    dk = gl.zeros([KEYS, D], gl.float32, OUTPUT)
    dv = gl.zeros([KEYS, D], gl.float32, OUTPUT)
    mbarrier.wait(ready, 0)
    for j in range(steps):
        at = j % STAGES
        parity = j // STAGES % 2
        q_buffer = _matrix(q_ring.index(at))
        g_buffer = _matrix(g_ring.index(at))
        mbarrier.wait(q_filled.index(at), parity)
        product = warpgroup_mma(_matrix(k_box), q_buffer.permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(g_filled.index(at), parity)
        d_product = warpgroup_mma(_matrix(v_box), g_buffer.permute((1, 0)), zeros, use_acc=False, is_async=True)
        shift = shift_ring.index(at).reshape([ROWS]).load(COLUMNS)
        logits = warpgroup_mma_wait(1, deps=[product])
        weights = gl.exp2(logits * scale_log2 - shift[None, :])
        mbarrier.wait(order, 1)  # over at once: ptxas keeps the weights on this side of it
        mean = mean_ring.index(at).reshape([ROWS]).load(COLUMNS)
        d_weights = warpgroup_mma_wait(0, deps=[d_product])
        d_logits = weights * (d_weights - mean[None, :])
        operand = gl.convert_layout(weights.to(DTYPE), OPERAND)
        dv_update = warpgroup_mma(operand, g_buffer, dv, is_async=True)
        d_operand = gl.convert_layout(d_logits.to(DTYPE), OPERAND)
        dk_update = warpgroup_mma(d_operand, q_buffer, dk, is_async=True)
        dv, dk = warpgroup_mma_wait(0, deps=[dv_update, dk_update])
        mbarrier.arrive(drained.index(at), count=1)

    if PARTIAL:
        kept = gl.arange(0, KEYS, gl.SliceLayout(1, OUTPUT)) < valid
        dk = gl.where(kept[:, None], dk, 0.0)
        dv = gl.where(kept[:, None], dv, 0.0)
    if SPLIT and parts > 0:
        rows = gl.arange(0, KEYS, gl.SliceLayout(1, OUTPUT)) * D
        place = ((bg * most + number) * SLOTS + slot).to(gl.int64) * D
        at = workspace + place + (rows[:, None] + gl.arange(0, D, gl.SliceLayout(0, OUTPUT))[None, :])
        gl.store(at, dk)
        gl.store(at + gl.num_programs(2).to(gl.int64) * G * most * (SLOTS * D), dv)
    else:
        _matrix(k_box).store((dk * scale).to(DTYPE))
        _matrix(v_box).store(dv.to(DTYPE))
        fence_async_shared()
        copy_out(d_keys, [b, g, u, slot, 0], k_box)
        copy_out(d_values, [b, g, u, slot, 0], v_box)
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["N", "M", "U", "R", "first_tiles", "kv_first", "G", "most"])
def hopper_specialized_dkdv(
    queries,
    grads,
    keys,
    values,
    d_keys,
    d_values,
    shifts,
    means,
    offsets,
    columns,
    indices,
    pieces,
    kv_counts,
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
    GROUP: gl.constexpr,
    D: gl.constexpr,
    QUERY_ROWS: gl.constexpr,
    SLOTS: gl.constexpr,
    ROWS: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    EXTRA: gl.constexpr,
    PARTIAL: gl.constexpr,
    SPLIT: gl.constexpr,
):
    """As `hopper_dkdv`; ``shifts`` and ``means`` are boxes of log-sum-exp and delta, ``[B, H, R]``.

    STAGES: buffers of the ring. PRODUCER_REGISTERS: of a thread that only copies; the others have what is left of a program's.
    """
    DTYPE: gl.constexpr = queries.dtype
    PIECES: gl.constexpr = QUERY_ROWS // ROWS
    g, b = gl.program_id(1), gl.program_id(2)
    bg = b * G + g  # of rows, tiles and pieces there are less than 2^31, or their values would not fit a GPU
    number = gl.program_id(0) // (SLOTS // KEYS)
    slot = gl.program_id(0) % (SLOTS // KEYS) * KEYS
    piece = pieces + (bg * (U + most) + number) * 4
    u = gl.load(piece)
    if SPLIT and u < 0:  # fewer pieces than there is room for
        return
    begin, end = gl.load(piece + 1), gl.load(piece + 2)
    parts = 0
    if SPLIT:
        parts = gl.load(piece + 3)
    m = u - kv_first
    video = (m >= 0) & (m < M)
    valid = KEYS  # of the block's slots
    if PARTIAL:
        valid = gl.load(kv_counts + b * U + u) - slot
        if valid <= 0:  # nothing to do, as in a tile of padded text
            end = begin

    k_box = gl.allocate_shared_memory(DTYPE, [1, 1, 1, KEYS, D], keys.layout)
    v_box = gl.allocate_shared_memory(DTYPE, [1, 1, 1, KEYS, D], values.layout)
    q_ring = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, ROWS, D], queries.layout)
    g_ring = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, ROWS, D], grads.layout)
    shift_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 1, ROWS], shifts.layout)
    mean_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 1, ROWS], means.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout()).index(0)
    order = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout()).index(0)  # nothing arrives at it
    q_filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    g_filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    drained = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    mbarrier.init(order, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_filled.index(i), count=1)
        mbarrier.init(g_filled.index(i), count=1)
        mbarrier.init(drained.index(i), count=1)
    fence_async_shared()
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (
                d_keys, d_values, k_box, v_box, ready, order,
                q_ring, g_ring, shift_ring, mean_ring, q_filled, g_filled, drained,
                workspace, scale, scale_log2, b, g, bg, u, slot, number, valid, (end - begin) * PIECES, parts, G, most,
                D, SLOTS, ROWS, KEYS, STAGES, PARTIAL, SPLIT,
            )),
            (_produce, (
                queries, grads, keys, values, shifts, means, k_box, v_box, ready,
                q_ring, g_ring, shift_ring, mean_ring, q_filled, g_filled, drained,
                offsets, columns, indices, b, g, bg, u, slot, m, video, begin, end, N, M, R, first_tiles,
                GROUP, QUERY_ROWS, ROWS, STAGES, EXTRA,
            )),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )
    # fmt: on
