"""From scores between tiles to the tiles that are kept: every rule ends in an exact count and the best so many.

Shape letters: B batch, H query heads, N query tiles, M KV tiles, W words of a bitmask row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flexsparse.tile_bits import pack_bits, unpack_bits

RULES = ("top_k", "sparsity", "normal", "probability", "mass", "all")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How many tiles a row keeps; the best so many are kept, ties to the lowest index.

    Attributes:
        name: ``"top_k"``: ``value`` tiles; ``"sparsity"``: ``clamp(ceil((1 - value) * M), 1, M)`` (VSA, arXiv
            2505.13389); ``"normal"``: scores above ``mean + std * Phi^-1(1 - value)`` of their row, population std (BSA,
            arXiv 2509.01085); ``"probability"``: the same on the row's softmax; ``"mass"``: the fewest tiles whose softmax
            reaches ``value``; ``"all"``: every allowed tile.
        value: the rule's number where it is known when a graph is made.
        now: the rule's number at run time, 0-d (for ``"top_k"`` anything that broadcasts to ``[B, H, N, 1]``); it goes
            before ``value``, and a new one changes no graph.
        min_tiles: tiles that a row keeps at least, where so many are allowed.
    """

    name: str
    value: float = 0.0
    now: Tensor | None = None
    min_tiles: int = 1

    def number(self) -> float | Tensor:
        """The number to compute with; a 0-d tensor on the CPU is read."""
        if self.now is None:
            return self.value
        return read(self.now) if self.now.dim() == 0 and self.now.device.type == "cpu" else self.now


def to_tensor(number: float | Tensor) -> Tensor:
    """A number as a 0-d float64 tensor: on the CPU, whatever torch's default device is; a tensor where it is."""
    if isinstance(number, Tensor):
        return torch.as_tensor(number, dtype=torch.float64)
    return torch.as_tensor(number, dtype=torch.float64, device="cpu")


def read(number: Tensor) -> float:
    """A 0-d tensor on the CPU, as kernels are launched with it.

    Raises:
        RuntimeError: a CUDA graph is being captured, which would keep the number for good.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"a schedule's value ({float(number):.4g}) is read on the CPU while a CUDA graph is captured, which would keep it: "
            "give the builder a plain number, or capture no graph"
        )
    return float(number)


class Choice(NamedTuple):
    """What was chosen.

    Attributes:
        bits: int32 ``[B, H, N, W]`` (`flexsparse.tile_bits.pack_bits`).
        counts: int32 ``[B, H, N]`` kept tiles.
        wanted: int32 ``[B, H, N]`` tiles wanted before the capacity cut them.
    """

    bits: Tensor
    counts: Tensor
    wanted: Tensor


def choose(scores: Tensor, allowed: Tensor | None, rule: Rule, capacity: int) -> Choice:
    """Apply a rule to scores.

    Args:
        scores: ``[B, H, N, M]``, at least float32. A NaN counts as the highest score: it stays visible in the output.
        allowed: int32 bitmask that broadcasts to ``[B, H, N, W]``: tiles that may be chosen; None where all may.
        rule: how many.
        capacity: the most tiles that a row keeps.
    """
    M = scores.shape[-1]
    mask = None if allowed is None else unpack_bits(allowed, M)
    wanted = wanted_tiles(scores, mask, rule)
    kept = wanted.clamp_max(capacity)
    keys = sortable(scores)
    if mask is not None:
        keys = keys.masked_fill(~mask, torch.iinfo(keys.dtype).min)
    bits = _best_on_cpu(keys, kept) if keys.device.type == "cpu" else pack_bits(_best(keys, kept))
    return Choice(bits, kept.expand(scores.shape[:-1]).contiguous(), wanted.expand(scores.shape[:-1]).contiguous())


def wanted_tiles(scores: Tensor, mask: Tensor | None, rule: Rule) -> Tensor:
    """Tiles that each row wants within what is allowed, int32, broadcasts to ``[B, H, N]``.

    Args:
        scores: ``[B, H, N, M]``.
        mask: bool, broadcasts to ``[B, H, N, M]``, or None.
        rule: how many.
    """
    M = scores.shape[-1]
    some = torch.tensor(M, device=scores.device) if mask is None else mask.sum(-1)
    n = _asked(scores, mask, rule, some)
    return torch.minimum(n.clamp_min(rule.min_tiles), some).to(torch.int32)


def _asked(scores: Tensor, mask: Tensor | None, rule: Rule, some: Tensor) -> Tensor:
    M, number = scores.shape[-1], rule.number()
    if rule.name == "all":
        return some
    if rule.name == "top_k":
        n = torch.as_tensor(number, device=scores.device)
        return (n if n.dim() == 0 else n[..., 0]).to(torch.int64)
    if rule.name == "sparsity":
        share = torch.as_tensor(number, dtype=torch.float64, device=scores.device)
        return ((1 - share) * M).ceil().clamp(1, M).to(torch.int64)
    weights = scores if rule.name == "normal" else masked_softmax(scores, mask)
    value = torch.as_tensor(number, dtype=torch.float64, device=scores.device)
    if rule.name == "mass":
        ranked = sort_values(weights, descending=True)
        before = ranked.cumsum(-1) - ranked
        return torch.where(value >= 1, some, (before < value).sum(-1))
    above = (weights > row_threshold(weights, mask, value)) | (value >= 1)
    return (above if mask is None else above & mask).sum(-1)


def row_threshold(
    values: Tensor, mask: Tensor | None, density: float | Tensor, over: tuple[int, ...] = (-1,)
) -> Tensor:
    """``mean + std * Phi^-1(1 - density)`` over the allowed entries, population std; keeps reduced dimensions."""
    if mask is None:
        variance, mean = torch.var_mean(values, over, correction=0, keepdim=True)
    else:
        mask = mask.expand(values.shape)
        total = mask.sum(over, keepdim=True).clamp_min(1)
        mean = values.masked_fill(~mask, 0).sum(over, keepdim=True) / total
        variance = (values - mean).square().masked_fill(~mask, 0).sum(over, keepdim=True) / total
    # Dynamo does not trace `inv_cdf`, which is C
    if torch.compiler.is_dynamo_compiling() and not isinstance(density, Tensor):
        density = torch.full((), density, dtype=torch.float64, device=values.device)
    # Phi^-1(0) is -inf, and -inf * 0 is NaN for a row of equal scores
    if isinstance(density, Tensor):
        z: float | Tensor = normal_quantile(1 - density.clamp_max(1 - 1e-12)).to(values.dtype)
    else:
        z = NormalDist().inv_cdf(1 - min(density, 1 - 1e-12))
    return mean + variance.sqrt() * z


def normal_quantile(p: Tensor) -> Tensor:
    """``Phi^-1`` of the normal distribution. Not `torch.special.ndtri`, for which Inductor has no code on a GPU."""
    return torch.erfinv(2 * p - 1) * math.sqrt(2)


def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the allowed entries of a row; a row that allows none is zero, with gradient zero."""
    if mask is None:
        return scores.softmax(-1)
    some = mask.any(-1, keepdim=True)
    # an empty row takes a finite softmax first, as the gradient of a softmax over -inf only is NaN
    weights = scores.masked_fill(~mask & some, -math.inf).softmax(-1)
    return weights.masked_fill(~mask, 0)


def sort_values(x: Tensor, descending: bool = False) -> Tensor:
    """Sorted values of the last dimension; numpy's sort is vectorised where torch's is not."""
    if x.device.type != "cpu" or x.requires_grad:
        return x.sort(dim=-1, descending=descending).values
    ranked = torch.from_numpy(np.sort(x.numpy(), axis=-1))
    return ranked.flip(-1) if descending else ranked


def sortable(scores: Tensor) -> Tensor:
    """Integers in the order of the scores: NaN highest, both zeros equal. float32 to int32, float64 to int64."""
    integer = torch.int64 if scores.dtype == torch.float64 else torch.int32
    bits = torch.iinfo(integer).bits
    raw = (scores + 0.0).view(integer)  # -0.0 + 0.0 is 0.0
    keys = raw ^ ((raw >> (bits - 1)) & torch.iinfo(integer).max)
    return keys.masked_fill_(scores.isnan(), torch.iinfo(integer).max)


def _best(keys: Tensor, kept: Tensor) -> Tensor:
    """Bool ``[B, H, N, M]``: the highest ``kept`` keys of each row, ties to the lowest index."""
    ranked = keys.sort(dim=-1, descending=True).values
    last = (kept.expand(keys.shape[:-1]).long() - 1).clamp_min(0)[..., None]
    threshold = ranked.gather(-1, last)
    above, tied = keys > threshold, keys == threshold
    room = kept[..., None] - above.sum(-1, keepdim=True)
    return (above | (tied & (tied.cumsum(-1) <= room))) & (kept > 0)[..., None]


def _best_on_cpu(keys: Tensor, kept: Tensor) -> Tensor:
    """Bitmask of `_best`; only rows with a tie at the threshold are looked at twice."""
    M = keys.shape[-1]
    rows: Any = keys.reshape(-1, M).numpy()
    n: Any = kept.expand(keys.shape[:-1]).reshape(-1).numpy()
    if not len(rows):
        return pack_bits(keys.bool())
    ranked = np.sort(rows, axis=-1)  # vectorised; a partition about two places is not
    index = np.clip(M - n, 0, M - 1)[:, None]
    threshold = np.take_along_axis(ranked, index, -1)[:, 0]
    below = np.take_along_axis(ranked, np.maximum(index - 1, 0), -1)[:, 0]
    keep = rows >= threshold[:, None]
    keep[n == 0] = False
    tied = np.flatnonzero((below == threshold) & (n < M) & (n > 0))
    if len(tied):
        at_threshold = rows[tied] == threshold[tied, None]
        above = rows[tied] > threshold[tied, None]
        room = (n[tied] - above.sum(-1))[:, None]
        keep[tied] = above | (at_threshold & (at_threshold.cumsum(-1) <= room))
    return pack_bits(torch.from_numpy(keep).view(keys.shape))
