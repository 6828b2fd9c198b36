"""BSA's own kernels on a GPU: choosing, packing and unpacking queries, against plain torch on the CPU; the same bits twice.

Everything here needs a CUDA device and is skipped without one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flexsparse as fs
from flexsparse.masks.bsa import prune_queries
from flexsparse.packing import pack_queries, unpack_lse, unpack_rows
from flexsparse.selection import KeptQueries

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
WHOLE = ("attention_forward", "attention_training")
LAYOUTS = {
    "whole tiles": fs.TileLayout(grid=(4, 8, 16), tile=(4, 4, 8)),
    "tile order": fs.TileLayout(grid=(4, 8, 16), tile=(4, 4, 8), order="tiles"),
    "partial tiles and text": fs.TileLayout(grid=(5, 6, 9), tile=(4, 4, 4), text_first=3, text_last=70),
    "60 of 64 slots": fs.TileLayout(grid=(5, 9, 7), tile=(3, 5, 4)),
    "256 slots": fs.TileLayout(grid=(5, 9, 8), tile=(4, 8, 8)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "nearest": {"fill": "nearest", "keep_queries": 0.3},
    "medoid": {"representative": "medoid", "fill": "zero"},
    "whole tile": {"window": None, "keep_queries": 0.2},
}


def queries(layout: fs.TileLayout, dtype: torch.dtype, D: int = 64) -> Tensor:
    """Whole numbers: products and sums are exact, so that the CPU and the GPU rank alike, ties included."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(-3, 4, (1, 2, layout.seq_len, D), generator=generator).to(dtype)


def heads_inside(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.guards(*WHOLE, "select")
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("option", ["default", "nearest", "whole tile"])
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_the_choice_of_queries(name: str, option: str, dtype: torch.dtype, D: int) -> None:
    layout, builder = LAYOUTS[name], fs.BSA(**OPTIONS[option])
    found: list[list[Tensor]] = []
    for device in ("cpu", "cuda"):
        kept, mean = prune_queries(builder, layout.video(layout.to_tiles(queries(layout, dtype, D).to(device))), layout)
        found.append([x.cpu() for x in (kept.counts, kept.kept, kept.source, kept.position, mean)])
    for theirs, mine in zip(*found):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def selected(layout: fs.TileLayout, option: str) -> fs.TileSelection:
    q = torch.randn(1, 2, layout.seq_len, 16, generator=torch.Generator().manual_seed(4))
    return fs.BSA(kv_density=0.5, **OPTIONS[option]).select(q, q, layout)


def moved(selection: fs.TileSelection) -> fs.TileSelection:
    queries = selection.queries
    assert queries is not None
    fields = [x.cuda() for x in (queries.kept, queries.counts, queries.source, queries.position)]
    how = {"layout": selection.layout, "kv_layout": selection.kv_layout, "capacity": selection.capacity}
    return fs.TileSelection(
        bits=selection.bits.cuda(), counts=selection.counts.cuda(), queries=KeptQueries(*fields), **how
    )


@pytest.mark.guards(*WHOLE)
@pytest.mark.parametrize("D", [64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("option", list(OPTIONS))
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_packing_and_unpacking_with_gradients(name: str, option: str, dtype: torch.dtype, D: int) -> None:
    layout, selection = LAYOUTS[name], selected(LAYOUTS[name], option)
    on_gpu = moved(selection)
    x, g = (torch.randn(1, 2, layout.seq_len, D).to(dtype) for _ in range(2))

    def there_and_back(selection: fs.TileSelection, device: str, tiled: bool) -> list[Tensor]:
        q = heads_inside(x.to(device)).requires_grad_()
        rows = pack_queries(q, layout.to_tiles(q) if tiled else None, selection)
        out = unpack_rows(rows, selection, like=q)
        (dq,) = torch.autograd.grad(out, q, heads_inside(g.to(device)))
        lse = unpack_lse(rows.float().sum(-1), selection)
        return [y.detach().cpu() for y in (rows, out, dq, lse)]

    theirs = there_and_back(selection, "cpu", False)
    for tiled in (False, True):
        mine, again = there_and_back(on_gpu, "cuda", tiled), there_and_back(on_gpu, "cuda", tiled)
        for index, (a, b, c) in enumerate(zip(mine, theirs, again)):
            assert torch.equal(a, c)
            if index < 3:
                assert torch.equal(a, b)  # the same additions in the same order, rounded once
            else:
                torch.testing.assert_close(a, b)


@pytest.mark.guards(*WHOLE)
@pytest.mark.parametrize("kv_tile", [(4, 4, 4), (4, 4, 8)])
def test_a_bsa_step_gives_the_same_bits_twice(kv_tile: tuple[int, int, int]) -> None:
    layout, keys = fs.TileLayout(grid=(8, 16, 16), tile=(4, 4, 8)), fs.TileLayout(grid=(8, 16, 16), tile=kv_tile)
    generator = torch.Generator(device="cuda").manual_seed(5)
    how = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    q, k, v, g = (heads_inside(torch.randn(2, 4, layout.seq_len, 128, **how)) for _ in range(4))
    runs = []
    for _ in range(3):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = fs.sparse_attention(*leaves, layout, fs.BSA(kv_density=0.2), kv_layout=keys)
        runs.append([out.detach(), *torch.autograd.grad(out, leaves, g)])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other))
