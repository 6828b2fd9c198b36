"""Uncompiled calls of the templates leave tokens in raster order: the same bits as from tile order, in the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flexsparse as fs
import flexsparse.attention as attention
import flexsparse.calls as calls
from flexsparse.backends import triton
from flexsparse.compile_passes.templates import tuned
from flexsparse.text_masks import TextMask

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
    "name",
    [
        pytest.param(name, marks=() if name in ("VSA", "BSA") else pytest.mark.slow)
        for name in ("VSA", "TopP", "static", "selection", "BSA", "BSA of a head", "joined", "packed selection")
    ],
)
def test_the_same_bits_as_from_tile_order(name: str, tiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    builders = {
        "VSA": fs.VSA(top_k=2),
        "TopP": fs.TopP(mass=0.6),
        "static": fs.SlidingTile(window=(1, 3, 1)),
        "selection": given(fs.VSA(top_k=2)),
        "BSA": fs.BSA(kv_density=0.4, fill="zero"),
        "BSA of a head": fs.BSA(kv_density=0.4, statistics="head", score_queries="all"),
        "joined": fs.Union(fs.BSA(kv_density=0.3), fs.SlidingTile(window=(1, 1, 3))),
        "packed selection": given(fs.BSA(kv_density=0.4)),
    }
    kv_layout = KEYS if name in ("TopP", "selection", "packed selection") else None
    how = (builders[name], name in ("VSA", "TopP"), kv_layout)
    found = outcome(*how)
    assert not tiled
    monkeypatch.setattr(tuned, "finds_rows", lambda *case: False)
    expected = outcome(*how)
    assert tiled
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("dtype", "training"), [(torch.float16, True), (torch.float32, False)], ids=str)
@pytest.mark.parametrize("order", ["raster", "tiles"])
def test_the_kernel_adds_the_gated_coarse_output(
    order: str, dtype: torch.dtype, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As good as adding it afterwards, gradients included; in tile order without extra tokens and padding."""
    layout = LAYOUT if order == "raster" else fs.TileLayout(grid=(2, 4, 8), tile=(2, 2, 4), order="tiles")
    tensors = [torch.randn(B, layout.seq_len, heads, D).transpose(1, 2).double() for heads in (H, G, G, H)]
    grad = torch.randn(B, H, layout.seq_len, D)

    def outcome(dtype: torch.dtype, builder: Any, **how: Any) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_(training) for x in tensors]
        with torch.set_grad_enabled(training):
            out = fs.sparse_attention(*leaves[:3], layout, builder, gate=leaves[3], **how)
        return [out.detach(), *(torch.autograd.grad(out, leaves, grad.to(dtype)) if training else ())]

    apart = []
    original = attention.GatedCoarse.apply
    monkeypatch.setattr(attention.GatedCoarse, "apply", lambda *args: (apart.append(args), original(*args))[1])
    mine = outcome(dtype, fs.VSA(top_k=2), backend="triton")
    assert not apart
    monkeypatch.setattr(triton, "adds_coarse", lambda *args: False)
    other = outcome(dtype, fs.VSA(top_k=2), backend="triton")
    assert len(apart) == 1
    exact = outcome(torch.float64, fs.VSA(top_k=2), backend="reference")
    for one, two, gold in zip(mine, other, exact, strict=True):
        error, usual = ((x.double() - gold).square().mean().sqrt() for x in (one, two))
        assert error <= 1.2 * usual + torch.finfo(dtype).eps * gold.square().mean().sqrt()


class Own(fs.VSA):
    """Reads tiles itself."""

    def plan(self, coarse: Any, v: Tensor | None = None) -> Any:
        assert coarse.q.dim() == 5
        return super().plan(coarse, v)


@pytest.mark.parametrize("joined", (False, True))
def test_who_reads_tiles_gets_them(joined: bool, tiled: list[str]) -> None:
    builder: Any = fs.Union(Own(top_k=2), fs.SlidingTile(window=(1, 1, 1))) if joined else Own(top_k=2)
    q, k, v = (torch.randn(B, heads, LAYOUT.seq_len, D) for heads in (H, G, G))
    fs.sparse_attention(q, k, v, LAYOUT, builder, backend="triton")
    assert tiled


@pytest.mark.parametrize("backend", ["gather", "reference", "triton"])
@pytest.mark.parametrize("lie", ["heads outside", "heads inside"])
@pytest.mark.parametrize(
    "builder", (fs.VSA(top_k=2), fs.BSA(kv_density=0.4), fs.TopP(mass=0.5), fs.Dense()), ids=lambda x: type(x).__name__
)
def test_the_output_may_be_written_to(builder: Any, lie: str, backend: str) -> None:
    """As that of torch's attention: memory that an op makes as a view of its own refuses that in training.

    The templates' backward reads their output, as torch's flash attention does: there torch says that it was written to.
    """
    results = []
    for in_place in (False, True):
        torch.manual_seed(0)
        leaves = [torch.randn(B, heads, LAYOUT.seq_len, D) for heads in (H, G, G)]
        if lie == "heads inside":
            leaves = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in leaves]
        leaves = [x.requires_grad_() for x in leaves]
        out = fs.sparse_attention(*leaves, LAYOUT, builder, backend=backend)
        assert not out._is_view()
        read = backend == "triton" and not isinstance(builder, fs.BSA)
        out = out.mul_(2).add_(1) if in_place else out * 2 + 1
        if in_place and read:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(out.square().sum(), leaves)
            return
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


class Chosen:
    """Somebody's own, which selects from raster order."""

    def select(self, q: Tensor, k: Tensor, layout: Any, kv_layout: Any = None, scale: Any = None) -> Any:
        assert k.isfinite().all(), "hidden text is hidden from it"
        return fs.VSA(top_k=2).select(q, k, layout)


def test_what_a_select_chose_is_attended_in_raster_order(tiled: list[str]) -> None:
    q, k, v = (torch.randn(B, heads, LAYOUT.seq_len, D) for heads in (H, G, G))
    out = fs.sparse_attention(q, k, v, LAYOUT, Chosen(), backend="triton")
    assert not tiled and torch.equal(out, fs.sparse_attention(q, k, v, LAYOUT, fs.VSA(top_k=2), backend="triton"))


@pytest.mark.parametrize("builder", (fs.VSA(top_k=2), fs.BSA(kv_density=0.4), Chosen()), ids=lambda x: type(x).__name__)
def test_hidden_text_is_not_read(builder: Any, tiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels end at its length: nobody zeroes it, in copies of k and v that a backward would keep."""
    monkeypatch.setattr(calls, "tiles_of", attention.tiles_of)
    layout = fs.TileLayout(grid=(2, 3, 5), tile=(2, 2, 4), text_last=20)
    mask = torch.ones(2, 1, 1, layout.seq_len, dtype=torch.bool)
    mask[0, ..., -5:] = mask[1, ..., -18:] = False
    hidden = ~mask[:, :, 0, :, None]
    zeroed: list[str] = []
    hide = TextMask.hide
    monkeypatch.setattr(TextMask, "hide", lambda *args: (zeroed.append("text"), hide(*args))[1])
    q, k, v = (torch.randn(2, heads, layout.seq_len, D) for heads in (H, G, G))
    results = []
    for value in (torch.nan, 0.0):
        leaves = [q.clone(), k.masked_fill(hidden, value), v.masked_fill(hidden, value)]
        leaves = [x.requires_grad_() for x in leaves]
        out = calls.sparse_call(
            builder, *leaves, (None, None), layout, None, "triton", False, text=TextMask.of(mask, layout)
        )
        grads = torch.autograd.grad((out.cos() * ~hidden).sum(), leaves)
        results.append([out, *grads])
        assert all(not bool(x.masked_select(hidden).any()) for x in grads[1:])
    assert not tiled and all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert len(zeroed) == 2 * isinstance(builder, Chosen), "it alone is given the text's keys"


@pytest.mark.parametrize("who", ("nobody", "keys", "gate", "nobody in a model", "gate in a model"))
def test_kernels_of_a_backward_are_asked_where_there_is_one(
    who: str, tiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dq = tuned.Choice(op="dq", kernel="hopper", rows=64, keys=64, num_warps=4, num_stages=2)
    q, k, v, gate = (torch.randn(B, heads, LAYOUT.seq_len, D) for heads in (H, G, G, H))
    with tuned.using(dq):
        if "model" in who:
            rows = gate.transpose(1, 2).flatten(2).requires_grad_("gate" in who)
            monkeypatch.setattr(calls, "tiles_of", attention.tiles_of)
            calls.sparse_call(fs.VSA(top_k=2), q, k, v, (rows, None), LAYOUT, None, "triton", False)
        else:
            k.requires_grad_(who == "keys")
            gate.requires_grad_(who == "gate")
            fs.sparse_attention(q, k, v, LAYOUT, fs.VSA(top_k=2), gate=gate, backend="triton")
    assert bool(tiled) == ("nobody" not in who)
