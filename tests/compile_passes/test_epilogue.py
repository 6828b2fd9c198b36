"""The gated coarse output is added by `tile_attention` itself, where nothing else reads what it is added to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from as_on_gpu import run_templates
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import flexsparse as fs
from flexsparse.compile_passes.epilogue import find_epilogue

from .capture import joint_graphs, nodes_of, ops

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
GRID, TILE, C, HEADS = (4, 8, 4), (2, 4, 2), 32, 2
B, H, N, ROWS, D = 2, 3, 4, 16, 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Conv3d(3, C, 1), Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.embed(x).flatten(2).transpose(1, 2))


def run(
    model: nn.Module, dtype: torch.dtype, training: bool, magnitude: float = 1.0, **options: Any
) -> tuple[list[Tensor], int]:
    """Output, with gradients where training; how many forwards took in the coarse output."""
    torch._dynamo.reset()
    model = copy.deepcopy(model)
    fs.wrap(model, fs.VSA(top_k=3), tile=TILE, grid=GRID, gates=["attention"], inner="aot_eager", **options)
    generator = torch.Generator().manual_seed(2)
    for parameter in fs.gate_parameters(model):
        nn.init.normal_(parameter, std=0.5, generator=generator)
    model = model.to(dtype)
    x = torch.randn(1, 3, *GRID, generator=torch.Generator().manual_seed(1)).mul(magnitude).to(dtype)
    with joint_graphs() as seen, torch.set_grad_enabled(training):
        out = model(x)
        found = [out.detach()]
        if training:
            found += torch.autograd.grad(out.square().sum(), list(model.parameters()))
    combined = sum(each.combined for each in set(seen.passes))
    if combined and training:
        check_gradients_come_from_the_op(seen.graphs[-1])
    return found, combined


def check_gradients_come_from_the_op(gm: GraphModule) -> None:
    """Those of gate and coarse output, and nothing else is made of the output's gradient."""
    for node in nodes_of(gm, ops.tile_attention_backward):
        assert None not in node.args[7:9]
        assert sorted(user.args[1] for user in node.users) == [0, 1, 2, 3, 4]
        assert list(node.args[0].users) == [node]


@pytest.mark.parametrize(
    ("dtype", "training", "combined"),
    [
        (torch.bfloat16, True, 1),
        (torch.float16, True, 1),
        (torch.float32, False, 1),
        (torch.float32, True, 0),  # its backward takes the fine stage's own output
    ],
)
def test_the_sum_is_made_in_the_op_and_is_the_same(dtype: torch.dtype, training: bool, combined: int) -> None:
    torch.manual_seed(0)
    model = Model()
    found, count = run(model, dtype, training)
    plain, none = run(model, dtype, training, keep_tiles=False)  # in raster order the coarse output is gathered
    exact, _ = run(model, torch.float64, training)
    assert (count, none) == (combined, 0)
    for mine, other, gold in zip(found, plain, exact):
        error, usual = ((x.double() - gold).square().mean().sqrt() for x in (mine, other))
        assert error <= 1.5 * usual + 4 * torch.finfo(dtype).eps * gold.square().mean().sqrt()


def test_the_templates_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their backward reads the sum, and takes the coarse output out of it: delta would cost dq its digits otherwise."""
    run_templates(monkeypatch)
    torch.manual_seed(0)
    model, wide = Model(), 4.0
    exact, _ = run(model, torch.float64, True, wide, attention="reference", lower_flex=False)
    mine, combined = run(model, torch.float16, True, wide)
    apart, none = run(model, torch.float16, True, wide, keep_tiles=False)
    assert (combined, none) == (1, 0)
    for one, other, gold in zip(mine, apart, exact):
        error, usual = ((x.double() - gold).square().mean().sqrt() for x in (one, other))
        assert error <= 1.5 * usual + 4 * torch.finfo(torch.float16).eps * gold.square().mean().sqrt()


def repeated(coarse: Tensor) -> Tensor:
    return coarse.unsqueeze(-2).expand(-1, -1, -1, ROWS, -1).flatten(2, 3)


Sum = Callable[[Tensor, Tensor, Tensor], Any]
TAKEN: dict[str, Sum] = {
    "as the library": lambda out, c, g: out + g * repeated(c).to(out.dtype),
    "turned around": lambda out, c, g: repeated(c).to(out.dtype) * g + out,
    "reshaped": lambda out, c, g: out + g * c.unsqueeze(3).expand(B, H, N, ROWS, D).reshape(B, H, -1, D).to(out.dtype),
}
LEFT: dict[str, Sum] = {
    "read elsewhere": lambda out, c, g: (out + g * repeated(c).to(out.dtype), out.sum()),
    "twice the coarse output": lambda out, c, g: torch.add(out, g * repeated(c).to(out.dtype), alpha=2),
    "less the coarse output": lambda out, c, g: out - g * repeated(c).to(out.dtype),
    "tiles in turn": lambda out, c, g: out + g * c.unsqueeze(2).expand(B, H, ROWS, N, D).flatten(2, 3).to(out.dtype),
    "another head's": lambda out, c, g: (
        out + g * repeated(c.flip(1)).transpose(1, 2).reshape(B, H, -1, D).to(out.dtype)
    ),
    "no gate of each token": lambda out, c, g: out + g[:, :, :1] * repeated(c).to(out.dtype),
    "a wider sum": lambda out, c, g: out + g * repeated(c),
    "no coarse output": lambda out, c, g: out + g,
    "the product read twice": lambda out, c, g: (p := g * repeated(c).to(out.dtype), out + p),
}


def epilogue_of(function: Sum, detached: bool, dtype: torch.dtype = torch.bfloat16) -> Any:
    with FakeTensorMode():
        tensors = torch.empty(B, H, N * ROWS, D, dtype=dtype), torch.empty(B, H, N, D), torch.empty(B, H, N * ROWS, D)

    def graph(out: Tensor, coarse: Tensor, gate: Tensor) -> Any:
        fine = out * 1
        saved = torch.ops.aten.detach(fine) if detached else coarse
        return function(fine, coarse, gate), saved

    gm = make_fx(graph)(*tensors[:2], tensors[2].to(dtype))
    out, coarse, gate = (n for n in gm.graph.nodes if n.op == "placeholder")
    return find_epilogue(next(iter(out.users)), ROWS), coarse, gate


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", TAKEN)
def test_the_sum_is_found(name: str, dtype: torch.dtype) -> None:
    found, coarse, gate = epilogue_of(TAKEN[name], False, dtype)
    assert found is not None and (found.coarse, found.gate, found.backward) == (coarse, gate, ())


@pytest.mark.parametrize("name", LEFT)
def test_another_sum_is_left(name: str) -> None:
    assert epilogue_of(LEFT[name], False)[0] is None


def test_a_sum_of_another_memory_format_is_left() -> None:
    """What follows was traced for that format."""

    def turned(out: Tensor, coarse: Tensor, gate: Tensor) -> Tensor:
        return gate.transpose(1, 2).contiguous().transpose(1, 2) * repeated(coarse).to(out.dtype) + out

    assert epilogue_of(turned, False)[0] is None


def test_what_reads_the_fine_output_detached_keeps_it() -> None:
    """Unless it is the op's own backward, as in training."""
    assert epilogue_of(TAKEN["as the library"], True)[0] is None
