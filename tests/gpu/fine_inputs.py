"""Inputs of the fine stage, and its results on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

import flexsparse as fs


def inputs(layout: fs.TileLayout, dtype: torch.dtype, D: int, scale: float, G: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    made = [torch.randn(1, heads, layout.seq_len, D, generator=g) for heads in (2, G, G)]
    return [(x * (scale if i < 2 else 1)).to(dtype) for i, x in enumerate(made)]


LYING = ("part of one projection", "a row of one more", "tokens first", "off by one element", "expanded")


def lying(x: Tensor, how: str) -> Tensor:
    """``x [B, H, S, D]`` in other memory: one of `LYING`; of an expanded tensor every head is the first one."""
    _, H, _, D = x.shape
    if how == "part of one projection":
        return torch.stack([x.transpose(1, 2)] * 3, 2).flatten(2).unflatten(-1, (3, H, D))[:, :, 1].transpose(1, 2)
    if how == "a row of one more":
        return torch.nn.functional.pad(x, (0, 1))[..., :D]
    if how == "tokens first":
        return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    if how == "off by one element":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x[:, :1].expand_as(x)


def selection_of(layout: fs.TileLayout, share: float = 0.4) -> fs.TileSelection:
    g = torch.Generator().manual_seed(4)
    keep = torch.rand(1, 2, layout.num_tiles, layout.num_tiles, generator=g) < share
    return fs.TileSelection.from_mask(keep, layout)


def to(selection: fs.TileSelection, device: str) -> fs.TileSelection:
    return fs.TileSelection.from_mask(selection.keep().to(device), selection.layout, capacity=selection.capacity)


def on_gpu(layout: fs.TileLayout, tensors: list[Tensor], selection: fs.TileSelection, grad: Tensor) -> list[Tensor]:
    q, k, v = (x.cuda().requires_grad_() for x in tensors)
    out, aux = fs.sparse_attention(q, k, v, layout, to(selection, "cuda"), backend="triton", return_aux=True)
    grads = torch.autograd.grad(out, (q, k, v), grad.cuda())
    return [x.detach() for x in (out, *grads, aux.lse)]
