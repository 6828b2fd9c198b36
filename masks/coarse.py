"""The coarse stage: tiles pooled and scored, and the primitives of selection.

Shape letters: B batch, H query heads, G KV heads, S tokens, N query tiles, M KV tiles, D head dim.
Everything from pooling to the choice of tiles is plain torch where a compiler looks on, so that it sees the whole chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from flexsparse.layout import TileLayout
from flexsparse.ops.choice import Rule, masked_softmax
from flexsparse.ops.coarse_select import pool_tiles, tiles_by
from flexsparse.ops.select_tiles import allowed_bits, select_tiles
from flexsparse.selection import TileSelection
from flexsparse.tables import is_tracing

if TYPE_CHECKING:
    from flexsparse.masks.static import StaticBuilder


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of pooled vectors and scores: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def pool(x: Tensor, counts: Tensor, masked: bool = False) -> Tensor:
    """Mean over the valid tokens of each tile, accumulated in at least float32 (VSA, section 2.2).

    Args:
        x: ``[B, H, N, slots, D]`` tile order.
        counts: int32 ``[N]`` or ``[B, N]`` valid tokens of each tile; a tile with none pools to zero.
        masked: whether slots past the count may hold anything (else they are zero).

    Returns:
        ``[B, H, N, D]``, at least float32.
    """
    if masked:
        each = counts if counts.dim() == 1 else counts[:, None]
        x = x.masked_fill((torch.arange(x.shape[3], device=x.device) >= each[..., None])[..., None], 0)
    return pool_tiles(x, counts)


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, G, ...]`` to ``[B, H, ...]``: query head h reads KV head ``h // (H / G)``."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def take_heads(x: Tensor, heads: Sequence[int]) -> Tensor:
    """``x [B, H, ...]`` of some heads, copied. No index: on a GPU one is copied there, and its gradient is added atomically."""
    each = x.unbind(1)
    return torch.stack([each[head] for head in heads], 1)


def keep_top(scores: Tensor, n: int | Tensor) -> Tensor:
    """The best ``n`` entries of each row: exactly ``n``, ties to the lowest index. For builders of your own.

    Args:
        scores: ``[B, H, N, M]``; -inf for what must not be chosen first.
        n: how many, an int or an integer tensor that broadcasts to ``[B, H, N, 1]``.

    Returns:
        Bool ``[B, H, N, M]``.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(scores.shape[-1], device=scores.device) < n
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, first.expand(scores.shape))


@dataclass(frozen=True)
class CoarseInputs:
    """What a builder selects from: tiles of queries and keys, without the extra tokens.

    Attributes:
        q: ``[B, H, N, slots, D]`` tile order, padding zero.
        k: ``[B, G, M, slots, D]``.
        layout: query layout.
        kv_layout: KV layout.
        scale: softmax scale.
        tile_counts: an override of the KV tiles' valid tokens, int32 ``[tiles]`` or ``[B, tiles]``.
        same: whether queries and keys are the same tokens, so that the override holds for queries too.
        tables: where tokens are in raster order, ``q [B, H, S, D]`` and ``k [B, G, Z, D]``, the tables by which
            `ops.coarse_select` finds those of a tile: for builders that do not read tiles themselves
            (`MaskBuilder.reads_tiles`), uncompiled and without an override. None: they are tiles.
        heads: the query heads whose rows are used, where a builder plans all (`MaskBuilder.heads_alike`) for some; None: all.
    """

    q: Tensor
    k: Tensor
    layout: TileLayout
    kv_layout: TileLayout
    scale: float
    tile_counts: Tensor | None = None
    same: bool = True
    tables: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    heads: tuple[int, ...] | None = None

    @property
    def kv_counts(self) -> Tensor:
        """Valid tokens of the KV video tiles, int32 ``[M]`` or ``[B, M]``."""
        kv = self.kv_layout
        counts = kv.index(self.k.device)[2] if self.tile_counts is None else self.tile_counts
        return counts.narrow(-1, kv.tiles_first, kv.num_tiles)

    @property
    def q_counts(self) -> Tensor:
        """Valid tokens of the query video tiles, int32 ``[N]`` or ``[B, N]``."""
        if self.tile_counts is not None and self.same:
            return self.kv_counts
        return self.layout.index(self.q.device)[2].narrow(-1, self.layout.tiles_first, self.layout.num_tiles)

    def pooled_q(self) -> Tensor:
        """``[B, H, N, D]``."""
        q = tiles_by(self.q, None if self.tables is None else self.tables[0])
        return pool(q, self.q_counts, masked=self.tile_counts is not None and self.same)

    def pooled_k(self) -> Tensor:
        """``[B, H, M, D]``, expanded to the query heads."""
        k = tiles_by(self.k, None if self.tables is None else self.tables[1])
        return expand_heads(pool(k, self.kv_counts, self.tile_counts is not None), self.q.shape[1])

    def pooled_v(self, v: Tensor) -> Tensor:
        """``[B, G, M, slots, D]`` values to ``[B, H, M, D]``."""
        return expand_heads(pool(v, self.kv_counts, self.tile_counts is not None), self.q.shape[1])

    def cut(self, wanted: Tensor, capacity: int) -> Tensor:
        """Rows that wanted more tiles than the capacity, int64 0-d, from int32 ``[B, H, N]``."""
        over = wanted > capacity
        if self.tile_counts is not None and self.same:  # a tile without a token wants nothing
            some = self.q_counts > 0
            over = over & (some if some.dim() == 1 else some[:, None])
        return (over if self.heads is None else take_heads(over, self.heads)).sum()

    def selection(self, bits: Tensor, counts: Tensor, capacity: int, **fields: Any) -> TileSelection:
        """The tiles that a builder chose, from bitmask and counts."""
        return TileSelection(
            bits=bits,
            counts=counts,
            layout=self.layout,
            kv_layout=self.kv_layout,
            capacity=capacity,
            tile_counts=self.tile_counts,
            **fields,
        )

    def alive(self) -> Tensor | None:
        """Bool, broadcasts to ``[B, H, N, M]``: KV tiles that hold a token; None where all do."""
        if self.tile_counts is None:
            return None
        alive = self.kv_counts > 0
        return alive if alive.dim() == 1 else alive[:, None, None]


def candidates(within: StaticBuilder | None, coarse: CoarseInputs) -> Tensor | None:
    """Bool, broadcasts to ``[B, H, N, M]``: tiles that may be chosen; None where all may."""
    alive = coarse.alive()
    if within is None:
        return alive
    mask = within.mask(coarse.layout, coarse.kv_layout, coarse.q.device)
    return mask if alive is None else mask & alive


def tile_scores(q_c: Tensor, k_c: Tensor, scale: float) -> Tensor:
    """Scores between tiles ``[B, H, N, M]`` from pooled vectors ``[B, H, N, D]`` and ``[B, H, M, D]``."""
    return (q_c @ k_c.transpose(-1, -2)) * scale


class Coarse(NamedTuple):
    """What a coarse stage found.

    Attributes:
        bits: int32 ``[B, H, N, W]`` (`pack_bits`).
        counts: int32 ``[B, H, N]``.
        wanted: int32 ``[B, H, N]``, tiles wanted before the capacity cut them.
        out: coarse output ``[B, H, N, D]``, or None.
    """

    bits: Tensor
    counts: Tensor
    wanted: Tensor
    out: Tensor | None


def coarse_stage(
    coarse: CoarseInputs,
    v: Tensor | None,
    rule: Rule,
    capacity: int,
    *,
    within: StaticBuilder | None = None,
    count_bias: bool = False,
    q_c: Tensor | None = None,
) -> Coarse:
    """Pool, score, choose, and compute the coarse output where ``v`` is given.

    A compiler sees plain torch and fuses it (`compile_passes.FuseSelection`); uncompiled, the fused op runs at once.

    Args:
        coarse: tiles of queries and keys.
        v: ``[B, G, M, slots, D]`` values, or None.
        rule: which tiles a row keeps.
        capacity: the most tiles that a row keeps.
        within: a static builder; only its tiles are candidates.
        count_bias: add ``log(valid tokens)`` of a KV tile to its score.
        q_c: pooled queries ``[B, H, N, D]``, where they are not the mean of their tiles.
    """
    masked = coarse.tile_counts is not None
    if is_tracing():
        allowed = candidates(within, coarse)
        scores = tile_scores(coarse.pooled_q() if q_c is None else q_c, coarse.pooled_k(), coarse.scale)
        if count_bias:
            log_counts = coarse.kv_counts.clamp_min(1).to(scores.dtype).log()
            scores = scores + (log_counts if log_counts.dim() == 1 else log_counts[:, None, None])
        bits, counts, wanted = select_tiles(scores.detach(), allowed, rule, capacity)
        weighted = None if v is None else masked_softmax(scores, allowed) @ coarse.pooled_v(v)
        return Coarse(bits, counts, wanted, weighted)
    if masked and coarse.same and q_c is None:
        q_c = coarse.pooled_q()
    q, q_counts = coarse.q, coarse.q_counts
    if q_c is not None:  # pooled already: tiles of one token
        q, q_counts = q_c[:, :, :, None], torch.ones_like(q_counts)
    among = None
    if within is not None and not masked:  # packed once
        among = within.packed(coarse.layout, coarse.kv_layout, coarse.q.device)
    if among is None and (allowed := candidates(within, coarse)) is not None:
        among = allowed_bits(allowed, coarse.layout.num_tiles)
    how = (rule.now, rule.name, rule.value, rule.min_tiles, capacity, coarse.scale, count_bias)
    tables: Sequence[Tensor | None] = coarse.tables or (None,) * 4
    if q_c is not None:  # nobody looks for their tokens
        tables = (None, tables[1], None, tables[3])
    found = torch.ops.flexsparse.coarse_select(q, coarse.k, v, q_counts, coarse.kv_counts, among, *how, *tables)
    return Coarse(found[5], found[6], found[7], None if v is None else found[0])
