"""`KeepTiles` where a model writes to tokens in place: whichever op made the view, and whatever does the writing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import flexsparse as fs
from flexsparse.compile_passes import KeepTiles
from flexsparse.compile_passes.token_dims import memory_of, written_by

GRID, C, S, D = (4, 4, 8), 32, 128, 16
Change = Callable[[Tensor], Any]


def rising(size: int) -> Tensor:
    return torch.linspace(1.0, 2.0, size)


def redone(q: Tensor) -> None:
    """A checkpointed function writes to what it is given."""

    def scaled(x: Tensor) -> Tensor:
        return x.mul_(2.0) + 1

    checkpoint(scaled, q, use_reentrant=False)


CHANGES: dict[str, Change] = {
    "some tokens": lambda q: q.narrow(2, 0, 5).mul_(3.0),
    "one token": lambda q: q.select(2, 7).mul_(3.0),
    "their transpose": lambda q: q.mT.mul_(rising(S)),
    "dimensions swapped": lambda q: q.swapdims(1, 2).mul_(rising(S)[None, :, None, None]),
    "a diagonal": lambda q: q.diagonal(0, 2, 3).mul_(3.0),
    "windows": lambda q: q.unfold(2, 2, 2).mul_(rising(S // 2)[:, None, None]),
    "their data": lambda q: q.data.mul_(rising(S)[:, None]),
    "a list of tensors": lambda q: torch._foreach_mul_([q], 2.0),
    "an input by name": lambda q: F.relu_(input=q),
    "a checkpointed function": redone,
    "inplace, by its place": lambda q: F.hardtanh(q, -0.3, 0.3, True),
}


class Model(nn.Module):
    """Two attentions; the second one's queries are changed in place."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.first, self.second, self.change = nn.Linear(C, 3 * C), nn.Linear(C, 3 * C), change

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            q, k, v = layer(x).unflatten(-1, (3, 2, D)).permute(2, 0, 3, 1, 4).unbind(0)
            q = q.contiguous()
            if layer is self.second:
                self.change(q)
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Why the pass left calls as they were."""
    torch._dynamo.reset()
    found: list[str] = []
    original = KeepTiles.__call__

    def call(self: KeepTiles, gm: Any) -> Any:
        result = original(self, gm)
        found.extend(self.refused.values())
        return result

    monkeypatch.setattr(KeepTiles, "__call__", call)
    yield found
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_what_is_written_to_queries_is_read(name: str, refused: list[str]) -> None:
    """It was written to a copy in raster order, and attention read queries without it."""
    torch.manual_seed(0)
    model, x = Model(CHANGES[name]), torch.randn(1, S, C)
    how = {"grid": GRID, "tile": (2, 2, 4)}
    expected = fs.wrap(copy.deepcopy(model), fs.VSA(top_k=2), compile=False, **how)(x)
    out = fs.wrap(copy.deepcopy(model), fs.VSA(top_k=2), inner="aot_eager", **how)(x)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert len(refused) == 2 and all("writes in place" in reason for reason in refused)


@torch.no_grad()
def test_the_same_model_keeps_tiles_where_nothing_is_written(refused: list[str]) -> None:
    model = fs.wrap(Model(lambda q: q.mul(2.0)), fs.VSA(top_k=2), inner="aot_eager", grid=GRID, tile=(2, 2, 4))
    model(torch.randn(1, S, C))
    assert not refused


def test_a_triton_kernel_may_write_to_all_that_it_is_given() -> None:
    """A rotary embedding in place; or a norm into ``torch.empty_like(q)``, which attention read before it was written."""
    graph = torch.fx.Graph()
    x, y, z = (graph.placeholder(name) for name in "xyz")
    for node in (x, y, z):
        node.meta["example_value"] = torch.empty(2)
    given = {"kernel_idx": 0, "constant_args_idx": 0, "grid": [(1, 1, 1)], "tma_descriptor_metadata": {}}
    kernel = torch.ops.higher_order.triton_kernel_wrapper_mutation
    assert written_by(graph.call_function(kernel, (), {**given, "kwargs": {"a": x, "b": y}})) == [x, y]
    assert memory_of(x).isdisjoint(memory_of(y))
