"""Attention of a sequence on several ranks is attention of the whole: outputs, gradients, and the very same tiles."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import flexsparse as fs
from distributed.equal import Case, compare, infer, raised
from distributed.processes import Processes
from flexsparse import tables
from flexsparse.distributed.own_tiles import TABLES, OwnTiles, _tables, own_tile_index
from flexsparse.distributed.tokens import Ranks

NEAR = fs.SlidingTile(window=(1, 3, 3))
TEXT = {"first": 5, "last": 7}
ULYSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gates": {"gate": True, "fine_gate": True},
    "one KV head": {"kv_heads": 1},
    "odd heads": {"heads": 3, "kv_heads": 3, "gate": True},
    "unequal groups": {"heads": 6, "kv_heads": 3, "gate": True},
    "odd tokens": {"grid": (3, 7, 5), "gate": True, "batch": 2},
    "replicated text": {**TEXT, "gate": True},
    "split text": {**TEXT, "text": "split", "gate": True},
    "joined text": {"first": 5, "last": 6, "text": "joined"},
    "text lengths": {"last": 20, "batch": 2, "counts": (3, 1)},
    "given tiles": {"given": True},
    "BSA": {"builder": fs.BSA(kv_density=0.5)},
    "given tiles of BSA": {"builder": fs.BSA(kv_density=0.5), "given": True},
    "a builder a head": {"builder": fs.PerHead(builders=(fs.VSA(top_k=2), fs.Dense()), heads=(0, 1, 1, 0))},
    "nested": {"builder": fs.Union(fs.PerHead(builders=(fs.VSA(top_k=2), NEAR), heads=(0, 1, 1, 1)), fs.VSA(top_k=1))},
    "float64": {"dtype": torch.float64, "gate": True},
    "bfloat16": {"dtype": torch.bfloat16},
}
TILES: dict[str, dict[str, Any]] = {
    "one head": {"heads": 1, "kv_heads": 1, "gate": True},
    "partial tiles": {"grid": (3, 7, 5), "gate": True, "fine_gate": True, "batch": 2, **TEXT},
    "split text": {"grid": (3, 7, 5), "gate": True, "text": "split", **TEXT},
    "unfilled slots": {"grid": (3, 6, 5), "tile": (3, 3, 5), "gate": True, "builder": fs.VSA(top_k=1)},
    "GQA": {"heads": 4, "kv_heads": 2},
    "given tiles": {"given": True, "grid": (3, 7, 5)},
    "static": {"builder": NEAR},
    "static and dynamic": {"builder": fs.VSA(top_k=2, within=NEAR), "gate": True},
    "nested": {"builder": fs.Union(NEAR, fs.TopP(mass=0.3)), "grid": (3, 7, 5)},
    "a builder a head": {
        "builder": fs.PerHead(builders=(fs.VSA(top_k=2), NEAR), heads=(0, 1, 1, 0)),
        "grid": (3, 7, 5),
    },
    "BSA": {"builder": fs.BSA(keep_queries=1, kv_density=0.5)},
    "text lengths": {"last": 20, "batch": 2, "counts": (3, 1)},
}


@pytest.mark.parametrize("which", TABLES)
def test_what_a_graph_does_to_an_index_tensor_changes_no_other(which: str) -> None:
    """Inductor writes other results into what an op returned: a cached tensor would be wrong from the second call on."""
    arguments = ((3, 7, 5), (2, 2, 4), 2, 3, "replicated", 1, 2, which, torch.device("cpu"))
    before = own_tile_index(*arguments).clone()
    own_tile_index(*arguments).zero_()
    assert torch.equal(own_tile_index(*arguments), before)


def test_what_is_cached_for_cuda_is_made_in_a_thread_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the thread in which torch warms up a CUDA graph, the graph takes all memory that stays."""
    own = OwnTiles(fs.TileLayout(grid=(3, 7, 5), tile=(2, 2, 4)), Ranks("", 1, 2), "replicated")
    threads, moved = [], tables._moved

    def move(tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        if device.type == "cuda":
            threads.append(threading.get_ident())
        return moved(tensors, torch.device("cpu"), dtype)

    monkeypatch.setattr(tables, "_moved", move)
    on_cuda, on_cpu = (_tables.__wrapped__(own, torch.device(name)) for name in ("cuda", "cpu"))
    assert len(threads) == 1 and threads[0] != threading.get_ident()
    assert all(torch.equal(on_cuda[name], on_cpu[name]) for name in TABLES)


@pytest.mark.parametrize("name", ULYSSES)
def test_ulysses(two: Processes, name: str) -> None:
    two.run(compare, Case(**ULYSSES[name]))


@pytest.mark.parametrize("name", TILES)
def test_tiles(two: Processes, name: str) -> None:
    two.run(compare, Case(mesh=(2, 1), **TILES[name]))


@pytest.mark.parametrize("heads, kv_heads", [(3, 3), (8, 2), (4, 1), (5, 5)])
def test_three_ranks(three: Processes, heads: int, kv_heads: int) -> None:
    """Heads and tokens that three does not divide; groups of KV heads that ranks share."""
    three.run(compare, Case(heads=heads, kv_heads=kv_heads, grid=(2, 5, 7), mesh=(1, 3), gate=True, first=2))


FOUR: dict[str, dict[str, Any]] = {
    "ulysses": {"mesh": (1, 4), "heads": 10, "kv_heads": 2, "gate": True},
    "tiles": {"mesh": (4, 1), "heads": 1, "kv_heads": 1, "grid": (7, 9, 5), "gate": True},
    "both": {"mesh": (2, 2), "heads": 3, "kv_heads": 3, "grid": (3, 7, 5), "gate": True, **TEXT},
    "both, split text": {"mesh": (2, 2), "heads": 2, "kv_heads": 1, "text": "split", **TEXT},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_ranks(four: Processes, name: str) -> None:
    four.run(compare, Case(**FOUR[name]))


@pytest.mark.parametrize("mesh", [(1, 2), (2, 1)])
def test_inference_then_training(two: Processes, mesh: tuple[int, int]) -> None:
    two.run(infer, Case(mesh=mesh, grid=(2, 5, 7), gate=True, first=2))  # a grid of its own: nothing is cached yet


def test_compiled(two: Processes) -> None:
    """One graph, through flexsparse's backend; without Inductor, which takes a minute."""
    two.run(compare, Case(compile="aot_eager", gate=True, heads=3, kv_heads=3, grid=(3, 7, 5), first=3), limit=60)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 2), (2, 1)])
@pytest.mark.parametrize("compiler", ["inductor", "flexsparse"])
def test_compiled_to_code(two: Processes, compiler: str, mesh: tuple[int, int]) -> None:
    two.run(compare, Case(compile=compiler, gate=True, grid=(3, 7, 5), first=3, last=2, mesh=mesh), limit=400)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "ranks": ({"heads": 1, "kv_heads": 1}, "q has 1 heads and the ulysses mesh 2 ranks"),
    "PerHead": (
        {"builder": fs.PerHead(builders=(fs.Dense(),), heads=(0, 0))},
        "PerHead heads has 2 entries, but q has 4",
    ),
    "pruned queries": ({"builder": fs.BSA(), "mesh": (2, 1)}, "give keep_queries=1"),
    "statistics": (
        {"builder": fs.BSA(keep_queries=1, statistics="head"), "mesh": (2, 1)},
        "give statistics='row'",
    ),
    "tiles": ({"grid": (1, 4, 4), "mesh": (2, 1), "builder": fs.Dense()}, "has 1 tiles of"),
    "joined": ({"text": "joined", "mesh": (2, 1)}, "give 'replicated' or 'split'"),
    "text": ({"text": "whole"}, "text is 'whole'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_clear_errors(two: Processes, name: str) -> None:
    case, message = WRONG[name]
    for said in two.run(raised, Case(**case)):
        assert message in said, said
