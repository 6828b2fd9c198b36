"""The fine stage's dq kernel for Hopper with a warp that only copies, in Gluon; `hopper_specialized` launches it.

It computes what `hopper_backward_rows` computes, in the same order, so that the bits are the same; producer, consumer and
their ring are those of `hopper_specialized_columns`, which says why they cannot hang.

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

from flexsparse.compile_passes.templates.hopper_backward_rows import _matrix, _without_first
from flexsparse.compile_passes.templates.hopper_kernels import _nth_tile
from flexsparse.compile_passes.templates.hopper_tma import copy_in, copy_out


@gluon.jit
def _first(line):
    """The first of a line of values in shared memory."""
    one = line.reshape([line.shape[1]]).slice(0, 1)
    return gl.sum(one.load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit
def _produce(
    queries,
    grads,
    keys,
    values,
    token_counts,
    q_box,
    g_box,
    ready,
    k_ring,
    v_ring,
    count_ring,
    k_filled,
    v_filled,
    drained,
    tiles,
    tokens,
    b,
    h,
    g,
    row,
    U,
    kv_first,
    listed,
    absent,
    end,
    SLOTS: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    EXTRA: gl.constexpr,
    PARTIAL: gl.constexpr,
):
    """Copy the block's queries and their gradients, then the keys and values of its steps, with how many tokens they have."""
    PIECES: gl.constexpr = SLOTS // KEYS
    mbarrier.expect(ready, queries.block_type.nbytes + grads.block_type.nbytes)
    copy_in(queries, [b, h, row, 0], ready, q_box)
    copy_in(grads, [b, h, row, 0], ready, g_box)
    for j in range(end * PIECES):
        tile = _nth_tile(j // PIECES, tiles, kv_first, listed, absent, end, EXTRA)
        shift = j % PIECES * KEYS
        if PARTIAL:
            shift += gl.load(tokens + tile) - SLOTS
        at = j % STAGES
        # the first round finds every buffer drained
        mbarrier.wait(drained.index(at), (j // STAGES + 1) % 2)
        if PARTIAL:
            mbarrier.expect(k_filled.index(at), keys.block_type.nbytes + token_counts.block_type.nbytes)
            copy_in(token_counts, [0, b * U + tile], k_filled.index(at), count_ring.index(at))
        else:
            mbarrier.expect(k_filled.index(at), keys.block_type.nbytes)
        copy_in(keys, [b, g, tile, shift, 0], k_filled.index(at), k_ring.index(at))
        mbarrier.expect(v_filled.index(at), values.block_type.nbytes)
        copy_in(values, [b, g, tile, shift, 0], v_filled.index(at), v_ring.index(at))


@gluon.jit
def _consume(
    outs,
    lse_log2,
    delta,
    estimate,
    grad_lse,
    q_box,
    g_box,
    ready,
    order,
    k_ring,
    v_ring,
    count_ring,
    k_filled,
    v_filled,
    drained,
    scale,
    scale_log2,
    b,
    h,
    row,
    line,
    steps,
    D: gl.constexpr,
    SLOTS: gl.constexpr,
    ROWS: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    PARTIAL: gl.constexpr,
    LSE_GRADIENT: gl.constexpr,
):
    """dq and delta of the block; ``line`` counts rows of all heads."""
    DTYPE: gl.constexpr = outs.dtype
    PIECES: gl.constexpr = SLOTS // KEYS
    WARPS: gl.constexpr = [gl.num_warps(), 1]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=WARPS, instr_shape=[16, KEYS, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=WARPS, instr_shape=[16, D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUTPUT, k_width=2)
    place = line + gl.arange(0, ROWS, gl.SliceLayout(1, LOGITS))
    shift = gl.load(lse_log2 + place)
    mean = gl.load(estimate + place)
    zeros = gl.zeros([ROWS, KEYS], gl.float32, LOGITS)
    acc = gl.zeros([ROWS, D], gl.float32, OUTPUT)
    mean_key = gl.zeros([ROWS, D], gl.float32, OUTPUT)
    missing = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LOGITS))
    mbarrier.wait(ready, 0)
    for j in range(steps):
        at = j % STAGES
        parity = j // STAGES % 2
        k_buffer = _matrix(k_ring.index(at))
        v_buffer = _matrix(v_ring.index(at))
        mbarrier.wait(k_filled.index(at), parity)
        product = warpgroup_mma(_matrix(q_box), k_buffer.permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_filled.index(at), parity)
        d_product = warpgroup_mma(_matrix(g_box), v_buffer.permute((1, 0)), zeros, use_acc=False, is_async=True)
        logits = warpgroup_mma_wait(1, deps=[product])
        weights = gl.exp2(logits * scale_log2 - shift[:, None])
        mbarrier.wait(order, 1)  # over at once: ptxas keeps the weights on this side of it
        d_weights = warpgroup_mma_wait(0, deps=[d_product])
        if PARTIAL:
            # without a branch over full tiles, which takes registers: the buffer's slots before its first token
            weights = _without_first(weights, SLOTS - j % PIECES * KEYS - _first(count_ring.index(at)))
        d_logits = weights * (d_weights - mean[:, None])
        missing += gl.sum(d_logits, 1)
        operand = gl.convert_layout(weights.to(DTYPE), OPERAND)
        mean_update = warpgroup_mma(operand, k_buffer, mean_key, is_async=True)
        d_operand = gl.convert_layout(d_logits.to(DTYPE), OPERAND)
        update = warpgroup_mma(d_operand, k_buffer, acc, is_async=True)
        mean_key, acc = warpgroup_mma_wait(0, deps=[mean_update, update])
        mbarrier.arrive(drained.index(at), count=1)

    if LSE_GRADIENT:
        missing -= gl.load(grad_lse + place)
    gl.store(delta + place, mean + missing)
    missing = gl.convert_layout(missing, gl.SliceLayout(1, OUTPUT))
    acc -= missing[:, None] * mean_key
    _matrix(q_box).store((acc * scale).to(DTYPE))
    fence_async_shared()
    copy_out(outs, [b, h, row, 0], q_box)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["H", "N", "M", "U", "R", "first_rows", "kv_first", "capacity"])
def hopper_specialized_dq(
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
    token_counts,
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
    PRODUCER_REGISTERS: gl.constexpr,
    EXTRA: gl.constexpr,
    PARTIAL: gl.constexpr,
    LSE_GRADIENT: gl.constexpr,
):
    """As `hopper_dq`. STAGES, PRODUCER_REGISTERS: as in `hopper_specialized_dkdv`.

    ``token_counts`` are boxes of the counts of all samples, ``[1, B * U]``, None where PARTIAL is false.
    """
    DTYPE: gl.constexpr = queries.dtype
    block = gl.program_id(0)
    if EXTRA:  # as in the forward: the longest first
        block = (block + (first_rows + N * QUERY_ROWS) // ROWS) % gl.num_programs(0)
    h, b = gl.program_id(1), gl.program_id(2)
    bh = b.to(gl.int64) * H + h
    row = block * ROWS
    tile = (row - first_rows) // QUERY_ROWS
    video = (row >= first_rows) & (tile < N)
    at = bh * N + tile
    listed = gl.load(counts + at, mask=video, other=0)
    absent = gl.where(video, M - listed, 0)
    end = U - absent
    tiles = lists + at * capacity
    tokens = kv_counts + b.to(gl.int64) * U

    q_box = gl.allocate_shared_memory(DTYPE, [1, 1, ROWS, D], queries.layout)
    g_box = gl.allocate_shared_memory(DTYPE, [1, 1, ROWS, D], grads.layout)
    k_ring = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, 1, KEYS, D], keys.layout)
    v_ring = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, 1, KEYS, D], values.layout)
    count_ring = v_ring
    if PARTIAL:
        count_ring = gl.allocate_shared_memory(
            gl.int32, [STAGES, 1, token_counts.block_type.shape[1]], token_counts.layout
        )
    ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout()).index(0)
    order = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout()).index(0)  # nothing arrives at it
    k_filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    drained = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    mbarrier.init(order, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_filled.index(i), count=1)
        mbarrier.init(v_filled.index(i), count=1)
        mbarrier.init(drained.index(i), count=1)
    fence_async_shared()
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (
                outs, lse_log2, delta, estimate, grad_lse, q_box, g_box, ready, order,
                k_ring, v_ring, count_ring, k_filled, v_filled, drained,
                scale, scale_log2, b, h, row, bh * R + row, end * (SLOTS // KEYS),
                D, SLOTS, ROWS, KEYS, STAGES, PARTIAL, LSE_GRADIENT,
            )),
            (_produce, (
                queries, grads, keys, values, token_counts, q_box, g_box, ready,
                k_ring, v_ring, count_ring, k_filled, v_filled, drained,
                tiles, tokens, b, h, h // GROUP, row, U, kv_first, listed, absent, end,
                SLOTS, KEYS, STAGES, EXTRA, PARTIAL,
            )),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )
    # fmt: on
