"""Dense: every tile. The control of every comparison, and a neutral element for combinations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexsparse.layout import TileLayout
from flexsparse.masks.static import StaticBuilder


@dataclass(frozen=True, kw_only=True)
class Dense(StaticBuilder):
    """Keep every KV tile."""

    def tile_mask(self, layout: TileLayout, kv_layout: TileLayout, device: torch.device) -> Tensor:
        return torch.ones(layout.num_tiles, kv_layout.num_tiles, dtype=torch.bool, device=device)
