"""SlidingTile: a static 3D window of tiles (STA, sliding tile attention, arXiv 2502.04507)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexsparse.given import keywords_only, to_axes
from flexsparse.layout import TileLayout
from flexsparse.masks.static import StaticBuilder, tile_axes
from flexsparse.tables import smaller


@keywords_only()
@dataclass(frozen=True, kw_only=True)
class SlidingTile(StaticBuilder):
    """Keep the KV tiles of a window around the query tile.

    The window moves inwards at a border, so that every row keeps the same number of tiles. Where queries and keys
    live on different grids, a query tile's centre is mapped to the KV grid by proportion.

    Args:
        window: tiles along (t, h, w), each at least 1; more than the grid has means all.

    Raises:
        ValueError: a window that is no triple of positive ints.
    """

    window: tuple[int, int, int] = (3, 3, 3)

    def __post_init__(self) -> None:
        window = to_axes(self.window)
        if window is None:
            raise ValueError(
                f"SlidingTile window is {self.window!r}: give three ints (t, h, w) of at least 1, in tiles"
            )
        object.__setattr__(self, "window", window)

    def most(self, layout: TileLayout, kv_layout: TileLayout) -> int:
        count = 1
        for width, have in zip(self.window, kv_layout.tiles):
            count = count * smaller(width, have)
        return count

    def tile_mask(self, layout: TileLayout, kv_layout: TileLayout, device: torch.device) -> Tensor:
        keep = torch.ones(layout.num_tiles, kv_layout.num_tiles, dtype=torch.bool, device=device)
        rows, columns = tile_axes(layout, device), tile_axes(kv_layout, device)
        for axis, width in enumerate(self.window):
            have, own = kv_layout.tiles[axis], layout.tiles[axis]
            centre = ((2 * rows[axis] + 1) * have) // (2 * own)
            start = (centre - width // 2).clamp_min(0)
            # no `as_tensor`, which makes a constant of a symbolic size: a graph for each resolution
            start = torch.minimum(start, torch.full((), have - width, dtype=torch.int64, device=device).clamp_min(0))
            column = columns[axis][None]
            keep = keep & (column >= start[:, None]) & (column < start[:, None] + width)
        return keep
