"""FrameCausal: chunks of frames see only themselves and earlier ones, as autoregressive video models need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexsparse.given import keywords_only, to_int
from flexsparse.layout import TileLayout
from flexsparse.masks.static import StaticBuilder, tile_axes


@keywords_only()
@dataclass(frozen=True, kw_only=True)
class FrameCausal(StaticBuilder):
    """Keep the KV tiles of the query tile's own chunk of frames and of earlier chunks.

    Args:
        chunk: latent frames of a chunk, a multiple of the tile's t (a tile may not straddle two chunks).

    Raises:
        ValueError: a chunk below 1; with a layout, one that is no multiple of the tile's t.
    """

    chunk: int

    def __post_init__(self) -> None:
        chunk = to_int(self.chunk)
        if chunk is None or chunk < 1:
            raise ValueError(f"FrameCausal chunk is {self.chunk!r}: give an int of at least 1 frame")
        object.__setattr__(self, "chunk", chunk)

    def check(self, layout: TileLayout, kv_layout: TileLayout) -> None:
        for one in (layout, kv_layout):
            side = one.sides[0]
            if self.chunk % side:
                raise ValueError(
                    f"FrameCausal chunk is {self.chunk} frames, but a tile {one.tile} spans {side}: a tile would "
                    f"see into the future; give a multiple of {side}, or another tile"
                )

    def tile_mask(self, layout: TileLayout, kv_layout: TileLayout, device: torch.device) -> Tensor:
        self.check(layout, kv_layout)
        rows = tile_axes(layout, device)[0] * layout.sides[0] // self.chunk
        columns = tile_axes(kv_layout, device)[0] * kv_layout.sides[0] // self.chunk
        return columns[None] <= rows[:, None]
