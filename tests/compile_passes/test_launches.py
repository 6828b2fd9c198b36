"""How many GPU kernels one attention launches, counted without a GPU.

The graph is made for fake CUDA tensors. What a custom op launches is counted in Triton's interpreter; what is left of the
graph must be operations that Inductor fuses into one kernel.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import flexsparse as fs
from flexsparse.calls import CallParts
from flexsparse.compile_passes import FuseSelection, LowerFlex, UnfoldAttention
from flexsparse.compile_passes.templates import select, tiling
from flexsparse.compile_passes.templates.forward import forward
from flexsparse.compile_passes.templates.launch import count_launches
from flexsparse.ops.choice import Rule
from flexsparse.ops.coarse_select import _on_cuda

GRID = (4, 8, 9)  # with partial tiles
LAYOUT = fs.TileLayout(grid=GRID)
D, HEADS = 32, 2
aten = torch.ops.aten
VIEWS = {
    *(aten.view.default, aten.unsqueeze.default, aten.transpose.int, aten.expand.default, aten.slice.Tensor),
    *(aten._unsafe_view.default, aten.permute.default, aten.squeeze.dim, aten.alias.default, aten.select.int),
    *(aten.detach.default, aten.unfold.default),
}
FUSED = {
    *(aten.index_select.default, aten.mul.Tensor, aten.add.Tensor, aten.clamp_min.default, aten.lt.Scalar),
    *(aten.masked_fill.Scalar, aten._to_copy.default, aten.floor_divide.default, aten.div.Tensor_mode),
}


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> GraphModule:
    """One gated VSA call in inference as Inductor gets it, on (fake) CUDA."""
    module = sys.modules["torch._higher_order_ops.flex_attention"]  # its name in the package is the operator
    monkeypatch.setattr(module, "_permute_strides", lambda out, strides: out)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    shapes = [x.shape for x in LAYOUT.tables("cpu")]
    with mode:
        q, k, v = (torch.empty(1, HEADS, LAYOUT.seq_len, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        gate = torch.empty(1, LAYOUT.seq_len, HEADS * D, device="cuda", dtype=torch.bfloat16)
        tables = tuple(torch.empty(shape, dtype=torch.int32, device="cuda") for shape in shapes)
    parts = CallParts(fs.VSA(top_k=2), (), lambda grid: fs.TileLayout(grid=grid))
    parts.tables = lambda grid, device, order: tables  # type: ignore[assignment]
    calls = Graph()
    inputs = [calls.placeholder(name) for name in ("q", "k", "v", "gate")]
    for node, example in zip(inputs, (q, k, v, gate)):
        node.meta["example_value"] = example
    how = {"scale": None, "backend": "flex", "name": "call"}
    calls.output(calls.call_function(parts.attend, (*inputs, GRID, ()), how))
    gm = GraphModule({}, calls)
    with torch._guards.tracing(torch._guards.TracingContext(mode)):
        UnfoldAttention(parts.attend, parts)(gm)
        fuse = FuseSelection()
        fuse(gm)
        with mode, torch.no_grad():
            traced = make_fx(lambda *inputs: gm(*inputs), _allow_non_fake_inputs=True)(q, k, v, gate)
        traced.graph.eliminate_dead_code()
        lower = LowerFlex()
        lower(traced.graph)
    assert (fuse.matches, lower.matches, lower.refused) == (1, (1, 0), {})
    return traced


def launches() -> dict[str, int]:
    """Kernels that each custom op of the graph launches, by running what it runs on CUDA in the interpreter."""
    slot_to_token, _, counts = LAYOUT.tables("cpu")
    q, k, v = (torch.randn(1, HEADS, LAYOUT.seq_len, D) for _ in range(3))
    found: dict[str, int] = {}
    with count_launches() as names:
        tiles = tiling.tile_tokens([q, k, v], [slot_to_token] * 3)
    found["tile_tokens"] = len(names)
    q_t, k_t, v_t = (LAYOUT.video(x) for x in tiles)
    with count_launches() as names:
        rule = Rule(name="top_k", value=2.0)
        coarse, _, _, _, _, bits, kept, _ = _on_cuda(select, q_t, k_t, v_t, counts, counts, None, rule, 2, 0.1, False)
    found["coarse_select"] = len(names)
    sizes: dict[str, Any] = {"query_rows": 64, "first_rows": 0, "kv_first": 0, "slots": 64, "partial": True}
    sizes |= {"kv_video": LAYOUT.num_tiles, "capacity": 2, "scale": 0.1}
    with count_launches() as names:
        forward(*tiles, bits, kept, counts[None], None, None, **sizes)  # type: ignore[arg-type]
    found["tile_attention"] = len(names)
    assert isinstance(coarse, Tensor)
    return found


def test_an_attention_launches_six_kernels_and_four_to_its_selection(graph: GraphModule) -> None:
    cost = launches()
    to_selection, total, fused = None, 0, 0
    for node in graph.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or node.target in VIEWS:
            continue
        name = node.target._schema.name.partition("::")[2]
        if name in cost:
            total += cost[name]
        else:
            assert node.target in FUSED, f"{node.target} may be a kernel of its own"
            fused += 1
        if name == "coarse_select":
            assert fused == 0, "something runs before the selection"
            to_selection = total
    assert to_selection is not None and to_selection <= 4
    assert (
        fused > 0 and total + 1 <= 6
    )  # the rest is one kernel: the way back to raster order, the gate, the coarse output
    assert sum(n.target is torch.ops.flexsparse.tile_attention.default for n in graph.graph.nodes) == 1
