"""Uncompiled calls of the templates leave tokens in raster order: the same bits as from tile order, in the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flexsparse as fs
import flexsparse.attention as attention
from flexsparse.compile_passes.templates import tuned

B, H, G, D = 1, 2, 1, 16
LAYOUT = fs.TileLayout(grid=(2, 3, 5), tile=(2, 2, 4), text_last=3)
KEYS = fs.TileLayout(grid=(2, 3, 5), tile=(4, 2, 4), text_last=3)


@pytest.fixture
def tiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was brought to tile order."""
    seen: list[str] = []
    original = attention.tiles_of

    def tiles_of(*args: Any) -> Any:
        seen.append("tiles")
        return original(*args)

    monkeypatch.setattr(attention, "tiles_of", tiles_of)
    return seen


def outcome(builder: Any, gated: bool, kv_layout: fs.TileLayout | None = None) -> list[Tensor]:
    """Output, log-sum-exp, coarse output and gradients."""
    torch.manual_seed(0)
    S = LAYOUT.seq_len
    leaves = [torch.randn(B, S, heads, D).transpose(1, 2).requires_grad_() for heads in (H, G, G, H)]
    gate = leaves[3] if gated else None
    how: dict[str, Any] = {"gate": gate, "kv_layout": kv_layout, "backend": "triton", "return_aux": True}
    out, aux = fs.sparse_attention(*leaves[:3], LAYOUT, builder, **how)
    loss = (out * torch.randn(out.shape)).sum() + aux.lse.clamp_min(-9).square().sum()
    grads = torch.autograd.grad(loss, leaves if gated else leaves[:3])
    coarse = [] if aux.coarse_out is None else [aux.coarse_out.detach()]
    return [out.detach(), aux.lse.detach(), *coarse, *grads]


def given(selector: Any) -> Callable[[], Any]:
    q, k = (torch.randn(B, heads, LAYOUT.seq_len, D) for heads in (H, G))
    return selector.select(q, k, LAYOUT, kv_layout=KEYS)


@pytest.mark.parametrize(
    "name", ("VSA", *(pytest.param(x, marks=pytest.mark.slow) for x in ("TopP", "static", "selection")))
)
def test_the_same_bits_as_from_tile_order(name: str, tiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    builders = {
        "VSA": fs.VSA(top_k=2),
        "TopP": fs.TopP(mass=0.6),
        "static": fs.SlidingTile(window=(1, 3, 1)),
        "selection": given(fs.VSA(top_k=2)),
    }
    kv_layout = KEYS if name in ("TopP", "selection") else None
    how = (builders[name], name in ("VSA", "TopP"), kv_layout)
    found = outcome(*how)
    assert not tiled
    monkeypatch.setattr(tuned, "finds_rows", lambda *case: False)
    expected = outcome(*how)
    assert tiled
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Own(fs.VSA):
    """Reads tiles itself."""

    def plan(self, coarse: Any, v: Tensor | None = None) -> Any:
        assert coarse.q.dim() == 5
        return super().plan(coarse, v)


@pytest.mark.parametrize("builder", (fs.BSA(kv_density=0.4), Own(top_k=2)), ids=("packed queries", "own plan"))
def test_who_reads_tiles_gets_them(builder: Any, tiled: list[str]) -> None:
    q, k, v = (torch.randn(B, heads, LAYOUT.seq_len, D) for heads in (H, G, G))
    fs.sparse_attention(q, k, v, LAYOUT, builder, backend="triton")
    assert tiled
