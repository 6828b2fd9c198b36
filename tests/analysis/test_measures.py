"""Density, mass, recall and overlap against loops over tokens: odd grids, text, hidden text, GQA, pruned queries."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import flexsparse as fs
from flexsparse import TileLayout
from flexsparse.analysis import SparseCall, head_density, measures, overlap, recall, row_density, sample_rows, tile_mass

from . import slow

ODD = TileLayout(grid=(3, 5, 7), tile=(2, 3, 4))
TEXT = TileLayout(grid=(2, 5, 4), tile=(2, 2, 4), text_first=3, text_last=21)
BSA = fs.BSA(keep_queries=0.5, kv_density=0.4)
CASES: dict[str, tuple[TileLayout, Any, list[int] | None]] = {
    "odd grid": (ODD, fs.VSA(top_k=3), None),
    "odd grid, counts vary": (ODD, fs.TopP(mass=0.5), None),
    "text": (TEXT, fs.VSA(top_k=2), None),
    "hidden text": (TEXT, fs.VSA(top_k=2), [2, 0]),
    "pruned queries": (ODD, BSA, None),
    "pruned queries, hidden text": (TEXT, BSA, [1, 17]),
}


def sparse_call(layout: TileLayout, builder: Any, text: list[int] | None) -> SparseCall:
    """Two samples, four heads on two KV heads; hidden text is NaN; in the second sample all of the text is valid."""
    g = torch.Generator().manual_seed(5)
    q, k = torch.randn(2, 4, layout.seq_len, 8, generator=g), torch.randn(2, 2, layout.seq_len, 8, generator=g)
    selection = builder.select(q, k, layout)
    if text is not None:
        counts = layout.tile_counts.repeat(2, 1)
        for length, tiles in zip(text, (range(layout.tiles_first), range(-layout.tiles_last, 0))):
            for i, tile in enumerate(tiles):
                counts[0, tile] = min(max(length - i * layout.slots, 0), layout.slots)
        selection = replace(selection, tile_counts=counts)
        hidden = ~slow.valid_keys(selection)[0]
        assert int(hidden.sum()) == layout.text_first + layout.text_last - sum(text)
        k[0, :, hidden] = math.nan
    return SparseCall(name="x", q=q, k=k, scale=0.7, selection=selection)


@pytest.fixture(params=CASES)
def call(request: pytest.FixtureRequest) -> SparseCall:
    return sparse_call(*CASES[request.param])


def heads(call: SparseCall) -> list[tuple[int, int]]:
    return [(b, h) for b in range(2) for h in range(call.q.shape[1])]


def test_density(call: SparseCall) -> None:
    selection, rows, whole = call.selection, row_density(call.selection), head_density(call.selection)
    layout = selection.layout
    for b, h in heads(call):
        some, valid = slow.pairs(selection, b, h, slow.valid_keys(selection)[b].nonzero()[:, 0].tolist())
        assert float(whole[b, h]) == pytest.approx(some / valid, abs=1e-12)
        for tile in range(layout.num_tiles):
            some, valid = slow.pairs(selection, b, h, slow.tokens_of(selection, layout.tiles_first + tile))
            assert float(rows[b, h, tile]) == pytest.approx(some / valid, abs=1e-12)
    assert float(whole.min()) > 0 and float(whole.max()) < 1


def test_mean_of_the_heads_is_the_density_of_the_selection() -> None:
    for layout, builder, _ in CASES.values():
        call = sparse_call(layout, builder, None)
        assert float(head_density(call.selection).mean()) == pytest.approx(call.selection.density, abs=1e-12)


def some_rows(call: SparseCall) -> tuple[list[int], Tensor]:
    rows = sample_rows(call.selection.layout.num_tiles, 3)
    return rows, tile_mass(call.q, call.k, call.selection, rows, call.scale)


def test_mass_and_recall(call: SparseCall) -> None:
    rows, mass = some_rows(call)
    found, selection = recall(mass, call.selection, rows), call.selection
    dense, first = selection.to_dense(), selection.layout.tiles_first
    assert mass.dtype == torch.float32
    for b, h in heads(call):
        for i, tile in enumerate(rows):
            expected = slow.mass(call, b, h, tile)
            assert mass[b, h, i].tolist() == pytest.approx(expected, abs=1e-6)
            kept = sum(m for m, keep in zip(expected, dense[b, h, first + tile].tolist()) if keep)
            assert float(found[b, h, i]) == pytest.approx(kept, abs=1e-6)
    assert float(found.max()) < 0.999


@pytest.mark.parametrize("chunk", [1, 500])
def test_chunks_change_nothing(call: SparseCall, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Of one query token, and of some that are no whole tile."""
    _, whole = some_rows(call)
    monkeypatch.setattr(measures, "CHUNK", chunk)
    torch.testing.assert_close(some_rows(call)[1], whole, atol=1e-6, rtol=0)


def test_a_chunk_bounds_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    call, sizes = sparse_call(*CASES["text"]), []
    monkeypatch.setattr(measures, "CHUNK", 300)
    original = Tensor.softmax

    def softmax(x: Tensor, dim: int) -> Tensor:
        sizes.append(x.numel())
        return original(x, dim)

    monkeypatch.setattr(Tensor, "softmax", softmax)
    some_rows(call)
    assert 0 < max(sizes) <= 300


def test_all_tiles_hold_everything() -> None:
    call = sparse_call(TEXT, fs.VSA(top_k=TEXT.num_tiles), [2, 5])
    rows, mass = some_rows(call)
    torch.testing.assert_close(recall(mass, call.selection, rows), torch.ones(2, 4, 3), atol=1e-6, rtol=0)
    assert torch.equal(head_density(call.selection), torch.ones(2, 4, dtype=torch.float64))


def test_low_precision_is_measured_in_float32_and_double_in_double() -> None:
    call = sparse_call(*CASES["odd grid"])
    rows = [0, 4]
    low = tile_mass(call.q.bfloat16(), call.k.bfloat16(), call.selection, rows, call.scale)
    exact = tile_mass(call.q.bfloat16().double(), call.k.bfloat16().double(), call.selection, rows, call.scale)
    assert (low.dtype, exact.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(low.double(), exact, atol=1e-6, rtol=0)


def test_overlap(call: SparseCall) -> None:
    found = overlap(call.selection)
    for axis, name in enumerate(measures.AXES):
        for b, h in heads(call):
            expected = slow.overlap(call.selection, b, h, axis)
            assert float(found[name][b, h]) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_overlap_of_equal_disjoint_and_missing_neighbours() -> None:
    layout = TileLayout(grid=(1, 4, 4), tile=(1, 2, 2))
    keep = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
    found = overlap(fs.TileSelection.from_mask(keep[None, None], layout))
    assert [float(found[axis]) for axis in "hw"] == [0, 1] and math.isnan(float(found["t"]))


def test_sampled_rows_are_distinct_and_evenly_spread() -> None:
    for tiles in range(1, 30):
        for count in (1, 2, 7, 40):
            rows = sample_rows(tiles, count)
            assert len(set(rows)) == min(tiles, count) and rows == sorted(rows) and set(rows) <= set(range(tiles))
            gaps = [b - a for a, b in itertools.pairwise(rows)]
            assert not gaps or max(gaps) - min(gaps) <= 1
