"""The fine stage's backward on Hopper: what `backward`'s plain kernels of dq, and of dk with dv, compute, in bf16 and fp16,
for tiles of 64 slots and more. Deterministic: each result is written once, by one program, in one order.

Shape letters: B batch, H query heads, G KV heads, N query tiles, M KV video tiles, U all KV tiles, R query rows, K list
length, D head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flexsparse.compile_passes.templates import hopper_backward_columns, hopper_backward_rows
from flexsparse.compile_passes.templates.attention_common import Blocks
from flexsparse.compile_passes.templates.attention_shapes import TYPES, AttentionCompilation, Shape, compilation
from flexsparse.compile_passes.templates.hopper_forward import _box, _boxes, _copyable, _layout
from flexsparse.compile_passes.templates.launch import LOG2E, Compilation, launch

if TYPE_CHECKING:
    from flexsparse.compile_passes.templates.walks import Walk

ARCHS = ("sm_90a",)
"""What the kernels compile for."""


def dq_refuses(
    dtype: torch.dtype, D: int, query_rows: int, slots: int, size: Blocks, most_stages: int = 2
) -> str | None:
    """Why `dq` cannot do a case with these blocks; None where it can. Everything else that `backward` takes it takes.

    Two accumulators leave no registers for the weights of more than 64 slots. `hopper_specialized` takes more stages.
    """
    if size.num_warps * 16 != size.rows or size.rows not in (64, 128) or size.keys != 64:
        return (
            f"takes 64 or 128 rows, 16 to a warp, and 64 slots, not {size.rows} x {size.keys} on {size.num_warps} warps"
        )
    return _refuses(dtype, D, query_rows, slots, size, most_stages)


def dkdv_refuses(
    dtype: torch.dtype, D: int, query_rows: int, slots: int, size: Blocks, most_stages: int = 2
) -> str | None:
    """As `dq_refuses`, of `dkdv`: here the weights of no more than 64 rows."""
    if size.num_warps * 16 != size.keys or size.rows != 64 or size.keys not in (64, 128):
        return (
            f"takes 64 rows and 64 or 128 slots, 16 to a warp, not {size.rows} x {size.keys} on {size.num_warps} warps"
        )
    return _refuses(dtype, D, query_rows, slots, size, most_stages)


def _refuses(dtype: torch.dtype, D: int, query_rows: int, slots: int, size: Blocks, most_stages: int) -> str | None:
    if dtype not in (torch.bfloat16, torch.float16) or D not in (64, 128):
        return f"computes bf16 and fp16 of head dim 64 and 128, not {dtype} of {D}"
    if query_rows % size.rows or slots % size.keys:
        return f"blocks of {size.rows} rows and {size.keys} slots do not divide tiles of {query_rows} rows and {slots} slots"
    if not 1 <= size.num_stages <= most_stages:
        return f"takes 1 to {most_stages} stages, not {size.num_stages}"
    return None


def dq_sizes(D: int, query_rows: int, slots: int) -> list[Blocks]:
    """Blocks worth trying for `dq`, the most promising first; none where it refuses the shape.

    Two accumulators leave two programs an SM at D=128, for which shared memory has room with two stages; at D=64 three where a
    second stage takes no registers. 128 rows share what they read, and leave one program.
    """
    found = [Blocks(rows=64, keys=64, num_warps=4, num_stages=stages) for stages in ((2, 1) if D == 128 else (1, 2))]
    found.append(Blocks(rows=128, keys=64, num_warps=8, num_stages=2))
    return [size for size in found if dq_refuses(torch.bfloat16, D, query_rows, slots, size) is None]


def dkdv_sizes(D: int, query_rows: int, slots: int) -> list[Blocks]:
    """Blocks worth trying for `dkdv`, the most promising first; none where it refuses the shape."""
    found = [Blocks(rows=64, keys=keys, num_warps=keys // 16, num_stages=2) for keys in (64, 128)]
    return [size for size in found if dkdv_refuses(torch.bfloat16, D, query_rows, slots, size) is None]


def dq_options(D: int, size: Blocks) -> dict[str, int]:
    """The limit of registers where `dq` has three programs an SM if ptxas is told, as one of `launch`'s options."""
    return {"maxnreg": 168} if D == size.keys == size.rows == 64 and size.num_stages == 1 else {}


def dkdv_options(D: int, size: Blocks, group: int) -> dict[str, int]:
    """As `dq_options`, of `dkdv`.

    The loop over the query heads of a group takes registers of its own.
    """
    return {"maxnreg": 168} if D == size.keys == 64 and group == 1 else {}


def dq(walk: Walk, lists: Tensor, size: Blocks) -> Tensor:
    """As `walks.dq_of`, on a Hopper GPU; what it finds delta to be is written to the walk's.

    Args:
        walk: its rows are copied only where the copy engine does not take their address or strides.
        lists: int32 ``[B, H, N, capacity]``, as `lists.ascending` makes them.
        size: block sizes and warps; its ``num_stages`` are buffers of keys and of values.

    Returns:
        ``[B, H, R, D]``, in q's memory format (`torch.empty_like`).

    Raises:
        ValueError: a case that the kernel refuses.
    """
    q, k = walk.rows["q"], walk.rows["k"]
    B, H, R, D = q.shape
    refusal = dq_refuses(q.dtype, D, walk.query_rows, walk.slots, size)
    if refusal is not None:
        raise ValueError(f"the Hopper kernel of dq {refusal}: use the plain Triton kernel")
    found = torch.empty_like(q)
    if not q.numel():
        return found
    launch(
        hopper_backward_rows.hopper_dq,
        (R // size.rows, H, B),
        *_operands(walk, size),
        _boxes(found, size.rows),
        *(walk.lse_log2, walk.delta, walk.estimate, walk.grad_lse, lists, walk.counts, walk.kv_counts),
        *(walk.scale, walk.scale * LOG2E),
        *(H, walk.counts.shape[2], walk.kv_video, k.shape[2] // walk.slots, R),
        *(walk.first_rows, walk.kv_first, walk.capacity),
        LSE_GRADIENT=walk.grad_lse is not None,
        **_constants(walk, size),
        num_warps=size.num_warps,
        **dq_options(D, size),
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
    """The part of the plain kernel `_dkdv` in `backward.dkdv_of`, on a Hopper GPU.

    Args:
        walk: as in `dq`.
        offsets: int64 ``[B, H, M]``, as `lists.transpose` makes it, like columns and indices.
        columns: int32 ``[B, H, M]``.
        indices: int32.
        work: int32 ``[B, G, U + most, 4]``, as `columns.pieces` makes it.
        dk: ``[B, G, U * slots, D]``, dense; written where a column is whole.
        dv: as dk.
        workspace: float32 ``[2, B, G, most, slots, D]``, written where a column is split: dk before the scale, and dv.
            None where none is.
        size: block sizes and warps; its ``num_stages`` are buffers of queries and of their gradients.

    Raises:
        ValueError: a case that the kernel refuses.
    """
    q, k = walk.rows["q"], walk.rows["k"]
    (B, H, R, D), G, U = q.shape, k.shape[1], k.shape[2] // walk.slots
    refusal = dkdv_refuses(q.dtype, D, walk.query_rows, walk.slots, size)
    if refusal is not None:
        raise ValueError(f"the Hopper kernel of dk and dv {refusal}: use the plain Triton kernel")
    if not k.numel():
        return
    launch(
        hopper_backward_columns.hopper_dkdv,
        (work.shape[2] * (walk.slots // size.keys), G, B),
        *_operands(walk, size),
        *(_boxes(x, size.keys, walk.slots) for x in (dk, dv)),
        *(walk.lse_log2, walk.delta, offsets, columns, indices, work, walk.kv_counts, workspace),
        *(walk.scale, walk.scale * LOG2E),
        *(walk.counts.shape[2], walk.kv_video, U, R, walk.first_rows // walk.query_rows, walk.kv_first, G),
        work.shape[2] - U,
        SPLIT=workspace is not None,
        **_constants(walk, size),
        num_warps=size.num_warps,
        **dkdv_options(D, size, H // G),
    )


def _operands(walk: Walk, size: Blocks) -> list[TensorDescriptor]:
    """Boxes of queries, their gradients, keys and values."""
    rows = {name: _copyable(x) for name, x in walk.rows.items()}
    found = [_boxes(rows[name], size.rows) for name in ("q", "grad_out")]
    return found + [_boxes(rows[name], size.keys, walk.slots) for name in ("k", "v")]


def _constants(walk: Walk, size: Blocks) -> dict[str, Any]:
    found = {name: value for name, value in walk.constants.items() if name != "BLOCK_D"}  # here D is never padded
    return found | {"ROWS": size.rows, "KEYS": size.keys, "STAGES": size.num_stages}


def compilations(long_tail: bool) -> list[Compilation]:
    """What to compile offline. All of it may become a choice, and is held to the same rules as what already is."""
    shapes = [Shape(full=True), Shape(), Shape(D=64), Shape(query_rows=128, slots=128)]
    tiles = [(64, 64), (128, 128), (64, 128), (128, 64)]
    every = [Shape(D=D, query_rows=rows, slots=slots) for D in (64, 128) for rows, slots in tiles]
    every += [Shape(dtype=torch.float16), Shape(query_rows=128, slots=128, full=True), Shape(D=64, full=True)]
    every += [Shape(D=D, group=2, query_rows=n, slots=n) for D in (64, 128) for n in (64, 128)]
    every += [Shape(group=8), Shape(group=8, full=True)]
    found: list[Compilation] = []
    for compiled, sizes in ((_dq_compilations, dq_sizes), (_dkdv_compilations, dkdv_sizes)):
        pairs = [(shape, sizes(shape.D, shape.query_rows, shape.slots)[0]) for shape in shapes]
        more = [(shape, size) for shape in every for size in sizes(shape.D, shape.query_rows, shape.slots)]
        pairs += [pair for pair in more if long_tail and pair not in pairs]
        found += [one for shape, size in pairs for one in compiled(shape, size)]
    return found


def _dq_compilations(shape: Shape, size: Blocks) -> list[AttentionCompilation]:
    boxes = dict.fromkeys(("queries", "grads", "outs"), _box(size.rows, shape.D, False))
    boxes |= dict.fromkeys(("keys", "values"), _box(size.keys, shape.D, True))
    constants = {"LSE_GRADIENT": False, "grad_lse": None}
    return [_compilation(hopper_backward_rows.hopper_dq, shape, size, boxes, dq_options(shape.D, size), **constants)]


def _dkdv_compilations(shape: Shape, size: Blocks) -> list[AttentionCompilation]:
    """With split columns and, for the plainest shapes, without: the others are the same but for less to do at the end."""
    kernel, options = hopper_backward_columns.hopper_dkdv, dkdv_options(shape.D, size, shape.group)
    boxes = dict.fromkeys(("queries", "grads"), _box(size.rows, shape.D, False))
    boxes |= dict.fromkeys(("keys", "values", "d_keys", "d_values"), _box(size.keys, shape.D, True))
    found = [_compilation(kernel, shape, size, boxes, options, SPLIT=True)]
    if shape.full:
        found.append(_compilation(kernel, shape, size, boxes, options, SPLIT=False, workspace=None))
    return found


def _compilation(
    kernel: Any,
    shape: Shape,
    size: Blocks,
    boxes: dict[str, tuple[int, ...]],
    options: dict[str, int],
    **constants: Any,
) -> AttentionCompilation:
    base = compilation(kernel, shape, size, STAGES=size.num_stages, **constants)
    array = TYPES[shape.dtype]
    kinds = {name: f"tensordesc<{array}{list(box)},{_layout(box)!r}>" for name, box in boxes.items()}
    signature = {name: kinds.get(name, kind) for name, kind in base.signature.items()}
    blocks = {"rows": size.rows, "keys": size.keys, "stages": size.num_stages}
    split = {"split": constants["SPLIT"]} if "SPLIT" in constants else {}
    changed = {
        "config": base.config | blocks | split,
        "signature": signature,
        "aligned": tuple(name for name, kind in signature.items() if kind.startswith("*")),
        "options": options,
    }
    return AttentionCompilation(**(vars(base) | changed))
