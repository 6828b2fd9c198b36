"""`LowerFlex`: FlexAttention over a list of tiles becomes tile attention."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import flexsparse as fs
from flexsparse.compile_passes import LowerFlex

from .capture import joint_graphs, nodes_of, ops
from .lowering_cases import (
    CASES,
    GRID,
    HEADS,
    TILE,
    TOKENS,
    C,
    Tiny,
    Video,
    assert_same,
    check_lowered,
    definition,
    outcome,
    run,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

INFERENCE = ("VSA", "packed queries and text", "static")  # of all cases in test-full


@pytest.mark.parametrize(
    ("name", "training"),
    [
        pytest.param(
            name,
            training,
            id=f"{name}-{'training' if training else 'inference'}",
            marks=() if training or name in INFERENCE else pytest.mark.slow,
        )
        for name in CASES
        for training in (False, True)
    ],
)
def test_flex_attention_becomes_tile_attention_and_computes_the_same(name: str, training: bool) -> None:
    case = CASES[name]
    x = torch.randn(2, case.tokens, C)
    with torch.set_grad_enabled(training):
        with joint_graphs() as joint:
            mine, call = run(case, x)
        assert call.sparse and call.lowered, call
        check_lowered(joint, training)
        gathered, call = run(case, x, attention="gather", lower_flex=False, fuse_selection=False)
        assert call.backend == "gather" and not call.lowered and not call.fused
        assert_same(mine, gathered)
        assert_same(mine, definition(case, x))


def test_without_passes_the_same_is_computed() -> None:
    case, x = CASES["text on both sides"], torch.randn(1, TOKENS + 43, C)
    found = [
        run(case, x, fuse_selection=fuse, lower_flex=lower)[0] for fuse in (False, True) for lower in (False, True)
    ]
    for other in found[1:]:
        assert_same(found[0], other)


@pytest.mark.parametrize("training", (False, True), ids=("inference", "training"))
def test_any_batch_size_is_lowered_in_one_graph(training: bool) -> None:
    model, case = Tiny(), CASES["VSA"]
    backend = fs.backend(case.builder, grid=GRID, tile=TILE, inner="aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    reference = fs.wrap(nn.Sequential(model), case.builder, grid=GRID, tile=TILE, compile=False, attention="reference")
    with joint_graphs() as joint, torch.set_grad_enabled(training):
        for batch in (2, 3, 5):
            x = torch.randn(batch, TOKENS, C)
            with torch.random.fork_rng():
                mine = outcome(model, compiled(x))
            assert_same(mine, outcome(model, reference(x)))
    check_lowered(joint, training)
    assert len(joint.after) == 1


@pytest.mark.parametrize(
    ("builder", "training"),
    ((fs.VSA(sparsity=0.5), True), (fs.BSA(kv_density=0.4), False)),
    ids=("VSA, training", "packed queries, inference"),
)
def test_a_symbolic_grid_is_lowered_in_the_second_graph_and_the_last(builder: Any, training: bool) -> None:
    torch.manual_seed(0)
    model = Video()
    reference = Video()
    reference.load_state_dict(model.state_dict())
    fs.wrap(model, builder, tile=TILE, inner="aot_eager", fullgraph=True, dynamic=True)
    fs.wrap(reference, builder, tile=TILE, compile=False, attention="reference")
    with joint_graphs() as joint, torch.set_grad_enabled(training):
        for T, H, W in ((4, 16, 24), (6, 32, 16), (8, 24, 32)):  # the last has more tiles than a word has bits
            x = torch.randn(1, 3, T, H, W)
            assert_same(outcome(model, model(x)), outcome(reference, reference(x)))
    assert len(joint.after) == 2  # wrap compiles for the first grid, then for all
    check_lowered(joint, training)
    assert all(call.lowered for call in fs.report(model).calls)


def test_what_is_saved_for_backward_is_neither_lists_nor_scores() -> None:
    layout = fs.TileLayout(grid=(4, 16, 16), tile=(1, 4, 4))
    N, W = layout.num_tiles, 2
    model, saved = nn.Sequential(Tiny()), []
    fs.wrap(model, fs.VSA(top_k=5), tile=layout.tile, grid=layout.grid, gates=True, inner="aot_eager", fullgraph=True)
    x = torch.randn(1, layout.seq_len, C)

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    out.sum().backward()
    whole = [t for t in saved if not t.is_floating_point()]
    assert any(t.numel() == HEADS * N * W for t in whole), "no bitmask is saved; is the measurement right?"
    assert all(t.numel() <= max(HEADS * N * W, layout.padded_len) for t in whole), [t.shape for t in whole]
    assert all(t.numel() < HEADS * N * N for t in whole)
    assert all(tuple(t.shape[-2:]) != (N, N) for t in saved)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_backward_takes_the_output(dtype: torch.dtype) -> None:
    model, x = Tiny().to(dtype), torch.randn(1, TOKENS, C, dtype=dtype)
    backend = fs.backend(fs.VSA(top_k=3), grid=GRID, tile=TILE, inner="aot_eager")
    with joint_graphs() as joint:
        outcome(model, torch.compile(model, backend=backend, fullgraph=True)(x))
    check_lowered(joint, training=True)
    (node,) = nodes_of(joint.graphs[-1], ops.tile_attention_backward)
    assert node.args[5].meta["val"].shape == node.args[2].meta["val"].shape
    assert node.args[5].meta["val"].dtype == dtype


# identity


def test_the_identity_is_that_of_source_and_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> str:
        return "never"

    def always(*_: Any) -> None:
        return None

    plain = LowerFlex().uuid()
    assert plain == LowerFlex().uuid()
    assert len({plain, LowerFlex(never).uuid(), LowerFlex(always).uuid()}) == 3
    source = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda thing: source(thing) + "# changed")
    assert LowerFlex().uuid() != plain


def test_two_builders_keep_their_own_selections_in_one_process() -> None:
    model, x = Tiny(), torch.randn(1, TOKENS, C)
    builders = [fs.VSA(top_k=1), fs.VSA(top_k=6), fs.FrameCausal(chunk=2)]
    compiled, expected = [], []
    for builder in builders:
        backend = fs.backend(builder, grid=GRID, tile=TILE, inner="aot_eager")
        compiled.append(torch.compile(model, backend=backend, fullgraph=True))
        reference = fs.wrap(nn.Sequential(model), builder, grid=GRID, tile=TILE, compile=False, attention="reference")
        expected.append(reference(x).detach())
        fs.unwrap(reference)
    for _ in range(2):
        for one, other in zip(compiled, expected):
            torch.testing.assert_close(one(x).detach(), other, atol=1e-5, rtol=1e-4)


@pytest.fixture
def cold_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inductor's caches in a directory of their own."""
    with torch._inductor.utils.fresh_cache():
        yield


@pytest.mark.usefixtures("cold_cache")
def test_a_warm_cache_serves_no_graph_of_other_passes_or_parameters() -> None:
    """Cold, then warm, for each: with the templates and without, with one top_k and with another."""
    torch.manual_seed(0)
    model, x = Tiny(), torch.randn(1, TOKENS, C)
    expected = {}
    for top_k in (2, 5):
        wrapped = fs.wrap(
            nn.Sequential(model), fs.VSA(top_k=top_k), grid=GRID, tile=TILE, compile=False, attention="reference"
        )
        with torch.no_grad():
            expected[top_k] = wrapped(x)
        fs.unwrap(wrapped)
    met = set()
    for lower, top_k in ((True, 2), (False, 2), (True, 2), (True, 5), (True, 2)):
        torch._dynamo.reset()
        counters.clear()
        backend = fs.backend(fs.VSA(top_k=top_k), grid=GRID, tile=TILE, lower_flex=lower)
        with torch.no_grad():
            out = torch.compile(model, backend=backend, fullgraph=True)(x)
        torch.testing.assert_close(out, expected[top_k], atol=1e-5, rtol=1e-4)
        (call,) = backend.report().calls
        assert call.lowered == lower, call
        hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
        assert bool(hits) == (lower and (lower, top_k) in met), counters  # torch caches no graph with FlexAttention
        met.add((lower, top_k))
