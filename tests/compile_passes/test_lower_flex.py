"""`LowerFlex`: FlexAttention over a list of tiles becomes tile attention; any other FlexAttention stays."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.fx import Graph, GraphModule
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import flexsparse as fs
from flexsparse.backends.flex import _block_mask, _identity
from flexsparse.compile_passes import LowerFlex, lower_flex
from flexsparse.compile_passes.fusion_guard import compile_eagerly
from flexsparse.compile_passes.lower_flex import BACKWARD, FORWARD
from flexsparse.selection import TileSelection, block_lists, tile_mask_mod

from .capture import Joint, joint_graphs, nodes_of, ops

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

GRID, TILE = (4, 8, 8), (2, 4, 4)
TOKENS = 4 * 8 * 8
C, HEADS = 16, 2


class Tiny(nn.Module):
    """One self-attention; with KV heads fewer than heads the keys are repeated by SDPA."""

    def __init__(self, checkpointed: bool = False, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.kv_heads, self.checkpointed = kv_heads, checkpointed
        self.to_q, self.proj = nn.Linear(C, C), nn.Linear(C, C)
        self.to_k, self.to_v = nn.Linear(C, kv_heads * 8), nn.Linear(C, kv_heads * 8)

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (to(x).unflatten(-1, (-1, 8)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.kv_heads != HEADS)
        return x + self.proj(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.attention, x, use_reentrant=False) if self.checkpointed else self.attention(x)


class Video(nn.Module):
    """A model that says its grid by its input ``[B, 3, T, H, W]``."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.block, self.head = nn.Conv3d(3, C, (1, 2, 2), (1, 2, 2)), Tiny(), nn.Linear(C, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.patch(x).flatten(2).transpose(1, 2)))


@dataclass
class Case:
    """A builder, how it is used, and what the model is."""

    builder: Any
    options: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return TOKENS + self.options.get("text_first", 0) + self.options.get("text_last", 0)


CASES = {
    "VSA": Case(fs.VSA(top_k=3)),
    "grouped queries": Case(fs.VSA(top_k=3), model={"kv_heads": 1}),
    "partial tiles": Case(fs.VSA(top_k=2), {"tile": (3, 3, 3)}),
    "text on both sides": Case(fs.VSA(top_k=3), {"text_first": 3, "text_last": 40}),
    "packed queries": Case(fs.BSA(kv_density=0.4)),
    "packed queries and text": Case(fs.BSA(kv_density=0.4, fill="nearest"), {"text_first": 7}),
    "static": Case(fs.FrameCausal(chunk=2)),
    "checkpointed": Case(fs.VSA(top_k=3), model={"checkpointed": True}),
    "checkpointed, packed": Case(fs.BSA(kv_density=0.4), model={"checkpointed": True}),
}


def outcome(model: nn.Module, out: Tensor) -> list[Tensor]:
    """Output, and gradients where it has any."""
    if not out.requires_grad:
        return [out]
    grads = torch.autograd.grad(out.square().mean(), list(model.parameters()))
    return [out.detach(), *grads]


def run(case: Case, x: Tensor, **options: Any) -> tuple[list[Tensor], Any]:
    """Compiled: outcome and report of the one call."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Tiny(**case.model)
    given = {"tile": TILE, "inner": "aot_eager", **case.options, **options}
    backend = fs.backend(case.builder, grid=GRID, **given)
    found = outcome(model, torch.compile(model, backend=backend, fullgraph=True)(x))
    (call,) = backend.report().calls
    return found, call


def definition(case: Case, x: Tensor) -> list[Tensor]:
    """Uncompiled, by the oracle."""
    torch.manual_seed(0)
    model = Tiny(**{**case.model, "checkpointed": False})
    wrapped = fs.wrap(
        nn.Sequential(model),
        case.builder,
        grid=GRID,
        compile=False,
        attention="reference",
        **{"tile": TILE, **case.options},
    )
    return outcome(model, wrapped(x))


def assert_same(mine: list[Tensor], other: list[Tensor], tolerance: float = 1e-5) -> None:
    for one, two in zip(mine, other, strict=True):
        torch.testing.assert_close(one, two, atol=tolerance, rtol=1e-3)


def check_lowered(joint: Joint, training: bool, calls: int = 1) -> None:
    assert (joint.count(FORWARD, "before"), joint.count(BACKWARD, "before")) == (calls, calls * training)
    assert (joint.count(FORWARD), joint.count(BACKWARD)) == (0, 0)
    assert joint.count(ops.tile_attention) == calls
    assert joint.count(ops.tile_attention_backward) == calls * training
    assert joint.count(ops.block_lists) == 0, "the lists are made, though nothing reads them"


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
        for T, H, W in ((4, 16, 24), (6, 32, 16), (4, 24, 16)):
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


# what must stay


def flex(
    selection: TileSelection,
    *,
    score_mod: Callable[..., Tensor] = _identity,
    mask_mod: Callable[..., Tensor] | None = None,
    lists_of: Callable[[Any], Any] = lambda lists: lists,
    buffers_of: Callable[[Any], tuple[Tensor, ...]] = lambda lists: (lists.table, lists.tile_counts),
    sizes_of: Callable[[int, int], tuple[int, int]] = lambda q, kv: (q, kv),
) -> Callable[..., Tensor]:
    """FlexAttention over a selection as `backends.flex` calls it, with one thing changed."""

    def run(q: Tensor, k: Tensor, v: Tensor, bits: Tensor, counts: Tensor, tile_counts: Tensor) -> Tensor:
        given = dataclasses.replace(selection, bits=bits, counts=counts, tile_counts=tile_counts)
        lists = block_lists(given, "call")
        q_shift, kv_shift = lists.q_shift, lists.kv_shift

        def mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor, table: Tensor, counts: Tensor) -> Tensor:
            if mask_mod is not None:
                return mask_mod(b, h, q, kv, table, counts, q_shift, kv_shift)
            return tile_mask_mod(b, h, q, kv, table, counts, q_shift, kv_shift)

        whole = _block_mask(lists_of(lists), columns=False).as_tuple()
        rows, slots = sizes_of(*whole[-3:-1])
        block_mask = (*whole[:-3], rows, slots, mask)
        options = {
            "BACKEND": "AUTO",
            "PRESCALE_QK": False,
            "ROWS_GUARANTEED_SAFE": False,
            "BLOCKS_ARE_CONTIGUOUS": False,
            "WRITE_DQ": True,
            "OUTPUT_LOGSUMEXP": False,
            "OUTPUT_MAX": False,
        }
        out, *_ = FORWARD(q, k, v, score_mod, block_mask, 0.5, options, (), buffers_of(lists))
        return out

    return run


def by_pass(function: Callable[..., Tensor], inputs: list[Tensor], lower: LowerFlex) -> Tensor:
    """A function as one node of a graph, compiled with the pass."""
    graph = Graph()
    placeholders = [graph.placeholder(f"x{i}") for i in range(len(inputs))]
    graph.output((graph.call_function(function, tuple(placeholders)),))
    with torch.no_grad():
        compiled = compile_eagerly(GraphModule(nn.Module(), graph), inputs, lower)
        return compiled(*inputs)[0]


SELECTION_LAYOUT = fs.TileLayout(grid=(3, 5, 4), tile=(2, 4, 2))


@pytest.fixture
def selection() -> TileSelection:
    N = SELECTION_LAYOUT.num_tiles
    keep = torch.rand(1, 2, N, N) < 0.5
    return TileSelection.from_mask(keep | torch.eye(N, dtype=torch.bool), SELECTION_LAYOUT)


@pytest.fixture
def tiles(selection: TileSelection) -> list[Tensor]:
    """q, k and v in tile order, and the tensors of the selection."""
    raster = (torch.randn(1, 2, SELECTION_LAYOUT.seq_len, 16) for _ in range(3))
    qkv = [SELECTION_LAYOUT.to_tiles(x).contiguous() for x in raster]
    return [*qkv, selection.bits, selection.counts, selection.kv_tile_counts()]


def test_the_call_that_negative_tests_change_is_lowered(selection: TileSelection, tiles: list[Tensor]) -> None:
    lower = LowerFlex()
    with joint_graphs() as joint:
        out = by_pass(flex(selection), tiles, lower)
    check_lowered(joint, training=False)
    assert (lower.matches, lower.lowered, lower.refused) == ((1, 0), {"call"}, {})
    q, k, v = (SELECTION_LAYOUT.to_raster(x) for x in tiles[:3])
    expected, _ = oracle.attention(q, k, v, oracle.token_mask(selection.keep(), SELECTION_LAYOUT), 0.5)
    torch.testing.assert_close(SELECTION_LAYOUT.to_raster(out), expected)


def _other(change: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor, table: Tensor, counts: Tensor, *shifts: int) -> Tensor:
        return change(tile_mask_mod(b, h, q, kv, table, counts, *shifts), b, h, q, kv, table, counts, *shifts)

    return mask


MASK_MODS = {
    "causal, too": _other(lambda mask, b, h, q, kv, *_: mask & (q >= kv)),
    "or the diagonal": _other(lambda mask, b, h, q, kv, *_: mask | (q == kv)),
    "inverted": _other(lambda mask, *_: ~mask),
    "of another head": _other(
        lambda mask, b, h, q, kv, table, counts, *shifts: tile_mask_mod(b, h * 0, q, kv, table, counts, *shifts)
    ),
    "without counts": lambda b, h, q, kv, table, counts, q_shift, kv_shift: table[b, h, q >> q_shift, kv >> kv_shift],
    "one token more": lambda b, h, q, kv, table, counts, q_shift, kv_shift: (
        table[b, h, q >> q_shift, kv >> kv_shift] & (kv % (1 << kv_shift) <= counts[b, kv >> kv_shift])
    ),
    "of everything": lambda b, h, q, kv, *_: q >= 0,
}


def check_stays(
    function: Callable[..., Tensor], tiles: list[Tensor], reason: str, lower: LowerFlex | None = None
) -> LowerFlex:
    lower = lower or LowerFlex()
    with joint_graphs() as joint:
        out = by_pass(function, tiles, lower)
    assert joint.before == joint.after
    assert joint.count(FORWARD) == 1
    assert (lower.matches, lower.lowered) == ((0, 0), set())
    (found,) = lower.refused.values()
    assert reason in found
    with torch.no_grad():
        torch.testing.assert_close(out, function(*tiles), equal_nan=True)
    return lower


@pytest.mark.parametrize("name", MASK_MODS)
def test_another_mask_mod_stays(name: str, selection: TileSelection, tiles: list[Tensor]) -> None:
    lower = check_stays(flex(selection, mask_mod=MASK_MODS[name]), tiles, "mask_mod is not that of the tiles")
    assert list(lower.refused) == ["call"]


def test_the_same_mask_mod_in_other_words_is_lowered(selection: TileSelection, tiles: list[Tensor]) -> None:
    def in_other_words(b: Any, h: Any, q: Any, kv: Any, table: Any, counts: Any, q_shift: int, kv_shift: int) -> Tensor:
        tile = kv // (1 << kv_shift)
        return (counts[b, tile] > kv % (1 << kv_shift)) & table[b, h, q // (1 << q_shift), tile]

    lower = LowerFlex()
    by_pass(flex(selection, mask_mod=in_other_words), tiles, lower)
    assert lower.lowered == {"call"}


def test_a_score_mod_stays(selection: TileSelection, tiles: list[Tensor]) -> None:
    check_stays(flex(selection, score_mod=lambda score, b, h, q, kv: score * 2), tiles, "it has a score_mod")


LISTS: dict[str, tuple[dict[str, Any], str]] = {
    "made by somebody else": (
        {"lists_of": lambda lists: lists._replace(partial_indices=lists.partial_indices.clone())},
        "no list of tiles made by flexsparse",
    ),
    "full ones taken for partial ones": (
        {
            "lists_of": lambda lists: lists._replace(
                partial_num=lists.full_num,
                partial_indices=lists.full_indices,
                full_num=lists.partial_num,
                full_indices=lists.partial_indices,
            )
        },
        "no list of tiles made by flexsparse",
    ),
    "another table": ({"buffers_of": lambda lists: (~lists.table, lists.tile_counts)}, "reads something else"),
    "other counts": ({"buffers_of": lambda lists: (lists.table, lists.tile_counts + 0)}, "reads something else"),
    "other blocks": ({"sizes_of": lambda q, kv: (2 * q, 2 * kv)}, "its blocks are not the tiles"),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_that_are_not_those_of_one_selection_stay(
    name: str, selection: TileSelection, tiles: list[Tensor]
) -> None:
    changes, reason = LISTS[name]
    check_stays(flex(selection, **changes), tiles, reason)


def test_what_the_templates_do_not_do_stays_and_says_why(selection: TileSelection, tiles: list[Tensor]) -> None:
    asked = []

    def supports(*case: Any) -> str:
        asked.append(case)
        return "too wide"

    lower = check_stays(flex(selection), tiles, "too wide", LowerFlex(supports))
    assert lower.refused == {"call": "too wide"}
    assert asked == [("cpu", torch.float32, 16, 16, 16)]


def test_a_call_that_stays_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower_flex, "templates_support", lambda *_: "not today")
    with torch.no_grad():
        mine, call = run(CASES["VSA"], x := torch.randn(1, TOKENS, C))
        assert not call.lowered and "not lowered: not today" in call.reason
        assert_same(mine, definition(CASES["VSA"], x))


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
