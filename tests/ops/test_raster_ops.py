"""Ops that find tokens in raster order by tables: results and gradients are those from tile order, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flexsparse as fs
from flexsparse.selection import TileSelection

ops = torch.ops.flexsparse
B, H, G, D = 2, 4, 2, 8
LAYOUT = fs.TileLayout(grid=(3, 4, 5), tile=(2, 2, 2), text_first=3, text_last=20)
KEYS = fs.TileLayout(grid=(3, 4, 5), tile=(2, 4, 4), text_first=3, text_last=20)
TOKENS, BACK, COUNTS = LAYOUT.tables("cpu")
KV_TOKENS, KV_BACK, KV_COUNTS = KEYS.tables("cpu")


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def check(op: Any, *arguments: Any) -> None:
    every = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, arguments, test_utils=every)


def compare(by_table: Any, in_tiles: Any, inputs: list[Tensor]) -> None:
    """Results that have a gradient, and the gradients."""
    grads = None
    found = []
    for function in (by_table, in_tiles):
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        grads = [torch.randn_like(x) for x in outputs] if grads is None else grads
        found.append([*outputs, *torch.autograd.grad(outputs, leaves, grads)])
    for mine, other in zip(*found, strict=True):
        assert torch.equal(mine, other)


def attention(dtype: torch.dtype, gated: bool) -> tuple[list[Tensor], tuple[Any, ...]]:
    S = LAYOUT.seq_len
    inputs = [leaf(B, H, S, D, dtype=dtype), *(leaf(B, G, S, D, dtype=dtype) for _ in "kv")]
    inputs += [leaf(B, H, LAYOUT.num_tiles, D), leaf(B, H, S, D, dtype=dtype)] if gated else []
    keep = torch.rand(B, H, LAYOUT.num_tiles, KEYS.num_tiles) < 0.6
    return inputs, (*TileSelection.from_mask(keep, LAYOUT, KEYS).operands(), 0.3, True)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tile_attention(dtype: torch.dtype, gated: bool) -> None:
    inputs, operands = attention(dtype, gated)

    def by_table(q: Tensor, k: Tensor, v: Tensor, coarse: Any = None, gate: Any = None) -> list[Tensor]:
        out, lse = ops.tile_attention(q, k, v, coarse, gate, *operands, TOKENS, KV_TOKENS)
        return [out, lse.index_select(2, BACK)]

    def in_tiles(q: Tensor, k: Tensor, v: Tensor, coarse: Any = None, gate: Any = None) -> list[Tensor]:
        tiles = LAYOUT.to_tiles(q), KEYS.to_tiles(k), KEYS.to_tiles(v)
        gate = None if gate is None else LAYOUT.to_tiles(gate)
        out, lse = ops.tile_attention(*tiles, coarse, gate, *operands)
        return [LAYOUT.to_raster(out), lse.index_select(2, BACK)]

    compare(by_table, in_tiles, inputs)


@pytest.mark.parametrize("gated", [False, True])
def test_an_output_whose_heads_lie_side_by_side_has_the_same_bits(gated: bool) -> None:
    inputs, operands = attention(torch.float32, gated)
    inputs += [None, None] if not gated else []  # type: ignore[list-item]
    found = []
    for token_major in (False, True):
        out, lse = ops.tile_attention(*inputs, *operands, TOKENS, KV_TOKENS, token_major)
        assert out.is_contiguous() != token_major and out.transpose(1, 2).is_contiguous() == token_major
        leaves = [x for x in inputs if x is not None]
        found.append([out, lse, *torch.autograd.grad([out, lse], leaves, [out.detach().cos(), lse.detach().cos()])])
    for plain, other in zip(*found, strict=True):
        assert torch.equal(plain, other)


def test_tile_attention_with_one_table() -> None:
    inputs, operands = attention(torch.float32, False)

    def by_table(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return [
            LAYOUT.to_raster(ops.tile_attention(LAYOUT.to_tiles(q), k, v, None, None, *operands, None, KV_TOKENS)[0])
        ]

    def in_tiles(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        tiles = LAYOUT.to_tiles(q), KEYS.to_tiles(k), KEYS.to_tiles(v)
        return [LAYOUT.to_raster(ops.tile_attention(*tiles, None, None, *operands)[0])]

    compare(by_table, in_tiles, inputs)


def video(layout: fs.TileLayout, tokens: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
    """The tables that `coarse_select` takes."""
    start = layout.tiles_first * layout.slots
    return tokens.narrow(0, start, layout.num_tiles * layout.slots).view(-1, layout.slots), back - start


def coarse_arguments() -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    counts = COUNTS.narrow(0, LAYOUT.tiles_first, LAYOUT.num_tiles), KV_COUNTS.narrow(0, 1, KEYS.num_tiles)
    tables = video(LAYOUT, TOKENS, BACK), video(KEYS, KV_TOKENS, KV_BACK)
    rest = (*counts, None, None, "top_k", 2.0, 1, 3, 0.3, True)
    return rest, (tables[0][0], tables[1][0], tables[0][1], tables[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coarse_select(dtype: torch.dtype) -> None:
    rest, tables = coarse_arguments()
    S = LAYOUT.seq_len
    inputs = [leaf(B, H, S, D, dtype=dtype), *(leaf(B, G, S, D, dtype=dtype) for _ in "kv")]
    chosen = []

    def by_table(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        found = ops.coarse_select(q, k, v, *rest, *tables)
        chosen.append(found[5:])
        return [found[0]]

    def in_tiles(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        tiles = [one.video(one.to_tiles(x)) for x, one in ((q, LAYOUT), (k, KEYS), (v, KEYS))]
        found = ops.coarse_select(*tiles, *rest)
        chosen.append(found[5:])
        return [found[0]]

    compare(by_table, in_tiles, inputs)
    assert all(torch.equal(mine, other) for mine, other in zip(*chosen, strict=True))


def test_the_ops_keep_their_promises() -> None:
    inputs, operands = attention(torch.float32, True)
    check(ops.tile_attention.default, *inputs, *operands, TOKENS, KV_TOKENS)
    rest, tables = coarse_arguments()
    check(ops.coarse_select.default, *(x.detach().requires_grad_() for x in inputs[:3]), *rest, *tables)
