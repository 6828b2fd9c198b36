"""Attention problems for the template tests, and attention in float64 as its definition reads.

Shape letters: B batch, H query heads, G KV heads, N query tiles, M KV video tiles, U all KV tiles, R query rows,
T all KV slots, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flexsparse.tile_bits import pack_bits


@dataclass(frozen=True, kw_only=True)
class Case:
    """What distinguishes one attention problem from another; extra parts are counted in tiles.

    A ``popular`` problem has a KV tile that (almost) every query tile keeps, and one that none keeps.
    """

    B: int = 1
    H: int = 1
    G: int = 1
    N: int = 3
    M: int = 4
    D: int = 32
    query_rows: int = 16
    slots: int = 16
    first: int = 0
    last: int = 0
    kv_first: int = 0
    kv_last: int = 0
    density: float = 0.5
    partial: bool = False
    gated: bool = False
    popular: bool = False
    dtype: torch.dtype = torch.float32
    magnitude: float = 1.0

    @property
    def name(self) -> str:
        """What differs from the defaults."""
        default = Case()
        differing = [
            f"{n}={getattr(self, n)}" for n in self.__dataclass_fields__ if getattr(self, n) != getattr(default, n)
        ]
        return ",".join(differing).replace("torch.", "") or "plain"


@dataclass
class Problem:
    """Arguments of the templates, and what the oracle needs besides."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    bits: Tensor
    counts: Tensor
    kv_counts: Tensor
    coarse: Tensor | None
    gate: Tensor | None
    keep: Tensor  # bool [B, H, N, M]
    grad_out: Tensor
    grad_lse: Tensor

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The positional arguments of `forward`."""
        return self.q, self.k, self.v, self.bits, self.counts, self.kv_counts, self.coarse, self.gate

    @property
    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of `forward` and `backward`."""
        case = self.case
        return {
            "query_rows": case.query_rows,
            "first_rows": case.first * case.query_rows,
            "kv_first": case.kv_first,
            "kv_video": case.M,
            "slots": case.slots,
            "capacity": int(self.counts.max()),
            "scale": 1 / math.sqrt(case.D),
            "partial": case.partial,
        }


def build(case: Case) -> Problem:
    """A random problem; slots past a tile's count hold NaN."""
    B, H, N, M, D = case.B, case.H, case.N, case.M, case.D
    U, R = case.kv_first + M + case.kv_last, (case.first + N + case.last) * case.query_rows
    keep = torch.rand(B, H, N, M) < case.density
    if case.popular:
        keep[..., 1], keep[..., 2] = True, False
    if case.density < 1 and N > 1:
        keep[:, :, N // 2] = False  # a row that keeps nothing
    kv_counts = torch.full((B, U), case.slots, dtype=torch.int32)
    if case.partial:
        kv_counts = torch.randint(0, case.slots + 1, (B, U), dtype=torch.int32)
        kv_counts[:, case.kv_first] = 0
        kv_counts[:, -1] = torch.arange(1, B + 1)
    q, k, v, grad_out = (
        (torch.randn(shape) * case.magnitude).to(case.dtype)
        for shape in ((B, H, R, D), (B, case.G, U * case.slots, D), (B, case.G, U * case.slots, D), (B, H, R, D))
    )
    past = (torch.arange(case.slots) >= kv_counts[..., None]).flatten(1)[:, None, :, None]
    k, v = k.masked_fill(past, math.nan), v.masked_fill(past, math.nan)
    coarse = torch.randn(B, H, N, D) * case.magnitude if case.gated else None
    gate = torch.randn(B, H, R, D).to(case.dtype) if case.gated else None
    counts = keep.sum(-1, dtype=torch.int32)
    grad_lse = torch.randn(B, H, R) * case.magnitude
    return Problem(case, q, k, v, pack_bits(keep), counts, kv_counts, coarse, gate, keep, grad_out, grad_lse)


MEMORY = ("heads inside", "one of a fused three", "odd rows", "tokens first")


def in_memory(x: Tensor, how: str) -> Tensor:
    """``x [B, heads, rows, D]`` in other memory, whose other values are NaN.

    Args:
        x: any tensor of that shape.
        how: one of `MEMORY`: ``[B, rows, heads, D]`` as a linear map leaves it; that with two other tensors in each row and
            another row before and after; rows one value longer than D; ``[rows, B, heads, D]``.
    """
    B, heads, rows, D = x.shape
    if how == "heads inside":
        found = x.new_empty(B, rows, heads, D).transpose(1, 2)
    elif how == "one of a fused three":
        found = x.new_full((B, rows + 2, 3, heads, D), math.nan)[:, 1:-1, 1].transpose(1, 2)
    elif how == "odd rows":
        found = x.new_full((B, heads, rows, D + 1), math.nan)[..., :D]
    else:
        found = x.new_empty(rows, B, heads, D).permute(1, 2, 0, 3)
    return found.copy_(x)


def moved(problem: Problem, how: str) -> Problem:
    """The problem with all arrays of rows in other memory."""
    names = ("q", "k", "v", "gate", "grad_out")
    arrays = {name: getattr(problem, name) for name in names if getattr(problem, name) is not None}
    return replace(problem, **{name: in_memory(x, how) for name, x in arrays.items()})


def mask(problem: Problem) -> Tensor:
    """Bool ``[B, H, R, T]``, tile after tile."""
    case = problem.case
    B, H, R, _ = problem.q.shape
    U = problem.kv_counts.shape[1]
    found = torch.zeros(B, H, R, U * case.slots, dtype=torch.bool)
    for n in range(R // case.query_rows):
        for m in range(U):
            video = case.first <= n < case.first + case.N and case.kv_first <= m < case.kv_first + case.M
            kept = (
                problem.keep[:, :, n - case.first, m - case.kv_first] if video else torch.ones(B, H, dtype=torch.bool)
            )
            for b in range(B):
                columns = slice(m * case.slots, m * case.slots + int(problem.kv_counts[b, m]))
                found[b, :, n * case.query_rows : (n + 1) * case.query_rows, columns] = kept[b, :, None, None]
    return found


@dataclass
class Answer:
    """Results and gradients by name: out, lse, dq, dk, dv, and where gated dcoarse and dgate."""

    values: dict[str, Tensor]
    largest_logit: float


def oracle(problem: Problem, with_lse_gradient: bool = False) -> Answer:
    """Float64, gradients by autograd."""
    case, seen = problem.case, mask(problem)
    inputs = {"q": problem.q, "k": problem.k, "v": problem.v, "coarse": problem.coarse, "gate": problem.gate}
    used = {name: x.nan_to_num(0).double().requires_grad_() for name, x in inputs.items() if x is not None}
    k, v = (used[name].repeat_interleave(case.H // case.G, 1) for name in ("k", "v"))
    logits = torch.einsum("bhrd,bhtd->bhrt", used["q"], k) / math.sqrt(case.D)
    logits = logits.masked_fill(~seen, -math.inf)
    some = seen.any(-1)
    top = logits.detach().amax(-1).masked_fill(~some, 0)
    weights = (logits - top[..., None]).exp()
    total = weights.sum(-1).masked_fill(~some, 1)
    lse = (total.log() + top).masked_fill(~some, -math.inf)
    out = torch.einsum("bhrt,bhtd->bhrd", weights / total[..., None], v)
    if case.gated:
        rows = slice(case.first * case.query_rows, (case.first + case.N) * case.query_rows)
        spread = used["coarse"].repeat_interleave(case.query_rows, 2)
        added = torch.zeros_like(out)
        added[:, :, rows] = used["gate"][:, :, rows] * spread
        out = out + added
    loss = (out * problem.grad_out.double()).sum()
    if with_lse_gradient:
        loss = loss + (lse.masked_fill(~some, 0) * problem.grad_lse.double()).sum()
    gradients = torch.autograd.grad(loss, list(used.values()))
    values = {"out": out.detach(), "lse": lse.detach()}
    values |= {f"d{name}": gradient for name, gradient in zip(used, gradients)}
    return Answer(values, float(logits.detach()[seen].abs().max()) if bool(seen.any()) else 0.0)
