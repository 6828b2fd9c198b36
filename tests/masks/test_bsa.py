"""BSA: pruned queries, the threshold, and what options change; against loops written from the design."""

import math
from typing import Any

import oracle
import pytest
import slow
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, cases

import flexsparse as fs

DOUBLE = (torch.float64,)
SHARES = st.sampled_from((0.1, 0.25, 0.3, 0.5, 0.75, 0.9))
WINDOWS = st.sampled_from(((2, 2, 2), (1, 2, 2), (2, 1, 3), (1, 1, 1), (4, 4, 4), None))


@given(cases(dtypes=DOUBLE), SHARES, WINDOWS)
def test_the_queries_kept_and_their_sources_are_those_of_a_plain_loop(
    case: Case, share: float, window: tuple[int, int, int] | None
) -> None:
    q, k, _ = case.qkv()
    queries = fs.BSA(keep_queries=share, window=window, kv_density=0.5).select(q, k, case.layout).queries
    assert queries is not None
    for b in range(case.B):
        for h in range(case.H):
            kept, source = slow.prune(q[b, h], case.layout, window, share)
            assert queries.source[b, h].tolist() == source
            assert queries.counts.tolist() == [len(tile) for tile in kept]
            for n, tile in enumerate(kept):
                assert queries.kept[b, h, n, : len(tile)].tolist() == tile
    assert queries.packed & (queries.packed - 1) == 0 and queries.packed >= 16
    assert int(queries.kept.min()) >= 0 and int(queries.kept.max()) < case.layout.seq_len


@given(cases(dtypes=DOUBLE, cross=True), SHARES, st.sampled_from((0.05, 0.1, 0.3, 0.6, 1.0)), st.integers(1, 3))
def test_the_tiles_above_the_threshold_are_those_of_a_plain_loop(
    case: Case, share: float, density: float, min_tiles: int
) -> None:
    q, k, _ = case.qkv()
    builder = fs.BSA(keep_queries=share, kv_density=density, min_tiles=min_tiles)
    selection = builder.select(q, k, case.layout, kv_layout=case.kv_layout)
    M = case.kv_layout.num_tiles
    capacity = min(M, math.ceil(2 * density * M) + min_tiles)
    assert selection.capacity == capacity
    capped = 0
    for b in range(case.B):
        for h in range(case.H):
            kept, _ = slow.prune(q[b, h], case.layout, (2, 2, 2), share)
            columns = slow.tiles_of(case.kv_layout)
            rows = slow.scores(q[b, h], k[b, h // (case.H // case.G)], kept, columns, case.D**-0.5)
            found = [slow.above_threshold(row, density, min_tiles, capacity) for row in rows]
            assert torch.equal(selection.keep()[b, h], slow.as_mask([tiles for tiles, _ in found], M))
            capped += sum(cut for _, cut in found)
    assert int(selection.capped) == capped  # type: ignore[arg-type]


def planted(level: list[float]) -> tuple[torch.Tensor, torch.Tensor, fs.TileLayout]:
    """Queries of ones and keys such that every row of scores is ``level``."""
    layout = fs.TileLayout(grid=(1, 4, 4 * len(level)), tile=(1, 4, 4))
    values = torch.tensor(level, dtype=torch.float64).repeat_interleave(16)[:, None]
    k = layout.to_raster(values)[None, None]
    return torch.ones_like(k), k, layout


def test_the_threshold_uses_the_population_standard_deviation() -> None:
    # mean 0, population std 1: the bar for density 0.16 is 0.994; the sample std of eight would put it at 1.06
    q, k, layout = planted([1, 1, 1, 1, -1, -1, -1, -1])
    selection = fs.BSA(kv_density=0.16, max_tiles=8).select(q, k, layout, scale=1.0)
    assert selection.counts.unique().tolist() == [4]


def test_rows_that_want_more_than_the_capacity_keep_their_best_and_are_counted() -> None:
    q, k, layout = planted([5, 4, 7, 6, 0, 0, 0, 0])
    selection = fs.BSA(kv_density=0.5, max_tiles=2).select(q, k, layout, scale=1.0)
    assert selection.kv_indices[0, 0].unique(dim=0).tolist() == [[2, 3]]
    assert selection.capped is not None and selection.capped.dtype == torch.int64
    assert int(selection.capped) == layout.num_tiles
    free = fs.BSA(kv_density=0.5, max_tiles=4).select(q, k, layout, scale=1.0)
    assert free.counts.unique().tolist() == [4] and int(free.capped) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("density", (0.1, 0.5, 0.9))
def test_equal_scores_keep_the_minimum_and_the_first_tiles(density: float) -> None:
    q, k, layout = planted([2.0] * 6)
    selection = fs.BSA(kv_density=density, min_tiles=2).select(q, k, layout, scale=1.0)
    assert selection.counts.unique().tolist() == [2]
    assert selection.kv_indices[..., :2].unique(dim=2)[0, 0].tolist() == [[0, 1]]
    assert fs.BSA(kv_density=1).select(q, k, layout).counts.unique().tolist() == [6]


@given(cases(dtypes=DOUBLE), st.sampled_from((0.3, 0.9, 1.0)))
def test_a_mass_threshold_keeps_the_smallest_set_that_reaches_it(case: Case, mass: float) -> None:
    q, k, _ = case.qkv()
    selection = fs.BSA(keep_queries=1, threshold="mass", mass=mass).select(q, k, case.layout)
    tiles = slow.tiles_of(case.layout)
    rows = slow.scores(q[0, 0], k[0, 0], tiles, tiles, case.D**-0.5)
    expected = [slow.smallest_set(row, mass) if mass < 1 else set(range(len(row))) for row in rows]
    assert torch.equal(selection.keep()[0, 0], slow.as_mask(expected, len(tiles)))


@given(cases(dtypes=DOUBLE, cross=True))
def test_keeping_all_queries_and_all_tiles_is_dense_attention(case: Case) -> None:
    q, k, v = case.qkv()
    builder = fs.BSA(keep_queries=1, kv_density=1)
    everything = torch.ones(case.B, case.H, case.layout.seq_len, case.kv_layout.seq_len, dtype=torch.bool)
    expected, _ = oracle.attention(q, k, v, everything, case.D**-0.5)
    for backend in ("reference", "gather"):
        out = fs.sparse_attention(q, k, v, case.layout, builder, kv_layout=case.kv_layout, backend=backend)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", ("reference", "gather"))
@given(case=cases(dtypes=DOUBLE), share=SHARES)
def test_a_pruned_token_gets_its_representatives_output_and_sends_it_its_gradient(
    backend: str, case: Case, share: float
) -> None:
    q, k, v = (x.requires_grad_() for x in case.qkv())
    selection = fs.BSA(keep_queries=share, kv_density=0.4).select(q, k, case.layout)
    assert selection.queries is not None
    source = selection.queries.source.long()
    mask = oracle.token_mask(selection.keep(), case.layout)
    full, full_lse = oracle.attention(q, k, v, mask, case.D**-0.5)
    expected = full.gather(2, source[..., None].expand_as(full))
    out, aux = fs.sparse_attention(q, k, v, case.layout, selection, backend=backend, return_aux=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(aux.lse, full_lse.gather(2, source))

    g = case.randn(case.H, case.layout, 9)
    grads = torch.autograd.grad(out, (q, k, v), g)
    for actual, wanted in zip(grads, torch.autograd.grad(expected, (q, k, v), g)):
        torch.testing.assert_close(actual, wanted)
    pruned = source != torch.arange(case.layout.seq_len)
    assert bool((grads[0][pruned] == 0).all())


@pytest.mark.parametrize("fill", ("nearest", "zero"))
def test_the_other_fills_give_what_they_promise(fill: str) -> None:
    layout = fs.TileLayout(grid=(2, 5, 6), tile=(2, 4, 4), text_first=3)
    q, k, v = torch.randn(3, 1, 2, layout.seq_len, 8, dtype=torch.float64).unbind()
    builder = fs.BSA(kv_density=0.5, fill=fill)  # type: ignore[arg-type]
    selection = builder.select(q, k, layout)
    assert selection.queries is not None
    expected = fs.sparse_attention(
        q, k, v, layout, fs.TileSelection.from_mask(selection.keep(), layout), backend="reference"
    )
    out, aux = fs.sparse_attention(q, k, v, layout, builder, return_aux=True, backend="gather")
    for h in range(2):
        kept, _ = slow.prune(q[0, h], layout, (2, 2, 2), 0.5)
        for tile, boxes in zip(kept, slow.windows_of(layout, (2, 2, 2))):
            for tokens in boxes.values():
                stay = [token for token in tokens if token in tile]
                for token in tokens:
                    if token in stay:
                        torch.testing.assert_close(out[0, h, token], expected[0, h, token])
                    elif fill == "zero":
                        assert bool((out[0, h, token] == 0).all()) and float(aux.lse[0, h, token]) == -math.inf
                    else:
                        nearest = max(stay, key=lambda other: slow.cosine(q[0, h, token], q[0, h, other]))
                        torch.testing.assert_close(out[0, h, token], expected[0, h, nearest])


NARROW = fs.SlidingTile(window=(1, 3, 2))


@pytest.mark.parametrize(
    ("options", "kv"),
    [
        ({"kv_density": 0.1, "min_tiles": 8}, 0.5),
        ({"kv_density": 0.5, "max_tiles": 2}, 0.125),
        ({"kv_density": 0.1, "min_tiles": 9, "within": NARROW}, 0.375),  # six tiles are allowed
        ({"kv_density": 0.9, "max_tiles": 2, "within": fs.FrameCausal(chunk=2)}, 0.125),
        ({"threshold": "mass", "mass": 1.0, "within": NARROW}, 0.375),
        ({"threshold": "mass", "mass": 1.0, "max_tiles": 4, "within": NARROW}, 0.25),
        ({"kv_density": 0.4}, None),
        ({"kv_density": 0.5, "within": NARROW}, None),
        ({"kv_density": 0.4, "within": fs.FrameCausal(chunk=2)}, None),
    ],
)
def test_the_nominal_density_is_that_of_selections_of_random_tokens(options: dict[str, Any], kv: float | None) -> None:
    layout = fs.TileLayout(grid=(4, 16, 16), tile=(2, 4, 8))
    q, k = torch.randn(2, 2, 8, layout.seq_len, 16).unbind()
    builder = fs.BSA(keep_queries=0.25, **options)
    selection = builder.select(q, k, layout)
    assert builder.query_share(layout) == 0.25
    nominal = builder.nominal_density(layout, layout)
    if kv is None:
        assert nominal == pytest.approx(selection.density, rel=0.05)
    else:
        assert nominal == pytest.approx(selection.density) == 0.25 * kv


def test_of_two_tiles_one_is_kept_whatever_the_density() -> None:
    layout = fs.TileLayout(grid=(1, 4, 8), tile=(1, 4, 4))
    q, k = torch.randn(2, 1, 2, layout.seq_len, 8).unbind()
    builder = fs.BSA(kv_density=0.1, keep_queries=1, max_tiles=1)
    assert builder.nominal_density(layout, layout) == builder.select(q, k, layout).density == 0.5


@given(cases(dtypes=DOUBLE), SHARES, WINDOWS)
def test_the_share_of_queries_is_that_of_a_selection(
    case: Case, share: float, window: tuple[int, int, int] | None
) -> None:
    q, k, _ = case.qkv()
    builder = fs.BSA(keep_queries=share, window=window)
    queries = builder.select(q, k, case.layout).queries
    assert queries is not None
    assert builder.query_share(case.layout) == pytest.approx(int(queries.counts.sum()) / case.layout.num_tokens)


def test_queries_that_are_all_equal_or_zero_keep_the_lowest_slots() -> None:
    layout = fs.TileLayout(grid=(2, 4, 4), tile=(2, 4, 4))
    for q in (torch.zeros(1, 1, 32, 4), torch.ones(1, 1, 32, 4)):
        queries = fs.BSA(keep_queries=0.5).select(q, q, layout).queries
        kept, source = slow.prune(q[0, 0], layout, (2, 2, 2), 0.5)
        assert queries is not None and queries.source[0, 0].tolist() == source
        assert queries.kept[0, 0, 0].tolist() == kept[0]


def test_the_medoid_is_the_token_most_like_its_windows_mean() -> None:
    layout = fs.TileLayout(grid=(2, 4, 4), tile=(2, 4, 4))
    q = torch.randn(1, 1, 32, 8, dtype=torch.float64)
    queries = fs.BSA(keep_queries=0.125, representative="medoid").select(q, q, layout).queries
    assert queries is not None
    for tokens in slow.windows_of(layout, (2, 2, 2))[0].values():
        medoid = max(tokens, key=lambda token: slow.cosine(q[0, 0, token], slow.mean(q[0, 0], tokens)))
        assert queries.source[0, 0, tokens].tolist() == [medoid] * 8


def test_scoring_all_queries_differs_from_scoring_the_kept_ones() -> None:
    layout = fs.TileLayout(grid=(2, 8, 8), tile=(2, 4, 4))
    q, k = torch.randn(2, 1, 1, layout.seq_len, 8, dtype=torch.float64).unbind()
    tiles = slow.tiles_of(layout)
    rows = slow.scores(q[0, 0], k[0, 0], tiles, tiles, 8**-0.5)
    selection = fs.BSA(kv_density=0.3, score_queries="all").select(q, k, layout)
    expected = [slow.above_threshold(row, 0.3, 1, selection.capacity)[0] for row in rows]
    assert torch.equal(selection.keep()[0, 0], slow.as_mask(expected, 4))


@pytest.mark.parametrize("statistics", ["row", "head"])
@pytest.mark.parametrize("threshold", ["normal", "probability"])
@pytest.mark.parametrize("keep_queries", [1.0, 0.5])
def test_tiles_without_tokens_change_nothing(statistics: str, threshold: str, keep_queries: float) -> None:
    """A head's mean was one over rows of padding, too: NaN there, and rows kept one tile."""
    long, short = fs.TileLayout(grid=(8, 4, 4), tile=(2, 2, 2)), fs.TileLayout(grid=(2, 4, 4), tile=(2, 2, 2))
    counts = long.tile_counts.repeat(2, 1)
    counts[1, short.num_tiles :] = 0  # of the second sample only two frames are there
    x = torch.randn(3, 2, 2, long.seq_len, 16, dtype=torch.float64) + 1
    x[:, 1, :, short.seq_len :] = torch.nan
    builder = fs.BSA(statistics=statistics, threshold=threshold, keep_queries=keep_queries, kv_density=0.3)  # type: ignore[arg-type]
    out = fs.sparse_attention(*x, long, builder, tile_counts=counts)
    alone = fs.sparse_attention(*x[:, 1:, :, : short.seq_len], short, builder)
    torch.testing.assert_close(out[1:, :, : short.seq_len], alone)
    torch.testing.assert_close(out[:1], fs.sparse_attention(*x[:, :1], long, builder))


def test_a_heads_statistics_are_compiled_as_one_graph() -> None:
    """A quantile of the normal distribution broke the graph; as densities change, they become symbols."""
    torch._dynamo.reset()
    layout = fs.TileLayout(grid=(2, 4, 8), tile=(2, 2, 2))
    q, k, v = torch.randn(3, 1, 2, layout.seq_len, 16)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def attention(builder: fs.BSA) -> torch.Tensor:
        out: torch.Tensor = fs.sparse_attention(q, k, v, layout, builder)
        return out

    for density in (0.2, 0.5, 1.0):
        builder = fs.BSA(statistics="head", kv_density=density)
        torch.testing.assert_close(attention(builder), fs.sparse_attention(q, k, v, layout, builder))
