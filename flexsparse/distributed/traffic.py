"""Bytes that a rank receives for one attention, by formula.

Shape letters: B batch, H query heads, G KV heads, L tokens of one rank, S tokens of all ranks, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexsparse.distributed.heads import Heads
from flexsparse.distributed.parallel import SequenceParallel
from flexsparse.distributed.tokens import Ranks, local_length, parts, sent_range
from flexsparse.layout import TileLayout


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that the busiest rank receives from others in one forward; backward moves as many the other way.

    Attributes:
        enter: q, k, v and gates, before attention.
        gather: keys and values of all tiles, and with them the padding of shorter parts.
        leave: the output.
    """

    enter: int
    gather: int
    leave: int

    @property
    def total(self) -> int:
        """Of a forward."""
        return self.enter + self.gather + self.leave


def traffic(
    layout: TileLayout,
    *,
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    ulysses: int = 1,
    tiles: int = 1,
    gates: int = 0,
    text: str = "replicated",
    batch: int = 1,
    itemsize: int = 2,
) -> Traffic:
    """Communication of `SequenceParallel.attention`.

    >>> layout = fs.TileLayout(grid=(21, 30, 52))
    >>> traffic(layout, heads=12, head_dim=128, ulysses=4).total      # 4 S H D / ranks * (ranks - 1) / ranks elements
    75479040

    Args:
        layout: of the whole sequence.
        heads: H.
        head_dim: D.
        kv_heads: G, H by default.
        ulysses: ranks that exchange heads.
        tiles: ranks that share query tiles.
        gates: how many gates travel, 0 to 2.
        text: as `SequenceParallel`.
        batch: B.
        itemsize: bytes of an element.

    Raises:
        ValueError: as `SequenceParallel`, and fewer heads or tiles than ranks.
    """
    share = Heads(heads, heads if kv_heads is None else kv_heads, ulysses)
    if heads < ulysses:
        raise ValueError(f"heads is {heads} for {ulysses} ulysses ranks: give at most one rank a head")
    each = batch * head_dim * itemsize
    most = [0, 0, 0]
    for tile_rank in range(tiles):
        for rank in range(ulysses):
            own = SequenceParallel.planned(Ranks("", rank, ulysses), Ranks("", tile_rank, tiles), text)
            outer, inner = own.segments(layout)
            start, end = share.query(rank)
            first, last = share.kv(rank)
            rows = (end - start) * (1 + gates) + 2 * (last - first)
            others = [sent_range(inner, other)[1] for other in range(ulysses) if other != rank]
            enter = rows * sum(others)
            leave = local_length(inner, rank) * (heads - parts(heads, ulysses)[rank])
            gather = 0
            if tiles > 1:
                kv = last - first if share.spread(rank) is None else end - start
                gather = 2 * kv * (tiles - 1) * max(sent_range(outer, other)[1] for other in range(tiles))
            most = [max(a, b * each) for a, b in zip(most, (enter, gather, leave))]
    return Traffic(enter=most[0], gather=most[1], leave=most[2])
