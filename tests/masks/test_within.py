"""``within=`` restricts before anything is selected or pooled: nothing leaks from outside of it."""

import math

import pytest
import slow
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, cases

import flexsparse as fs

DOUBLE = (torch.float64,)


@given(cases(dtypes=DOUBLE), st.integers(1, 9))
def test_a_row_keeps_its_best_allowed_tiles_and_no_more_than_there_are(case: Case, top_k: int) -> None:
    q, k, _ = case.qkv()
    M = case.layout.num_tiles
    top_k = min(top_k, M)
    window = fs.SlidingTile(window=(2, 1, 2))
    allowed = window.select(q, k, case.layout).keep()
    keep = fs.VSA(top_k=top_k, within=window).select(q, k, case.layout).keep()
    tiles = slow.tiles_of(case.layout)
    for h in range(case.H):
        rows = slow.scores(q[0, h], k[0, h // (case.H // case.G)], tiles, tiles, case.D**-0.5)
        expected = []
        for row, may in zip(rows, allowed[0, h].tolist()):
            candidates = [m for m in range(M) if may[m]]
            expected.append(set(sorted(candidates, key=lambda m: (-row[m], m))[:top_k]))
        assert torch.equal(keep[0, h], slow.as_mask(expected, M))


@given(cases(dtypes=DOUBLE), st.sampled_from((0.1, 0.5, 1.0)))
def test_a_threshold_is_taken_over_the_allowed_tiles_only(case: Case, density: float) -> None:
    q, k, _ = case.qkv()
    M = case.layout.num_tiles
    window = fs.SlidingTile(window=(2, 2, 1))
    allowed = window.select(q, k, case.layout).keep()[0, 0].tolist()
    builder = fs.BSA(keep_queries=1, kv_density=density, max_tiles=M, within=window)
    keep = builder.select(q, k, case.layout).keep()[0, 0]
    tiles = slow.tiles_of(case.layout)
    expected = []
    for row, may in zip(slow.scores(q[0, 0], k[0, 0], tiles, tiles, case.D**-0.5), allowed):
        columns = [m for m in range(M) if may[m]]
        found, _ = slow.above_threshold([row[m] for m in columns], density, 1, M)
        expected.append({columns[m] for m in found})
    assert torch.equal(keep, slow.as_mask(expected, M))


BUILDERS = {
    "VSA": lambda within: fs.VSA(sparsity=0.5, within=within),
    "VSA, biased": lambda within: fs.VSA(top_k=2, count_bias=True, within=within),
    "TopP": lambda within: fs.TopP(mass=0.6, within=within),
    "BSA": lambda within: fs.BSA(kv_density=0.4, within=within),
    "BSA, mass": lambda within: fs.BSA(threshold="mass", mass=0.6, within=within),
    "BSA, probability": lambda within: fs.BSA(threshold="probability", kv_density=0.4, within=within),
}


@pytest.mark.parametrize("backend", ("reference", "gather"))
@pytest.mark.parametrize("name", BUILDERS)
@given(seed=st.integers(0, 999), chunk=st.sampled_from((1, 2)))
def test_the_past_does_not_change_with_the_future(name: str, backend: str, seed: int, chunk: int) -> None:
    layout = fs.TileLayout(grid=(4, 5, 6), tile=(1, 3, 4))
    builder = BUILDERS[name](fs.FrameCausal(chunk=chunk))
    generator = torch.Generator().manual_seed(seed)
    q, k, v, gate = torch.randn(4, 1, 2, layout.seq_len, 8, generator=generator).unbind()
    gate_ = gate if builder.has_coarse else None
    past = 2 * 30  # tokens of the first two frames: a whole number of chunks
    future = torch.randn(3, 1, 2, layout.seq_len - past, 8, generator=generator) * 5
    changed = [torch.cat([x[:, :, :past], new], 2) for x, new in zip((q, k, v), future)]
    before, aux = fs.sparse_attention(q, k, v, layout, builder, gate=gate_, backend=backend, return_aux=True)
    after, aux_after = fs.sparse_attention(*changed, layout, builder, gate=gate_, backend=backend, return_aux=True)
    assert torch.equal(before[:, :, :past], after[:, :, :past])
    assert torch.equal(aux.lse[:, :, :past], aux_after.lse[:, :, :past])
    assert not torch.equal(before[:, :, past:], after[:, :, past:])
    if aux.coarse_out is not None and aux_after.coarse_out is not None:
        rows = layout.num_tiles // 2
        assert torch.equal(aux.coarse_out[:, :, :rows], aux_after.coarse_out[:, :, :rows])


def test_the_future_gets_no_gradient_from_the_past_through_either_stage() -> None:
    layout = fs.TileLayout(grid=(4, 4, 4), tile=(1, 4, 4))
    q, k, v = (torch.randn(1, 2, 64, 8, requires_grad=True) for _ in range(3))
    gate = torch.randn(1, 2, 64, 8)
    builder = fs.VSA(top_k=2, within=fs.FrameCausal(chunk=2))
    out = fs.sparse_attention(q, k, v, layout, builder, gate=gate)
    out[:, :, :32].sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert bool((x.grad[:, :, 32:] == 0).all()) and bool((x.grad[:, :, :32] != 0).any())


def test_an_allowed_row_of_one_tile_is_full_and_its_coarse_output_that_tiles_mean() -> None:
    layout = fs.TileLayout(grid=(3, 4, 4), tile=(1, 4, 4))
    q, k, v = torch.randn(3, 1, 1, 48, 8, dtype=torch.float64).unbind()
    builder = fs.VSA(top_k=3, within=fs.FrameCausal(chunk=1))
    _, aux = fs.sparse_attention(q, k, v, layout, builder, return_aux=True)
    assert aux.selection.counts[0, 0].tolist() == [1, 2, 3]
    torch.testing.assert_close(aux.coarse_out[0, 0, 0], v[0, 0, :16].mean(0))  # type: ignore[index]
    assert not math.isnan(float(aux.density))
