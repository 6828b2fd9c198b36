"""BSA's queries to the order in which they are computed, and computed rows to tokens; gradients without atomics.

Shape letters: B batch, H query heads, S tokens, P padded tokens, N query tiles, s slots of a tile, Q packed queries of a tile,
R computed rows, D head dim.

Three of the four are one gather: what differs is where a row of the result finds its row. The fourth, the gradient of the way
back, sums the rows of the tokens that took a computed row: all are of one tile, so that a program finds them itself, and adds
them in the order of their slots.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.compile_passes.templates.launch import Compilation, launch
from flexsparse.ops.pack_rows import new_rows

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
PROGRAM_BYTES = 16384  # of one program's rows, as in `tiling`
SUMS = (
    2048  # sums of one program, and comparisons of its rows with the slots of the tile: 16 for each thread of 4 warps
)


@triton.jit
def row_to_compute(kept, counts, tokens, slots, bh, row, inside, first_rows, video_rows, Q: tl.constexpr, TILED, SLOTS):
    """The row of the queries that a computed row copies, -1 for zeros."""
    at = row - first_rows
    video = inside & (at >= 0) & (at < video_rows)
    stays = at % Q < tl.load(counts + at // Q, mask=video, other=0)
    slot = tl.where(at < 0, row, row - video_rows + video_rows // Q * SLOTS)
    extra = tl.load(tokens + slot, mask=inside & (at < 0) | inside & (at >= video_rows), other=-1)
    token = tl.load(kept + bh * video_rows + at, mask=video & stays, other=-1)
    token = tl.where(video, token, extra)
    if TILED:
        token = tl.load(slots + token, mask=token >= 0, other=-1)
    return token


@triton.jit
def row_computed_for(kept, position, tokens, bh, row, inside, length, first_rows, video_rows, TILED):
    """The computed row of a token that is computed itself, -1 for others and for padding."""
    token = row
    if TILED:
        token = tl.load(tokens + row, mask=inside, other=-1)
        inside = token >= 0
    at = tl.load(position + bh * length + token, mask=inside, other=-1)
    of_tile = at - first_rows
    video = (of_tile >= 0) & (of_tile < video_rows)
    owner = tl.load(kept + bh * video_rows + of_tile, mask=video, other=-1)
    return tl.where(video & (owner != token), -1, at)


# fmt: off
@triton.jit(do_not_specialize=["heads", "rows", "length", "first_rows", "video_rows", "fill"])
def take_kernel(
    x, out, kept, counts, position, tokens, slots, heads, rows, length, first_rows, video_rows, fill,
    stride_b, stride_h, stride_s, out_stride_b, out_stride_h, out_stride_s,
    WAY: tl.constexpr, TILED: tl.constexpr, SLOTS: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows of one head of the result; the head runs fastest, then rows, then batch."""
    program = tl.program_id(0)
    blocks = tl.cdiv(rows, ROWS)
    b = (program // heads // blocks).to(tl.int64)
    h = (program % heads).to(tl.int64)
    row = program // heads % blocks * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    bh = b * heads + h
    if WAY == "pack":
        source = row_to_compute(kept, counts, tokens, slots, bh, row, inside, first_rows, video_rows, Q, TILED, SLOTS)
    elif WAY == "unpack":
        source = tl.load(position + bh * rows + row, mask=inside, other=-1)
    else:
        source = row_computed_for(kept, position, tokens, bh, row, inside, length, first_rows, video_rows, TILED)
    d = tl.arange(0, WIDTH)
    column = (d < D)[None, :]
    at = x + b * stride_b + h * stride_h + source.to(tl.int64)[:, None] * stride_s + d[None, :]
    values = tl.load(at, mask=(source >= 0)[:, None] & column, other=0.0)
    if WAY == "unpack":
        values = tl.where((source >= 0)[:, None], values, tl.full(values.shape, fill, tl.float32).to(values.dtype))
    to = out + b * out_stride_b + h * out_stride_h + row.to(tl.int64)[:, None] * out_stride_s + d[None, :]
    tl.store(to, values.to(out.dtype.element_ty), mask=inside[:, None] & column)


@triton.jit
def sum_tile(
    grad, out, position, tokens, b, h, bh, tile, block, length, first_rows, rows, stride_b, stride_h, stride_s,
    SLOTS: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, TYPE: tl.constexpr,
):
    """ROWS packed rows of one tile: one token of each at a time, in the order of slots."""
    row = block * ROWS + tl.arange(0, ROWS)
    slot = tl.arange(0, SLOTS)
    of_tile = tokens + first_rows + tile * SLOTS
    token = tl.load(of_tile + slot)
    taken = tl.load(position + bh * length + token, mask=token >= 0, other=-1) - first_rows - tile * Q
    most = tl.max(tl.sum((taken[None, :] == row[:, None]).to(tl.int32), 1), 0)
    d = tl.arange(0, WIDTH)
    column = (d < D)[None, :]
    start = grad + b * stride_b + h * stride_h + d[None, :]
    total = tl.zeros([ROWS, WIDTH], TYPE)
    last = tl.full([ROWS], -1, tl.int32)
    for _ in range(most):
        rest = (taken[None, :] == row[:, None]) & (slot[None, :] > last[:, None])
        last = tl.min(tl.where(rest, slot[None, :], SLOTS), 1)
        source = tl.load(of_tile + last, mask=last < SLOTS, other=-1)
        at = start + source.to(tl.int64)[:, None] * stride_s
        total += tl.load(at, mask=(source >= 0)[:, None] & column, other=0.0).to(TYPE)
    to = out + (bh * rows + first_rows + tile * Q + row)[:, None] * D + d[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(row < Q)[:, None] & column)


@triton.jit
def extra_rows(
    grad, out, tokens, b, h, bh, block, ends, first_rows, video_rows, rows, stride_b, stride_h, stride_s,
    SLOTS: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):
    """ROWS rows of extra tokens, each taken by its own token; padding gets zeros."""
    end = block * ROWS + tl.arange(0, ROWS)
    inside = end < ends
    first = end < first_rows
    token = tl.load(tokens + tl.where(first, end, end + video_rows // Q * SLOTS), mask=inside, other=-1)
    d = tl.arange(0, WIDTH)
    column = (d < D)[None, :]
    at = grad + b * stride_b + h * stride_h + token.to(tl.int64)[:, None] * stride_s + d[None, :]
    values = tl.load(at, mask=(token >= 0)[:, None] & column, other=0.0)
    to = out + (bh * rows + tl.where(first, end, end + video_rows))[:, None] * D + d[None, :]
    tl.store(to, values, mask=inside[:, None] & column)


@triton.jit(do_not_specialize=["heads", "tiles", "length", "first_rows", "rows", "ends", "programs"])
def sum_kernel(
    grad, out, position, tokens, heads, tiles, length, first_rows, rows, ends, programs, stride_b, stride_h, stride_s,
    SLOTS: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, TYPE: tl.constexpr,
):
    """The head runs fastest, then rows of a tile, tiles, batch; the first `programs` are query tiles, then extra rows."""
    program = tl.program_id(0)
    if program < programs:
        blocks: tl.constexpr = Q // ROWS
        h = (program % heads).to(tl.int64)
        block, tile = program // heads % blocks, program // heads // blocks % tiles
        b = (program // heads // blocks // tiles).to(tl.int64)
        sum_tile(
            grad, out, position, tokens, b, h, b * heads + h, tile, block, length, first_rows, rows,
            stride_b, stride_h, stride_s, SLOTS, Q, D, WIDTH, ROWS, TYPE,
        )
    else:
        other = program - programs
        parts = tl.cdiv(ends, ROWS)
        h = (other % heads).to(tl.int64)
        b = (other // heads // parts).to(tl.int64)
        extra_rows(
            grad, out, tokens, b, h, b * heads + h, other // heads % parts, ends, first_rows, tiles * Q, rows,
            stride_b, stride_h, stride_s, SLOTS, Q, D, WIDTH, ROWS,
        )
# fmt: on


def config(dtype: torch.dtype, D: int) -> dict[str, int]:
    """Block sizes and warps of `take_kernel`."""
    width = triton.next_power_of_2(D)
    return {"WIDTH": width, "ROWS": min(max(1, PROGRAM_BYTES // (width * dtype.itemsize)), 256), "num_warps": 4}


def sum_config(slots: int, Q: int, D: int) -> dict[str, int]:
    """Block sizes and warps of `sum_kernel`: its rows against all slots of the tile fill registers too."""
    width = triton.next_power_of_2(D)
    return {"WIDTH": width, "ROWS": min(Q, max(1, SUMS // max(width, slots))), "num_warps": 4}


def _rows_lie(x: Tensor) -> Tensor:
    """x, copied where the numbers of a row do not lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _take(
    way: str,
    x: Tensor,
    out: Tensor,
    kept: Tensor | None = None,
    counts: Tensor | None = None,
    position: Tensor | None = None,
    tokens: Tensor | None = None,
    slots: Tensor | None = None,
    first_rows: int = 0,
    fill: float = 0.0,
    **meta: Any,
) -> Tensor:
    x = _rows_lie(x)
    B, H, rows, D = out.shape
    given = [t for t in (kept, counts, position, tokens, slots) if t is not None]
    tables = [
        given[0] if t is None else t.contiguous() for t in (kept, counts, position, tokens, slots)
    ]  # absent: not read
    length = 0 if position is None else position.shape[2]
    video_rows = 0 if kept is None else kept.shape[2] * kept.shape[3]
    Q = 1 if kept is None else kept.shape[3]
    sizes = (H, rows, length, first_rows, video_rows, fill)
    meta = {"TILED": False, "SLOTS": 1} | meta | {"WAY": way, "Q": Q, "D": D} | config(x.dtype, D)
    grid = (B * H * triton.cdiv(rows, meta["ROWS"]),)
    launch(take_kernel, grid, x, out, *tables, *sizes, *x.stride()[:3], *out.stride()[:3], **meta)
    return out


def pack_rows(
    x: Tensor, kept: Tensor, counts: Tensor, tokens: Tensor, slots: Tensor | None, first_rows: int, last_rows: int
) -> Tensor:
    """`ops.pack_rows.pack_rows` in one launch."""
    N, Q = kept.shape[2:]
    out = new_rows(x, first_rows + N * Q + last_rows, False)
    of_tile = (tokens.shape[0] - first_rows - last_rows) // max(1, N)
    tables: dict[str, Any] = {
        "kept": kept,
        "counts": counts,
        "tokens": tokens,
        "slots": slots,
        "first_rows": first_rows,
    }
    return _take("pack", x, out, **tables, TILED=slots is not None, SLOTS=of_tile)


def pack_rows_backward(
    grad: Tensor, kept: Tensor, position: Tensor, tokens: Tensor, first_rows: int, tiled: bool, inside: bool
) -> Tensor:
    """`ops.pack_rows.pack_rows_backward` in one launch."""
    out = new_rows(grad, tokens.shape[0] if tiled else position.shape[2], inside)
    tables: dict[str, Any] = {"kept": kept, "position": position, "tokens": tokens, "first_rows": first_rows}
    return _take("pack_backward", grad, out, **tables, TILED=tiled)


def unpack_rows(rows: Tensor, position: Tensor, fill: float, inside: bool) -> Tensor:
    """`ops.pack_rows.unpack_rows` in one launch."""
    return _take("unpack", rows, new_rows(rows, position.shape[2], inside), position=position, fill=fill)


def unpack_rows_backward(
    grad: Tensor, position: Tensor, tokens: Tensor, length: int, first_rows: int, last_rows: int, query_rows: int
) -> Tensor:
    """`ops.pack_rows.unpack_rows_backward` in one launch: ordered sums, in float32 (float64 of float64)."""
    grad = _rows_lie(grad)
    B, H, S, D = grad.shape
    out = new_rows(grad, length, False)
    ends = first_rows + last_rows
    tiles = (length - ends) // query_rows
    slots = (tokens.shape[0] - ends) // max(1, tiles)
    meta: dict[str, Any] = {"SLOTS": slots, "Q": query_rows, "D": D, **sum_config(slots, query_rows, D)}
    meta["TYPE"] = tl.float64 if grad.dtype == torch.float64 else tl.float32
    programs = B * H * tiles * (query_rows // meta["ROWS"])
    grid = (programs + B * H * triton.cdiv(ends, meta["ROWS"]),)
    sizes = (H, tiles, S, first_rows, length, ends, programs)
    tables = (position.contiguous(), tokens.contiguous())
    launch(sum_kernel, grid, grad, out, *tables, *sizes, *grad.stride()[:3], **meta)
    return out


def compilations(long_tail: bool) -> list[Compilation]:
    """Configurations of `take_kernel` and `sum_kernel` to compile offline."""
    ways = (("pack", False), ("pack", True), ("unpack", False), ("pack_backward", False), ("pack_backward", True))
    found = [_take_compilation("bf16", 128, *way, auto=True) for way in ways]
    found += [_sum_compilation("bf16", D, slots, slots // 2, auto=True) for D in (64, 128) for slots in (64, 128)]
    if long_tail:
        found += [_take_compilation(dtype, 64, *way, auto=True) for dtype in ("bf16", "fp16") for way in ways]
        found += [_take_compilation("fp32", D, "unpack", False, auto=True) for D in (1, 128)]
        rest = itertools.product(("fp16", "fp32", "fp64"), (32, 96, 128, 256), ((64, 32), (256, 128)))
        found += [_sum_compilation(dtype, D, *sizes, auto=True) for dtype, D, sizes in rest]
    return found


def _compilation(
    kernel: Any, config: dict[str, Any], constants: dict[str, Any], dtype: str, warps: int, auto: bool
) -> Compilation:
    tensors = {"x": f"*{dtype}", "out": f"*{dtype}", "grad": f"*{dtype}", "fill": "fp32"}
    tensors |= dict.fromkeys(("kept", "counts", "position", "tokens", "slots"), "*i32")
    names = kernel.arg_names
    strides = tuple(name for name in names if "stride_" in name)
    return Compilation(
        kernel=kernel,
        config={"dtype": dtype, **config},
        signature={name: "constexpr" if name in constants else tensors.get(name, "i32") for name in names},
        constants=constants,
        aligned=(
            *(name for name in names if name in tensors and name != "fill"),
            *(strides if config["D"] > 1 else ()),
        ),
        num_warps=warps,
        num_stages=1,
        auto=auto,
    )


def _take_compilation(dtype: str, D: int, way: str, tiled: bool, auto: bool) -> Compilation:
    meta = config({name: key for key, name in TYPES.items()}[dtype], D)
    constants = {
        "WAY": way,
        "TILED": tiled,
        "SLOTS": 128,
        "Q": 64,
        "D": D,
        "WIDTH": meta["WIDTH"],
        "ROWS": meta["ROWS"],
    }
    return _compilation(take_kernel, {"D": D, "way": way, "tiled": tiled}, constants, dtype, meta["num_warps"], auto)


def _sum_compilation(dtype: str, D: int, slots: int, Q: int, auto: bool) -> Compilation:
    meta = sum_config(slots, Q, D)
    constants = {"SLOTS": slots, "Q": Q, "D": D, "WIDTH": meta["WIDTH"], "ROWS": meta["ROWS"]}
    constants |= {"TYPE": tl.float64 if dtype == "fp64" else tl.float32}
    return _compilation(sum_kernel, {"D": D, "slots": slots, "Q": Q}, constants, dtype, meta["num_warps"], auto)
