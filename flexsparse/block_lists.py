"""What FlexAttention reads of a selection.

Shape letters: B batch, H query heads, rows query tiles as computed, tiles KV tiles; extra tiles included in both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexsparse.tile_bits import ascending_lists, unpack_bits

if TYPE_CHECKING:
    from flexsparse.selection import TileSelection


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


@torch.library.custom_op("flexsparse::block_columns", mutates_args=())
def _block_columns(table: Tensor, tile_counts: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The lists of `block_lists` by KV tile, which only a backward of stock FlexAttention reads.

    One op, not `BlockMask`'s dozens: a graph has them even if `LowerFlex` then takes FlexAttention's place.

    Returns:
        Number and indices of the query tiles that see a partial tile, number and indices of those that see a full one:
        int32 ``[B, H, tiles]`` and ``[B, H, tiles, rows]``.
    """
    full_tile = (tile_counts == slots)[:, None, None]
    some, full = ((table & kind).transpose(-2, -1) for kind in (~full_tile, full_tile))
    rows = table.shape[2]
    return (
        some.sum(-1, dtype=torch.int32),
        ascending_lists(some, rows),
        full.sum(-1, dtype=torch.int32),
        ascending_lists(full, rows),
    )


@_block_columns.register_fake
def _(table: Tensor, tile_counts: Tensor, slots: int) -> Any:
    B, H, rows, tiles = table.shape

    def ints(*shape: int) -> Tensor:
        return table.new_empty(shape, dtype=torch.int32)

    return ints(B, H, tiles), ints(B, H, tiles, rows), ints(B, H, tiles), ints(B, H, tiles, rows)


def block_mask(lists: BlockLists, columns: bool) -> BlockMask:
    """The `BlockMask` of lists; ``columns``: whether there is to be a backward."""
    table, counts, q_shift, kv_shift = lists.table, lists.tile_counts, lists.q_shift, lists.kv_shift

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return tile_mask_mod(b, h, q, kv, table, counts, q_shift, kv_shift)

    mask = BlockMask.from_kv_blocks(
        lists.partial_num,
        lists.partial_indices,
        lists.full_num,
        lists.full_indices,
        BLOCK_SIZE=(1 << q_shift, 1 << kv_shift),
        mask_mod=mask_mod,
        seq_lengths=(table.shape[2] << q_shift, table.shape[3] << kv_shift),
        compute_q_blocks=False,
    )
    if columns:
        found: Any = torch.ops.flexsparse.block_columns(table, counts, 1 << kv_shift)
        mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices = found
    return mask
