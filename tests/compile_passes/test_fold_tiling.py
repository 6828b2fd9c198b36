"""`PoolTokens` and `FoldTiling`: ops read and write raster order, and nothing is brought to tile order and back.

On CPU, where plain torch tiles, graphs are made as they are on CUDA: `tile_tokens` brings tokens to tile order.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from as_on_gpu import run_templates
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import flexsparse as fs
from flexsparse.compile_passes import FoldTiling
from flexsparse.compile_passes.fold_tiling import NotFolded, find_call
from flexsparse.compile_passes.gathers import restride
from flexsparse.ops import tile_tokens

from .capture import Joint, joint_graphs, nodes_of, ops
from .lowering_cases import CASES, Case, Video, assert_same, run
from .test_epilogue import Attention, check_gradients_come_from_the_op

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
aten = torch.ops.aten
GRID, TILE, C = (3, 6, 5), (2, 2, 4), 32
FOLDED = {name: case for name, case in CASES.items() if "packed" not in name} | {
    "other query tiles": Case(fs.VSA(top_k=3), {"query_tile": (2, 4, 8), "text_first": 5}),
}


@pytest.fixture(autouse=True)
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are brought to tile order by the op, where these passes look for it."""
    monkeypatch.setattr(tile_tokens, "in_one_kernel", lambda device, dtype: dtype != torch.float64)


@contextmanager
def passes() -> Iterator[list[FoldTiling]]:
    """The passes that ran."""
    seen, original = [], FoldTiling.__call__

    def call(self: FoldTiling, graph: Any) -> None:
        original(self, graph)
        seen.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FoldTiling, "__call__", call)
        yield seen


def check_folded(joint: Joint, training: bool, calls: int = 1) -> None:
    """The last graph: no tiling, no way back, and ops with tables."""
    gm = joint.graphs[-1]
    assert not nodes_of(gm, ops.tile_tokens)
    forward, backward = nodes_of(gm, ops.tile_attention), nodes_of(gm, ops.tile_attention_backward)
    assert (len(forward), len(backward)) == (calls, calls * training)
    for node in (*forward, *backward):
        assert None not in node.args[-2:]
    for node in forward:
        (out,) = (user for user in node.users if user.args[1] == 0)
        assert not any(user.target in (aten.index_select.default, aten.index.Tensor) for user in out.users)
    for node in nodes_of(gm, ops.coarse_select):
        assert None not in node.args[-4:]
    for node in gm.graph.nodes:
        if node.target in (aten.detach.default, aten.alias.default):  # Inductor believes them, and one of them is saved
            value, source = node.meta["val"], node.args[0].meta["val"]
            assert (value.shape, value.stride()) == (source.shape, source.stride())


FIRST = (
    "partial tiles, inference",
    "partial tiles, training",
    "text on both sides, training",
    "other query tiles, training",
)


@pytest.mark.parametrize(
    ("name", "training"),
    [
        pytest.param(
            name, how == "training", id=f"{name}, {how}", marks=() if f"{name}, {how}" in FIRST else pytest.mark.slow
        )
        for name in FOLDED
        for how in ("inference", "training")
    ],
)
def test_nothing_is_brought_to_tile_order_and_the_bits_are_the_same(name: str, training: bool) -> None:
    case = FOLDED[name]
    x = torch.randn(2, case.tokens, case_channels())
    with torch.set_grad_enabled(training):
        with joint_graphs() as joint, passes() as folds:
            mine, call = run(case, x, keep_tiles=False)
        assert call.lowered and folds[-1].matches == (1, int(training)) and not folds[-1].refused
        check_folded(joint, training)
        tiled, _ = run(case, x, keep_tiles=False, fold_tiling=False)
    assert all(torch.equal(a, b) for a, b in zip(mine, tiled, strict=True))


def case_channels() -> int:
    return 16


PACKED = {name: case for name, case in CASES.items() if "packed" in name} | {
    "packed, all queries scored": Case(fs.BSA(score_queries="all", threshold="mass", mass=0.6)),
    "packed, joined": Case(fs.Union(fs.BSA(kv_density=0.3), fs.SlidingTile(window=(1, 1, 3)), fs.VSA(top_k=1))),
    "packed, other query tiles": Case(fs.BSA(kv_density=0.4), {"query_tile": (2, 4, 8), "text_first": 5}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "packed queries and text" else pytest.mark.slow) for name in PACKED]
)
def test_packed_queries_are_packed_from_raster_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_templates(monkeypatch)  # a CPU packs from raster order anyway
    case = PACKED[name]
    x = torch.randn(2, case.tokens, case_channels())
    with joint_graphs() as joint, passes() as folds:
        mine, call = run(case, x, keep_tiles=False)
    assert call.lowered and folds[-1].matches == (1, 1) and not folds[-1].refused
    gm = joint.graphs[-1]
    assert not nodes_of(gm, ops.tile_tokens)
    for node in (*nodes_of(gm, ops.tile_attention), *nodes_of(gm, ops.tile_attention_backward)):
        assert node.args[-2] is None and node.args[-1] is not None, "keys alone are found by a table"
    for node in nodes_of(gm, ops.prune_queries):
        assert node.args[0].meta["val"].dim() == 4 and node.args[12] > 0
    for node in nodes_of(gm, ops.coarse_select):
        assert node.args[-3] is not None and node.args[-1] is not None
    for node in nodes_of(gm, ops.pack_rows):
        assert node.args[5] is None
    for node in nodes_of(gm, ops.pack_rows_backward):
        assert node.args[5] is False
    tiled, _ = run(case, x, keep_tiles=False, fold_tiling=False)
    assert all(torch.equal(a, b) for a, b in zip(mine, tiled, strict=True))


@pytest.mark.parametrize("statistics", ("row", "head"))
def test_statistics_of_a_head_read_tiles_and_keep_them(statistics: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_templates(monkeypatch)
    case = Case(fs.BSA(kv_density=0.4, statistics=statistics))
    x = torch.randn(1, case.tokens, case_channels())
    with torch.no_grad(), passes() as folds:
        mine, _ = run(case, x, keep_tiles=False)
        assert bool(folds[-1].refused) == (statistics == "head"), folds[-1].refused
        tiled, _ = run(case, x, keep_tiles=False, fold_tiling=False)
    assert all(torch.equal(a, b) for a, b in zip(mine, tiled, strict=True))


class Gated(nn.Module):
    """Two attentions with gates, one checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.second = nn.Conv3d(3, C, 1), Attention(), Attention()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = self.first(x)
        return torch.utils.checkpoint.checkpoint(self.second, x, use_reentrant=False)


def run_gated(model: nn.Module, dtype: torch.dtype, training: bool, **options: Any) -> tuple[list[Tensor], Any]:
    torch._dynamo.reset()
    model = copy.deepcopy(model)
    fs.wrap(model, fs.VSA(top_k=3), tile=TILE, grid=GRID, gates=["first", "second"], inner="aot_eager", **options)
    generator = torch.Generator().manual_seed(2)
    for parameter in fs.gate_parameters(model):
        nn.init.normal_(parameter, std=0.5, generator=generator)
    model = model.to(dtype)
    x = torch.randn(1, 3, *GRID, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.set_grad_enabled(training):
        out = model(x)
        found = [out.detach()]
        if training:
            found += torch.autograd.grad(out.square().sum(), list(model.parameters()))
    return found, fs.report(model)


@pytest.mark.parametrize(
    ("dtype", "training", "combined"),
    [
        (torch.float32, True, 0),
        pytest.param(torch.float32, False, 2, marks=pytest.mark.slow),
        (torch.bfloat16, True, 2),
    ],
)
def test_both_stages_of_gated_attention(dtype: torch.dtype, training: bool, combined: int) -> None:
    """Several calls, partial tiles, both stages' gradients; the op adds the coarse output where nothing else reads its own."""
    model = Gated()
    with joint_graphs() as joint, passes() as folds:
        mine, report = run_gated(model, dtype, training)
    check_folded(joint, training, calls=2)
    assert folds[-1].combined == combined
    if combined and training:
        check_gradients_come_from_the_op(joint.graphs[-1])
    assert all("read in raster order: its tiles are not all full" in call.reason for call in report.calls), report
    tiled, _ = run_gated(model, dtype, training, fold_tiling=False)
    if not combined:
        assert all(torch.equal(a, b) for a, b in zip(mine, tiled, strict=True))
        return
    exact, _ = run_gated(model, torch.float64, training)
    for one, other, gold in zip(mine, tiled, exact, strict=True):
        error, usual = ((x.double() - gold).square().mean().sqrt() for x in (one, other))
        assert error <= 1.5 * usual + 4 * torch.finfo(dtype).eps * gold.square().mean().sqrt()


@pytest.mark.parametrize(
    ("dtype", "training", "combined"),
    [
        (torch.float32, False, 1),
        pytest.param(torch.float32, True, 0, marks=pytest.mark.slow),
        (torch.bfloat16, True, 1),
    ],
)
def test_text_has_no_coarse_output(dtype: torch.dtype, training: bool, combined: int) -> None:
    """Its rows of the gate, whatever they hold, add nothing; a graph that pads the coarse output for it is understood."""
    layout = fs.TileLayout(grid=GRID, tile=TILE, text_first=3, text_last=20)
    inputs = [torch.randn(1, 2, layout.seq_len, 16).to(dtype) for _ in range(3)]
    inputs.append(torch.randn(1, layout.seq_len, 32).to(dtype))

    def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        torch.ops.flexsparse.mark_gate(gate)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    found = []
    for fold in (True, False):
        torch._dynamo.reset()
        how: dict[str, Any] = {"tile": TILE, "grid": GRID, "text_first": 3, "text_last": 20, "fold_tiling": fold}
        backend = fs.backend(fs.VSA(top_k=2), inner="aot_eager", **how)
        leaves = [x.clone().requires_grad_(training) for x in inputs]
        with passes() as folds, joint_graphs() as joint:
            out = torch.compile(attend, backend=backend, fullgraph=True)(*leaves)
            grads = torch.autograd.grad(out.square().sum(), leaves) if training else ()
        if fold:
            assert folds[-1].matches == (1, int(training)) and folds[-1].combined == combined
            if combined and training:
                check_gradients_come_from_the_op(joint.graphs[-1])
        found.append([out.detach(), *grads])
    if dtype == torch.float32:
        assert_same(*found)
    for one, other in zip(*found, strict=True):
        assert (one - other).square().mean().sqrt() <= 4 * torch.finfo(dtype).eps * other.square().mean().sqrt()


@pytest.mark.slow
def test_any_resolution_in_one_graph() -> None:
    """With symbolic sizes, where tokens cannot stay in tile order."""
    model = Video()
    reference = copy.deepcopy(model)
    fs.wrap(model, fs.VSA(top_k=2), tile=(2, 2, 4), inner="aot_eager")
    fs.wrap(reference, fs.VSA(top_k=2), tile=(2, 2, 4), compile=False, attention="reference")
    with joint_graphs() as joint:
        for grid in ((2, 8, 8), (3, 12, 10), (5, 6, 14)):
            x = torch.randn(1, 3, *grid)
            outs = [one(x) for one in (model, reference)]
            grads = [
                torch.autograd.grad(out.square().mean(), one.parameters()) for out, one in zip(outs, (model, reference))
            ]
            assert_same([outs[0], *grads[0]], [outs[1], *grads[1]])
    assert len(joint.graphs) == 2
    check_folded(joint, training=True)


def test_a_kernel_that_reads_tile_order_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexsparse.compile_passes.templates.tuned.finds_rows", lambda *case: False)
    case = CASES["partial tiles"]
    with joint_graphs() as joint, passes() as folds:
        _, call = run(case, torch.randn(1, case.tokens, case_channels()))
    assert folds[-1].matches == (0, 0) and "reordered in the call" in call.reason
    assert nodes_of(joint.graphs[-1], ops.tile_tokens)


@pytest.mark.parametrize("training", [False, True])
def test_inference_does_not_ask_the_kernels_of_a_backward(training: bool) -> None:
    tuned = pytest.importorskip("flexsparse.compile_passes.templates.tuned")
    dq = tuned.Choice(op="dq", kernel="hopper", rows=64, keys=64, num_warps=4, num_stages=2)
    case = CASES["partial tiles"]
    with torch.set_grad_enabled(training), passes() as folds, tuned.using(dq):
        run(case, torch.randn(1, case.tokens, case_channels()))
    assert folds[-1].matches == (int(not training), 0) and bool(folds[-1].refused) == training


LAYOUT = fs.TileLayout(grid=GRID, tile=TILE)
TOKENS, SLOTS, COUNTS = LAYOUT.tables("cpu")


def traced(change: str = "") -> GraphModule:
    """A forward in tile order as a joint graph has it, or with something that stands in the way."""

    def function(x: Tensor, bits: Tensor, counts: Tensor, tokens: Tensor, slots: Tensor, tile_counts: Tensor) -> Any:
        tables = [tokens] * 3
        q, k, v = torch.ops.flexsparse.tile_tokens([x, x * 2, x * 3], tables, [slots] * 3)
        sizes = (LAYOUT.slots, 0, 0, 0, LAYOUT.num_tiles, LAYOUT.slots, 2, 1, True, 0.3, True)
        if change == "other queries":
            q = q + 1
        out, lse = torch.ops.flexsparse.tile_attention(q, k, v, None, None, bits, counts, tile_counts, *sizes)
        if change == "tiles read":
            return out.index_select(2, slots), k.sum(), lse
        if change == "output read":
            return out.index_select(2, slots), out.sum(), lse
        if change == "whole slices":  # what Inductor makes of an index_select of a symbolic batch
            return torch.ops.aten.slice(torch.ops.aten.slice(out, 0), 1)[:, :, slots], lse
        if change == "a slice":
            return out[:, :1][:, :, slots], lse
        if change == "another order":
            return out.index_select(2, slots.flip(0)), lse
        return out.index_select(2, slots), lse

    selection = fs.VSA(top_k=2).select(*(torch.randn(1, 2, LAYOUT.seq_len, 8) for _ in "qk"), LAYOUT)
    x = torch.randn(1, 2, LAYOUT.seq_len, 8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return make_fx(function)(x, selection.bits, selection.counts, TOKENS, SLOTS, COUNTS)


@pytest.mark.parametrize(
    "change", ("", "whole slices", "a slice", "other queries", "tiles read", "output read", "another order")
)
def test_what_else_reads_tile_order_keeps_it(change: str) -> None:
    gm = traced(change)
    (node,) = nodes_of(gm, ops.tile_attention)
    if change not in ("", "whole slices"):
        with pytest.raises(NotFolded):
            find_call(node, lambda *case: True)
        return
    FoldTiling()(gm.graph)
    (node,) = nodes_of(gm, ops.tile_attention)
    assert not nodes_of(gm, ops.tile_tokens) and node.args[-1] is node.args[-2]


@pytest.mark.parametrize("view", (False, True))
def test_a_memory_format_is_followed_and_a_view_that_cannot_be_gets_a_copy(view: bool) -> None:
    def function(x: Tensor) -> Tensor:
        y = (x * 1).transpose(1, 2)  # stands for an op whose result lies as its input
        old = y.contiguous()
        rows = old.view(8, 3) if view else old.transpose(1, 2)
        return rows.clone(memory_format=torch.contiguous_format)

    with FakeTensorMode():
        gm = make_fx(function)(torch.empty(2, 3, 4))
    old = next(n for n in gm.graph.nodes if n.target is aten.clone.default)
    (y,) = old.all_input_nodes
    example = old.meta["val"]
    old.replace_all_uses_with(y)
    gm.graph.erase_node(old)
    restride(gm.graph, y, example)
    gm.graph.lint()
    gm.recompile()
    (user,) = y.users
    if view:
        assert user.target is aten.clone.default and user.meta["val"].is_contiguous()
    else:
        assert user.target is aten.transpose.int and user.meta["val"].is_contiguous()
    x = torch.randn(2, 3, 4)
    assert torch.equal(gm(x), function(x))
