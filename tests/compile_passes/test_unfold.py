"""`UnfoldAttention`: a sparse call becomes tiling, a visible coarse stage and the fine stage, and computes the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import flexsparse as fs
from flexsparse.calls import CallParts
from flexsparse.compile_passes import RewriteSDPA, UnfoldAttention
from flexsparse.compile_passes.unfold import CALL
from flexsparse.selection import TileSelection

from .capture import nodes_of, ops

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

GRID, TILE = (2, 8, 8), (2, 2, 4)
S, C = 128, 16
W = torch.randn(3, C, C, generator=torch.Generator().manual_seed(0)) / 4
aten = torch.ops.aten


def layouts_of(geometry: Any) -> tuple[fs.TileLayout, fs.TileLayout]:
    layout = fs.TileLayout(grid=geometry[:3], tile=TILE)
    return layout, layout


def attention(x: Tensor) -> Tensor:
    q, k, v = ((x @ w).unflatten(-1, (2, 8)).transpose(1, 2) for w in W)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def twice(x: Tensor) -> Tensor:
    return attention(x + attention(x))


def rewritten(
    function: Callable[[Tensor], Tensor], x: Tensor, builder: Any, schedules: Any = (), **options: Any
) -> tuple[GraphModule, CallParts, Callable[[], Tensor]]:
    """The graph of a function, its attention one sparse call each, and what runs the graph as it then is."""
    graphs: list[GraphModule] = []
    inputs: list[Any] = []

    def backend(gm: GraphModule, _: Any) -> Any:
        graphs.append(gm)

        def run(*given_: Any) -> Any:
            inputs[:] = given_
            return gm.forward(*given_)

        return run

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True, **options)(x)
    parts = CallParts((builder,), schedules, layouts_of)
    names = iter("abcdef")

    def seen(name: str, q: Any, k: Any, grid: Any, reason: str | None) -> dict[str, Any]:
        return {"backend": "gather", "name": next(names), "builder": 0}

    rewrite = RewriteSDPA(parts.attend, seen, grid=(*GRID, 0, 0), schedules=[s.tensor for s in schedules])
    rewrite(graphs[0])
    return graphs[0], parts, lambda: graphs[0](*inputs)[0]


BUILDERS: dict[str, Any] = {
    "VSA": fs.VSA(top_k=3),
    "VSA within": fs.VSA(sparsity=0.5, within=fs.SlidingTile(window=(1, 3, 1))),
    "TopP": fs.TopP(mass=0.6),
    "BSA": fs.BSA(kv_density=0.4),
    "static": fs.SlidingTile(window=(1, 3, 1)),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_before_and_after(name: str) -> None:
    x = torch.randn(2, S, C)
    gm, parts, run = rewritten(attention, x, BUILDERS[name])
    expected = run()
    assert (len(nodes_of(gm, parts.attend)), len(nodes_of(gm, parts.fine))) == (1, 0)
    unfold = UnfoldAttention(parts.attend, parts)
    assert unfold(gm) is gm
    assert unfold.matches == 1
    found = [len(nodes_of(gm, target)) for target in (parts.attend, parts.tiles, parts.fine)]
    assert found == [0, 1, 1]
    torch.testing.assert_close(run(), expected)


def test_the_coarse_stage_is_visible_and_knows_its_call() -> None:
    gm, parts, _ = rewritten(twice, torch.randn(1, S, C), fs.VSA(top_k=3))
    unfold = UnfoldAttention(parts.attend, parts)
    unfold(gm)
    assert unfold.matches == 2
    chosen = nodes_of(gm, ops.select_tiles)
    assert [node.meta[CALL] for node in chosen] == ["a", "b"]
    products = nodes_of(gm, aten.matmul)
    assert [node.meta[CALL] for node in products] == ["a", "b"]
    assert all(node.meta["example_value"] is not None for node in chosen + products)
    assert [node.kwargs["name"] for node in nodes_of(gm, parts.fine)] == ["a", "b"]


def test_no_gradient_and_nothing_unused_is_in_the_coarse_stage() -> None:
    """Where no coarse output is wanted, values are not pooled."""
    gm, parts, _ = rewritten(attention, torch.randn(1, S, C, requires_grad=True), fs.VSA(top_k=3))
    UnfoldAttention(parts.attend, parts)(gm)
    own = [node for node in gm.graph.nodes if node.meta.get(CALL)]
    assert not nodes_of(gm, aten.softmax)
    assert len(nodes_of(gm, aten.matmul)) == 1
    assert all(node.users for node in own if isinstance(node.target, torch._ops.OpOverload))


def test_a_graph_without_sparse_calls_is_left() -> None:
    gm, _, _ = rewritten(attention, torch.randn(1, S, C), fs.VSA(top_k=3))
    before, parts = gm.code, CallParts((fs.VSA(top_k=3),), (), layouts_of)  # another call's parts
    unfold = UnfoldAttention(parts.attend, parts)
    unfold(gm)
    assert unfold.matches == 0 and gm.code == before


def test_a_checkpointed_call_unfolds_in_its_nested_graph() -> None:
    def model(x: Tensor) -> Tensor:
        return checkpoint(attention, x, use_reentrant=False)

    gm, parts, _ = rewritten(model, torch.randn(1, S, C, requires_grad=True), fs.VSA(top_k=3))
    unfold = UnfoldAttention(parts.attend, parts)
    unfold(gm)
    assert unfold.matches == 1
    nested = [m for m in gm.modules() if isinstance(m, GraphModule) and m is not gm]
    assert sum(len(nodes_of(m, ops.select_tiles)) for m in nested) == 1
    assert all(n.target is not ops.select_tiles.default for n in gm.graph.nodes)


def test_the_tables_of_a_layout_are_one_set_of_buffers_for_all_calls() -> None:
    gm, parts, _ = rewritten(twice, torch.randn(1, S, C), fs.VSA(top_k=3))
    UnfoldAttention(parts.attend, parts)(gm)
    assert not nodes_of(gm, ops.tile_index)
    buffers = dict(gm.named_buffers())
    assert len({id(b) for b in buffers.values()}) == len(buffers) == 3


def test_where_they_are_no_buffers_tables_are_made_once_a_graph() -> None:
    """A nested graph has none, and with symbolic sizes no graph has."""

    def model(x: Tensor) -> Tensor:
        return checkpoint(twice, checkpoint(twice, x, use_reentrant=False), use_reentrant=False)

    gm, parts, _ = rewritten(model, torch.randn(1, S, C, requires_grad=True), fs.VSA(top_k=3))
    UnfoldAttention(parts.attend, parts)(gm)
    nested = [m for m in gm.modules() if isinstance(m, GraphModule) and m is not gm and nodes_of(m, parts.fine)]
    assert [(len(nodes_of(m, parts.fine)), len(nodes_of(m, parts.index))) for m in nested] == [(2, 1), (2, 1)]
    assert not any(nodes_of(m, ops.tile_index) for m in nested)


def test_a_symbolic_batch_stays_symbolic() -> None:
    x = torch.randn(2, S, C)
    gm, parts, _ = rewritten(attention, x, fs.VSA(top_k=3), dynamic=True)
    UnfoldAttention(parts.attend, parts)(gm)
    (chosen,) = nodes_of(gm, ops.select_tiles)
    assert isinstance(chosen.args[0].meta["example_value"].shape[0], torch.SymInt)  # type: ignore[union-attr]


def test_a_schedule_is_an_operand_and_not_a_constant() -> None:
    schedule = fs.SparsitySchedule(target=0.9, start=0.2, step=0.1, every=1)
    builder, x = fs.VSA(sparsity=schedule), torch.randn(1, S, C)
    gm, parts, run = rewritten(attention, x, builder, [schedule])
    UnfoldAttention(parts.attend, parts)(gm)
    (chosen,) = nodes_of(gm, ops.select_tiles)
    assert getattr(gm, str(chosen.args[2].target)) is schedule.tensor  # type: ignore[union-attr]
    results = [run()]
    schedule.seek(5)
    results.append(run())
    assert not torch.equal(*results)


# autocast


def normed(x: Tensor) -> Tensor:
    """Queries, keys and values in float32, as norms leave them: autocast casts them at the attention."""
    q, k, v = ((x @ w).float().unflatten(-1, (2, 8)).transpose(1, 2) for w in W)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def low(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return normed(x)


def low_then_high(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = normed(x)
        with torch.autocast("cpu", enabled=False):
            return y + normed(x)


def low_in_a_nested_graph(x: Tensor) -> Tensor:
    """As torch.export writes a region down."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    q, k, v = ((x @ w).unflatten(-1, (2, 8)).transpose(1, 2) for w in W)
    out: Tensor = torch.ops.higher_order.wrap_with_autocast("cpu", torch.bfloat16, True, None, attend, q, k, v)
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("function", "dtypes"),
    (
        (low, ["bfloat16"]),
        (low_then_high, ["bfloat16", "float32"]),
        (low_in_a_nested_graph, ["bfloat16"]),
        (normed, ["float32"]),
    ),
)
def test_attention_sees_the_dtype_of_the_region_it_is_in(function: Any, dtypes: list[str]) -> None:
    x = torch.randn(1, S, C)
    gm, parts, run = rewritten(function, x, fs.VSA(top_k=3))
    expected = run()
    UnfoldAttention(parts.attend, parts)(gm)
    found = [node.meta["example_value"][0].dtype for node in nodes_of(gm, parts.tiles)]
    assert [str(dtype) for dtype in found] == [f"torch.{name}" for name in dtypes]
    assert all(n.meta["example_value"][0].dtype == torch.int32 for n in nodes_of(gm, ops.select_tiles))
    scores = [node.args[0].meta["example_value"].dtype for node in nodes_of(gm, ops.select_tiles)]  # type: ignore[union-attr]
    assert scores == [torch.float32] * len(dtypes), "scores are of pooled vectors in float32, whatever autocast says"
    torch.testing.assert_close(run(), expected)


def test_autocast_around_the_graph_counts_as_well() -> None:
    x = torch.randn(1, S, C)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gm, parts, _ = rewritten(normed, x, fs.VSA(top_k=3))
        UnfoldAttention(parts.attend, parts)(gm)
        (tiles,) = nodes_of(gm, parts.tiles)
    assert tiles.meta["example_value"][0].dtype == torch.bfloat16


# what a builder closes over


class Biased:
    """A builder with tensors of its own: one that it holds, and one that it makes of a number."""

    def __init__(self) -> None:
        self.bias = torch.linspace(-1, 1, layouts_of(GRID)[0].num_tiles)

    def select(self, q: Tensor, k: Tensor, layout: Any, kv_layout: Any = None, scale: float | None = None) -> Any:
        x, y = (layout.video(layout.to_tiles(z)).mean(3) for z in (q, k))
        scores = x @ y.mT * torch.tensor(2.0) + self.bias
        keep = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(3).indices, True)
        return TileSelection.from_mask(keep, layout)


class Block(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.checkpointed, self.proj = checkpointed, nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return checkpoint(attention, x, use_reentrant=False) if self.checkpointed else attention(x)


@pytest.mark.parametrize("checkpointed", (False, True), ids=("", "checkpointed"))
def test_tensors_of_a_builders_own_enter_the_graph(checkpointed: bool) -> None:
    x, builder = torch.randn(1, S, C), Biased()
    model = Block(checkpointed)
    backend = fs.backend(builder, grid=GRID, tile=TILE, inner="aot_eager")
    out = torch.compile(model, backend=backend, fullgraph=True)(x)
    grad = torch.autograd.grad(out.square().sum(), model.proj.weight)[0]
    model.checkpointed = False
    reference = fs.wrap(nn.Sequential(model), builder, grid=GRID, tile=TILE, compile=False, attention="reference")
    expected = reference(x)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        grad, torch.autograd.grad(expected.square().sum(), model.proj.weight)[0], atol=1e-4, rtol=1e-3
    )


class ByText:
    """Keeps the tiles that the text's keys are most like."""

    def select(self, q: Tensor, k: Tensor, layout: Any, kv_layout: Any = None, scale: float | None = None) -> Any:
        tiles = layout.video(layout.to_tiles(k)).mean(3)
        scores = (tiles @ k[:, :, layout.num_tokens :].mean(2, keepdim=True).mT).mT.expand(-1, -1, layout.num_tiles, -1)
        keep = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(3).indices, True)
        return TileSelection.from_mask(keep, layout)


class Masked(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = ((x @ w).unflatten(-1, (2, 8)).transpose(1, 2) for w in W)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None]).transpose(1, 2).flatten(2)


def test_what_a_mask_hides_is_hidden_from_a_builder_too() -> None:
    text = 6
    x, mask = torch.randn(2, S + text, C), torch.ones(2, S + text, dtype=torch.bool)
    mask[0, -4:] = mask[1, -1:] = False
    x = x.masked_fill(~mask[..., None], 1e4)
    how: dict[str, Any] = {"grid": GRID, "tile": TILE, "text_last": text}
    backend = fs.backend(ByText(), inner="aot_eager", **how)
    model = fs.wrap(Masked(), ByText(), compile=False, attention="reference", **how)
    out, expected = torch.compile(Masked(), backend=backend, fullgraph=True)(x, mask), model(x, mask)
    assert fs.report(model).calls[0].sparse and backend.report().calls[0].sparse
    torch.testing.assert_close(out[mask], expected[mask], atol=1e-5, rtol=1e-4)


def test_the_identity_is_that_of_source_and_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, others = (CallParts((fs.VSA(top_k=3),), (), layouts_of) for _ in range(2))
    before = UnfoldAttention(parts.attend, parts).uuid()
    assert before == UnfoldAttention(parts.attend, parts).uuid() != UnfoldAttention(others.attend, others).uuid()
    source = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda module: source(module) + "# changed")
    assert UnfoldAttention(parts.attend, parts).uuid() != before
