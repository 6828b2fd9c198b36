"""The ops' schemas, which kernels and passes are built on, and their promises to the compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flexsparse as fs
from flexsparse.selection import TileSelection
from flexsparse.tile_bits import pack_bits

ops = torch.ops.flexsparse

SCHEMAS = {
    "coarse_select": "(Tensor q, Tensor k, Tensor? v, Tensor q_counts, Tensor kv_counts, Tensor? allowed, Tensor? now, "
    "str rule, float value, SymInt min_tiles, SymInt capacity, float scale, bool count_bias, Tensor? q_tokens=None, "
    "Tensor? kv_tokens=None, Tensor? q_back=None, Tensor? kv_back=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "coarse_select_backward": "(Tensor d_coarse, Tensor coarse, Tensor lse, Tensor q_c, Tensor k_c, Tensor v_c, "
    "Tensor q_counts, Tensor kv_counts, Tensor? allowed, SymInt q_slots, SymInt kv_slots, float scale, bool count_bias, "
    "ScalarType q_dtype, ScalarType k_dtype, ScalarType v_dtype) -> (Tensor, Tensor, Tensor)",
    "select_tiles": "(Tensor scores, Tensor? allowed, Tensor? now, str rule, float value, SymInt min_tiles, "
    "SymInt capacity) -> (Tensor, Tensor, Tensor)",
    "tile_attention": "(Tensor q, Tensor k, Tensor v, Tensor? coarse, Tensor? gate, Tensor bits, Tensor counts, "
    "Tensor kv_counts, SymInt query_rows, SymInt first_rows, SymInt last_rows, SymInt kv_first, SymInt kv_video, "
    "SymInt slots, SymInt capacity, SymInt frame_tiles, bool partial, float scale, bool wants_lse, "
    "Tensor? q_tokens=None, Tensor? kv_tokens=None, bool token_major=False) -> (Tensor, Tensor)",
    "tile_attention_backward": "(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? out, Tensor lse, "
    "Tensor? coarse, Tensor? gate, Tensor bits, Tensor counts, Tensor kv_counts, SymInt query_rows, SymInt first_rows, "
    "SymInt last_rows, SymInt kv_first, SymInt kv_video, SymInt slots, SymInt capacity, SymInt frame_tiles, bool partial, "
    "float scale, Tensor? q_tokens=None, Tensor? kv_tokens=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "pack_tiles": "(Tensor keep) -> (Tensor, Tensor)",
    "within_capacity": "(Tensor counts, SymInt capacity) -> Tensor",
    "pack_lists": "(Tensor indices, Tensor counts, SymInt tiles) -> (Tensor, Tensor)",
    "block_lists": "(Tensor bits, Tensor counts, Tensor kv_counts, SymInt query_rows, SymInt first_rows, "
    "SymInt last_rows, SymInt kv_first, SymInt kv_video, SymInt slots, SymInt capacity, SymInt frame_tiles, bool partial, "
    "str call) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "block_columns": "(Tensor table, Tensor tile_counts, SymInt slots) -> (Tensor, Tensor, Tensor, Tensor)",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schema_is_frozen(name: str) -> None:
    assert str(getattr(ops, name).default._schema) == f"flexsparse::{name}{SCHEMAS[name]}"


B, H, G, N, M, D = 2, 4, 2, 3, 40, 8
LAYOUT = fs.TileLayout(grid=(2, 3, 3), tile=(2, 2, 2), text_first=2, text_last=20)


def check(op: Any, *arguments: Any, tests: tuple[str, ...] = ()) -> None:
    """All of opcheck, symbolic sizes included."""
    every = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, arguments, test_utils=tests or every)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def bitmask(*shape: int) -> Tensor:
    return pack_bits(torch.rand(shape) < 0.5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("with_values", (False, True))
def test_coarse_select_keeps_its_promises(with_values: bool, dtype: torch.dtype) -> None:
    q, k, v = leaf(B, H, N, 16, D, dtype=dtype), leaf(B, G, M, 32, D, dtype=dtype), leaf(B, G, M, 32, D, dtype=dtype)
    counts = torch.full((N,), 16, dtype=torch.int32), torch.randint(1, 33, (B, M)).int()
    rule = (None, "top_k", 5.0, 1, 7, 0.3, False)
    check(ops.coarse_select.default, q, k, v if with_values else None, *counts, None, *rule)


@pytest.mark.parametrize("rule", ("top_k", "sparsity", "normal", "probability", "mass", "all"))
def test_coarse_select_keeps_its_promises_for_every_rule(rule: str) -> None:
    q, k, v = leaf(1, 2, N, 1, D), leaf(1, 2, M, 1, D), leaf(1, 2, M, 1, D)
    ones = torch.ones(N, dtype=torch.int32), torch.ones(M, dtype=torch.int32)
    now = torch.tensor(3 if rule == "top_k" else 0.5)
    check(ops.coarse_select.default, q, k, v, *ones, bitmask(1, 1, N, M), now, rule, 0.0, 1, M, 0.3, True)


def test_coarse_select_backward_keeps_its_promises() -> None:
    q_c, k_c, v_c = torch.randn(B, H, N, D), torch.randn(B, G, M, D), torch.randn(B, G, M, D)
    counts = torch.full((N,), 16, dtype=torch.int32), torch.full((M,), 16, dtype=torch.int32)
    floats = torch.randn(B, H, N, D), torch.randn(B, H, N, D), torch.randn(B, H, N) + 9, q_c, k_c, v_c
    rest = bitmask(B, 1, N, M), 16, 32, 0.3, True
    for dtypes in ((torch.float32,) * 3, (torch.bfloat16, torch.float32, torch.float16)):
        check(ops.coarse_select_backward.default, *floats, *counts, *rest, *dtypes)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_select_tiles_keeps_its_promises(dtype: torch.dtype) -> None:
    scores = torch.randn(B, H, N, M, dtype=dtype)
    check(ops.select_tiles.default, scores, None, None, "top_k", 3.0, 1, 9)
    check(ops.select_tiles.default, scores, bitmask(B, H, N, M), torch.tensor(0.5), "mass", 0.0, 2, M)


def selection(batch: int = B) -> TileSelection:
    return TileSelection.from_mask(torch.rand(batch, H, LAYOUT.num_tiles, LAYOUT.num_tiles) < 0.6, LAYOUT)


def test_packing_keeps_its_promises() -> None:
    check(ops.pack_tiles.default, torch.rand(B, H, N, M) < 0.5)
    check(ops.within_capacity.default, torch.randint(0, 6, (B, H, N), dtype=torch.int32), 5)
    check(ops.pack_lists.default, torch.randint(0, M, (B, H, N, 5)), torch.randint(0, 6, (B, H, N)), M)


def test_block_lists_keeps_its_promises() -> None:
    bits, counts, kv_counts, *sizes = selection().operands()
    for given in (kv_counts, torch.randint(0, LAYOUT.slots + 1, (B, LAYOUT.total_tiles)).int()):
        check(ops.block_lists.default, bits, counts, given, *sizes, "name")


def attention_arguments(dtype: torch.dtype, gated: bool) -> tuple[list[Any], tuple[Any, ...]]:
    tokens = LAYOUT.padded_len
    q, k, v = leaf(B, H, tokens, D, dtype=dtype), leaf(B, G, tokens, D, dtype=dtype), leaf(B, G, tokens, D, dtype=dtype)
    coarse = leaf(B, H, LAYOUT.num_tiles, D) if gated else None
    gate = leaf(B, H, tokens, D, dtype=dtype) if gated else None
    return [q, k, v, coarse, gate], (*selection().operands(), 0.3)


@pytest.mark.parametrize("gated", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_tile_attention_keeps_its_promises(dtype: torch.dtype, gated: bool) -> None:
    tensors, rest = attention_arguments(dtype, gated)
    check(ops.tile_attention.default, *tensors, *rest, True)
    plain = [None if x is None else x.detach() for x in tensors]
    check(ops.tile_attention.default, *plain, *rest, False)
    check(ops.tile_attention.default, *tensors, *rest, True, None, None, True)


@pytest.mark.parametrize("gated", (False, True))
def test_tile_attention_backward_keeps_its_promises(gated: bool) -> None:
    tensors, rest = attention_arguments(torch.float32, gated)
    plain = [None if x is None else x.detach() for x in tensors]
    out, lse = ops.tile_attention(*plain, *rest, True)
    for grad_lse in (None, torch.randn(lse.shape)):
        grad = torch.randn(out.shape)
        for given in (out, None):
            check(ops.tile_attention_backward.default, grad, grad_lse, *plain[:3], given, lse, *plain[3:], *rest)


@pytest.mark.parametrize("tiles", (1, 31, 32, 33, 64))
def test_fake_results_have_the_shapes_of_real_ones_at_any_number_of_words(tiles: int) -> None:
    scores = torch.randn(1, 1, 2, tiles)
    real = ops.select_tiles(scores, None, None, "all", 0.0, 1, tiles)
    fake = ops.select_tiles(scores.to("meta"), None, None, "all", 0.0, 1, tiles)
    assert [x.shape for x in real] == [x.shape for x in fake]
