"""Coarse stages in every spelling, and the demand that `FuseSelection` makes them one op, or leaves them alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import einops
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import flexsparse as fs
from flexsparse.compile_passes import FuseSelection
from flexsparse.masks import keep_top
from flexsparse.ops.choice import Rule, masked_softmax
from flexsparse.ops.select_tiles import select_tiles

from .capture import nodes_of, ops, trace

B, H, N, M, S, D, K = 2, 4, 5, 7, 16, 8, 3  # no two sizes that matter are equal
SCALE = D**-0.5
aten = torch.ops.aten
CHAIN = (
    *(
        aten.topk,
        aten.sort,
        aten.argsort,
        aten.scatter,
        aten.scatter_,
        aten.zeros_like,
        aten.arange,
        aten.mul,
        aten.div,
    ),
    *(aten.matmul, aten.bmm, aten.einsum, aten.softmax, aten._softmax, aten.mean, aten.sum, aten.masked_fill, aten.add),
)
Step = Callable[..., Any]
Chosen = tuple[Tensor, Tensor]

# pooling: (tiles [B, H, n, S, D], counts [n]) -> [B, H, n, D]


POOLS: dict[str, Step] = {
    "mean": lambda x, _: x.mean(3),
    "mean of a negative dimension": lambda x, _: x.mean(-2),
    "mean in float32": lambda x, _: x.mean(3, dtype=torch.float32),
    "reshape and mean": lambda x, _: x.flatten(2, 3).reshape(x.shape[0], x.shape[1], -1, S, D).mean(3),
    "unflatten and mean of floats": lambda x, _: x.flatten(2, 3).unflatten(2, (-1, S)).float().mean(-2),
    "einops": lambda x, _: einops.reduce(x.flatten(2, 3), "b h (n s) d -> b h n d", "mean", s=S),
    "mean that keeps its dimension": lambda x, _: x.mean(3, keepdim=True).squeeze(3),
    "slots before tiles": lambda x, _: x.transpose(2, 3).mean(2),
    "mean by token and back, copied": lambda x, _: (
        x.mean(3)
        .transpose(1, 2)
        .contiguous()
        .view(x.shape[0], -1, x.shape[1] * D)
        .unflatten(2, (-1, D))
        .transpose(1, 2)
    ),
    "sum over counts": lambda x, counts: x.sum(3) / counts.clamp_min(1)[:, None],
    "sum over float counts": lambda x, counts: (
        x.sum(3, dtype=torch.float32) / counts.clamp(min=1).float().view(1, 1, -1, 1)
    ),
    "float sum over kept dimension": lambda x, counts: (
        x.float().sum(3, keepdim=True) / counts.clamp_min(1)[:, None, None]
    ).squeeze(3),
    "sum over slots": lambda x, _: x.sum(3) / S,
    "float sum times a number": lambda x, _: x.float().sum(-2) * (1 / x.shape[3]),
    "the library's": lambda x, counts: fs.masks.coarse.pool(x, counts),
}

# scores: (q_c [B, H, N, D], k_c [B, H, M, D]) -> [B, H, N, M]
SCORES: dict[str, Step] = {
    "@ transpose, scaled": lambda q, k: (q @ k.transpose(-1, -2)) * SCALE,
    "@ mT, scaled from the left": lambda q, k: SCALE * (q @ k.mT),
    "@ mT, copied": lambda q, k: (q @ k.mT.contiguous()) * SCALE,
    "torch.matmul, permuted": lambda q, k: torch.matmul(q, k.permute(0, 1, 3, 2)).mul(SCALE),
    "queries scaled before": lambda q, k: (q * SCALE) @ k.transpose(2, 3),
    "keys scaled before": lambda q, k: q @ (k * SCALE).transpose(2, 3),
    "both scaled before": lambda q, k: (q * SCALE**0.5) @ (k * SCALE**0.5).mT,
    "divided by sqrt(D)": lambda q, k: q @ k.mT / math.sqrt(D),
    "not scaled": lambda q, k: q @ k.mT,
    "einsum": lambda q, k: torch.einsum("bhid,bhjd->bhij", q, k) * SCALE,
    "einsum of other letters, scaled before": lambda q, k: torch.einsum("b h n d, b h m d -> b h n m", q * SCALE, k),
    "einsum with an ellipsis": lambda q, k: torch.einsum("...id,...jd->...ij", q, k) * SCALE,
    "the library's": lambda q, k: fs.masks.coarse.tile_scores(q, k, SCALE),
}


def scattered(scores: Tensor, indices: Tensor) -> Chosen:
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, indices, True)
    return torch.ops.flexsparse.pack_tiles(keep)


def scattered_in_place(scores: Tensor, _: Tensor) -> Chosen:
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    keep.scatter_(-1, scores.topk(K, dim=-1).indices, True)
    return torch.ops.flexsparse.pack_tiles(keep)


def scattered_ones(scores: Tensor, _: Tensor) -> Chosen:
    keep = torch.zeros_like(scores).scatter(3, scores.topk(K).indices, 1.0).bool()
    return torch.ops.flexsparse.pack_tiles(keep)


def listed(scores: Tensor, _: Tensor) -> Chosen:
    lists = scores.topk(K, dim=-1).indices
    counts = torch.full(scores.shape[:-1], K, dtype=torch.int32)
    return torch.ops.flexsparse.pack_lists(lists.to(torch.int32), counts, scores.shape[-1])


def listed_like(scores: Tensor, _: Tensor) -> Chosen:
    lists = scores.argsort(-1, descending=True)[..., :K]
    return torch.ops.flexsparse.pack_lists(lists, torch.full_like(lists[..., 0], K), scores.shape[-1])


def by_rule(name: str, value: float) -> Step:
    def choose(scores: Tensor, _: Tensor) -> Chosen:
        return select_tiles(scores.detach(), None, Rule(name=name, value=value), scores.shape[-1])[:2]

    return choose


# choice: (scores, K as a 0-d tensor) -> bits, counts
CHOICES: dict[str, Step] = {
    "topk, scattered": lambda s, _: scattered(s, s.topk(K, dim=-1).indices),
    "topk of detached scores": lambda s, _: scattered(s, torch.topk(s.detach(), k=K).indices),
    "topk, not sorted": lambda s, _: scattered(s, s.topk(K, sorted=False)[1]),
    "topk of the softmax": lambda s, _: scattered(s, s.softmax(-1).topk(K, dim=-1).indices),
    "topk, scattered in place": scattered_in_place,
    "topk, scattered as numbers": scattered_ones,
    "head of argsort": lambda s, _: scattered(s, s.argsort(dim=-1, descending=True)[..., :K]),
    "head of a stable sort": lambda s, _: scattered(
        s, s.sort(stable=True, dim=-1, descending=True).indices.narrow(3, 0, K)
    ),
    "lists": listed,
    "lists and counts like them": listed_like,
    "keep_top of a number": lambda s, _: torch.ops.flexsparse.pack_tiles(keep_top(s, K)),
    "keep_top of a tensor": lambda s, n: torch.ops.flexsparse.pack_tiles(keep_top(s, n)),
    "the library's top_k": by_rule("top_k", K),
    "the library's mass": by_rule("mass", 0.6),
    "the library's threshold": by_rule("normal", 0.4),
}

# coarse output: (scores, v_c [B, H, M, D]) -> [B, H, N, D]
COARSE: dict[str, Step] = {
    "softmax @": lambda s, v: s.softmax(-1) @ v,
    "einsum": lambda s, v: torch.einsum("bhij,bhjd->bhid", F.softmax(s, dim=-1), v),
    "einsum with an ellipsis": lambda s, v: torch.einsum("...nm,...md->...nd", s.softmax(-1), v),
    "softmax in float32": lambda s, v: torch.matmul(F.softmax(s, dim=3, dtype=torch.float32), v.float()),
    "the library's": lambda s, v: masked_softmax(s, None) @ v,
}


@dataclass(frozen=True)
class Stage:
    """A coarse stage, spelled; called with q, k, v in tiles, their counts and the number of tiles to keep."""

    pool: Step = POOLS["mean"]
    scores: Step = SCORES["@ transpose, scaled"]
    choose: Step = CHOICES["topk, scattered"]
    coarse: Step | None = COARSE["softmax @"]
    expand: Step = lambda x: x  # KV heads to query heads, after pooling
    expand_tokens: Step = lambda x: x  # or before it
    q_in: Step = lambda x: x

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, q_counts: Tensor, kv_counts: Tensor, n: Tensor) -> Any:
        q_c = self.pool(self.q_in(q), q_counts)
        k_c, v_c = (self.expand(self.pool(self.expand_tokens(x), kv_counts)) for x in (k, v))
        scores = self.scores(q_c, k_c)
        bits, counts = self.choose(scores, n)
        return (bits, counts) if self.coarse is None else (bits, counts, self.coarse(scores, v_c))


def inputs(n: int = N, m: int = M, heads: int = H, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Tiles with zeros past their counts; gaps between scores are far wider than bfloat16's rounding."""
    generator = torch.Generator().manual_seed(n * m)
    q_counts, kv_counts = (torch.randint(1, S + 1, (tiles,), generator=generator).int() for tiles in (n, m))

    def tiles(h: int, counts: Tensor) -> Tensor:
        x = torch.randn(B, h, len(counts), S, D, generator=generator) + torch.randn(
            B, h, len(counts), 1, D, generator=generator
        )
        return x.masked_fill((torch.arange(S) >= counts[:, None])[..., None], 0).to(dtype)

    q, k, v = tiles(H, q_counts), tiles(heads, kv_counts), tiles(heads, kv_counts)
    return [q, k, v, q_counts, kv_counts, torch.tensor(K)]


def results(function: Step, given_: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Integer outputs; the coarse output and its gradients."""
    leaves = [x.clone().requires_grad_() for x in given_[:3]]
    bits, counts, *coarse = function(*leaves, *given_[3:])
    if not coarse:
        return [bits, counts], []
    weights = torch.randn(coarse[0].shape, generator=torch.Generator().manual_seed(1)).to(coarse[0].dtype)
    return [bits, counts], [coarse[0].detach(), *torch.autograd.grad(coarse[0], leaves, weights)]


def check_fused(
    function: Step, *, symbolic: bool = False, heads: int = H, dtype: torch.dtype = torch.float32, rtol: float = 1e-4
) -> None:
    """It becomes one op that computes the same, at the sizes of the trace and, where they are symbols, at others."""
    gm = trace(function, *inputs(heads=heads, dtype=dtype), symbolic=(2, 2, 2, 0, 0, None) if symbolic else None)
    fusion = FuseSelection()
    fusion(gm)
    assert (fusion.matches, fusion.fused, fusion.refused) == (1, {"call"}, {})
    assert len(nodes_of(gm, ops.coarse_select)) == 1
    assert nodes_of(gm, *CHAIN) == []
    for n, m in ((N, M), (9, 11)) if symbolic else ((N, M),):
        given_ = inputs(n, m, heads, dtype)
        (integers, floats), (my_integers, my_floats) = results(function, given_), results(gm, given_)
        assert all(torch.equal(mine, other) for mine, other in zip(my_integers, integers, strict=True))
        for mine, other in zip(my_floats, floats, strict=True):
            torch.testing.assert_close(mine, other, atol=rtol / 10, rtol=rtol)


def check_left(function: Step, *given_: Tensor, reason: str, symbolic: Any = None) -> None:
    """Not a node of it changes, and the call is told why."""
    gm = trace(function, *(given_ or inputs()), symbolic=symbolic)
    before = gm.code
    fusion = FuseSelection()
    fusion(gm)
    assert (fusion.matches, fusion.fused) == (0, set())
    gm.recompile()
    assert gm.code == before
    assert reason in fusion.refused["call"], fusion.refused


shapes = pytest.mark.parametrize("symbolic", (False, True), ids=("static", "symbolic"))


def named(spellings: dict[str, Step]) -> Any:
    return pytest.mark.parametrize("spelling", spellings.values(), ids=spellings)
