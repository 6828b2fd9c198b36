"""The Triton templates on a GPU: what the interpreter cannot show (bfloat16, barriers, races, real launches).

Everything here needs a CUDA device and is skipped without one.
"""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from tolerance import assert_as_good, assert_lse
from torch import Tensor, nn

import flexsparse as fs
from flexsparse.ops.choice import Rule, choose

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LAYOUTS = {
    "whole tiles": fs.TileLayout(grid=(4, 8, 8), tile=(4, 4, 4)),
    "partial tiles and text": fs.TileLayout(grid=(5, 6, 9), tile=(4, 4, 4), text_first=3, text_last=70),
    "16 slots": fs.TileLayout(grid=(3, 7, 6), tile=(1, 4, 4)),
    "128 slots": fs.TileLayout(grid=(4, 9, 8), tile=(4, 8, 4)),
    "256 slots": fs.TileLayout(grid=(5, 9, 8), tile=(4, 8, 8)),
}


def inputs(layout: fs.TileLayout, dtype: torch.dtype, D: int, scale: float, G: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    made = [torch.randn(1, heads, layout.seq_len, D, generator=g) for heads in (2, G, G)]
    return [(x * (scale if i < 2 else 1)).to(dtype) for i, x in enumerate(made)]


def selection_of(layout: fs.TileLayout, share: float = 0.4) -> fs.TileSelection:
    g = torch.Generator().manual_seed(4)
    keep = torch.rand(1, 2, layout.num_tiles, layout.num_tiles, generator=g) < share
    return fs.TileSelection.from_mask(keep, layout)


def to(selection: fs.TileSelection, device: str) -> fs.TileSelection:
    return fs.TileSelection.from_mask(selection.keep().to(device), selection.layout, capacity=selection.capacity)


def on_gpu(layout: fs.TileLayout, tensors: list[Tensor], selection: fs.TileSelection, grad: Tensor) -> list[Tensor]:
    q, k, v = (x.cuda().requires_grad_() for x in tensors)
    out, aux = fs.sparse_attention(q, k, v, layout, to(selection, "cuda"), backend="triton", return_aux=True)
    grads = torch.autograd.grad(out, (q, k, v), grad.cuda())
    return [x.detach() for x in (out, *grads, aux.lse)]


@pytest.mark.parametrize("scale", [1.0, 4.0, 8.0, 16.0])
@pytest.mark.parametrize("D", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_output_and_gradients(name: str, dtype: torch.dtype, D: int, scale: float) -> None:
    layout, selection = LAYOUTS[name], selection_of(LAYOUTS[name])
    tensors = inputs(layout, dtype, D, scale)
    grad = (torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(5)) / scale).to(dtype)
    mask = oracle.token_mask(selection.keep(), layout)
    found = on_gpu(layout, tensors, selection, grad)

    def defined(precision: torch.dtype) -> tuple[list[Tensor], Tensor]:
        leaves = [x.to(precision).requires_grad_() for x in tensors]
        out, lse = oracle.attention(*leaves, mask, D**-0.5)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(precision))], lse.detach()

    (gold, lse), (reference, _) = defined(torch.float64), defined(dtype)
    noise = torch.finfo(torch.float32).eps * 4 * (1 + scale**2) * D**0.5
    for what, actual, same, exact in zip(("out", "dq", "dk", "dv"), found, reference, gold):
        assert_as_good(actual.cpu(), same, exact, f"{name} {dtype} D={D} {what}", noise)
    largest = float(tensors[0].double().norm(dim=-1).max() * tensors[1].double().norm(dim=-1).max() * D**-0.5)
    assert_lse(found[-1].cpu(), lse, largest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_runs_agree_bit_for_bit(dtype: torch.dtype) -> None:
    layout = fs.TileLayout(grid=(8, 32, 32), tile=(4, 4, 4))
    tensors, selection = inputs(layout, dtype, 128, 4.0, G=2), selection_of(layout, 0.15)
    grad = torch.randn(tensors[0].shape).to(dtype)
    first = on_gpu(layout, tensors, selection, grad)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, on_gpu(layout, tensors, selection, grad)))


@pytest.mark.parametrize("M", [37, 640, 1440, 5000])
@pytest.mark.parametrize("rule", ["top_k", "sparsity", "normal", "probability", "mass", "all"])
def test_choice_of_tiles(rule: str, M: int) -> None:
    value = {"top_k": 9.0, "sparsity": 0.9, "normal": 0.1, "probability": 0.1, "mass": 0.5, "all": 0.0}[rule]
    scores = torch.randn(1, 3, 33, M, generator=torch.Generator().manual_seed(6))
    if rule in ("top_k", "sparsity"):
        scores = (scores * 8).round() / 8  # ties
    expected = choose(scores, None, Rule(name=rule, value=value), M)
    bits, counts, _ = torch.ops.flexsparse.select_tiles(scores.cuda(), None, None, rule, value, 1, M)
    off = (counts.cpu() - expected.counts).abs()
    assert float((off > 0).double().mean()) < 0.02 and int(off.max()) <= 1  # a score at a threshold may fall either way
    if rule in ("top_k", "sparsity", "all"):
        assert torch.equal(bits.cpu(), expected.bits)


def test_the_coarse_stage_and_its_gradients() -> None:
    layout = LAYOUTS["partial tiles and text"]
    results = []
    for device in ("cpu", "cuda"):
        q, k, v = (x.to(device).requires_grad_() for x in inputs(layout, torch.float32, 64, 1.0))
        gate = torch.full_like(q, 0.5)
        _, aux = fs.sparse_attention(q, k, v, layout, fs.VSA(top_k=3), gate=gate, return_aux=True)
        assert aux.coarse_out is not None
        grads = torch.autograd.grad(aux.coarse_out.sum(), (q, k, v))
        results.append([x.detach().cpu() for x in (aux.coarse_out, *grads, aux.selection.bits)])
    assert torch.equal(results[0][-1], results[1][-1])
    for a, b in zip(results[0][:-1], results[1][:-1]):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(128, 384), nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 64)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def compiled(**options: Any) -> tuple[Any, Any, Attention]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Attention().cuda()
    backend = fs.backend(fs.VSA(top_k=4), grid=(8, 8, 8), **options)
    return torch.compile(model, backend=backend, fullgraph=True), backend, model


def test_a_compiled_model_trains_through_the_templates() -> None:
    x = torch.randn(1, 512, 128, device="cuda")
    gradients = []
    for options in ({}, {"attention": "gather"}):
        model, backend, plain = compiled(**options)
        model(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in plain.parameters()])  # type: ignore[union-attr]
        if not options:
            (call,) = backend.report().calls
            assert (call.backend, call.fused, call.lowered) == ("triton", True, True)
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_a_compiled_attention_launches_six_kernels() -> None:
    model, _, plain = compiled()
    x = torch.randn(1, 512, 128, device="cuda")
    with torch.no_grad():
        model(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            model(x)
    kernels = [event.name for event in profile.events() if event.device_type == torch.profiler.DeviceType.CUDA]
    linear = len(list(plain.children()))
    assert len(kernels) - linear <= 6 + linear, kernels  # a linear map may take a bias kernel of its own
