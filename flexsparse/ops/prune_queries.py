"""`flexsparse::prune_queries`: the queries that BSA computes, where the others take theirs from, and what scores them.

One kernel launch on CUDA, plain torch elsewhere. No gradient. Shape letters: B batch, H query heads, N query tiles, s slots
of a tile, A windows of a tile, n tokens of a window, Q packed queries of a tile, S tokens, P padded tokens, D head dim.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexsparse import ops
from flexsparse.ops.choice import read
from flexsparse.ops.tile_tokens import rows_at
from flexsparse.ops.windows import window_table
from flexsparse.tile_bits import ascending_lists

log = logging.getLogger("flexsparse")

Pruned = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

UNLIKE = -2.0
"""Likeness of a query that is not finite, below every cosine: it is computed, so that its output shows it."""


@torch.library.custom_op("flexsparse::prune_queries", mutates_args=())
def prune_queries(
    q: Tensor,
    tokens: Tensor,
    now: Tensor | None,
    share: float,
    grid: Sequence[int],
    tile: Sequence[int],
    window: Sequence[int],
    first_rows: int,
    length: int,
    packed: int,
    fill: str,
    representative: str,
    slots: int = 0,
) -> Pruned:
    """Choose the queries to compute: of each window its representative and those least similar to it.

    Windows are looked up inside, so that a graph holds no op for them.

    Args:
        q: ``[B, H, N, s, D]`` queries in tile order; slots past a tile's count are not read.
        tokens: int32 ``[P]``: the token in a slot, extra tiles included, -1 for padding.
        now: share of a window's tokens to compute, 0-d float64, or None.
        share: the same where ``now`` is None.
        grid: latent tokens (T, H, W).
        tile: sides of a query tile.
        window: sides of a window, at most the tile's.
        first_rows: slots of the first extra tiles.
        length: S.
        packed: Q; no tile keeps more.
        fill: ``"representative"``, ``"nearest"`` or ``"zero"`` (`masks.BSA`).
        representative: ``"center"`` or ``"medoid"``.
        slots: s, where q is ``[B, H, S, D]`` in raster order, whose tokens are found by the table; 0 where it is as said above.

    Returns:
        The sum over the kept queries of each tile ``[B, H, N, 1, D]``, at least float32, as a tile of one token; and the
        fields of `KeptQueries`: kept int32 ``[B, H, N, Q]``, counts int32 ``[N]``, source and position int32 ``[B, H, S]``.
    """
    windows, centres = window_table(tuple(grid), tuple(tile), tuple(window), q.device)  # type: ignore[arg-type]
    now_or_share = share if now is None else read(now) if now.device.type == "cpu" else now
    operands = (q, windows, centres, tokens, now_or_share, first_rows, length, packed, fill, representative, slots)
    if ops.on_gpu(q) and ops.has_triton():
        from flexsparse.compile_passes.templates import prune

        reason = prune.refusal(q.dtype, windows)
        if reason is None:
            return prune.prune(*operands)
        _say_once(f"BSA's queries are pruned in plain torch: {reason}")
    return prune_reference(*operands)


@functools.lru_cache(64)
def _say_once(message: str) -> None:
    log.info(message)


@prune_queries.register_fake
def _(q: Tensor, tokens: Tensor, now: Tensor | None, share: float, *args: Any) -> Pruned:
    grid, tile, _, _, length, packed = args[:6]
    B, H, D = *q.shape[:2], q.shape[-1]
    N = math.prod(-(-size // side) for size, side in zip(grid, tile)) if q.dim() == 4 else q.shape[2]

    def ints(*shape: int) -> Tensor:
        return q.new_empty(shape, dtype=torch.int32)

    total = q.new_empty((B, H, N, 1, D), dtype=torch.promote_types(q.dtype, torch.float32))
    return total, ints(B, H, N, packed), ints(N), ints(B, H, length), ints(B, H, length)


def cosine(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """Cosine over the last dimension; 0 where a vector is zero, `UNLIKE` where it is NaN. ``out`` is memory for the product."""
    norms = x.norm(dim=-1) * y.norm(dim=-1)
    cosines = torch.where(norms == 0, 0, torch.mul(x, y, out=out).sum(-1) / norms)
    return torch.where(cosines.isnan(), UNLIKE, cosines)


def prune_reference(
    q: Tensor,
    windows: Tensor,
    centres: Tensor,
    tokens: Tensor,
    share: float | Tensor,
    first_rows: int,
    length: int,
    packed: int,
    fill: str,
    representative: str,
    slots: int = 0,
) -> Pruned:
    """`prune_queries` in plain torch, with the windows ``[N, A, n]`` and their centres ``[N, A]`` as tensors."""
    if slots:
        N = windows.shape[0]
        q = rows_at(q, tokens.narrow(0, first_rows, N * slots)).unflatten(2, (N, slots))
    B, H, N, s, D = q.shape
    A, n = windows.shape[1:]
    q = q.to(torch.promote_types(q.dtype, torch.float32))
    inside = windows >= 0
    slot = windows.clamp_min(0).long()
    rows = (slot + torch.arange(N, device=q.device)[:, None, None] * s).flatten()
    x = q.flatten(2, 3).index_select(2, rows).unflatten(2, (N, A, n))
    size = inside.sum(-1)
    if representative == "center":
        place = centres.long().expand(B, H, N, A)
    else:
        mean = x.masked_fill(~inside[..., None], 0).sum(-2, keepdim=True) / size.clamp_min(1)[..., None, None]
        nearness = cosine(x, mean).masked_fill(~inside, -math.inf)
        place = nearness.argsort(dim=-1, descending=True, stable=True)[..., 0]
    chosen = x.gather(-2, place[..., None, None].expand(B, H, N, A, 1, D))
    likeness = cosine(x, chosen, out=None if fill == "nearest" else x)  # x is not needed again
    likeness = likeness.scatter(-1, place[..., None], -math.inf).masked_fill(~inside, math.inf)
    order = likeness.argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(n, device=q.device).expand_as(order))
    quota = (size.double() * share).ceil().long()  # float64: 0.1 * 10 is 1, not 2
    kept = (rank < quota[..., None]) & inside
    own = slot.expand(B, H, N, A, n)
    if fill == "nearest":
        pairs = cosine(x[..., :, None, :], x[..., None, :, :]).masked_fill(~kept[..., None, :], -math.inf)
        taken = own.gather(-1, pairs.argsort(dim=-1, descending=True, stable=True)[..., 0])
    else:
        taken = own.gather(-1, place[..., None]).expand_as(own)

    dump = torch.where(inside, windows.long(), s).flatten(1).expand(B, H, N, A * n)

    def to_slots(per_token: Tensor) -> Tensor:  # [B, H, N, A, n] -> [B, H, N, s]
        out = per_token.new_zeros((B, H, N, s + 1))
        return out.scatter_(-1, dump, per_token.flatten(-2))[..., :s]

    source_slot, kept_slots = to_slots(torch.where(kept, own, taken)), to_slots(kept)
    again = x.view(q.shape) if x.numel() == q.numel() and q.is_contiguous() else None  # fresh memory costs page faults
    total = torch.mul(q, kept_slots[..., None], out=again).sum(3, keepdim=True)
    zero = ~kept_slots if fill == "zero" else None

    last_rows = tokens.shape[0] - first_rows - N * s
    video = tokens[first_rows : first_rows + N * s].view(N, s).long().expand(B, H, N, s)
    base = first_rows + torch.arange(N, device=q.device)[:, None] * packed
    of_kept = base + kept_slots.cumsum(-1) - 1
    ends = torch.arange(first_rows + last_rows, device=q.device)
    ends_tokens = torch.cat([tokens[:first_rows], tokens[first_rows + N * s :]])
    ends_rows = torch.where(ends < first_rows, ends, ends + N * packed)
    where = torch.where(tokens >= 0, tokens, length).long()  # entry `length` takes what is padding

    def of_tokens(values: Tensor, extra: Tensor) -> Tensor:  # [B, H, N, s] -> int32 [B, H, S]
        if zero is not None:
            values = values.masked_fill(zero, -1)
        extra = extra.expand(B, H, -1)
        whole = torch.cat([extra[..., :first_rows], values.flatten(2), extra[..., first_rows:]], -1).to(torch.int32)
        out = whole.new_empty((B, H, length + 1))
        return out.index_copy_(-1, where, whole)[..., :length].contiguous()

    kept_tokens = video.gather(-1, ascending_lists(kept_slots, packed).long()).to(torch.int32)
    source = of_tokens(video.gather(-1, source_slot), ends_tokens)
    position = of_tokens(of_kept.gather(-1, source_slot), ends_rows)
    return total, kept_tokens, quota.sum(-1).to(torch.int32), source, position
