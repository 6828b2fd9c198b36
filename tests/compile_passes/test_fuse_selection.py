"""`FuseSelection`: whatever way a coarse stage is spelled it becomes one op, and what is none stays as it was."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import einops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import flexsparse as fs
from flexsparse import TileSelection
from flexsparse.compile_passes import FuseSelection
from flexsparse.masks.base import keep_top
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
    "sum over counts": lambda x, counts: x.sum(3) / counts.clamp_min(1)[:, None],
    "sum over float counts": lambda x, counts: (
        x.sum(3, dtype=torch.float32) / counts.clamp(min=1).float().view(1, 1, -1, 1)
    ),
    "float sum over kept dimension": lambda x, counts: (
        x.float().sum(3, keepdim=True) / counts.clamp_min(1)[:, None, None]
    ).squeeze(3),
    "sum over slots": lambda x, _: x.sum(3) / S,
    "float sum times a number": lambda x, _: x.float().sum(-2) * (1 / x.shape[3]),
    "the library's": lambda x, counts: fs.masks.base.pool(x, counts),
}

# scores: (q_c [B, H, N, D], k_c [B, H, M, D]) -> [B, H, N, M]
SCORES: dict[str, Step] = {
    "@ transpose, scaled": lambda q, k: (q @ k.transpose(-1, -2)) * SCALE,
    "@ mT, scaled from the left": lambda q, k: SCALE * (q @ k.mT),
    "torch.matmul, permuted": lambda q, k: torch.matmul(q, k.permute(0, 1, 3, 2)).mul(SCALE),
    "queries scaled before": lambda q, k: (q * SCALE) @ k.transpose(2, 3),
    "keys scaled before": lambda q, k: q @ (k * SCALE).transpose(2, 3),
    "both scaled before": lambda q, k: (q * SCALE**0.5) @ (k * SCALE**0.5).mT,
    "divided by sqrt(D)": lambda q, k: q @ k.mT / math.sqrt(D),
    "not scaled": lambda q, k: q @ k.mT,
    "einsum": lambda q, k: torch.einsum("bhid,bhjd->bhij", q, k) * SCALE,
    "einsum of other letters, scaled before": lambda q, k: torch.einsum("b h n d, b h m d -> b h n m", q * SCALE, k),
    "einsum with an ellipsis": lambda q, k: torch.einsum("...id,...jd->...ij", q, k) * SCALE,
    "the library's": lambda q, k: fs.masks.base.tile_scores(q, k, SCALE),
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


@shapes
@named(POOLS)
def test_every_spelling_of_pooling_fuses(spelling: Step, symbolic: bool) -> None:
    check_fused(Stage(pool=spelling), symbolic=symbolic)


@shapes
@named(SCORES)
def test_every_spelling_of_scores_fuses(spelling: Step, symbolic: bool) -> None:
    check_fused(Stage(scores=spelling), symbolic=symbolic)


@shapes
@named(CHOICES)
def test_every_spelling_of_the_choice_fuses(spelling: Step, symbolic: bool) -> None:
    check_fused(Stage(choose=spelling), symbolic=symbolic)


@shapes
@named({**COARSE, "none": None})  # type: ignore[dict-item]
def test_every_spelling_of_the_coarse_output_fuses(spelling: Step | None, symbolic: bool) -> None:
    check_fused(Stage(coarse=spelling), symbolic=symbolic)


@given(*(st.sampled_from(list(s)) for s in (POOLS, SCORES, CHOICES, [*COARSE, "none"])), st.booleans())
@settings(max_examples=30)
def test_spellings_fuse_in_any_combination(pool: str, scores: str, choice: str, coarse: str, symbolic: bool) -> None:
    stage = Stage(pool=POOLS[pool], scores=SCORES[scores], choose=CHOICES[choice], coarse=COARSE.get(coarse))
    check_fused(stage, symbolic=symbolic)


def by_expansion(x: Tensor) -> Tensor:
    """``[B, G, ...]`` to ``[B, H, ...]``."""
    b, g, *rest = x.shape
    return x.unsqueeze(2).expand(b, g, H // g, *rest).reshape(b, H, *rest)


GROUPED = {
    "repeat_interleave": {"expand": lambda x: x.repeat_interleave(H // x.shape[1], 1)},
    "repeat_interleave of tokens": {"expand_tokens": lambda x: x.repeat_interleave(H // x.shape[1], dim=1)},
    "expansion": {"expand": by_expansion},
    "expansion of tokens": {"expand_tokens": by_expansion},
    "the library's": {"expand": lambda x: fs.masks.base.expand_heads(x, H)},
}


@shapes
@pytest.mark.parametrize("heads", (1, 2))
@pytest.mark.parametrize("how", GROUPED)
def test_grouped_queries_fuse(how: str, heads: int, symbolic: bool) -> None:
    check_fused(Stage(**GROUPED[how]), symbolic=symbolic, heads=heads)  # type: ignore[arg-type]


@shapes
@pytest.mark.parametrize(
    "pool", ("mean in float32", "unflatten and mean of floats", "float sum over kept dimension", "the library's")
)
def test_bfloat16_tokens_pooled_in_float32_fuse(pool: str, symbolic: bool) -> None:
    # gradients are rounded to bfloat16, once here and there
    check_fused(Stage(pool=POOLS[pool]), symbolic=symbolic, dtype=torch.bfloat16, rtol=1.6e-2)


def test_a_strided_subset_of_the_slots_pools_just_that() -> None:
    check_fused(Stage(q_in=lambda x: x[..., ::2, :]))


@pytest.mark.parametrize("dim", (1, 2, 3, 4))
def test_the_pooled_dimension_may_be_any(dim: int) -> None:
    def with_slots_at(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Any:
        q_c, k_c, v_c = (x.movedim(3, dim).contiguous().mean(dim) for x in (q, k, v))
        scores = q_c @ k_c.mT * SCALE
        return *scattered(scores, scores.topk(K).indices), scores.softmax(-1) @ v_c

    check_fused(with_slots_at)


def test_two_calls_in_one_graph_fuse_each_for_itself() -> None:
    def two(*given_: Tensor) -> Any:
        first, second = Stage(), Stage(choose=CHOICES["the library's mass"])
        return *first(*given_), *second(*given_)

    gm = trace(two, *inputs())
    fusion = FuseSelection()
    fusion(gm)
    assert (fusion.matches, len(nodes_of(gm, ops.coarse_select)), nodes_of(gm, *CHAIN)) == (2, 2, [])
    for mine, other in zip(gm(*inputs()), two(*inputs()), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def test_vectors_that_are_computed_before_they_are_pooled_are_not_stored_as_tokens() -> None:
    """The op reads what is in memory anyway: of a mean of something computed it takes the mean."""
    check = Stage(q_in=lambda x: x * 2 + 1)
    gm = trace(check, *inputs())
    fusion = FuseSelection()
    fusion(gm)
    (node,) = nodes_of(gm, ops.coarse_select)
    q = node.args[0]
    assert fusion.matches == 1 and q.target is aten.unsqueeze.default  # type: ignore[union-attr]
    (integers, floats), (my_integers, my_floats) = results(check, inputs()), results(gm, inputs())
    assert all(torch.equal(mine, other) for mine, other in zip(my_integers, integers))
    torch.testing.assert_close(my_floats, floats, atol=1e-5, rtol=1e-4)


# what must stay as it is


def stage(
    change: Step | None = None, q_c: Step = lambda x: x, k_c: Step = lambda x: x, v_c: Step = lambda x: x
) -> Step:
    """The plainest coarse stage, its pooled vectors changed; ``change`` takes scores and pooled vectors."""

    def run(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Any:
        pooled = q_c(q.mean(3)), k_c(k.mean(3)), v_c(v.mean(3))
        scores = pooled[0] @ pooled[1].mT * SCALE
        if change is not None:
            return change(scores, *pooled)
        return *scattered(scores, scores.topk(K).indices), scores.softmax(-1) @ pooled[2]

    return run


def usual(s: Tensor) -> Chosen:
    return scattered(s, s.topk(K).indices)


READ_ELSEWHERE: dict[str, Step] = {
    "scores returned": stage(lambda s, q, k, v: (*usual(s), s)),
    "scores summed up": stage(lambda s, q, k, v: (*usual(s), s.sum())),
    "pooled queries returned": stage(lambda s, q, k, v: (*usual(s), q)),
    "pooled keys read": stage(lambda s, q, k, v: (*usual(s), k.norm())),
    "pooled values read": stage(lambda s, q, k, v: (*usual(s), s.softmax(-1) @ v, v.norm())),
    "the list returned": stage(lambda s, q, k, v: (*scattered(s, i := s.topk(K).indices), i)),
}


@pytest.mark.parametrize("name", READ_ELSEWHERE)
def test_an_intermediate_that_is_read_elsewhere_is_kept(name: str) -> None:
    check_left(READ_ELSEWHERE[name], reason="read elsewhere")


NO_SCORES: dict[str, Step] = {
    "max pooling": Stage(pool=lambda x, _: x.amax(3)),
    "pooling over slots and features": Stage(
        pool=lambda x, _: x.mean((3, 4), keepdim=True).squeeze(3).expand(-1, -1, -1, D)
    ),
    "root mean square": Stage(pool=lambda x, _: x.square().mean(3).sqrt()),
    "tiles turned around": stage(k_c=lambda k: k.flip(2)),
    "heads and tiles mixed up": stage(k_c=lambda k: k.permute(0, 2, 1, 3).reshape(B, H, M, D)),
    "features mixed up": stage(k_c=lambda k: k.transpose(2, 3).reshape(B, H, M, D)),
    "another head's keys": stage(k_c=lambda k: k.roll(1, 1)),
    "heads repeated in turn": Stage(expand=lambda x: x[:, :2].repeat(1, 2, 1, 1)),
    "heads expanded in turn": Stage(
        expand=lambda x: x[:, :2].unsqueeze(1).expand(B, 2, 2, M, D).reshape(B, H, M, D), coarse=None
    ),
    "a negative scale": stage(lambda s, q, k, v: usual(s * -1)),
    "a scale that is a tensor": Stage(scores=lambda q, k: (q @ k.mT) * torch.tensor(2.0)),
    "a function of the scores": stage(lambda s, q, k, v: usual(s.tanh())),
    "a bias": stage(lambda s, q, k, v: usual(s + torch.arange(M))),
    "normalised queries": stage(q_c=lambda q: F.normalize(q, dim=-1)),
}


@pytest.mark.parametrize("name", NO_SCORES)
def test_what_is_no_product_of_means_is_left(name: str) -> None:
    check_left(NO_SCORES[name], reason="no product of mean-pooled queries and keys")


def ones_scattered(s: Tensor) -> Chosen:
    return torch.ops.flexsparse.pack_tiles(torch.ones_like(s, dtype=torch.bool).scatter(-1, s.topk(K).indices, False))


def holes_scattered(s: Tensor) -> Chosen:
    return torch.ops.flexsparse.pack_tiles(torch.zeros_like(s, dtype=torch.bool).scatter(-1, s.topk(K).indices, False))


OTHER_CHOICES: dict[str, tuple[Step, str]] = {
    "the lowest": (lambda s: scattered(s, s.topk(K, largest=False).indices), "keeps the lowest"),
    "the best of a column": (lambda s: scattered(s, s.topk(K, dim=2).indices), "sorts another dimension"),
    "an ascending sort": (lambda s: scattered(s, s.argsort(-1)[..., :K]), "not the best"),
    "the end of a sort": (lambda s: scattered(s, s.argsort(-1, descending=True)[..., -K:]), "middle part"),
    "the middle of a sort": (lambda s: scattered(s, s.argsort(-1, descending=True)[..., 1 : K + 1]), "middle part"),
    "every other of a sort": (lambda s: scattered(s, s.argsort(-1, descending=True)[..., :6:2]), "middle part"),
    "all but the best": (ones_scattered, "not empty"),
    "none": (holes_scattered, "something else than true"),
    "scattered along columns": (
        lambda s: torch.ops.flexsparse.pack_tiles(
            torch.zeros_like(s, dtype=torch.bool).scatter(2, s.topk(K).indices, True)
        ),
        "not the best",
    ),
    "a threshold": (lambda s: torch.ops.flexsparse.pack_tiles(s > 0), "not the best"),
    "counts from row to row": (
        lambda s: torch.ops.flexsparse.pack_tiles(keep_top(s, torch.arange(1, N + 1)[:, None])),
        "differ from row to row",
    ),
    "half of a list": (
        lambda s: torch.ops.flexsparse.pack_lists(s.topk(K).indices, torch.full((B, H, N), K - 1), M),
        "not used whole",
    ),
    "the best of other scores": (lambda s: scattered(s, (-s).topk(K).indices), "no product"),
}


@pytest.mark.parametrize("name", OTHER_CHOICES)
def test_what_keeps_other_tiles_than_the_best_is_left(name: str) -> None:
    choose, reason = OTHER_CHOICES[name]
    check_left(stage(lambda s, q, k, v: choose(s)), reason=reason)


OTHER_COARSE: dict[str, tuple[Step, str]] = {
    "a softmax of another scale": (lambda s, v: (s * 2).softmax(-1) @ v, "scaled otherwise"),
    "a softmax over columns": (lambda s, v: s.softmax(2) @ v, "another dimension"),
    "a softmax in another precision": (
        lambda s, v: s.softmax(-1, dtype=torch.float64) @ v.double(),
        "another precision",
    ),
    "a softmax of masked scores": (
        lambda s, v: s.masked_fill(torch.ones(N, M).triu(1) > 0, -1e9).softmax(-1) @ v,
        "not of the scores",
    ),
    "dropped weights": (lambda s, v: F.dropout(s.softmax(-1), 0.5) @ v, "read by something else"),
    "weights returned": (lambda s, v: s.softmax(-1), "read"),
    "scaled values": (lambda s, v: s.softmax(-1) @ (v * 2), "no mean over tiles"),
    "values turned around": (lambda s, v: s.softmax(-1) @ v.flip(2), "no mean over tiles"),
    "an ellipsis over rows": (
        lambda s, v: torch.einsum("bh...m,bhmd->bhd...", s.softmax(-1), v),
        "read by something else",
    ),
}


@pytest.mark.parametrize("name", OTHER_COARSE)
def test_another_coarse_output_is_left(name: str) -> None:
    coarse, reason = OTHER_COARSE[name]
    check_left(stage(lambda s, q, k, v: (*usual(s), coarse(s, v))), reason=reason)


def test_values_summed_up_are_left() -> None:
    """Sums in place of means scale the scores, which the op can take, but the coarse output too."""
    check_left(Stage(pool=lambda x, _: x.sum(3)), reason="no mean over tiles")
    check_fused(Stage(pool=lambda x, _: x.sum(3), coarse=None))


def test_keys_and_values_pooled_by_different_counts_are_left() -> None:
    def two_counts(q: Tensor, k: Tensor, v: Tensor, _: Tensor, kv_counts: Tensor, n: Tensor) -> Any:
        scores = q.mean(3) @ POOLS["sum over counts"](k, kv_counts).mT
        return *usual(scores), scores.softmax(-1) @ v.mean(3)

    check_left(two_counts, reason="different counts")


def test_counts_of_other_tiles_are_left() -> None:
    def turned(x: Tensor, counts: Tensor) -> Tensor:
        return x.sum(3) / counts.clamp_min(1).flip(0)[:, None]

    check_left(Stage(pool=turned), reason="no product")


def test_equal_sizes_do_not_pass_for_one_another() -> None:
    def swapped(q: Tensor, k: Tensor) -> Chosen:
        return usual(q.mean(3) @ k.mean(3).transpose(1, 2).mT)

    check_left(swapped, *(torch.randn(2, 4, 4, S, D) for _ in range(2)), reason="no product")


def test_sizes_that_are_equal_in_the_trace_only_do_not_pass_for_one_another() -> None:
    """With as many tiles as heads a view of heads as tiles leaves every element in its place, this one time."""

    def swapped(q: Tensor, k: Tensor) -> Chosen:
        heads = k.mean(3).reshape(k.shape[0], k.shape[2], k.shape[1], D)
        return usual(q.mean(3) @ (heads if heads.shape[1] == H else k.mean(3)).mT)

    given_ = [torch.randn(2, H, H, S, D) for _ in range(2)]
    gm = trace(swapped, *given_, symbolic=(2, 2))
    fusion = FuseSelection()
    fusion(gm)
    for mine, other in zip(gm(*given_), swapped(*given_)):
        assert torch.equal(mine, other)


def test_slots_without_a_known_number_are_left_as_they_were() -> None:
    check_left(stage(), *inputs(), reason="slots", symbolic=(3, 3, 3, None, None, None))


def test_the_identity_is_that_of_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    before, again = FuseSelection().uuid(), FuseSelection().uuid()
    source = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda module: source(module) + "# changed")
    assert before == again != FuseSelection().uuid()


# whole models

GRID, TILE = (4, 8, 8), (2, 4, 4)
LAYOUT = fs.TileLayout(grid=GRID, tile=TILE)


class Tiny(nn.Module):
    """One self-attention over the tokens of a grid."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj, self.checkpointed = nn.Linear(16, 48), nn.Linear(16, 16), checkpointed

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.attention, x, use_reentrant=False) if self.checkpointed else self.attention(x)


def compiled_and_reported(model: nn.Module, builder: Any, x: Tensor, **options: Any) -> tuple[Tensor, Any]:
    backend = fs.backend(builder, grid=GRID, tile=TILE, inner="aot_eager", **options)
    out = torch.compile(model, backend=backend, fullgraph=True)(x)
    (call,) = backend.report().calls
    return out, call


BUILDERS: dict[str, Any] = {
    "VSA top_k": fs.VSA(top_k=3),
    "VSA sparsity": fs.VSA(sparsity=0.6),
    "VSA scheduled": fs.VSA(sparsity=fs.SparsitySchedule(target=0.7, start=0.5)),
    "VSA with counts": fs.VSA(top_k=3, count_bias=True),
    "VSA within": fs.VSA(top_k=3, within=fs.FrameCausal(chunk=2)),
    "VSA within, with counts": fs.VSA(sparsity=0.5, count_bias=True, within=fs.FrameCausal(chunk=2)),
    "TopP": fs.TopP(mass=0.7),
    "TopP within": fs.TopP(mass=0.7, max_tiles=3, within=fs.FrameCausal(chunk=2)),
    "BSA normal": fs.BSA(kv_density=0.4),
    "BSA probability": fs.BSA(kv_density=0.4, threshold="probability"),
    "BSA mass": fs.BSA(mass=0.7, threshold="mass"),
    "BSA of all queries": fs.BSA(kv_density=0.4, score_queries="all", within=fs.FrameCausal(chunk=2)),
    "BSA without pruning": fs.BSA(kv_density=0.4, keep_queries=1),
}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", BUILDERS)
def test_built_in_builders_fuse_in_a_model(name: str) -> None:
    model, x = Tiny(), torch.randn(1, 256, 16)
    with torch.no_grad():
        out, call = compiled_and_reported(model, BUILDERS[name], x)
        assert call.sparse and call.fused, call
        plain, call = compiled_and_reported(model, BUILDERS[name], x, fuse_selection=False)
        assert not call.fused
    torch.testing.assert_close(out, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("fresh_dynamo")
def test_statistics_of_a_head_are_not_fused_and_said_so() -> None:
    with torch.no_grad():
        _, call = compiled_and_reported(Tiny(), fs.BSA(kv_density=0.4, statistics="head"), torch.randn(1, 256, 16))
    assert not call.fused and "not fused: its counts are computed from the scores of other rows" in call.reason


class Written:
    """A builder as a user writes it, from the documentation alone."""

    def __init__(self, pack: str, share: float = 1.0) -> None:
        self.pack, self.share = pack, share

    def select(self, q: Tensor, k: Tensor, layout: Any, kv_layout: Any = None, scale: float | None = None) -> Any:
        x, y = (layout.to_tiles(z).unflatten(2, (-1, layout.slots)).float() for z in (q, k))
        scores = torch.einsum("bhid,bhjd->bhij", x.mean(3), y.mean(3))
        indices = scores.topk(K, dim=-1).indices
        if self.pack == "lists":
            return TileSelection.from_lists(indices, torch.full(indices.shape[:3], K), layout)
        keep = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, indices, True)
        return TileSelection.from_mask(keep, layout)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("checkpointed", (False, True), ids=("", "checkpointed"))
@pytest.mark.parametrize("pack", ("mask", "lists"))
def test_a_builder_of_a_users_own_fuses_in_a_model_that_trains(pack: str, checkpointed: bool) -> None:
    model, x = Tiny(checkpointed), torch.randn(1, 256, 16)
    out, call = compiled_and_reported(model, Written(pack), x)
    assert call.sparse and call.fused, call
    out.square().sum().backward()
    fused = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    wanted, call = compiled_and_reported(model, Written(pack), x, fuse_selection=False)
    assert not call.fused
    wanted.square().sum().backward()
    torch.testing.assert_close(out, wanted)
    assert len(fused) == 4
    for mine, p in zip(fused, model.parameters()):
        torch.testing.assert_close(mine, p.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("checkpointed", (False, True), ids=("", "checkpointed"))
@pytest.mark.parametrize("name", ("VSA scheduled", "VSA within, with counts", "TopP within"))
def test_the_gated_coarse_output_trains_fused(name: str, checkpointed: bool) -> None:
    gradients = []
    for compiled in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(Tiny(checkpointed and compiled))
        options: dict[str, Any] = {"fullgraph": True, "inner": "aot_eager"} if compiled else {"compile": False}
        fs.wrap(model, BUILDERS[name], tile=TILE, grid=GRID, gates=True, **options)
        for parameter in fs.gate_parameters(model):
            nn.init.normal_(parameter)
        model(torch.randn(1, 256, 16, generator=torch.Generator().manual_seed(2))).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
        if compiled:
            assert all(call.sparse and call.fused for call in fs.report(model).calls), fs.report(model)
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 6
    for key, mine in gradients[0].items():
        torch.testing.assert_close(mine, gradients[1][key], atol=1e-3, rtol=1e-3, msg=lambda t, k=key: f"{k}: {t}")
