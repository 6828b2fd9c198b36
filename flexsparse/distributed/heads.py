"""Ulysses: all-to-alls between "all heads of some tokens" and "all tokens of some heads".

One collective each way, with q, k, v and the gates in one buffer: all collectives of a model form a chain, so that ranks
whose graphs differ in sizes cannot run them in different orders.
Shape letters: B batch, H query heads, G KV heads, L tokens of one rank, S tokens of all ranks, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor

from flexsparse.distributed.tokens import (
    Ranks,
    Segments,
    bounds,
    in_sequence,
    known_empty,
    local_length,
    own_pieces,
    parts,
    sent_range,
    without_autograd,
)


def too_few_heads(heads: int, ranks: int) -> str:
    """What is said of a wrapped model, where query tiles cannot be shared."""
    return (
        f"has {heads} heads for {ranks} ranks, of which each computes at least one: give ulysses(model, mesh) a mesh of at "
        f"most {heads}, and other samples to the other ranks (mesh['ulysses'] of a mesh of data and ulysses ranks)"
    )


@dataclass(frozen=True)
class Heads:
    """Which heads each rank computes: contiguous ranges of the query heads, and the KV heads that they read.

    A KV head goes to every rank that has a query head of its group.

    Attributes:
        heads: H.
        kv_heads: G.
        size: ranks.
    """

    heads: int
    kv_heads: int
    size: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, size: int) -> Heads:
        """For given q and k, ``[B, H or G, L, D]``.

        Raises:
            ValueError: fewer heads than ranks.
        """
        if q.shape[1] < size:
            raise ValueError(
                f"q has {q.shape[1]} heads and the ulysses mesh {size} ranks: give at most one rank a head; more ranks "
                "share a head's query tiles, by SequenceParallel(ulysses=mesh['ulysses'], tiles=mesh['tiles'])"
            )
        return cls(int(q.shape[1]), int(k.shape[1]), size)

    def query(self, rank: int) -> tuple[int, int]:
        """First and past-the-end query head of a rank."""
        return bounds(parts(self.heads, self.size), rank)

    def kv(self, rank: int) -> tuple[int, int]:
        """First and past-the-end KV head of a rank."""
        start, end = self.query(rank)
        group = self.heads // self.kv_heads
        return start // group, (end - 1) // group + 1

    def spread(self, rank: int) -> list[int] | None:
        """For each query head of a rank the KV head among its own, where they are no equal groups; else None."""
        (start, end), (first, stop) = self.query(rank), self.kv(rank)
        group = self.heads // self.kv_heads
        reads = [head // group - first for head in range(start, end)]
        count, kv = end - start, stop - first
        return None if count % kv == 0 and reads == [i // (count // kv) for i in range(count)] else reads


def all_to_all(x: Tensor, received: Sequence[int], sent: Sequence[int], group: Any) -> Tensor:
    """Rows of ``[n, ...]`` to the ranks, ``sent[i]`` to rank i; returns rows from the ranks, ``received[i]`` from rank i."""
    if without_autograd():
        return funcol.wait_tensor(funcol.all_to_all_single(x, list(received), list(sent), group))
    return funcol.all_to_all_single_autograd(x, list(received), list(sent), group)


def to_heads(
    tensors: Sequence[Tensor], heads: Sequence[Sequence[tuple[int, int]]], segments: Segments, ranks: Ranks
) -> list[Tensor]:
    """All heads of this rank's tokens to all tokens of this rank's heads.

    Args:
        tensors: ``[B, heads, L, D]`` each, of one dtype.
        heads: for each tensor, the range of heads that each rank gets.
        segments: the sequence.
        ranks: who takes part.

    Returns:
        ``[B, own heads, S, D]`` each.
    """
    me = ranks.rank
    start, length = sent_range(segments, me)
    B, _, _, D = tensors[0].shape
    turned = [x.transpose(0, 1) for x in tensors]  # [heads, B, L, D] each

    def of_rank(rank: int, tokens: Sequence[Tensor]) -> list[Tensor]:
        return [x[slice(*ranges[rank])] for x, ranges in zip(tokens, heads)]

    counts = [[end - start for start, end in ranges] for ranges in heads]

    def rows(rank: int) -> int:
        return sum(count[rank] for count in counts)

    split = [x.narrow(2, start, length) for x in turned]
    buffer = torch.cat([piece for rank in range(ranks.size) for piece in of_rank(rank, split)]).flatten()
    sent = [rows(rank) * B * length * D for rank in range(ranks.size)]
    lengths = [sent_range(segments, rank)[1] for rank in range(ranks.size)]
    received = [rows(me) * B * count * D for count in lengths]
    flat = all_to_all(buffer, received, sent, ranks.group).split(received)
    blocks = [block.view(rows(me), B, count, D) for block, count in zip(flat, lengths)]
    replicated = any(not segment.split and not known_empty(segment.length) for segment in segments)
    own = torch.cat(of_rank(me, turned)) if replicated else blocks[me]  # read for replicated segments only
    whole = in_sequence(own, blocks, segments, me, 2)
    return [x.transpose(0, 1) for x in whole.split([count[me] for count in counts])]


def to_tokens(x: Tensor, heads: Heads, segments: Segments, ranks: Ranks) -> Tensor:
    """All tokens of this rank's heads ``[B, own heads, S, D]`` to all heads of this rank's tokens ``[B, H, L, D]``.

    Replicated tokens go to every rank.
    """
    me = ranks.rank
    B, own, _, D = x.shape
    rows = x.permute(2, 0, 1, 3)
    buffer = torch.cat([piece for rank in range(ranks.size) for piece in own_pieces(rows, segments, rank, 0)]).flatten()
    sent = [local_length(segments, rank) * B * own * D for rank in range(ranks.size)]
    L = local_length(segments, me)
    counts = parts(heads.heads, ranks.size)
    received = [L * B * count * D for count in counts]
    flat = all_to_all(buffer, received, sent, ranks.group).split(received)
    return torch.cat([block.view(L, B, count, D) for block, count in zip(flat, counts)], 2).permute(1, 2, 0, 3)


@dataclass(frozen=True)
class Exchange:
    """The two all-to-alls of one attention.

    Attributes:
        segments: the sequence.
        ranks: who takes part.
        heads: which heads each rank computes.
    """

    segments: Segments
    ranks: Ranks
    heads: Heads

    def to_heads(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
        """q, k, v and those gates that there are, ``[B, H or G, L, D]``, to ``[B, own heads, S, D]``."""
        if self.ranks.size == 1:
            return q, k, v, list(gates)
        ranks = range(self.ranks.size)
        query, kv = [self.heads.query(rank) for rank in ranks], [self.heads.kv(rank) for rank in ranks]
        present = [gate.to(q.dtype) for gate in gates if gate is not None]
        ranges = [query, kv, kv, *[query] * len(present)]
        q, k, v, *moved = to_heads([q, k, v, *present], ranges, self.segments, self.ranks)
        reads = self.heads.spread(self.ranks.rank)
        if reads is not None:  # unequal groups: one KV head a query head
            k, v = (torch.stack([x[:, head] for head in reads], 1) for x in (k, v))
        rest = iter(moved)
        return q, k, v, [None if gate is None else next(rest) for gate in gates]

    def to_tokens(self, x: Tensor) -> Tensor:
        """``[B, own heads, S, D]`` to ``[B, H, L, D]``."""
        return x if self.ranks.size == 1 else to_tokens(x, self.heads, self.segments, self.ranks)
