"""The fine stage's dk, dv kernel for Hopper, in Gluon; `hopper_backward` launches it.

It is made as `hopper_backward_rows` is; `columns` says which part of which column a program walks. Logits are transposed,
`[KEYS, ROWS]`, so that weights go from registers into the products that take them.

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

from flexsparse.compile_passes.templates.hopper_backward_rows import _copy_rows, _matrix
from flexsparse.compile_passes.templates.hopper_kernels import _copy, _nth_tile
from flexsparse.compile_passes.templates.hopper_tma import copy_out


@gluon.jit(do_not_specialize=["N", "M", "U", "R", "first_tiles", "kv_first", "G", "most"])
def hopper_dkdv(
    queries,
    grads,
    keys,
    values,
    d_keys,
    d_values,
    lse_log2,
    delta,
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
    EXTRA: gl.constexpr,
    PARTIAL: gl.constexpr,
    SPLIT: gl.constexpr,
):
    """dk and dv of KEYS slots of one KV head, over the query heads that read it, in their order; or a piece of these sums.

    A step takes ROWS query rows. STAGES: buffers of queries and of their gradients. `columns.pieces` says what a program takes.
    Slots past a tile's count make rows of their own, dropped at the end.
    """
    DTYPE: gl.constexpr = queries.dtype
    PIECES: gl.constexpr = QUERY_ROWS // ROWS
    WARPS: gl.constexpr = [gl.num_warps(), 1]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=WARPS, instr_shape=[16, ROWS, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=WARPS, instr_shape=[16, D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUTPUT, k_width=2)

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
    q_buffers = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, ROWS, D], queries.layout)
    g_buffers = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, ROWS, D], grads.layout)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    shifts = gl.allocate_shared_memory(gl.float32, [ROWS], FLAT)
    means = gl.allocate_shared_memory(gl.float32, [ROWS], FLAT)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    g_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(g_ready.index(i), count=1)
    fence_async_shared()

    _copy(keys, b, g, u, slot, ready.index(0), k_box)
    _copy(values, b, g, u, slot, ready.index(1), v_box)
    zeros = gl.zeros([KEYS, ROWS], gl.float32, LOGITS)
    dk = gl.zeros([KEYS, D], gl.float32, OUTPUT)
    dv = gl.zeros([KEYS, D], gl.float32, OUTPUT)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, LOGITS)
    line = gl.arange(0, ROWS, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    for i in gl.static_range(2):
        mbarrier.wait(ready.index(i), 0)

    done = 0  # steps of the query heads before
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
        steps = (last - first) * PIECES
        head = bh * R
        # where the rows of the first two steps start; the loop knows those of the next two
        now = _nth_tile(first, tiles, first_tiles, listed, absent, last, EXTRA) * QUERY_ROWS
        soon = now
        if steps > 0:
            _copy_rows(queries, b, h, now, q_ready.index(done % STAGES), q_buffers.index(done % STAGES))
            _copy_rows(grads, b, h, now, g_ready.index(done % STAGES), g_buffers.index(done % STAGES))
        if STAGES == 2:
            soon = _nth_tile(first + 1 // PIECES, tiles, first_tiles, listed, absent, last, EXTRA)
            soon = soon * QUERY_ROWS + 1 % PIECES * ROWS
            if steps > 1:
                _copy_rows(queries, b, h, soon, q_ready.index((done + 1) % 2), q_buffers.index((done + 1) % 2))
                _copy_rows(grads, b, h, soon, g_ready.index((done + 1) % 2), g_buffers.index((done + 1) % 2))
        lines = head + gl.where(steps > 0, now, 0) + line
        shift_soon = gl.load(lse_log2 + lines)
        mean_soon = gl.load(delta + lines)
        for j in range(steps):
            half = (done + j) % STAGES
            parity = (done + j) // STAGES % 2
            more = j + STAGES < steps
            ahead = _nth_tile(first + (j + STAGES) // PIECES, tiles, first_tiles, listed, absent, last, EXTRA)
            ahead = ahead * QUERY_ROWS + (j + STAGES) % PIECES * ROWS
            # through shared memory: from there each thread takes what its columns need when it needs it
            shifts.store(shift_soon)
            means.store(mean_soon)
            lines = head + gl.where(j + 1 < steps, soon if STAGES == 2 else ahead, 0) + line
            shift_soon = gl.load(lse_log2 + lines)
            mean_soon = gl.load(delta + lines)
            q_buffer = _matrix(q_buffers.index(half))
            g_buffer = _matrix(g_buffers.index(half))
            mbarrier.wait(q_ready.index(half), parity)
            product = warpgroup_mma(_matrix(k_box), q_buffer.permute((1, 0)), zeros, use_acc=False, is_async=True)
            mbarrier.wait(g_ready.index(half), parity)
            d_product = warpgroup_mma(_matrix(v_box), g_buffer.permute((1, 0)), zeros, use_acc=False, is_async=True)
            shift = shifts.load(COLUMNS)
            logits = warpgroup_mma_wait(1, deps=[product])
            weights = gl.exp2(logits * scale_log2 - shift[None, :])
            mbarrier.wait(q_ready.index(half), parity)  # long passed: ptxas keeps the weights on this side of it
            mean = means.load(COLUMNS)
            d_weights = warpgroup_mma_wait(0, deps=[d_product])
            d_logits = weights * (d_weights - mean[None, :])
            operand = gl.convert_layout(weights.to(DTYPE), OPERAND)
            dv_update = warpgroup_mma(operand, g_buffer, dv, is_async=True)
            d_operand = gl.convert_layout(d_logits.to(DTYPE), OPERAND)
            dk_update = warpgroup_mma(d_operand, q_buffer, dk, is_async=True)
            dv, dk = warpgroup_mma_wait(0, deps=[dv_update, dk_update])
            if more:
                _copy_rows(queries, b, h, ahead, q_ready.index(half), q_buffers.index(half))
                _copy_rows(grads, b, h, ahead, g_ready.index(half), g_buffers.index(half))
            soon = ahead
        done += gl.maximum(steps, 0)

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
