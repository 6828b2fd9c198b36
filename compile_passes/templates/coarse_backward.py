"""Gradients of the coarse output and of pooling; weights are computed again from the log-sum-exp, never stored.

Shape letters: B batch, H query heads, G KV heads (query head h reads KV head ``h // (H // G)``), N query tiles, M KV
tiles, D head dim, W words of a bitmask row, X heads of what was pooled.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.compile_passes.templates.launch import SIZES, Compilation, launch
from flexsparse.compile_passes.templates.scoring import (
    coarse_reference,
    dot_rows,
    half_of,
    load_rows,
    score_block,
    scores_reference,
    store_rows,
)
from flexsparse.compile_passes.templates.selection import allowed_strides
from flexsparse.tile_bits import words_of


@triton.jit
def weight_block(scores, inside, lse):
    """Softmax weights from scores and the rows' log-sum-exp; zero for what is not allowed."""
    finite = tl.where(lse == float("-inf"), 0.0, lse)  # a row that allows nothing
    return tl.where(inside, tl.exp(scores - finite), 0.0)


@triton.jit(do_not_specialize=SIZES)
def coarse_dq_kernel(
    d_coarse,
    q,
    k,
    v,
    coarse,
    lse,
    allowed,
    kv_counts,
    dq,
    delta,
    scale,
    heads,
    group,
    N,
    M,
    words,
    allowed_stride_b,
    allowed_stride_h,
    counts_stride_b,
    ALLOWED: tl.constexpr,
    ALIVE: tl.constexpr,
    COUNT_BIAS: tl.constexpr,
    D: tl.constexpr,
    D_HALF: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dq of ROWS rows, and delta = rowsum(d_coarse * coarse), which the other kernel reads."""
    row_blocks = tl.cdiv(N, ROWS)
    bh = (tl.program_id(0) // row_blocks).to(tl.int64)
    row = (tl.program_id(0) % row_blocks) * ROWS + tl.arange(0, ROWS)
    kv_offset = (bh // group) * M * D
    allowed += (bh // heads) * allowed_stride_b + (bh % heads) * allowed_stride_h
    kv_counts += (bh // heads) * counts_stride_b
    q_low, q_high = load_rows(q + bh * N * D, row, N, D, D_HALF)
    d_low, d_high = load_rows(d_coarse + bh * N * D, row, N, D, D_HALF)
    out_low, out_high = load_rows(coarse + bh * N * D, row, N, D, D_HALF)
    row_delta = tl.sum(d_low * out_low, 1) + tl.sum(d_high * out_high, 1)
    tl.store(delta + bh * N + row, row_delta, mask=row < N)
    row_lse = tl.load(lse + bh * N + row, mask=row < N, other=0.0)
    dq_low = tl.zeros([ROWS, D_HALF], tl.float32)
    dq_high = tl.zeros([ROWS, D_HALF], tl.float32)
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
            allowed,
            kv_counts,
            scale,
            N,
            M,
            words,
            ALLOWED,
            ALIVE,
            COUNT_BIAS,
        )
        weights = weight_block(scores, inside, row_lse[:, None])
        v_low, v_high = load_rows(v + kv_offset, column, M, D, D_HALF)
        d_weights = dot_rows(d_low, d_high, v_low, v_high)
        d_scores = weights * (d_weights - row_delta[:, None])
        dq_low = tl.dot(d_scores, k_low, dq_low, input_precision="tf32x3")
        dq_high = tl.dot(d_scores, k_high, dq_high, input_precision="tf32x3")
    store_rows(dq + bh * N * D, dq_low * scale, dq_high * scale, row, N, D, D_HALF)


@triton.jit(do_not_specialize=SIZES)
def coarse_dkv_kernel(
    d_coarse,
    q,
    k,
    v,
    lse,
    delta,
    allowed,
    kv_counts,
    dk,
    dv,
    scale,
    heads,
    group,
    N,
    M,
    words,
    allowed_stride_b,
    allowed_stride_h,
    counts_stride_b,
    ALLOWED: tl.constexpr,
    ALIVE: tl.constexpr,
    COUNT_BIAS: tl.constexpr,
    D: tl.constexpr,
    D_HALF: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dk and dv of COLUMNS tiles, summed over the rows of every query head of the group."""
    column_blocks = tl.cdiv(M, COLUMNS)
    bg = (tl.program_id(0) // column_blocks).to(tl.int64)
    first = (tl.program_id(0) % column_blocks) * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    b = bg // (heads // group)
    allowed += b * allowed_stride_b
    kv_counts += b * counts_stride_b
    k_low, k_high = load_rows(k + bg * M * D, column, M, D, D_HALF)
    v_low, v_high = load_rows(v + bg * M * D, column, M, D, D_HALF)
    dk_low = tl.zeros([COLUMNS, D_HALF], tl.float32)
    dk_high = tl.zeros([COLUMNS, D_HALF], tl.float32)
    dv_low = tl.zeros([COLUMNS, D_HALF], tl.float32)
    dv_high = tl.zeros([COLUMNS, D_HALF], tl.float32)
    row_blocks = tl.cdiv(N, ROWS)
    for step in range(group * row_blocks):
        bh = bg * group + step // row_blocks
        row = (step % row_blocks) * ROWS + tl.arange(0, ROWS)
        q_low, q_high = load_rows(q + bh * N * D, row, N, D, D_HALF)
        d_low, d_high = load_rows(d_coarse + bh * N * D, row, N, D, D_HALF)
        row_lse = tl.load(lse + bh * N + row, mask=row < N, other=0.0)
        row_delta = tl.load(delta + bh * N + row, mask=row < N, other=0.0)
        # transposed: what is summed over rows is then the left operand of its product
        scores, inside = score_block(
            k_low,
            k_high,
            q_low,
            q_high,
            row[None, :],
            column[:, None],
            first,
            allowed + (bh % heads) * allowed_stride_h,
            kv_counts,
            scale,
            N,
            M,
            words,
            ALLOWED,
            ALIVE,
            COUNT_BIAS,
        )
        weights = weight_block(scores, inside, row_lse[None, :])
        dv_low = tl.dot(weights, d_low, dv_low, input_precision="tf32x3")
        dv_high = tl.dot(weights, d_high, dv_high, input_precision="tf32x3")
        d_weights = dot_rows(v_low, v_high, d_low, d_high)
        d_scores = weights * (d_weights - row_delta[None, :])
        dk_low = tl.dot(d_scores, q_low, dk_low, input_precision="tf32x3")
        dk_high = tl.dot(d_scores, q_high, dk_high, input_precision="tf32x3")
    store_rows(dk + bg * M * D, dk_low * scale, dk_high * scale, column, M, D, D_HALF)
    store_rows(dv + bg * M * D, dv_low, dv_high, column, M, D, D_HALF)


def config(D: int) -> tuple[dict[str, int], dict[str, int]]:
    """Block sizes and launch options of the dq kernel, and of the other one."""
    common = {"D_HALF": half_of(D), "num_warps": 4}
    # 3xTF32 holds its operands twice: larger blocks would spill, and so would prefetching for dk and dv of a wide head;
    # dq's would take more than the 99 KiB of some GPUs
    dq = {**common, "ROWS": 16, "COLUMNS": 32, "num_stages": 3 if D <= 128 else 1}
    return dq, {**common, "ROWS": 32, "COLUMNS": 16, "num_stages": 3 if D <= 64 else 1}


def coarse_backward(
    d_coarse: Tensor,
    q_c: Tensor,
    k_c: Tensor,
    v_c: Tensor,
    coarse: Tensor,
    coarse_lse: Tensor,
    *,
    allowed: Tensor | None,
    kv_counts: Tensor | None,
    count_bias: bool,
    alive: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the coarse output of `select.select`, in two launches; the same bits every time.

    Args:
        d_coarse: gradient of the coarse output, float32 ``[B, H, N, D]``.
        q_c: float32 ``[B, H, N, D]``; k_c, v_c: float32 ``[B, G, M, D]``.
        coarse: the coarse output, float32 ``[B, H, N, D]``.
        coarse_lse: its log-sum-exp, float32 ``[B, H, N]``.
        allowed, kv_counts, count_bias, alive, scale: as in the forward call.

    Returns:
        dq_c ``[B, H, N, D]``, dk_c and dv_c ``[B, G, M, D]``, float32. A row that allows nothing adds nothing.
    """
    B, H, N, D = q_c.shape
    G, M = k_c.shape[1:3]
    dq_config, dkv_config = config(D)
    d_coarse, q_c, k_c, v_c = (x.contiguous() for x in (d_coarse, q_c, k_c, v_c))
    coarse_lse = coarse_lse.contiguous()
    dq, dk, dv = (torch.empty_like(x) for x in (q_c, k_c, v_c))
    delta = torch.empty_like(coarse_lse)
    flags = {"ALLOWED": allowed is not None, "ALIVE": alive, "COUNT_BIAS": count_bias, "D": D}
    allowed = None if allowed is None else allowed.contiguous()
    strides = allowed_strides(allowed)
    allowed = coarse_lse if allowed is None else allowed
    kv_counts = coarse_lse if kv_counts is None else kv_counts.contiguous()
    strides.append(kv_counts.stride(0) if kv_counts.dim() == 2 else 0)
    shape = (scale, H, H // G, N, M, words_of(M), *strides)
    launch(
        coarse_dq_kernel,
        (B * H * triton.cdiv(N, dq_config["ROWS"]),),
        d_coarse,
        q_c,
        k_c,
        v_c,
        coarse.contiguous(),
        coarse_lse,
        allowed,
        kv_counts,
        dq,
        delta,
        *shape,
        **flags,
        **dq_config,
    )
    launch(
        coarse_dkv_kernel,
        (B * G * triton.cdiv(M, dkv_config["COLUMNS"]),),
        d_coarse,
        q_c,
        k_c,
        v_c,
        coarse_lse,
        delta,
        allowed,
        kv_counts,
        dk,
        dv,
        *shape,
        **flags,
        **dkv_config,
    )
    return dq, dk, dv


def coarse_backward_reference(
    d_coarse: Tensor,
    q_c: Tensor,
    k_c: Tensor,
    v_c: Tensor,
    *,
    allowed: Tensor | None,
    kv_counts: Tensor | None,
    count_bias: bool,
    alive: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`coarse_backward` by plain torch's autograd, in the dtype of its inputs."""
    leaves = [x.detach().requires_grad_() for x in (q_c, k_c, v_c)]
    with torch.enable_grad():
        scores, mask = scores_reference(leaves[0], leaves[1], kv_counts, count_bias, alive, allowed, scale)
        coarse, _ = coarse_reference(scores, mask, leaves[2])
    dq, dk, dv = torch.autograd.grad(coarse, leaves, d_coarse)
    return dq, dk, dv


def unpool(d: Tensor, counts: Tensor, slots: int, masked: bool, dtype: torch.dtype) -> Tensor:
    """Gradient of pooling: each slot gets its tile's, divided by ``max(count, 1)``.

    Args:
        d: gradient of the pooled vectors, float32 ``[B, X, N, D]``.
        counts: int32 ``[N]`` or ``[B, N]``.
        slots: slots of a tile.
        masked: whether slots past the count were left out, and get zero.
        dtype: of the result.

    Returns:
        ``[B, X, N, slots, D]``, a view with stride 0 over the slots where not masked.
    """
    B, X, N, D = d.shape
    counts = counts.expand(B, N)[:, None, :, None]
    share = (d / counts.clamp_min(1)).to(dtype)[..., None, :].expand(B, X, N, slots, D)
    if not masked:
        return share
    return share.masked_fill((torch.arange(slots, device=d.device) >= counts)[..., None], 0)


def compilations(long_tail: bool) -> list[Compilation]:
    """Configurations of both kernels to compile offline."""
    cases = [(64, True), (128, False), (128, True)]
    auto = len(cases)
    if long_tail:
        cases += [(64, False)]
        auto = len(cases)
        cases += [(D, flag) for D in (32, 96, 256) for flag in (False, True)]
    kernels = (coarse_dq_kernel, coarse_dkv_kernel)
    return [_compilation(kernel, *case, auto=i < auto) for kernel in kernels for i, case in enumerate(cases)]


def _compilation(kernel: Any, D: int, flag: bool, auto: bool) -> Compilation:
    blocks = config(D)[0 if kernel is coarse_dq_kernel else 1]
    options = {name: blocks.pop(name) for name in ("num_warps", "num_stages")}
    constants: dict[str, Any] = {"ALLOWED": flag, "ALIVE": flag, "COUNT_BIAS": flag, "D": D, **blocks}
    pointers = dict.fromkeys(("d_coarse", "q", "k", "v", "coarse", "lse", "dq", "dk", "dv", "delta"), "*fp32")
    pointers |= dict.fromkeys(("allowed", "kv_counts"), "*i32")
    types = {**pointers, "scale": "fp32"}
    names = kernel.arg_names
    return Compilation(
        kernel=kernel,
        config={"D": D, "masked": flag},
        signature={n: "constexpr" if n in constants else types.get(n, "i32") for n in names},
        constants=constants,
        aligned=tuple(n for n in names if n in pointers),
        **options,
        auto=auto,
    )
