"""Lists of pairs of query tiles against their twin, and what the twin itself must be."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flexsparse as fs
from flexsparse.compile_passes.templates.launch import count_launches
from flexsparse.compile_passes.templates.pair_lists import pair_lists, pair_lists_reference, pairs_reference
from flexsparse.tile_bits import pack_bits


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory starts as an index that is in no list."""
    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: allocate(*args, **kwargs).fill_(-7))


def random_keep(*shape: int, density: float) -> Tensor:
    keep = torch.rand(shape) < density
    keep[:, :, -1] = False  # a row that keeps nothing
    return keep


def check(keep: Tensor, frame_tiles: int, spare: int) -> None:
    bits, counts, M = pack_bits(keep), keep.sum(-1, dtype=torch.int32), keep.shape[3]
    capacity = int(counts.max()) + spare
    with count_launches() as launches:
        lists, sizes = pair_lists(bits, counts, M, capacity, frame_tiles)
    assert launches == ["_pair_lists"]
    expected, lengths = pair_lists_reference(bits, counts, M, capacity, frame_tiles)
    assert torch.equal(lists, expected)
    assert torch.equal(sizes[..., :3], lengths[..., :3])


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("frame_tiles", [1, 2, 5, 40])
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 3, 5, 33), (1, 2, 12, 31), (2, 1, 7, 64)], ids=str)
def test_as_the_twin(size: tuple[int, int, int, int], frame_tiles: int, density: float) -> None:
    for spare in (0, 3):
        check(random_keep(*size, density=density), frame_tiles, spare)


@pytest.mark.parametrize("M", [1024, 1025, 2500])
def test_rows_longer_than_what_is_expanded_at_once(M: int) -> None:
    check(random_keep(1, 1, 4, M, density=0.3), 2, 1)


@given(
    N=st.integers(1, 30),
    frame_tiles=st.integers(1, 35),
    seed=st.integers(0, 2**30),
    M=st.integers(1, 70),
    density=st.floats(0, 1),
)
def test_the_twin_is_what_it_says(N: int, frame_tiles: int, seed: int, M: int, density: float) -> None:
    first, second = pairs_reference(N, frame_tiles)
    assert len(first) == (N + 1) // 2
    assert sorted({*first.tolist(), *second.tolist()}) == list(range(N)), "every tile is in one pair"
    alone = first == second
    assert int(alone.sum()) == N % 2, "at most one is by itself"
    apart = second - first
    frames = torch.div(first, frame_tiles, rounding_mode="floor")
    assert bool(((apart == frame_tiles) & (frames % 2 == 0) | (apart == 1) | alone).all())
    assert int((apart == frame_tiles).sum()) >= N // (2 * frame_tiles) * frame_tiles, (
        "neighbours in time where there are two"
    )

    torch.manual_seed(seed)
    keep = torch.rand(1, 1, N, M) < density
    counts = keep.sum(-1, dtype=torch.int32)
    lists, sizes = pair_lists_reference(pack_bits(keep), counts, M, max(int(counts.max()), 1), frame_tiles)
    for i, (a, b) in enumerate(zip(first.tolist(), second.tolist())):
        both, one, two = sizes[0, 0, i, :3].tolist()
        row = lists[0, 0, i].tolist()
        parts = (row[:both], row[both : both + one], row[both + one : both + one + two])
        of_a, of_b = (set(keep[0, 0, n].nonzero().flatten().tolist()) for n in (a, b))
        assert [set(part) for part in parts] == [of_a & of_b, of_a - of_b, of_b - of_a]
        assert all(part == sorted(part) for part in parts) and not any(row[both + one + two :])


def test_neighbours_in_time_are_what_a_layout_says() -> None:
    layout = fs.TileLayout(grid=(8, 12, 20), tile=(2, 4, 4))
    t, h, w = layout.tiles
    assert layout.frame_tiles == h * w == 15
    first, second = pairs_reference(layout.num_tiles, layout.frame_tiles)
    place = torch.arange(layout.num_tiles).view(t, h, w)
    assert torch.equal(first.view(-1, h, w), place[0::2]) and torch.equal(second.view(-1, h, w), place[1::2])
