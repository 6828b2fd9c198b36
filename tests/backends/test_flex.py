"""FlexAttention, compiled, against the oracle; few cases, as each is a compilation."""

import oracle
import pytest
import torch
from strategies import Case
from tolerance import assert_as_good

import flexsparse as fs

WHOLE = fs.TileLayout(grid=(2, 8, 16), tile=(2, 4, 4))
PARTIAL = fs.TileLayout(grid=(2, 7, 9), tile=(2, 4, 4), text_first=3, text_last=5)
OTHER = fs.TileLayout(grid=(3, 5, 6), tile=(1, 4, 4), text_last=2)


def check(case: Case, selection: fs.TileSelection, tile_counts: torch.Tensor | None = None) -> None:
    q, k, v = case.qkv()
    mask = oracle.token_mask(selection.keep(), case.layout, case.kv_layout, tile_counts)
    gold, _ = oracle.attention(q.double(), k.double(), v.double(), mask, case.D**-0.5)
    reference, _ = oracle.attention(q, k, v, mask, case.D**-0.5)
    if selection.queries is not None:
        source = selection.queries.source.long()[..., None].expand_as(gold)
        gold, reference = gold.gather(2, source), reference.gather(2, source)
    out = fs.sparse_attention(
        *(q, k, v, case.layout, selection),
        kv_layout=case.kv_layout,
        tile_counts=tile_counts,
        backend="flex",
    )
    assert_as_good(out, reference, gold, "flex out")


def case_of(layout: fs.TileLayout, kv_layout: fs.TileLayout, dtype: torch.dtype, scale: float, G: int = 1) -> Case:
    return Case(layout, kv_layout, B=2, H=2, G=G, D=16, dtype=dtype, scale=scale, seed=8)


def test_partial_tiles_text_and_gqa_agree_with_the_oracle(fresh_dynamo: None) -> None:
    case = case_of(PARTIAL, PARTIAL, torch.float32, 1.0)
    check(case, case.selection(0.4))
    check(case, case.selection(0.1))  # another selection, the same compiled code


@pytest.mark.slow
@pytest.mark.parametrize("scale", (1.0, 8.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_every_dtype_agrees_with_the_oracle(dtype: torch.dtype, scale: float, fresh_dynamo: None) -> None:
    case = case_of(WHOLE, WHOLE, dtype, scale, G=2)
    check(case, case.selection(0.3))


@pytest.mark.slow
def test_keys_on_another_grid_and_in_other_tiles_agree_with_the_oracle(fresh_dynamo: None) -> None:
    case = case_of(PARTIAL, OTHER, torch.float32, 1.0)
    check(case, case.selection(0.4))


def test_pruned_queries_agree_with_the_oracle(fresh_dynamo: None) -> None:
    case = case_of(PARTIAL, PARTIAL, torch.float32, 1.0)
    q, k, _ = case.qkv()
    selection = fs.BSA(keep_queries=0.5, kv_density=0.5).select(q, k, case.layout)
    assert selection.query_rows == 16 < PARTIAL.slots == 32
    check(case, selection)


@pytest.mark.slow
def test_counts_that_differ_per_sample_agree_with_the_oracle(fresh_dynamo: None) -> None:
    case = case_of(PARTIAL, PARTIAL, torch.float32, 1.0)
    counts = torch.stack([PARTIAL.tile_counts, PARTIAL.tile_counts // 2])
    counts[1, -1] = 0
    check(case, case.selection(0.5), counts)


@pytest.mark.slow
def test_rows_without_tiles_are_zero(fresh_dynamo: None) -> None:
    layout = fs.TileLayout(grid=(2, 5, 7), tile=(2, 4, 4))
    case = case_of(layout, layout, torch.float32, 1.0)
    selection = case.selection(0.2, empty=True)
    assert int(selection.counts.min()) == 0 < int(selection.counts.max())
    check(case, selection)


@pytest.mark.slow
def test_more_shapes_than_the_recompilation_limit_stay_sparse(fresh_dynamo: None) -> None:
    """Past its limit Dynamo runs uncompiled code, and uncompiled FlexAttention is dense."""
    with torch._dynamo.config.patch(recompile_limit=1):
        for width in (8, 12, 16):
            layout = fs.TileLayout(grid=(1, 4, width), tile=(1, 4, 4))
            case = case_of(layout, layout, torch.float32, 1.0)
            check(case, case.selection(0.2))
