"""A builder for some of the heads, or some of the query tiles, of a whole attention.

Shape letters: B batch, H query heads, N query tiles, M KV tiles.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexsparse.layout import TileLayout
from flexsparse.masks.base import MaskBuilder
from flexsparse.masks.bsa import BSA
from flexsparse.masks.combine import Combination, PerHead
from flexsparse.masks.static import StaticBuilder
from flexsparse.selection import KeptQueries, TileSelection


def of_heads(builder: Any, start: int, end: int, heads: int) -> Any:
    """A builder or a `TileSelection` for query heads ``start`` to ``end`` out of ``heads``.

    Raises:
        ValueError: `PerHead` or a selection for another number of heads.
    """
    if isinstance(builder, TileSelection):
        _same(f"the selection is for {builder.counts.shape[1]} heads", builder.counts.shape[1], heads)
        queries = builder.queries
        if queries is not None:
            fields = [x[:, start:end] for x in (queries.kept, queries.source, queries.position)]
            queries = KeptQueries(fields[0], queries.counts, *fields[1:])
        bits, counts = builder.bits[:, start:end], builder.counts[:, start:end]
        return dataclasses.replace(builder, bits=bits, counts=counts, queries=queries)
    if isinstance(builder, PerHead):
        _same(f"PerHead heads has {len(builder.heads)} entries", len(builder.heads), heads)
        return dataclasses.replace(builder, heads=builder.heads[start:end])
    if isinstance(builder, Combination):
        return dataclasses.replace(builder, parts=tuple(of_heads(p, start, end, heads) for p in builder.parts))
    return builder


def _same(said: str, count: int, heads: int) -> None:
    if count != heads:
        raise ValueError(f"{said}, but q has {heads}: give it for all heads, not for those of this rank")


@dataclass(frozen=True)
class Rows(StaticBuilder):
    """Some query tiles' rows of a static builder.

    Attributes:
        whole: the builder.
        layout: the layout of all query tiles.
        start: first query tile.
        end: past the last one.
    """

    whole: StaticBuilder
    layout: TileLayout
    start: int
    end: int

    def check(self, layout: TileLayout, kv_layout: TileLayout) -> None:
        self.whole.check(self.layout, kv_layout)

    def tile_mask(self, layout: TileLayout, kv_layout: TileLayout, device: torch.device) -> Tensor:
        return self.whole.mask(self.layout, kv_layout, device)[self.start : self.end]


def of_rows(builder: Any, layout: TileLayout, start: int, end: int, own: TileLayout) -> Any:
    """A builder or a `TileSelection` for query tiles ``start`` to ``end`` of a layout.

    Args:
        builder: for all query tiles.
        layout: their layout.
        start: first query tile.
        end: past the last one.
        own: a layout of these query tiles alone.

    Raises:
        TypeError: a builder of somebody's own, which sees no grid of query tiles here.
        ValueError: pruned queries, whose windows are parts of the grid.
    """
    if isinstance(builder, TileSelection):
        if builder.queries is not None:
            raise ValueError(
                "the selection prunes queries (BSA), which mesh dimension tiles= cannot: use ulysses= alone"
            )
        bits, counts = builder.bits[:, :, start:end], builder.counts[:, :, start:end]
        return dataclasses.replace(builder, bits=bits, counts=counts, layout=own)
    if isinstance(builder, StaticBuilder):
        return Rows(builder, layout, start, end)
    if isinstance(builder, BSA) and builder.prunes:
        raise ValueError(
            f"BSA has keep_queries={builder.keep_queries}, but windows are parts of the grid, and a rank of mesh dimension "
            "tiles= holds a list of tiles: give keep_queries=1, or use ulysses= alone"
        )
    if isinstance(builder, BSA) and builder.statistics == "head":
        raise ValueError(
            "BSA has statistics='head', a mean over all query tiles, of which a rank of mesh dimension tiles= holds some: "
            "give statistics='row', or use ulysses= alone"
        )
    if not isinstance(builder, MaskBuilder) or not type(builder).__module__.startswith("flexsparse."):
        raise TypeError(
            f"builder is {type(builder).__name__}: mesh dimension tiles= takes flexsparse's own builders; use ulysses= alone"
        )

    def narrow(value: Any) -> Any:
        if isinstance(value, MaskBuilder):
            return of_rows(value, layout, start, end, own)
        return tuple(narrow(item) for item in value) if isinstance(value, tuple) else value

    names = [field.name for field in dataclasses.fields(builder)]  # type: ignore[arg-type]
    return dataclasses.replace(builder, **{name: narrow(getattr(builder, name)) for name in names})  # type: ignore[type-var]
