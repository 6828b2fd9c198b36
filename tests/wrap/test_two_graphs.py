"""Whatever the builder, a wrapped model costs two graphs for any number of resolutions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import flexsparse as fs

VSA, WINDOW = fs.VSA(top_k=2), fs.SlidingTile(window=(1, 3, 3))
BUILDERS: dict[str, Any] = {
    "SlidingTile": WINDOW,
    "VSA within": fs.VSA(top_k=2, within=WINDOW),
    "PerHead": fs.PerHead(builders=(VSA, WINDOW), heads=(0, 1)),
    "VSA": VSA,
    "VSA by sparsity": fs.VSA(sparsity=0.6),
    "TopP": fs.TopP(mass=0.5),
    "BSA": fs.BSA(),
    "Radial": fs.Radial(),
    "FrameCausal": fs.FrameCausal(chunk=2),
    "Union": fs.Union(VSA, WINDOW),
    "Intersection": fs.Intersection(fs.TopP(mass=0.5), fs.Radial(first_frames=1)),
    "Dense": fs.Union(VSA, fs.Dense()),
}


class Video(nn.Module):
    """One attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.qkv, self.out = nn.Conv3d(3, 32, 1), nn.Linear(32, 96), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Stack(nn.Module):
    """Blocks whose first is given a view."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv3d(3, 32, 1)
        self.blocks, self.out = nn.ModuleList(Block() for _ in range(3)), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).permute(0, 2, 3, 4, 1).contiguous().flatten(1, 3)  # a view, contiguous
        for block in self.blocks:
            tokens = block(tokens)
        return self.out(tokens)


class Block(nn.Module):
    """One attention of a stack."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("without_gradients", (torch.no_grad, torch.inference_mode))
def test_a_region_costs_two_graphs_whatever_its_first_block_is_given(without_gradients: Any) -> None:
    """Dynamo tells a view from what is none."""
    model = Stack()
    reference = copy.deepcopy(model)
    fs.wrap(model, VSA, tile=(1, 4, 4), inner="aot_eager", compile="regional")
    fs.wrap(reference, VSA, tile=(1, 4, 4), compile=False)
    counters.clear()
    for grid in ((4, 8, 8), (6, 8, 12), (9, 12, 8)):
        x = torch.randn(2, 3, *grid)
        with without_gradients():
            torch.testing.assert_close(model(x), reference(x), atol=1e-5, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("name", BUILDERS)
def test_any_number_of_resolutions_costs_two_graphs(name: str) -> None:
    torch.manual_seed(0)
    model, reference = Video(), Video()
    reference.load_state_dict(model.state_dict())
    fs.wrap(model, BUILDERS[name], tile=(1, 4, 4), inner="aot_eager")
    fs.wrap(reference, BUILDERS[name], tile=(1, 4, 4), compile=False, attention="reference")
    counters.clear()
    with torch.no_grad():
        for grid in ((4, 8, 8), (6, 8, 12), (9, 12, 8), (3, 20, 16)):  # windows wider and narrower than the grid
            x = torch.randn(2, 3, *grid)
            torch.testing.assert_close(model(x), reference(x), atol=1e-5, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 2
