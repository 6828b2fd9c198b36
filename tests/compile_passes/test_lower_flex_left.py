"""What `LowerFlex` leaves: any FlexAttention but that over the list of tiles of one selection."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

import flexsparse as fs
from flexsparse.backends.flex import _identity
from flexsparse.block_lists import block_lists, block_mask, tile_mask_mod
from flexsparse.compile_passes import LowerFlex, lower_flex
from flexsparse.compile_passes.fusion_guard import compile_eagerly
from flexsparse.compile_passes.lower_flex import FORWARD
from flexsparse.selection import TileSelection

from .capture import joint_graphs
from .lowering_cases import (
    CASES,
    TOKENS,
    C,
    assert_same,
    check_lowered,
    definition,
    run,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


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

        whole = block_mask(lists_of(lists), columns=False).as_tuple()
        rows, slots = sizes_of(*whole[-3:-1])
        operands = (*whole[:-3], rows, slots, mask)
        options = {
            "BACKEND": "AUTO",
            "PRESCALE_QK": False,
            "ROWS_GUARANTEED_SAFE": False,
            "BLOCKS_ARE_CONTIGUOUS": False,
            "WRITE_DQ": True,
            "OUTPUT_LOGSUMEXP": False,
            "OUTPUT_MAX": False,
        }
        out, *_ = FORWARD(q, k, v, score_mod, operands, 0.5, options, (), buffers_of(lists))
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
    assert (lower.matches, lower.lowered, lower.refused) == ((1, 0), {"call": "gather"}, {})
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
    assert (lower.matches, lower.lowered) == ((0, 0), {})
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
    assert lower.lowered == {"call": "gather"}


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


@pytest.mark.parametrize("attention", ["auto", "gather", "flex"])
@pytest.mark.parametrize("cuda", [False, True])
def test_what_a_graph_shows_for_what_was_chosen(attention: str, cuda: bool) -> None:
    """On CUDA gather is chosen where the templates and FlexAttention's backward both refuse (D=20 in training, on sm90)."""
    backend = fs.backend(fs.VSA(top_k=1), grid=(4, 8, 8), attention=attention)
    q = SimpleNamespace(is_cuda=cuda, dtype=torch.float32)
    shown = backend.in_graph("gather", q)  # type: ignore[arg-type]
    assert shown == ("flex" if attention == "auto" and not cuda else "gather")
    assert backend.in_graph("triton", q) == backend.in_graph("flex", q) == "flex"  # type: ignore[arg-type]
