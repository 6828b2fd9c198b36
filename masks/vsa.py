"""VSA: video sparse attention (arXiv 2505.13389, section 2.2). Shape letters as in `base`."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

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
from flexsparse.schedule import Ratio, check_ratio, current, lowest, target
from flexsparse.selection import TileSelection


@dataclass(frozen=True, kw_only=True)
class VSA(MaskBuilder):
    """Keep the ``top_k`` KV tiles with the highest pooled score, in every row.

    Scores are ``mean(q tile) . mean(k tile) * scale`` (raw, not their softmax: the same order without the ties that
    rounding a softmax makes). The coarse output is ``softmax(scores) @ mean(v tile)``; a gate adds it.

    Args:
        sparsity: share of KV tiles to drop, in [0, 1], or a `SparsitySchedule`: ``top_k`` is
            ``ceil((1 - sparsity) * M)``, at least 1.
        top_k: KV tiles to keep, at least 1. Give this or ``sparsity``.
        count_bias: add ``log(valid tokens)`` of a KV tile to its score, so that a partial tile weighs what its
            tokens weigh. Off in the paper, which has no partial tiles.
        within: a static builder; only its tiles are candidates, for the selection and the coarse softmax alike.

    Raises:
        ValueError: both or neither of sparsity and top_k, or one out of range.
    """

    sparsity: Ratio | None = None
    top_k: int | None = None
    count_bias: bool = False
    within: StaticBuilder | None = None

    has_coarse: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.top_k is None):
            raise ValueError(f"VSA has sparsity={self.sparsity} and top_k={self.top_k}: give exactly one of them")
        if self.top_k is not None:
            try:
                value = operator.index(self.top_k)
            except TypeError:
                raise TypeError(f"VSA top_k is {self.top_k!r}: give an int of at least 1") from None
            if value < 1:
                raise ValueError(f"VSA top_k is {value}: give an int of at least 1")
            object.__setattr__(self, "top_k", value)
        else:
            check_ratio("VSA sparsity", self.sparsity, zero=True, one=True)
        check_within("VSA", self.within)

    def check(self, layout: TileLayout, kv_layout: TileLayout) -> None:
        if self.top_k is not None and self.top_k > kv_layout.num_tiles:
            raise ValueError(
                f"VSA top_k is {self.top_k}, but grid {kv_layout.grid} has {kv_layout.num_tiles} tiles of "
                f"{kv_layout.tile}: give at most {kv_layout.num_tiles}, or a sparsity, which fits every grid"
            )
        if self.within is not None:
            self.within.check(layout, kv_layout)

    def tiles_kept(self, M: int) -> int | Tensor:
        """``top_k``: an int where everything is known, else a 0-d int64 tensor."""
        if self.top_k is not None:
            return self.top_k
        sparsity = current(cast(Ratio, self.sparsity))
        if isinstance(sparsity, float | int) and isinstance(M, int):
            return min(max(math.ceil((1 - sparsity) * M), 1), M)
        total = torch.scalar_tensor(M, dtype=torch.float64)
        return torch.minimum(((1 - sparsity) * total).ceil().clamp_min(1), total).to(torch.int64)

    def capacity(self, M: int) -> int:
        """Static list length: the most tiles that a row can keep."""
        if self.top_k is not None:
            return self.top_k
        if not isinstance(M, int):
            return M
        return min(max(math.ceil((1 - lowest(cast(Ratio, self.sparsity))) * M), 1), M)

    def plan(self, coarse: CoarseInputs, v: Tensor | None = None) -> tuple[TileSelection, Tensor | None]:
        layout, kv_layout = coarse.layout, coarse.kv_layout
        M = kv_layout.num_tiles
        scores = tile_scores(coarse.pooled_q(), coarse.pooled_k(), coarse.scale)
        if self.count_bias:
            log_counts = coarse.kv_counts.clamp_min(1).to(scores.dtype).log()
            scores = scores + (log_counts if log_counts.dim() == 1 else log_counts[:, None, None])
        allowed = candidates(self.within, coarse)
        ranked = scores.detach()
        if allowed is not None:
            ranked = ranked.masked_fill(~allowed, -math.inf)
        keep = keep_top(ranked, row_count(self.tiles_kept(M), allowed))
        fields: dict[str, Any] = {"capacity": self.capacity(M), "tile_counts": coarse.tile_counts}
        selection = TileSelection.from_mask(keep, layout, kv_layout, **fields)
        if v is None:
            return selection, None
        return selection, masked_softmax(scores, allowed) @ coarse.pooled_v(v)

    def nominal_density(self, layout: TileLayout, kv_layout: TileLayout) -> float:
        M = kv_layout.num_tiles
        if self.top_k is not None:
            kept = self.top_k
        else:
            kept = min(max(math.ceil((1 - target(cast(Ratio, self.sparsity))) * M), 1), M)
        if self.within is None:
            return kept / M
        allowed = self.within.mask(layout, kv_layout, torch.device("cpu")).sum(-1)
        return float(allowed.clamp_max(kept).double().mean() / M)
