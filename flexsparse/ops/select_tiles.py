"""`flexsparse::select_tiles`: the choice of tiles from given scores. Shape letters as in `choice`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexsparse import ops
from flexsparse.ops.choice import Choice, Rule, choose, to_tensor
from flexsparse.tile_bits import words_of


@torch.library.custom_op("flexsparse::select_tiles", mutates_args=())
def select_tiles_op(
    scores: Tensor, allowed: Tensor | None, now: Tensor | None, rule: str, value: float, min_tiles: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The tiles that a rule keeps.

    Args:
        scores: ``[B, H, N, M]``, at least float32.
        allowed: int32 bitmask ``[1 or B, 1 or H, N, W]`` of tiles that may be chosen; None where all may.
        now: the rule's number at run time, or None.
        rule: name of a `Rule`.
        value: its number where ``now`` is None.
        min_tiles: tiles that a row keeps at least.
        capacity: the most tiles that a row keeps.

    Returns:
        bits int32 ``[B, H, N, W]``, counts int32 ``[B, H, N]``, and the counts wanted before the capacity cut them.
    """
    scores, how = scores.detach(), Rule(name=rule, value=value, now=now, min_tiles=min_tiles)
    if ops.templates_select(scores, scores.shape[-1]):
        from flexsparse.compile_passes.templates.selection import select_scores

        number = how.number() if rule != "sparsity" else tiles_to_keep(how, scores.shape[-1])
        return select_scores(
            scores.contiguous(),
            allowed=allowed,
            rule="top_k" if rule == "sparsity" else rule,
            value=number,
            min_tiles=min_tiles,
            capacity=capacity,
        )
    return choose(scores, allowed, how, capacity)


@select_tiles_op.register_fake
def _(scores: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return fake_choice(scores, *scores.shape)


def fake_choice(like: Tensor, B: int, H: int, N: int, M: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors of a `Choice`'s shapes."""

    def ints(*shape: int) -> Tensor:
        return like.new_empty(shape, dtype=torch.int32)

    return ints(B, H, N, words_of(M)), ints(B, H, N), ints(B, H, N)


def tiles_to_keep(rule: Rule, M: int) -> float | Tensor:
    """The count that a ``"sparsity"`` rule stands for."""
    kept: Tensor = ((1 - to_tensor(rule.number())) * M).ceil().clamp(1, M)
    return float(kept) if kept.device.type == "cpu" else kept


def select_tiles(scores: Tensor, allowed: Tensor | None, rule: Rule, capacity: int) -> Choice:
    """Choose tiles; no gradient. The end of the chain that `compile_passes.FuseSelection` looks for.

    Args:
        scores: ``[B, H, N, M]``, at least float32.
        allowed: bool, broadcasts to ``[B, H, N, M]``, or None.
        rule: which and how many.
        capacity: the most tiles that a row keeps.
    """
    bits = None if allowed is None else allowed_bits(allowed, scores.shape[-2])
    return Choice(
        *torch.ops.flexsparse.select_tiles(scores, bits, rule.now, rule.name, rule.value, rule.min_tiles, capacity)
    )


def allowed_bits(allowed: Tensor, N: int) -> Tensor:
    """A mask that broadcasts to ``[B, H, N, M]`` as the bitmask that ops take: int32 ``[1 or B, 1 or H, N, W]``."""
    while allowed.dim() < 4:
        allowed = allowed[None]
    B, H, _, M = allowed.shape
    bits: Tensor = torch.ops.flexsparse.pack_tiles(allowed.expand(B, H, N, M))[0]
    return bits
