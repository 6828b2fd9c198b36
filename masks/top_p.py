"""TopP: keep the tiles that hold a share of the coarse attention mass (as FastVideo's BSA backend, VMoBA, XAttention).

Shape letters as in `base`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flexsparse.given import keywords_only, to_int
from flexsparse.layout import TileLayout
from flexsparse.masks.base import MaskBuilder
from flexsparse.masks.coarse import CoarseInputs, coarse_stage
from flexsparse.masks.static import StaticBuilder, check_within
from flexsparse.schedule import Ratio, check_ratio, rule_of
from flexsparse.selection import TileSelection
from flexsparse.tables import smaller


def check_tiles(method: str, min_tiles: int, max_tiles: int | None) -> tuple[int, int | None]:
    """The bounds on a row's tiles as plain ints; raises a `ValueError` where they make no sense."""
    least, most = to_int(min_tiles), to_int(max_tiles)
    if least is None or least < 1:
        raise ValueError(f"{method} min_tiles is {min_tiles!r}: give an int of at least 1")
    if max_tiles is not None and (most is None or most < least):
        raise ValueError(f"{method} max_tiles is {max_tiles!r}: give an int of at least min_tiles={least}, or None")
    return least, most


@keywords_only()
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
        TypeError: a parameter of another type, or ``within`` that is no static builder.
    """

    mass: Ratio = 0.9
    min_tiles: int = 1
    max_tiles: int | None = None
    within: StaticBuilder | None = None

    has_coarse: ClassVar[bool] = True
    reads_tiles: ClassVar[bool] = False
    heads_alike: ClassVar[bool] = True

    def __post_init__(self) -> None:
        least, most = check_tiles("TopP", self.min_tiles, self.max_tiles)
        object.__setattr__(self, "mass", check_ratio("TopP mass", self.mass, zero=False, one=True))
        object.__setattr__(self, "min_tiles", least)
        object.__setattr__(self, "max_tiles", most)
        check_within("TopP", self.within)

    def check(self, layout: TileLayout, kv_layout: TileLayout) -> None:
        if self.within is not None:
            self.within.check(layout, kv_layout)

    def plan(self, coarse: CoarseInputs, v: Tensor | None = None) -> tuple[TileSelection, Tensor | None]:
        M = coarse.kv_layout.num_tiles
        capacity = M if self.max_tiles is None else smaller(self.max_tiles, M)
        found = coarse_stage(coarse, v, rule_of("mass", self.mass, self.min_tiles), capacity, within=self.within)
        capped = coarse.cut(found.wanted, capacity)
        return coarse.selection(found.bits, found.counts, capacity, capped=capped), found.out

    def nominal_density(self, layout: TileLayout, kv_layout: TileLayout) -> float:
        """An upper bound: how many tiles hold the mass depends on the data."""
        M = kv_layout.num_tiles
        return 1.0 if self.max_tiles is None else min(self.max_tiles, M) / M
