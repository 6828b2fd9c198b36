"""Builders whose tiles depend on the layout alone. Shape letters as in `base`."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from flexsparse.given import never_changes
from flexsparse.layout import TileLayout
from flexsparse.masks.base import MaskBuilder
from flexsparse.masks.checked import checked_mask
from flexsparse.masks.coarse import CoarseInputs
from flexsparse.selection import TileSelection
from flexsparse.tables import is_tracing, lasting
from flexsparse.tile_bits import pack_bits


@functools.lru_cache(64)
@torch.inference_mode(False)  # what is cached must serve training later
def _cached_mask(builder: StaticBuilder, layout: TileLayout, kv_layout: TileLayout, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return checked_mask(builder, layout, kv_layout, device)
    return lasting((_cached_mask(builder, layout, kv_layout, torch.device("cpu")),), device, torch.bool)[0]


@functools.lru_cache(64)
@torch.inference_mode(False)
def _cached_bits(
    builder: StaticBuilder, layout: TileLayout, kv_layout: TileLayout, device: torch.device
) -> tuple[Tensor, Tensor, int]:
    if device.type != "cpu":  # a report asks on the CPU as well: made once, as a large mask takes seconds
        bits, counts, most = _cached_bits(builder, layout, kv_layout, torch.device("cpu"))
        bits, counts = lasting((bits, counts), device)
        return bits, counts, most
    mask = checked_mask(builder, layout, kv_layout, device)
    counts = mask.sum(-1, dtype=torch.int32)
    bits, counts = lasting((pack_bits(mask), counts), device)
    return bits, counts, max(1, int(counts.max()))


class StaticBuilder(MaskBuilder):
    """A builder whose tiles depend on the layout alone: built once per layout and cached.

    Cached are frozen dataclasses of numbers, texts and such builders; of another class, which may change, `tile_mask` is called
    at every call.

    In a compiled graph the mask is a few comparisons that fuse into whatever reads it.
    """

    reads_tiles: ClassVar[bool] = False
    heads_alike: ClassVar[bool] = True

    def tile_mask(self, layout: TileLayout, kv_layout: TileLayout, device: torch.device) -> Tensor:
        """Bool ``[N, M]``: tiles that each query tile keeps."""
        raise NotImplementedError(f"{type(self).__name__} must define tile_mask()")

    def mask(self, layout: TileLayout, kv_layout: TileLayout, device: torch.device) -> Tensor:
        """`tile_mask`, cached."""
        if not self._cached(layout, kv_layout):
            return checked_mask(self, layout, kv_layout, device)
        return _cached_mask(self, layout, kv_layout, device)

    def plan(self, coarse: CoarseInputs, v: Tensor | None = None) -> tuple[TileSelection, Tensor | None]:
        layout, kv_layout = coarse.layout, coarse.kv_layout
        heads, device, alive = coarse.q.shape[:2], coarse.q.device, coarse.alive()
        if alive is None and self._cached(layout, kv_layout):
            bits, counts, capacity = _cached_bits(self, layout, kv_layout, device)
        else:
            keep = self.mask(layout, kv_layout, device)
            bits, counts = torch.ops.flexsparse.pack_tiles(keep if alive is None else keep & alive)
            capacity = self.most(layout, kv_layout)
        # one mask for all heads, packed before it is repeated
        bits, counts = bits.expand(*heads, *bits.shape[-2:]), counts.expand(*heads, counts.shape[-1])
        return coarse.selection(bits.contiguous(), counts.contiguous(), capacity), None

    def packed(self, layout: TileLayout, kv_layout: TileLayout, device: torch.device) -> Tensor | None:
        """The mask as words, int32 ``[1, 1, N, W]``, cached; None where it may change."""
        return _cached_bits(self, layout, kv_layout, device)[0][None, None] if self._cached(layout, kv_layout) else None

    def _cached(self, layout: TileLayout, kv_layout: TileLayout) -> bool:
        return not (is_tracing() or layout.symbolic or kv_layout.symbolic) and never_changes(self)

    def most(self, layout: TileLayout, kv_layout: TileLayout) -> int:
        """An upper bound of the tiles that a row keeps: the static length of its list in a graph."""
        return kv_layout.num_tiles

    def kept(self, layout: TileLayout, kv_layout: TileLayout) -> Tensor:
        """Int32 ``[N]``, on the CPU: how many tiles each query tile keeps; cached, as reports ask at every call."""
        device = torch.device("cpu")
        if not self._cached(layout, kv_layout):
            return checked_mask(self, layout, kv_layout, device).sum(-1, dtype=torch.int32)
        return _cached_bits(self, layout, kv_layout, device)[1]

    def nominal_density(self, layout: TileLayout, kv_layout: TileLayout) -> float:
        return float(self.kept(layout, kv_layout).double().mean() / kv_layout.num_tiles)


def tile_axes(layout: TileLayout, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tile coordinates (t, h, w) of every video tile, int64 ``[N]`` each."""
    _, h, w = layout.tiles
    index = torch.arange(layout.num_tiles, device=device)
    return index // (h * w), index // w % h, index % w


def check_within(name: str, within: Any) -> None:
    """Raise a `TypeError` where ``within`` is no static builder."""
    if within is not None and not isinstance(within, StaticBuilder):
        raise TypeError(
            f"{name} within is {within!r}: give a static builder (SlidingTile, Radial, FrameCausal, Dense, or a "
            "combination of them)"
        )
