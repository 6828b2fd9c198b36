"""BSA with query tiles larger than KV tiles: 128 slots that keep half are 64 rows, the height of a matrix product's operand."""

from typing import Any

import pytest
import torch
from comparison import compare
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case
from torch import Tensor

import flexsparse as fs

BACKENDS = ("reference", "gather")
EXTRA = st.one_of(st.just(0), st.integers(1, 40))


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> Case:
    """One grid in two layouts, the query tile twice to eight times the KV tile, borders and text anywhere."""
    grid = draw(st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 10)))
    query_tile, kv_tile = draw(
        st.sampled_from(
            (((4, 4, 8), (4, 4, 4)), ((2, 4, 8), (2, 4, 4)), ((4, 4, 8), (2, 2, 4)), ((3, 4, 5), (1, 4, 4)))
        )
    )
    text = {"text_first": draw(EXTRA), "text_last": draw(EXTRA)}
    layouts = [fs.TileLayout(grid=grid, tile=tile, **text) for tile in (query_tile, kv_tile)]
    G = draw(st.integers(1, 2))
    heads = G * draw(st.integers(1, 2))
    return Case(
        *layouts, B=1, H=heads, G=G, D=8, dtype=draw(st.sampled_from(dtypes)), scale=1.0, seed=draw(st.integers(0, 99))
    )


def builders(**more: Any) -> st.SearchStrategy[fs.BSA]:
    return st.builds(
        fs.BSA,
        keep_queries=st.sampled_from((0.2, 0.5)),
        kv_density=st.sampled_from((0.3, 0.6)),
        window=st.sampled_from(((2, 2, 2), (1, 2, 3), None)),
        representative=st.sampled_from(("center", "medoid")),
        **more,
    )


def chosen(case: Case, builder: fs.BSA) -> fs.TileSelection:
    q, k, _ = case.qkv()
    return builder.select(q, k, case.layout, kv_layout=case.kv_layout)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    case=cases(dtypes=(torch.float32, torch.bfloat16)),
    builder=builders(fill=st.sampled_from(("representative", "nearest"))),
)
def test_output_and_gradients_agree_with_the_oracle(backend: str, case: Case, builder: fs.BSA) -> None:
    compare(case, chosen(case, builder), backend)


def outcome(case: Case, builder: Any, backend: str, gradients: bool = True) -> list[Tensor]:
    q, k, v = (x.requires_grad_(gradients) for x in case.qkv())
    out = fs.sparse_attention(q, k, v, case.layout, builder, kv_layout=case.kv_layout, backend=backend)
    return [out, *torch.autograd.grad(out, (q, k, v), case.randn(case.H, case.layout, 7))] if gradients else [out]


@given(case=cases(dtypes=(torch.float64,)), builder=builders(fill=st.just("zero")))
def test_a_token_without_a_source_is_zero_and_sends_no_gradient(case: Case, builder: fs.BSA) -> None:
    selection = chosen(case, builder)
    for mine, theirs in zip(outcome(case, builder, "gather"), outcome(case, selection, "reference")):
        torch.testing.assert_close(mine, theirs)
    assert selection.queries is not None
    pruned = selection.queries.source < 0
    out, dq, *_ = outcome(case, builder, "gather")
    assert bool((out[pruned] == 0).all()) and bool((dq[pruned] == 0).all())


@given(case=cases(dtypes=(torch.float32, torch.bfloat16)), builder=builders())
def test_twice_gives_the_same_bits(case: Case, builder: fs.BSA) -> None:
    for one, two in zip(outcome(case, builder, "gather"), outcome(case, builder, "gather")):
        assert torch.equal(one, two)


LAYOUT = fs.TileLayout(grid=(4, 5, 9), tile=(4, 4, 8), text_first=3, text_last=20)
KEYS = fs.TileLayout(grid=(4, 5, 9), tile=(4, 4, 4), text_first=3, text_last=20)
LARGE = Case(LAYOUT, KEYS, B=1, H=2, G=1, D=16, dtype=torch.float32, scale=1.0, seed=5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the templates on the GPU")
def test_the_templates_compute_64_of_128_rows_on_tiles_of_64_keys() -> None:
    selection = chosen(LARGE, fs.BSA(keep_queries=0.5, kv_density=0.4))
    assert (LAYOUT.slots, selection.query_rows, KEYS.slots) == (128, 64, 64)
    compare(LARGE, selection, "triton")


def test_flex_computes_the_same(fresh_dynamo: None) -> None:
    builder = fs.BSA(keep_queries=0.5, kv_density=0.4)
    with torch.no_grad():
        selection = chosen(LARGE, builder)
        (mine,), (theirs,) = (outcome(LARGE, selection, name, gradients=False) for name in ("flex", "reference"))
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
