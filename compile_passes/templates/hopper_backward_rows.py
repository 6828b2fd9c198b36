"""The fine stage's dq kernel for Hopper, in Gluon; `hopper_backward` launches it.

A program's warps do everything, none only copies; several programs share an SM, so that others work where one waits. Weights
are made while the tensor cores multiply gradients and values. The copy engine (TMA) brings the next values while dq is
added up, the next keys after it.

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

from flexsparse.compile_passes.templates.hopper_kernels import _copy, _nth_tile
from flexsparse.compile_passes.templates.hopper_tma import copy_in, copy_out


@gluon.jit
def _matrix(buffer):
    """A box in shared memory as rows of D values."""
    return buffer.reshape([buffer.shape[len(buffer.shape) - 2], buffer.shape[len(buffer.shape) - 1]])


@gluon.jit
def _copy_rows(array, b, h, row, barrier, buffer):
    """Start to copy rows of one head of a ``[B, H, R, D]`` array."""
    mbarrier.expect(barrier, array.block_type.nbytes)
    copy_in(array, [b, h, row, 0], barrier, buffer)


@gluon.jit
def _without_first(x, empty):
    """``x`` with zeros in its first ``empty`` columns."""
    # by eights of columns: a thread has the same of each, so that their numbers are constants, not registers
    eights = x.reshape([x.shape[0], x.shape[1] // 8, 8])
    split: gl.constexpr = eights.type.layout
    eighth = gl.arange(0, x.shape[1] // 8, gl.SliceLayout(0, gl.SliceLayout(2, split)))
    column = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, split)))
    valid = (eighth * 8)[None, :, None] >= (empty - column)[None, None, :]
    return gl.convert_layout(gl.where(valid, eights, 0.0).reshape(x.shape), x.type.layout)


@gluon.jit(do_not_specialize=["H", "N", "M", "U", "R", "first_rows", "kv_first", "capacity"])
def hopper_dq(
    queries,
    grads,
    keys,
    values,
    outs,
    lse_log2,
    delta,
    estimate,
    grad_lse,
    lists,
    counts,
    kv_counts,
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
    GROUP: gl.constexpr,
    D: gl.constexpr,
    QUERY_ROWS: gl.constexpr,
    SLOTS: gl.constexpr,
    ROWS: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    EXTRA: gl.constexpr,
    PARTIAL: gl.constexpr,
    LSE_GRADIENT: gl.constexpr,
):
    """dq and delta of ROWS query rows of one head; a step takes KEYS slots of a tile. STAGES: buffers of keys and of values.

    `backward_kernels` says how delta comes from its estimate.
    """
    DTYPE: gl.constexpr = queries.dtype
    PIECES: gl.constexpr = SLOTS // KEYS
    WARPS: gl.constexpr = [gl.num_warps(), 1]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=WARPS, instr_shape=[16, KEYS, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=WARPS, instr_shape=[16, D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUTPUT, k_width=2)

    block = gl.program_id(0)
    if EXTRA:  # as in the forward: the longest first
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
    tokens = kv_counts + b.to(gl.int64) * U

    q_box = gl.allocate_shared_memory(DTYPE, [1, 1, ROWS, D], queries.layout)
    g_box = gl.allocate_shared_memory(DTYPE, [1, 1, ROWS, D], grads.layout)
    k_buffers = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, 1, KEYS, D], keys.layout)
    v_buffers = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, 1, KEYS, D], values.layout)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
    fence_async_shared()

    _copy_rows(queries, b, h, row, ready.index(0), q_box)
    _copy_rows(grads, b, h, row, ready.index(1), g_box)
    # where the boxes of this step and the next STAGES start, counted from their tiles, and the tile of the last of them
    ahead = _nth_tile(0, tiles, kv_first, listed, absent, end, EXTRA)
    shift_now = 0
    if PARTIAL:
        shift_now += gl.load(tokens + ahead, mask=steps > 0, other=0) - SLOTS
    shift_soon = shift_now
    if steps > 0:
        _copy(keys, b, g, ahead, shift_now, k_ready.index(0), k_buffers.index(0))
        _copy(values, b, g, ahead, shift_now, v_ready.index(0), v_buffers.index(0))
    if STAGES == 2:
        ahead = _nth_tile(1 // PIECES, tiles, kv_first, listed, absent, end, EXTRA)
        shift_soon = 1 % PIECES * KEYS
        if PARTIAL:
            shift_soon += gl.load(tokens + ahead, mask=steps > 1, other=0) - SLOTS
        if steps > 1:
            _copy(keys, b, g, ahead, shift_soon, k_ready.index(1), k_buffers.index(1))
            _copy(values, b, g, ahead, shift_soon, v_ready.index(1), v_buffers.index(1))
    ahead = _nth_tile(STAGES // PIECES, tiles, kv_first, listed, absent, end, EXTRA)

    place = bh * R + row + gl.arange(0, ROWS, gl.SliceLayout(1, LOGITS))
    shift = gl.load(lse_log2 + place)
    mean = gl.load(estimate + place)
    zeros = gl.zeros([ROWS, KEYS], gl.float32, LOGITS)
    acc = gl.zeros([ROWS, D], gl.float32, OUTPUT)
    mean_key = gl.zeros([ROWS, D], gl.float32, OUTPUT)
    missing = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LOGITS))
    for i in gl.static_range(2):
        mbarrier.wait(ready.index(i), 0)
    q_operand = _matrix(q_box)
    g_operand = _matrix(g_box)

    for j in range(steps):
        half = j % STAGES
        parity = j // STAGES % 2
        more = j + STAGES < steps
        later = _nth_tile((j + STAGES + 1) // PIECES, tiles, kv_first, listed, absent, end, EXTRA)
        shift_ahead = (j + STAGES) % PIECES * KEYS
        if PARTIAL:
            shift_ahead += gl.load(tokens + ahead, mask=more, other=0) - SLOTS
        k_buffer = _matrix(k_buffers.index(half))
        mbarrier.wait(k_ready.index(half), parity)
        product = warpgroup_mma(q_operand, k_buffer.permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_ready.index(half), parity)
        v_buffer = _matrix(v_buffers.index(half))
        d_product = warpgroup_mma(g_operand, v_buffer.permute((1, 0)), zeros, use_acc=False, is_async=True)
        logits = warpgroup_mma_wait(1, deps=[product])
        weights = gl.exp2(logits * scale_log2 - shift[:, None])
        mbarrier.wait(k_ready.index(half), parity)  # long passed: ptxas keeps the weights on this side of it
        d_weights = warpgroup_mma_wait(0, deps=[d_product])
        if more:
            _copy(values, b, g, ahead, shift_ahead, v_ready.index(half), v_buffers.index(half))
        if PARTIAL and shift_now < 0:
            weights = _without_first(weights, -shift_now)
        d_logits = weights * (d_weights - mean[:, None])
        missing += gl.sum(d_logits, 1)
        operand = gl.convert_layout(weights.to(DTYPE), OPERAND)
        mean_update = warpgroup_mma(operand, k_buffer, mean_key, is_async=True)
        d_operand = gl.convert_layout(d_logits.to(DTYPE), OPERAND)
        update = warpgroup_mma(d_operand, k_buffer, acc, is_async=True)
        mean_key, acc = warpgroup_mma_wait(0, deps=[mean_update, update])
        if more:
            _copy(keys, b, g, ahead, shift_ahead, k_ready.index(half), k_buffers.index(half))
        ahead = later
        shift_now = shift_soon if STAGES == 2 else shift_ahead
        shift_soon = shift_ahead

    if LSE_GRADIENT:
        missing -= gl.load(grad_lse + place)
    gl.store(delta + place, mean + missing)
    missing = gl.convert_layout(missing, gl.SliceLayout(1, OUTPUT))
    acc -= missing[:, None] * mean_key
    _matrix(q_box).store((acc * scale).to(DTYPE))
    fence_async_shared()
    copy_out(outs, [b, h, row, 0], q_box)
    tma.store_wait(0)
