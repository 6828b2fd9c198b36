"""Sets of tiles as bitmasks, lists and bools; the first two from the last.

Shape letters: M KV tiles, W words (`words_of`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

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


def count_bits(bits: Tensor) -> Tensor:
    """How many bits are set: int32 ``[..., W]`` to int32 ``[...]``, without a bool for each tile."""
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    bits = bits + (bits >> 8)
    return ((bits + (bits >> 16)) & 0x3F).sum(-1, dtype=torch.int32)


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


@torch.library.custom_op("flexsparse::within_capacity", mutates_args=())
def within_capacity(counts: Tensor, capacity: int) -> Tensor:
    """Counts that somebody else says are at most a capacity, which kernels rely on: it is the room of their lists.

    Raises:
        ValueError: one is larger (on CUDA the device asserts: nothing waits for it).
    """
    message = f"a selection of capacity={capacity} has rows that keep more tiles: give a larger capacity, or keep fewer"
    if counts.is_cuda:
        torch._assert_async((counts <= capacity).all(), message)
    elif bool((counts > capacity).any()):
        raise ValueError(f"{message} (the most is {int(counts.max())})")
    return counts.clone()


@within_capacity.register_fake
def _(counts: Tensor, capacity: int) -> Tensor:
    return torch.empty_like(counts)


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
