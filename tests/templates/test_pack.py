"""Packing and unpacking in Triton's interpreter against plain torch: every row, every stride, the same bits twice."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flexsparse import TileLayout, TileSelection
from flexsparse.compile_passes.templates import pack
from flexsparse.compile_passes.templates.launch import count_launches
from flexsparse.masks import BSA
from flexsparse.ops.pack_rows import pack_rows, pack_rows_backward, unpack_rows, unpack_rows_backward

pytestmark = pytest.mark.usefixtures("poisoned")

ODD = TileLayout(grid=(3, 5, 6), tile=(2, 3, 3), text_first=5, text_last=17)  # 32 slots for 18 tokens, borders
WIDE = TileLayout(grid=(4, 4, 8), tile=(4, 4, 8))
CASES: dict[str, tuple[TileLayout, dict[str, Any]]] = {
    "text and borders": (ODD, {"keep_queries": 0.3}),
    "some without a source": (ODD, {"keep_queries": 0.1, "fill": "zero"}),
    "one window a tile": (WIDE, {"keep_queries": 0.1, "window": None}),
    "nearest, 64 of 128 rows": (WIDE, {"fill": "nearest"}),
    "one token": (TileLayout(grid=(1, 1, 1)), {}),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class Given:
    """A choice of queries and what the kernels take of it."""

    def __init__(self, name: str) -> None:
        layout, options = CASES[name]
        self.layout = layout
        q = torch.randn(2, 3, layout.seq_len, 4)
        selection: TileSelection = BSA(**options).select(q, q, layout)
        assert selection.queries is not None
        self.queries = selection.queries
        self.tokens, self.slots, _ = layout.index()
        self.first, self.last = layout.tiles_first * layout.slots, layout.tiles_last * layout.slots
        self.rows = self.first + layout.num_tiles * self.queries.packed + self.last

    def randn(self, length: int, dtype: torch.dtype, D: int = 12) -> Tensor:
        return torch.randn(2, 3, length, D).to(dtype)


def same(mine: Tensor, theirs: Tensor) -> None:
    assert mine.dtype == theirs.dtype and mine.stride() == theirs.stride()
    assert torch.equal(mine, theirs)


def laid(x: Tensor, lies: str) -> Tensor:
    if lies == "heads inside":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if lies == "part of qkv":
        return torch.stack([x.transpose(1, 2)] * 3, 2)[:, :, 1].transpose(1, 2)
    return x.transpose(2, 3).contiguous().transpose(2, 3) if lies == "last stride not 1" else x


LIES = ("contiguous", "heads inside", "part of qkv", "last stride not 1")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_packing_and_its_gradient(name: str, dtype: torch.dtype) -> None:
    given = Given(name)
    q = given.queries
    x, grad = given.randn(given.layout.seq_len, dtype), given.randn(given.rows, dtype)
    ends = (given.first, given.last)
    with count_launches() as names:
        for tiled in (False, True):
            y, slots = (given.layout.to_tiles(x), given.slots) if tiled else (x, None)
            mine = pack.pack_rows(y, q.kept, q.counts, given.tokens, slots, *ends)
            same(mine, pack_rows(y, q.kept, q.counts, q.position, given.tokens, slots, *ends, False))
            for inside in (False, True):
                fields = (q.kept, q.position, given.tokens, given.first, tiled, inside)
                same(pack.pack_rows_backward(grad, *fields), pack_rows_backward(grad, *fields))
    assert names == ["take_kernel"] * 6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_unpacking_and_its_gradient(name: str, dtype: torch.dtype) -> None:
    given = Given(name)
    q = given.queries
    sizes = (given.first, given.last, q.packed)
    for D in (12, 1):
        rows, grad = given.randn(given.rows, dtype, D), given.randn(given.layout.seq_len, dtype, D)
        for fill, inside in ((0.0, True), (-torch.inf, False)):
            with count_launches() as names:
                mine = pack.unpack_rows(rows, q.position, fill, inside)
            assert names == ["take_kernel"]
            same(mine, unpack_rows(rows, q.position, given.tokens, *sizes, fill, inside))
        with count_launches() as names:
            mine = pack.unpack_rows_backward(grad, q.position, given.tokens, given.rows, *sizes)
        assert names == ["sum_kernel"]
        theirs = unpack_rows_backward(grad, q.position, given.tokens, given.rows, *sizes)
        if dtype == torch.bfloat16:  # the interpreter cuts a float32 off where a GPU rounds it
            torch.testing.assert_close(mine, theirs, rtol=2**-7, atol=0)
        else:
            same(mine, theirs)  # the very order of the additions


@pytest.mark.parametrize("lies", LIES)
def test_any_strides(lies: str) -> None:
    given = Given("text and borders")
    q = given.queries
    x, rows = (laid(given.randn(n, torch.float32), lies) for n in (given.layout.seq_len, given.rows))
    ends = (given.first, given.last)
    packed = pack.pack_rows(x, q.kept, q.counts, given.tokens, None, *ends)
    same(packed, pack_rows(x, q.kept, q.counts, q.position, given.tokens, None, *ends, False))
    same(
        pack.unpack_rows(rows, q.position, 0.0, False),
        unpack_rows(rows, q.position, given.tokens, *ends, q.packed, 0.0, False),
    )
    fields = (q.kept, q.position, given.tokens, given.first, False, False)
    same(pack.pack_rows_backward(rows, *fields), pack_rows_backward(rows, *fields))
    sizes = (given.rows, *ends, q.packed)
    same(
        pack.unpack_rows_backward(x, q.position, given.tokens, *sizes),
        unpack_rows_backward(x, q.position, given.tokens, *sizes),
    )


def test_sums_are_in_the_order_of_slots() -> None:
    """1, 2^24 and -2^24 in this order: float32 gives 0, in any other order of the three 1."""
    layout = TileLayout(grid=(1, 1, 16), tile=(1, 1, 16))
    tokens = layout.index()[0]
    position = torch.zeros(1, 1, 16, dtype=torch.int32)
    grad = torch.zeros(1, 1, 16, 4)
    grad[0, 0, 3], grad[0, 0, 7], grad[0, 0, 12] = 1.0, 2.0**24, -(2.0**24)
    for summed in (pack.unpack_rows_backward, unpack_rows_backward):
        out = summed(grad, position, tokens, 16, 0, 0, 16)
        assert bool((out == 0).all())
        out = summed(grad.flip(2), position, tokens, 16, 0, 0, 16)
        assert bool((out[0, 0, 0] == 1).all())


def test_compilations_name_every_argument_once() -> None:
    auto, all_of_them = pack.compilations(False), pack.compilations(True)
    assert len(auto) <= 10 and all(x.auto for x in all_of_them)
    assert len({f"{x.name}{x.config}" for x in all_of_them}) == len(all_of_them) > len(auto)
    for x in all_of_them:
        assert set(x.constants) == {name for name, kind in x.signature.items() if kind == "constexpr"}
        assert set(x.aligned) <= set(x.signature)
