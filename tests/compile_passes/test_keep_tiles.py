"""`KeepTiles`: whatever a model does between its attentions, tokens in tile order change nothing but the work."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import flexsparse as fs
from flexsparse.compile_passes import KeepTiles, marks
from flexsparse.compile_passes.graphs import graph_modules
from flexsparse.compiler import Backend

GRID, C, HEADS = (4, 8, 4), 32, 2
S = 128
SDPA = F.scaled_dot_product_attention
Step = Callable[..., Tensor]


class Seen:
    """Runs of the pass: itself, and the graph that it left."""

    def __init__(self) -> None:
        self.runs: list[tuple[KeepTiles, Any]] = []

    @property
    def last(self) -> KeepTiles:
        return self.runs[-1][0]

    def named(self, name: str) -> list[Any]:
        """Nodes of the last graph, nested ones too, that call a function of that name."""
        nodes = [n for m in graph_modules(self.runs[-1][1]) for n in m.graph.nodes]
        return [n for n in nodes if getattr(n.target, "__name__", "") == name]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    torch._dynamo.reset()
    found, original = Seen(), KeepTiles.__call__

    def call(self: KeepTiles, gm: Any) -> Any:
        result = original(self, gm)
        found.runs.append((self, copy.deepcopy(gm)))
        return result

    monkeypatch.setattr(KeepTiles, "__call__", call)
    yield found
    torch._dynamo.reset()


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Block(nn.Module):
    """Self-attention between two steps of anything."""

    def __init__(self, before: Step, after: Step) -> None:
        super().__init__()
        self.before, self.after = before, after
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(heads, self.qkv(self.before(x)).chunk(3, -1))
        return x + self.after(self.out(SDPA(q, k, v).transpose(1, 2).flatten(2)))


class Model(nn.Module):
    """Blocks between an embedding and a projection."""

    def __init__(self, *steps: tuple[Step, Step], last: Step = lambda x: x, checkpointed: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv3d(3, C, 1), nn.Linear(C, 4)
        self.blocks = nn.ModuleList(Block(*each) for each in steps)
        self.last, self.checkpointed = last, checkpointed

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(self.last(x))


def plain(x: Tensor) -> Tensor:
    return F.layer_norm(x, (C,))


def results(model: nn.Module, builder: Any, keep_tiles: bool, **options: Any) -> list[Tensor]:
    """Output and gradients, compiled."""
    grid, tile = options.pop("grid", GRID), options.pop("tile", (2, 4, 2))
    backend = Backend(builder, tile=tile, grid=grid, inner="aot_eager", keep_tiles=keep_tiles, **options)
    model = copy.deepcopy(model)
    torch._dynamo.reset()
    x = torch.randn(2, 3, *grid, generator=torch.Generator().manual_seed(1), requires_grad=True)
    out = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    leaves = [x, *model.parameters()]
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)]


def check_same(model: nn.Module, builder: Any | None = None, within: float = 1e-5, **options: Any) -> None:
    builder = builder or fs.VSA(top_k=3)
    kept = results(model, builder, True, **options)
    for mine, other in zip(kept, results(model, builder, False, **options)):
        torch.testing.assert_close(mine, other, atol=within * max(1.0, float(other.abs().max())), rtol=10 * within)


def test_tokens_are_reordered_at_the_ends_only(seen: Seen) -> None:
    torch.manual_seed(0)
    model = Model((plain, plain), (plain, plain), (plain, plain))
    results(model, fs.VSA(top_k=3), True)
    assert (seen.last.matches, seen.last.refused) == (3, {})
    first, last = seen.named("flexsparse_reorder")
    assert first.args[0].name.startswith("x") and first.args[1] == 1 and first.args[-1] is False  # after the transpose
    assert last.args[-1] is True and last.args[0].target is not None
    assert "linear" in str(last.args[0].target), "after the projection to fewer channels"
    assert all(call.kwargs["order"] == "tiles" for call in seen.named("flexsparse_attend"))
    check_same(model)


BUILDERS = {
    "VSA": fs.VSA(top_k=3),
    "TopP": fs.TopP(mass=0.6),
    "BSA": fs.BSA(keep_queries=0.5, kv_density=0.5),
    "BSA by windows": fs.BSA(keep_queries=0.5, kv_density=0.5, window=(1, 2, 2), fill="nearest"),
    "static": fs.FrameCausal(chunk=2),
    "within": fs.VSA(top_k=2, within=fs.FrameCausal(chunk=2)),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_every_builder_gives_the_same(name: str, seen: Seen) -> None:
    torch.manual_seed(0)
    check_same(Model((plain, plain), (plain, plain)), BUILDERS[name])
    assert seen.runs[0][0].matches == 2


def rows(x: Tensor) -> Tensor:
    """A table of every token's own, as position embeddings are."""
    return x + torch.arange(S * C, dtype=torch.float32).view(S, C).sin()


def filled(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[..., 0::2] = -x[..., 1::2]
    out[..., 1::2] = x[..., 0::2]
    return out


def filled_in_part(x: Tensor) -> Tensor:
    out = x * 1
    out[:, : S // 2] = 0
    return out


def cross(x: Tensor) -> Tensor:
    text = torch.linspace(-1, 1, 5 * C).view(1, 5, C).expand(x.shape[0], -1, -1)
    return SDPA(heads(x), heads(text), heads(text)).transpose(1, 2).flatten(2)


def dense(x: Tensor) -> Tensor:
    """Self-attention that stays dense, for its mask."""
    mask = torch.ones(S, S, dtype=torch.bool).tril()
    return SDPA(heads(x), heads(x), heads(x), attn_mask=mask).transpose(1, 2).flatten(2)


STEPS: dict[str, Step] = {
    "norm": plain,
    "scaled": lambda x: x * 0.5 + 0.1,
    "table": rows,
    "rotated in place": filled,
    "half written": filled_in_part,
    "added in place": lambda x: (x * 1).add_(0.5),
    "cross-attention": cross,
    "dense self-attention": dense,
    "cumsum": lambda x: x.cumsum(1) / S,
    "shifted": lambda x: x.roll(1, 1),
    "convolution": lambda x: F.avg_pool1d(x.mT, 3, 1, 1).mT,
    "pooled": lambda x: x - x.mean(1, keepdim=True),
    "softmax over tokens": lambda x: x.softmax(1) * S,
    "by rank": lambda x: x.sort(1).values,
    "first token": lambda x: x + x[:, :1],
    "as a grid": lambda x: x.unflatten(1, GRID).flip(2).flatten(1, 3),
    "attention by hand": lambda x: (0.1 * x @ x.transpose(1, 2) + torch.linspace(0, 3, S)).softmax(-1) @ x,
    "attention by hand, biased by its keys": lambda x: (
        (0.1 * x @ x.transpose(1, 2) + x.mean(-1)[:, None, :]).softmax(-1) @ x.cumsum(1)
    ),
    "a number for each token": lambda x: (x.transpose(1, 2) * torch.linspace(0.5, 1.5, S)).transpose(1, 2),
    "turned": lambda x: x.mT.contiguous().mT * 2,
    "gated": lambda x: x * torch.sigmoid(x.mean(-1, keepdim=True)),
    "heads apart": lambda x: torch.cat([each * (i + 1) for i, each in enumerate(x.chunk(4, -1))], -1) * 0.3,
}


# what has to be left: half of the tokens written, or memory written to that is read in two orders
WRITTEN = {"half written", "added in place"}


QUICK = ("norm", "rotated in place", "half written", "added in place", "dense self-attention", "cumsum", "as a grid")


@pytest.mark.parametrize("name", [pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in STEPS])
def test_a_step_between_two_attentions(name: str, seen: Seen) -> None:
    torch.manual_seed(0)
    check_same(Model((plain, STEPS[name]), (STEPS[name], plain), (plain, plain)))
    assert seen.runs[0][0].matches == (0 if name in WRITTEN else 3)


class Twice(nn.Module):
    """Attention to tokens before and after they are changed in place."""

    def __init__(self, change: Step) -> None:
        super().__init__()
        self.embed, self.first, self.second = nn.Conv3d(3, C, 1), Block(plain, plain), Block(plain, plain)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2).cumsum(1)
        out = self.first(tokens)
        self.change(tokens.view(-1, C), out.cumsum(1).view(-1, C))
        return out + self.second(tokens)


@pytest.mark.parametrize(
    "change",
    [lambda x, y: x.mul_(y.sigmoid()), lambda x, y: x.__setitem__(slice(0, 3), y[:3]), lambda x, y: x.copy_(y)],
)
def test_what_is_written_to_between_attentions_is_not_read_in_two_orders(change: Step, seen: Seen) -> None:
    torch.manual_seed(0)
    model, x, found = Twice(change), torch.randn(1, 3, *GRID), []
    for keep in (True, False):  # without gradients, which in-place writes take away
        backend = fs.backend(fs.VSA(top_k=3), tile=(2, 4, 2), grid=GRID, inner="aot_eager", keep_tiles=keep)
        torch._dynamo.reset()
        with torch.no_grad():
            found.append(torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(x))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    assert set(seen.runs[0][0].refused.values()) & {
        f"the graph writes in place to {name}, whose order would change" for name in ("cumsum", "tokens")
    }


def test_a_square_whose_tokens_are_rows_and_columns_is_left(seen: Seen) -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.qkv = nn.Conv3d(3, S, 1), nn.Linear(S, 3 * S)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.embed(x).flatten(2).transpose(1, 2).sigmoid()
            q, k, v = map(heads, self.qkv(tokens + 0.5 * tokens.transpose(1, 2)).chunk(3, -1))
            return SDPA(q, k, v).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    check_same(Square())
    (reason,) = seen.runs[0][0].refused.values()
    assert "has tokens in two dimensions" in reason


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(*[st.sampled_from(sorted(STEPS))] * 2), min_size=1, max_size=4),
    st.sampled_from(sorted(STEPS)),
    st.sampled_from(sorted(BUILDERS)),
    st.booleans(),
)
def test_any_model(steps: list[tuple[str, str]], last: str, builder: str, checkpointed: bool) -> None:
    """In float64: some of these models magnify roundings."""
    torch.manual_seed(0)
    pairs = [(lambda x, a=a: plain(STEPS[a](x)), lambda x, b=b: STEPS[b](x)) for a, b in steps]
    torch.set_default_dtype(torch.float64)
    try:
        check_same(Model(*pairs, last=STEPS[last], checkpointed=checkpointed), BUILDERS[builder], within=1e-9)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_model_whose_tokens_do_not_fill_tiles_is_left(seen: Seen) -> None:
    check_same(Model((plain, plain), (plain, plain)), grid=(4, 7, 5))
    assert seen.runs[0][0].matches == 0
    assert set(seen.runs[0][0].refused.values()) == {"its tiles are not all full"}


def test_symbolic_sizes_are_left(seen: Seen) -> None:
    model = Model((plain, plain), (plain, plain))
    fs.wrap(model, fs.VSA(top_k=2), tile=(2, 4, 2), grid=lambda m, args, kwargs: args[0].shape[2:], inner="aot_eager")
    for grid in [(4, 8, 4), (4, 8, 6), (4, 12, 8)]:
        model(torch.randn(1, 3, *grid))
    assert [run.matches for run, _ in seen.runs] == [2, 0]
    assert set(seen.last.refused.values()) == {"its sizes are symbolic"}


def test_grids_of_as_many_tokens_are_not_taken_for_one_another(seen: Seen) -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.first, self.second = nn.Conv3d(3, C, 1), Block(plain, plain), Block(plain, plain)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.embed(x).flatten(2).transpose(1, 2)
            marks.GRID(*GRID, 0, 0)
            tokens = self.first(tokens)
            marks.GRID(4, 4, 8, 0, 0)
            return self.second(tokens)

    torch.manual_seed(0)
    check_same(Turned(), wrapped=True)  # only graphs of wrapped models have marks
    assert set(seen.runs[0][0].refused.values()) == {"its graph has calls on several grids"}


def test_one_attention_alone_is_worth_it_where_tokens_meet_before_it(seen: Seen) -> None:
    """One reordering of the input and one of the output, in place of q, k, v and the output."""
    check_same(Model((plain, plain)))
    assert seen.runs[0][0].matches == 1
    check_same(Model((lambda x: x.cumsum(1), plain), last=lambda x: torch.cat([x.cumsum(1)] * 8, -1)[..., :C]))


def test_nothing_is_gained_where_tokens_mix_at_once(seen: Seen) -> None:
    """Queries, keys and values that come from separate mixing ops are reordered either way."""

    class Mixing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(2).transpose(1, 2).repeat(1, 1, 8)
            q, k, v = (heads(x.cumsum(1) * scale) for scale in (0.1, 0.2, 0.3))
            return SDPA(q, k, v).cumsum(2)

    backend = fs.backend(fs.VSA(top_k=3), tile=(2, 4, 2), grid=GRID, inner="aot_eager")
    torch.compile(Mixing(), backend=backend, fullgraph=True, dynamic=False)(torch.randn(1, 4, *GRID))
    assert seen.last.matches == 0
    assert set(seen.last.refused.values()) == {"reordering tokens elsewhere would move as much"}
    assert not seen.named("flexsparse_reorder")


def test_checkpointed_blocks_keep_tiles_inside(seen: Seen) -> None:
    torch.manual_seed(0)
    check_same(Model((plain, plain), (plain, plain), checkpointed=True))
    assert seen.runs[0][0].matches == 2


def test_the_gate_comes_in_tile_order(seen: Seen) -> None:
    outputs = []
    for keep in (True, False):
        torch.manual_seed(0)
        model = Model((plain, plain), (plain, plain))
        fs.wrap(
            model,
            fs.VSA(top_k=2),
            tile=(2, 4, 2),
            grid=GRID,
            gates=["blocks.0", "blocks.1"],
            inner="aot_eager",
            keep_tiles=keep,
        )
        for parameter in fs.gate_parameters(model):
            nn.init.normal_(parameter, std=0.5)
        out = model(torch.randn(1, 3, *GRID, generator=torch.Generator().manual_seed(1)))
        outputs.append([out.detach(), *torch.autograd.grad(out.square().sum(), fs.gate_parameters(model))])
    assert [run.matches for run, _ in seen.runs] == [2]
    for mine, other in zip(*outputs):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)
    assert outputs[0][1].abs().max() > 1e-3


def test_someone_elses_builder_gets_raster_order(seen: Seen) -> None:
    class Own:
        def select(self, q: Tensor, k: Tensor, layout: fs.TileLayout, kv_layout: Any = None, scale: Any = None) -> Any:
            assert layout.order == "raster"
            return fs.VSA(top_k=3).select(q, k, layout)

    check_same(Model((plain, plain), (plain, plain)), Own())
    assert seen.runs == []


def test_the_uuid_follows_the_parts() -> None:
    assert KeepTiles(print, object()).uuid() != KeepTiles(print, object()).uuid()
