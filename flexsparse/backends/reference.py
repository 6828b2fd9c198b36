"""The oracle: dense attention under a token mask. O(S^2) memory; any device, any float dtype, plain autograd.

Shape letters: B batch, H query heads, G KV heads, S query tokens, Z KV tokens, D head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flexsparse.selection import TileSelection


def attend(q: Tensor, k: Tensor, v: Tensor, selection: TileSelection, scale: float) -> tuple[Tensor, Tensor]:
    """Fine-stage attention in raster order, computed in at least float32.

    Args:
        q: ``[B, H, S, D]``.
        k: ``[B, G, Z, D]``.
        v: ``[B, G, Z, D]``.
        selection: which KV tiles each query tile keeps.
        scale: softmax scale.

    Returns:
        Output ``[B, H, S, D]`` in q's dtype, log-sum-exp (natural) ``[B, H, S]``; a query that sees no token has
        output 0 and log-sum-exp -inf.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    heads = q.shape[1] // k.shape[1]
    q_slot = selection.layout.index(q.device)[1]
    kv_slot = selection.kv_layout.index(q.device)[1]
    q_tile, kv_tile = q_slot // selection.layout.slots, kv_slot // selection.kv_layout.slots
    counts = selection.kv_tile_counts().expand(q.shape[0], -1)
    valid = (kv_slot % selection.kv_layout.slots < counts[:, kv_tile])[:, None, None]  # [B, 1, 1, Z]
    seen = selection.to_dense()[:, :, q_tile][..., kv_tile] & valid  # [B, H, S, Z]

    k = k.to(dtype).repeat_interleave(heads, 1).masked_fill(~valid.transpose(-1, -2), 0)
    v = v.to(dtype).repeat_interleave(heads, 1).masked_fill(~valid.transpose(-1, -2), 0)
    logits = (q.to(dtype) @ k.transpose(-1, -2) * scale).masked_fill(~seen, -math.inf)
    some = seen.any(-1, keepdim=True)
    weights = logits.masked_fill(~some, 0).softmax(-1).masked_fill(~some, 0)
    out = (weights @ v).to(q.dtype)
    lse = logits.masked_fill(~some, 0).logsumexp(-1).masked_fill(~some[..., 0], -math.inf)
    if selection.queries is None:
        return out, lse
    source = selection.queries.source.long()
    out = out.gather(2, source.clamp_min(0)[..., None].expand_as(out)).masked_fill((source < 0)[..., None], 0)
    return out, lse.gather(2, source.clamp_min(0)).masked_fill(source < 0, -math.inf)
