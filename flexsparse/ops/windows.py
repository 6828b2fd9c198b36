"""Windows of BSA: how the tokens of one query tile are grouped, and which of a window is its representative.

Shape letters: N query tiles, A windows of a tile, n tokens of a whole window.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flexsparse.tables import ceil_div, lasting

Axes = tuple[int, int, int]


@functools.lru_cache(128)
@torch.inference_mode(False)  # what is cached must serve training later
def window_table(grid: Axes, tile: Axes, window: Axes, device: torch.device) -> tuple[Tensor, Tensor]:
    """Windows of every query tile of a grid, made once for its sizes and device; not while tracing.

    Args:
        grid: latent tokens (T, H, W).
        tile: sides of a query tile.
        window: tokens of one window along each axis, at most the tile's; cut where the tile ends.
        device: where the result lives.

    Returns:
        Slots int32 ``[N, A, n]``, ascending, -1 where a window has fewer tokens; and the place in the window of its
        representative, the token at ``floor(extent / 2)`` on each axis of the window's valid extent, ``[N, A]``.
    """

    def grow(x: Tensor, axis: int) -> Tensor:  # [N] -> [N, A, n], or [A] / [n] by axis
        shape = [1, 1, 1]
        shape[axis] = -1
        return x.view(shape)

    tiles = [ceil_div(extent, side) for extent, side in zip(grid, tile)]
    parts = [ceil_div(side, w) for side, w in zip(tile, window)]

    def axes(count: Sequence[int], dim: int) -> list[Tensor]:
        index = torch.arange(math.prod(count), device="cpu")
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
    found, centres = lasting((slots, local[..., 0]), device)
    return found, centres
