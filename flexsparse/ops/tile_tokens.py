"""`flexsparse::tile_tokens`: q, k and v to tile order in one kernel launch. CUDA; elsewhere `TileLayout.to_tiles` does it.

Shape letters: B batch, H heads of one tensor, S tokens in raster order, P padded tokens in tile order, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexsparse import ops


def in_one_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tensors are brought to tile order by this op, and not each by plain torch."""
    return device.type == "cuda" and dtype != torch.float64 and ops.has_triton()


@torch.library.custom_op("flexsparse::tile_tokens", mutates_args=())
def tile_tokens(xs: list[Tensor], tables: list[Tensor], back: list[Tensor]) -> list[Tensor]:
    """Rows of several tensors in another order.

    Args:
        xs: ``[B, H, S, D]`` each, of one dtype, batch and head dim.
        tables: for each, int32 ``[P]``: the row that goes to a place, -1 for zeros.
        back: for each, int32 ``[S]``: the inverse, which the backward uses.

    Returns:
        ``[B, H, P, D]`` each, contiguous.
    """
    if ops.on_gpu(xs[0]):
        from flexsparse.compile_passes.templates import tiling

        return tiling.tile_tokens(xs, tables)
    return [rows_at(x, table) for x, table in zip(xs, tables)]


def rows_at(x: Tensor, table: Tensor) -> Tensor:
    """Rows ``[B, H, P, D]`` of ``x [B, H, S, D]`` that an int32 table ``[P]`` names; zeros where it is -1."""
    return x.index_select(2, table.clamp_min(0)).masked_fill_((table < 0)[:, None], 0)


def inverse(table: Tensor, length: int) -> Tensor:
    """The place of each of ``length`` rows in a table that names each once: int32 ``[length]``."""
    places = torch.empty(length, dtype=torch.int32, device=table.device)
    there = (table >= 0).nonzero()[:, 0]
    places[table[there].long()] = there.to(torch.int32)
    return places


@tile_tokens.register_fake
def _(xs: list[Tensor], tables: list[Tensor], back: list[Tensor]) -> list[Tensor]:
    return [x.new_empty((*x.shape[:2], table.shape[0], x.shape[3])) for x, table in zip(xs, tables)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, tables, back = inputs
    ctx.save_for_backward(*tables, *back)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    half = len(ctx.saved_tensors) // 2
    tables, back = list(ctx.saved_tensors[:half]), list(ctx.saved_tensors[half:])
    return torch.ops.flexsparse.tile_tokens(list(grads), back, tables), [None] * half, [None] * half


tile_tokens.register_autograd(_backward, setup_context=_setup)
