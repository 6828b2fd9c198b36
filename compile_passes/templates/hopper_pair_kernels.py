"""The fine stage's forward kernel for Hopper in which two query tiles share what they read; `hopper_pairs` launches it.

A program computes a pair of blocks of query rows, each by a warpgroup of its own (a consumer), from keys and values that
one more warp (the producer) copies into a ring of buffers. What both blocks see comes first and is copied once; then, in
turn, what only the first and what only the second sees. Neither ever waits for more than its own share of the work, and
in the second part each has every other buffer of the ring for itself.

Why it cannot hang: a consumer holds the buffers of two steps at most and waits for one that lies no more than four
places behind the first of them. With six buffers the producer needs none of the two for that one.

Shape letters: B batch, H query heads, G KV heads, N query tiles, P pairs of query tiles, M KV video tiles, U all KV tiles,
R query rows, D head dim.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from flexsparse.compile_passes.templates.hopper_kernels import _copy, _multiply_keys, _multiply_values, _weigh
from flexsparse.compile_passes.templates.hopper_tma import copy_in, copy_out

MINUS_INFINITY = gl.constexpr(float("-inf"))


@gluon.jit
def _place(step, shared, CONSUMER: gl.constexpr):
    """Where in the sequence of copies a consumer's step is; ``shared`` steps come first."""
    return gl.where(step < shared, step, 2 * step - shared + CONSUMER)


@gluon.jit
def _tile(entry, tiles, first, both, shared, absent, own_at, end, EXTRA: gl.constexpr):
    """The tile of a consumer's entry: any from ``end`` on.

    Those that both see come first, ``shared`` of them, of which ``both`` are listed; then its own, listed from ``own_at`` on.
    """
    if EXTRA:
        listed = (entry >= first) & (entry < first + both)
        at = gl.where(entry < shared, entry - first, own_at + entry - shared)
        index = first + gl.load(tiles + at, mask=(entry < end) & (listed | (entry >= shared)), other=0)
        extra = gl.where(entry < first, entry, entry + absent)
        return gl.where((entry < shared) & (listed == 0), extra, index)
    return gl.load(tiles + gl.where(entry < shared, entry, own_at + entry - shared), mask=entry < end, other=0)


@gluon.jit
def _produce(
    keys,
    values,
    k_ring,
    v_ring,
    k_filled,
    v_filled,
    drained,
    tiles,
    tokens,
    b,
    g,
    kv_first,
    both,
    shared,
    absent,
    first_own,
    second_own,
    second_at,
    first_seen,
    second_seen,
    SLOTS: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    EXTRA: gl.constexpr,
    PARTIAL: gl.constexpr,
):
    """Copy what the consumers read, in the order in which they read it."""
    PIECES: gl.constexpr = SLOTS // KEYS
    start = shared * PIECES
    for place in range(start + 2 * gl.maximum(first_own, second_own) * PIECES):
        apart = gl.maximum(place - start, 0)
        second = (apart % 2 == 1) & (place >= start)
        step = gl.where(place < start, place, start + apart // 2)
        own = gl.where(second, second_own, first_own)
        if (place < start) | (step < start + own * PIECES):
            at = gl.where(second, second_at, both)
            end = gl.where(second, second_seen, first_seen)
            tile = _tile(step // PIECES, tiles, kv_first, both, shared, absent, at, end, EXTRA)
            shift = step % PIECES * KEYS
            if PARTIAL:
                shift += gl.load(tokens + tile) - SLOTS
            buffer = place % STAGES
            # the first round finds every buffer drained
            mbarrier.wait(drained.index(buffer), (place // STAGES + 1) % 2)
            _copy(keys, b, g, tile, shift, k_filled.index(buffer), k_ring.index(buffer))
            _copy(values, b, g, tile, shift, v_filled.index(buffer), v_ring.index(buffer))
            # in the place of the consumer that does not read it
            mbarrier.arrive(drained.index(buffer), count=1, pred=place >= start)


@gluon.jit
def _consume(
    queries,
    gates,
    outs,
    q_boxes,
    q_ready,
    k_ring,
    v_ring,
    k_filled,
    v_filled,
    drained,
    tiles,
    tokens,
    lse,
    coarse,
    scale_log2,
    b,
    h,
    row,
    at,
    video,
    writes,
    kv_first,
    both,
    shared,
    absent,
    own,
    own_at,
    seen,
    CONSUMER: gl.constexpr,
    D: gl.constexpr,
    SLOTS: gl.constexpr,
    ROWS: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    EXTRA: gl.constexpr,
    PARTIAL: gl.constexpr,
    COARSE: gl.constexpr,
):
    """Output and log-sum-exp of one of the two blocks of rows: its first is ``row``; ``at`` counts tiles of all heads."""
    DTYPE: gl.constexpr = queries.dtype
    PIECES: gl.constexpr = SLOTS // KEYS
    WARPS: gl.constexpr = [gl.num_warps(), 1]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=WARPS, instr_shape=[16, KEYS, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=WARPS, instr_shape=[16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUTPUT, k_width=2)
    LOGIT_ROWS: gl.constexpr = gl.SliceLayout(1, LOGITS)
    OUTPUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUTPUT)

    start = shared * PIECES
    steps = start + own * PIECES
    q_box = q_boxes.index(CONSUMER)
    q_buffer = q_box.reshape([ROWS, D])
    q_arrived = q_ready.index(CONSUMER)
    mbarrier.expect(q_arrived, queries.block_type.nbytes)
    copy_in(queries, [b, h, row, 0], q_arrived, q_box)

    # how many slots of the tile of this step and of the next come before its first token
    empty = 0
    empty_soon = 0
    if PARTIAL:
        tile = _tile(0, tiles, kv_first, both, shared, absent, own_at, seen, EXTRA)
        empty = SLOTS - gl.load(tokens + tile)
        tile = _tile(1 // PIECES, tiles, kv_first, both, shared, absent, own_at, seen, EXTRA)
        empty_soon = SLOTS - gl.load(tokens + tile) - 1 % PIECES * KEYS

    zeros = gl.zeros([ROWS, KEYS], gl.float32, LOGITS)
    acc = gl.zeros([ROWS, D], gl.float32, OUTPUT)
    top = gl.full([ROWS], MINUS_INFINITY, gl.float32, LOGIT_ROWS)
    place = _place(0, start, CONSUMER)
    mbarrier.wait(q_arrived, 0)
    held = q_buffer.load(gl.DotOperandLayout(operand_index=0, parent=LOGITS, k_width=2))
    if COARSE:  # the queries' buffer takes their gates
        mbarrier.expect(q_arrived, gates.block_type.nbytes, pred=video)
        copy_in(gates, [b, h, row, 0], q_arrived, q_box, pred=video)
    mbarrier.wait(k_filled.index(place % STAGES), place // STAGES % 2)
    product = _multiply_keys(held, k_ring.index(place % STAGES), zeros)
    logits = warpgroup_mma_wait(0, deps=[product])
    weights, top, decay = _weigh(logits, top, empty, scale_log2, PARTIAL)
    total = gl.sum(weights, 1)
    operand = gl.convert_layout(weights.to(DTYPE), WEIGHTS)
    decay = gl.full([ROWS], 1.0, gl.float32, OUTPUT_ROWS)
    soon = _place(1, start, CONSUMER)
    mbarrier.wait(k_filled.index(soon % STAGES), soon // STAGES % 2, pred=steps > 1)

    for j in range(1, steps):
        old = place
        place = soon
        soon = _place(j + 1, start, CONSUMER)
        if PARTIAL:
            empty = empty_soon
            tile = _tile((j + 1) // PIECES, tiles, kv_first, both, shared, absent, own_at, seen, EXTRA)
            empty_soon = SLOTS - gl.load(tokens + tile) - (j + 1) % PIECES * KEYS
        product = _multiply_keys(held, k_ring.index(place % STAGES), zeros)
        mbarrier.wait(v_filled.index(old % STAGES), old // STAGES % 2)
        acc = acc * decay[:, None]
        update = _multiply_values(operand, v_ring.index(old % STAGES), acc)
        logits = warpgroup_mma_wait(1, deps=[product])
        weights, top, factor = _weigh(logits, top, empty, scale_log2, PARTIAL)
        total = total * factor + gl.sum(weights, 1)
        mbarrier.wait(k_filled.index(soon % STAGES), soon // STAGES % 2, pred=j + 1 < steps)
        acc, rounded = warpgroup_mma_wait(0, deps=[update, weights.to(DTYPE)])
        mbarrier.arrive(drained.index(old % STAGES), count=1)
        operand = gl.convert_layout(rounded, WEIGHTS)
        decay = gl.convert_layout(factor, OUTPUT_ROWS)

    mbarrier.wait(v_filled.index(place % STAGES), place // STAGES % 2)
    acc = acc * decay[:, None]
    update = _multiply_values(operand, v_ring.index(place % STAGES), acc)
    acc = warpgroup_mma_wait(0, deps=[update])
    mbarrier.arrive(drained.index(place % STAGES), count=1)

    blank = (total == 0.0) | (seen == 0)
    total = gl.where(blank, 1.0, total)
    natural = gl.where(blank, MINUS_INFINITY, (top + gl.log2(total)) * 0.6931471805599453)
    acc = acc * gl.convert_layout(1.0 / total, OUTPUT_ROWS)[:, None]
    acc = gl.where(gl.convert_layout(blank, OUTPUT_ROWS)[:, None], 0.0, acc)
    if COARSE and video:
        mbarrier.wait(q_arrived, 1)
        column = gl.arange(0, D, gl.SliceLayout(0, OUTPUT))
        acc += q_buffer.load(OUTPUT).to(gl.float32) * gl.load(coarse + at * D + column)[None, :]
    if writes:
        gl.store(lse + row + gl.arange(0, ROWS, LOGIT_ROWS), natural)
        q_buffer.store(acc.to(DTYPE))
        fence_async_shared()
        copy_out(outs, [b, h, row, 0], q_box)
        tma.store_wait(0)


@gluon.jit
def _pair(N, R, first_rows, frame_tiles, ROWS: gl.constexpr, EXTRA: gl.constexpr):
    """What this program computes: the pair's number, its two query tiles and their first rows, and whether it is of the video.

    As `pair_lists.pair_of`. The extra rows come first: they see every tile, so that they take longest.
    """
    extra = R // ROWS - N
    number = gl.program_id(0) - (extra + 1) // 2
    paired = N // (2 * frame_tiles) * frame_tiles
    early = number < paired
    first = gl.where(early, number + number // frame_tiles * frame_tiles, 2 * number)
    second = gl.where(early, first + frame_tiles, gl.minimum(2 * number + 1, N - 1))
    row = first_rows + first * ROWS
    other_row = first_rows + second * ROWS
    video = number >= 0
    if EXTRA:
        one = 2 * gl.program_id(0)
        two = gl.minimum(one + 1, extra - 1)
        before = first_rows // ROWS
        row = gl.where(video, row, gl.where(one < before, one, one + N) * ROWS)
        other_row = gl.where(video, other_row, gl.where(two < before, two, two + N) * ROWS)
    return number, first, second, row, other_row, video


@gluon.jit
def _halves(N, first_rows, ROWS: gl.constexpr, EXTRA: gl.constexpr):
    """As `_pair`, where a pair is one query tile."""
    block = gl.program_id(0)
    if EXTRA:
        block = (block + first_rows // (2 * ROWS) + N) % gl.num_programs(0)
    tile = block - first_rows // (2 * ROWS)
    row = block * (2 * ROWS)
    return tile, tile, tile, row, row + ROWS, (tile >= 0) & (tile < N)


@gluon.jit(
    do_not_specialize=["H", "N", "M", "U", "R", "first_rows", "kv_first", "length", "frame_tiles", "count_stride"]
)
def hopper_pair_forward(
    queries,
    keys,
    values,
    gates,
    outs,
    lists,
    sizes,
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
    length,
    frame_tiles,
    count_stride,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    SLOTS: gl.constexpr,
    ROWS: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    HALVES: gl.constexpr,
    EXTRA: gl.constexpr,
    PARTIAL: gl.constexpr,
    COARSE: gl.constexpr,
):
    """Output and log-sum-exp of two blocks of ROWS query rows of one head; a step takes KEYS slots of a tile.

    STAGES: buffers of the ring. REGISTERS, PRODUCER_REGISTERS: of a consumer's and of the producer's thread. HALVES: the
    two blocks are the halves of one query tile, ``lists [B, H, N, length]`` and ``sizes [B, H, N]`` those of single tiles; else
    they are those of `pair_lists`.
    """
    DTYPE: gl.constexpr = queries.dtype
    h, b = gl.program_id(1), gl.program_id(2)
    bh = b.to(gl.int64) * H + h
    if HALVES:
        number, first, second, row, other_row, video = _halves(N, first_rows, ROWS, EXTRA)
        place = bh * N + gl.where(video, number, 0)
        both = gl.load(sizes + place, mask=video, other=0)
        first_own = both * 0
        second_own = first_own
    else:
        number, first, second, row, other_row, video = _pair(N, R, first_rows, frame_tiles, ROWS, EXTRA)
        place = bh * ((N + 1) // 2) + gl.where(video, number, 0)
        both = gl.load(sizes + 4 * place, mask=video, other=0)
        first_own = gl.load(sizes + 4 * place + 1, mask=video, other=0)
        second_own = gl.load(sizes + 4 * place + 2, mask=video, other=0)
    tiles = lists + place * length
    absent = gl.where(video, M - both, 0)
    shared = U - absent
    second_at = both + first_own
    first_seen = shared + first_own
    second_seen = shared + second_own
    # a block that sees nothing takes a step on any tile, and its result is dropped
    first_own = gl.maximum(first_own, 1 - gl.minimum(shared, 1))
    second_own = gl.maximum(second_own, 1 - gl.minimum(shared, 1))
    tokens = kv_counts + b.to(gl.int64) * count_stride
    head_lse = lse + bh * R

    q_boxes = gl.allocate_shared_memory(DTYPE, [2, 1, 1, ROWS, D], queries.layout)
    k_ring = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, 1, KEYS, D], keys.layout)
    v_ring = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, 1, KEYS, D], values.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    drained = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_ready.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_filled.index(i), count=1)
        mbarrier.init(v_filled.index(i), count=1)
        mbarrier.init(drained.index(i), count=2)
    fence_async_shared()
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (
                queries, gates, outs, q_boxes, q_ready, k_ring, v_ring, k_filled, v_filled, drained,
                tiles, tokens, head_lse, coarse, scale_log2, b, h, row, bh * N + first, video, True,
                kv_first, both, shared, absent, first_own, both, first_seen,
                0, D, SLOTS, ROWS, KEYS, STAGES, EXTRA, PARTIAL, COARSE,
            )),
            (_consume, (
                queries, gates, outs, q_boxes, q_ready, k_ring, v_ring, k_filled, v_filled, drained,
                tiles, tokens, head_lse, coarse, scale_log2, b, h, other_row, bh * N + second, video, other_row != row,
                kv_first, both, shared, absent, second_own, second_at, second_seen,
                1, D, SLOTS, ROWS, KEYS, STAGES, EXTRA, PARTIAL, COARSE,
            )),
            (_produce, (
                keys, values, k_ring, v_ring, k_filled, v_filled, drained, tiles, tokens, b, h // GROUP,
                kv_first, both, shared, absent, first_own, second_own, second_at, first_seen, second_seen,
                SLOTS, KEYS, STAGES, EXTRA, PARTIAL,
            )),
        ],
        [4, 1],
        [REGISTERS, PRODUCER_REGISTERS],
    )
    # fmt: on
