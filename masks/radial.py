"""Radial: a static mask that narrows with temporal distance (Radial Attention, arXiv 2506.19852, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexsparse.given import keywords_only, to_int
from flexsparse.layout import TileLayout
from flexsparse.masks.static import StaticBuilder


@keywords_only()
@dataclass(frozen=True, kw_only=True)
class Radial(StaticBuilder):
    """Keep a spatial band whose width halves each time the temporal distance doubles.

    The paper's rule, on tiles: with s tiles a frame, spatial distance d in raster order of a frame's tiles and
    ``r = 2 ** floor(log2(max(temporal distance, 1)))``, a tile is kept where ``(d + 1) * r <= s``; where the band
    is narrower than one tile (``r > s``), the same place of every ``ceil(r / s)``-th frame is kept.

    Args:
        first_frames: temporal tiles at the start that every row keeps besides (an attention sink), 0 for none.

    Raises:
        ValueError: a negative number of frames.
    """

    first_frames: int = 0

    def __post_init__(self) -> None:
        first_frames = to_int(self.first_frames)
        if first_frames is None or first_frames < 0:
            raise ValueError(f"Radial first_frames is {self.first_frames!r}: give a number of tiles of at least 0")
        object.__setattr__(self, "first_frames", first_frames)

    def check(self, layout: TileLayout, kv_layout: TileLayout) -> None:
        if layout.tiles[1:] != kv_layout.tiles[1:]:
            raise ValueError(
                f"Radial compares places within a frame, but queries have {layout.tiles[1:]} tiles a frame and "
                f"keys {kv_layout.tiles[1:]}: use the same height, width and tile for both"
            )

    def most(self, layout: TileLayout, kv_layout: TileLayout) -> int:
        """The widest row by the rule; of a place whose bands no edge of the frame cuts."""
        if layout.symbolic or kv_layout.symbolic:
            return kv_layout.num_tiles
        s, frames = layout.tiles[1] * layout.tiles[2], kv_layout.tiles[0]
        widths = []
        for apart in range(max(layout.tiles[0], frames)):
            r = 1 << max(apart, 1).bit_length() - 1
            widths.append(min(s, 2 * (s // r) - 1) if r <= s else int(apart % -(-r // s) == 0))
        rows = range(layout.tiles[0])
        return max(sum(s if k < self.first_frames else widths[abs(q - k)] for k in range(frames)) for q in rows)

    def tile_mask(self, layout: TileLayout, kv_layout: TileLayout, device: torch.device) -> Tensor:
        s = layout.tiles[1] * layout.tiles[2]
        q_frame, k_frame = (torch.arange(one.tiles[0], device=device) for one in (layout, kv_layout))
        place = torch.arange(s, device=device)
        # [q frame, q place, k frame, k place]: arithmetic on pairs of frames and of places, on pairs of tiles comparisons alone
        apart = (q_frame[:, None, None, None] - k_frame[:, None]).abs()
        distance = (place[:, None, None] - place).abs()
        # floor(log2) by comparison: exact, where a float log2 may land below an integer
        octave = sum(((apart >= 2**i).long() for i in range(1, 16)), torch.zeros_like(apart))
        r = 2**octave
        band = distance < s // r
        sparse = (apart % ((r + s - 1) // s) == 0) & (distance == 0)
        sink = k_frame[:, None] < self.first_frames
        return (band | sparse | sink).reshape(layout.num_tiles, kv_layout.num_tiles)
