"""Mean of the valid tokens of each tile, of q, k and v in one launch.

Shape letters: B batch, X heads of a part, N tiles of a part, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.compile_passes.templates.launch import Compilation, launch

MAX_PARTS = 3
FOLLOW_THE_GRID = ("programs", "heads", "tiles", "counts_stride_b")  # integers that recompile nothing

Part = tuple[Tensor, Tensor, bool]


@triton.jit
def pool_tiles(
    x,
    tokens,
    counts,
    out,
    block,
    heads,
    tiles,
    stride_b,
    stride_h,
    stride_n,
    stride_s,
    counts_stride_b,
    SLOTS: tl.constexpr,
    MASKED: tl.constexpr,
    TILES: tl.constexpr,
    SLOT_BLOCK: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
):
    """Pool TILES consecutive tiles of one head; ``tokens`` are those in each slot (-1: none) where they lie in raster order."""
    blocks = tl.cdiv(tiles, TILES)
    head = (block // blocks).to(tl.int64)
    b = head // heads
    tile = (block % blocks) * TILES + tl.arange(0, TILES)
    d = tl.arange(0, D_BLOCK)
    count = tl.load(counts + b * counts_stride_b + tile, mask=tile < tiles, other=0)
    if MASKED:
        limit = tl.minimum(count, SLOTS)
    else:
        limit = tl.full([TILES], SLOTS, tl.int32)
    limit = tl.where(tile < tiles, limit, 0)
    tile_at = x + b * stride_b + (head % heads) * stride_h + tile.to(tl.int64) * stride_n
    total = tl.zeros([TILES, D_BLOCK], tl.float32)
    for first in range(0, SLOTS, SLOT_BLOCK):
        slot = first + tl.arange(0, SLOT_BLOCK)
        seen = slot[None, :] < limit[:, None]
        if tokens is None:
            at = tile_at[:, None, None] + slot[None, :, None] * stride_s + d[None, None, :]
        else:
            token = tl.load(tokens + tile[:, None] * SLOTS + slot[None, :], mask=seen, other=-1)
            seen = token >= 0
            head_at = x + b * stride_b + (head % heads) * stride_h
            at = head_at + (token.to(tl.int64) * stride_s)[:, :, None] + d[None, None, :]
        values = tl.load(at, mask=seen[:, :, None] & (d < D)[None, None, :], other=0.0)
        total += tl.sum(values.to(tl.float32), 1)
    mean = tl.div_rn(total, tl.maximum(count, 1).to(tl.float32)[:, None] + tl.zeros_like(total))
    out_at = out + (head * tiles + tile)[:, None] * D + d[None, :]
    tl.store(out_at, mean, mask=(tile < tiles)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=[f"{name}{part}" for name in FOLLOW_THE_GRID for part in range(MAX_PARTS)])
def pool_kernel(
    x0,
    tokens0,
    counts0,
    out0,
    programs0,
    heads0,
    tiles0,
    stride_b0,
    stride_h0,
    stride_n0,
    stride_s0,
    counts_stride_b0,
    x1,
    tokens1,
    counts1,
    out1,
    programs1,
    heads1,
    tiles1,
    stride_b1,
    stride_h1,
    stride_n1,
    stride_s1,
    counts_stride_b1,
    x2,
    tokens2,
    counts2,
    out2,
    programs2,
    heads2,
    tiles2,
    stride_b2,
    stride_h2,
    stride_n2,
    stride_s2,
    counts_stride_b2,
    SLOTS0: tl.constexpr,
    MASKED0: tl.constexpr,
    TILES0: tl.constexpr,
    SLOT_BLOCK0: tl.constexpr,
    SLOTS1: tl.constexpr,
    MASKED1: tl.constexpr,
    TILES1: tl.constexpr,
    SLOT_BLOCK1: tl.constexpr,
    SLOTS2: tl.constexpr,
    MASKED2: tl.constexpr,
    TILES2: tl.constexpr,
    SLOT_BLOCK2: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
):
    """The first programs pool part 0, the next part 1, the last part 2."""
    program = tl.program_id(0)
    if program < programs0:
        pool_tiles(
            x0, tokens0, counts0, out0, program, heads0, tiles0, stride_b0, stride_h0, stride_n0, stride_s0, counts_stride_b0,
            SLOTS0, MASKED0, TILES0, SLOT_BLOCK0, D, D_BLOCK,
        )  # fmt: skip
    elif program < programs0 + programs1:
        pool_tiles(
            x1, tokens1, counts1, out1, program - programs0, heads1, tiles1, stride_b1, stride_h1, stride_n1, stride_s1,
            counts_stride_b1, SLOTS1, MASKED1, TILES1, SLOT_BLOCK1, D, D_BLOCK,
        )  # fmt: skip
    else:
        pool_tiles(
            x2, tokens2, counts2, out2, program - programs0 - programs1, heads2, tiles2, stride_b2, stride_h2, stride_n2,
            stride_s2, counts_stride_b2, SLOTS2, MASKED2, TILES2, SLOT_BLOCK2, D, D_BLOCK,
        )  # fmt: skip


def config(slots: int, D: int) -> tuple[int, int]:
    """Tiles of a program, and slots that it loads at once: about 16 KiB of a 16-bit type are in flight."""
    rows = max(1, 8192 // triton.next_power_of_2(D))
    slot_block = min(triton.next_power_of_2(slots), rows, 64)
    return max(1, min(rows, 64) // slot_block), slot_block


def pool(parts: Sequence[Part], tables: Sequence[Tensor | None] = (None,) * MAX_PARTS) -> list[Tensor]:
    """Pool up to three parts in one launch; sums are float32, in a fixed order.

    Args:
        parts: for each its tokens ``[B, X, N, slots, D]`` (float32, bfloat16 or float16, any strides), the counts of
            its tiles int32 ``[N]`` or ``[B, N]``, and whether to sum only the first ``count`` slots: if not, slots
            past the count must hold zeros. D is the same in all.
        tables: for each, int32 ``[N, slots]``, the token in each slot (-1: none), where its tokens are ``[B, X, S, D]`` in
            raster order; or None.

    Returns:
        For each part float32 ``[B, X, N, D]``, the sum over the slots divided by ``max(count, 1)``.
    """
    if not 1 <= len(parts) <= MAX_PARTS:
        raise ValueError(f"there are {len(parts)} parts: give 1 to {MAX_PARTS}")
    D = parts[0][0].shape[-1]
    arguments: list[Any] = []
    outs: list[Tensor] = []
    meta: dict[str, Any] = {"D": D, "D_BLOCK": triton.next_power_of_2(D)}
    programs = 0
    for i in range(MAX_PARTS):
        last = min(i, len(parts) - 1)
        (x, counts, masked), table = parts[last], tables[last]  # a missing part repeats the last, with no program
        x = x if x.stride(-1) == 1 else x.contiguous()
        counts = counts.contiguous()
        B, heads = x.shape[:2]
        tiles, slots = x.shape[2:4] if table is None else table.shape
        if table is None and (slots - 1) * x.stride(3) >= 1 << 31:  # the kernel counts slots of a tile in 32 bits
            x = x.contiguous()
        strides = x.stride()[:4] if table is None else (*x.stride()[:2], 0, x.stride(2))
        tile_block, slot_block = config(slots, D)
        part_programs = 0
        if i < len(parts):
            part_programs = B * heads * triton.cdiv(tiles, tile_block)
            outs.append(torch.empty((B, heads, tiles, D), dtype=torch.float32, device=x.device))
        counts_stride = counts.stride(0) if counts.dim() == 2 else 0
        table = None if table is None else table.contiguous()
        arguments += [x, table, counts, outs[-1], part_programs, heads, tiles, *strides, counts_stride]
        meta |= {f"SLOTS{i}": slots, f"MASKED{i}": masked, f"TILES{i}": tile_block, f"SLOT_BLOCK{i}": slot_block}
        programs += part_programs
    launch(pool_kernel, (programs,), *arguments, **meta, num_warps=4)
    return outs


def pool_reference(parts: Sequence[Part], tables: Sequence[Tensor | None] = (None,) * MAX_PARTS) -> list[Tensor]:
    """`pool` in plain torch; float64 stays float64."""
    outs = []
    for (x, counts, masked), table in zip(parts, tables):
        if table is not None:
            x = x[:, :, table.clamp_min(0).long()].masked_fill((table < 0)[..., None], 0)
        counts = counts.expand(x.shape[0], x.shape[2])[:, None, :, None]
        if masked:
            x = x.masked_fill((torch.arange(x.shape[3], device=x.device) >= counts)[..., None], 0)
        total = x.sum(3, dtype=torch.promote_types(x.dtype, torch.float32))
        outs.append(total / counts.clamp_min(1).to(total.dtype))
    return outs


def compilations(long_tail: bool) -> list[Compilation]:
    """Configurations of `pool_kernel` to compile offline."""
    cases = [("bf16", D, slots, False) for D in (64, 128) for slots in (64, 128)] + [("fp16", 128, 64, False)]
    auto = len(cases)
    if long_tail:
        cases += [("fp16", D, slots, False) for D, slots in ((64, 64), (64, 128), (128, 128))]
        cases += [("bf16", 128, 64, True), ("bf16", 128, 16, False)]
        auto = len(cases)
        cases += [("fp32", D, 64, True) for D in (32, 64, 96, 128, 256)]
        cases += [("bf16", D, 64, True) for D in (32, 96, 256)]
        cases += [("bf16", 128, slots, True) for slots in (1, 16, 32, 256)]
    found = [_compilation(*case, auto=i < auto) for i, case in enumerate(cases)]
    in_raster = [("bf16", D, 64, False) for D in (64, 128)] + [("bf16", 128, 128, False)]
    return found + [_compilation(*case, auto=True, raster=True) for case in in_raster]


def _compilation(dtype: str, D: int, slots: int, masked: bool, auto: bool, raster: bool = False) -> Compilation:
    tile_block, slot_block = config(slots, D)
    constants: dict[str, Any] = {"D": D, "D_BLOCK": triton.next_power_of_2(D)}
    types: dict[str, str] = {}
    for i in range(MAX_PARTS):
        part = {"SLOTS": slots, "MASKED": masked, "TILES": tile_block, "SLOT_BLOCK": slot_block}
        constants |= {f"{name}{i}": value for name, value in part.items()}
        if not raster:
            constants[f"tokens{i}"] = None
        types |= {f"x{i}": f"*{dtype}", f"counts{i}": "*i32", f"tokens{i}": "*i32", f"out{i}": "*fp32"}
    names = pool_kernel.arg_names
    return Compilation(
        kernel=pool_kernel,
        config={"dtype": dtype, "D": D, "slots": slots, "masked": masked} | ({"raster": True} if raster else {}),
        signature={n: "constexpr" if n in constants else types.get(n, "i32") for n in names},
        constants=constants,
        aligned=(*types, *(n for n in names if n.startswith("stride_"))),
        auto=auto,
    )
