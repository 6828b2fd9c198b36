"""What a selection holds in memory at the sizes of real videos, told by fake tensors: nothing is computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import flexsparse as fs
from flexsparse.compile_passes import FuseSelection
from flexsparse.compile_passes.views import MOST_INDICES
from flexsparse.masks.coarse import CoarseInputs
from flexsparse.tile_bits import words_of

from .capture import nodes_of, ops

aten = torch.ops.aten
GRID, HEADS = (40, 48, 80), 40
TILES = 2400


def selected(builder: Any, B: int = 1, kv_heads: int = HEADS) -> GraphModule:
    """What is traced of a selection, of fake tiles of 128 channels."""
    layout = fs.TileLayout(grid=GRID)

    def select(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        found = builder.plan(CoarseInputs(q, k, layout, layout, scale=0.1), None)[0]
        return found.bits, found.counts

    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k = (torch.empty(B, H, TILES, layout.slots, 128, dtype=torch.bfloat16) for H in (HEADS, kv_heads))
        return make_fx(select, pre_dispatch=True, _allow_non_fake_inputs=True)(q, k)


@pytest.mark.parametrize("kv_heads", (HEADS, 8))
@pytest.mark.parametrize("builder", (fs.VSA(sparsity=0.95), fs.TopP(mass=0.9)), ids=("VSA", "TopP"))
def test_the_coarse_stage_of_a_large_batch_is_one_op(builder: Any, kv_heads: int) -> None:
    """Scores of 40x48x80 tokens, 16 samples and 40 heads are 15 GB: as an op's they are never made."""
    assert MOST_INDICES < 16 * HEADS * TILES * 128
    gm = selected(builder, 16, kv_heads)
    fuse = FuseSelection()
    fuse(gm)
    assert fuse.matches == 1 and nodes_of(gm, ops.coarse_select)
    assert not [node for node in gm.graph.nodes if node.target in (aten.matmul.default, aten.bmm.default)]


VSA, WINDOW = fs.VSA(top_k=120), fs.SlidingTile(window=(3, 3, 3))


@pytest.mark.parametrize(
    ("builder", "capacity"),
    [
        (fs.Union(VSA, WINDOW), 120 + 27),
        (fs.Intersection(VSA, WINDOW), 27),
        (fs.PerHead(builders=(VSA, WINDOW), heads=(0, 1) * 20), 120),
    ],
    ids=("Union", "Intersection", "PerHead"),
)
def test_a_combination_is_made_of_words_and_its_lists_are_as_long_as_its_parts_allow(
    builder: Any, capacity: int
) -> None:
    """A bool for each tile of each row is 0.2 GB, as int32, which packing makes of it, 0.9 GB; for each sample and call."""
    gm = selected(builder)
    FuseSelection()(gm)
    whole = [
        x for node in gm.graph.nodes if isinstance(x := node.meta.get("val"), Tensor) and not x.is_floating_point()
    ]
    assert max(x.numel() for x in whole) <= HEADS * TILES * words_of(TILES)
    layout = fs.TileLayout(grid=GRID)
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k = (torch.empty(1, HEADS, TILES, layout.slots, 128, dtype=torch.bfloat16) for _ in "qk")
        assert builder.plan(CoarseInputs(q, k, layout, layout, scale=0.1), None)[0].capacity == capacity


def test_a_density_takes_a_head_at_a_time() -> None:
    layout = fs.TileLayout(grid=GRID)
    with FakeTensorMode(allow_non_fake_inputs=True):
        bits = torch.empty(1, HEADS, TILES, words_of(TILES), dtype=torch.int32)
        selection = fs.TileSelection(bits=bits, counts=bits[..., 0], layout=layout, kv_layout=layout, capacity=120)
        gm = make_fx(lambda bits: replace(selection, bits=bits).valid_pairs(), _allow_non_fake_inputs=True)(bits)
    sizes = [x.numel() for node in gm.graph.nodes if isinstance(x := node.meta.get("val"), Tensor)]
    assert max(sizes) <= words_of(TILES) * max(32 * TILES, HEADS * TILES)
