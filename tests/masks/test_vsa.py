"""VSA: the right tiles, exactly top_k of them, and the coarse output."""

import math

import pytest
import slow
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, cases

import flexsparse as fs
from flexsparse.masks import keep_top

DOUBLE = (torch.float64,)


def slow_scores(case: Case, b: int, h: int) -> list[list[float]]:
    q, k, _ = case.qkv()
    rows, columns = slow.tiles_of(case.layout), slow.tiles_of(case.kv_layout)
    return slow.scores(q[b, h], k[b, h // (case.H // case.G)], rows, columns, case.D**-0.5)


@given(cases(dtypes=DOUBLE, cross=True), st.data())
def test_vsa_keeps_what_a_plain_loop_keeps(case: Case, data: st.DataObject) -> None:
    M = case.kv_layout.num_tiles
    top_k = data.draw(st.integers(1, M))
    q, k, _ = case.qkv()
    selection = fs.VSA(top_k=top_k).select(q, k, case.layout, kv_layout=case.kv_layout)
    assert selection.capacity == top_k and selection.kv_indices.shape[-1] == top_k
    for b in range(case.B):
        for h in range(case.H):
            expected = [slow.best(row, top_k) for row in slow_scores(case, b, h)]
            assert torch.equal(selection.keep()[b, h], slow.as_mask(expected, M))


@given(cases(dtypes=(torch.float32, torch.bfloat16, torch.float16), scales=(1.0, 8.0)), st.data())
def test_in_low_precision_only_near_ties_are_decided_differently(case: Case, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, case.kv_layout.num_tiles))
    q, k, _ = case.qkv()
    keep = fs.VSA(top_k=top_k).select(q, k, case.layout).keep()
    assert bool((keep.sum(-1) == top_k).all())
    scores = torch.tensor(slow_scores(case, 0, 0), dtype=torch.float64)
    kth = scores.sort(-1, descending=True).values[:, top_k - 1 : top_k]
    rounding = 1e-5 * case.scale**2  # of float32 pooling and scoring, not of the inputs' dtype
    assert bool(keep[0, 0][scores > kth + rounding].all())
    assert not bool(keep[0, 0][scores < kth - rounding].any())


@given(cases(dtypes=(torch.float32, torch.bfloat16)), st.data())
def test_equal_scores_keep_exactly_the_first_tiles(case: Case, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, case.layout.num_tiles))
    q, k, _ = case.qkv()
    selection = fs.VSA(top_k=top_k).select(
        q, torch.zeros_like(k), case.layout
    )  # of ones, a BLAS may round columns apart
    assert bool((selection.counts == top_k).all())
    assert bool((selection.kv_indices == torch.arange(top_k)).all())


@given(st.integers(1, 4), st.integers(0, 99), st.integers(1, 16))
def test_among_repeated_tiles_the_lowest_index_wins(distinct: int, seed: int, top_k: int) -> None:
    layout = fs.TileLayout(grid=(1, 16, 16), tile=(1, 4, 4))
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(-3, 4, (distinct, 4), generator=generator).float()  # integers: scores are exact
    of_tile = torch.randint(0, distinct, (16,), generator=generator)
    k = layout.to_raster(kinds[of_tile].repeat_interleave(16, 0))[None, None]
    q = torch.randint(-3, 4, (1, 1, 256, 4), generator=generator).float()
    keep = fs.VSA(top_k=top_k).select(q, k, layout, scale=1.0).keep()[0, 0]
    rows = slow.scores(q[0, 0], k[0, 0], slow.tiles_of(layout), slow.tiles_of(layout), 1.0)
    assert torch.equal(keep, slow.as_mask([slow.best(row, top_k) for row in rows], 16))


def test_scores_beyond_what_a_softmax_tells_apart_are_told_apart() -> None:
    """Softmax weights of far lower scores round to zero, and zeros tie: the raw scores must decide."""
    layout = fs.TileLayout(grid=(1, 4, 32), tile=(1, 4, 4))
    level = torch.tensor([500.0, -400, -300, -200, -100, 0, 100, 200])
    k = layout.to_raster(level.repeat_interleave(16)[:, None])[None, None]
    for dtype in (torch.float32, torch.bfloat16):
        keep = fs.VSA(top_k=3).select(torch.ones_like(k).to(dtype), k.to(dtype), layout, scale=1.0).keep()
        assert bool((keep == torch.tensor([1, 0, 0, 0, 0, 0, 1, 1]).bool()).all())


@pytest.mark.parametrize("sparsity", (0.0, 0.1, 0.5, 0.7, 0.9, 0.99, 1.0))
@pytest.mark.parametrize("M", (1, 2, 7, 10, 100))
def test_a_sparsity_keeps_the_tiles_that_its_formula_says(sparsity: float, M: int) -> None:
    layout = fs.TileLayout(grid=(1, 1, M), tile=(1, 1, 1))
    q, k = torch.randn(2, 1, 1, M, 4).unbind()
    expected = min(max(math.ceil((1 - sparsity) * M), 1), M)
    assert fs.VSA(sparsity=sparsity).select(q, k, layout).counts.unique().tolist() == [expected]


@given(cases(dtypes=DOUBLE, cross=True))
def test_the_coarse_output_is_attention_between_tile_means(case: Case) -> None:
    q, k, v = case.qkv()
    _, aux = fs.sparse_attention(q, k, v, case.layout, fs.VSA(top_k=1), kv_layout=case.kv_layout, return_aux=True)
    columns = slow.tiles_of(case.kv_layout)
    for h in range(case.H):
        weights = torch.tensor(slow_scores(case, 0, h), dtype=torch.float64).softmax(-1)
        values = torch.stack([slow.mean(v[0, h // (case.H // case.G)], column) for column in columns])
        torch.testing.assert_close(aux.coarse_out[0, h], weights @ values)


def test_a_count_bias_weighs_a_partial_tile_by_its_tokens() -> None:
    layout = fs.TileLayout(grid=(1, 4, 5), tile=(1, 4, 4))
    q, k, v = (torch.zeros(1, 1, 20, 4, dtype=torch.float64) for _ in range(3))
    v[:] = torch.arange(20.0)[:, None]
    _, aux = fs.sparse_attention(q, k, v, layout, fs.VSA(top_k=1, count_bias=True), return_aux=True)
    torch.testing.assert_close(aux.coarse_out, torch.full_like(aux.coarse_out, 9.5))  # the mean of all tokens
    assert aux.selection.kv_indices.unique().tolist() == [0]
    swapped = fs.VSA(top_k=1).select(q, k, layout)
    assert swapped.kv_indices.unique().tolist() == [0]


@given(st.integers(0, 99), st.integers(0, 12))
def test_keep_top_keeps_exactly_that_many_of_rows_full_of_ties(seed: int, n: int) -> None:
    scores = torch.randint(0, 3, (2, 2, 5, 12), generator=torch.Generator().manual_seed(seed)).float()
    keep = keep_top(scores, n)
    for row, kept in zip(scores.flatten(0, 2), keep.flatten(0, 2)):
        assert set(kept.nonzero()[:, 0].tolist()) == slow.best(row.tolist(), n)


def test_extra_tokens_change_neither_selection_nor_coarse_output() -> None:
    bare = fs.TileLayout(grid=(2, 4, 6), tile=(2, 2, 2))
    text = fs.TileLayout(grid=(2, 4, 6), tile=(2, 2, 2), text_first=5, text_last=21)
    q, k, v = torch.randn(3, 1, 2, text.seq_len, 8).unbind()
    _, expected = fs.sparse_attention(*(x[:, :, 5:53] for x in (q, k, v)), bare, fs.VSA(top_k=2), return_aux=True)
    _, aux = fs.sparse_attention(q, k, v, text, fs.VSA(top_k=2), return_aux=True)
    assert torch.equal(aux.selection.keep(), expected.selection.keep())
    torch.testing.assert_close(aux.coarse_out, expected.coarse_out)
