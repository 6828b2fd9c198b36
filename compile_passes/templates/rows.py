"""How the attention kernels find rows: arrays ``[B, heads, rows, D]`` at any strides, in tile order or by a table of tokens."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.ops import by_tokens

ROW_ARRAYS = ("q", "k", "v", "gate", "out", "grad_out", "dq", "dk", "dv", "dgate")
"""Arrays of rows ``[B, heads, rows, D]``, of any strides but in a row. NAME comes with NAME_b and NAME_h, its strides over
samples and heads, and the constant NAME_ROW, its stride over rows: a model has few, whatever the sizes, and offsets
that are no constants would cost registers. `strides` makes them."""


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


def new_rows(x: Tensor, token_major: bool = False) -> Tensor:
    """Memory for a result in the shape of ``x [B, H, rows, D]``: as x lies, or as a contiguous ``[B, rows, H, D]``."""
    return by_tokens(x) if token_major else torch.empty_like(dense_rows(x))


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


def lengths(q: Tensor, k: Tensor, q_tokens: Tensor | None, kv_tokens: Tensor | None) -> tuple[int, int]:
    """Query rows and KV slots: those of tables where there are any, as q and k are in raster order then."""
    return (q.shape[2] if q_tokens is None else len(q_tokens)), (k.shape[2] if kv_tokens is None else len(kv_tokens))
