"""Which KV tiles each query tile keeps, and for BSA which query tokens are computed.

Shape letters: B batch, H query heads, S tokens in raster order, N query tiles, M KV tiles (video tiles only),
W words (`words_of`), K list length, Q packed queries of one tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexsparse.layout import TileLayout
from flexsparse.tables import ceil_div, is_tracing, larger

WORD = 32


def words_of(tiles: int) -> int:
    """W: words of a bitmask row, ``max(2, ceil(tiles / 32))``.

    Never one: torch compiles a dimension that may be 1 as a case of its own, which would cost a model that sees more and
    fewer than 32 tiles a third graph.
    """
    words: int = larger(2, ceil_div(tiles, WORD))
    return words


def pack_bits(keep: Tensor) -> Tensor:
    """Bool ``[..., M]`` to int32 ``[..., W]``: bit ``m % 32`` of word ``m // 32`` is ``keep[m]``; unused bits are 0."""
    M = keep.shape[-1]
    words = words_of(M)
    keep = torch.nn.functional.pad(keep, (0, words * WORD - M))
    if keep.device.type == "cpu" and keep.numel() and not is_tracing():
        return torch.from_numpy(np.packbits(keep.numpy(), axis=-1, bitorder="little")).view(torch.int32)
    keep = keep.unflatten(-1, (words, WORD))
    shifts = torch.arange(WORD, dtype=torch.int32, device=keep.device)
    return (keep.to(torch.int32) << shifts).sum(-1, dtype=torch.int32)  # distinct bits: the sum is their union


def unpack_bits(bits: Tensor, M: int) -> Tensor:
    """Inverse of `pack_bits`: int32 ``[..., W]`` to bool ``[..., M]``."""
    if bits.device.type == "cpu" and bits.numel() and not is_tracing():
        flags = np.unpackbits(bits.contiguous().view(torch.uint8).numpy(), axis=-1, count=M, bitorder="little")
        return torch.from_numpy(flags).view(torch.bool)
    shifts = torch.arange(WORD, dtype=torch.int32, device=bits.device)
    return ((bits[..., None] >> shifts) & 1).flatten(-2)[..., :M].bool()


def ascending_lists(keep: Tensor, capacity: int) -> Tensor:
    """Bool ``[..., M]`` to int32 ``[..., capacity]``: indices of the kept entries, ascending; 0 past their count."""
    M = keep.shape[-1]
    position = (
        keep.cumsum(-1, dtype=torch.int32).sub_(1).masked_fill_(~keep, capacity)
    )  # the last column takes the others
    index = torch.arange(M, dtype=torch.int32, device=keep.device).expand(keep.shape)
    lists = index.new_zeros((*keep.shape[:-1], capacity + 1))
    return lists.scatter(-1, position.long(), index)[..., :capacity].contiguous()


@torch.library.custom_op("flexsparse::pack_tiles", mutates_args=())
def pack_tiles(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Bitmask and counts of kept tiles: bool ``[..., M]`` to int32 ``[..., W]`` and int32 ``[...]``.

    An op, so that a graph shows where the choice of tiles ends.
    """
    return pack_bits(keep), keep.sum(-1, dtype=torch.int32)


@pack_tiles.register_fake
def _(keep: Tensor) -> tuple[Tensor, Tensor]:
    *rows, M = keep.shape
    return keep.new_empty((*rows, words_of(M)), dtype=torch.int32), keep.new_empty(rows, dtype=torch.int32)


@torch.library.custom_op("flexsparse::pack_lists", mutates_args=())
def pack_lists(indices: Tensor, counts: Tensor, tiles: int) -> tuple[Tensor, Tensor]:
    """`pack_tiles` of the tiles that lists name: ``indices [..., K]`` and ``counts [...]``; entries past a count are ignored.

    Raises:
        ValueError: an index out of range, or a count larger than the list.
    """
    K = indices.shape[-1]
    on = torch.arange(K, device=indices.device) < counts[..., None]
    listed = indices.long().masked_fill(~on, tiles)
    if bool(((counts < 0) | (counts > K)).any()):
        raise ValueError(
            f"kv_counts holds {int(counts.min())} to {int(counts.max())}: give 0 to {K}, the lists' length"
        )
    if bool(((listed < 0) | (listed > tiles) | (on & (listed == tiles))).any()):
        raise ValueError(
            f"kv_indices holds {int(indices[on].min())} to {int(indices[on].max())}: give tiles in [0, {tiles})"
        )
    keep = torch.zeros((*listed.shape[:-1], tiles + 1), dtype=torch.bool, device=listed.device)
    return torch.ops.flexsparse.pack_tiles(keep.scatter_(-1, listed, True)[..., :tiles])


@pack_lists.register_fake
def _(indices: Tensor, counts: Tensor, tiles: int) -> tuple[Tensor, Tensor]:
    rows = indices.shape[:-1]
    return indices.new_empty((*rows, words_of(tiles)), dtype=torch.int32), counts.new_empty(rows, dtype=torch.int32)


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
        q, kv = self.layout, self.kv_layout
        keep = torch.nn.functional.pad(self.keep(), (kv.tiles_first, kv.tiles_last), value=True)
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
        return (self.kept_tokens(self.to_dense()) * computed[:, None]).sum(), all_pairs

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

    def kept_tokens(self, rows: Tensor) -> Tensor:
        """Valid KV tokens of the tiles that rows keep: bool ``[B, H, rows, tiles]`` to float64 ``[B, H, rows]``."""
        counts = self.kv_tile_counts().double().expand(rows.shape[0], -1)
        per_head = [(rows[:, head].double() @ counts[..., None])[..., 0] for head in range(rows.shape[1])]
        return torch.stack(per_head, 1)  # one head at a time: a bool mask in float64 is eight times as large

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
        lists = block_lists(self)
        q_shift, kv_shift = lists.q_shift, lists.kv_shift
        table, counts = lists.table, lists.tile_counts

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return tile_mask_mod(b, h, q, kv, table, counts, q_shift, kv_shift)

        return BlockMask.from_kv_blocks(
            lists.partial_num,
            lists.partial_indices,
            lists.full_num,
            lists.full_indices,
            BLOCK_SIZE=(1 << q_shift, 1 << kv_shift),
            mask_mod=mask_mod,
            seq_lengths=(table.shape[2] << q_shift, table.shape[3] << kv_shift),
        )


def tile_mask_mod(
    b: Tensor, h: Tensor, q: Tensor, kv: Tensor, table: Tensor, counts: Tensor, q_shift: int, kv_shift: int
) -> Tensor:
    """FlexAttention ``mask_mod`` of a selection; shifts, as a division costs a dozen integer operations."""
    tile = kv >> kv_shift
    return table[b, h, q >> q_shift, tile] & ((kv & ((1 << kv_shift) - 1)) < counts[b, tile])


class BlockLists(NamedTuple):
    """What FlexAttention reads; distinct contiguous buffers that no other tensor aliases."""

    partial_num: Tensor  # int32 [B, H, rows]
    partial_indices: Tensor  # int32 [B, H, rows, tiles]
    full_num: Tensor  # int32 [B, H, rows]
    full_indices: Tensor  # int32 [B, H, rows, tiles]
    table: Tensor  # bool [B, H, rows, tiles]
    tile_counts: Tensor  # int32 [B, tiles]
    q_shift: int
    kv_shift: int


@torch.library.custom_op("flexsparse::block_lists", mutates_args=())
def _block_lists(
    bits: Tensor,
    counts: Tensor,
    kv_counts: Tensor,
    query_rows: int,
    first_rows: int,
    last_rows: int,
    kv_first: int,
    kv_video: int,
    slots: int,
    capacity: int,
    frame_tiles: int,
    partial: bool,
    call: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """FlexAttention's lists of a selection; arguments as `flexsparse::tile_attention`'s, which may replace it.

    ``call`` is a name by which passes say what became of it.

    One opaque op: FlexAttention miscompiles captured scatters of the same graph (it reads the buffer from before
    the scatter), and on CPU lists that are views or shared between arguments.

    Returns:
        Number and indices of partial tiles, number and indices of full tiles, table, valid tokens: `BlockLists`.
    """
    B, tiles = bits.shape[0], kv_counts.shape[-1]
    ends = (kv_first, tiles - kv_first - kv_video, first_rows // query_rows, last_rows // query_rows)
    dense = torch.nn.functional.pad(unpack_bits(bits, kv_video), ends, value=True)
    valid = kv_counts.expand(B, tiles).contiguous()
    full_tile = (valid == slots)[:, None, None]
    dense = dense & (valid > 0)[:, None, None]
    some, full = dense & ~full_tile, dense & full_tile
    return (
        some.sum(-1, dtype=torch.int32),
        ascending_lists(some, tiles),
        full.sum(-1, dtype=torch.int32),
        ascending_lists(full, tiles),
        dense,
        valid.clone(),  # of one sample they are the layout's own
    )


@_block_lists.register_fake
def _(
    bits: Tensor, counts: Tensor, kv_counts: Tensor, query_rows: int, first_rows: int, last_rows: int, *_: Any
) -> Any:
    B, H, N = bits.shape[:3]
    rows, tiles = N + first_rows // query_rows + last_rows // query_rows, kv_counts.shape[-1]

    def ints(*shape: int) -> Tensor:
        return bits.new_empty(shape, dtype=torch.int32)

    lists = (ints(B, H, rows), ints(B, H, rows, tiles), ints(B, H, rows), ints(B, H, rows, tiles))
    return (*lists, bits.new_empty((B, H, rows, tiles), dtype=torch.bool), ints(B, tiles))


def block_lists(selection: TileSelection, call: str = "") -> BlockLists:
    """FlexAttention's lists of a selection, extra tiles included; rows are query tiles as computed."""
    lists: Any = torch.ops.flexsparse.block_lists(*selection.operands(), call)
    q_shift, kv_shift = selection.query_rows.bit_length() - 1, selection.kv_layout.slots.bit_length() - 1
    return BlockLists._make((*lists, q_shift, kv_shift))
