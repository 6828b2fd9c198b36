"""TopP: the smallest set of tiles that holds the mass."""

import pytest
import slow
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, cases

import flexsparse as fs


@given(
    cases(dtypes=(torch.float64,), cross=True),
    st.sampled_from((0.01, 0.3, 0.6, 0.9, 0.999)),
    st.integers(1, 3),
)
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(case: Case, mass: float, min_tiles: int) -> None:
    q, k, _ = case.qkv()
    builder = fs.TopP(mass=mass, min_tiles=min_tiles)
    selection = builder.select(q, k, case.layout, kv_layout=case.kv_layout)
    rows, columns = slow.tiles_of(case.layout), slow.tiles_of(case.kv_layout)
    for h in range(case.H):
        scores = slow.scores(q[0, h], k[0, h // (case.H // case.G)], rows, columns, case.D**-0.5)
        expected = [slow.best(row, max(min_tiles, len(slow.smallest_set(row, mass)))) for row in scores]
        assert torch.equal(selection.keep()[0, h], slow.as_mask(expected, len(columns)))


@given(cases(dtypes=(torch.float32, torch.bfloat16), scales=(1.0, 16.0)))
def test_the_whole_mass_keeps_every_tile(case: Case) -> None:
    q, k, _ = case.qkv()
    assert bool(fs.TopP(mass=1).select(q, k, case.layout).keep().all())


def test_equal_scores_keep_the_first_tiles_that_reach_the_mass() -> None:
    layout = fs.TileLayout(grid=(1, 8, 16), tile=(1, 4, 4))
    x = torch.ones(1, 1, 128, 4)
    for mass, kept in ((0.25, 2), (0.26, 3), (0.5, 4), (0.01, 1)):
        selection = fs.TopP(mass=mass).select(x, x, layout)
        assert selection.counts.unique().tolist() == [kept]
        assert selection.kv_indices[..., :kept].flatten(0, 2).unique(dim=0).tolist() == [list(range(kept))]


def test_rows_over_the_capacity_keep_their_best_and_are_counted() -> None:
    layout = fs.TileLayout(grid=(1, 8, 16), tile=(1, 4, 4))
    q, k, v = torch.randn(3, 1, 2, 128, 8).unbind()
    free = fs.TopP(mass=0.9).select(q, k, layout)
    over = int((free.counts > 3).sum())
    assert over > 0
    _, aux = fs.sparse_attention(q, k, v, layout, fs.TopP(mass=0.9, max_tiles=3), return_aux=True)
    assert int(aux.capped) == over
    assert int(aux.selection.counts.max()) == 3
    best = fs.VSA(top_k=3).select(q, k, layout).keep()
    assert torch.equal(aux.selection.keep(), free.keep() & best)


@pytest.mark.parametrize("mass", (0.3, 0.8))
def test_its_coarse_output_is_that_of_vsa(mass: float) -> None:
    layout = fs.TileLayout(grid=(2, 5, 6), tile=(2, 2, 2))
    q, k, v = torch.randn(3, 1, 2, 60, 8).unbind()
    _, aux = fs.sparse_attention(q, k, v, layout, fs.TopP(mass=mass), return_aux=True)
    _, expected = fs.sparse_attention(q, k, v, layout, fs.VSA(top_k=1), return_aux=True)
    torch.testing.assert_close(aux.coarse_out, expected.coarse_out)


def test_tiles_without_tokens_want_nothing() -> None:
    """Their pooled queries are zero, their softmax is even: each wanted more than the cap, and was counted."""
    long, short = fs.TileLayout(grid=(8, 4, 4), tile=(2, 2, 2)), fs.TileLayout(grid=(2, 4, 4), tile=(2, 2, 2))
    builder = fs.TopP(mass=0.6, max_tiles=2)
    q, k = torch.randn(2, 2, 2, long.seq_len, 16, dtype=torch.float64)
    counts = long.tile_counts.repeat(2, 1)
    counts[:, short.num_tiles :] = 0
    alone = builder.select(q[:, :, : short.seq_len], k[:, :, : short.seq_len], short)
    for each in (counts, counts[0]):
        assert int(builder.select(q, k, long, tile_counts=each).capped) == int(alone.capped)
