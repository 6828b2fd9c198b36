"""The choice of tiles from given scores: how many each row wants, and which are the best.

Shape letters: B batch, H query heads, N query tiles, M KV tiles, W words of a bitmask row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.compile_passes.templates.choice import choose, load_value, to_key
from flexsparse.compile_passes.templates.launch import SIZES, Compilation, launch
from flexsparse.ops.choice import normal_quantile, to_tensor
from flexsparse.tile_bits import WORD, pack_bits, unpack_bits, words_of

RULES = ("top_k", "normal", "probability", "mass", "all")
MAX_TILES = 16384  # a row of keys is held in the registers of one program


@triton.jit(do_not_specialize=SIZES)
def select_scores_kernel(
    scores,
    allowed,
    value,
    bits,
    counts,
    wanted,
    rows,
    heads,
    N,
    M,
    words,
    min_tiles,
    capacity,
    allowed_stride_b,
    allowed_stride_h,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    RULE: tl.constexpr,
    VALUE_IN_MEMORY: tl.constexpr,
    ALLOWED: tl.constexpr,
    M_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program chooses the tiles of ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    n = row % N
    h = row // N % heads
    b = row // N // heads
    column = tl.arange(0, M_BLOCK)
    inside = valid[:, None] & (column < M)[None, :]
    score = tl.load(scores + row[:, None] * M + column[None, :], mask=inside, other=0.0)
    if ALLOWED:
        word_row = b * allowed_stride_b + h * allowed_stride_h + n * words
        word = tl.load(allowed + word_row[:, None] + (column // 32)[None, :], mask=inside, other=0)
        inside = inside & (((word >> (column % 32)[None, :]) & 1) != 0)
    number = load_value(
        value, b, h, n, valid, value_stride_b, value_stride_h, value_stride_n, IN_MEMORY=VALUE_IN_MEMORY
    )
    key = to_key(score, inside)
    choose(key, number, row, valid, bits, counts, wanted, M, words, min_tiles, capacity, RULE=RULE)


def choice_config(M: int) -> tuple[int, int, int]:
    """M padded to a power of two, rows that a program chooses for at once, and its warps: 32 keys a thread."""
    if M > MAX_TILES:
        raise ValueError(f"there are {M} KV tiles: at most {MAX_TILES} are supported; use larger tiles")
    M_BLOCK = max(2 * WORD, triton.next_power_of_2(M))
    warps = 4 if M_BLOCK <= 4096 else 8
    return M_BLOCK, min(8, max(1, warps * 1024 // M_BLOCK)), warps


def rule_value(rule: str, value: float | int | Tensor) -> float | int | Tensor:
    """What the kernel takes for a rule's ``value``: a number, or a tensor that it reads on the device.

    A 0-d CPU tensor becomes a number. For the statistical rules it is ``Phi^-1(1 - density)``, or -inf from density 1
    on, which keeps all.
    """
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}: give one of {RULES}")
    if rule == "all":
        return 0
    if rule in ("normal", "probability"):
        density = to_tensor(value)
        value = normal_quantile(1 - density.clamp_max(1 - 1e-12)).masked_fill(density >= 1, -math.inf)
    if isinstance(value, Tensor):
        if value.dim() or value.device.type != "cpu":
            return value
        value = value.item()
    return int(value) if rule == "top_k" else float(value)


def value_arguments(value: float | int | Tensor, shape: tuple[int, ...]) -> tuple[float | int | Tensor, list[int]]:
    """The argument, and its strides over (B, H, N): a tensor broadcasts to ``[B, H, N, 1]``."""
    return value, list(value.expand(*shape, 1).stride()[:3]) if isinstance(value, Tensor) else [0, 0, 0]


def allowed_strides(allowed: Tensor | None) -> list[int]:
    """Strides over (B, H) of a bitmask ``[1 or B, 1 or H, N, W]``, contiguous but for broadcasting."""
    return [0, 0] if allowed is None else [allowed.stride(i) if allowed.shape[i] > 1 else 0 for i in (0, 1)]


def select_scores(
    scores: Tensor,
    *,
    allowed: Tensor | None,
    rule: str,
    value: float | int | Tensor,
    min_tiles: int,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose tiles from given scores, in one launch.

    Args:
        scores: float32 ``[B, H, N, M]``.
        allowed: int32 bitmask ``[1 or B, 1 or H, N, W]`` of the tiles that may be chosen, or None for all.
        rule: how many a row wants. ``"top_k"``: ``value``. ``"normal"``: those above mean + std * Phi^-1(1 - value) of
            the row's allowed scores; ``"probability"``: the same of their softmax. ``"mass"``: the smallest set whose
            softmax reaches ``value``. ``"all"``: all that are allowed.
        value: a number, a 0-d tensor, or a tensor that broadcasts to ``[B, H, N, 1]``.
        min_tiles: a row wants at least that many.
        capacity: a row keeps at most that many.

    Returns:
        bits int32 ``[B, H, N, W]``, counts int32 ``[B, H, N]`` of what is kept, and wanted int32 ``[B, H, N]`` before
        the capacity, at most the allowed tiles. What is kept has the highest scores, ties to the lowest index, NaN highest.
    """
    B, H, N, M = scores.shape
    M_BLOCK, rows, warps = choice_config(M)
    words = words_of(M)
    bits = torch.empty((B, H, N, words), dtype=torch.int32, device=scores.device)
    counts, wanted = (torch.empty((B, H, N), dtype=torch.int32, device=scores.device) for _ in range(2))
    allowed = None if allowed is None else allowed.contiguous()
    number, strides = value_arguments(rule_value(rule, value), (B, H, N))
    launch(
        select_scores_kernel,
        (triton.cdiv(B * H * N, rows),),
        scores.contiguous(),
        bits if allowed is None else allowed,
        number,
        bits,
        counts,
        wanted,
        B * H * N,
        H,
        N,
        M,
        words,
        min_tiles,
        capacity,
        *allowed_strides(allowed),
        *strides,
        RULE=rule,
        VALUE_IN_MEMORY=isinstance(number, Tensor),
        ALLOWED=allowed is not None,
        M_BLOCK=M_BLOCK,
        ROWS=rows,
        num_warps=warps,
    )
    return bits, counts, wanted


def select_scores_reference(
    scores: Tensor,
    *,
    allowed: Tensor | None,
    rule: str,
    value: float | int | Tensor,
    min_tiles: int,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`select_scores` in plain torch, by stable sorts."""
    M = scores.shape[-1]
    mask = torch.ones_like(scores, dtype=torch.bool)
    mask = mask if allowed is None else mask & unpack_bits(allowed, M)
    allowed_count = mask.sum(-1, keepdim=True)
    value = rule_value(rule, value)
    if rule == "all":
        wanted = allowed_count
    elif rule == "top_k":
        wanted = torch.as_tensor(value, device=scores.device).expand_as(allowed_count)
    else:
        value = torch.as_tensor(value, device=scores.device).to(scores.dtype)
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
        if rule == "mass":
            ranked = weights.sort(dim=-1, descending=True).values
            wanted = (((ranked.cumsum(-1) - ranked) < value) | (value >= 1)).sum(-1, keepdim=True)
        else:
            values = scores if rule == "normal" else weights
            total = allowed_count.clamp_min(1)
            mean = values.masked_fill(~mask, 0).sum(-1, keepdim=True) / total
            variance = (values - mean).square().masked_fill(~mask, 0).sum(-1, keepdim=True) / total
            above = (values > mean + variance.sqrt() * value) | (value == -math.inf)
            wanted = (above & mask).sum(-1, keepdim=True)
    wanted = torch.minimum(wanted.clamp_min(min_tiles), allowed_count)
    kept = wanted.clamp_max(capacity)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    # allowed tiles first, in the same order: one at -inf still comes before what is not allowed
    order = order.gather(-1, (~mask.gather(-1, order)).int().argsort(dim=-1, stable=True))
    first = (torch.arange(M, device=scores.device) < kept).expand(scores.shape)
    keep = torch.zeros_like(mask).scatter(-1, order, first)
    return pack_bits(keep), kept[..., 0].to(torch.int32), wanted[..., 0].to(torch.int32)


def compilations(long_tail: bool) -> list[Compilation]:
    """Configurations of `select_scores_kernel` to compile offline."""
    cases = [("top_k", 1024), ("top_k", 2048), ("mass", 1024)]
    auto = len(cases)
    if long_tail:
        cases += [("top_k", 256), ("normal", 1024)]
        auto = len(cases)
        cases += [(rule, M) for rule in RULES for M in (32, 2048, 4096, MAX_TILES) if (rule, M) not in cases]
    return [_compilation(rule, M, auto=i < auto) for i, (rule, M) in enumerate(cases)]


def _compilation(rule: str, M: int, auto: bool) -> Compilation:
    M_BLOCK, rows, warps = choice_config(M)
    constants: dict[str, Any] = {
        "RULE": rule,
        "VALUE_IN_MEMORY": False,
        "ALLOWED": True,
        "M_BLOCK": M_BLOCK,
        "ROWS": rows,
    }
    pointers = dict.fromkeys(("allowed", "bits", "counts", "wanted"), "*i32")
    types = {"scores": "*fp32", "value": "i32" if rule in ("top_k", "all") else "fp32", **pointers}
    names = select_scores_kernel.arg_names
    return Compilation(
        kernel=select_scores_kernel,
        config={"rule": rule, "M": M},
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constants=constants,
        aligned=("scores", *pointers),
        num_warps=warps,
        num_stages=1,
        auto=auto,
    )
