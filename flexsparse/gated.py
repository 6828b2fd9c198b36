"""The coarse output as tokens see it: of their tile, times a gate.

Shape letters: B batch, H query heads, S tokens in raster order, N query tiles, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flexsparse.layout import TileLayout


def broadcast_coarse(coarse_out: Tensor, layout: TileLayout) -> Tensor:
    """Coarse output ``[B, H, N, D]`` to tokens ``[B, H, S, D]``; extra tokens have none (zero)."""
    first, last = layout.tiles_first, layout.tiles_last
    tiles = torch.nn.functional.pad(coarse_out, (0, 0, first, last)) if first or last else coarse_out
    if layout.order == "tiles":
        return tiles.unsqueeze(-2).expand(*tiles.shape[:-1], layout.slots, tiles.shape[-1]).flatten(-3, -2)
    _, token_to_slot, _ = layout.index(coarse_out.device)
    return tiles.index_select(-2, token_to_slot // layout.slots)


def gated_coarse(gate: Tensor, coarse_out: Tensor, layout: TileLayout, dtype: torch.dtype) -> Tensor:
    """``gate * coarse`` of each token."""
    return gate * broadcast_coarse(coarse_out, layout).to(dtype)


class GatedCoarse(torch.autograd.Function):
    """`gated_coarse` that keeps the coarse output of tiles for backward, not of tokens: that is as large as q."""

    @staticmethod
    def forward(gate: Tensor, coarse_out: Tensor, layout: TileLayout, dtype: torch.dtype) -> Tensor:
        return gated_coarse(gate, coarse_out, layout, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.how = inputs[2:]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            product = gated_coarse(*leaves, *ctx.how)
        return *torch.autograd.grad(product, leaves, grad), None, None
