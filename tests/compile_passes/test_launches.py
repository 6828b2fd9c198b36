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
from flexsparse.compile_passes import FoldTiling, FuseSelection, LowerFlex, PoolTokens, UnfoldAttention
from flexsparse.compile_passes.templates import tiling
from flexsparse.compile_passes.templates.forward import forward
from flexsparse.compile_passes.templates.launch import count_launches
from flexsparse.ops.choice import Rule
from flexsparse.ops.coarse_select import _on_gpu

GRID = (4, 8, 9)  # with partial tiles
LAYOUT = fs.TileLayout(grid=GRID)
WHOLE = fs.TileLayout(grid=(4, 8, 8))
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
    aten.clone.default,  # to where the model reads, by the kernel that makes what is cloned
}


def permuted(out: Tensor, strides: tuple[int, ...]) -> Tensor:
    """FlexAttention's own `_permute_strides` copies, which a CPU build of torch cannot do with fake CUDA tensors."""
    order = sorted(range(out.dim()), key=lambda dim: -strides[dim])
    return out.new_empty([out.shape[dim] for dim in order]).permute([order.index(dim) for dim in range(out.dim())])


def attention_graph(
    monkeypatch: pytest.MonkeyPatch, order: str, folded: bool = False
) -> tuple[GraphModule, LowerFlex, FoldTiling]:
    """One gated VSA call in inference as Inductor gets it, on (fake) CUDA; heads lie inside of tokens, as in a model."""
    module = sys.modules["torch._higher_order_ops.flex_attention"]  # its name in the package is the operator
    monkeypatch.setattr(module, "_permute_strides", permuted)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    layout = LAYOUT if order == "raster" else WHOLE
    shapes = [x.shape for x in layout.tables("cpu")]
    with mode:
        cuda: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        q, k, v = (torch.empty(1, layout.seq_len, HEADS, D, **cuda).transpose(1, 2) for _ in range(3))
        gate = torch.empty(1, layout.seq_len, HEADS * D, **cuda)
        tables = tuple(torch.empty(shape, dtype=torch.int32, device="cuda") for shape in shapes)
    parts = CallParts((fs.VSA(top_k=2),), (), lambda geometry: (fs.TileLayout(grid=geometry[:3]),) * 2)
    parts.tables = lambda grid, device, order: tables  # type: ignore[assignment]
    calls = Graph()
    inputs = [calls.placeholder(name) for name in ("q", "k", "v", "gate")]
    for node, example in zip(inputs, (q, k, v, gate)):
        node.meta["example_value"] = example
    how = {"scale": None, "backend": "flex", "name": "call", "builder": 0, "order": order}
    attend = calls.call_function(parts.attend, (*inputs, (*layout.grid, 0, 0), (), None, None), how)
    calls.output(calls.call_method("flatten", (calls.call_method("transpose", (attend, 1, 2)), 2)))
    gm = GraphModule({}, calls)
    with torch._guards.tracing(torch._guards.TracingContext(mode)):
        UnfoldAttention(parts.attend, parts)(gm)
        fuse = FuseSelection()
        fuse(gm)
        if folded:
            PoolTokens(parts)(gm)
        with mode, torch.no_grad():
            traced = make_fx(lambda *inputs: gm(*inputs), _allow_non_fake_inputs=True)(q, k, v, gate)
        traced.graph.eliminate_dead_code()
        lower = LowerFlex()
        lower(traced.graph)
        fold = FoldTiling()
        if folded:
            fold(traced.graph)
    assert (fuse.matches, lower.matches, lower.refused) == (1, (1, 0), {})
    return traced, lower, fold


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> GraphModule:
    """The call in raster order, as it is where the chosen kernels read tile order."""
    return attention_graph(monkeypatch, "raster")[0]


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
        coarse, _, _, _, _, bits, kept, _ = _on_gpu(q_t, k_t, v_t, counts, counts, None, rule, 2, 0.1, False)
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


def test_in_tile_order_four_kernels_are_all_and_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op reads q, k, v and the gate where they lie, adds the gated coarse output, and writes where the model reads."""
    graph, lower, _ = attention_graph(monkeypatch, "tiles")
    assert lower.combined == 1
    check_four_kernels(graph, WHOLE.seq_len)


def test_in_raster_order_four_kernels_are_all_and_nothing_is_brought_to_tile_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With partial tiles, by tables: the same four, no tiling, no gather back, and no kernel for the coarse output."""
    graph, lower, fold = attention_graph(monkeypatch, "raster", folded=True)
    assert (lower.combined, fold.combined, fold.matches, fold.refused) == (0, 1, (1, 0), {})
    check_four_kernels(graph, LAYOUT.seq_len)


def check_four_kernels(graph: GraphModule, tokens: int) -> None:
    nodes = [n for n in graph.graph.nodes if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload)]
    names = [n.target._schema.name.partition("::")[2] for n in nodes if n.target not in VIEWS]
    assert names == ["coarse_select", "tile_attention"]
    cost = launches()
    assert sum(cost[name] for name in names) == 4
    (attention,) = (n for n in nodes if n.target is torch.ops.flexsparse.tile_attention.default)
    lies = (tokens * HEADS * D, D, HEADS * D, 1)
    assert all(x.meta["val"].stride() == lies for x in (*attention.args[:3], attention.args[4]))
    assert attention.meta["val"][0].stride() == lies
