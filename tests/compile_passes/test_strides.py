"""What compilers say of strides that passes have to see through."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import flexsparse as fs
from flexsparse.compile_passes import KeepTiles, strides
from flexsparse.compile_passes.gathers import alike as lie_alike
from flexsparse.compile_passes.lower_flex import _lies_as


@pytest.mark.parametrize(("heads", "alike"), ((1, True), (2, False)))
def test_the_stride_of_a_dimension_of_one_does_not_count(heads: int, alike: bool) -> None:
    """Of one head, as a rank may have, torch says now one stride, now another: both are contiguous."""
    with FakeTensorMode():
        x = torch.empty(2, heads, 8, 4)
        turned = torch.empty(2, 8, heads, 4).transpose(1, 2)
    assert turned.stride() != x.stride()
    assert _lies_as(turned, x) == alike and lie_alike(turned, x) == alike


class ByStrides(nn.Module):
    """Asks tensors for their strides, as code does that calls a kernel of its own."""

    def __init__(self, attentions: int) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(32, 96) for _ in range(attentions))

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.qkv:
            q, k, v = linear(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
            out = F.scaled_dot_product_attention(q, k, v)
            x = x + torch.as_strided(out, out.shape, out.stride()).transpose(1, 2).flatten(2)
        return x


@pytest.mark.parametrize("dynamic", [None, True])
@torch.no_grad()
def test_a_result_lies_as_the_graph_was_traced(dynamic: bool | None) -> None:
    """Dynamo puts the dense result's strides into the graph as numbers; the sparse one lay otherwise, and was misread."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = ByStrides(1), torch.randn(2, 3 * 6 * 7, 32)
    how = {"grid": (3, 6, 7), "tile": (2, 2, 4)}
    expected = fs.wrap(copy.deepcopy(model), fs.VSA(top_k=2), compile=False, **how)(x)
    out = fs.wrap(copy.deepcopy(model), fs.VSA(top_k=2), inner="aot_eager", dynamic=dynamic, **how)(x)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_tokens_are_not_kept_in_tile_order_where_strides_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    reasons: list[str] = []
    original: Callable[..., Any] = KeepTiles.__call__

    def call(self: KeepTiles, gm: Any) -> Any:
        result = original(self, gm)
        reasons.extend(self.refused.values())
        return result

    monkeypatch.setattr(KeepTiles, "__call__", call)
    model = fs.wrap(ByStrides(2), fs.VSA(top_k=2), inner="aot_eager", grid=(4, 4, 8), tile=(2, 2, 4))
    model(torch.randn(1, 128, 32))
    assert reasons == ["the graph reads tensors by their strides"] * 2


def test_which_ops_read_by_strides() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.call_method("contiguous", (x,))
    assert not strides.are_read(torch.fx.GraphModule(nn.Module(), graph))
    for target in (torch.as_strided, torch.ops.aten.as_strided.default):
        again = copy.deepcopy(graph)
        again.call_function(target, (next(iter(again.nodes)), (2,), (1,)))
        assert strides.are_read(torch.fx.GraphModule(nn.Module(), again))
    graph.call_function(torch.ops.higher_order.triton_kernel_wrapper_mutation, (), {"kwargs": {"a": x}})
    assert strides.are_read(torch.fx.GraphModule(nn.Module(), graph))
