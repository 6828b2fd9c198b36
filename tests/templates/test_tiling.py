"""Tiling and untiling against the twin in plain torch and against the layout: every row, and zeros in the padding."""

import math
import types

import pytest
import torch
from torch import Tensor

from flexsparse import TileLayout
from flexsparse.compile_passes.templates import tiling
from flexsparse.compile_passes.templates.launch import count_launches, launch

ODD = TileLayout(grid=(3, 5, 6), tile=(2, 3, 3), text_first=5, text_last=17)  # 32 slots for 18 tokens, borders
OTHER = TileLayout(grid=(2, 4, 4), tile=(2, 2, 4))  # 16 of 16 slots: no padding

pytestmark = pytest.mark.usefixtures("poisoned")


def exact(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        assert a.is_contiguous() and a.dtype == e.dtype
        assert torch.equal(a, e)


def tokens(layout: TileLayout, B: int, H: int, D: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, H, S, D], a view of [B, S, H, D] as a model has it."""
    return torch.randn(B, layout.seq_len, H, D).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("D", [8, 32, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_there_and_back(dtype: torch.dtype, D: int) -> None:
    x = tokens(ODD, 2, 3, D, dtype)
    forth, back, _ = ODD.index()
    tiled = tiling.tile_tokens([x], [forth])
    exact(tiled, tiling.gather_reference([x], [forth]))
    exact(tiled, [ODD.to_tiles(x)])
    raster = tiling.untile_tokens(tiled, [back])
    exact(raster, tiling.gather_reference(tiled, [back]))
    exact(raster, [x])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_tensors_of_different_lengths_and_heads_take_one_launch(count: int) -> None:
    layouts, heads = [ODD, OTHER, OTHER, ODD][:count], [4, 2, 1, 3][:count]
    xs = [tokens(layout, 2, H, 32) for layout, H in zip(layouts, heads)]
    forth, back = [layout.index()[0] for layout in layouts], [layout.index()[1] for layout in layouts]
    with count_launches() as names:
        tiled = tiling.tile_tokens(xs, forth)
        raster = tiling.untile_tokens(tiled, back)
    assert names == ["gather_tokens"] * 2
    exact(tiled, tiling.gather_reference(xs, forth))
    exact(raster, xs)


def test_tokens_that_are_not_finite_stay_where_they_are() -> None:
    x = tokens(ODD, 1, 2, 32)
    x[:, :, 0] = math.nan
    x[:, :, 1] = math.inf
    forth, back, _ = ODD.index()
    (tiled,) = tiling.tile_tokens([x], [forth])
    assert bool((tiled[:, :, forth < 0] == 0).all())
    assert bool(tiled[:, :, int(back[0])].isnan().all()) and int(tiled.isnan().sum()) == 2 * 32
    (raster,) = tiling.untile_tokens([tiled], [back])
    assert torch.equal(raster.nan_to_num(7.0), x.nan_to_num(7.0))


def test_padding_never_reaches_the_raster() -> None:
    forth, back, _ = ODD.index()
    tiled = torch.randn(1, 2, ODD.padded_len, 32)
    tiled[:, :, forth < 0] = math.nan
    (raster,) = tiling.untile_tokens([tiled], [back])
    assert bool(raster.isfinite().all())


@pytest.mark.parametrize(
    "view",
    [
        *("contiguous", "heads-in-between", "part-of-qkv", "expanded-heads", "part-of-tokens"),
        *("tokens-inside", "one-number"),
    ],
)
def test_any_strides(view: str) -> None:
    S, H, D = OTHER.seq_len, 2, 16
    x = {
        "contiguous": torch.randn(2, H, S, D),
        "heads-in-between": torch.randn(2, S, H, D).transpose(1, 2),
        "part-of-qkv": torch.randn(2, S, 3, H, D)[:, :, 1].transpose(1, 2),
        "expanded-heads": torch.randn(2, 1, S, D).expand(2, H, S, D),
        "part-of-tokens": torch.randn(2, H, S + 3, D + 4)[:, :, 2:-1, 1 : D + 1],
        "tokens-inside": torch.randn(2, H, D, S).transpose(2, 3),
        "one-number": torch.randn(1).expand(2, H, S, D),  # the gradient of a sum
    }[view]
    table = OTHER.index()[0]
    exact(tiling.tile_tokens([x], [table]), tiling.gather_reference([x], [table]))


def test_a_table_of_its_own_with_repeats_and_a_last_block_of_one_row() -> None:
    rows = tiling.config(torch.float32, 256)["ROWS"]
    x = torch.randn(1, 1, 5, 256)
    table = torch.randint(-1, 5, (2 * rows + 1,), dtype=torch.int32)
    exact(tiling.tile_tokens([x], [table]), tiling.gather_reference([x], [table]))


def test_nothing_to_do() -> None:
    table = torch.empty(0, dtype=torch.int32)
    with count_launches() as names:
        (out,) = tiling.tile_tokens([torch.randn(1, 2, 3, 16)], [table])
    assert out.shape == (1, 2, 0, 16) and names == []
    x = torch.randn(1, 2, 3, 16)
    table = torch.tensor([2, -1], dtype=torch.int32)
    exact(
        tiling.tile_tokens([x[:, :, :0], x], [table[:0], table]),
        tiling.gather_reference([x[:, :, :0], x], [table[:0], table]),
    )


@pytest.mark.parametrize("grid", [(1, 65536), (1, 1, 65536), (2**16, 2**15 - 1, 2), (2**15, 2**15, 4)])
def test_a_grid_that_no_gpu_takes_is_refused(grid: tuple[int, ...]) -> None:
    """Triton multiplies in 32 bits, and launches nothing where the product is not positive."""
    kernel = types.SimpleNamespace(fn=test_nothing_to_do)
    with count_launches() as names, pytest.raises(ValueError, match="test_nothing_to_do would run on a grid of"):
        launch(kernel, grid, torch.zeros(1))
    assert names == []


def test_what_does_not_go_together_is_refused() -> None:
    x, table = torch.randn(1, 2, 4, 16), torch.arange(4, dtype=torch.int32)
    cases = {
        "one to 4": ([x] * 5, [table] * 5),
        "a table for each": ([x, x], [table]),
        r"give \[B, H, S, D\]": ([x[0]], [table]),
        "one dtype, B and D": ([x, x.half()], [table] * 2),
        r"int32 \[rows\]": ([x], [table.long()]),
    }
    for message, (xs, tables) in cases.items():
        with pytest.raises(ValueError, match=message):
            tiling.tile_tokens(xs, tables)


def test_compilations_name_every_argument_once() -> None:
    auto, all_of_them = tiling.compilations(False), tiling.compilations(True)
    assert len(auto) <= 10 and all(x.auto for x in auto)
    assert len({str(x.config) for x in all_of_them}) == len(all_of_them) > len(auto)
    for x in all_of_them:
        assert set(x.constants) == {name for name, kind in x.signature.items() if kind == "constexpr"}
        assert set(x.aligned) <= set(x.signature)
