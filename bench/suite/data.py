"""Inputs of a case, the same for every run. Shape letters: B batch, H heads, S tokens, P padded tokens, D head dim."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import flexsparse as fs
from bench.suite.cases import Case

CELLS = {"smooth": (8, 8, 8), "video": (16, 3, 3)}
"""Tokens along (T, H, W) between two values of the smooth field. With ``video`` the lists of neighbouring tiles have as much in
common as those of models that were trained on clips (bench/STUDY.md, question 5): much along time, little along space."""


def field(case: Case, generator: torch.Generator, device: torch.device, cells: Sequence[int]) -> Tensor:
    """A smooth field ``[B, H, S, D]`` of unit variance: normal values every ``cells`` tokens, linear in between."""
    coarse = [max(2, math.ceil(extent / step) + 1) for extent, step in zip(case.grid, cells)]
    values = torch.randn(case.B * case.H, case.D, *coarse, generator=generator, device=device)
    fine = torch.nn.functional.interpolate(values, size=case.grid, mode="trilinear", align_corners=True)
    fine = fine.flatten(2).transpose(1, 2).unflatten(0, (case.B, case.H))
    return fine / fine.square().mean().sqrt()


def tokens(
    case: Case, device: torch.device, seed: int = 0, *, cells: Sequence[int] | None = None, share: float = 0.5
) -> list[Tensor]:
    """q, k, v and the output's gradient, ``[B, H, S, D]`` in raster order.

    ``smooth`` and ``video``: q and k are ``sqrt(share)`` of one field (`CELLS`, or ``cells``) and ``sqrt(1 - share)`` of noise
    each, so that a query scores keys of its own surroundings higher and neighbours keep similar tiles.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    shape = (case.B, case.H, case.S, case.D)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    q, k, v, grad = (normal() for _ in range(4))
    if case.data != "random":
        common = field(case, generator, device, cells or CELLS[case.data]) * math.sqrt(share)
        q, k = (common + math.sqrt(1 - share) * x for x in (q, k))
    return [x.to(case.torch_dtype) for x in (q, k, v, grad)]


def gate(case: Case, device: torch.device) -> Tensor:
    """A gate as a model's linear map gives it, ``[B, S, H * D]``."""
    generator = torch.Generator(device=device).manual_seed(1)
    shape = (case.B, case.S, case.H * case.D)
    return (torch.randn(shape, generator=generator, device=device) * 0.3).to(case.torch_dtype)


def in_tiles(layout: fs.TileLayout, *xs: Tensor) -> list[Tensor]:
    """Tile order, ``[B, H, P, D]``, contiguous."""
    return [layout.to_tiles(x).contiguous() for x in xs]


def copies(inputs: list[Tensor], l2_bytes: int, most: int = 8) -> list[list[Tensor]]:
    """The inputs, again and again until they are twice the L2 cache; once where one set is."""
    size = sum(x.numel() * x.element_size() for x in inputs)
    sets = 1 if size >= 2 * l2_bytes else min(most, math.ceil(2 * l2_bytes / size) + 1)
    return [inputs] + [[x.clone() for x in inputs] for _ in range(sets - 1)]
