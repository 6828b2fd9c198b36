"""More ranks than heads: each rank computes some query tiles, against the keys and values of all ranks.

Tokens are in tile order without padding ("packed"): a rank's tiles are a run of it.
Shape letters: B batch, H query heads, G KV heads, L tokens of one rank, S tokens of all ranks, P padded tokens, D head dim.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexsparse.attention import sparse_attention
from flexsparse.distributed.builders import of_rows
from flexsparse.distributed.tokens import Ranks, Segment, Segments, bounds, gather_tokens, parts, segments_of
from flexsparse.layout import Reorder, TileLayout
from flexsparse.tables import is_tracing, lasting


def tokens_before(layout: TileLayout, tile: int) -> int:
    """Video tokens in the first ``tile`` video tiles; arithmetic, which a compiler can trace."""
    (T, H, W), (t, h, w), (_, rows, columns) = layout.grid, layout.sides, layout.tiles
    a, b, c = tile // (rows * columns), tile // columns % rows, tile % columns
    depth, height = min(t, T - a * t), min(h, H - b * h)
    return min(a * t, T) * H * W + depth * (min(b * h, H) * W + height * min(c * w, W))


def _packed_tables(layout: TileLayout, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`TileLayout.tables` for tokens in packed order, from the valid tokens of each tile."""
    slot = torch.arange(layout.slots, device=counts.device)
    valid = (slot < counts[:, None]).flatten()
    token = torch.where(valid, valid.cumsum(0) - 1, -1)
    return token.int(), valid.nonzero()[:, 0].int(), counts


@dataclass(frozen=True)
class OwnTiles:
    """A rank's part of a layout's query tiles.

    Attributes:
        layout: the whole layout.
        ranks: who takes part.
        text: as `SequenceParallel`.
    """

    layout: TileLayout
    ranks: Ranks
    text: str

    @property
    def tiles(self) -> tuple[int, int]:
        """First and past-the-end video tile of this rank."""
        return bounds(parts(self.layout.num_tiles, self.ranks.size), self.ranks.rank)

    @property
    def segments(self) -> Segments:
        """The sequence in packed order."""
        each = parts(self.layout.num_tiles, self.ranks.size)
        starts = [tokens_before(self.layout, sum(each[:rank])) for rank in range(self.ranks.size + 1)]
        video = [end - start for start, end in itertools.pairwise(starts)]
        return segments_of(self.layout.text_first, Segment(tuple(video), True), self.layout.text_last, self.text)

    @property
    def lengths(self) -> tuple[int, int, int]:
        """This rank's tokens: first extra ones, video, last extra ones."""
        first, video, last = (segment.sizes[self.ranks.rank] for segment in self.segments)
        return first, video, last

    def query_layout(self) -> TileLayout:
        """This rank's query tiles as a layout: a row of tiles, whose padding slots count as tokens."""
        (start, end), (first, _, last), slots = self.tiles, self.lengths, self.layout.slots
        return TileLayout(grid=((end - start) * slots, 1, 1), tile=(slots, 1, 1), text_first=first, text_last=last)


@functools.lru_cache(128)
@torch.inference_mode(False)  # what is cached must serve training later
def _tables(own: OwnTiles, device: torch.device) -> dict[str, Tensor]:
    layout, (start, end) = own.layout, own.tiles
    counts = layout.tables("cpu")[2]
    query = own.query_layout()
    token, slot, every = query.tables("cpu")
    mine = counts[layout.tiles_first + start : layout.tiles_first + end]
    every = every.clone()
    every[query.tiles_first : query.tiles_first + query.num_tiles] = mine  # the mean of a tile is over its valid tokens
    first, _, last = own.lengths
    video = torch.arange(len(mine) * layout.slots, device=counts.device)
    valid = torch.ones(query.seq_len, dtype=torch.bool, device=counts.device)
    valid[first : len(valid) - last] = video % layout.slots < mine[video // layout.slots]
    padded = torch.where(valid, valid.cumsum(0) - 1, -1)
    kv = _packed_tables(layout, counts)
    return dict(zip(TABLES, lasting((*kv, token, slot, every, padded, valid.nonzero()[:, 0]), device)))


TABLES = ("kv_token", "kv_slot", "kv_count", "token", "slot", "count", "padded", "unpadded")


@torch.library.custom_op("flexsparse::own_tile_index", mutates_args=())
def own_tile_index(
    grid: Sequence[int],
    tile: Sequence[int],
    first: int,
    last: int,
    text: str,
    rank: int,
    size: int,
    which: str,
    device: torch.device,
) -> Tensor:
    """One of the index tensors of `own_tile_attention`, as an op for the reasons of `layout.tile_index`.

    ``kv_*``: those of all keys in packed order; ``token``, ``slot``, ``count``: of this rank's queries (`TileLayout.index`);
    ``padded``: the query of each slot, -1 for none; ``unpadded``: the slot of each query.
    """
    layout = TileLayout(grid=tuple(grid), tile=tuple(tile), text_first=first, text_last=last)  # type: ignore[arg-type]
    own = OwnTiles(layout, Ranks("", rank, size), text)
    return _tables(own, device)[which].clone()


@own_tile_index.register_fake
def _(
    grid: Sequence[int],
    tile: Sequence[int],
    first: int,
    last: int,
    text: str,
    rank: int,
    size: int,
    which: str,
    device: torch.device,
) -> Tensor:
    layout = TileLayout(grid=tuple(grid), tile=tuple(tile), text_first=first, text_last=last)  # type: ignore[arg-type]
    own = OwnTiles(layout, Ranks("", rank, size), text)
    query = own.query_layout()
    sizes = (layout.padded_len, layout.seq_len, layout.total_tiles, query.padded_len, query.seq_len, query.total_tiles)
    length = dict(zip(TABLES, (*sizes, query.seq_len, sum(own.lengths))))[which]
    return torch.empty(length, dtype=torch.int32, device=device)


def index_tables(own: OwnTiles, device: torch.device) -> dict[str, Tensor]:
    """Every table of `own_tile_index`."""
    if not is_tracing():
        return _tables(own, device)
    layout, ranks = own.layout, own.ranks
    sizes = (list(layout.grid), list(layout.sides), layout.text_first, layout.text_last)
    op = torch.ops.flexsparse.own_tile_index
    return {which: op(*sizes, own.text, ranks.rank, ranks.size, which, device) for which in TABLES}


def packed_order(own: OwnTiles, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token of each place in packed order, and place of each token, int32 ``[S]``."""
    tables, (token, slot, _) = index_tables(own, device), own.layout.index(device)
    return token.index_select(0, tables["kv_slot"]), tables["kv_token"].index_select(0, slot)


def own_tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own: OwnTiles,
    builder: Any,
    gates: list[Tensor | None],
    tile_counts: Tensor | None,
    **options: Any,
) -> Any:
    """Attention of this rank's query tiles.

    Args:
        q: ``[B, H, L, D]`` packed order.
        k: ``[B, G, L, D]``.
        v: as k.
        own: which tiles.
        builder: for all query tiles.
        gates: of the coarse and of the fine output, as q, or None.
        tile_counts: as `sparse_attention`.
        options: as `sparse_attention`.

    Returns:
        As `sparse_attention`, ``[B, H, L, D]``; the auxiliary results are of this rank's query tiles, padding slots included.
    """
    layout = own.layout
    tables = index_tables(own, q.device)
    kv_layout = dataclasses.replace(layout).with_tables([tables[name] for name in TABLES[:3]])
    q_layout = own.query_layout().with_tables([tables[name] for name in TABLES[3:6]])
    padded, unpadded = tables["padded"], tables["unpadded"]
    start, end = own.tiles
    k, v = gather_tokens(torch.stack([k, v]), own.segments, own.ranks, -2).unbind(0)

    def pad(x: Tensor) -> Tensor:
        return x if layout.whole else Reorder.apply(x, padded, unpadded, True, False)

    gate, fine_gate = (None if x is None else pad(x) for x in gates)
    rows = of_rows(builder, layout, start, end, q_layout)
    out = sparse_attention(
        pad(q),
        k,
        v,
        q_layout,
        rows,
        gate=gate,
        fine_gate=fine_gate,
        kv_layout=kv_layout,
        tile_counts=tile_counts,
        **options,
    )
    out, aux = out if isinstance(out, tuple) else (out, None)
    if not layout.whole:
        out = Reorder.apply(out, unpadded, padded, False, True)
    return out if aux is None else (out, aux)
