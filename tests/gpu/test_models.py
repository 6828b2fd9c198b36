"""Passes and wrapped models on a GPU: launches, gradients, compiled against uncompiled, dense-equivalence, memory."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flexsparse as fs
from bench.suite import memory
from bench.suite.model import Shape, WanShaped, inputs, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.guards("attention_forward", "attention_training", "model_step"),
]
SHAPE = Shape(heads=2, head_dim=64, ffn=256, layers=2, channels=4, text_dim=32, text_tokens=16)
GRID = (8, 8, 8)
GPU = torch.device("cuda")
ATTENTIONS = ["blocks.*.attn1"]
HALF = 0.02
"""Relative error that bfloat16 may make through two blocks."""


def relative(a: Tensor, b: Tensor) -> float:
    """RMS of the difference over RMS."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


def assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """All together, and each: one that is zero but for rounding (a key's bias) is held against the others' size."""
    assert found.keys() == wanted.keys()
    every = torch.cat([grad.double().flatten() for grad in wanted.values()])
    size = float(every.square().mean().sqrt())
    assert relative(torch.cat([found[name].double().flatten() for name in wanted]), every) < tolerance
    for name, grad in wanted.items():
        error = float((found[name].double() - grad.double()).square().mean().sqrt())
        own = float(grad.double().square().mean().sqrt())
        assert error < 3 * tolerance * (own + 0.05 * size), f"{name}: error {error:.2e}, size {own:.2e}"


def gates_to(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in fs.gate_parameters(model):
            parameter.fill_(value)


def step(model: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of one training step."""
    model.zero_grad()
    out = model(*given)
    out.float().square().mean().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def stack(dtype: torch.dtype = torch.float32) -> WanShaped:
    return make(SHAPE, GPU, dtype)


@pytest.mark.parametrize("compile", [True, "regional"])
def test_keeping_all_tiles_is_dense_attention(compile: Any) -> None:
    given = inputs(SHAPE, GRID, GPU, torch.bfloat16)
    dense, sparse = stack(torch.bfloat16), fs.wrap(stack(torch.bfloat16), fs.VSA(sparsity=0.0), compile=compile)
    (out, grads), (expected, wanted) = step(sparse, given), step(dense, given)
    assert relative(out, expected) < HALF
    assert_same_gradients(grads, wanted, 2 * HALF)
    calls = [call for call in fs.report(sparse).calls if call.sparse]
    assert len(calls) == SHAPE.layers if compile is True else calls
    assert all((call.backend, call.fused, call.lowered) == ("triton", True, True) for call in calls)


def test_compiled_training_is_uncompiled_training() -> None:
    """Float32, gates on: the selection has no room to differ, so that all gradients must agree."""
    given = inputs(SHAPE, GRID, GPU, torch.float32)
    plain = stack()
    models = [
        fs.wrap(copy.deepcopy(plain), fs.VSA(top_k=3), gates=ATTENTIONS, fullgraph=True),
        fs.wrap(copy.deepcopy(plain), fs.VSA(top_k=3), gates=ATTENTIONS, compile=False, attention="gather"),
    ]
    found = []
    for model in models:
        gates_to(model, 0.05)
        found.append(step(model, given))
    (out, grads), (expected, wanted) = found
    assert relative(out, expected) < 1e-3
    assert any("to_gate_compress" in name for name in grads)
    assert_same_gradients(grads, wanted, 1e-3)


def test_two_training_steps_agree_bit_for_bit() -> None:
    given = inputs(SHAPE, GRID, GPU, torch.bfloat16)
    model = fs.wrap(stack(torch.bfloat16), fs.VSA(top_k=3), gates=ATTENTIONS, fullgraph=True)
    gates_to(model, 0.05)
    (out, grads), (same, others) = step(model, given), step(model, given)
    assert torch.equal(out, same)
    ours = [name for name in grads if "attn1" in name]
    assert ours and all(torch.equal(grads[name], others[name]) for name in ours)


@pytest.mark.parametrize("tile, kv_tile", [((4, 8, 4), (4, 4, 4)), ((4, 4, 4), None)])
def test_bsa_end_to_end(tile: tuple[int, int, int], kv_tile: tuple[int, int, int] | None) -> None:
    layout = fs.TileLayout(grid=(5, 9, 7), tile=tile)
    kv_layout = layout if kv_tile is None else fs.TileLayout(grid=layout.grid, tile=kv_tile)
    builder = fs.BSA(keep_queries=0.5, kv_density=0.3)
    q, k, v, grad = (torch.randn(1, 2, layout.seq_len, 64, device=GPU) for _ in range(4))
    selection = builder.select(q, k, layout, kv_layout=kv_layout)
    results = []
    for backend, dtype in (("triton", torch.bfloat16), ("gather", torch.float64)):
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in (q, k, v)]
        out = fs.sparse_attention(*leaves, layout, selection, kv_layout=kv_layout, backend=backend)
        results.append([out, *torch.autograd.grad(out, leaves, grad.bfloat16().to(dtype))])
    for name, a, b in zip(("out", "dq", "dk", "dv"), *results):
        assert relative(a, b) < HALF, name


def attention(top_k: int) -> tuple[Callable[..., Tensor], Any]:
    """One gated attention as a wrapped model's graph holds it."""

    def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        torch.ops.flexsparse.mark_gate(gate)
        return nn.functional.scaled_dot_product_attention(q, k, v)

    backend = fs.backend(fs.VSA(top_k=top_k), grid=GRID, expect=1)
    return torch.compile(attend, backend=backend, fullgraph=True, dynamic=False), backend


@pytest.mark.guards()
@pytest.mark.parametrize("method", ["vsa", "bsa"])
def test_cuda_graphs_replay_with_other_inputs(method: str) -> None:
    """``mode="reduce-overhead"``: nothing that ops keep lies in the graph's memory, nothing waits for the host."""
    builder = fs.VSA(top_k=4) if method == "vsa" else fs.BSA(kv_density=0.3)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)

    how = {"fullgraph": True, "dynamic": False}
    plain = torch.compile(attend, backend=fs.backend(builder, grid=GRID, expect=1), **how)
    with torch.no_grad():
        given = [attention_inputs()[:3] for _ in range(4)]
        expected = [plain(*tensors).clone() for tensors in given]
        torch._dynamo.reset()
        replayed = torch.compile(
            attend, backend=fs.backend(builder, grid=GRID, expect=1), mode="reduce-overhead", **how
        )
        for tensors, wanted in zip(given, expected):
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(replayed(*tensors), wanted)


def attention_inputs(**options: Any) -> list[Tensor]:
    T, H, W = GRID
    shapes = [(1, 2, T * H * W, 64)] * 3 + [(1, T * H * W, 128)]
    return [torch.randn(shape, device=GPU, dtype=torch.bfloat16, **options) for shape in shapes]


@pytest.mark.guards()  # no op computes anything wrong where this fails
def test_a_compiled_attention_launches_six_kernels() -> None:
    """Three to the selection (tiling, pooling, scores and choice), then lists, attention, the way back with the gate."""
    call, backend = attention(4)
    given = attention_inputs()
    with torch.no_grad():
        call(*given)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call(*given)
            torch.cuda.synchronize()
    (found,) = backend.report().calls
    assert (found.backend, found.fused, found.lowered) == ("triton", True, True)
    kernels = [event.name for event in profile.events() if event.device_type == torch.profiler.DeviceType.CUDA]
    kernels = [name for name in kernels if not name.startswith(("Memcpy", "Memset"))]
    if not kernels:
        pytest.skip("the profiler sees no kernels here")
    assert len(kernels) <= 6, kernels
    selecting = [i for i, name in enumerate(kernels) if "select" in name or "score" in name]
    assert not selecting or selecting[-1] < 3, kernels


@pytest.mark.guards()
def test_what_a_compiled_attention_saves_for_backward() -> None:
    """q, k, v and lse in tile order, and little else: o is not read in low precision; the gate counted apart."""
    call, _ = attention(4)
    leaves = attention_inputs(requires_grad=True)
    call(*leaves)  # compile first
    layout = fs.TileLayout(grid=GRID)
    needed = 2 * layout.padded_len * (3 * 64 * 2 + 4)
    saved = memory.saved_bytes(lambda: call(*leaves), without=(leaves[3],))
    assert 0.9 * needed < saved < 1.35 * needed, f"{saved} bytes, {needed} needed"  # tiny: pooled vectors weigh more


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed")
@pytest.mark.parametrize("name", ["hunyuan", "cogvideox", "ltx", "allegro"])
def test_models_with_text_train(name: str) -> None:
    """Joint and cross text, per-sample lengths from a mask: compiled, against the uncompiled model's gather backend."""
    from models.zoo import ZOO

    entry, grid, results = ZOO[name], (8, 8, 8), []
    plain = entry.model().to(GPU)
    given = {key: x.to(GPU) if isinstance(x, Tensor) else x for key, x in entry.inputs(grid, 2).items()}
    for how in ({"compile": True}, {"compile": False, "attention": "gather"}):
        model = fs.wrap(copy.deepcopy(plain), fs.VSA(top_k=3), gates=True, **how)
        gates_to(model, 0.05)
        out = model(**given, return_dict=False)[0]
        out.square().mean().backward()
        results.append((out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        assert {call.name for call in fs.report(model).calls if call.sparse} == set(entry.sparse)
    (out, grads), (expected, wanted) = results
    assert relative(out, expected) < 1e-3
    assert_same_gradients({name: grads[name] for name in wanted}, wanted, 1e-3)


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed")
def test_diffusers_wan_trains() -> None:
    from diffusers import WanTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 64, "in_channels": 4, "out_channels": 4, "text_dim": 32}
    more = {"freq_dim": 64, "ffn_dim": 128, "num_layers": 2, "cross_attn_norm": True, "rope_max_seq_len": 64}
    torch.manual_seed(0)
    plain = WanTransformer3DModel(patch_size=(1, 2, 2), **sizes, **more).to(GPU)
    given = (
        torch.randn(1, 4, 8, 16, 16, device=GPU),
        torch.tensor([500], device=GPU),
        torch.randn(1, 16, 32, device=GPU),
    )
    results = []
    for how in ({"fullgraph": True}, {"compile": False, "attention": "gather"}):
        model = fs.wrap(copy.deepcopy(plain), fs.VSA(top_k=3), gates=True, **how)
        gates_to(model, 0.05)
        out = model(*given, return_dict=False)[0]
        out.square().mean().backward()
        results.append((out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (out, grads), (expected, wanted) = results
    assert relative(out, expected) < 1e-3
    assert_same_gradients(grads, wanted, 1e-3)
