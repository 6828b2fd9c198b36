"""Tile-ordered (or, with pruned queries, packed) views of q, k and v, and the way back to raster order.

Shape letters: B batch, H heads, S tokens, P padded tokens, R packed query rows, D head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from flexsparse import ops
from flexsparse.ops import pack_rows  # noqa: F401
from flexsparse.selection import TileSelection


def pack_queries(q: Tensor, q_tiles: Tensor | None, selection: TileSelection) -> Tensor:
    """Raster queries ``[B, H, S, D]`` to the order in which they are computed, ``[B, H, R, D]``.

    Args:
        q: queries in raster order.
        q_tiles: the same in tile order ``[B, H, P, D]`` where it is at hand.
        selection: its ``queries`` say which tokens are computed; rows past a tile's count are zero.
    """
    layout, queries = selection.layout, selection.queries
    if queries is None:
        return layout.to_tiles(q) if q_tiles is None else q_tiles
    tokens, slots, _ = layout.index(q.device)
    # on CUDA one kernel tiles q, k and v, and one takes their gradients back: q's goes with them
    tiled = ops.on_gpu(q) and q_tiles is not None and layout.order == "raster"
    x = q_tiles if tiled and q_tiles is not None else q
    fields = (queries.kept, queries.counts, queries.position, tokens, slots if tiled else None)
    rows: Tensor = torch.ops.flexsparse.pack_rows(x, *fields, *_extra_rows(selection), heads_inside(x))
    return rows


def unpack_rows(rows: Tensor, selection: TileSelection, fill: float = 0.0, like: Tensor | None = None) -> Tensor:
    """Computed rows ``[B, H, R, D]`` to raster order ``[B, H, S, D]``; a pruned token takes its source's row.

    The gradient flows to the source. ``fill`` is the value of tokens without a source. On CUDA the result lies in memory as
    ``like`` does, so that a model that reads it as its queries lie does not copy it.
    """
    if selection.queries is None:
        return selection.layout.to_raster(rows)
    sizes = (*_extra_rows(selection), selection.query_rows)
    inside = like is not None and heads_inside(like)
    tokens, position = selection.layout.index(rows.device)[0], selection.queries.position
    out: Tensor = torch.ops.flexsparse.unpack_rows(rows, position, tokens, *sizes, fill, inside)
    return out


def unpack_lse(lse: Tensor, selection: TileSelection) -> Tensor:
    """Computed log-sum-exps ``[B, H, R]`` to raster order ``[B, H, S]``."""
    return unpack_rows(lse[..., None], selection, fill=-math.inf)[..., 0]


def _extra_rows(selection: TileSelection) -> tuple[int, int]:
    """Slots of the first and of the last extra tiles."""
    layout = selection.layout
    return layout.tiles_first * layout.slots, layout.tiles_last * layout.slots


def heads_inside(x: Tensor) -> bool:
    """Whether heads lie inside of tokens in memory; on CPU, where nobody copies to another format, it does not count."""
    return ops.on_gpu(x) and bool(statically_known_true(x.stride(1) < x.stride(2)))
