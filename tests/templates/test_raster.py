"""Rows found by a table: the same bits as from tile order, in every kernel, and nothing is read or written past the tokens.

Shape letters: B batch, H query heads, G KV heads, U all KV tiles, R query rows, S tokens, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flexsparse.compile_passes.templates import tuned, walks
from flexsparse.compile_passes.templates.backward import backward
from flexsparse.compile_passes.templates.forward import forward
from flexsparse.compile_passes.templates.launch import count_launches
from flexsparse.compile_passes.templates.pool import pool, pool_reference
from flexsparse.compile_passes.templates.tiling import gather_reference

from .attention_cases import Case, Problem, build, in_memory

pytestmark = [  # from slots past a tile's count, whose results are dropped
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
CASES = [
    Case(partial=True, B=2, H=2, G=1, first=1, kv_last=1, gated=True, N=2, M=2, D=16),
    Case(query_rows=32, slots=64, partial=True, gated=True, N=2, M=3, D=24, dtype=torch.float16),
    Case(partial=True, popular=True, N=20, M=6, density=0.1),  # columns in pieces
    Case(N=2, M=2, query_rows=64, slots=64, D=16),  # tiles in several steps
]


@pytest.fixture(autouse=True)
def poison(poisoned: None) -> None:
    """Outputs are NaN until they are written."""


def table_of(counts: Tensor, room: int) -> Tensor:
    """A random order of tokens: int32 ``[tiles * room]``, the token in each slot, -1 in slots past a tile's count."""
    table = torch.full((len(counts), room), -1, dtype=torch.int32)
    there = torch.arange(room) < counts[:, None]
    table[there] = torch.randperm(int(there.sum()), dtype=torch.int32)
    return table.flatten()


def rows_of_tokens(x: Tensor, table: Tensor) -> Tensor:
    """``[B, heads, slots, D]`` to ``[B, heads, S, D]``."""
    out = x.new_empty(*x.shape[:2], int((table >= 0).sum()), x.shape[3])
    out[:, :, table[table >= 0].long()] = x[:, :, table >= 0]
    return out


@dataclass
class Both:
    """One problem in tile order, whose padding is zero, and in raster order."""

    tiled: Problem
    raster: Problem
    q_tokens: Tensor
    kv_tokens: Tensor


def both(case: Case, memory: str = "heads inside") -> Both:
    problem = build(case)
    R, U = problem.q.shape[2], problem.kv_counts.shape[1]
    tiles = R // case.query_rows
    rows = torch.randint(1, case.query_rows + 1, (tiles,)) if case.partial else torch.full((tiles,), case.query_rows)
    q_tokens = table_of(rows, case.query_rows)
    kv_tokens = table_of(
        problem.kv_counts.amax(0), case.slots
    )  # samples with less have NaN in tokens past their counts
    padding = (q_tokens < 0)[:, None]
    arrays = {name: getattr(problem, name) for name in ("q", "gate", "grad_out") if getattr(problem, name) is not None}
    arrays = {name: x.masked_fill(padding, 0) for name, x in arrays.items()}
    tiled = replace(problem, **arrays, grad_lse=problem.grad_lse.masked_fill(padding[:, 0], 0))
    arrays = {name: rows_of_tokens(x, q_tokens) for name, x in arrays.items()}
    arrays |= {name: rows_of_tokens(getattr(problem, name), kv_tokens) for name in ("k", "v")}
    raster = replace(tiled, **{name: in_memory(x, memory) for name, x in arrays.items()})
    assert U * case.slots == len(kv_tokens)
    return Both(tiled, raster, q_tokens, kv_tokens)


def run(problem: Problem, with_lse: bool, **tables: Tensor) -> dict[str, Tensor]:
    """Everything forward and backward make."""
    out, lse = forward(*problem.tensors, **problem.keywords, **tables)
    grads = backward(
        problem.grad_out,
        problem.grad_lse if with_lse else None,
        *problem.tensors[:3],
        out,
        lse,
        *problem.tensors[3:],
        **problem.keywords,
        **tables,
    )
    found = dict(zip(("out", "lse", "dq", "dk", "dv", "dcoarse", "dgate"), (out, lse, *grads)))
    return {name: x for name, x in found.items() if x is not None}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("tables", ["qkv", pytest.param("kv", marks=pytest.mark.slow)])
def test_the_same_bits_as_from_tile_order(case: Case, tables: str) -> None:
    at = both(case)
    with count_launches() as in_tiles:
        expected = run(at.tiled, with_lse=case.gated)
    given = {"kv_tokens": at.kv_tokens} | ({"q_tokens": at.q_tokens} if tables == "qkv" else {})
    problem = at.raster if tables == "qkv" else replace(at.tiled, k=at.raster.k, v=at.raster.v)
    with count_launches() as in_raster:
        found = run(problem, case.gated, **given)
    assert in_raster == in_tiles, "no kernel more, and none that moves tokens"
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        if name in ("dk", "dv"):
            x = rows_of_tokens(x, at.kv_tokens)
        elif name in ("out", "dq", "dgate") and tables == "qkv":
            x = rows_of_tokens(x, at.q_tokens)
        assert torch.equal(found[name], x), name
        assert not bool(x.isnan().any()), name
    lies = {"out": "q", "dq": "q", "dgate": "gate", "dk": "k", "dv": "v"}
    for name, source in lies.items():
        if name in found:
            assert found[name].stride() == getattr(problem, source).stride(), name


@pytest.mark.parametrize("counted", [False, True])
def test_packed_rows_with_keys_by_a_table(counted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted: dk and dv look them up in a table that counts them, for the registers of large tiles."""
    monkeypatch.setattr(walks, "counts_rows", lambda D, query_rows: counted)
    at = both(replace(CASES[0], gated=False))
    expected = run(at.tiled, with_lse=False)
    found = run(replace(at.tiled, k=at.raster.k, v=at.raster.v), False, kv_tokens=at.kv_tokens)
    for name, x in expected.items():
        assert torch.equal(found[name], rows_of_tokens(x, at.kv_tokens) if name in ("dk", "dv") else x), name


@pytest.mark.parametrize("memory", ["odd rows", pytest.param("one of a fused three", marks=pytest.mark.slow)])
def test_wherever_rows_lie(memory: str) -> None:
    case = replace(CASES[0], B=1, kv_last=0)
    torch.manual_seed(1)
    expected = run(both(case).raster, False, **_tables(case))
    torch.manual_seed(1)
    found = run(both(case, memory).raster, False, **_tables(case))
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def _tables(case: Case) -> dict[str, Tensor]:
    state = torch.get_rng_state()
    torch.manual_seed(1)
    at = both(case)
    torch.set_rng_state(state)
    return {"q_tokens": at.q_tokens, "kv_tokens": at.kv_tokens}


def test_a_kernel_that_cannot_is_not_chosen() -> None:
    """A Hopper kernel that was measured to be faster keeps tokens in tile order; one that is forced says so."""
    at = both(CASES[3])
    assert tuned.finds_rows(at.raster.q, 64, 64)
    hopper = tuned.Choice(op="dq", kernel="hopper", rows=64, keys=64, num_warps=4, num_stages=2)
    with tuned.using(hopper):
        assert not tuned.finds_rows(at.raster.q, 64, 64)
        out, lse = forward(*at.raster.tensors, **at.raster.keywords, q_tokens=at.q_tokens, kv_tokens=at.kv_tokens)
        with pytest.raises(ValueError, match="'hopper' is forced on dq, and takes no tokens in raster order"):
            run(at.raster, False, q_tokens=at.q_tokens, kv_tokens=at.kv_tokens)
    assert out.isfinite().all() and lse.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_pooling_by_a_table(dtype: torch.dtype) -> None:
    q_counts, kv_counts = torch.tensor([5, 16, 1], dtype=torch.int32), torch.tensor([32, 7], dtype=torch.int32)
    tables = [table_of(q_counts, 16), table_of(kv_counts, 32)]
    tiles = [torch.randn(2, 3, 3, 16, 24).to(dtype), torch.randn(2, 1, 2, 32, 24).to(dtype)]
    tiles = [x.masked_fill((table.view(x.shape[2:4]) < 0)[..., None], 0) for x, table in zip(tiles, tables)]
    raster = [in_memory(rows_of_tokens(x.flatten(2, 3), table), "heads inside") for x, table in zip(tiles, tables)]
    counts = (q_counts, kv_counts)
    shaped = [table.view(x.shape[2:4]) for x, table in zip(tiles, tables)]

    def parts(xs: list[Tensor]) -> list[Any]:
        return [(xs[0], counts[0], False), (xs[1], counts[1], False)]

    expected = pool(parts(tiles))
    mixed = pool(parts([tiles[0], raster[1]]), (None, shaped[1]))
    for found in (pool(parts(raster), shaped), mixed):
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
    reference = pool_reference(parts(raster), shaped)
    for a, b in zip(reference, expected):
        torch.testing.assert_close(a, b)
    (again,) = gather_reference([raster[1]], [tables[1]])
    assert torch.equal(again, tiles[1].flatten(2, 3))
    assert not math.isnan(float(expected[0].sum()))
