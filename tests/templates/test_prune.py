"""The pruning kernel in Triton's interpreter against its twin in plain torch: the same choice, slot by slot."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flexsparse import TileLayout
from flexsparse.compile_passes.templates import prune
from flexsparse.compile_passes.templates.launch import count_launches
from flexsparse.masks import BSA
from flexsparse.masks.windows import window_in
from flexsparse.ops.prune_queries import prune_reference
from flexsparse.ops.windows import window_table

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # numpy, where a product is NaN
]

ODD = TileLayout(grid=(3, 5, 6), tile=(2, 3, 3), text_first=5, text_last=17)  # 32 slots for 18 tokens, borders
WIDE = TileLayout(grid=(4, 4, 8), tile=(4, 4, 8))
WINDOWS = ((2, 2, 2), (2, 1, 3), None)
OPTIONS: tuple[tuple[Any, str, str], ...] = (
    (0.5, "representative", "center"),
    (0.3, "nearest", "center"),
    (0.1, "zero", "medoid"),
    (torch.tensor(0.75, dtype=torch.float64), "nearest", "medoid"),
)


def both(layout: TileLayout, q: Tensor, window: Any, share: Any, fill: str, representative: str) -> None:
    """Runs both; the choice must be the same, sums alike."""
    tables = window_table(layout.grid, layout.sides, window_in(layout, window), q.device)
    packed = BSA(keep_queries=0.75, window=window).packed(layout)
    sizes = (layout.tiles_first * layout.slots, layout.seq_len, packed, fill, representative)
    tiles = layout.video(layout.to_tiles(q))
    if layout.whole:  # heads inside of tokens, as a model in tile order has them
        tiles = q.transpose(1, 2).contiguous().transpose(1, 2).unflatten(2, (layout.num_tiles, layout.slots))
    given = (tiles, *tables, layout.index()[0], share, *sizes)
    with count_launches() as names:
        mine = prune.prune(*given)
    assert names == ["prune_kernel"]
    theirs = prune_reference(*given)
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-5, atol=1e-4, equal_nan=True)
    for name, one, two in zip(("kept", "counts", "source", "position"), mine[1:], theirs[1:]):
        assert one.dtype == torch.int32 and torch.equal(one, two), name
    raster = q.transpose(1, 2).contiguous().transpose(1, 2)
    for run, expected in ((prune.prune, mine), (prune_reference, theirs)):
        found = run(raster, *given[1:], layout.slots)
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0, equal_nan=True)
        assert all(torch.equal(one, two) for one, two in zip(found[1:], expected[1:], strict=True))


def queries(layout: TileLayout, kind: str, dtype: torch.dtype = torch.float32, D: int = 20) -> Tensor:
    q = torch.randn(1, 2, layout.seq_len, D)
    if kind == "whole numbers":  # exact products: equal cosines are equal everywhere, and ties are many
        q = q.round()
    if kind == "equal":
        q = torch.ones_like(q)
    if kind == "not finite":
        q[:, :, layout.seq_len // 2, 3] = math.nan
        q[:, 1, layout.seq_len // 3, 1] = math.inf
        q[:, :, -1] = 0
    return q.to(dtype)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: f"{option[1]}-{option[2]}")
@pytest.mark.parametrize("window", WINDOWS)
def test_the_choice_is_that_of_plain_torch(window: Any, option: tuple[Any, str, str]) -> None:
    both(ODD, queries(ODD, "random"), window, *option)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: f"{option[1]}-{option[2]}")
@pytest.mark.parametrize("kind", ("whole numbers", "equal"))
def test_ties_go_to_the_lowest_slot(kind: str, option: tuple[Any, str, str]) -> None:
    both(ODD, queries(ODD, kind), (2, 2, 2), *option)


@pytest.mark.parametrize("option", OPTIONS[:2], ids=lambda option: f"{option[1]}-{option[2]}")
def test_what_is_not_finite_ranks_as_in_plain_torch(option: tuple[Any, str, str]) -> None:
    both(ODD, queries(ODD, "not finite"), (2, 2, 2), *option)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_tiles_of_128_slots_in_tile_order_and_low_precision(dtype: torch.dtype) -> None:
    both(WIDE, queries(WIDE, "random", dtype, D=96), (2, 2, 2), *OPTIONS[0])


@pytest.mark.parametrize("tile", ((1, 1, 1), (3, 5, 4), (4, 8, 8)))
def test_one_token_a_tile_that_fills_no_power_of_two_and_256_slots(tile: tuple[int, int, int]) -> None:
    layout = TileLayout(grid=tile, tile=tile)
    both(layout, queries(layout, "random", D=8), (2, 2, 2), *OPTIONS[0])


def test_the_share_is_taken_in_float64() -> None:
    layout = TileLayout(grid=(1, 1, 20), tile=(1, 1, 20))
    for share in (0.1, 0.1 + 1e-12):  # ten tokens: one, and two; float32 cannot tell them apart
        both(layout, queries(layout, "random", D=8), (1, 1, 10), share, "representative", "center")


def test_compilations_name_every_argument_once() -> None:
    auto, all_of_them = prune.compilations(False), prune.compilations(True)
    assert len(auto) <= 10 and all(x.auto for x in auto)
    assert len({str(x.config) for x in all_of_them}) == len(all_of_them) > len(auto)
    for x in all_of_them:
        assert set(x.constants) == {name for name, kind in x.signature.items() if kind == "constexpr"}
        assert set(x.aligned) <= set(x.signature)
