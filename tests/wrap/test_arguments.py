"""A compiled module gets the very arguments that it is given: what it asks of them, and writes to them, is as uncompiled."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flexsparse as fs

from .conftest import Block, Stranger

WAYS: list[Any] = [True, "regional"]
ALL = fs.VSA(sparsity=0.0)


def clip(B: int = 1) -> Tensor:
    return torch.randn(B, 3, 6, 16, 16, generator=torch.Generator().manual_seed(B))[:, :, 1:5]


class Model(Stranger):
    """Its blocks are called by a function of their own."""

    def __init__(self, block: type[Block], call: Any) -> None:
        super().__init__()
        self.blocks, self.call = nn.ModuleList(block(32, 2) for _ in range(2)), call

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            h = self.call(block, h)
        return self.head(h)


class WithContext(Block):
    def forward(self, x: Tensor, context: Any) -> Tensor:
        context = context["context"] if isinstance(context, dict) else context
        return super().forward(x) * (1 if context is x else 3)


class OfDict(Block):
    def forward(self, state: dict[str, Any]) -> None:  # type: ignore[override]
        state["x"] = super().forward(state["x"])


class Caching(Block):
    def forward(self, x: Tensor, cache: list[Any]) -> Tensor:
        cache.append(super().forward(x))
        return cache[0] * len(cache)


class ByStrides(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.as_strided(x.shape, x.stride())) * (2 if x.is_contiguous() else 3)


def _in_dict(block: nn.Module, x: Tensor) -> Tensor:
    state = {"x": x}
    block(state)
    return state["x"]


def _with_cache(block: nn.Module, x: Tensor) -> Tensor:
    cache: list[Any] = []
    return block(x, cache) + len(cache)


def _of_a_slice(block: nn.Module, x: Tensor) -> Tensor:
    """Its input is not dense: a slice of more tokens, of two samples."""
    return block(torch.cat([x, torch.zeros_like(x[:, :5])], 1)[:, :-5])


KINDS = {
    "given twice": (WithContext, lambda block, x: block(x, x)),
    "in a dict as well": (WithContext, lambda block, x: block(x, {"context": x})),
    "a dict that it writes to": (OfDict, _in_dict),
    "a list that it writes to": (Caching, _with_cache),
    "a slice": (ByStrides, _of_a_slice),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_of_a_block(kind: str, way: Any) -> None:
    """With gradients and without, where a region's arguments are tensors of their own."""
    torch.manual_seed(0)
    model = Model(*KINDS[kind])
    x = clip(2)
    expected = model(x).detach()
    fs.wrap(model, ALL, grid=(4, 8, 8), gates=kind != "a dict that it writes to", compile=way, inner="aot_eager")
    torch.testing.assert_close(model(x).detach(), expected, atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["given twice", "a slice"])
def test_a_region_given_one_tensor_twice_is_sparse(kind: str) -> None:
    """Two tensors of one view were taken for two sequences: cross-attention, which stays dense."""
    torch.manual_seed(0)
    model = Model(*KINDS[kind])
    plain = fs.wrap(copy.deepcopy(model), fs.VSA(top_k=1), grid=(4, 8, 8), compile=False, attention="reference")
    fs.wrap(model, fs.VSA(top_k=1), grid=(4, 8, 8), compile="regional", inner="aot_eager")
    torch.testing.assert_close(model(clip()), plain(clip()), atol=1e-5, rtol=0)
    assert all(call.sparse for call in fs.report(model).calls)


class OfBatch(Stranger):
    """Takes a dict, and puts into it what it computed."""

    def forward(self, batch: dict[str, Any]) -> None:  # type: ignore[override]
        x = batch["video"]
        scale = getattr(x, "guidance", 1) * (2 if x.is_leaf else 1) * (1 if x.is_contiguous() else 3)
        batch["out"] = super().forward(x) * scale
        batch["calls"] = batch.get("calls", 0) + 1


@pytest.mark.parametrize("gates", [False, True])
def test_of_the_model(gates: bool) -> None:
    model = OfBatch()
    x = clip()
    x.guidance = 3.0  # type: ignore[attr-defined]
    expected: dict[str, Any] = {"video": x}
    model(expected)
    fs.wrap(model, ALL, grid=(4, 8, 8), gates=gates, inner="aot_eager")
    batch: dict[str, Any] = {"video": x}
    model(batch)
    assert batch["video"] is x and batch["calls"] == 1
    torch.testing.assert_close(batch["out"], expected["out"], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("other", ["eager", "aot_eager", "inductor"])
def test_what_says_the_grid_is_not_dropped_by_another_compiler(other: str) -> None:
    """Nothing uses the result of what says it, as it has none."""
    model = fs.wrap(Stranger(depth=1), ALL, inner="aot_eager")
    with pytest.raises(RuntimeError, match="compiled by another backend, which would leave its attention dense"):
        torch.compile(model, backend=other)(clip())
