"""`FuseSelection`: whatever way a coarse stage is spelled, it becomes one op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import flexsparse as fs
from flexsparse.compile_passes import FuseSelection

from .capture import nodes_of, ops, trace
from .coarse_stages import (
    CHAIN,
    CHOICES,
    COARSE,
    POOLS,
    SCALE,
    SCORES,
    H,
    K,
    Stage,
    Step,
    aten,
    check_fused,
    inputs,
    named,
    results,
    scattered,
    shapes,
)


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
@settings(max_examples=15)
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
    "the library's": {"expand": lambda x: fs.masks.coarse.expand_heads(x, H)},
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
