"""Bytes that a rank receives for one attention, by formula.

Shape letters: B batch, H query heads, G KV heads, L tokens of one rank, S tokens of all ranks, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexsparse.distributed.heads import Heads
from flexsparse.distributed.parallel import SequenceParallel
from flexsparse.distributed.tokens import Ranks, local_length, parts, sent_range
from flexsparse.given import to_int
from flexsparse.layout import TileLayout


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that ranks receive from others for one attention.

    Each direction is that of the rank that receives most in it: where heads or tokens do not divide, forward and backward may
    be busiest on different ranks.

    Attributes:
        enter: q, k, v and gates, before attention; of the busiest rank of a forward, as the next two.
        gather: keys and values of all tiles, and with them the padding of shorter parts.
        leave: the output.
        backward: of one backward, in which gradients go the other way.
    """

    enter: int
    gather: int
    leave: int
    backward: int

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
        ValueError: as `SequenceParallel`; fewer heads or tiles than ranks; a number out of range.
    """
    numbers = {
        "heads": heads,
        "head_dim": head_dim,
        "ulysses": ulysses,
        "tiles": tiles,
        "batch": batch,
        "itemsize": itemsize,
    }
    for name, number in numbers.items():
        if to_int(number) is None or number < 1:
            raise ValueError(f"{name} is {number!r}: give an int of at least 1")
    if to_int(gates) not in (0, 1, 2):
        raise ValueError(f"gates is {gates!r}: give how many gates a call has, 0 to 2")
    if kv_heads is not None and (to_int(kv_heads) is None or kv_heads < 1 or heads % kv_heads):
        raise ValueError(f"kv_heads is {kv_heads!r} with heads={heads}: give a number that divides the heads (GQA)")
    share = Heads(heads, heads if kv_heads is None else kv_heads, ulysses)
    if heads < ulysses:
        raise ValueError(f"heads is {heads} for {ulysses} ulysses ranks: give at most one rank a head")
    each = batch * head_dim * itemsize
    forward, backward = (0, 0, 0), 0
    ranges = [(share.query(rank), share.kv(rank)) for rank in range(ulysses)]
    rows = [(end - start) * (1 + gates) + 2 * (last - first) for (start, end), (first, last) in ranges]
    counts = parts(heads, ulysses)
    for tile_rank in range(tiles):
        for rank in range(ulysses):
            own = SequenceParallel.planned(Ranks("", rank, ulysses), Ranks("", tile_rank, tiles), text)
            outer, inner = own.segments(layout)
            (start, end), (first, last) = ranges[rank]
            sent = [sent_range(inner, other)[1] for other in range(ulysses)]
            held = [local_length(inner, other) for other in range(ulysses)]
            enter = rows[rank] * (sum(sent) - sent[rank])
            leave = held[rank] * (heads - counts[rank])
            gather = 0
            if tiles > 1:
                kv = last - first if share.spread(rank) is None else end - start
                gather = 2 * kv * (tiles - 1) * max(sent_range(outer, other)[1] for other in range(tiles))
            found = (enter * each, gather * each, leave * each)
            forward = max(forward, found, key=sum)
            # gradients of what it sent, and its part of the sum over what ranks of tiles gathered
            back = sent[rank] * (sum(rows) - rows[rank]) + counts[rank] * (sum(held) - held[rank]) + gather
            backward = max(backward, back * each)
    return Traffic(enter=forward[0], gather=forward[1], leave=forward[2], backward=backward)
