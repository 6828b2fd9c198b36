"""FLOPs of the study against torch's FlopCounterMode, on tiny models that really run, forward and backward.

Shape letters: B batch, H heads, N query tiles, Q computed query rows of a tile, K kept tokens with padding, D head dim.
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import flexsparse as fs
from bench.study import flops
from bench.study.flops import DENSE, Flops, count, counted, flop_counter, observe, verify
from bench.study.max_pooling import MaxPooledVSA
from bench.study.models import make, scheduled
from bench.study.settings import Method, Size
from flexsparse.analysis import SparseCall, watch
from flexsparse.masks import SlidingTile, TopP
from flexsparse.selection import TileSelection
from flexsparse.training.errors import RunError

TINY = Size(name="tiny", dim=32, depth=3, heads=2, patch=2, frames=5, height=12, width=14, batch=2)
EVEN = Size(name="even", dim=48, depth=2, heads=3, patch=4, frames=8, height=32, width=48, batch=1)
VSA = Method(name="vsa", builder=fs.VSA(sparsity=0.5), gates=True)
SPARSE = (
    VSA,
    dataclasses.replace(VSA, name="vsa_tile16", tile=(2, 4, 2)),
    dataclasses.replace(VSA, name="vsa_auto", tile="auto"),
    dataclasses.replace(VSA, name="fine_only", gates=False),
    Method(name="vsa_max", builder=MaxPooledVSA(top_k=2), gates=True),
    Method(name="bsa", builder=fs.BSA(keep_queries=0.5, kv_density=0.25)),
    Method(name="bsa_all", builder=fs.BSA(keep_queries=1, kv_density=0.25)),
    Method(name="top_p", builder=TopP(mass=0.4), gates=True),
    Method(name="sliding_tile", builder=SlidingTile(window=(1, 3, 1))),
)


def batch_of(size: Size, channels: int) -> tuple[Tensor, Tensor]:
    """A noisy video and its times."""
    return torch.randn(size.batch, channels, size.frames, size.height, size.width), torch.rand(size.batch)


def filled(model: Any) -> Any:
    """Weights that leave nothing zero, so that every layer and gate works."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("size", [TINY, EVEN], ids=lambda size: size.name)
@pytest.mark.parametrize("attention", DENSE)
def test_dense_methods_agree_with_torch_exactly(size: Size, attention: Any) -> None:
    method = Method(name="m", attention=attention)
    model = make(size, method, 0, 4)
    # fused attention: by its formulas; composed of products, a backward would be two times a forward, not 2.5
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), flop_counter() as counter:
        model(*batch_of(size, 4)).square().mean().backward()
    ours = count(model, size, method, 4)
    assert ours.attention > 0 and ours.selection == 0
    assert counted(counter) == {"linear": ours.other, "attention": ours.attention}
    assert counter.get_total_flops() == ours.total == ours.attention + ours.other


def test_composed_attention_has_the_same_forward() -> None:
    method = Method(name="m", attention="dense")
    model = make(TINY, method, 0, 4)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*batch_of(TINY, 4))
    products = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    assert products * 3.5 == count(model, TINY, method, 4).attention


@pytest.mark.parametrize("method", SPARSE, ids=lambda method: method.name)
def test_linear_layers_of_sparse_methods_agree_with_torch(method: Method) -> None:
    model = filled(make(TINY, method, 0, 4))
    with observe(model) as seen, flop_counter() as counter:
        model(*batch_of(TINY, 4)).square().mean().backward()
    found = count(model, TINY, method, 4, kept=seen.kept)
    assert counted(counter) == {"linear": found.other, "attention": 0}
    gates = TINY.depth * 3 * 2 * TINY.batch * TINY.tokens * TINY.dim**2 if method.gates else 0
    dense = Method(name="dense", attention="dense")
    assert found.other - gates == count(make(TINY, dense, 0, 4), TINY, dense, 4).other


class Gathered(torch.autograd.Function):
    """Attention of some queries over gathered keys: q ``[Q, D]``, k and v ``[K, D]``; backward computes scores again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return (q @ k.T).softmax(-1) @ v

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        weights = (q @ k.T).softmax(-1)
        dv, dw = weights.T @ g, g @ v.T
        ds = weights * (dw - (weights * dw).sum(-1, keepdim=True))
        return ds @ k, ds.T @ q, dv


def gathered_flops(call: SparseCall) -> int:
    """What torch counts for the tiles of a selection, gathered one row after the other, padding included."""
    selection: TileSelection = call.selection
    layout, keep = selection.layout, selection.keep()
    q_tiles, k_tiles = (layout.video(layout.to_tiles(x)) for x in (call.q, call.k))
    B, H, N = selection.counts.shape
    with FlopCounterMode(display=False) as counter:
        for b, h, n in ((b, h, n) for b in range(B) for h in range(H) for n in range(N)):
            q = q_tiles[b, h, n]
            if selection.queries is not None:
                q = call.q[b, h, selection.queries.kept[b, h, n].long()]
            k = k_tiles[b, h, keep[b, h, n]].flatten(0, 1)
            inputs = [x.detach().clone().requires_grad_() for x in (q, k, k)]
            Gathered.apply(*inputs).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("method", SPARSE, ids=lambda method: method.name)
def test_the_fine_stage_is_what_torch_counts_for_gathered_tiles(method: Method) -> None:
    model, calls = filled(make(TINY, method, 0, 4)), []
    noisy, t = batch_of(TINY, 4)
    with torch.no_grad(), watch(model, calls.append):
        model(noisy, t)
    with torch.no_grad(), observe(model) as seen:
        model(noisy, t)
    assert seen.calls == len(calls) == TINY.depth
    assert seen.density == pytest.approx(sum(call.selection.density for call in calls) / TINY.depth)
    assert seen.kept is not None and seen.kept[0] >= 1
    found = count(model, TINY, method, 4, kept=seen.kept)
    assert found.attention == pytest.approx(sum(gathered_flops(call) for call in calls), rel=1e-12)


def test_selection_is_the_products_of_the_coarse_stage() -> None:
    B, H, D, M, S = TINY.batch, TINY.heads, TINY.head_dim, 8, TINY.tokens
    each = TINY.depth * B * H
    product = 2 * M * M * D
    expected = {
        "vsa": 3 * S * D + 7 * product,  # scores and output; the scores again and four products
        "vsa_max": 3 * S * D + 7 * product,
        "top_p": 3 * S * D + 7 * product,
        "fine_only": 2 * S * D + product,
        "bsa_all": 2 * S * D + product,
        "bsa": 2 * S * D + product + 4 * S * D,
        "sliding_tile": 0,
    }
    for method in SPARSE:
        if method.name in expected:
            found = count(make(TINY, method, 0, 4), TINY, method, 4, kept=(2.0, 64.0))
            assert found.selection == each * expected[method.name], method.name


def test_annealing_measures_dense_at_first() -> None:
    method = dataclasses.replace(VSA, anneal=0.5)
    builder, schedules = scheduled(method, 40)
    model = make(TINY, method, 0, 4, schedule=builder)
    kept = []
    for step in (0, 20):
        schedules[0].seek(step)
        with torch.no_grad(), observe(model) as seen:
            model(*batch_of(TINY, 4))
        kept.append(seen.kept)
    assert kept == [(8.0, 64.0), (4.0, 64.0)]
    before, after = (count(model, TINY, method, 4, kept=x).attention for x in kept)
    assert before == 2 * after


@pytest.mark.parametrize(
    ("attention", "density"),
    [
        ("dense", 1.0),
        ("spatial", 1 / 5),
        ("spatial_temporal", (1 / 5 + 1 / 42 + 1 / 5) / 3),
        ("spatial_full", (1 / 5 + 1 + 1 / 5) / 3),
        ("compressed_kv", 3 * 3 * 4 / 210),
    ],
)
def test_density_of_other_attention_is_by_definition(attention: Any, density: float) -> None:
    method = Method(name="m", attention=attention)
    model = make(TINY, method, 0, 4)
    with observe(model) as seen:
        pass
    assert seen.kept is None and seen.density == pytest.approx(density)
    pairs = TINY.depth * TINY.batch * TINY.heads * TINY.tokens**2
    assert count(model, TINY, method, 4).attention == pytest.approx(3.5 * 4 * TINY.head_dim * pairs * density)


def test_what_cannot_be_counted_says_why() -> None:
    dense = Method(name="dense", attention="dense")
    model, sparse = make(TINY, dense, 0, 4), make(TINY, VSA, 0, 4)
    with pytest.raises(RunError, match="channels is 3"):
        count(model, TINY, dense, 3)
    with pytest.raises(RunError, match="leave it out"):
        count(model, TINY, dense, 4, kept=(1.0, 64.0))
    with pytest.raises(RunError, match="give what observe"):
        count(sparse, TINY, VSA, 4)
    with pytest.raises(RunError, match="FLOPs are not known"):
        count(sparse, TINY, dataclasses.replace(VSA, builder=object()), 4, kept=(1.0, 64.0))
    with observe(sparse) as seen:
        pass
    with pytest.raises(RunError, match="0 sparse calls"):
        _ = seen.density
    with observe(sparse), pytest.raises(RunError, match="watched already"), observe(sparse):
        pass
    with pytest.raises(RunError, match="compile=True"), observe(make(TINY, VSA, 0, 4, compile=True)):
        pass


def test_verify_passes_and_refuses_a_wrong_count(monkeypatch: pytest.MonkeyPatch) -> None:
    verify(EVEN, 16)
    linear, pairs = flops.linear_flops, flops.pairs
    monkeypatch.setattr(flops, "linear_flops", lambda model, size: linear(model, size) + 2)
    with pytest.raises(RunError, match=r"^even/dense: linear FLOPs of a step are \d+ as counted from the modules"):
        verify(EVEN, 16)
    monkeypatch.setattr(flops, "linear_flops", linear)
    monkeypatch.setattr(flops, "pairs", lambda *args: pairs(*args) - 1)
    with pytest.raises(RunError, match=r"^even/dense: attention FLOPs"):
        verify(EVEN, 16)


def test_the_total_is_the_sum() -> None:
    assert Flops(attention=3.0, selection=4.0, other=5.0).total == 12.0
