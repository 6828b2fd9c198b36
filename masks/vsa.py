"""VSA: video sparse attention (arXiv 2505.13389, section 2.2). Shape letters as in `base`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor

from flexsparse.given import keywords_only, to_int
from flexsparse.layout import TileLayout
from flexsparse.masks.base import MaskBuilder
from flexsparse.masks.coarse import CoarseInputs, coarse_stage
from flexsparse.masks.static import StaticBuilder, check_within
from flexsparse.ops.choice import Rule
from flexsparse.ops.select_tiles import tiles_to_keep
from flexsparse.schedule import Ratio, check_ratio, lowest, rule_of, target
from flexsparse.selection import TileSelection
from flexsparse.tables import larger


@keywords_only(either="top_k")
@dataclass(frozen=True, kw_only=True)
class VSA(MaskBuilder):
    """Keep the ``top_k`` KV tiles with the highest pooled score, in every row.

    Scores are ``mean(q tile) . mean(k tile) * scale`` (raw, not their softmax: the same order without the ties that
    rounding a softmax makes). The coarse output is ``softmax(scores) @ mean(v tile)``; a gate adds it.

    Args:
        sparsity: share of KV tiles to drop, in [0, 1], or a `SparsitySchedule`: ``top_k`` is
            ``ceil((1 - sparsity) * M)``, at least 1. The count is computed in float64, as FastVideo does: ``sparsity=0.95`` of
            1440 tiles keeps 73, since 0.05 is not exact; give ``top_k`` for an exact count.
        top_k: KV tiles to keep, at least 1. Give this or ``sparsity``.
        count_bias: add ``log(valid tokens)`` of a KV tile to its score, so that a partial tile weighs what its
            tokens weigh. Off in the paper, which has no partial tiles.
        within: a static builder; only its tiles are candidates, for the selection and the coarse softmax alike.

    Raises:
        ValueError: both or neither of sparsity and top_k, or one out of range.
        TypeError: a parameter of another type, or ``within`` that is no static builder.
    """

    sparsity: Ratio | None = None
    top_k: int | None = None
    count_bias: bool = False
    within: StaticBuilder | None = None

    has_coarse: ClassVar[bool] = True
    reads_tiles: ClassVar[bool] = False
    heads_alike: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.top_k is None):
            raise ValueError(f"VSA has sparsity={self.sparsity} and top_k={self.top_k}: give exactly one of them")
        if self.top_k is not None:
            top_k = to_int(self.top_k)
            if top_k is None:
                raise TypeError(f"VSA top_k is {self.top_k!r}: give an int of at least 1")
            if top_k < 1:
                raise ValueError(f"VSA top_k is {top_k}: give an int of at least 1")
            object.__setattr__(self, "top_k", top_k)
        else:
            object.__setattr__(self, "sparsity", check_ratio("VSA sparsity", self.sparsity, zero=True, one=True))
        check_within("VSA", self.within)

    def check(self, layout: TileLayout, kv_layout: TileLayout) -> None:
        if self.top_k is not None and self.top_k > kv_layout.num_tiles:
            raise ValueError(
                f"VSA top_k is {self.top_k}, but grid {kv_layout.grid} has {kv_layout.num_tiles} tiles of "
                f"{kv_layout.tile}: give at most {kv_layout.num_tiles}, or a sparsity, which fits every grid"
            )
        if self.within is not None:
            self.within.check(layout, kv_layout)

    def tiles_kept(self, M: int) -> int:
        """``top_k`` of a row of M tiles, now."""
        return self.top_k or int(tiles_to_keep(self.rule(), M))

    def rule(self) -> Rule:
        """How many tiles a row keeps."""
        if self.top_k is not None:
            return Rule(name="top_k", value=float(self.top_k))
        return rule_of("sparsity", cast(Ratio, self.sparsity))

    def capacity(self, M: int) -> int:
        """Static list length: the most tiles that a row can keep."""
        if self.top_k is not None:
            return self.top_k
        return larger(1, math.ceil((1 - lowest(cast(Ratio, self.sparsity))) * M))

    def plan(self, coarse: CoarseInputs, v: Tensor | None = None) -> tuple[TileSelection, Tensor | None]:
        capacity = self.capacity(coarse.kv_layout.num_tiles)
        found = coarse_stage(coarse, v, self.rule(), capacity, within=self.within, count_bias=self.count_bias)
        return coarse.selection(found.bits, found.counts, capacity), found.out

    def nominal_density(self, layout: TileLayout, kv_layout: TileLayout) -> float:
        M = kv_layout.num_tiles
        if self.top_k is not None:
            kept = self.top_k
        else:
            kept = min(max(math.ceil((1 - target(cast(Ratio, self.sparsity))) * M), 1), M)
        if self.within is None:
            return kept / M
        allowed = self.within.kept(layout, kv_layout)
        return float(allowed.clamp_max(kept).double().mean() / M)
