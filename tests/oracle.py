"""Attention as its definition reads, written without the library: token coordinates, a token mask, dense softmax.

Shape letters: B batch, H query heads, G KV heads, S query tokens, Z KV tokens, N query tiles, M KV tiles, D head dim.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flexsparse import TileLayout


class Place(NamedTuple):
    """Where a token sits: its tile in sequence order, its slot in the tile."""

    tile: int
    slot: int


def places(layout: TileLayout) -> list[Place]:
    """The place of every token in raster order, by walking the tiles one after the other."""
    T, H, W = layout.grid
    t, h, w = layout.tile
    found: dict[int, Place] = {}
    tile = 0
    for start in range(0, layout.text_first, layout.slots):
        for slot, token in enumerate(range(start, min(start + layout.slots, layout.text_first))):
            found[token] = Place(tile, slot)
        tile += 1
    for t0 in range(0, T, t):
        for h0 in range(0, H, h):
            for w0 in range(0, W, w):
                slot = 0
                for a in range(t0, min(t0 + t, T)):
                    for b in range(h0, min(h0 + h, H)):
                        for c in range(w0, min(w0 + w, W)):
                            found[layout.text_first + (a * H + b) * W + c] = Place(tile, slot)
                            slot += 1
                tile += 1
    begin = layout.text_first + T * H * W
    for start in range(0, layout.text_last, layout.slots):
        for slot, token in enumerate(range(start, min(start + layout.slots, layout.text_last))):
            found[begin + token] = Place(tile, slot)
        tile += 1
    return [found[token] for token in range(len(found))]


def counts(layout: TileLayout) -> list[int]:
    """Valid tokens of every tile in sequence order."""
    found = places(layout)
    out = [0] * (max(place.tile for place in found) + 1)
    for place in found:
        out[place.tile] += 1
    return out


def token_mask(
    keep: Tensor, layout: TileLayout, kv_layout: TileLayout | None = None, tile_counts: Tensor | None = None
) -> Tensor:
    """Bool ``[B, H, S, Z]``: the pairs that the fine stage computes, from kept video tiles ``[B, H, N, M]``."""
    kv_layout = layout if kv_layout is None else kv_layout
    q, kv = places(layout), places(kv_layout)
    q_first, kv_first = -(-layout.text_first // layout.slots), -(-kv_layout.text_first // kv_layout.slots)
    N, M = keep.shape[2:]
    rows = torch.tensor([place.tile - q_first for place in q])
    columns = torch.tensor([place.tile - kv_first for place in kv])
    video = ((rows >= 0) & (rows < N))[:, None] & ((columns >= 0) & (columns < M))
    mask = keep[:, :, rows.clamp(0, N - 1)][..., columns.clamp(0, M - 1)] | ~video
    if tile_counts is None:
        return mask
    slot = torch.tensor([place.slot for place in kv])
    tile = torch.tensor([place.tile for place in kv])
    valid = slot < tile_counts.expand(keep.shape[0], -1)[:, tile]
    return mask & valid[:, None, None]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention over the pairs of a mask, in at least float32; rounded to q's dtype at the end.

    Returns:
        Output ``[B, H, S, D]`` and log-sum-exp ``[B, H, S]``; 0 and -inf for a query that sees nothing.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    heads = q.shape[1] // k.shape[1]
    seen = mask.any(2).any(1)[:, None, :, None]  # what no query sees may be NaN
    k, v = (x.to(dtype).masked_fill(~seen, 0).repeat_interleave(heads, 1) for x in (k, v))
    logits = torch.einsum("bhsd,bhzd->bhsz", q.to(dtype), k) * scale
    top = logits.detach().masked_fill(~mask, -math.inf).amax(-1, keepdim=True).clamp_min(-1e30)
    weights = (logits - top).masked_fill(~mask, -math.inf).exp()
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("bhsz,bhzd->bhsd", weights / total.clamp_min(1e-30), v)
    return out.to(q.dtype), (total.log() + top)[..., 0].masked_fill(~mask.any(-1), -math.inf)
