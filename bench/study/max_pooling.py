"""VSA with maximum pooling in its coarse stage: a comparison point of the paper's Table 1e (arXiv 2505.13389).

Shape letters: B batch, H query heads, G KV heads, N query tiles, M KV tiles, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import flexsparse as fs
from flexsparse.masks.coarse import CoarseInputs, candidates, expand_heads, score_dtype, tile_scores
from flexsparse.ops.choice import masked_softmax
from flexsparse.ops.select_tiles import select_tiles
from flexsparse.selection import TileSelection


def pool_max(x: Tensor, counts: Tensor) -> Tensor:
    """The maximum of each channel over the valid tokens of each tile.

    Args:
        x: ``[B, H, N, slots, D]`` tile order; slots past the count may hold anything.
        counts: int32 ``[N]`` or ``[B, N]`` valid tokens of each tile; a tile with none pools to zero.

    Returns:
        ``[B, H, N, D]``, at least float32. Where tokens tie, they share the gradient.
    """
    each = (counts if counts.dim() == 1 else counts[:, None])[..., None, None]
    padding = torch.arange(x.shape[3], device=x.device)[:, None] >= each
    pooled = x.masked_fill(padding, -math.inf).amax(3).masked_fill(each[..., 0] == 0, 0)
    return pooled.to(score_dtype(x.dtype))


@dataclass(frozen=True, kw_only=True)
class MaxPooledVSA(fs.VSA):
    """`fs.VSA` whose tiles stand for the maximum of their tokens, not their mean: q, k and v alike.

    Args as `fs.VSA`.
    """

    def plan(self, coarse: CoarseInputs, v: Tensor | None = None) -> tuple[TileSelection, Tensor | None]:
        heads, capacity = coarse.q.shape[1], self.capacity(coarse.kv_layout.num_tiles)
        allowed = candidates(self.within, coarse)
        q_c = pool_max(coarse.q, coarse.q_counts)
        k_c = expand_heads(pool_max(coarse.k, coarse.kv_counts), heads)
        scores = tile_scores(q_c, k_c, coarse.scale)
        if self.count_bias:
            bias = coarse.kv_counts.clamp_min(1).to(scores.dtype).log()
            scores = scores + (bias if bias.dim() == 1 else bias[:, None, None])
        chosen = select_tiles(scores.detach(), allowed, self.rule(), capacity)
        out = None
        if v is not None:
            out = masked_softmax(scores, allowed) @ expand_heads(pool_max(v, coarse.kv_counts), heads)
        return coarse.selection(chosen.bits, chosen.counts, capacity), out
