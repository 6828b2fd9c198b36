"""The coarse output as tokens see it: of their tile, times a gate.

Shape letters: B batch, H query heads, S tokens in raster order, N query tiles, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flexsparse.layout import TileLayout


def _around(coarse_out: Tensor, layout: TileLayout) -> Tensor:
    """With zeros for the tiles of extra tokens, which have no coarse output."""
    first, last = layout.tiles_first, layout.tiles_last
    return torch.nn.functional.pad(coarse_out, (0, 0, first, last)) if first or last else coarse_out


def broadcast_coarse(coarse_out: Tensor, layout: TileLayout) -> Tensor:
    """Coarse output ``[B, H, N, D]`` to tokens ``[B, H, S, D]``; extra tokens have none (zero).

    By slots, not by tiles: the gradient of a gather that takes a row many times adds them up in any order on CUDA.
    """
    tiles = _around(coarse_out, layout)
    each = tiles.unsqueeze(-2).expand(*tiles.shape[:-1], layout.slots, tiles.shape[-1]).flatten(-3, -2)
    return each if layout.order == "tiles" else each.index_select(-2, layout.index(coarse_out.device)[1])


def gated_coarse(gate: Tensor, coarse_out: Tensor, layout: TileLayout, dtype: torch.dtype) -> Tensor:
    """``gate * coarse`` of each token."""
    return gate * broadcast_coarse(coarse_out, layout).to(dtype)


class GatedCoarse(torch.autograd.Function):
    """`gated_coarse` that keeps the coarse output of tiles for backward, not of tokens: that is as large as q."""

    @staticmethod
    def forward(gate: Tensor, coarse_out: Tensor, layout: TileLayout, dtype: torch.dtype) -> Tensor:
        return gate * _of_tokens(coarse_out.to(dtype), layout)  # rounded as tiles: tokens are as large as q

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.how = inputs[2:]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:
        (gate, coarse_out), (layout, dtype) = ctx.saved_tensors, ctx.how
        d_gate = (grad * _of_tokens(coarse_out.to(dtype), layout)).to(gate.dtype)
        rows = layout.video(layout.to_tiles(grad * gate))
        return d_gate, rows.sum(-2, dtype=coarse_out.dtype), None, None


def _of_tokens(coarse_out: Tensor, layout: TileLayout) -> Tensor:
    """`broadcast_coarse` where nobody asks for its gradient: without the rows of slots in between."""
    if layout.order == "tiles":
        return broadcast_coarse(coarse_out, layout)
    return _around(coarse_out, layout).index_select(-2, layout.index(coarse_out.device)[1] // layout.slots)
