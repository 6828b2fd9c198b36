"""Union, Intersection and PerHead: selections made of other builders' selections. Shape letters as in `base`."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from flexsparse.given import keywords_only, to_int
from flexsparse.layout import TileLayout
from flexsparse.masks.base import MaskBuilder
from flexsparse.masks.checked import planned
from flexsparse.masks.coarse import CoarseInputs, expand_heads, take_heads
from flexsparse.masks.static import StaticBuilder
from flexsparse.selection import KeptQueries, TileSelection
from flexsparse.tables import larger, smaller
from flexsparse.tile_bits import count_bits

Kind = Literal["union", "intersection"]


def _check_parts(name: str, parts: tuple[Any, ...]) -> None:
    if not parts:
        raise ValueError(f"{name} has no builders: give at least one")
    for part in parts:
        if not isinstance(part, MaskBuilder):
            raise TypeError(f"{name} got {part!r}: give mask builders")


def _join(masks: list[Tensor], kind: Kind) -> Tensor:
    out = masks[0]
    for mask in masks[1:]:
        out = out | mask if kind == "union" else out & mask
    return out


def _bound(each: list[int], kind: Kind, kv_layout: TileLayout) -> int:
    """The most tiles that a row keeps, from that of each part."""
    bound = functools.reduce(operator.add if kind == "union" else smaller, each)
    return smaller(bound, kv_layout.num_tiles)


def name_of(builder: Any) -> str:
    """What messages call a builder: by its class, or by the function that made it."""
    combined = isinstance(builder, StaticCombination | Combination)
    return builder.kind.capitalize() if combined else type(builder).__name__


@dataclass(frozen=True)
class StaticCombination(StaticBuilder):
    """`Union` or `Intersection` of static builders: static itself, so that it can restrict a dynamic one."""

    parts: tuple[MaskBuilder, ...]
    kind: Kind

    def __repr__(self) -> str:
        return f"{self.kind.capitalize()}({', '.join(map(repr, self.parts))})"

    def check(self, layout: TileLayout, kv_layout: TileLayout) -> None:
        for part in self.parts:
            part.check(layout, kv_layout)

    def most(self, layout: TileLayout, kv_layout: TileLayout) -> int:
        each = [part.most(layout, kv_layout) for part in self.parts if isinstance(part, StaticBuilder)]
        return _bound(each, self.kind, kv_layout)

    def tile_mask(self, layout: TileLayout, kv_layout: TileLayout, device: torch.device) -> Tensor:
        return _join([p.mask(layout, kv_layout, device) for p in self.parts if isinstance(p, StaticBuilder)], self.kind)


@dataclass(frozen=True)
class Combination(MaskBuilder):
    """`Union` or `Intersection` with a dynamic part. Query pruning and the coarse output come from the part that has them."""

    parts: tuple[MaskBuilder, ...]
    kind: Kind

    def __repr__(self) -> str:
        return f"{self.kind.capitalize()}({', '.join(map(repr, self.parts))})"

    @property
    def has_coarse(self) -> bool:  # type: ignore[override]
        return any(part.has_coarse for part in self.parts)

    @property
    def reads_tiles(self) -> bool:  # type: ignore[override]
        return any(part.reads_tiles for part in self.parts)

    @property
    def heads_alike(self) -> bool:  # type: ignore[override]
        return all(part.heads_alike for part in self.parts)

    def query_rows(self, layout: TileLayout) -> int:
        return min(part.query_rows(layout) for part in self.parts)

    def check(self, layout: TileLayout, kv_layout: TileLayout) -> None:
        for part in self.parts:
            part.check(layout, kv_layout)

    def plan(self, coarse: CoarseInputs, v: Tensor | None = None) -> tuple[TileSelection, Tensor | None]:
        selections, coarse_out = [], None
        for part in self.parts:
            wants = v if part.has_coarse and coarse_out is None else None
            selection, out = planned(part, coarse, wants)
            selections.append(selection)
            coarse_out = coarse_out if out is None else out
        # words: a bool for each tile is eight times as large, and what packing makes of it 32 times
        bits = _join([selection.bits for selection in selections], self.kind)
        fields: dict[str, Any] = {
            "queries": _only_queries(self.kind.capitalize(), selections),
            "capped": _total([selection.capped for selection in selections]),
        }
        capacity = _bound([selection.capacity for selection in selections], self.kind, coarse.kv_layout)
        return coarse.selection(bits, count_bits(bits), capacity, **fields), coarse_out

    def nominal_density(self, layout: TileLayout, kv_layout: TileLayout) -> float:
        """A bound: the overlap of the parts depends on the data."""
        parts = [part.nominal_density(layout, kv_layout) for part in self.parts]
        return min(1.0, sum(parts)) if self.kind == "union" else min(parts)


def _total(values: list[Tensor | None]) -> Tensor | None:
    present = [value for value in values if value is not None]
    return torch.stack(present).sum() if present else None


def _only_queries(name: str, selections: list[TileSelection]) -> KeptQueries | None:
    pruning = [selection.queries for selection in selections if selection.queries is not None]
    if len(pruning) > 1:
        raise ValueError(f"{name} has {len(pruning)} builders that prune queries (BSA): give at most one")
    return pruning[0] if pruning else None


def Union(*parts: MaskBuilder) -> MaskBuilder:
    """Keep what any of the builders keeps; static if all of them are.

    >>> builder = fs.Union(fs.VSA(top_k=16), fs.SlidingTile(window=(3, 3, 3)))     # VSA's "C&F&L", Table 1b
    """
    return _combine("Union", parts, "union")


def Intersection(*parts: MaskBuilder) -> MaskBuilder:
    """Keep what all of the builders keep; static if all of them are. A row may keep nothing: its output is zero.

    To restrict a dynamic builder *before* it selects, give it ``within=`` instead.
    """
    return _combine("Intersection", parts, "intersection")


def _combine(name: str, parts: tuple[MaskBuilder, ...], kind: Kind) -> MaskBuilder:
    _check_parts(name, parts)
    static = all(isinstance(part, StaticBuilder) for part in parts)
    return (StaticCombination if static else Combination)(tuple(parts), kind)


def _indices(heads: Any, builders: int) -> tuple[int, ...]:
    found = [to_int(head) for head in heads] if isinstance(heads, Iterable) else []
    if not found or any(index is None or not 0 <= index < builders for index in found):
        raise ValueError(
            f"PerHead heads is {heads!r}: give for each query head the index of one of the {builders} builders, "
            "as a tuple of ints"
        )
    return cast(tuple[int, ...], tuple(found))


@keywords_only()
@dataclass(frozen=True, kw_only=True)
class PerHead(MaskBuilder):
    """A builder for each query head.

    Args:
        builders: the builders.
        heads: for each query head, the index of its builder.

    Raises:
        TypeError: what is given is no mask builders.
        ValueError: an index that names no builder; a builder that prunes queries (packing is the same for all
            heads); with q, a list that does not have one entry for each head.
    """

    builders: tuple[MaskBuilder, ...]
    heads: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.builders, Iterable):
            raise TypeError(f"PerHead builders is {self.builders!r}: give a tuple of mask builders")
        builders = tuple(self.builders)
        _check_parts("PerHead", builders)
        object.__setattr__(self, "builders", builders)
        object.__setattr__(self, "heads", _indices(self.heads, len(builders)))

    @property
    def has_coarse(self) -> bool:  # type: ignore[override]
        return all(self.builders[head].has_coarse for head in set(self.heads))

    @property
    def reads_tiles(self) -> bool:  # type: ignore[override]
        used = [self.builders[head] for head in set(self.heads)]
        return any(builder.reads_tiles or not builder.heads_alike for builder in used)

    def check(self, layout: TileLayout, kv_layout: TileLayout) -> None:
        for builder in self.builders:
            builder.check(layout, kv_layout)

    def plan(self, coarse: CoarseInputs, v: Tensor | None = None) -> tuple[TileSelection, Tensor | None]:
        H = coarse.q.shape[1]
        if len(self.heads) != H:
            raise ValueError(f"PerHead heads has {len(self.heads)} entries, but q has {H} heads: give one for each")
        rows: list[tuple[Tensor, Tensor] | None] = [None] * H  # bitmask and counts
        outs: list[Tensor | None] = [None] * H
        capped, capacities = [], []
        for index, builder in enumerate(self.builders):
            heads = tuple(h for h in range(H) if self.heads[h] == index)
            if not heads:
                continue
            if builder.heads_alike:  # scores of the other heads cost less than a copy of these heads' tokens
                places = heads
                selection, out = planned(builder, dataclasses.replace(coarse, heads=heads), v)
            else:
                places = tuple(range(len(heads)))
                q, k = take_heads(coarse.q, heads), take_heads(expand_heads(coarse.k, H), heads)
                part = dataclasses.replace(coarse, q=q, k=k)
                selection, out = planned(builder, part, None if v is None else take_heads(expand_heads(v, H), heads))
            if selection.queries is not None:
                raise ValueError("PerHead has a builder that prunes queries (BSA): use it for all heads instead")
            capped.append(selection.capped)
            capacities.append(selection.capacity)
            coarse_outs = None if out is None else out.unbind(1)
            for place, h in zip(places, heads):
                rows[h] = selection.bits[:, place], selection.counts[:, place]
                outs[h] = None if coarse_outs is None else coarse_outs[place]
        bits, counts = (torch.stack(of_heads, 1) for of_heads in zip(*(row for row in rows if row is not None)))
        selection = coarse.selection(bits, counts, functools.reduce(larger, capacities), capped=_total(capped))
        present = [out for out in outs if out is not None]
        return selection, torch.stack(present, 1) if len(present) == H else None

    def nominal_density(self, layout: TileLayout, kv_layout: TileLayout) -> float:
        parts = [self.builders[head].nominal_density(layout, kv_layout) for head in self.heads]
        return sum(parts) / len(parts)
