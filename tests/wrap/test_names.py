"""Builders and dense layers by name, however a model's code reaches its modules."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flexsparse as fs
from flexsparse.compile_passes import RewriteError

GRID, TILE, C = (4, 4, 8), (2, 2, 4), 32
FULL, ONE = fs.VSA(top_k=8), fs.VSA(top_k=1)
WAYS = [True, "regional", False]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(C, 3 * C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (2 * self.qkv(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Residual(nn.Module):
    """A block whose attention is called as words of Dynamo's own."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(C), fn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(self.norm(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(Attention()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Ordered(Model):
    """Its blocks are in a plain list, too, and one has a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.order = list(self.blocks)[:2]
        self.head = self.blocks[2]
        self.by_name = {"first": self.order[0]}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.order[1](self.by_name["first"](x)))


class Direct(Model):
    """Calls the forward of its modules, which torch does not record."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block.fn.forward(block.norm(x))
        return x


def video() -> Tensor:
    return torch.randn(1, 128, C, generator=torch.Generator().manual_seed(0))


def wrap(model: nn.Module, builder: Any, way: Any, **options: Any) -> nn.Module:
    how = {} if way is False else {"inner": "aot_eager"}
    return fs.wrap(model, builder, grid=GRID, tile=TILE, compile=way, **how, **options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [Model, Ordered])
@torch.no_grad()
def test_rules_hold(kind: type[Model], way: Any) -> None:
    """Compiled, the way to a module was taken for its name: other rules held, and layers that were to be dense were sparse."""
    torch.manual_seed(0)
    model = kind()
    expected = wrap(copy.deepcopy(model), {"blocks.1.fn": ONE, "*": FULL}, False, attention="reference")(video())
    out = wrap(copy.deepcopy(model), {"blocks.1.fn": ONE, "*": FULL}, way)(video())
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    ended = wrap(copy.deepcopy(model), ONE, way, dense_layers=[0, -1])
    torch.testing.assert_close(ended(video()), expected, atol=1e-5, rtol=0)
    states = {call.name.split("::")[-1]: call.sparse for call in fs.report(ended).calls}
    assert sorted(states.values()) == [False, False, True] or way == "regional"
    assert not torch.allclose(wrap(copy.deepcopy(model), ONE, way)(video()), expected, atol=1e-3)


class Bracketed(nn.Module):
    """A block whose name is a pattern that does not match it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({"a[0]": Residual(Attention()), "b": Residual(Attention())})

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks["b"](self.blocks["a[0]"](x))


@torch.no_grad()
def test_a_name_as_it_is_names_its_module() -> None:
    torch.manual_seed(0)
    model = wrap(Bracketed(), {"blocks.a[0]": None, "*": ONE}, False)
    model(video())
    assert {call.name.split(".")[1]: call.sparse for call in fs.report(model).calls}["a[0]"] is False


@torch.no_grad()
def test_a_call_whose_module_is_not_known_is_an_error_where_names_count() -> None:
    torch.manual_seed(0)
    model = Direct()
    expected = wrap(copy.deepcopy(model), ONE, False, dense_layers=["blocks.0.fn"])(video())
    for rules in ({"blocks.0.fn": None, "*": ONE}, {"blocks.0": FULL, "*": ONE}):
        with pytest.raises(RewriteError, match=r"in which module of Direct .* not known .*call its modules"):
            wrap(copy.deepcopy(model), rules, True)(video())
    uncompiled = wrap(copy.deepcopy(model), {"blocks.0.fn": FULL, "*": ONE}, False)
    torch.testing.assert_close(uncompiled(video()), expected, atol=1e-5, rtol=0)
    assert wrap(copy.deepcopy(model), ONE, True)(video()).isfinite().all(), "one builder for all needs no names"


@pytest.mark.parametrize("way", WAYS)
def test_outputs_may_be_written_in_place_and_are_the_models_own(way: Any) -> None:
    """Uncompiled they were views, made where nothing may be written, and a dataclass got other tensors than its own."""

    @dataclass
    class Out:
        sample: Tensor
        scale: Tensor

    class Scaled(Model):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Any:
            out = super().forward(x) * self.scale
            return out if way is True else Out(out, self.scale)

    torch.manual_seed(0)
    model = Scaled()
    gradients = []
    for each in (wrap(copy.deepcopy(model), FULL, way), model):
        out = each(video())
        if way is not True:
            assert out.scale is each.scale
            out = out.sample
        out += 1
        out.square().sum().backward()
        gradients.append([parameter.grad for parameter in each.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-4)
