"""`select` with counts that cut tiles short: the same tiles as `sparse_attention` keeps, whatever lies past a count."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import flexsparse as fs

LAYOUT = fs.TileLayout(grid=(4, 8, 16))
COUNTS = torch.tensor([64, 8, 64, 3, 64, 20, 0, 64], dtype=torch.int32)


@pytest.mark.parametrize(
    "builder",
    [fs.VSA(top_k=2), fs.VSA(top_k=2, count_bias=True), fs.TopP(mass=0.5), fs.BSA(keep_queries=1, kv_density=0.3)],
)
@pytest.mark.parametrize("past", [0.0, 1e4, math.nan])
def test_tiles_are_those_that_attention_keeps(builder: Any, past: float) -> None:
    make = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, LAYOUT.seq_len, 16, generator=make)
    order, _, _ = LAYOUT.index("cpu")
    hidden = order.view(-1, LAYOUT.slots)[torch.arange(LAYOUT.slots) >= COUNTS[:, None]]
    k, v = (x.index_fill(2, hidden.long(), past) for x in (k, v))
    _, aux = fs.sparse_attention(q, k, v, LAYOUT, builder, tile_counts=COUNTS, return_aux=True)
    selection = builder.select(q, k, LAYOUT, tile_counts=COUNTS)
    assert torch.equal(selection.bits, aux.selection.bits) and torch.equal(selection.counts, aux.selection.counts)
    assert not selection.keep()[..., 6].any()


def test_the_best_tiles_are_those_of_the_means_over_valid_tokens() -> None:
    make = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 2, LAYOUT.seq_len, 16, generator=make, dtype=torch.float64)
    order, _, _ = LAYOUT.index("cpu")
    means = []
    for tile, count in zip(order.view(-1, LAYOUT.slots).long(), COUNTS):
        tokens = tile[: int(count)]
        means.append([x[:, :, tokens].mean(2) if int(count) else x[:, :, 0] * 0 for x in (q, k)])
    q_c, k_c = (torch.stack(part, 2) for part in zip(*means))
    scores = (q_c @ k_c.mT).masked_fill(COUNTS == 0, -math.inf)
    best = scores.topk(2, -1).indices.sort(-1).values
    found = fs.VSA(top_k=2).select(q, k, LAYOUT, tile_counts=COUNTS).kv_indices
    rows = COUNTS > 0  # a query tile without a token has no mean
    assert torch.equal(found[:, :, rows].long(), best[:, :, rows])


def test_density_is_of_valid_tokens_of_queries_and_keys() -> None:
    layout = fs.TileLayout(grid=(4, 16, 16), text_last=256)
    counts = layout.index("cpu")[2].clone()
    counts[-4:] = torch.tensor([8, 0, 0, 0])
    q = torch.randn(1, 1, layout.seq_len, 16)
    _, aux = fs.sparse_attention(q, q, q, layout, fs.VSA(top_k=2), tile_counts=counts, return_aux=True)
    valid = 1024 + 8
    computed = 1024 * (2 * 64 + 8) + 8 * valid
    assert float(aux.density) == pytest.approx(computed / valid**2)
    assert aux.selection.density == pytest.approx(computed / valid**2)
