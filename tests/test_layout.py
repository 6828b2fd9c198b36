"""Tile layouts: permutations, counts, automatic tiles, closed forms against loops."""

import dataclasses
import itertools
import math
import threading
from typing import Any

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import layouts
from torch import Tensor

import flexsparse as fs
from flexsparse import TileLayout, nn, tables
from flexsparse.masks.static import _cached_mask
from flexsparse.ops.windows import window_table
from flexsparse.tables import TABLES, auto_tile, slots_of, tables_in_order, tile_index, token_tables

AXIS = st.integers(1, 70)


def tokens(layout: TileLayout) -> Tensor:
    """``[S, 1]``: 1 + the raster index of each token, so that padding (0) is no token."""
    return torch.arange(1, layout.seq_len + 1)[:, None]


@given(layouts())
def test_tile_order_puts_every_token_where_walking_the_tiles_puts_it(layout: TileLayout) -> None:
    tiled = layout.to_tiles(tokens(layout))[:, 0]
    expected = torch.zeros(layout.padded_len, dtype=torch.int64)
    for token, (tile, slot) in enumerate(oracle.places(layout)):
        expected[tile * layout.slots + slot] = token + 1
    assert torch.equal(tiled, expected)


@given(layouts())
def test_to_raster_inverts_to_tiles_and_padding_is_zero(layout: TileLayout) -> None:
    x = torch.randn(2, 3, layout.seq_len, 4)
    tiled = layout.to_tiles(x)
    assert tiled.shape == (2, 3, layout.padded_len, 4)
    assert torch.equal(layout.to_raster(tiled), x)
    slot_to_token, token_to_slot, _ = layout.index()
    assert bool((tiled[:, :, slot_to_token < 0] == 0).all())
    assert torch.equal(slot_to_token[token_to_slot], torch.arange(layout.seq_len, dtype=torch.int32))
    assert int((slot_to_token >= 0).sum()) == layout.seq_len


@given(layouts())
def test_to_tiles_and_to_raster_are_adjoint(layout: TileLayout) -> None:
    x = torch.randn(layout.seq_len, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(layout.padded_len, 3, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(layout.to_tiles(x), x, y.detach())
    (dy,) = torch.autograd.grad(layout.to_raster(y), y, x.detach())
    assert torch.equal(dx, layout.to_raster(y))
    assert torch.equal(dy, layout.to_tiles(x))


@given(layouts())
def test_counts_are_those_of_the_walk_and_sum_to_the_sequence(layout: TileLayout) -> None:
    assert layout.tile_counts.dtype == torch.int32
    assert layout.tile_counts.tolist() == oracle.counts(layout)
    assert int(layout.tile_counts.sum()) == layout.seq_len
    assert len(layout.tile_counts) == layout.tiles_first + layout.num_tiles + layout.tiles_last
    assert layout.padded_len == len(layout.tile_counts) * layout.slots


@given(layouts())
def test_the_video_slots_are_those_of_the_video_tiles(layout: TileLayout) -> None:
    video = layout.video(layout.to_tiles(tokens(layout)))
    assert video.shape == (layout.num_tiles, layout.slots, 1)
    first = layout.text_first
    assert sorted(video[video > 0].tolist()) == list(range(first + 1, first + math.prod(layout.grid) + 1))


@pytest.mark.parametrize(("tile", "slots"), [((1, 1, 1), 16), ((2, 3, 3), 32), ((4, 4, 4), 64), ((1, 8, 9), 128)])
def test_slots_are_a_power_of_two_of_at_least_sixteen(tile: tuple[int, int, int], slots: int) -> None:
    assert TileLayout(grid=(5, 5, 5), tile=tile).slots == slots


def padded(grid: tuple[int, int, int], tile: tuple[int, int, int]) -> int:
    return math.prod(-(-extent // side) for extent, side in zip(grid, tile)) * slots_of(tile)


@given(st.tuples(st.integers(1, 24), AXIS, AXIS), st.sampled_from((16, 64, 128)))
def test_an_automatic_tile_is_the_best_of_all_that_its_contract_allows(grid: tuple[int, int, int], slots: int) -> None:
    usable = []
    for tile in itertools.product(*(range(1, min(extent, slots) + 1) for extent in grid)):
        sides = [side for side, extent in zip(tile, grid) if side != extent]  # a whole axis may be shorter
        if math.prod(tile) <= slots and all(max(tile) <= 2 * side for side in sides):
            usable.append(tile)
    if math.prod(grid) >= slots:
        usable = [tile for tile in usable if 2 * math.prod(tile) > slots or slots == 16] or usable
    best = min(usable, key=lambda tile: (padded(grid, tile), max(tile) / min(tile), tile))
    assert auto_tile(grid, slots) == best


def test_the_automatic_tile_of_a_480p_video_pads_under_eight_per_cent() -> None:
    layout = TileLayout(grid=(21, 30, 52), tile="auto")
    assert layout.padded_len / layout.seq_len - 1 < 0.08
    assert TileLayout(grid=(21, 30, 52), tile=(4, 4, 4)).padded_len / layout.seq_len - 1 > 0.21


def test_layouts_are_values() -> None:
    layout = TileLayout(grid=(4, 6, 8), tile="auto", text_last=3)
    same = TileLayout(grid=(4, 6, 8), tile=layout.tile, text_last=3)
    assert layout == same and hash(layout) == hash(same)
    assert layout.index()[0] is same.index()[0]
    assert layout != TileLayout(grid=(4, 8, 6), tile=layout.tile, text_last=3)


def test_landscape_and_portrait_of_one_length_are_permuted_differently() -> None:
    wide, tall = TileLayout(grid=(1, 4, 8), tile=(1, 4, 4)), TileLayout(grid=(1, 8, 4), tile=(1, 4, 4))
    x = torch.arange(32.0)[:, None]
    assert wide.padded_len == tall.padded_len
    assert not torch.equal(wide.to_tiles(x), tall.to_tiles(x))


def test_a_nan_token_stays_alone() -> None:
    layout = TileLayout(grid=(1, 3, 5), tile=(1, 2, 2))
    x = torch.ones(layout.seq_len, 2)
    x[0] = float("nan")
    assert int(layout.to_tiles(x).isnan().any(-1).sum()) == 1


@pytest.mark.parametrize("dtype", (torch.bool, torch.int64, torch.bfloat16, torch.float64))
def test_any_dtype_is_reordered_exactly(dtype: torch.dtype) -> None:
    layout = TileLayout(grid=(2, 3, 5), tile=(2, 2, 2), text_first=2)
    x = (torch.randn(layout.seq_len, 4) * 3).to(dtype)
    assert torch.equal(layout.to_raster(layout.to_tiles(x)), x)


def test_the_reordering_is_differentiable_twice() -> None:
    layout = TileLayout(grid=(1, 3, 3), tile=(1, 2, 2), text_last=2)
    x = torch.randn(layout.seq_len, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layout.to_tiles(x).square(), x)


@pytest.mark.parametrize("which", ("token", "slot", "count"))
@pytest.mark.parametrize("extra", ((0, 0), (5, 0), (17, 33)))
def test_tile_index_keeps_its_promises_to_the_compiler(extra: tuple[int, int], which: str) -> None:
    torch.library.opcheck(tile_index, ((3, 4, 5), (2, 2, 2), *extra, which, torch.device("cpu")))


@pytest.mark.parametrize("which", TABLES)
def test_what_a_graph_does_to_an_index_tensor_changes_no_other(which: str) -> None:
    """Inductor writes other results into what an op returned: a cached tensor would be wrong from the second call on."""
    arguments = ((3, 4, 5), (2, 2, 2), 2, 0, which, torch.device("cpu"))
    before = tile_index(*arguments).clone()
    tile_index(*arguments).zero_()
    assert torch.equal(tile_index(*arguments), before)


def test_tokens_in_tile_order_stay_where_they_are() -> None:
    raster = TileLayout(grid=(4, 4, 6), tile=(2, 2, 3), slots=16, text_last=16)
    layout = dataclasses.replace(TileLayout(grid=(4, 4, 6), tile=(2, 4, 2), text_last=16), order="tiles")
    x = torch.randn(2, layout.seq_len, 3)
    assert layout.to_tiles(x) is x and layout.to_raster(x) is x
    slot_to_token, token_to_slot, counts = layout.index()
    assert torch.equal(slot_to_token, torch.arange(layout.padded_len, dtype=torch.int32))
    assert torch.equal(token_to_slot, slot_to_token)
    assert torch.equal(counts, dataclasses.replace(layout, order="raster").tile_counts)
    assert layout != dataclasses.replace(layout, order="raster")
    with pytest.raises(ValueError, match=r"x has shape"):
        layout.to_tiles(x[:, 1:])
    with pytest.raises(ValueError, match=r"order is 'tiles', but tiles of \(2, 2, 3\) do not fill grid \(4, 4, 6\)"):
        dataclasses.replace(raster, order="tiles")  # 12 tokens in 16 slots
    with pytest.raises(ValueError, match="order is 'rows'"):
        TileLayout(grid=(4, 4, 4), order="rows")


@pytest.mark.parametrize(
    "builder", (fs.VSA(top_k=2), fs.BSA(keep_queries=0.5, kv_density=0.5), fs.FrameCausal(chunk=2))
)
@pytest.mark.parametrize("backend", ("reference", "gather"))
def test_attention_in_tile_order_is_attention_in_raster_order(builder: fs.masks.MaskBuilder, backend: str) -> None:
    layout = TileLayout(grid=(4, 4, 6), tile=(2, 4, 2), text_last=16)
    tiles = dataclasses.replace(layout, order="tiles")
    q, k, v, gate = (torch.randn(1, 2, layout.seq_len, 8) for _ in range(4))
    gates = {"gate": gate} if builder.has_coarse else {}
    expected, aux = fs.sparse_attention(q, k, v, layout, builder, backend=backend, return_aux=True, **gates)
    gates = {name: layout.to_tiles(x) for name, x in gates.items()}
    out, own = fs.sparse_attention(
        *map(layout.to_tiles, (q, k, v)), tiles, builder, backend=backend, return_aux=True, **gates
    )
    torch.testing.assert_close(layout.to_raster(out), expected)
    torch.testing.assert_close(layout.to_raster(own.lse[..., None])[..., 0], aux.lse)
    assert torch.equal(own.selection.bits, aux.selection.bits)


def test_a_compiled_reordering_is_the_eager_one(fresh_dynamo: None) -> None:
    layout = TileLayout(grid=(2, 3, 5), tile=(2, 2, 2), text_first=2)
    x = torch.randn(2, layout.seq_len, 4, requires_grad=True)
    compiled = torch.compile(lambda x: layout.to_tiles(x) * 2, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    assert torch.equal(out, layout.to_tiles(x) * 2)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    torch.testing.assert_close(grad, 8 * x.detach())


@pytest.mark.parametrize("order", ["raster", "tiles"])
def test_counts_that_somebody_writes_to_are_theirs(order: str) -> None:
    """They were the cached table of every such layout: shortened for one sample, all calls after it were wrong."""
    sizes: dict[str, Any] = {"grid": (4, 8, 8), "tile": (4, 4, 4), "text_last": 64, "order": order}
    expected = TileLayout(**sizes).tile_counts.clone()
    TileLayout(**sizes).tile_counts.fill_(3)
    assert torch.equal(TileLayout(**sizes).tile_counts, expected)
    assert torch.equal(TileLayout(**sizes).index()[2], expected)


def test_what_is_cached_for_cuda_is_made_in_a_thread_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the thread in which torch warms up a CUDA graph, the graph takes all memory that stays."""
    threads, moved = [], tables._moved

    def move(tensors: Any, device: torch.device, dtype: torch.dtype) -> Any:
        threads.append(threading.get_ident())
        return moved(tensors, torch.device("cpu"), dtype)

    monkeypatch.setattr(tables, "_moved", move)
    layout = fs.TileLayout(grid=(4, 4, 4), tile=(2, 2, 4))
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        threads.clear()
        token_tables.__wrapped__((4, 4, 4), (2, 2, 2), 0, 0, device)
        window_table.__wrapped__((4, 4, 4), (2, 2, 2), (2, 2, 2), device)
        tables_in_order.__wrapped__(4, 16, device)
        _cached_mask.__wrapped__(fs.Radial(), layout, layout, device)
        nn._cached_frequencies.__wrapped__(layout, 16, device)
        assert len(threads) >= 4 and (threading.get_ident() in threads) == (device.type == "cpu")
