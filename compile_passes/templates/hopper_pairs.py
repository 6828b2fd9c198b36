"""The fine stage's forward on Hopper by pairs of blocks that share what they read, in bf16 and fp16: tiles of 64 query rows
with their neighbour in time, tiles of 128 as two halves.

Shape letters: B batch, H query heads, G KV heads, N query tiles, M KV video tiles, U all KV tiles, R query rows,
D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexsparse.compile_passes.templates import hopper_pair_kernels
from flexsparse.compile_passes.templates.attention_common import Blocks, flags
from flexsparse.compile_passes.templates.attention_shapes import AttentionCompilation, Shape, compilation
from flexsparse.compile_passes.templates.hopper_forward import _boxes, _copyable, with_boxes
from flexsparse.compile_passes.templates.launch import LOG2E, Compilation, launch
from flexsparse.compile_passes.templates.lists import ascending
from flexsparse.compile_passes.templates.pair_lists import pair_lists
from flexsparse.compile_passes.templates.rows import new_rows

ARCHS = ("sm_90a",)
"""What the kernel compiles for."""
ROWS = 64
KEYS = 64
STAGES = {128: (6,), 64: (8, 12)}
"""Buffers of keys and values worth trying, by head dim: what fits beside the queries."""
REGISTERS = {"REGISTERS": 232, "PRODUCER_REGISTERS": 40}
"""Of a thread: together all that an SM has, for one program an SM."""


def refuses(dtype: torch.dtype, D: int, query_rows: int, slots: int, size: Blocks, scale: float = 1.0) -> str | None:
    """Why the kernel cannot do a case with these blocks; None where it can. Everything else that `forward` takes it takes."""
    if dtype not in (torch.bfloat16, torch.float16) or D not in STAGES:
        return f"computes bf16 and fp16 of head dim 64 and 128, not {dtype} of {D}"
    if query_rows not in (ROWS, 2 * ROWS) or slots % KEYS:
        return f"pairs blocks of 64 rows and takes 64 slots a step, not tiles of {query_rows} rows and {slots} slots"
    if (size.rows, size.keys, size.num_warps) != (ROWS, KEYS, 4):
        return f"has 64 rows, 64 slots and 4 warps a block, not {size.rows}, {size.keys} and {size.num_warps}"
    if size.num_stages < 6 or size.num_stages % 2:
        return f"takes an even number of stages, at least 6, not {size.num_stages}"
    if not 0 < scale < float("inf"):
        return f"finds the largest logit before it multiplies with the scale, which therefore is positive, not {scale}"
    return None


def sizes(D: int, query_rows: int, slots: int) -> list[Blocks]:
    """Blocks worth trying for a shape, the most promising first; none where the kernel refuses it."""
    found = [Blocks(rows=ROWS, keys=KEYS, num_warps=4, num_stages=stages) for stages in STAGES.get(D, ())]
    return [size for size in found if refuses(torch.bfloat16, D, query_rows, slots, size) is None]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    counts: Tensor,
    kv_counts: Tensor,
    coarse: Tensor | None,
    gate: Tensor | None,
    *,
    size: Blocks,
    query_rows: int,
    first_rows: int,
    kv_first: int,
    kv_video: int,
    slots: int,
    capacity: int,
    scale: float,
    partial: bool,
    frame_tiles: int = 1,
    token_major: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `forward.forward`, on a Hopper GPU.

    Args:
        size: block sizes and warps; its ``num_stages`` are buffers of keys and of values. The others are as there.

    Raises:
        ValueError: a case that the kernel refuses.
    """
    B, H, R, D = q.shape
    refusal = refuses(q.dtype, D, query_rows, slots, size, scale)
    if refusal is not None:
        raise ValueError(f"the Hopper forward by pairs {refusal}: use the plain Triton kernel")
    N, U = counts.shape[2], k.shape[2] // slots
    out, lse = new_rows(q, token_major), q.new_empty((B, H, R), dtype=torch.float32)
    if not q.numel():
        return out, lse
    halves = query_rows == 2 * ROWS
    if halves:
        lists, lengths = ascending(bits, counts, kv_video, capacity), counts.contiguous()
        programs = R // query_rows
    else:
        lists, lengths = pair_lists(bits, counts, kv_video, capacity, frame_tiles)
        programs = (R // ROWS - N + 1) // 2 + (N + 1) // 2
    gates = None if gate is None or coarse is None else _boxes(_copyable(gate), ROWS)
    keys, values = (_boxes(_copyable(x), KEYS, slots) for x in (k, v))
    constants = flags(q, k, bits, query_rows, kv_video, slots, partial)
    for name in ("BLOCK_D", "QUERY_ROWS"):  # here D is never padded, and a tile is one block or two
        del constants[name]
    launch(
        hopper_pair_kernels.hopper_pair_forward,
        (programs, H, B),
        _boxes(_copyable(q), ROWS),
        keys,
        values,
        gates,
        _boxes(out, ROWS),
        lists,
        lengths,
        kv_counts,
        None if gates is None or coarse is None else coarse.contiguous(),
        lse,
        scale * LOG2E,
        H,
        N,
        kv_video,
        U,
        R,
        first_rows,
        kv_first,
        lists.shape[3],
        frame_tiles,
        kv_counts.stride(0),
        GROUP=H // k.shape[1],
        ROWS=ROWS,
        KEYS=KEYS,
        STAGES=size.num_stages,
        HALVES=halves,
        COARSE=gates is not None,
        **constants,
        **REGISTERS,
        num_warps=size.num_warps,
    )
    return out, lse


def compilations(long_tail: bool) -> list[Compilation]:
    """What to compile offline. All of it may become a choice, and is held to the same rules as what already is."""
    found = [Shape(full=True), Shape(), Shape(query_rows=128, slots=128, full=True), Shape(D=64)]
    if long_tail:
        tiles = [(64, 64), (128, 128), (64, 128), (128, 64)]
        every = [Shape(D=D, query_rows=rows, slots=slots) for D in (64, 128) for rows, slots in tiles]
        every += [Shape(dtype=torch.float16), Shape(group=2), Shape(D=64, full=True)]
        found += [shape for shape in every if shape not in found]
    return [_compilation(shape, size) for shape in found for size in sizes(shape.D, shape.query_rows, shape.slots)]


def _compilation(shape: Shape, size: Blocks) -> AttentionCompilation:
    absent: dict[str, Any] = {"gates": None, "coarse": None} if shape.full else {}
    base = compilation(
        hopper_pair_kernels.hopper_pair_forward,
        shape,
        size,
        STAGES=size.num_stages,
        HALVES=shape.query_rows == 2 * ROWS,
        COARSE=not shape.full,
        **REGISTERS,
        **absent,
    )
    return with_boxes(base, shape, size, config=base.config | {"stages": size.num_stages})
