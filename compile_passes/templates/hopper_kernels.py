"""The fine stage's forward kernel for Hopper, in Gluon; `hopper_forward` launches it.

A program computes one block of query rows; its warps do everything, none only copies. The tensor cores multiply
queries and keys of a step while the output is rescaled for the weights of the step before, and take those while the
weights of the step are made. The copy engine (TMA) brings keys half a step ahead or more, values one step.

Where a tile is partial its box starts before the tile, so that its valid slots are the last of the buffer and zeros
come first: what the array holds past a tile's count is never read.

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

from flexsparse.compile_passes.templates.hopper_tma import copy_in, copy_out

MINUS_INFINITY = gl.constexpr(float("-inf"))


@gluon.jit
def _nth_tile(i, tiles, first, listed, absent, end, EXTRA: gl.constexpr):
    """As `attention_common.nth_tile`; any number from ``end`` on."""
    if EXTRA:
        inside = (i >= first) & (i < first + listed)
        index = gl.load(tiles + i - first, mask=inside, other=0)
        return gl.where(inside, first + index, gl.where(i < first, i, i + absent))
    return gl.load(tiles + i, mask=i < end, other=0)


@gluon.jit
def _copy(array, b, g, tile, slot, barrier, buffer):
    """Start to copy slots of one tile of a ``[B, G, U, slots, D]`` array; those outside of the tile arrive as zeros."""
    mbarrier.expect(barrier, array.block_type.nbytes)
    copy_in(array, [b, g, tile, slot, 0], barrier, buffer)


@gluon.jit
def _multiply_keys(queries, keys, zeros):
    """Start ``queries @ keys.T``: ``[ROWS, KEYS]``."""
    transposed = keys.reshape([keys.shape[3], keys.shape[4]]).permute((1, 0))
    return warpgroup_mma(queries, transposed, zeros, use_acc=False, is_async=True)


@gluon.jit
def _multiply_values(weights, values, acc):
    """Start ``acc + weights @ values``: ``[ROWS, D]``."""
    return warpgroup_mma(weights, values.reshape([values.shape[3], values.shape[4]]), acc, is_async=True)


@gluon.jit
def _weigh(logits, top, empty, scale_log2, PARTIAL: gl.constexpr):
    """Weights ``exp2(logits * scale_log2 - top)`` of ``[ROWS, KEYS]`` logits, of which the first ``empty`` columns are none.

    Returns the weights, the new top, and the factor that older weights take.
    """
    layout: gl.constexpr = logits.type.layout
    if PARTIAL and empty > 0:
        # by eights of columns: a thread has the same of each, so that their numbers are constants, not registers
        eights = logits.reshape([logits.shape[0], logits.shape[1] // 8, 8])
        split: gl.constexpr = eights.type.layout
        eighth = gl.arange(0, logits.shape[1] // 8, gl.SliceLayout(0, gl.SliceLayout(2, split)))
        column = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, split)))
        valid = (eighth * 8)[None, :, None] >= (empty - column)[None, None, :]
        logits = gl.convert_layout(gl.where(valid, eights, MINUS_INFINITY).reshape(logits.shape), layout)
    new_top = gl.maximum(top, gl.max(logits, 1) * scale_log2)
    shift = new_top
    if PARTIAL:  # nothing seen yet: -inf minus -inf would be NaN
        shift = gl.where(new_top == MINUS_INFINITY, 0.0, new_top)
    weights = gl.exp2(logits * scale_log2 - shift[:, None])
    return weights, new_top, gl.exp2(top - shift)


@gluon.jit(do_not_specialize=["H", "N", "M", "U", "R", "first_rows", "kv_first", "capacity", "count_stride"])
def hopper_forward(
    queries,
    keys,
    values,
    gates,
    outs,
    lists,
    counts,
    kv_counts,
    coarse,
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
    GROUP: gl.constexpr,
    D: gl.constexpr,
    QUERY_ROWS: gl.constexpr,
    SLOTS: gl.constexpr,
    ROWS: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    EXTRA: gl.constexpr,
    PARTIAL: gl.constexpr,
    COARSE: gl.constexpr,
):
    """Output and log-sum-exp of ROWS query rows of one head; a step takes KEYS slots of a tile. STAGES: buffers of keys."""
    DTYPE: gl.constexpr = queries.dtype
    PIECES: gl.constexpr = SLOTS // KEYS
    WARPS: gl.constexpr = [gl.num_warps(), 1]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=WARPS, instr_shape=[16, KEYS, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=WARPS, instr_shape=[16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUTPUT, k_width=2)
    LOGIT_ROWS: gl.constexpr = gl.SliceLayout(1, LOGITS)
    OUTPUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUTPUT)

    block = gl.program_id(0)
    if EXTRA:  # the last extra rows come first: they see every tile, so that they take longest
        block = (block + (first_rows + N * QUERY_ROWS) // ROWS) % gl.num_programs(0)
    h, b = gl.program_id(1), gl.program_id(2)
    g = h // GROUP
    bh = b.to(gl.int64) * H + h
    row = block * ROWS
    tile = (row - first_rows) // QUERY_ROWS
    video = (row >= first_rows) & (tile < N)
    at = bh * N + tile
    listed = gl.load(counts + at, mask=video, other=0)
    absent = gl.where(video, M - listed, 0)
    end = U - absent
    steps = end * PIECES
    tiles = lists + at * capacity
    tokens = kv_counts + b.to(gl.int64) * count_stride

    q_box = gl.allocate_shared_memory(DTYPE, [1, 1, ROWS, D], queries.layout)
    q_buffer = q_box.reshape([ROWS, D])
    k_buffers = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, 1, KEYS, D], keys.layout)
    v_buffers = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 1, KEYS, D], values.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout()).index(0)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(v_ready.index(i), count=1)
    fence_async_shared()

    mbarrier.expect(q_ready, queries.block_type.nbytes)
    copy_in(queries, [b, h, row, 0], q_ready, q_box)
    # the tiles of this step and the next two, and how many valid tokens those of this and the next have; a row without
    # tiles takes a step on any tile, and its result is dropped
    now = _nth_tile(0, tiles, kv_first, listed, absent, end, EXTRA)
    soon = _nth_tile(1 // PIECES, tiles, kv_first, listed, absent, end, EXTRA)
    later = _nth_tile(2 // PIECES, tiles, kv_first, listed, absent, end, EXTRA)
    shift_now = 0
    shift_soon = 1 % PIECES * KEYS
    if PARTIAL:
        shift_now += gl.load(tokens + now, mask=steps > 0, other=0) - SLOTS
        shift_soon += gl.load(tokens + soon, mask=steps > 1, other=0) - SLOTS
    _copy(keys, b, g, now, shift_now, k_ready.index(0), k_buffers.index(0))
    _copy(values, b, g, now, shift_now, v_ready.index(0), v_buffers.index(0))
    if STAGES == 2 and steps > 1:
        _copy(keys, b, g, soon, shift_soon, k_ready.index(1), k_buffers.index(1))

    zeros = gl.zeros([ROWS, KEYS], gl.float32, LOGITS)
    acc = gl.zeros([ROWS, D], gl.float32, OUTPUT)
    top = gl.full([ROWS], MINUS_INFINITY, gl.float32, LOGIT_ROWS)
    mbarrier.wait(q_ready, 0)
    mbarrier.wait(k_ready.index(0), 0)
    product = _multiply_keys(q_buffer, k_buffers.index(0), zeros)
    logits = warpgroup_mma_wait(0, deps=[product])
    if STAGES == 1 and steps > 1:
        _copy(keys, b, g, soon, shift_soon, k_ready.index(0), k_buffers.index(0))
    weights, top, decay = _weigh(logits, top, -shift_now, scale_log2, PARTIAL)
    total = gl.sum(weights, 1)
    operand = gl.convert_layout(weights.to(DTYPE), WEIGHTS)
    decay = gl.full([ROWS], 1.0, gl.float32, OUTPUT_ROWS)
    mbarrier.wait(k_ready.index(1 % STAGES), 1 // STAGES % 2, pred=steps > 1)

    # Waits and branches are where ptxas keeps an order: without the branch the copy of keys would sink below the
    # weights, without the wait for keys the one for the output would rise above them.
    for j in range(1, steps):
        now = soon
        soon = later
        later = _nth_tile((j + 2) // PIECES, tiles, kv_first, listed, absent, end, EXTRA)
        shift_now = shift_soon
        shift_soon = (j + 1) % PIECES * KEYS
        if PARTIAL:
            shift_soon += gl.load(tokens + soon, mask=j + 1 < steps, other=0) - SLOTS
        half = j % 2
        product = _multiply_keys(q_buffer, k_buffers.index(j % STAGES), zeros)
        _copy(values, b, g, now, shift_now, v_ready.index(half), v_buffers.index(half))
        if STAGES == 2 and j + 1 < steps:
            _copy(keys, b, g, soon, shift_soon, k_ready.index(1 - half), k_buffers.index(1 - half))
        mbarrier.wait(v_ready.index(1 - half), (j - 1) // 2 % 2)
        acc = acc * decay[:, None]
        update = _multiply_values(operand, v_buffers.index(1 - half), acc)
        logits = warpgroup_mma_wait(1, deps=[product])
        if STAGES == 1 and j + 1 < steps:
            _copy(keys, b, g, soon, shift_soon, k_ready.index(0), k_buffers.index(0))
        weights, top, factor = _weigh(logits, top, -shift_now, scale_log2, PARTIAL)
        total = total * factor + gl.sum(weights, 1)
        mbarrier.wait(k_ready.index((j + 1) % STAGES), (j + 1) // STAGES % 2, pred=j + 1 < steps)
        acc, rounded = warpgroup_mma_wait(0, deps=[update, weights.to(DTYPE)])
        operand = gl.convert_layout(rounded, WEIGHTS)
        decay = gl.convert_layout(factor, OUTPUT_ROWS)

    if COARSE:  # the queries' buffer takes their gates
        mbarrier.expect(q_ready, gates.block_type.nbytes, pred=video)
        copy_in(gates, [b, h, row, 0], q_ready, q_box, pred=video)
    last = gl.maximum(steps, 1) - 1
    mbarrier.wait(v_ready.index(last % 2), last // 2 % 2)
    acc = acc * decay[:, None]
    update = _multiply_values(operand, v_buffers.index(last % 2), acc)
    acc = warpgroup_mma_wait(0, deps=[update])

    blank = (total == 0.0) | (steps == 0)
    total = gl.where(blank, 1.0, total)
    natural = gl.where(blank, MINUS_INFINITY, (top + gl.log2(total)) * 0.6931471805599453)
    gl.store(lse + bh * R + row + gl.arange(0, ROWS, LOGIT_ROWS), natural)
    acc = acc * gl.convert_layout(1.0 / total, OUTPUT_ROWS)[:, None]
    acc = gl.where(gl.convert_layout(blank, OUTPUT_ROWS)[:, None], 0.0, acc)
    if COARSE and video:
        mbarrier.wait(q_ready, 1)
        column = gl.arange(0, D, gl.SliceLayout(0, OUTPUT))
        acc += q_buffer.load(OUTPUT).to(gl.float32) * gl.load(coarse + at * D + column)[None, :]
    q_buffer.store(acc.to(DTYPE))
    fence_async_shared()
    copy_out(outs, [b, h, row, 0], q_box)
    tma.store_wait(0)
