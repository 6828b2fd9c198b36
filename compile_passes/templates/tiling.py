"""Tokens between raster order and tile order: one kernel gathers rows for up to four tensors in one launch.

Shape letters: B batch, H heads of one tensor, S tokens in raster order, P slots in tile order, L rows of a result (P or
S), D head dim.

A row table names, for every row of a result, the row of the source that it copies, or -1 for a row of zeros. Slot ->
token makes tiles of a raster, token -> slot makes the raster again, so that one kernel does both, and each is the
other's gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.compile_passes.templates.launch import Compilation, launch

MAX_TENSORS = 4  # q, k, v, gate
PROGRAM_BYTES = 16384  # of one program's rows: 128 bytes, 8 vector loads, for each thread of 4 warps

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@triton.jit
def gather_block(
    x,
    out,
    table,
    heads,
    length,
    stride_b,
    stride_h,
    stride_s,
    block,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Block number `block` of one tensor: ROWS rows of one head; the head runs fastest, then rows, then batch."""
    row_blocks = tl.cdiv(length, ROWS)
    head = block % heads
    batch = block // heads // row_blocks
    rows = block // heads % row_blocks * ROWS + tl.arange(0, ROWS)
    inside = rows < length
    source = tl.load(table + rows, mask=inside, other=-1)
    d = tl.arange(0, WIDTH)
    column = d[None, :] < D
    # masked, never multiplied by zero: a NaN in row 0 must not reach the padding
    start = batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    where = source.to(tl.int64) * stride_s
    values = tl.load(x + start + where[:, None] + d[None, :], mask=(source >= 0)[:, None] & column, other=0.0)
    first = (batch.to(tl.int64) * heads + head) * length * D
    tl.store(out + first + rows.to(tl.int64)[:, None] * D + d[None, :], values, mask=inside[:, None] & column)


# fmt: off
@triton.jit(do_not_specialize=["heads0", "heads1", "heads2", "heads3", "length0", "length1", "length2", "length3",
                               "end0", "end1", "end2"])
def gather_tokens(
    x0, x1, x2, x3, out0, out1, out2, out3, table0, table1, table2, table3,
    heads0, heads1, heads2, heads3, length0, length1, length2, length3,
    stride_b0, stride_b1, stride_b2, stride_b3, stride_h0, stride_h1, stride_h2, stride_h3,
    stride_s0, stride_s1, stride_s2, stride_s3, end0, end1, end2,
    TENSORS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):
    """Programs below end0 serve the first tensor, those below end1 the second, and so on: the branch is uniform."""
    program = tl.program_id(0)
    if TENSORS == 1 or program < end0:  # constexpr first: branches of absent tensors are not compiled
        gather_block(x0, out0, table0, heads0, length0, stride_b0, stride_h0, stride_s0, program, D, WIDTH, ROWS)
    elif TENSORS == 2 or program < end1:
        gather_block(x1, out1, table1, heads1, length1, stride_b1, stride_h1, stride_s1, program - end0, D, WIDTH, ROWS)
    elif TENSORS == 3 or program < end2:
        gather_block(x2, out2, table2, heads2, length2, stride_b2, stride_h2, stride_s2, program - end1, D, WIDTH, ROWS)
    else:
        gather_block(x3, out3, table3, heads3, length3, stride_b3, stride_h3, stride_s3, program - end2, D, WIDTH, ROWS)
# fmt: on


def config(dtype: torch.dtype, D: int) -> dict[str, int]:
    """Block sizes and warps; nothing is pipelined, since a program has no loop."""
    width = triton.next_power_of_2(D)
    rows = max(1, PROGRAM_BYTES // (width * dtype.itemsize))
    return {"WIDTH": width, "ROWS": min(rows, 256), "num_warps": 4, "num_stages": 1}


def tile_tokens(xs: Sequence[Tensor], tables: Sequence[Tensor]) -> list[Tensor]:
    """Raster order to tile order, all tensors in one launch.

    Args:
        xs: one to four tensors ``[B, H, S, D]`` of one dtype, B and D; H and S may differ. They are read where they lie (a
            transposed ``[B, S, H, D]``), and copied only where the last stride is not 1 (the gradient of a sum, say).
        tables: slot -> token of each, int32 ``[P]``, -1 for padding; P may differ.

    Returns:
        Contiguous ``[B, H, P, D]`` for each; padding is zero whatever the tokens hold.

    Raises:
        ValueError: tensors that do not go together.
    """
    return _gather(xs, tables)


def untile_tokens(xs: Sequence[Tensor], tables: Sequence[Tensor]) -> list[Tensor]:
    """Tile order to raster order, all tensors in one launch.

    Args:
        xs: as for `tile_tokens`, ``[B, H, P, D]``.
        tables: token -> slot of each, int32 ``[S]``.

    Returns:
        Contiguous ``[B, H, S, D]`` for each; padding is dropped.

    Raises:
        ValueError: tensors that do not go together.
    """
    return _gather(xs, tables)


def gather_reference(xs: Sequence[Tensor], tables: Sequence[Tensor]) -> list[Tensor]:
    """`tile_tokens` and `untile_tokens` in plain torch."""
    out = []
    for x, table in zip(xs, tables):
        rows = x.new_zeros(*x.shape[:2], len(table), x.shape[3])
        rows[:, :, table >= 0] = x[:, :, table[table >= 0].long()]
        out.append(rows)
    return out


def _gather(xs: Sequence[Tensor], tables: Sequence[Tensor]) -> list[Tensor]:
    _check(xs, tables)
    xs = [x if x.stride(3) == 1 else x.contiguous() for x in xs]
    B, _, _, D = xs[0].shape
    meta = config(xs[0].dtype, D)
    out = [x.new_empty(B, x.shape[1], len(table), D) for x, table in zip(xs, tables)]
    blocks = [B * x.shape[1] * triton.cdiv(len(table), meta["ROWS"]) for x, table in zip(xs, tables)]
    end = list(itertools.accumulate(blocks))

    def four(values: Sequence[object]) -> list[object]:
        """The arguments of tensors that are not there: repeated, and never read."""
        return [*values, *[values[-1]] * (MAX_TENSORS - len(values))]

    launch(
        gather_tokens,
        (end[-1],),
        *four(xs),
        *four(out),
        *four([table.contiguous() for table in tables]),
        *four([x.shape[1] for x in xs]),
        *four([len(table) for table in tables]),
        *(stride for axis in range(3) for stride in four([x.stride(axis) for x in xs])),
        *four(end)[:3],
        TENSORS=len(xs),
        D=D,
        **meta,
    )
    return out


def _check(xs: Sequence[Tensor], tables: Sequence[Tensor]) -> None:
    if not 1 <= len(xs) <= MAX_TENSORS or len(xs) != len(tables):
        raise ValueError(f"{len(xs)} tensors and {len(tables)} tables: give one to {MAX_TENSORS}, a table for each")
    for x, table in zip(xs, tables):
        if x.dim() != 4:
            raise ValueError(f"x is {tuple(x.shape)}: give [B, H, S, D]")
        if (x.shape[0], x.shape[3], x.dtype) != (xs[0].shape[0], xs[0].shape[3], xs[0].dtype):
            raise ValueError(
                f"x is {x.dtype} {tuple(x.shape)}, another {xs[0].dtype} {tuple(xs[0].shape)}: give one dtype, B and D"
            )
        if table.dtype != torch.int32 or table.dim() != 1:
            raise ValueError(f"a table is {table.dtype} {tuple(table.shape)}: give int32 [rows]")


def compilations(long_tail: bool) -> list[Compilation]:
    """What stands for all that `auto` may launch; with `long_tail` also the rest, head dims of the models in use."""
    # the code of four tensors holds that of fewer, and fp16 moves as bf16 does
    chosen = [(torch.bfloat16, 64, MAX_TENSORS), (torch.bfloat16, 128, MAX_TENSORS)]
    chosen += [(torch.bfloat16, 128, 1), (torch.float16, 128, MAX_TENSORS)]
    found = [_compilation(dtype, D, tensors, auto=True) for dtype, D, tensors in chosen]
    if long_tail:
        for dtype, D, tensors in itertools.product(TYPES, (32, 64, 96, 128, 256), range(1, MAX_TENSORS + 1)):
            if not any(x.config == _config_name(dtype, D, tensors) for x in found):
                found.append(_compilation(dtype, D, tensors, auto=dtype != torch.float32 and D in (64, 128)))
    return found


def _config_name(dtype: torch.dtype, D: int, tensors: int) -> dict[str, object]:
    return {"dtype": TYPES[dtype], "D": D, "tensors": tensors}


def _compilation(dtype: torch.dtype, D: int, tensors: int, auto: bool) -> Compilation:
    meta = config(dtype, D)
    constants = {"TENSORS": tensors, "D": D, "WIDTH": meta["WIDTH"], "ROWS": meta["ROWS"]}
    names = gather_tokens.arg_names
    signature = dict.fromkeys(names, "i32") | dict.fromkeys(constants, "constexpr")
    signature |= {name: "*i32" for name in names if name.startswith("table")}
    signature |= {name: f"*{TYPES[dtype]}" for name in names if name.rstrip("0123") in ("x", "out")}
    return Compilation(
        kernel=gather_tokens,
        config=_config_name(dtype, D, tensors),
        signature=signature,
        constants=constants,
        aligned=tuple(x for x in names if x.rstrip("0123") in ("x", "out", "table") or x.startswith("stride")),
        num_warps=meta["num_warps"],
        num_stages=meta["num_stages"],
        auto=auto,
    )
