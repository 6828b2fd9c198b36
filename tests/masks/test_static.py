"""Static builders against loops over tiles, and what they cost."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import layouts
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import flexsparse as fs

CPU = torch.device("cpu")
At = tuple[int, int, int]


def tiles(layout: fs.TileLayout) -> list[At]:
    return list(itertools.product(*(range(-(-extent // side)) for extent, side in zip(layout.grid, layout.sides))))


def mask_of(builder: fs.masks.StaticBuilder, layout: fs.TileLayout, kv_layout: fs.TileLayout) -> Tensor:
    q = torch.zeros(2, 3, layout.seq_len, 4)
    k = torch.zeros(2, 3, kv_layout.seq_len, 4)
    keep = builder.select(q, k, layout, kv_layout=kv_layout).keep()
    assert bool((keep == keep[:1, :1]).all())
    return keep[0, 0]


@given(layouts(), layouts(), st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)))
def test_a_sliding_window_is_centred_and_moves_inwards_at_borders(
    layout: fs.TileLayout, kv_layout: fs.TileLayout, window: At
) -> None:
    mask = mask_of(fs.SlidingTile(window=window), layout, kv_layout)
    have = [-(-extent // side) for extent, side in zip(kv_layout.grid, kv_layout.sides)]
    own = [-(-extent // side) for extent, side in zip(layout.grid, layout.sides)]
    for row, kept in zip(tiles(layout), mask):
        spans = []
        for at, width, n, m in zip(row, window, have, own):
            centre = math.floor((at + 0.5) / m * n + 1e-9)
            start = max(0, min(centre - width // 2, n - width))
            spans.append(range(start, min(start + width, n)))
        expected = [all(x in span for x, span in zip(column, spans)) for column in tiles(kv_layout)]
        assert kept.tolist() == expected
    assert bool((mask.sum(-1) == math.prod(map(min, window, have))).all())


@given(layouts(largest=(40, 5, 5)), st.integers(0, 2))
def test_radial_halves_its_band_when_the_temporal_distance_doubles(layout: fs.TileLayout, first: int) -> None:
    mask = mask_of(fs.Radial(first_frames=first), layout, layout)
    frame = layout.tiles[1] * layout.tiles[2]
    for (qt, qh, qw), kept in zip(tiles(layout), mask):
        expected = []
        for kt, kh, kw in tiles(layout):
            r = 1
            while 2 * r <= abs(qt - kt):
                r *= 2
            away = abs((qh * layout.tiles[2] + qw) - (kh * layout.tiles[2] + kw))
            every = -(-r // frame)
            same_place = away == 0 and abs(qt - kt) % every == 0
            expected.append((away + 1) * r <= frame or same_place or kt < first)
        assert kept.tolist() == expected
    assert bool(mask.diagonal().all())


@given(layouts(), layouts(), st.integers(1, 3))
def test_no_chunk_of_frames_sees_a_later_one(layout: fs.TileLayout, kv_layout: fs.TileLayout, times: int) -> None:
    chunk = math.lcm(layout.sides[0], kv_layout.sides[0]) * times
    mask = mask_of(fs.FrameCausal(chunk=chunk), layout, kv_layout)
    for (qt, _, _), kept in zip(tiles(layout), mask):
        chunks = [kt * kv_layout.sides[0] // chunk for kt, _, _ in tiles(kv_layout)]
        assert kept.tolist() == [other <= qt * layout.sides[0] // chunk for other in chunks]


@given(layouts(), st.integers(1, 6))
def test_a_chunk_that_cuts_a_tile_is_refused(layout: fs.TileLayout, chunk: int) -> None:
    assume(chunk % layout.sides[0])
    x = torch.zeros(1, 1, layout.seq_len, 4)
    with pytest.raises(ValueError, match=rf"chunk is {chunk} frames.*give a multiple of {layout.sides[0]}"):
        fs.FrameCausal(chunk=chunk).select(x, x, layout)


def test_radial_on_grids_of_other_frames_is_refused() -> None:
    layout, other = (
        fs.TileLayout(grid=(2, 4, 4), tile=(1, 2, 2)),
        fs.TileLayout(grid=(2, 6, 4), tile=(1, 2, 2)),
    )
    with pytest.raises(ValueError, match=r"queries have \(2, 2\) tiles a frame and keys \(3, 2\)"):
        mask_of(fs.Radial(), layout, other)


def test_dense_keeps_every_tile() -> None:
    layout = fs.TileLayout(grid=(2, 5, 4), tile=(1, 2, 2))
    assert bool(mask_of(fs.Dense(), layout, layout).all())
    assert fs.Dense().nominal_density(layout, layout) == 1


def test_a_static_mask_is_built_once_for_a_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    build = fs.SlidingTile.tile_mask

    def counting(self: fs.SlidingTile, *args: object) -> Tensor:
        calls.append(args)
        return build(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(fs.SlidingTile, "tile_mask", counting)
    for _ in range(3):  # builders and layouts that are equal, not the same
        layout = fs.TileLayout(grid=(5, 7, 11), tile=(1, 2, 2))
        mask_of(fs.SlidingTile(window=(1, 3, 1)), layout, layout)
    assert len(calls) == 1


class Near(fs.masks.StaticBuilder):
    """Of a user, who may change what it keeps."""

    def __init__(self, reach: Any) -> None:
        self.reach = reach

    def tile_mask(self, layout: fs.TileLayout, kv_layout: fs.TileLayout, device: torch.device) -> Tensor:
        rows, columns = (torch.arange(one.num_tiles, device=device) for one in (layout, kv_layout))
        return (rows[:, None] - columns).abs() <= self.reach[0]


@dataclasses.dataclass
class Unhashable(Near):
    reach: Any


@dataclasses.dataclass(frozen=True)
class Holder(Near):
    reach: Any


@pytest.mark.parametrize("kind", (Near, Unhashable, Holder))
@pytest.mark.parametrize("make", (list, torch.tensor))
def test_a_static_builder_that_may_change_is_asked_at_every_call(kind: type[Near], make: Any) -> None:
    """Its mask was kept by the object, or the object had no hash to keep it by."""
    layout = fs.TileLayout(grid=(4, 8, 8), tile=(2, 2, 2))
    x = torch.zeros(1, 1, layout.seq_len, 4)
    builder = kind(make([1]))
    for each in (builder, fs.VSA(sparsity=0, within=builder), fs.Union(builder, fs.SlidingTile(window=(1, 1, 1)))):
        for reach in (1, 3):
            builder.reach[0] = reach
            rows = torch.arange(layout.num_tiles)
            expected = (rows[:, None] - rows).abs() <= reach
            assert torch.equal(each.select(x, x, layout).keep()[0, 0], expected)


@pytest.mark.parametrize("builder", (fs.SlidingTile(window=(1, 3, 3)), fs.Radial(), fs.FrameCausal(chunk=2)))
def test_the_nominal_density_of_a_static_builder_is_the_one_it_has(builder: fs.masks.StaticBuilder) -> None:
    layout = fs.TileLayout(grid=(4, 8, 8), tile=(2, 2, 2))
    selection = builder.select(torch.zeros(1, 1, 256, 4), torch.zeros(1, 1, 256, 4), layout)
    assert selection.density == pytest.approx(builder.nominal_density(layout, layout))


@given(layout=layouts(), kv=st.none() | layouts(), window=st.tuples(*[st.integers(1, 4)] * 3), data=st.data())
@settings(max_examples=40)
def test_no_row_keeps_more_than_its_list_is_long(
    layout: fs.TileLayout, kv: fs.TileLayout | None, window: tuple[int, int, int], data: st.DataObject
) -> None:
    """``capacity`` is the longest row where that can be known, and `most` a bound of it in graphs."""
    sliding, other = fs.SlidingTile(window=window), fs.SlidingTile(window=(1, 2, 1))
    builders = [sliding, fs.Dense(), fs.Union(sliding, other), fs.Intersection(sliding, other)]
    builders += [] if kv is not None else [fs.Radial(), fs.Union(fs.Radial(first_frames=1), other)]
    builder = data.draw(st.sampled_from(builders))
    keys = layout if kv is None else kv
    q, k = torch.zeros(2, 3, layout.seq_len, 4), torch.zeros(2, 3, keys.seq_len, 4)
    selection = builder.select(q, k, layout, kv_layout=kv)
    mask = builder.tile_mask(layout, keys, torch.device("cpu"))
    assert torch.equal(selection.keep(), mask.expand(2, 3, -1, -1))
    assert torch.equal(selection.counts, mask.sum(-1).int().expand(2, 3, -1))
    assert selection.capacity == max(1, int(mask.sum(-1).max())) <= max(1, builder.most(layout, keys))
    assert selection.bits.is_contiguous() and selection.counts.is_contiguous()


@pytest.mark.parametrize("first", (0, 2))
@pytest.mark.parametrize("grid", ((9, 8, 8), (40, 12, 8), (64, 4, 4)))
def test_radial_lists_are_as_long_as_its_widest_row(grid: tuple[int, int, int], first: int) -> None:
    layout, builder = fs.TileLayout(grid=grid, tile=(1, 2, 2)), fs.Radial(first_frames=first)
    widest = int(builder.kept(layout, layout).max())
    assert widest <= builder.most(layout, layout) < layout.num_tiles
    assert builder.most(layout, layout) - widest <= layout.tiles[0]  # a place in the middle of an even frame


def test_a_mask_of_all_heads_is_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 153,600 tokens and 40 heads, a bool for each pair of tiles of each head would be 230 MB a call."""
    layout = fs.TileLayout(grid=(8, 16, 16))
    counts = layout.index("cpu")[2].clone()
    counts[-1] = 0
    sizes: list[int] = []
    own = torch.ops.flexsparse.pack_tiles

    def watched(keep: Tensor) -> Any:
        sizes.append(keep.numel())
        return own(keep)

    monkeypatch.setattr(torch.ops.flexsparse, "pack_tiles", watched)
    x = torch.zeros(2, 5, layout.seq_len, 4)
    for given_ in (None, counts, counts.repeat(2, 1)):
        selection = fs.SlidingTile().select(x, x, layout, tile_counts=given_)
        assert selection.keep()[..., -1].any() == (given_ is None)
    assert sizes == [32 * 32, 2 * 32 * 32]


class Largest(TorchFunctionMode):
    """The most numbers of a tensor that a function is given or makes. (Under a dispatch mode nothing is cached.)"""

    numbers = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(x.numel() for x in tree_leaves((args, out)) if isinstance(x, Tensor))])
        return out


@pytest.mark.parametrize(
    "builder",
    [
        fs.SlidingTile(window=(3, 3, 3)),
        fs.Radial(),
        fs.VSA(sparsity=0.5, within=fs.SlidingTile(window=(3, 3, 3))),
        fs.BSA(kv_density=0.5, within=fs.FrameCausal(chunk=4)),
    ],
    ids=lambda builder: type(builder).__name__,
)
def test_a_density_reads_no_mask_a_second_time(builder: Any) -> None:
    """Reports ask at every call of an uncompiled model, and a mask has a number for each pair of tiles."""
    layout = fs.TileLayout(grid=(8, 16, 16))
    first = builder.nominal_density(layout, layout)
    with Largest() as largest:
        assert builder.nominal_density(layout, layout) == first
    windows = 8 if isinstance(builder, fs.BSA) else 1  # of a tile
    assert 0 < largest.numbers <= windows * layout.num_tiles < layout.num_tiles**2
