"""What a selection keeps, how much of dense attention that is, and how alike neighbouring query tiles' lists are.

Shape letters: B batch, H query heads, G KV heads, S tokens in raster order, P padded tokens in tile order, N query tiles,
M KV tiles (video only), L KV tiles (those of text too, in sequence order), R sampled query tiles, Q query tokens of one tile,
D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexsparse.selection import TileSelection

CHUNK = 1 << 22
"""Logits that `tile_mass` holds at a time: 16 MiB in float32."""
AXES = ("t", "h", "w")


def sample_rows(tiles: int, count: int) -> list[int]:
    """At most ``count`` of ``tiles`` tiles, evenly spread, ascending.

    >>> sample_rows(624, 4), sample_rows(3, 8)
    ([78, 234, 390, 546], [0, 1, 2])
    """
    count = min(tiles, count)
    return [(2 * i + 1) * tiles // (2 * count) for i in range(count)]


def _video_rows(selection: TileSelection) -> Tensor:
    """Bool ``[B, H, N, L]``: KV tiles that each video query tile attends to."""
    q = selection.layout
    return selection.to_dense().narrow(2, q.tiles_first, q.num_tiles)


def row_density(selection: TileSelection) -> Tensor:
    """Share of a query tile's (query token, KV token) pairs that the fine stage computes, float64 ``[B, H, N]``.

    Text counts among the KV tokens. BSA computes only some of a tile's queries, and its density is as much lower.
    """
    q = selection.layout
    kept = selection.kept_tokens().narrow(2, q.tiles_first, q.num_tiles)
    share = kept / selection.kv_tile_counts().double().sum(-1).reshape(-1, 1, 1)
    if selection.queries is None:
        return share
    valid = q.index(share.device)[2].narrow(0, q.tiles_first, q.num_tiles)
    return share * (selection.queries.counts / valid.double())


def head_density(selection: TileSelection) -> Tensor:
    """Each head's share of valid pairs that the fine stage computes, text's own queries included, float64 ``[B, H]``.

    Its mean over samples with as much text, and over heads, is ``selection.density``.
    """
    valid, computed = selection.query_tile_counts()
    pairs = valid.sum(-1) * selection.kv_tile_counts().double().sum(-1)
    return (selection.kept_tokens() * computed[:, None]).sum(-1) / pairs[:, None]


def _computed_tokens(selection: TileSelection, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Query tokens of video tiles that are computed: raster index int64 ``[B, H, R, Q]``, and whether it is one."""
    q, (B, H) = selection.layout, selection.counts.shape[:2]
    if selection.queries is not None:
        index = selection.queries.kept[:, :, rows].long()
        counts = selection.queries.counts[rows]
        return index, (torch.arange(index.shape[-1], device=index.device) < counts[:, None]).expand(index.shape)
    tokens = q.index(selection.bits.device)[0].view(-1, q.slots)[q.tiles_first : q.tiles_first + q.num_tiles][rows]
    tokens = tokens.long().expand(B, H, -1, -1)
    return tokens.clamp_min(0), tokens >= 0


def tile_mass(q: Tensor, k: Tensor, selection: TileSelection, rows: Sequence[int], scale: float) -> Tensor:
    """Dense attention's mass on every KV tile, averaged over the query tokens of a tile that are computed.

    Dense attention sees every valid token, kept or not. It is computed in at least float32, at most `CHUNK` logits (or one
    row of them) at a time, so that memory does not grow with the number of sampled tiles.

    Args:
        q: ``[B, H, S, D]`` raster order.
        k: ``[B, G, S, D]``, H divisible by G.
        selection: of these; read for the layouts, the valid tokens and, for BSA, which queries are computed.
        rows: the R query tiles, as numbers of video tiles.
        scale: softmax scale.

    Returns:
        At least float32 ``[B, H, R, L]``; each row sums to 1.
    """
    kv, (B, H) = selection.kv_layout, q.shape[:2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    index, valid = _computed_tokens(selection, rows)
    slot = torch.arange(kv.slots, device=k.device)
    hidden = slot >= selection.kv_tile_counts().expand(B, -1)[..., None]  # [B, L, slots]
    mass = torch.zeros((B, H, len(rows), kv.total_tiles), dtype=dtype, device=q.device)
    for b in range(B):
        for h in range(H):
            keys = kv.to_tiles(k[b, h * k.shape[1] // H]).to(dtype)  # [P, D]
            tile, where = valid[b, h].nonzero().unbind(-1)
            tokens = index[b, h][tile, where]
            for part in range(0, len(tokens), max(1, CHUNK // kv.padded_len)):
                some = slice(part, part + max(1, CHUNK // kv.padded_len))
                logits = (q[b, h][tokens[some]].to(dtype) @ keys.T) * scale
                logits = logits.masked_fill_(hidden[b].flatten(), -torch.inf)
                shares = logits.softmax(-1).unflatten(-1, (-1, kv.slots)).sum(-1)
                mass[b, h].index_add_(0, tile[some], shares)
    return mass / valid.sum(-1)[..., None]


def recall(mass: Tensor, selection: TileSelection, rows: Sequence[int]) -> Tensor:
    """Share of the dense attention mass that a query tile's kept tiles hold, text's tiles among them.

    Args:
        mass: ``[B, H, R, L]`` from `tile_mass`.
        selection: the one to judge.
        rows: the R query tiles.

    Returns:
        As ``mass``, ``[B, H, R]`` in [0, 1].
    """
    return (mass * _video_rows(selection)[:, :, rows]).sum(-1)


def overlap(selection: TileSelection) -> dict[str, Tensor]:
    """How alike the lists of query tiles are that are neighbours along an axis: ``2 |A and B| / (|A| + |B|)``.

    Counted over all pairs of a head, so that half of it is the share of KV tile loads that a kernel saves which computes two
    such query tiles at once and loads what both keep once. Video tiles only: text is loaded by every row anyway.

    Returns:
        For each of `AXES`, float64 ``[B, H]``; NaN where the axis has one tile only, or nothing is kept.
    """
    T, H, W = selection.layout.tiles
    keep = selection.keep().unflatten(2, (T, H, W))
    found = {}
    for axis, name in enumerate(AXES, start=2):
        extent = keep.shape[axis]
        one, other = keep.narrow(axis, 0, extent - 1), keep.narrow(axis, min(1, extent), extent - 1)
        both, ones, others = (x.flatten(2).sum(-1).double() for x in (one & other, one, other))
        found[name] = 2 * both / (ones + others)
    return found
