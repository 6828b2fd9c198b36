"""TopP: keep the tiles that hold a share of the coarse attention mass (as FastVideo's BSA backend, VMoBA, XAttention).

Shape letters as in `base`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flexsparse.layout import TileLayout
from flexsparse.masks.base import (
    CoarseInputs,
    MaskBuilder,
    StaticBuilder,
    candidates,
    check_within,
    keep_top,
    masked_softmax,
    row_count,
    tile_scores,
)
from flexsparse.schedule import Ratio, check_ratio, current
from flexsparse.selection import TileSelection


def tiles_for_mass(weights: Tensor, mass: float | Tensor, allowed: Tensor | None) -> Tensor:
    """Size of the smallest set whose weights reach ``mass``.

    Args:
        weights: softmax over tiles ``[B, H, N, M]``.
        mass: in (0, 1]; from 1 on, every allowed tile is needed.
        allowed: bool, broadcasts to ``weights``, or None.

    Returns:
        int64 ``[B, H, N, 1]``.
    """
    ranked = weights.sort(dim=-1, descending=True).values
    before = ranked.cumsum(-1) - ranked
    every = torch.as_tensor(mass >= 1, device=weights.device)
    needed = ((before < mass) | every).sum(-1, keepdim=True)
    return torch.as_tensor(row_count(needed, allowed))


def check_tiles(method: str, min_tiles: int, max_tiles: int | None) -> None:
    """Raise a `ValueError` where the bounds on a row's tiles make no sense."""
    if not isinstance(min_tiles, int) or min_tiles < 1:
        raise ValueError(f"{method} min_tiles is {min_tiles!r}: give an int of at least 1")
    if max_tiles is not None and not (isinstance(max_tiles, int) and max_tiles >= min_tiles):
        raise ValueError(f"{method} max_tiles is {max_tiles!r}: give an int of at least min_tiles={min_tiles}, or None")


def bounded(wanted: Tensor, allowed: Tensor | None, min_tiles: int, capacity: int, M: int) -> tuple[Tensor, Tensor]:
    """Tiles that each row keeps, int64 ``[B, H, N, 1]``, and how many rows wanted more than the capacity (0-d)."""
    wanted = torch.as_tensor(row_count(wanted.clamp_min(min_tiles).clamp_max(M), allowed))
    return wanted.clamp_max(capacity), (wanted > capacity).sum()


@dataclass(frozen=True, kw_only=True)
class TopP(MaskBuilder):
    """Keep the smallest set of KV tiles whose coarse softmax mass reaches ``mass``, in every row.

    Args:
        mass: in (0, 1], or a `SparsitySchedule` of it; 1 keeps all.
        min_tiles: tiles that every row keeps at least.
        max_tiles: static capacity of a row; all tiles by default. Rows that want more keep their best.
        within: a static builder; only its tiles are candidates.

    Raises:
        ValueError: a parameter out of range.
    """

    mass: Ratio = 0.9
    min_tiles: int = 1
    max_tiles: int | None = None
    within: StaticBuilder | None = None

    has_coarse: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ratio("TopP mass", self.mass, zero=False, one=True)
        check_tiles("TopP", self.min_tiles, self.max_tiles)
        check_within("TopP", self.within)

    def check(self, layout: TileLayout, kv_layout: TileLayout) -> None:
        if self.within is not None:
            self.within.check(layout, kv_layout)

    def plan(self, coarse: CoarseInputs, v: Tensor | None = None) -> tuple[TileSelection, Tensor | None]:
        layout, kv_layout = coarse.layout, coarse.kv_layout
        M = kv_layout.num_tiles
        capacity = M if self.max_tiles is None else min(self.max_tiles, M)
        scores = tile_scores(coarse.pooled_q(), coarse.pooled_k(), coarse.scale)
        allowed = candidates(self.within, coarse)
        weights = masked_softmax(scores, allowed)
        wanted = tiles_for_mass(weights.detach(), current(self.mass), allowed)
        count, capped = bounded(wanted, allowed, self.min_tiles, capacity, M)
        ranked = scores.detach() if allowed is None else scores.detach().masked_fill(~allowed, -math.inf)
        fields: dict[str, Any] = {"capacity": capacity, "capped": capped, "tile_counts": coarse.tile_counts}
        selection = TileSelection.from_mask(keep_top(ranked, count), layout, kv_layout, **fields)
        return selection, None if v is None else weights @ coarse.pooled_v(v)

    def nominal_density(self, layout: TileLayout, kv_layout: TileLayout) -> float:
        """An upper bound: how many tiles hold the mass depends on the data."""
        M = kv_layout.num_tiles
        return 1.0 if self.max_tiles is None else min(self.max_tiles, M) / M
