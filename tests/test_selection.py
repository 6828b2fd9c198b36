"""Selections: bitmasks, lists, transposes, density, and what FlexAttention makes of them."""

import dataclasses
import itertools

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, cases
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import flexsparse as fs
from flexsparse.block_lists import _block_columns, _block_lists, block_lists
from flexsparse.selection import TileSelection
from flexsparse.tile_bits import ascending_lists, pack_bits, unpack_bits


@given(st.integers(1, 130), st.integers(0, 1000))
def test_bits_round_trip_at_any_length(M: int, seed: int) -> None:
    keep = torch.rand(2, 3, M, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = pack_bits(keep)
    assert bits.dtype == torch.int32 and bits.shape == (2, 3, max(2, -(-M // 32)))
    assert torch.equal(unpack_bits(bits, M), keep)


@pytest.mark.parametrize("m", (0, 1, 30, 31, 32, 63, 64))
def test_each_bit_has_its_documented_place(m: int) -> None:
    keep = torch.zeros(65, dtype=torch.bool)
    keep[m] = True
    words = [int(word) & 0xFFFFFFFF for word in pack_bits(keep)]
    assert words == [1 << (m % 32) if word == m // 32 else 0 for word in range(3)]
    assert unpack_bits(pack_bits(torch.ones(32, dtype=torch.bool)), 32).all()


@given(cases(cross=True), st.floats(0, 1))
def test_lists_are_the_kept_tiles_ascending_and_in_range(case: Case, share: float) -> None:
    keep = case.keep(share, empty=True)
    selection = TileSelection.from_mask(keep, case.layout, case.kv_layout)
    M = case.kv_layout.num_tiles
    assert selection.kv_indices.dtype == selection.kv_counts.dtype == torch.int32
    assert selection.kv_indices.shape == (*keep.shape[:3], M)
    assert int(selection.kv_indices.min()) >= 0 and int(selection.kv_indices.max()) < M
    for place in itertools.product(*map(range, keep.shape[:3])):
        expected = keep[place].nonzero()[:, 0].tolist()
        assert selection.kv_indices[place][: selection.kv_counts[place]].tolist() == expected


@given(cases(cross=True), st.floats(0, 1))
def test_from_lists_inverts_the_lists_whatever_stands_past_a_count(case: Case, share: float) -> None:
    selection = case.selection(share, empty=True)
    lists = selection.kv_indices
    past = torch.arange(lists.shape[-1]) >= selection.kv_counts[..., None]
    again = TileSelection.from_lists(lists.masked_fill(past, -7), selection.kv_counts, case.layout, case.kv_layout)
    assert torch.equal(again.bits, selection.bits) and torch.equal(again.counts, selection.counts)


@given(cases(cross=True), st.floats(0, 1))
def test_a_transpose_lists_for_each_kv_tile_the_rows_that_keep_it(case: Case, share: float) -> None:
    keep = case.keep(share, empty=True)
    transposed = TileSelection.from_mask(keep, case.layout, case.kv_layout).transpose()
    for b, h, m in itertools.product(*map(range, (case.B, case.H, case.kv_layout.num_tiles))):
        assert transposed.rows(b, h, m).tolist() == keep[b, h, :, m].nonzero()[:, 0].tolist()
    assert len(transposed.indices) == int(transposed.counts.sum()) == int(keep.sum())


@given(cases(cross=True))
def test_density_is_the_share_of_token_pairs(case: Case) -> None:
    keep = case.keep()
    selection = TileSelection.from_mask(keep, case.layout, case.kv_layout)
    expected = oracle.token_mask(keep, case.layout, case.kv_layout).double().mean()
    assert selection.density == pytest.approx(float(expected), rel=1e-12)


@given(cases())
def test_density_with_pruned_queries_counts_the_computed_ones(case: Case) -> None:
    q, k, _ = case.qkv()
    selection = fs.BSA(kv_density=0.4).select(q, k, case.layout)
    assert selection.queries is not None
    mask = oracle.token_mask(selection.keep(), case.layout)
    computed = selection.queries.source == torch.arange(case.layout.seq_len)  # a kept token is its own source
    expected = (mask & computed[..., None]).double().mean()
    assert selection.density == pytest.approx(float(expected), rel=1e-12)


@given(cases(cross=True))
def test_to_dense_shows_extra_tiles_as_dense_rows_and_columns(case: Case) -> None:
    keep = case.keep(empty=True)
    dense = TileSelection.from_mask(keep, case.layout, case.kv_layout).to_dense()
    q, kv = case.layout, case.kv_layout
    assert dense.shape == (case.B, case.H, q.total_tiles, kv.total_tiles)
    rows = slice(q.tiles_first, q.tiles_first + q.num_tiles)
    columns = slice(kv.tiles_first, kv.tiles_first + kv.num_tiles)
    assert torch.equal(dense[:, :, rows, columns], keep)
    rest = dense.clone()
    rest[:, :, rows, columns] = True
    assert rest.all()


@given(cases(cross=True))
def test_a_selection_round_trips_through_a_block_mask(case: Case) -> None:
    selection = case.selection(empty=True)
    mask = selection.to_block_mask()
    assert torch.equal(mask.to_dense().bool(), selection.to_dense())
    assert (case.layout.slots, case.kv_layout.slots) == mask.BLOCK_SIZE
    full = int(mask.full_kv_num_blocks.sum())  # type: ignore[union-attr]
    whole = selection.to_dense() & (torch.tensor(oracle.counts(case.kv_layout)) == case.kv_layout.slots)
    assert full == int(whole.sum())
    lists = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    theirs = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=mask.BLOCK_SIZE)
    for kind in ("", "full_"):  # what lies past a count is nobody's
        for name in (f"{kind}q_num_blocks", f"{kind}q_indices"):
            assert getattr(mask, name).dtype == torch.int32 and getattr(mask, name).is_contiguous()
        counts = getattr(mask, f"{kind}q_num_blocks")
        assert torch.equal(counts, getattr(theirs, f"{kind}q_num_blocks"))
        listed = torch.arange(selection.to_dense().shape[2]) < counts[..., None]
        ours, expected = (getattr(each, f"{kind}q_indices")[listed] for each in (mask, theirs))
        assert torch.equal(ours, expected)


def tiled_inputs(selection: TileSelection, D: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Raster q, k, v and the oracle's output of a selection."""
    generator = torch.Generator().manual_seed(3)
    B, H = selection.counts.shape[:2]
    q = torch.randn(B, H, selection.layout.seq_len, D, generator=generator)
    k, v = (torch.randn(B, H, selection.kv_layout.seq_len, D, generator=generator) for _ in range(2))
    mask = oracle.token_mask(selection.keep(), selection.layout, selection.kv_layout)
    expected, _ = oracle.attention(q.double(), k.double(), v.double(), mask, D**-0.5)
    return q, k, v, expected, mask


PARTIAL = Case(
    fs.TileLayout(grid=(2, 5, 7), tile=(2, 4, 4), text_last=5),
    fs.TileLayout(grid=(2, 5, 7), tile=(2, 4, 4), text_last=5),
    *(2, 2, 2, 16, torch.float32, 1.0, 11),
)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("compiled", (False, True))
def test_flex_attention_is_sparse_with_the_block_mask_compiled_or_not(compiled: bool, fresh_dynamo: None) -> None:
    """Uncompiled FlexAttention reads no lists, so that the ``mask_mod`` must hold the selection too."""
    selection = PARTIAL.selection()
    q, k, v, expected, mask = tiled_inputs(selection)
    run = torch.compile(flex_attention, fullgraph=True, dynamic=False) if compiled else flex_attention
    layout = PARTIAL.layout
    out = run(*(layout.to_tiles(x) for x in (q, k, v)), block_mask=selection.to_block_mask())
    assert float(mask.double().mean()) < 0.8
    torch.testing.assert_close(layout.to_raster(out).double(), expected, rtol=1e-5, atol=1e-5)


def test_lists_made_in_the_graph_that_reads_them_are_not_seen_empty(fresh_dynamo: None) -> None:
    """A captured scatter of the same graph is read from before the scatter; the opaque op prevents that."""
    layout = PARTIAL.layout
    keep = PARTIAL.keep()
    q, k, v, expected, _ = tiled_inputs(PARTIAL.selection())

    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        mask = TileSelection.from_mask(keep, layout).to_block_mask()
        tiles = (layout.to_tiles(x).contiguous() for x in (q, k, v))
        return layout.to_raster(flex_attention(*tiles, block_mask=mask))

    out = torch.compile(attend, fullgraph=True, dynamic=False)(q, k, v, keep)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_buffers_of_a_block_mask_share_no_memory() -> None:
    lists = block_lists(PARTIAL.selection())
    tensors = [x for x in lists if isinstance(x, Tensor)]
    assert len({x.untyped_storage().data_ptr() for x in tensors}) == len(tensors)
    assert all(x.is_contiguous() for x in tensors)


def test_the_buffers_of_a_block_mask_are_no_table_of_the_layout() -> None:
    """The counts of a single sample are the layout's, which are cached: a graph may write into what an op returned."""
    layout = fs.TileLayout(grid=(3, 5, 4), tile=(2, 2, 4))
    lists = block_lists(fs.Dense().select(*torch.randn(2, 1, 1, layout.seq_len, 8), layout))
    assert lists.tile_counts.untyped_storage().data_ptr() != layout.tile_counts.untyped_storage().data_ptr()


@pytest.mark.parametrize("per_sample", (False, True))
def test_block_lists_keep_their_promises_to_the_compiler(per_sample: bool) -> None:
    counts = PARTIAL.layout.tile_counts
    B = PARTIAL.selection().bits.shape[0]
    override = (counts - torch.arange(B)[:, None]).clamp_min(0).to(torch.int32) if per_sample else None
    selection = dataclasses.replace(PARTIAL.selection(), tile_counts=override)
    torch.library.opcheck(_block_lists, (*selection.operands(), "call"))
    lists = block_lists(selection)
    torch.library.opcheck(_block_columns, (lists.table, lists.tile_counts, PARTIAL.layout.slots))


@given(st.integers(1, 70), st.integers(0, 99))
def test_lists_cut_at_their_longest_row_lose_nothing(M: int, seed: int) -> None:
    keep = torch.rand(4, M, generator=torch.Generator().manual_seed(seed)) < 0.3
    longest = int(keep.sum(-1).max())
    lists = ascending_lists(keep, longest)
    assert lists.shape == (4, longest)
    for row in range(4):
        assert lists[row, : int(keep[row].sum())].tolist() == keep[row].nonzero()[:, 0].tolist()


def test_a_mask_or_list_that_does_not_fit_is_refused() -> None:
    layout = fs.TileLayout(grid=(2, 4, 4), tile=(2, 2, 2))
    with pytest.raises(ValueError, match=r"keep has shape \(1, 1, 4, 5\).*\[B, H, 4, 4\]"):
        TileSelection.from_mask(torch.ones(1, 1, 4, 5, dtype=torch.bool), layout)
    indices = torch.zeros(1, 1, 4, 2, dtype=torch.int32)
    for bad in (indices + 4, indices - 1):
        with pytest.raises(ValueError, match=r"kv_indices holds (4 to 4|-1 to -1): give tiles in \[0, 4\)"):
            TileSelection.from_lists(bad, torch.full((1, 1, 4), 2, dtype=torch.int32), layout)
    for count in (3, -1):
        with pytest.raises(ValueError, match=rf"kv_counts holds {count} to {count}: give 0 to 2"):
            TileSelection.from_lists(indices, torch.full((1, 1, 4), count, dtype=torch.int32), layout)
    for rows in (3, 9):
        with pytest.raises(ValueError, match=r"kv_indices has shape \(1, 1, \d, 2\): give \[B, H, 4, K\]"):
            TileSelection.from_lists(indices[:, :, :1].expand(1, 1, rows, 2), torch.ones(1, 1, rows).int(), layout)
    with pytest.raises(ValueError, match=r"kv_counts has shape \(1, 4\) and kv_indices \(1, 1, 4, 2\): give"):
        TileSelection.from_lists(indices, torch.ones(1, 4).int(), layout)
    with pytest.raises(TypeError, match=r"kv_indices is torch\.float32: give int32"):
        TileSelection.from_lists(indices.float(), torch.ones(1, 1, 4).int(), layout)
    with pytest.raises(TypeError, match=r"kv_counts is torch\.bool: give int32"):
        TileSelection.from_lists(indices, torch.ones(1, 1, 4).bool(), layout)
