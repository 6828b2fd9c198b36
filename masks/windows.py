"""Windows of BSA: how the tokens of one query tile are grouped, and which of a window is its representative.

Shape letters: N query tiles, A windows of a tile, n tokens of a whole window.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from flexsparse.layout import TileLayout, ceil_div, is_tracing

Axes = tuple[int, int, int]


def window_sizes(tile: Sequence[int], window: Sequence[int]) -> list[int]:
    """Tokens of every window of a full tile; a window is cut where the tile ends."""
    cuts = [[min(w, side - start) for start in range(0, side, w)] for side, w in zip(tile, window)]
    return [math.prod(cut) for cut in itertools.product(*cuts)]


@functools.lru_cache(128)
@torch.inference_mode(False)  # what is cached must serve training later
def _windows(grid: Axes, tile: Axes, window: Axes, device: torch.device) -> tuple[Tensor, Tensor]:
    def grow(x: Tensor, axis: int) -> Tensor:  # [N] -> [N, A, n], or [A] / [n] by axis
        shape = [1, 1, 1]
        shape[axis] = -1
        return x.view(shape)

    tiles = [ceil_div(extent, side) for extent, side in zip(grid, tile)]
    parts = [ceil_div(side, w) for side, w in zip(tile, window)]

    def axes(count: Sequence[int], dim: int) -> list[Tensor]:
        index = torch.arange(math.prod(count))
        split = [index // (count[1] * count[2]), index // count[2] % count[1], index % count[2]]
        return [grow(x, dim) for x in split]

    tile_at, window_at, token_at = axes(tiles, 0), axes(parts, 1), axes(window, 2)
    extent = [(grid[i] - tile_at[i] * tile[i]).clamp(max=tile[i]) for i in range(3)]
    start = [window_at[i] * window[i] for i in range(3)]
    size = [(torch.minimum(extent[i], start[i] + window[i]) - start[i]).clamp(min=0) for i in range(3)]
    t, h, w = (start[i] + token_at[i] for i in range(3))
    inside = (token_at[0] < size[0]) & (token_at[1] < size[1]) & (token_at[2] < size[2])
    slots = torch.where(inside, (t * extent[1] + h) * extent[2] + w, -1)
    centre = [size[i] // 2 for i in range(3)]
    local = ((centre[0] * window[1] + centre[1]) * window[2] + centre[2]).expand(*slots.shape[:2], 1)
    return slots.to(device, torch.int32), local[..., 0].to(device, torch.int32)


@torch.library.custom_op("flexsparse::tile_windows", mutates_args=())
def tile_windows(
    grid: Sequence[int], tile: Sequence[int], window: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Slots of every window and the place of its representative; an op for the reason of `layout.tile_index`."""
    found = _windows(tuple(grid), tuple(tile), tuple(window), device)  # type: ignore[arg-type]
    return cast(tuple[Tensor, Tensor], tuple(x.clone() for x in found))


@tile_windows.register_fake
def _(grid: Sequence[int], tile: Sequence[int], window: Sequence[int], device: torch.device) -> Any:
    N: int = 1
    for extent, side in zip(grid, tile):
        N = N * ceil_div(extent, side)
    A = math.prod(ceil_div(side, w) for side, w in zip(tile, window))

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    return empty(N, A, math.prod(window)), empty(N, A)


def windows_of(layout: TileLayout, window: Axes | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Windows of every query tile.

    Args:
        layout: query layout.
        window: tokens of one window along each axis; None for the whole tile. Cut where the tile ends.
        device: where the result lives.

    Returns:
        Slots int32 ``[N, A, n]``, ascending, -1 where a window has fewer tokens; and the place in the window of its
        representative, the token at ``floor(extent / 2)`` on each axis of the window's valid extent, ``[N, A]``.
    """
    shape: Axes = layout.sides if window is None else cast(Axes, tuple(map(min, window, layout.sides)))
    if is_tracing() or layout.symbolic:
        return torch.ops.flexsparse.tile_windows(list(layout.grid), list(layout.sides), list(shape), device)
    return _windows(layout.grid, layout.sides, shape, device)
