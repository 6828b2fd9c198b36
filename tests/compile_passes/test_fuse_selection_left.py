"""`FuseSelection` leaves what is no coarse stage, or is read elsewhere, as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flexsparse.compile_passes import FuseSelection
from flexsparse.masks import keep_top

from .capture import trace
from .coarse_stages import (
    POOLS,
    SCALE,
    B,
    Chosen,
    D,
    H,
    K,
    M,
    N,
    S,
    Stage,
    Step,
    check_fused,
    check_left,
    inputs,
    scattered,
)


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
    "queries rounded on the way": stage(q_c=lambda q: q.bfloat16().float()),
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
    "the best of some tiles": (
        lambda s: torch.ops.flexsparse.pack_tiles(
            torch.zeros_like(s, dtype=torch.bool).scatter(-1, s[..., : M - 2].topk(K).indices, True)
        ),
        "no scores for some of the tiles",
    ),
    "a list of some tiles": (
        lambda s: torch.ops.flexsparse.pack_lists(s[..., : M - 2].topk(K).indices, torch.full((B, H, N), K), M),
        "no scores for some of the tiles",
    ),
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
