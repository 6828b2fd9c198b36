"""The fine stage's forward on Hopper: what `forward.forward` computes, in bf16 and fp16, for tiles of 64 slots and more.

Shape letters: B batch, H query heads, G KV heads, N query tiles, M KV video tiles, U all KV tiles, R query rows,
D head dim.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flexsparse.compile_passes.templates import hopper_kernels
from flexsparse.compile_passes.templates.attention_common import Blocks, flags
from flexsparse.compile_passes.templates.attention_shapes import TYPES, AttentionCompilation, Shape, compilation
from flexsparse.compile_passes.templates.launch import LOG2E, Compilation, launch
from flexsparse.compile_passes.templates.lists import ascending
from flexsparse.compile_passes.templates.rows import dense_rows, new_rows

ARCHS = ("sm_90a",)
"""What the kernel compiles for."""


def refuses(dtype: torch.dtype, D: int, query_rows: int, slots: int, size: Blocks, scale: float = 1.0) -> str | None:
    """Why the kernel cannot do a case with these blocks; None where it can. Everything else that `forward` takes it takes."""
    if dtype not in (torch.bfloat16, torch.float16) or D not in (64, 128):
        return f"computes bf16 and fp16 of head dim 64 and 128, not {dtype} of {D}"
    if query_rows % size.rows or slots % size.keys or size.rows not in (64, 128) or size.keys not in (64, 128):
        return f"blocks of {size.rows} rows and {size.keys} slots do not divide tiles of {query_rows} rows and {slots} slots"
    if size.num_warps * 16 != size.rows or size.num_stages not in (1, 2):
        return (
            f"gives 16 rows to a warp and takes 1 or 2 stages, not {size.num_warps} warps and {size.num_stages} stages"
        )
    if not 0 < scale < float("inf"):
        return f"finds the largest logit before it multiplies with the scale, which therefore is positive, not {scale}"
    return None


def sizes(D: int, query_rows: int, slots: int) -> list[Blocks]:
    """Blocks worth trying for a shape, the most promising first; none where the kernel refuses it.

    128 rows share what they read, but leave one program an SM at D=128; two stages of keys are free where registers
    bound the number of programs.
    """
    found = [
        Blocks(rows=128, keys=128, num_warps=8, num_stages=2),
        Blocks(rows=128, keys=64, num_warps=8, num_stages=2),
        Blocks(rows=64, keys=64, num_warps=4, num_stages=1),
        Blocks(rows=64, keys=64, num_warps=4, num_stages=2),
        Blocks(rows=64, keys=128, num_warps=4, num_stages=1),
    ]
    return [size for size in found if refuses(torch.bfloat16, D, query_rows, slots, size) is None]


def launch_options(D: int, size: Blocks) -> dict[str, int]:
    """Warps, and where three programs fit an SM if ptxas is told, the limit that tells it."""
    limit = {"maxnreg": 168} if D == 128 and size.rows == size.keys == 64 and size.num_stages == 1 else {}
    return {"num_warps": size.num_warps, **limit}


def _copyable(x: Tensor) -> Tensor:
    """``x [B, heads, rows, D]``, or a copy of it where its address or a stride is none that the copy engine takes.

    It takes multiples of 16 bytes. What it does with a stride of 0 (an expanded batch) is not documented: that is copied.
    """
    x = dense_rows(x)
    strides = [n * x.element_size() for size, n in zip(x.shape[:3], x.stride()) if size > 1]
    fits = x.data_ptr() % 16 == 0 and all(n > 0 and n % 16 == 0 for n in strides)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


@functools.cache
def _layout(box: tuple[int, ...]) -> Any:
    """Shared memory as the tensor cores read a box of 16-bit values."""
    return gl.NVMMASharedLayout.get_default_for(list(box), gl.bfloat16)


def _box(rows: int, D: int, tiled: bool) -> tuple[int, ...]:
    """What one copy brings: rows of ``[B, H, R, D]``, or of ``[B, G, U, slots, D]``."""
    return (1,) * (3 if tiled else 2) + (rows, D)


def _boxes(x: Tensor, rows: int, slots: int | None = None) -> TensorDescriptor:
    """Copies of ``rows`` rows of one head, or of one head's tile of so many slots."""
    if slots is not None:
        x = x.unflatten(2, (-1, slots))
    box = _box(rows, x.shape[-1], slots is not None)
    # the stride over one sample, head or tile may be any number: no box takes that step
    strides = [n if size > 1 else x.shape[-1] for size, n in zip(x.shape, x.stride())]
    return TensorDescriptor(x, list(x.shape), [*strides[:-1], 1], list(box), _layout(box))


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
    token_major: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `forward.forward`, on a Hopper GPU.

    Args:
        size: block sizes and warps; its ``num_stages`` are buffers of keys. The others are as there.

    Raises:
        ValueError: a case that the kernel refuses.
    """
    B, H, R, D = q.shape
    refusal = refuses(q.dtype, D, query_rows, slots, size, scale)
    if refusal is not None:
        raise ValueError(f"the Hopper forward {refusal}: use the plain Triton kernel")
    N, U = counts.shape[2], k.shape[2] // slots
    out, lse = new_rows(q, token_major), q.new_empty((B, H, R), dtype=torch.float32)
    if not q.numel():
        return out, lse
    keys, values = (_boxes(_copyable(x), size.keys, slots) for x in (k, v))
    gates = None if gate is None or coarse is None else _boxes(_copyable(gate), size.rows)
    constants = flags(q, k, bits, query_rows, kv_video, slots, partial)
    del constants["BLOCK_D"]  # here D is never padded
    launch(
        hopper_kernels.hopper_forward,
        (R // size.rows, H, B),
        _boxes(_copyable(q), size.rows),
        keys,
        values,
        gates,
        _boxes(out, size.rows),
        ascending(bits, counts, kv_video, capacity),
        counts.contiguous(),
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
        capacity,
        kv_counts.stride(0),
        GROUP=H // k.shape[1],
        ROWS=size.rows,
        KEYS=size.keys,
        STAGES=size.num_stages,
        COARSE=gates is not None,
        **constants,
        **launch_options(D, size),
    )
    return out, lse


def compilations(long_tail: bool) -> list[Compilation]:
    """What to compile offline. All of it may become a choice, and is held to the same rules as what already is."""
    whole, rest = Shape(full=True), Shape()
    found = [(whole, 0), (rest, 0), (Shape(D=64), 0), (Shape(query_rows=128, slots=128), 0)]
    if long_tail:
        tiles = [(64, 64), (128, 128), (64, 128), (128, 64)]
        every = [Shape(D=D, query_rows=rows, slots=slots) for D in (64, 128) for rows, slots in tiles]
        every += [Shape(dtype=torch.float16), Shape(group=2), Shape(query_rows=128, slots=128, full=True)]
        every += [Shape(D=64, full=True), Shape(D=64, query_rows=128, slots=128, full=True)]
        pairs = [(shape, i) for shape in every for i in range(len(sizes(shape.D, shape.query_rows, shape.slots)))]
        found += [pair for pair in pairs if pair not in found]
    return [_compilation(shape, sizes(shape.D, shape.query_rows, shape.slots)[i]) for shape, i in found]


def _compilation(shape: Shape, size: Blocks) -> AttentionCompilation:
    absent: dict[str, Any] = {"gates": None, "coarse": None} if shape.full else {}
    base = compilation(
        hopper_kernels.hopper_forward, shape, size, STAGES=size.num_stages, COARSE=not shape.full, **absent
    )
    blocks = {"rows": size.rows, "keys": size.keys, "stages": size.num_stages}
    options = {name: value for name, value in launch_options(shape.D, size).items() if name != "num_warps"}
    return with_boxes(base, shape, size, config=base.config | blocks, options=options)


def with_boxes(base: AttentionCompilation, shape: Shape, size: Blocks, **changed: Any) -> AttentionCompilation:
    """A forward's compilation whose arrays come as boxes of these blocks, with other fields changed too."""

    def boxes(rows: int, tiled: bool) -> str:
        box = _box(rows, shape.D, tiled)
        return f"tensordesc<{TYPES[shape.dtype]}{list(box)},{_layout(box)!r}>"

    kinds = dict.fromkeys(("queries", "gates", "outs"), boxes(size.rows, False))
    kinds |= dict.fromkeys(("keys", "values"), boxes(size.keys, True))
    signature = {name: kinds.get(name, kind) if kind != "constexpr" else kind for name, kind in base.signature.items()}
    aligned = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    return replace(base, signature=signature, aligned=aligned, **changed)
