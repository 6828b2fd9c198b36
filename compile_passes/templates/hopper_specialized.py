"""The fine stage's backward on Hopper with a warp that only copies: what `hopper_backward` computes, to the same bits.

A program has one warp more for it, which Gluon makes four; registers are dealt out anew as it starts (`PRODUCER_REGISTERS`).

Shape letters: B batch, H query heads, G KV heads, N query tiles, M KV video tiles, U all KV tiles, R query rows, K list
length, D head dim.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flexsparse.compile_passes.templates import hopper_backward, hopper_specialized_columns, hopper_specialized_rows
from flexsparse.compile_passes.templates.attention_common import Blocks
from flexsparse.compile_passes.templates.attention_shapes import AttentionCompilation, Shape
from flexsparse.compile_passes.templates.hopper_backward import _compilation, _constants, _operands
from flexsparse.compile_passes.templates.hopper_forward import _box, _boxes
from flexsparse.compile_passes.templates.launch import LOG2E, Compilation, launch

if TYPE_CHECKING:
    from flexsparse.compile_passes.templates.walks import Walk

ARCHS = ("sm_90a",)
"""What the kernels compile for."""
PRODUCER_REGISTERS = 24
"""Of a thread that only copies: the fewest that there can be."""
MOST_STAGES = 4
"""Buffers of a ring at most: at D=128 more have no room beside 128 rows or slots."""
COUNTS = 32
"""Int32 values that a copy brings where one is wanted: buffers start at multiples of 128 bytes."""
STAGES = {128: 2, 64: 4}
"""Buffers of a ring where two programs share an SM's memory, by head dim."""


def dq_refuses(dtype: torch.dtype, D: int, query_rows: int, slots: int, size: Blocks) -> str | None:
    """As `hopper_backward.dq_refuses`, of `dq` here."""
    return hopper_backward.dq_refuses(dtype, D, query_rows, slots, size, MOST_STAGES)


def dkdv_refuses(dtype: torch.dtype, D: int, query_rows: int, slots: int, size: Blocks) -> str | None:
    """As `hopper_backward.dkdv_refuses`, of `dkdv` here."""
    return hopper_backward.dkdv_refuses(dtype, D, query_rows, slots, size, MOST_STAGES)


def dq_sizes(D: int, query_rows: int, slots: int) -> list[Blocks]:
    """Blocks worth trying for `dq`, the most promising first; none where it refuses the shape.

    64 rows leave two programs an SM, 128 rows one, with all the shared memory there is.
    """
    found = [Blocks(rows=n, keys=64, num_warps=n // 16, num_stages=_stages(D, n)) for n in (64, 128)]
    return [size for size in found if dq_refuses(torch.bfloat16, D, query_rows, slots, size) is None]


def dkdv_sizes(D: int, query_rows: int, slots: int) -> list[Blocks]:
    """As `dq_sizes`, of `dkdv`; tiles of 128 slots are not halved, for which one full tile's configuration spills."""
    n = 64 if slots % 128 else 128
    size = Blocks(rows=64, keys=n, num_warps=n // 16, num_stages=_stages(D, n))
    return [size] if dkdv_refuses(torch.bfloat16, D, query_rows, slots, size) is None else []


def _stages(D: int, length: int) -> int:
    return STAGES.get(D, MOST_STAGES) if length == 64 else MOST_STAGES


def options(size: Blocks) -> dict[str, int]:
    """Registers at launch, as one of `launch`'s options: two programs of eight warps have 128 each, one of twelve 168."""
    return {"maxnreg": 128 if size.num_warps == 4 else 168}


def dq(walk: Walk, lists: Tensor, size: Blocks) -> Tensor:
    """As `hopper_backward.dq`; ``num_stages`` are buffers of the ring."""
    q, k = walk.rows["q"], walk.rows["k"]
    B, H, R, D = q.shape
    refusal = dq_refuses(q.dtype, D, walk.query_rows, walk.slots, size)
    if refusal is not None:
        raise ValueError(f"the specialized Hopper kernel of dq {refusal}: use the plain Triton kernel")
    found = torch.empty_like(q)
    if not q.numel():
        return found
    launch(
        hopper_specialized_rows.hopper_specialized_dq,
        (R // size.rows, H, B),
        *_operands(walk, size),
        _boxes(found, size.rows),
        *(walk.lse_log2, walk.delta, walk.estimate, walk.grad_lse, lists, walk.counts, walk.kv_counts),
        _counts(walk.kv_counts) if walk.constants["PARTIAL"] else None,
        *(walk.scale, walk.scale * LOG2E),
        *(H, walk.counts.shape[2], walk.kv_video, k.shape[2] // walk.slots, R),
        *(walk.first_rows, walk.kv_first, walk.capacity),
        LSE_GRADIENT=walk.grad_lse is not None,
        PRODUCER_REGISTERS=PRODUCER_REGISTERS,
        **_constants(walk, size),
        num_warps=size.num_warps,
        **options(size),
    )
    return found


def dkdv(
    walk: Walk,
    offsets: Tensor,
    columns: Tensor,
    indices: Tensor,
    work: Tensor,
    dk: Tensor,
    dv: Tensor,
    workspace: Tensor | None,
    size: Blocks,
) -> None:
    """As `hopper_backward.dkdv`; ``num_stages`` are buffers of the ring."""
    q, k = walk.rows["q"], walk.rows["k"]
    (B, _, R, D), G, U = q.shape, k.shape[1], k.shape[2] // walk.slots
    refusal = dkdv_refuses(q.dtype, D, walk.query_rows, walk.slots, size)
    if refusal is not None:
        raise ValueError(f"the specialized Hopper kernel of dk and dv {refusal}: use the plain Triton kernel")
    if not k.numel():
        return
    launch(
        hopper_specialized_columns.hopper_specialized_dkdv,
        (work.shape[2] * (walk.slots // size.keys), G, B),
        *_operands(walk, size),
        *(_boxes(x, size.keys, walk.slots) for x in (dk, dv)),
        *(_lines(x, size.rows) for x in (walk.lse_log2, walk.delta)),
        *(offsets, columns, indices, work, walk.kv_counts, workspace),
        *(walk.scale, walk.scale * LOG2E),
        *(walk.counts.shape[2], walk.kv_video, U, R, walk.first_rows // walk.query_rows, walk.kv_first, G),
        work.shape[2] - U,
        SPLIT=workspace is not None,
        PRODUCER_REGISTERS=PRODUCER_REGISTERS,
        **_constants(walk, size),
        num_warps=size.num_warps,
        **options(size),
    )


def _line_layout(rank: int) -> Any:
    """Values of a box one after the other."""
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=rank)


def _lines(x: Tensor, rows: int) -> TensorDescriptor:
    """Copies of so many values of one head of a ``[B, H, R]`` array."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows], _line_layout(3))


def _counts(x: Tensor) -> TensorDescriptor:
    """Copies of a count of a ``[B, U]`` array, and of as many behind it as one copy brings at least."""
    flat = x.reshape(1, -1)
    if flat.data_ptr() % 16:
        flat = flat.clone()
    # no copy takes the step from a row to the next, which may therefore be any number that suits the copy engine
    return TensorDescriptor(flat, list(flat.shape), [-(-flat.numel() // 4) * 4, 1], [1, COUNTS], _line_layout(2))


def compilations(long_tail: bool) -> list[Compilation]:
    """What to compile offline. All of it may become a choice, and is held to the same rules as what already is."""
    shapes = [Shape(full=True), Shape(), Shape(query_rows=128, slots=128)]
    more: list[Shape] = []
    if long_tail:
        tiles = [(64, 64), (128, 128), (64, 128), (128, 64)]
        more = [Shape(D=D, query_rows=rows, slots=slots) for D in (64, 128) for rows, slots in tiles]
        more += [Shape(dtype=torch.float16), Shape(query_rows=128, slots=128, full=True), Shape(D=64, full=True)]
        more += [Shape(group=8), Shape(group=8, full=True), Shape(D=64, group=2), Shape(group=2, slots=128)]
    found: list[Compilation] = []
    for compiled, sizes in ((_dq_compilations, dq_sizes), (_dkdv_compilations, dkdv_sizes)):
        pairs = [(shape, sizes(shape.D, shape.query_rows, shape.slots)[-1]) for shape in shapes]
        rest = [(shape, size) for shape in more for size in sizes(shape.D, shape.query_rows, shape.slots)]
        pairs += [pair for pair in rest if pair not in pairs]
        found += [one for shape, size in pairs for one in compiled(shape, size)]
    return found


def _dq_compilations(shape: Shape, size: Blocks) -> list[AttentionCompilation]:
    absent = {"grad_lse": None} | ({"token_counts": None} if shape.full else {})
    return [_task(hopper_specialized_rows.hopper_specialized_dq, shape, size, LSE_GRADIENT=False, **absent)]


def _dkdv_compilations(shape: Shape, size: Blocks) -> list[AttentionCompilation]:
    """As `hopper_backward`'s: with split columns and, for the plainest shapes, without."""
    kernel = hopper_specialized_columns.hopper_specialized_dkdv
    found = [_task(kernel, shape, size, SPLIT=True)]
    if shape.full:
        found.append(_task(kernel, shape, size, SPLIT=False, workspace=None))
    return found


def _task(kernel: Any, shape: Shape, size: Blocks, **constants: Any) -> AttentionCompilation:
    boxes = dict.fromkeys(("queries", "grads", "outs"), _box(size.rows, shape.D, False))
    boxes |= dict.fromkeys(("keys", "values", "d_keys", "d_values"), _box(size.keys, shape.D, True))
    constants["PRODUCER_REGISTERS"] = PRODUCER_REGISTERS
    found = _compilation(kernel, shape, size, boxes, options(size), **constants)
    lines = f"tensordesc<fp32{[1, 1, size.rows]},{_line_layout(3)!r}>"
    counts = f"tensordesc<i32{[1, COUNTS]},{_line_layout(2)!r}>"
    kinds = {"shifts": lines, "means": lines} | ({} if shape.full else {"token_counts": counts})
    signature = {name: kinds.get(name, kind) for name, kind in found.signature.items()}
    return replace(found, signature=signature, aligned=tuple(x for x in found.aligned if x not in kinds))
