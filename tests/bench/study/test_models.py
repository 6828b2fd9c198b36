"""The models of the study's methods: one set of weights, each attention what its definition says.

Shape letters: B batch, N heads, S tokens, D head dim; in the coarse stage, n query tiles and m KV tiles.
"""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

import flexsparse as fs
from bench.study.factorized import CompressedKV, SpatialAttention, TemporalAttention
from bench.study.max_pooling import MaxPooledVSA, pool_max
from bench.study.models import KINDS, make, scheduled
from bench.study.settings import Method, Size
from flexsparse.demo.model import SelfAttention
from flexsparse.training.errors import RunError
from tests.oracle import places

TINY = Size(name="tiny", dim=32, depth=3, heads=2, patch=2, frames=5, height=12, width=14, batch=2)
VSA = Method(name="vsa", builder=fs.VSA(sparsity=0.5), gates=True)
BSA = Method(name="bsa", builder=fs.BSA(keep_queries=0.5, kv_density=0.25))
ALL = (*(Method(name=kind, attention=kind) for kind in KINDS if kind != "sparse"), VSA, BSA)
GRID = (5, 3, 4)


@pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)
def test_methods_share_the_weights_of_a_seed(method: Method) -> None:
    dense = make(TINY, ALL[0], 3, 4).state_dict()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    state = make(TINY, method, 3, 4).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    gates = [name for name in state if name not in dense]
    assert len(gates) == (2 * TINY.depth if method.gates else 0)
    assert not any(state[name].any() for name in gates)
    assert all(torch.equal(state[name], value) for name, value in dense.items())
    other = make(TINY, method, 4, 4).state_dict()
    assert not torch.equal(other["blocks.1.attn.to_q.weight"], dense["blocks.1.attn.to_q.weight"])


@pytest.mark.parametrize(
    ("attention", "classes"),
    [
        ("dense", (SelfAttention, SelfAttention, SelfAttention)),
        ("spatial", (SpatialAttention, SpatialAttention, SpatialAttention)),
        ("spatial_temporal", (SpatialAttention, TemporalAttention, SpatialAttention)),
        ("spatial_full", (SpatialAttention, SelfAttention, SpatialAttention)),
        ("compressed_kv", (CompressedKV, CompressedKV, CompressedKV)),
    ],
)
def test_blocks_alternate_from_a_spatial_one(attention: str, classes: tuple[type, ...]) -> None:
    model = make(TINY, Method(name="m", attention=attention), 0, 3)  # type: ignore[arg-type]
    assert tuple(type(block.attn) for block in model.blocks) == classes


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention over the keys of a bool mask ``[S, Z]``."""
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize(("kind", "axes"), [(SpatialAttention, (0,)), (TemporalAttention, (1, 2))])
def test_factorized_attention_is_masked_attention(kind: type, axes: tuple[int, ...]) -> None:
    T, H, W = GRID
    q, k, v = torch.randn(3, 2, 2, T * H * W, 8, dtype=torch.float64)
    tokens = [(t, h, w) for t in range(T) for h in range(H) for w in range(W)]
    mask = torch.tensor([[all(a[i] == b[i] for i in axes) for b in tokens] for a in tokens])
    out = kind(16, 2, GRID).attend(q, k, v)
    torch.testing.assert_close(out, masked_attention(q, k, v, mask), atol=1e-12, rtol=0)


@pytest.mark.parametrize("grid", [(5, 3, 4), (4, 4, 2), (1, 1, 3)])
def test_compressed_keys_are_means_of_cubes(grid: tuple[int, int, int]) -> None:
    q, k, v = torch.randn(3, 2, 2, math.prod(grid), 8, dtype=torch.float64)
    cubes: dict[tuple[int, ...], list[int]] = {}
    for token in range(math.prod(grid)):
        place = (token // (grid[1] * grid[2]), token // grid[2] % grid[1], token % grid[2])
        cubes.setdefault(tuple(x // 2 for x in place), []).append(token)
    pooled = [torch.stack([x[:, :, cubes[cube]].mean(2) for cube in sorted(cubes)], 2) for x in (k, v)]
    expected = masked_attention(q, *pooled, torch.ones(q.shape[2], len(cubes), dtype=torch.bool))
    torch.testing.assert_close(CompressedKV(16, 2, grid).attend(q, k, v), expected, atol=1e-12, rtol=0)


def test_models_of_all_methods_learn() -> None:
    for method in ALL:
        model = make(TINY, method, 0, 3)
        torch.nn.init.normal_(model.patch_out.weight)
        for block in model.blocks:
            torch.nn.init.normal_(block.modulation.weight)
        model(torch.randn(1, 3, 5, 12, 14), torch.rand(1)).square().mean().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), (method.name, name)


@pytest.mark.parametrize(
    ("method", "steps", "names"),
    [
        (dataclasses.replace(VSA, anneal=0.5), 120, ("sparsity",)),
        (dataclasses.replace(BSA, anneal=0.5), 97, ("keep_queries", "kv_density")),
        (dataclasses.replace(VSA, anneal=0.5), 202, ("sparsity",)),
        (
            dataclasses.replace(BSA, anneal=1.0, builder=fs.BSA(threshold="mass", mass=0.4)),
            60,
            ("keep_queries", "mass"),
        ),
        (dataclasses.replace(BSA, anneal=0.25, builder=fs.BSA(keep_queries=1)), 14, ("kv_density",)),
    ],
)
def test_annealed_ratios_go_from_dense_to_the_target(method: Method, steps: int, names: tuple[str, ...]) -> None:
    builder, schedules = scheduled(method, steps)
    end = round(method.anneal * steps)
    assert list(builder.schedules()) == schedules == [getattr(builder, name) for name in names]
    for name, schedule in zip(names, schedules, strict=True):
        assert schedule.value_at(0) == (0.0 if name == "sparsity" else 1.0)
        values = [schedule.value_at(step) for step in range(steps + 1)]
        target = getattr(method.builder, name)
        assert values.index(target) == end and set(values[end:]) == {target}
        jumps = [abs(b - a) for a, b in itertools.pairwise(values) if a != b]
        assert len(jumps) in range(min(end, 5), 21) or len(jumps) == end  # a prime has no other divisor
        assert max(jumps) == pytest.approx(min(jumps))
    model, video, t = make(TINY, method, 0, 3, schedule=builder), torch.randn(1, 3, 5, 12, 14), torch.rand(1)
    dense = make(TINY, ALL[0], 0, 3)
    for one in (model, dense):
        for name, parameter in one.named_parameters():
            if parameter.dim() == 2 and "gate" not in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    torch.testing.assert_close(model(video, t), dense(video, t), atol=1e-4, rtol=1e-4)
    for schedule in schedules:
        schedule.seek(end)
    assert not torch.allclose(model(video, t), dense(video, t), atol=1e-3)


def test_an_abrupt_method_keeps_its_builder() -> None:
    assert scheduled(VSA, 10) == (VSA.builder, [])


@pytest.mark.parametrize(
    ("method", "steps", "words"),
    [
        (dataclasses.replace(VSA, anneal=1.5), 10, "anneal is 1.5: give a share"),
        (dataclasses.replace(VSA, anneal=0.1), 3, "of 3 steps, less than one"),
        (dataclasses.replace(VSA, anneal=0.5, builder=fs.VSA(top_k=2)), 10, "has no ratio to anneal"),
        (
            dataclasses.replace(VSA, anneal=0.5, builder=fs.VSA(sparsity=fs.SparsitySchedule(target=0.5))),
            10,
            "give a plain number",
        ),
    ],
)
def test_what_cannot_be_annealed_says_why(method: Method, steps: int, words: str) -> None:
    with pytest.raises(RunError, match=words):
        scheduled(method, steps)


@pytest.mark.parametrize(
    ("size", "method", "channels", "words"),
    [
        (TINY, VSA, 0, "channels is 0"),
        (dataclasses.replace(TINY, heads=5), VSA, 3, "dim is 32 with 5 heads"),
        (dataclasses.replace(TINY, width=13), VSA, 3, "width is 13: give a multiple of the patch, 2"),
        (TINY, dataclasses.replace(VSA, builder=None), 3, "give a mask builder"),
        (TINY, dataclasses.replace(VSA, attention="dense"), 3, "leave the builder out"),
        (TINY, Method(name="m", attention="dense", gates=True), 3, "only 'sparse' has gates"),
        (TINY, Method(name="m", attention="window"), 3, "attention is 'window': give one of"),  # type: ignore[arg-type]
        (TINY, dataclasses.replace(BSA, gates=True), 3, "BSA has no coarse output"),
        (TINY, dataclasses.replace(VSA, builder=fs.VSA(top_k=99)), 3, "tiny/vsa: VSA top_k is 99"),
        (TINY, dataclasses.replace(VSA, tile=(0, 4, 4)), 3, "tiny/vsa: .*tile"),
    ],
)
def test_settings_that_do_not_go_together_say_so(size: Size, method: Method, channels: int, words: str) -> None:
    with pytest.raises(RunError, match=words):
        make(size, method, 0, channels)


def max_pooled_reference(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, layout: fs.TileLayout, top_k: int) -> Tensor:
    """Tile by tile, from token coordinates: best ``top_k`` tiles by maxima, dense softmax over their tokens, gated maxima."""
    tiles: dict[int, list[int]] = {}
    for token, place in enumerate(places(layout)):
        tiles.setdefault(place.tile, []).append(token)
    q_c, k_c, v_c = (torch.stack([x[:, :, tiles[i]].amax(2) for i in sorted(tiles)], 2) for x in (q, k, v))
    scores = (q_c @ k_c.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    coarse = scores.softmax(-1) @ v_c
    scored = scores.detach()
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for n, rows in tiles.items():
                ranked = sorted(range(len(tiles)), key=lambda m: (-float(scored[b, h, n, m]), m))
                keys = [token for m in ranked[:top_k] for token in tiles[m]]
                logits = q[b, h, rows] @ k[b, h, keys].T / math.sqrt(q.shape[-1])
                out[b, h, rows] = logits.softmax(-1) @ v[b, h, keys] + gate[b, h, rows] * coarse[b, h, n]
    return out


@pytest.mark.parametrize("grid", [(4, 4, 8), (5, 6, 7)])
@pytest.mark.parametrize("shift", [0.0, -4.0], ids=["centred", "negative"])  # zeros of padding would win over negatives
def test_max_pooled_vsa_is_its_definition(grid: tuple[int, int, int], shift: float) -> None:
    layout = fs.TileLayout(grid=grid, tile=(4, 4, 4))
    shape = (2, 2, layout.seq_len, 8)
    q, k, v, gate = (torch.randn(shape, dtype=torch.float64) + shift for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v, gate)]
    top_k = 1 if layout.num_tiles == 2 else 3
    out = fs.sparse_attention(q, k, v, layout, MaxPooledVSA(top_k=top_k), gate=gate)
    expected = max_pooled_reference(q, k, v, gate, layout, top_k)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)
    weights = torch.randn_like(out)
    found, wanted = (torch.autograd.grad((x * weights).sum(), inputs) for x in (out, expected))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)


def test_max_pooling_leaves_out_padding_and_empty_tiles() -> None:
    x = torch.tensor([[-3.0, -1.0, 7.0], [-2.0, 5.0, 9.0], [4.0, 4.0, 4.0]], dtype=torch.bfloat16)[
        None, None, ..., None
    ]
    assert pool_max(x, torch.tensor([2, 1, 0], dtype=torch.int32)).flatten().tolist() == [-1.0, -2.0, 0.0]
    assert pool_max(x, torch.tensor([[2, 1, 0]], dtype=torch.int32)).dtype == torch.float32


def test_max_pooled_ties_go_to_the_lowest_index() -> None:
    layout = fs.TileLayout(grid=(4, 4, 16), tile=(4, 4, 4))
    q = torch.ones(1, 1, layout.seq_len, 8)
    selection = MaxPooledVSA(top_k=2).select(q, q, layout)
    assert selection.keep()[0, 0].tolist() == [[True, True, False, False]] * 4


def test_max_pooled_vsa_serves_grouped_heads_and_samples_of_other_lengths() -> None:
    layout = fs.TileLayout(grid=(4, 4, 12), tile=(4, 4, 4))
    q, k = torch.randn(2, 4, layout.seq_len, 8), torch.randn(2, 2, layout.seq_len, 8)
    tile_counts = torch.tensor([[64, 64, 64], [64, 64, 0]], dtype=torch.int32)
    keep = MaxPooledVSA(top_k=3).select(q, k, layout, tile_counts=tile_counts).keep()
    assert keep[0].all() and keep[1, ..., :2].all() and not keep[1, ..., 2].any()
    each = MaxPooledVSA(top_k=1).select(q, k.repeat_interleave(2, 1), layout)
    assert torch.equal(each.bits, MaxPooledVSA(top_k=1).select(q, k, layout).bits)


def test_a_gated_model_pools_maxima() -> None:
    method = dataclasses.replace(VSA, builder=MaxPooledVSA(sparsity=0.5))
    models = [make(TINY, one, 0, 3) for one in (method, VSA)]
    video, t = torch.randn(1, 3, 5, 12, 14), torch.rand(1)
    outs = []
    for model in models:
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        outs.append(model(video, t))
    assert not torch.allclose(*outs)
    outs[0].sum().backward()
    gate = models[0].blocks[0].attn.to_gate_compress
    assert gate.weight.grad.any()
