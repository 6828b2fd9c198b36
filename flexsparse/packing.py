"""Tile-ordered (or, with pruned queries, packed) views of q, k and v, and the way back to raster order.

Shape letters: B batch, H heads, S tokens, P padded tokens, R packed query rows, D head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flexsparse.selection import TileSelection


def pack_queries(q: Tensor, q_tiles: Tensor | None, selection: TileSelection) -> Tensor:
    """Raster queries ``[B, H, S, D]`` to the order in which they are computed, ``[B, H, R, D]``.

    Args:
        q: queries in raster order.
        q_tiles: the same in tile order ``[B, H, P, D]`` where it is at hand.
        selection: its ``queries`` say which tokens are computed.
    """
    layout, queries = selection.layout, selection.queries
    if queries is None:
        return layout.to_tiles(q) if q_tiles is None else q_tiles
    kept = q.gather(2, queries.kept.flatten(2).long()[..., None].expand(-1, -1, -1, q.shape[-1]))
    if not (layout.text_first or layout.text_last):
        return kept
    tiles = layout.to_tiles(q) if q_tiles is None else q_tiles
    first, last = layout.tiles_first * layout.slots, layout.tiles_last * layout.slots
    return torch.cat([tiles.narrow(2, 0, first), kept, tiles.narrow(2, tiles.shape[2] - last, last)], dim=2)


def unpack_rows(rows: Tensor, selection: TileSelection, fill: float = 0.0) -> Tensor:
    """Computed rows ``[B, H, R, D]`` to raster order ``[B, H, S, D]``; a pruned token takes its source's row.

    The gather's gradient flows to the source. ``fill`` is the value of tokens without a source.
    """
    if selection.queries is None:
        return selection.layout.to_raster(rows)
    position = selection.queries.position.long()[..., None]
    out = rows.gather(2, position.clamp_min(0).expand(-1, -1, -1, rows.shape[-1]))
    return out.masked_fill(position < 0, fill)


def unpack_lse(lse: Tensor, selection: TileSelection) -> Tensor:
    """Computed log-sum-exps ``[B, H, R]`` to raster order ``[B, H, S]``."""
    return unpack_rows(lse[..., None], selection, fill=-math.inf)[..., 0]
