"""What the attention kernels share: walking a list of tiles, masked loads, strides, block sizes, and the mask of their twins.

Shape letters: B batch, H query heads, G KV heads, N query tiles, M KV video tiles, U all KV tiles, R query rows,
T all KV slots (U * slots), D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.compile_passes.templates.launch import Compilation

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
ROW_ARRAYS = ("q", "k", "v", "gate", "out", "grad_out", "dq", "dk", "dv", "dgate")
"""Arrays of rows ``[B, heads, rows, D]``, of any strides but in a row. NAME comes with NAME_b and NAME_h, its strides over
samples and heads, and the constant NAME_ROW, its stride over rows: a model has few, whatever the sizes, and offsets
that are no constants would cost registers. `strides` makes them."""
NUMBERS = (
    *("H", "N", "M", "U", "R", "G", "first_rows", "first_tiles", "kv_first", "capacity", "length", "count_stride"),
    *("frame_tiles", "query_tiles", "most"),
    *(f"{name}_{axis}" for name in ROW_ARRAYS for axis in "bh"),
)
"""The kernels' integers; none recompiles anything."""
_KINDS = {
    "*fp32": ("lse", "lse_log2", "delta", "estimate", "grad_lse", "coarse", "dcoarse", "workspace"),
    "*i32": ("lists", "sizes", "counts", "kv_counts", "columns", "indices", "pieces", "q_tokens", "kv_tokens"),
    "*i64": ("offsets",),
    "fp32": ("scale", "scale_log2"),
    "i32": NUMBERS,
}
ARGUMENT_TYPES = {name: kind for kind, names in _KINDS.items() for name in names}
"""Triton type of the kernels' arguments by name; all others are arrays of the inputs' type."""


@triton.jit
def nth_tile(i, tiles, first, listed, absent, EXTRA: tl.constexpr):
    """The ``i``-th tile that is seen: ``first`` extra tiles, the listed ones, then the others, past those absent.

    Where all tiles are seen, none is listed and none absent. Without extra tiles all come from the list.
    """
    if EXTRA:
        inside = (i >= first) & (i < first + listed)
        index = tl.load(tiles + i - first, mask=inside, other=0)
        return tl.where(inside, first + index, tl.where(i < first, i, i + absent))
    return tl.load(tiles + i)


@triton.jit
def query_tile(row, bh, lists, counts, N, M, first_rows, capacity, QUERY_ROWS: tl.constexpr):
    """Of the query tile that holds a row: its number, whether it is a video tile, its list and what `nth_tile` takes."""
    tile = (row - first_rows) // QUERY_ROWS
    video = (row >= first_rows) & (tile < N)
    listed = tl.load(counts + bh * N + tile, mask=video, other=0)
    return tile, video, lists + (bh * N + tile) * capacity, listed, tl.where(video, M - listed, 0)


@triton.jit
def tokens_at(table, start, ROWS: tl.constexpr):
    """The tokens in slots ``start`` to ``start + ROWS``, -1 for none; without a table nothing that is read."""
    if table is None:
        return start
    else:  # Triton compiles what follows a return
        return tl.load(table + start + tl.arange(0, ROWS))


@triton.jit
def tokens_again(table, start, ROWS: tl.constexpr):
    """As `tokens_at`, read anew after a loop: volatile, as what was read before it would be kept in registers through it."""
    if table is None:
        return start
    else:
        return tl.load(table + start + tl.arange(0, ROWS), volatile=True)


@triton.jit
def _places(head, token, STRIDE: tl.constexpr, ALIGN: tl.constexpr):
    """Where the rows of tokens start; 32 bits count units of ALIGN (`strides` checks it)."""
    return (head + token * (STRIDE // ALIGN)).to(tl.int64) * ALIGN


@triton.jit
def load_rows(
    array,
    head,
    start,
    valid,
    ROWS: tl.constexpr,
    STRIDE: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    token=None,
    BY_TABLE: tl.constexpr = False,
):
    """Rows ``start`` to ``start + ROWS`` of a head as ``[ROWS, BLOCK_D]``; `strides` says what STRIDE and ALIGN are.

    ``head`` is where the head starts, in units of ALIGN. 0 past D and, if MASKED, where not valid. Head and start move the
    pointer: what is left are offsets that no loop changes, so that they cost fewer registers, and so does a head of 32 bits.
    BY_TABLE: the rows of ``token [ROWS]`` instead (`tokens_at`), and 0 for those below 0.
    """
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    if BY_TABLE:
        at = array + _places(head, token, STRIDE, ALIGN)[:, None] + column[None, :]
        seen = token >= 0
        if MASKED:
            seen = seen & valid
        if D == BLOCK_D:
            return tl.load(at, mask=seen[:, None], other=0.0)
        return tl.load(at, mask=seen[:, None] & (column < D)[None, :], other=0.0)
    first = array + (head + start * (STRIDE // ALIGN)).to(tl.int64) * ALIGN
    at = first + (row[:, None] * STRIDE + column[None, :])
    if MASKED:
        if D == BLOCK_D:
            return tl.load(at, mask=valid[:, None], other=0.0)
        return tl.load(at, mask=valid[:, None] & (column < D)[None, :], other=0.0)
    if D == BLOCK_D:
        return tl.load(at)
    return tl.load(at, mask=(column < D)[None, :], other=0.0)


@triton.jit
def store_rows(
    array,
    head,
    start,
    values,
    ROWS: tl.constexpr,
    STRIDE: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    token=None,
    BY_TABLE: tl.constexpr = False,
):
    """The opposite of `load_rows`, rounded to the array's type; of tokens below 0 nothing is written."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    values = values.to(array.dtype.element_ty)
    if BY_TABLE:
        at = array + _places(head, token, STRIDE, ALIGN)[:, None] + column[None, :]
        if D == BLOCK_D:
            tl.store(at, values, mask=(token >= 0)[:, None])
        else:
            tl.store(at, values, mask=(token >= 0)[:, None] & (column < D)[None, :])
        return
    first = array + (head + start * (STRIDE // ALIGN)).to(tl.int64) * ALIGN
    at = first + (row[:, None] * STRIDE + column[None, :])
    if D == BLOCK_D:
        tl.store(at, values)
    else:
        tl.store(at, values, mask=(column < D)[None, :])


def dense_rows(x: Tensor) -> Tensor:
    """``x [..., D]``, copied only where the values of a row do not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(**arrays: Tensor | None) -> dict[str, int]:
    """The kernels' arguments that say where rows are, by name (`ROW_ARRAYS`); zeros for an absent array.

    Strides over samples and heads are in units of ALIGN, the largest power of two up to 16 that divides all strides.

    Raises:
        ValueError: an array spans 2^31 units, or 256 of its rows 2^31 values.
    """
    shown = {name: x for name, x in arrays.items() if x is not None}
    # the stride over one sample or one head may be any number, which would spoil ALIGN
    steps = {name: [n if x.shape[i] > 1 else 0 for i, n in enumerate(x.stride()[:3])] for name, x in shown.items()}
    align = math.gcd(16, *(n for of_array in steps.values() for n in of_array))
    for name, x in shown.items():
        span = sum((size - 1) * n for size, n in zip(x.shape, steps[name]))
        if span >= align << 31 or steps[name][2] >= 1 << 23:
            raise ValueError(
                f"{name} spans more memory than the kernel counts, with strides {x.stride()}: make it contiguous"
            )
    found = {"ALIGN": align}
    for name in arrays:
        b, h, row = steps.get(name, (0, 0, 0))
        found |= {f"{name}_b": b // align, f"{name}_h": h // align, f"{name}_ROW": row}
    return found


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Block sizes and launch options of one attention kernel.

    Attributes:
        rows: query rows of a block.
        keys: KV slots of a block.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int

    def meta(self) -> dict[str, int]:
        """As the kernels' keyword arguments."""
        return {"ROWS": self.rows, "KEYS": self.keys, "num_warps": self.num_warps, "num_stages": self.num_stages}

    def deeper(self, by_table: bool) -> Blocks:
        """For a walk whose rows are found by a table, a stage more: a tile's number, its tokens and their rows are loaded
        one after the other, each a step ahead of the next. It takes no more memory than the tokens.
        """
        pipelined = by_table and self.num_stages > 1
        return replace(self, num_stages=self.num_stages + 1) if pipelined else self


@dataclass(frozen=True, kw_only=True)
class CappedBlocks(Blocks):
    """Blocks of a kernel for which ptxas would take so few registers too many that a program less fits an SM.

    Attributes:
        registers: most registers of a thread.
    """

    registers: int

    def meta(self) -> dict[str, int]:
        """As the kernels' keyword arguments."""
        return super().meta() | {"maxnreg": self.registers}


def padded_dim(D: int) -> int:
    """Block width of a head dim."""
    return max(16, triton.next_power_of_2(D))


def unaccelerated_blocks(D: int, query_rows: int, slots: int) -> Blocks:
    """Block sizes in float32, where no tensor core multiplies and both operands pass through registers."""
    edge = 32 if D <= 64 else 16
    return Blocks(rows=min(query_rows, edge), keys=min(slots, edge), num_warps=4, num_stages=1)


def lengths(q: Tensor, k: Tensor, q_tokens: Tensor | None, kv_tokens: Tensor | None) -> tuple[int, int]:
    """Query rows and KV slots: those of tables where there are any, as q and k are in raster order then."""
    return (q.shape[2] if q_tokens is None else len(q_tokens)), (k.shape[2] if kv_tokens is None else len(kv_tokens))


def flags(
    q: Tensor,
    k: Tensor,
    bits: Tensor,
    query_rows: int,
    kv_video: int,
    slots: int,
    partial: bool,
    q_tokens: Tensor | None = None,
    kv_tokens: Tensor | None = None,
) -> dict[str, Any]:
    """The constants by which all attention kernels are specialised."""
    rows, keys = lengths(q, k, q_tokens, kv_tokens)
    return {
        "D": q.shape[3],
        "BLOCK_D": padded_dim(q.shape[3]),
        "QUERY_ROWS": query_rows,
        "SLOTS": slots,
        "EXTRA": keys > kv_video * slots or rows > bits.shape[2] * query_rows,
        "PARTIAL": partial,
    }


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What an attention kernel is specialised for, where it is compiled without tensors at hand.

    Attributes:
        dtype: of the inputs.
        D: head dim.
        query_rows: rows of a query tile.
        slots: slots of a KV tile.
        group: query heads of a KV head.
        heads: query heads whose rows lie side by side, as a model's linear maps leave them; 1 for a head after the other.
        full: no partial tiles, no extra tokens, no coarse output; else all of them.
        raster: what is in raster order and read by a table: ``"qkv"``, ``"kv"`` (packed queries), or nothing.
        auto: whether ``backend="auto"`` can choose it.
    """

    dtype: torch.dtype = torch.bfloat16
    D: int = 128
    query_rows: int = 64
    slots: int = 64
    group: int = 1
    heads: int = 24
    full: bool = False
    raster: str = ""
    auto: bool = True


def shapes(long_tail: bool) -> list[Shape]:
    """The shapes that the attention kernels are compiled for offline."""
    found = [
        Shape(full=True),
        Shape(),
        Shape(query_rows=128, slots=128, full=True),
        Shape(query_rows=128, slots=128),
        Shape(D=64, full=True),
        Shape(D=64, query_rows=128, slots=128),
        Shape(dtype=torch.float16),
        Shape(query_rows=32),
    ]
    if long_tail:
        rare: list[dict[str, Any]] = [
            {"query_rows": 16, "D": 64, "dtype": torch.float16},
            {"query_rows": 16},
            {"query_rows": 128},
            {"slots": 128},
            {"query_rows": 256, "slots": 256},
            {"slots": 16, "query_rows": 16},
            {"slots": 32, "query_rows": 32},
            {"heads": 1},
            {"heads": 1, "full": True},
            {"heads": 1, "query_rows": 128, "slots": 128},
            {"group": 2},
            {"group": 2, "query_rows": 128, "slots": 128},
            {"D": 32},
            {"D": 96},
            {"D": 256},
            {"D": 256, "query_rows": 128, "slots": 128},
            {"dtype": torch.float32, "D": 64},
            {"dtype": torch.float32},
        ]
        found += [Shape(auto=False, **changes) for changes in rare]
    return found


def raster_shapes(long_tail: bool) -> list[Shape]:
    """The shapes that they are compiled for where rows are found by a table."""
    found = [
        Shape(raster="qkv"),
        Shape(raster="qkv", full=True),
        Shape(raster="qkv", D=64),
        Shape(raster="qkv", query_rows=128, slots=128),
    ]
    if long_tail:
        rare: list[dict[str, Any]] = [
            {"raster": "kv"},
            {"raster": "kv", "query_rows": 32},
            {"group": 2},
            {"heads": 1},
            {"D": 96},
            {"D": 256},
            {"dtype": torch.float16, "D": 64, "query_rows": 128, "slots": 128},
            {"dtype": torch.float32},
        ]
        found += [Shape(**{"auto": False, "raster": "qkv", **changes}) for changes in rare]
    return found


@dataclass(frozen=True, kw_only=True)
class AttentionCompilation(Compilation):
    """A compilation with further launch options.

    Attributes:
        options: as Triton names them.
    """

    options: dict[str, int] = field(default_factory=dict)


def compilation(kernel: Any, shape: Shape, size: Blocks, **constants: Any) -> AttentionCompilation:
    """One attention kernel for one shape.

    Args:
        kernel: the jitted function.
        shape: what it is specialised for.
        size: its block sizes.
        constants: constants that only this kernel takes, and its absent arguments as None.
    """
    partly = not shape.full
    constants |= {"GROUP": shape.group, "D": shape.D, "BLOCK_D": padded_dim(shape.D), "EXTRA": partly}
    constants |= {"QUERY_ROWS": shape.query_rows, "SLOTS": shape.slots, "PARTIAL": partly}
    constants |= {"ROWS": size.rows, "KEYS": size.keys}
    constants |= {name: None for name, tiled in (("q_tokens", "q"), ("kv_tokens", "kv")) if tiled not in shape.raster}
    rows = [name for name in kernel.arg_names if name.endswith("_ROW")]
    constants |= dict.fromkeys(rows, shape.heads * shape.D) | {"ALIGN": math.gcd(16, shape.D)}
    array = "*" + TYPES[shape.dtype]
    signature = {n: "constexpr" if n in constants else ARGUMENT_TYPES.get(n, array) for n in kernel.arg_names}
    config = {"dtype": TYPES[shape.dtype], "D": shape.D, "query_rows": shape.query_rows, "slots": shape.slots}
    in_order = {"raster": shape.raster} if shape.raster else {}
    return AttentionCompilation(
        kernel=kernel,
        config=config | in_order | {"group": shape.group, "heads": shape.heads, "full": shape.full},
        signature=signature,
        constants={name: constants[name] for name, kind in signature.items() if kind == "constexpr"},
        aligned=tuple(name for name, kind in signature.items() if kind.startswith("*")),
        num_warps=size.num_warps,
        num_stages=size.num_stages,
        options={name: value for name, value in size.meta().items() if name == "maxnreg"},
        auto=shape.auto,
    )


def seen_slots(
    bits: Tensor,
    kv_counts: Tensor,
    R: int,
    *,
    query_rows: int,
    first_rows: int,
    kv_first: int,
    kv_video: int,
    slots: int,
    partial: bool,
) -> Tensor:
    """Which KV slots each query row sees, for the plain-torch twins.

    Returns:
        Bool ``[B, H, R, T]``.
    """
    N = bits.shape[2]
    device = bits.device
    m = torch.arange(kv_video, device=device)
    kept = (bits[..., m // 32] >> (m % 32)) & 1 == 1
    query_tile = (torch.arange(R, device=device) - first_rows).div(query_rows, rounding_mode="floor")
    tile = torch.arange(kv_counts.shape[1], device=device) - kv_first
    video = ((query_tile >= 0) & (query_tile < N))[:, None] & ((tile >= 0) & (tile < kv_video))
    seen = kept[:, :, query_tile.clamp(0, N - 1)][..., tile.clamp(0, kv_video - 1)] | ~video
    valid = torch.arange(slots, device=device) < kv_counts[..., None]  # [B, U, slots]
    seen = seen[..., None].expand(*seen.shape, slots)
    return (seen & valid[:, None, None] if partial else seen).flatten(3)
