"""The measures as their definitions read: loops over single tokens and tiles, float64, on the oracle's places."""

from __future__ import annotations

import math

import torch
from oracle import places, token_mask
from torch import Tensor

from flexsparse.analysis import SparseCall
from flexsparse.selection import TileSelection


def valid_keys(selection: TileSelection) -> Tensor:
    """Bool ``[B, S]``: key tokens that are not hidden."""
    found = places(selection.kv_layout)
    counts = selection.kv_tile_counts().expand(selection.bits.shape[0], -1)
    return torch.tensor([[place.slot < int(row[place.tile]) for place in found] for row in counts])


def computed(selection: TileSelection, b: int, h: int) -> list[bool]:
    """Whether each query token is computed."""
    if selection.queries is None:
        return [True] * selection.layout.seq_len
    return [int(source) == token for token, source in enumerate(selection.queries.source[b, h])]


def tokens_of(selection: TileSelection, tile: int) -> list[int]:
    """Query tokens of a tile in sequence order."""
    return [token for token, place in enumerate(places(selection.layout)) if place.tile == tile]


def pairs(selection: TileSelection, b: int, h: int, queries: list[int]) -> tuple[int, int]:
    """(pairs of these queries that are computed, all their pairs)."""
    mask = token_mask(selection.keep(), selection.layout, selection.kv_layout, selection.tile_counts)[b, h]
    own = computed(selection, b, h)
    some = sum(int(mask[token].sum()) for token in queries if own[token])
    return some, len(queries) * int(valid_keys(selection)[b].sum())


def mass(call: SparseCall, b: int, h: int, tile: int) -> list[float]:
    """Dense attention's mass on each KV tile, over a video tile's computed queries."""
    selection, layout = call.selection, call.selection.kv_layout
    own, valid, where = computed(selection, b, h), valid_keys(selection)[b], places(layout)
    first = -(-layout.text_first // layout.slots)
    queries = [token for token in tokens_of(selection, first + tile) if own[token]]
    group = h * call.k.shape[1] // call.q.shape[1]
    total = [0.0] * layout.total_tiles
    for token in queries:
        logits = (call.k[b, group].double() @ call.q[b, h, token].double() * call.scale).tolist()
        weights = [math.exp(x) if ok else 0.0 for x, ok in zip(logits, valid.tolist())]
        for place, weight in zip(where, weights):
            total[place.tile] += weight / sum(weights) / len(queries)
    return total


def overlap(selection: TileSelection, b: int, h: int, axis: int) -> float:
    """2 |A and B| / (|A| + |B|) over all neighbours along an axis; NaN without any."""
    lists = [set(row.nonzero()[:, 0].tolist()) for row in selection.keep()[b, h]]
    T, H, W = selection.layout.tiles
    both = sizes = 0
    for tile in range(T * H * W):
        place = [tile // (H * W), tile // W % H, tile % W]
        place[axis] += 1
        if place[axis] < (T, H, W)[axis]:
            other = lists[(place[0] * H + place[1]) * W + place[2]]
            both, sizes = both + len(lists[tile] & other), sizes + len(lists[tile]) + len(other)
    return 2 * both / sizes if sizes else math.nan
