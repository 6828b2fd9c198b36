"""Bytes by formula are the bytes that travel; lengths and refusals of what needs no ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import flexsparse as fs
from distributed.equal import Case, attend, parallel_of
from distributed.processes import Processes
from flexsparse.distributed import heads as heads_module
from flexsparse.distributed import tokens as tokens_module
from flexsparse.distributed.own_tiles import tokens_before
from flexsparse.distributed.parallel import SequenceParallel
from flexsparse.distributed.tokens import Ranks

CASES: dict[str, dict[str, Any]] = {
    "ulysses": {"gate": True},
    "uneven": {"heads": 5, "kv_heads": 5, "grid": (3, 7, 5), "gate": True, "fine_gate": True, "batch": 2},
    "GQA": {"heads": 6, "kv_heads": 2, "last": 4},
    "replicated text": {"first": 3, "last": 5, "gate": True},
    "split text": {"heads": 3, "kv_heads": 3, "text": "split", "first": 3, "last": 5},
    "tiles": {"mesh": (2, 1), "grid": (3, 7, 5), "first": 3, "text": "split"},
}


def _counted(case: Case) -> tuple[list[int], int]:
    """Bytes that this rank receives from others: before attention, of all tiles, after it; and in a backward."""
    parallel, me = parallel_of(case), dist.get_rank()
    counts: list[int] = []
    all_to_all, all_gather = heads_module.all_to_all, tokens_module.all_gather

    backward: list[int] = []

    def exchange(x: Any, received: Any, sent: Any, group: Any) -> Any:
        counts.append((sum(received) - received[me]) * x.element_size())
        backward.append((sum(sent) - sent[me]) * x.element_size())  # gradients of what it sent come back
        return all_to_all(x, received, sent, group)

    def gather(x: Any, group: Any) -> Any:
        counts.append(x.numel() * x.element_size() * (dist.get_world_size() - 1))
        backward.append(counts[-1])
        return all_gather(x, group)

    local = {name: parallel.shard(x, case.layout, dim=2) for name, x in case.tensors().items()}
    heads_module.all_to_all, tokens_module.all_gather = exchange, gather
    try:
        attend(parallel, case, case.builder, local)
    finally:
        heads_module.all_to_all, tokens_module.all_gather = all_to_all, all_gather
    del counts[-1]  # unshard's, which is no part of attention
    del backward[-1]
    return [counts[0], 0, counts[1]] if case.mesh[0] == 1 else [0, counts[0], 0], sum(backward)


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_that_travel(two: Processes, name: str) -> None:
    case = Case(**CASES[name])
    counted = two.run(_counted, case)
    found = fs.distributed.traffic(
        case.layout,
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_dim=16,
        tiles=case.mesh[0],
        ulysses=case.mesh[1],
        gates=case.gate + case.fine_gate,
        text=case.text,
        batch=case.batch,
        itemsize=4,
    )
    forward, backward = zip(*counted)
    assert [found.enter, found.gather, found.leave] == max(forward, key=sum)
    assert found.backward == max(backward)


def test_the_even_case_is_the_known_formula() -> None:
    layout = fs.TileLayout(grid=(4, 8, 8))
    found = fs.distributed.traffic(layout, heads=8, head_dim=64, ulysses=4)
    assert found.total == 4 * (256 // 4) * 8 * 64 * 2 * 3 // 4
    assert fs.distributed.traffic(layout, heads=8, head_dim=64).total == 0


def test_no_rank_receives_what_two_receive_at_most() -> None:
    """Five heads and 25 tokens on two ranks: the one with more heads receives more before attention, and less after it."""
    found = fs.distributed.traffic(fs.TileLayout(grid=(1, 5, 5)), heads=5, head_dim=1, ulysses=2, itemsize=1)
    assert (found.enter, found.leave) == (3 * 3 * 12, 13 * 2)
    assert found.backward == 3 * 12 * 3 + 2 * 13  # of the other one, which gets the gradients of what it sent
    even = fs.distributed.traffic(fs.TileLayout(grid=(4, 8, 8)), heads=8, head_dim=64, ulysses=4)
    assert even.backward == even.total


def test_replicated_text_adds_its_outputs() -> None:
    """They go to every rank; its queries, keys, values and gates stay where they are."""
    sizes = {"heads": 8, "head_dim": 64, "ulysses": 4, "gates": 1}
    with_text, without = (
        fs.distributed.traffic(fs.TileLayout(grid=(4, 8, 8), text_last=last), **sizes) for last in (16, 0)
    )
    assert with_text.enter == without.enter
    assert with_text.leave - without.leave == 8 * 3 // 4 * 16 * 64 * 2


def test_more_ranks_than_heads() -> None:
    layout = fs.TileLayout(grid=(4, 8, 8))
    for name, wrong in (("heads", 0), ("batch", 0), ("ulysses", 0), ("tiles", 0.5), ("gates", 3), ("kv_heads", 3)):
        with pytest.raises(ValueError, match=f"^{name} is {wrong}.*: give "):
            fs.distributed.traffic(layout, **{"heads": 4, "head_dim": 64, name: wrong})
    with pytest.raises(ValueError, match="at most one rank a head"):
        fs.distributed.traffic(fs.TileLayout(grid=(4, 8, 8)), heads=2, head_dim=64, ulysses=4)


@pytest.mark.parametrize(
    "grid, tile", [((7, 9, 5), (3, 4, 2)), ((1, 1, 1), (4, 4, 4)), ((4, 8, 8), (2, 4, 4)), ((3, 2, 9), (2, 4, 4))]
)
def test_tokens_before_a_tile(grid: tuple[int, int, int], tile: tuple[int, int, int]) -> None:
    layout = fs.TileLayout(grid=grid, tile=tile)
    before = torch.cat([torch.zeros(1, dtype=torch.int64), layout.tile_counts.cumsum(0)])
    assert [tokens_before(layout, i) for i in range(layout.num_tiles + 1)] == before.tolist()


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_parts_are_those_of_torch(ranks: int) -> None:
    """So that a caller may cut tokens without us."""
    layout = fs.TileLayout(grid=(3, 7, 5), text_first=2)
    x = torch.randn(2, layout.seq_len, 3)
    for rank in range(ranks):
        joined = SequenceParallel.planned(Ranks("", rank, ranks), Ranks(), "joined")
        assert torch.equal(joined.shard(x, layout), x.tensor_split(ranks, 1)[rank])
        replicated = SequenceParallel.planned(Ranks("", rank, ranks), Ranks())
        video = x[:, 2:].tensor_split(ranks, 1)[rank]
        assert torch.equal(replicated.shard(x, layout), torch.cat([x[:, :2], video], 1))


def test_ranks_of_tiles_hold_runs_of_whole_tiles() -> None:
    """Together they hold the tokens in tile order, without padding."""
    layout = fs.TileLayout(grid=(3, 7, 5), tile=(2, 4, 4))
    x = torch.randn(1, layout.seq_len, 3)
    planned = [SequenceParallel.planned(Ranks(), Ranks("", rank, 3)) for rank in range(3)]
    held = [one.shard(x, layout) for one in planned]
    wanted = layout.to_tiles(x)[:, layout.index()[0] >= 0]
    assert torch.equal(torch.cat(held, 1), wanted)
    counts = layout.tile_counts.split([3, 3, 2])
    assert [one.shape[1] for one in held] == [int(count.sum()) for count in counts]


def test_a_mesh_that_is_none() -> None:
    with pytest.raises(TypeError, match="give a torch DeviceMesh"):
        fs.distributed.SequenceParallel(ulysses="cuda:0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="neither ulysses nor tiles"):
        fs.distributed.SequenceParallel()
