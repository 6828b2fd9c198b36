"""The coarse stage in one launch: scores between pooled tiles, softmax, coarse output, and the choice of tiles.

Scores of all rows are never stored: a program computes those of a few rows at a time, keeps them as sortable keys in
its own piece of a workspace while the online softmax runs, and then chooses from them.

Shape letters: B batch, H query heads, G KV heads (query head h reads KV head ``h // (H // G)``), N query tiles, M KV
tiles, D head dim, W words of a bitmask row.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.compile_passes.templates.choice import LOWEST, choose, load_value, to_key
from flexsparse.compile_passes.templates.launch import SIZES, Compilation, launch
from flexsparse.compile_passes.templates.scoring import (
    coarse_reference,
    half_of,
    load_rows,
    score_block,
    scores_reference,
    store_rows,
)
from flexsparse.compile_passes.templates.selection import (
    allowed_strides,
    choice_config,
    rule_value,
    select_scores_reference,
    value_arguments,
)
from flexsparse.tile_bits import pack_bits, words_of

PROGRAMS_PER_SM = 2  # what registers allow


@triton.jit(do_not_specialize=SIZES)
def select_kernel(
    q,
    k,
    v,
    allowed,
    kv_counts,
    value,
    bits,
    counts,
    wanted,
    coarse,
    lse,
    workspace,
    scale,
    blocks,
    heads,
    group,
    N,
    M,
    words,
    min_tiles,
    capacity,
    allowed_stride_b,
    allowed_stride_h,
    counts_stride_b,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    RULE: tl.constexpr,
    VALUE_IN_MEMORY: tl.constexpr,
    COARSE: tl.constexpr,
    ALLOWED: tl.constexpr,
    ALIVE: tl.constexpr,
    COUNT_BIAS: tl.constexpr,
    D: tl.constexpr,
    D_HALF: tl.constexpr,
    M_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHOICE_ROWS: tl.constexpr,
):
    """A program takes every num_programs-th block of ROWS rows, and chooses for CHOICE_ROWS of them at a time."""
    row_blocks = tl.cdiv(N, ROWS)
    workspace += tl.program_id(0).to(tl.int64) * ROWS * M_BLOCK
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        bh = (block // row_blocks).to(tl.int64)
        b = bh // heads
        h = bh % heads
        kv_offset = (bh // group) * M * D
        allowed_bh = allowed + b * allowed_stride_b + h * allowed_stride_h
        counts_b = kv_counts + b * counts_stride_b

        local = tl.arange(0, ROWS)
        row = (block % row_blocks) * ROWS + local
        q_low, q_high = load_rows(q + bh * N * D, row, N, D, D_HALF)
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        some = tl.zeros([ROWS], tl.int32)
        low = tl.zeros([ROWS, D_HALF], tl.float32)
        high = tl.zeros([ROWS, D_HALF], tl.float32)
        for first in range(0, M, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            k_low, k_high = load_rows(k + kv_offset, column, M, D, D_HALF)
            scores, inside = score_block(
                q_low,
                q_high,
                k_low,
                k_high,
                row[:, None],
                column[None, :],
                first,
                allowed_bh,
                counts_b,
                scale,
                N,
                M,
                words,
                ALLOWED,
                ALIVE,
                COUNT_BIAS,
            )
            tl.store(workspace + local[:, None] * M_BLOCK + column[None, :], to_key(scores, inside))
            if COARSE:
                scores = tl.where(inside, scores, float("-inf"))
                higher = tl.maximum(highest, tl.max(scores, 1))
                finite = tl.where(higher == float("-inf"), 0.0, higher)  # nothing allowed yet: -inf - -inf is NaN
                weights = tl.exp(scores - finite[:, None])
                shrink = tl.exp(highest - finite)
                total = total * shrink + tl.sum(weights, 1)
                some = some | tl.max(inside.to(tl.int32), 1)
                v_low, v_high = load_rows(v + kv_offset, column, M, D, D_HALF)
                low = low * shrink[:, None] + tl.dot(weights, v_low, input_precision="tf32x3")
                high = high * shrink[:, None] + tl.dot(weights, v_high, input_precision="tf32x3")
                highest = higher
        if COARSE:
            # a row that allows nothing has sums of zero
            share = 1.0 / tl.where(some > 0, total, 1.0)[:, None]
            store_rows(coarse + bh * N * D, low * share, high * share, row, N, D, D_HALF)
            tl.store(lse + bh * N + row, highest + tl.log(tl.where(total == 0, 1.0, total)), mask=row < N)

        tl.debug_barrier()  # the keys were written by other threads
        key_column = tl.arange(0, M_BLOCK)
        written = key_column < tl.cdiv(M, COLUMNS) * COLUMNS
        for first in range(0, ROWS, CHOICE_ROWS):
            key_row = first + tl.arange(0, CHOICE_ROWS)
            key_at = workspace + key_row[:, None] * M_BLOCK + key_column[None, :]
            key = tl.load(key_at, mask=written[None, :], other=LOWEST)
            n = (block % row_blocks) * ROWS + key_row
            number = load_value(
                value, b, h, n, n < N, value_stride_b, value_stride_h, value_stride_n, IN_MEMORY=VALUE_IN_MEMORY
            )
            choose(key, number, bh * N + n, n < N, bits, counts, wanted, M, words, min_tiles, capacity, RULE=RULE)
        tl.debug_barrier()  # the next block overwrites the keys


@functools.lru_cache
def _programs(device: torch.device) -> int:
    """How many programs run at a time."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return PROGRAMS_PER_SM * processors


def config(D: int, M: int) -> tuple[dict[str, int], dict[str, int]]:
    """Block sizes, and launch options."""
    M_BLOCK, choice_rows, warps = choice_config(M)
    blocks = {
        "D_HALF": half_of(D),
        "M_BLOCK": M_BLOCK,
        # Triton gives chained dots {1, warps} warps only where rows < columns; and 3xTF32 holds its operands twice, so
        # that more rows would spill
        "ROWS": 16,
        "COLUMNS": 32,
        "CHOICE_ROWS": choice_rows,
    }
    return blocks, {"num_warps": warps, "num_stages": 2 if D <= 128 else 1}  # else more than the 99 KiB of some GPUs


def select(
    q_c: Tensor,
    k_c: Tensor,
    v_c: Tensor | None,
    *,
    allowed: Tensor | None,
    kv_counts: Tensor | None,
    count_bias: bool,
    alive: bool,
    scale: float,
    rule: str,
    value: float | int | Tensor,
    min_tiles: int,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Score all pairs of tiles, choose the tiles of each row, and compute the coarse output, in one launch.

    Args:
        q_c: pooled queries, float32 ``[B, H, N, D]``.
        k_c: pooled keys, float32 ``[B, G, M, D]``.
        v_c: pooled values, float32 ``[B, G, M, D]``, or None where no coarse output is wanted.
        allowed: int32 bitmask ``[1 or B, 1 or H, N, W]`` of the tiles that may be chosen and take part in the softmax.
        kv_counts: int32 ``[M]`` or ``[B, M]`` valid tokens of the KV tiles; None where neither flag needs it.
        count_bias: whether ``log(valid tokens)`` is added to the scores.
        alive: whether tiles without valid tokens are not allowed.
        scale: softmax scale.
        rule, value, min_tiles, capacity: as for `selection.select_scores`.

    Returns:
        bits int32 ``[B, H, N, W]``, counts int32 ``[B, H, N]`` of what is kept, wanted int32 ``[B, H, N]`` before the
        capacity, and, or None without ``v_c``, the coarse output float32 ``[B, H, N, D]`` (0 for a row that allows
        nothing) and the natural log-sum-exp of its scores float32 ``[B, H, N]`` (-inf there).
    """
    B, H, N, D = q_c.shape
    G, M = k_c.shape[1:3]
    blocks, options = config(D, M)
    words = words_of(M)
    row_blocks = B * H * triton.cdiv(N, blocks["ROWS"])
    programs = min(row_blocks, _programs(q_c.device))
    integer: dict[str, Any] = {"dtype": torch.int32, "device": q_c.device}
    bits = torch.empty((B, H, N, words), **integer)
    counts, wanted = (torch.empty((B, H, N), **integer) for _ in range(2))
    workspace = torch.empty((programs, blocks["ROWS"], blocks["M_BLOCK"]), **integer)
    coarse = lse = None
    if v_c is not None:
        coarse, lse = q_c.new_empty((B, H, N, D)), q_c.new_empty((B, H, N))
    allowed = None if allowed is None else allowed.contiguous()
    kv_counts = bits if kv_counts is None else kv_counts.contiguous()
    number, strides = value_arguments(rule_value(rule, value), (B, H, N))
    launch(
        select_kernel,
        (programs,),
        q_c.contiguous(),
        k_c.contiguous(),
        q_c if v_c is None else v_c.contiguous(),
        bits if allowed is None else allowed,
        kv_counts,
        number,
        bits,
        counts,
        wanted,
        q_c if coarse is None else coarse,
        q_c if lse is None else lse,
        workspace,
        scale,
        row_blocks,
        H,
        H // G,
        N,
        M,
        words,
        min_tiles,
        capacity,
        *allowed_strides(allowed),
        kv_counts.stride(0) if kv_counts.dim() == 2 else 0,
        *strides,
        RULE=rule,
        VALUE_IN_MEMORY=isinstance(number, Tensor),
        COARSE=v_c is not None,
        ALLOWED=allowed is not None,
        ALIVE=alive,
        COUNT_BIAS=count_bias,
        D=D,
        **blocks,
        **options,
    )
    return bits, counts, wanted, coarse, lse


def select_reference(
    q_c: Tensor,
    k_c: Tensor,
    v_c: Tensor | None,
    *,
    allowed: Tensor | None,
    kv_counts: Tensor | None,
    count_bias: bool,
    alive: bool,
    scale: float,
    **choice: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """`select` in plain torch."""
    scores, mask = scores_reference(q_c, k_c, kv_counts, count_bias, alive, allowed, scale)
    chosen = select_scores_reference(scores, allowed=pack_bits(mask), **choice)
    return *chosen, *((None, None) if v_c is None else coarse_reference(scores, mask, v_c))


def compilations(long_tail: bool) -> list[Compilation]:
    """Configurations of `select_kernel` to compile offline."""
    cases = [("top_k", True, 128, M) for M in (256, 1024, 2048)] + [("top_k", True, 64, 1024)]
    cases += [("normal", False, 128, 2048), ("mass", True, 128, 1024)]
    auto = len(cases)
    if long_tail:
        cases += [("top_k", True, 64, M) for M in (256, 2048)] + [("normal", False, 128, 256)]
        auto = len(cases)
        cases += [("top_k", True, D, 512) for D in (32, 96, 256)]
        cases += [("probability", False, 64, 512), ("all", True, 64, 32), ("mass", True, 128, 16384)]
    return [_compilation(*case, auto=i < auto) for i, case in enumerate(cases)]


def _compilation(rule: str, coarse: bool, D: int, M: int, auto: bool) -> Compilation:
    blocks, options = config(D, M)
    constants: dict[str, Any] = {
        "RULE": rule,
        "VALUE_IN_MEMORY": False,
        "COARSE": coarse,
        "ALLOWED": True,
        "ALIVE": True,
        "COUNT_BIAS": rule == "top_k",
        "D": D,
        **blocks,
    }
    pointers = dict.fromkeys(("q", "k", "v", "coarse", "lse"), "*fp32")
    pointers |= dict.fromkeys(("allowed", "kv_counts", "bits", "counts", "wanted", "workspace"), "*i32")
    types = {**pointers, "scale": "fp32", "value": "i32" if rule in ("top_k", "all") else "fp32"}
    return Compilation(
        kernel=select_kernel,
        config={"rule": rule, "coarse": coarse, "D": D, "M": M},
        signature={n: "constexpr" if n in constants else types.get(n, "i32") for n in select_kernel.arg_names},
        constants=constants,
        aligned=tuple(pointers),
        **options,
        auto=auto,
    )
