"""Tile lists in both directions against their twins, with sizes that divide nothing."""

import pytest
import torch
from torch import Tensor

from flexsparse.compile_passes.templates import lists
from flexsparse.compile_passes.templates.launch import count_launches
from flexsparse.tile_bits import pack_bits

SIZES = [(1, 1, 1, 1), (2, 3, 5, 33), (1, 2, 130, 31), (1, 1, 3, 1100), (2, 1, 7, 64)]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory starts as an index that is in no list."""
    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: allocate(*args, **kwargs).fill_(-7))


def kept(B: int, H: int, N: int, M: int, density: float) -> tuple[Tensor, Tensor, int]:
    keep = torch.rand(B, H, N, M) < density
    keep[:, :, -1] = False  # a row that keeps nothing
    counts = keep.sum(-1, dtype=torch.int32)
    return pack_bits(keep), counts, int(counts.max())


@pytest.mark.parametrize("density", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_ascending(size: tuple[int, int, int, int], density: float) -> None:
    bits, counts, most = kept(*size, density)
    M = size[3]
    for capacity in {most, M, M + 3}:
        with count_launches() as launches:
            found = lists.ascending(bits, counts, M, capacity)
        assert len(launches) == (capacity > 0)
        assert torch.equal(found, lists.ascending_reference(bits, counts, M, capacity))


def test_ascending_when_all_is_kept() -> None:
    keep = torch.ones(1, 2, 3, 40, dtype=torch.bool)
    found = lists.ascending(pack_bits(keep), keep.sum(-1, dtype=torch.int32), 40, 40)
    assert torch.equal(found, torch.arange(40, dtype=torch.int32).expand(1, 2, 3, 40))


@pytest.mark.parametrize("density", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_transpose(size: tuple[int, int, int, int], density: float) -> None:
    bits, counts, most = kept(*size, density)
    M = size[3]
    offsets, columns, indices = lists.transpose(bits, counts, M, most + 1)
    expected = lists.transpose_reference(bits, counts, M, most + 1)
    total = int(counts.sum())
    assert offsets.dtype == torch.int64
    assert torch.equal(offsets, expected[0])
    assert torch.equal(columns, expected[1])
    assert indices.shape == expected[2].shape
    assert torch.equal(indices[:total], expected[2][:total])
    assert bool((indices[total:] == -7).all())


def test_transpose_by_its_definition() -> None:
    keep = torch.rand(2, 2, 6, 35) < 0.4
    counts = keep.sum(-1, dtype=torch.int32)
    offsets, columns, indices = lists.transpose(pack_bits(keep), counts, 35, 35)
    for b, h, m in [(0, 0, 0), (0, 1, 34), (1, 0, 31), (1, 1, 32)]:
        start = int(offsets[b, h, m])
        found = indices[start : start + int(columns[b, h, m])]
        assert found.tolist() == keep[b, h, :, m].nonzero()[:, 0].tolist()


def test_rows_of_a_permuted_tensor() -> None:
    keep = torch.rand(3, 2, 5, 33) < 0.5
    bits, counts = pack_bits(keep), keep.sum(-1, dtype=torch.int32)
    turned, turned_counts = bits.transpose(0, 1), counts.transpose(0, 1)
    assert not turned.is_contiguous()
    found = lists.ascending(turned, turned_counts, 33, 33)
    assert torch.equal(found, lists.ascending(bits, counts, 33, 33).transpose(0, 1))
