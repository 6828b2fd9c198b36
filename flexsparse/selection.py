"""Which KV tiles each query tile keeps, and for BSA which query tokens are computed.

Shape letters: B batch, H query heads, S tokens in raster order, N query tiles, M KV tiles (video tiles only),
W words (`words_of`), K list length, Q packed queries of one tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexsparse.block_lists import block_lists, block_mask
from flexsparse.layout import TileLayout
from flexsparse.tile_bits import ascending_lists, unpack_bits


class TransposedTiles(NamedTuple):
    """For each KV tile, the query tiles that keep it, as compressed sparse rows.

    ``indices[offsets[b, h, m] : offsets[b, h, m] + counts[b, h, m]]`` are the query tiles, ascending.
    """

    offsets: Tensor  # int64 [B, H, M]
    counts: Tensor  # int32 [B, H, M]
    indices: Tensor  # int32 [entries kept]

    def rows(self, b: int, h: int, m: int) -> Tensor:
        """Query tiles that keep KV tile ``m``, int32, ascending."""
        start = int(self.offsets[b, h, m])
        return self.indices[start : start + int(self.counts[b, h, m])]


@dataclass(frozen=True)
class KeptQueries:
    """Query tokens that are computed, and where every other token takes its output from (BSA).

    Attributes:
        kept: int32 ``[B, H, N, Q]`` raster index of the packed queries, kept ones first, in slot order; in range
            past the count. Q is a power of two of at least 16.
        counts: int32 ``[N]`` kept tokens of each query tile; depends on the layout alone.
        source: int32 ``[B, H, S]`` raster index of the token whose output a token takes: itself if it is kept;
            -1 for an output of zero.
        position: int32 ``[B, H, S]`` position of that source in the packed order: first extra tokens (padded to
            tiles), N x Q packed queries, last extra tokens; -1 for an output of zero.
    """

    kept: Tensor
    counts: Tensor
    source: Tensor
    position: Tensor

    @property
    def packed(self) -> int:
        """Q: packed queries of one tile."""
        return self.kept.shape[-1]


@dataclass(frozen=True, kw_only=True, eq=False)
class TileSelection:
    """The critical tiles of every query tile, as a bitmask and counts.

    Video tiles only: extra tokens attend to everything and are attended by everything, and only `to_dense` and
    `to_block_mask` show their tiles.

    Attributes:
        bits: int32 ``[B, H, N, W]`` (`pack_bits`).
        counts: int32 ``[B, H, N]`` kept tiles of each row.
        layout: query layout.
        kv_layout: KV layout.
        capacity: K, the most tiles a row can keep; the lists' static length.
        queries: kept query tokens, or None where every token is computed.
        capped: int64 0-d, rows that wanted more than ``capacity`` tiles and kept their best; None where the
            method cannot want more.
        tile_counts: valid tokens of every KV tile, int32 ``[tiles]`` or ``[B, tiles]``, where they differ from
            the layout's.
    """

    bits: Tensor
    counts: Tensor
    layout: TileLayout
    kv_layout: TileLayout
    capacity: int
    queries: KeptQueries | None = None
    capped: Tensor | None = None
    tile_counts: Tensor | None = None

    @classmethod
    def from_mask(
        cls, keep: Tensor, layout: TileLayout, kv_layout: TileLayout | None = None, **fields: Any
    ) -> TileSelection:
        """From a bool mask ``[B, H, N, M]`` over video tiles.

        Raises:
            ValueError: the mask does not fit the layouts.
            TypeError: it is not bool.
        """
        kv_layout = layout if kv_layout is None else kv_layout
        if keep.dtype != torch.bool:
            raise TypeError(f"keep is {keep.dtype}: give bool, True for tiles that are kept")
        if keep.dim() != 4 or keep.shape[2] != layout.num_tiles or keep.shape[3] != kv_layout.num_tiles:
            raise ValueError(
                f"keep has shape {tuple(keep.shape)}: give bool [B, H, {layout.num_tiles}, {kv_layout.num_tiles}] "
                "(query tiles x KV tiles, video tiles only)"
            )
        fields.setdefault("capacity", kv_layout.num_tiles)
        bits, counts = torch.ops.flexsparse.pack_tiles(keep)
        return cls(bits=bits, counts=counts, layout=layout, kv_layout=kv_layout, **fields)

    @classmethod
    def from_lists(
        cls, kv_indices: Tensor, kv_counts: Tensor, layout: TileLayout, kv_layout: TileLayout | None = None
    ) -> TileSelection:
        """From index lists ``[B, H, N, K]`` and counts ``[B, H, N]``; entries past a count are ignored.

        A tile that a row names twice is kept once.

        Raises:
            TypeError: indices or counts that are no integers.
            ValueError: shapes that disagree with each other or the layout, an index out of range, a count that is negative
                or larger than the list.
        """
        kv_layout = layout if kv_layout is None else kv_layout
        for name, x in (("kv_indices", kv_indices), ("kv_counts", kv_counts)):
            if x.dtype not in (torch.int32, torch.int64, torch.int16, torch.uint8, torch.int8):
                raise TypeError(f"{name} is {x.dtype}: give int32 or int64")
        if kv_indices.dim() != 4 or kv_indices.shape[2] != layout.num_tiles:
            raise ValueError(
                f"kv_indices has shape {tuple(kv_indices.shape)}: give [B, H, {layout.num_tiles}, K], a list for every video "
                "tile of the queries"
            )
        if kv_counts.shape != kv_indices.shape[:3]:
            raise ValueError(
                f"kv_counts has shape {tuple(kv_counts.shape)} and kv_indices {tuple(kv_indices.shape)}: give a count for "
                f"every list, {tuple(kv_indices.shape[:3])}"
            )
        bits, counts = torch.ops.flexsparse.pack_lists(kv_indices, kv_counts, kv_layout.num_tiles)
        return cls(bits=bits, counts=counts, layout=layout, kv_layout=kv_layout, capacity=kv_indices.shape[-1])

    def keep(self) -> Tensor:
        """Bool ``[B, H, N, M]`` over video tiles."""
        return unpack_bits(self.bits, self.kv_layout.num_tiles)

    @property
    def kv_counts(self) -> Tensor:
        """Int32 ``[B, H, N]``: kept video tiles of each row."""
        return self.counts

    @property
    def kv_indices(self) -> Tensor:
        """Int32 ``[B, H, N, K]``: kept video tiles, ascending; in-range entries past the count."""
        return ascending_lists(self.keep(), self.capacity)

    def kv_tile_counts(self) -> Tensor:
        """Valid tokens of every KV tile, int32 ``[tiles]`` or ``[B, tiles]``, extra tiles included."""
        if self.tile_counts is not None:
            return self.tile_counts
        return self.kv_layout.index(self.bits.device)[2]

    def to_dense(self) -> Tensor:
        """Bool ``[B, H, query tiles, KV tiles]``, extra tiles included (dense rows and columns).

        A KV tile with no valid token is kept by no row.
        """
        return self._dense(self.bits)

    def _dense(self, bits: Tensor) -> Tensor:
        """`to_dense` of some heads' bits."""
        q, kv = self.layout, self.kv_layout
        keep = torch.nn.functional.pad(unpack_bits(bits, kv.num_tiles), (kv.tiles_first, kv.tiles_last), value=True)
        keep = torch.nn.functional.pad(keep, (0, 0, q.tiles_first, q.tiles_last), value=True)
        if self.tile_counts is None:
            return keep
        alive = self.tile_counts > 0
        return keep & (alive if alive.dim() == 1 else alive[:, None, None])

    def transpose(self) -> TransposedTiles:
        """For each KV tile, the query tiles that keep it; copies nothing to the host but the number of entries."""
        by_column = self.keep().transpose(-1, -2)
        counts = by_column.sum(-1, dtype=torch.int32)
        ends = counts.flatten().cumsum(0, dtype=torch.int64)
        offsets = (ends - counts.flatten()).view(counts.shape)
        return TransposedTiles(offsets, counts, by_column.nonzero()[:, 3].to(torch.int32))

    @property
    def query_rows(self) -> int:
        """Query tokens of one tile as computed: slots, or the packed queries of BSA."""
        return self.layout.slots if self.queries is None else self.queries.packed

    @property
    def partial(self) -> bool:
        """Whether a KV tile may have fewer valid tokens than slots."""
        return self.tile_counts is not None or not self.kv_layout.whole

    def operands(self) -> tuple[Any, ...]:
        """Arguments of the ops that compute on a selection, from ``bits`` to ``partial`` (`ops.tile_attention`)."""
        q, kv = self.layout, self.kv_layout
        ends = (q.tiles_first * q.slots, q.tiles_last * q.slots)
        sizes = (self.query_rows, *ends, kv.tiles_first, kv.num_tiles, kv.slots, self.capacity, q.frame_tiles)
        return (self.bits, self.counts, self.kv_tile_counts(), *sizes, self.partial)

    def valid_pairs(self) -> tuple[Tensor, Tensor]:
        """(pairs computed, all valid pairs) of query and KV tokens, float64 0-d; see `density`."""
        valid, computed = self.query_tile_counts()
        kv = self.kv_tile_counts().double().expand(len(valid), -1)
        all_pairs = (valid.sum(-1) * kv.sum(-1)).sum() * self.bits.shape[1]
        return (self.kept_tokens() * computed[:, None]).sum(), all_pairs

    def query_tile_counts(self) -> tuple[Tensor, Tensor]:
        """(valid, computed) query tokens of every query tile, extra tiles included, float64 ``[B, tiles]``.

        Where queries and keys are the same tokens, an override of the KV tiles' counts holds for the queries too.
        """
        q, B = self.layout, self.bits.shape[0]
        same = self.tile_counts is not None and self.kv_layout is q
        valid = (self.kv_tile_counts() if same else q.index(self.bits.device)[2]).double().expand(B, -1)
        if self.queries is None:
            return valid, valid
        computed, video = valid.clone(), slice(q.tiles_first, q.tiles_first + q.num_tiles)
        computed[:, video] = torch.minimum(valid[:, video], self.queries.counts.double())
        return valid, computed

    def kept_tokens(self) -> Tensor:
        """Valid KV tokens that each query tile attends to, extra tiles included, float64 ``[B, H, query tiles]``."""
        counts = self.kv_tile_counts().double().expand(self.bits.shape[0], -1)[:, None, :, None]
        # one head at a time: a bool for each pair of tiles of each head is gigabytes at real sizes, a float64 eight times that
        heads = range(self.bits.shape[1])
        each = [(self._dense(self.bits[:, h : h + 1]).double() @ counts)[..., 0] for h in heads]
        return torch.cat(each, 1)

    @property
    def density(self) -> float:
        """Share of (query token, KV token) pairs that the fine stage computes, out of all valid pairs."""
        computed, valid = self.valid_pairs()
        return float(computed / valid)

    def to_block_mask(self) -> BlockMask:
        """A torch `BlockMask` over padded, tile-ordered tokens (packed queries where there are `queries`).

        Tiles whose slots are all valid are listed as full blocks, partial tiles as partial blocks. The
        ``mask_mod`` encodes the selection too, because uncompiled FlexAttention ignores the lists. For use
        outside of a wrapped model's graph; capture its buffers explicitly there.
        """
        return block_mask(block_lists(self), columns=True)
