"""Lists of pairs of query tiles: what both see, then what only one of the two sees. Workspace of `hopper_pairs`.

Shape letters: B batch, H query heads, N query tiles, P = ceil(N / 2) pairs, M KV video tiles, W words of a bitmask row,
K capacity.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.compile_passes.templates.launch import Compilation, launch
from flexsparse.tile_bits import unpack_bits

ROW_BITS = 1024
"""Bits of a row that are expanded at once."""


@triton.jit
def pair_of(number, N, frame_tiles):
    """The two query tiles of a pair: neighbours in time, or where a last frame of tiles is left, next to each other in it.

    One that has no other is twice in its pair.
    """
    paired = N // (2 * frame_tiles) * frame_tiles
    early = number < paired
    first = tl.where(early, number + number // frame_tiles * frame_tiles, 2 * number)
    return first, tl.where(early, first + frame_tiles, tl.minimum(2 * number + 1, N - 1))


@triton.jit
def _load_keep(bits, row, m, M, words):
    word = tl.load(bits + row * words + m // 32, mask=m < M, other=0)
    return (word >> (m % 32)) & 1


@triton.jit(do_not_specialize=["N", "M", "words", "capacity", "frame_tiles"])
def _pair_lists(bits, counts, lists, sizes, N, M, words, capacity, frame_tiles, BLOCK: tl.constexpr):
    """Lists and sizes of one pair."""
    pairs = (N + 1) // 2
    place = tl.program_id(0).to(tl.int64)
    head = place // pairs * N
    first, second = pair_of((place % pairs).to(tl.int32), N, frame_tiles)
    both = tl.full([], 0, tl.int32)
    for start in range(0, M, BLOCK):
        m = start + tl.arange(0, BLOCK)
        both += tl.sum(_load_keep(bits, head + first, m, M, words) & _load_keep(bits, head + second, m, M, words), 0)
    count = tl.load(counts + head + first)
    total = count + tl.load(counts + head + second) - both  # tiles that one or both see
    tl.store(sizes + 4 * place, both)
    tl.store(sizes + 4 * place + 1, count - both)
    tl.store(sizes + 4 * place + 2, total - count)

    seen_both = tl.full([], 0, tl.int32)
    seen_first = both
    seen_second = count
    for start in range(0, M, BLOCK):
        m = start + tl.arange(0, BLOCK)
        of_first = _load_keep(bits, head + first, m, M, words)
        of_second = _load_keep(bits, head + second, m, M, words)
        shared = of_first & of_second
        # each of the three parts grows by its tiles in ascending order
        at = seen_both + tl.cumsum(shared, 0) - 1
        at = tl.where(of_first > of_second, seen_first + tl.cumsum(of_first - shared, 0) - 1, at)
        at = tl.where(of_second > of_first, seen_second + tl.cumsum(of_second - shared, 0) - 1, at)
        tl.store(lists + place * (2 * capacity) + at, m, mask=(of_first | of_second) == 1)
        seen_both += tl.sum(shared, 0)
        seen_first += tl.sum(of_first - shared, 0)
        seen_second += tl.sum(of_second - shared, 0)
    for start in range(0, 2 * capacity, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(lists + place * (2 * capacity) + at, 0, mask=(at >= total) & (at < 2 * capacity))


def pair_lists(bits: Tensor, counts: Tensor, M: int, capacity: int, frame_tiles: int) -> tuple[Tensor, Tensor]:
    """What the two query tiles of each pair (`pair_of`) see; one launch.

    Args:
        bits: int32 ``[B, H, N, W]``.
        counts: int32 ``[B, H, N]``, at most ``capacity``.
        M: KV video tiles.
        capacity: most tiles that a row keeps.
        frame_tiles: query tiles of one frame of tiles: tile n and tile n + frame_tiles are neighbours in time.

    Returns:
        Lists int32 ``[B, H, P, 2 * capacity]``: tiles that both see, that only the first, that only the second sees, each
        ascending, then zeros; and the lengths of the three parts, int32 ``[B, H, P, 4]``, of which the last is no length.
    """
    B, H, N = counts.shape
    pairs = (N + 1) // 2
    lists = torch.empty((B, H, pairs, 2 * capacity), dtype=torch.int32, device=bits.device)
    sizes = torch.empty((B, H, pairs, 4), dtype=torch.int32, device=bits.device)
    meta = {"BLOCK": ROW_BITS, "num_warps": 4}
    operands = (bits.contiguous(), counts.contiguous(), lists, sizes, N, M, bits.shape[-1], capacity, frame_tiles)
    launch(_pair_lists, (B * H * pairs,), *operands, **meta)
    return lists, sizes


def pairs_reference(N: int, frame_tiles: int) -> tuple[Tensor, Tensor]:
    """The first and the second query tile of every pair: two int64 ``[P]``."""
    paired = N // (2 * frame_tiles) * frame_tiles
    every = torch.arange(N, device="cpu")
    frames = every[: 2 * paired].view(-1, 2, frame_tiles if paired else 1)
    rest = every[2 * paired :]
    rest = torch.cat([rest, rest[-1:]]) if len(rest) % 2 else rest
    pairs = torch.cat([frames.transpose(1, 2).reshape(-1, 2), rest.view(-1, 2)])
    return pairs[:, 0], pairs[:, 1]


def pair_lists_reference(
    bits: Tensor, counts: Tensor, M: int, capacity: int, frame_tiles: int
) -> tuple[Tensor, Tensor]:
    """As `pair_lists`; the number that is no length is 0."""
    keep = unpack_bits(bits, M)
    first, second = (keep[:, :, x] for x in pairs_reference(counts.shape[2], frame_tiles))
    parts = torch.cat([first & second, first & ~second, second & ~first], -1)
    order = torch.argsort((~parts).to(torch.int8), dim=-1, stable=True)
    lists = torch.where(parts.gather(-1, order), order % max(M, 1), 0)
    lists = torch.nn.functional.pad(lists, (0, 2 * capacity))[..., : 2 * capacity]
    lengths = parts.unflatten(-1, (3, M)).sum(-1)
    return lists.int(), torch.nn.functional.pad(lengths, (0, 1)).int()


def compilations(long_tail: bool) -> list[Compilation]:
    """What to compile offline; there is one configuration, so ``long_tail`` adds none."""
    arrays = ("bits", "counts", "lists", "sizes")
    numbers = ("N", "M", "words", "capacity", "frame_tiles")
    kinds = dict.fromkeys(arrays, "*i32") | dict.fromkeys(numbers, "i32") | {"BLOCK": "constexpr"}
    found = Compilation(
        kernel=_pair_lists,
        config={},
        signature=kinds,
        constants={"BLOCK": ROW_BITS},
        aligned=arrays,
        num_stages=3,
        auto=True,
    )
    return [found]
