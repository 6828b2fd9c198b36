"""`sparse_attention` itself: what it returns, what it chooses, compiled against eager."""

import dataclasses
import functools
import logging
from typing import Any

import pytest
import torch
from tolerance import assert_as_good
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import flexsparse as fs
from flexsparse.attention import _log_once
from flexsparse.backends import Case, choose
from flexsparse.backends import triton as triton_backend
from flexsparse.masks.static import _cached_bits, _cached_mask
from flexsparse.ops.windows import window_table
from flexsparse.tables import tables_in_order, token_tables

LAYOUT = fs.TileLayout(grid=(2, 6, 7), tile=(2, 4, 4), text_last=4)


def qkv(layout: fs.TileLayout = LAYOUT, dtype: torch.dtype = torch.float32, G: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(2, heads, layout.seq_len, 16, generator=generator).to(dtype) for heads in (2, G, G)]


class Seen(TorchDispatchMode):
    """Notes the ops that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("builder", (fs.VSA(top_k=2), fs.BSA(kv_density=0.4), fs.TopP(mass=0.5)))
def test_a_mode_of_the_users_is_no_tracer(builder: Any) -> None:
    """Selective checkpointing, counters of operations: what runs is what runs without them, not what compilers are shown."""
    q, k, v = (x.requires_grad_() for x in qkv())
    gate = torch.randn(q.shape) if builder.has_coarse else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fs.sparse_attention(q, k, v, LAYOUT, builder, gate=gate)

    with Seen() as seen:
        attend(q, k, v)
    assert "flexsparse::coarse_select" in seen.ops and "aten::bmm" not in seen.ops
    contexts = functools.partial(
        create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE
    )
    outs = attend(q, k, v), checkpoint(attend, q, k, v, use_reentrant=False, context_fn=contexts)
    results = [[out, *torch.autograd.grad(out.cos().sum(), (q, k, v))] for out in outs]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_aux_holds_what_was_computed() -> None:
    q, k, v = qkv()
    builder = fs.VSA(top_k=2)
    out, aux = fs.sparse_attention(q, k, v, LAYOUT, builder, return_aux=True)
    assert torch.equal(out, fs.sparse_attention(q, k, v, LAYOUT, builder))
    assert torch.equal(aux.selection.bits, builder.select(q, k, LAYOUT).bits)
    assert aux.coarse_out is not None and aux.coarse_out.shape == (2, 2, LAYOUT.num_tiles, 16)
    assert aux.lse.shape == (2, 2, LAYOUT.seq_len)
    assert aux.density.dtype == torch.float64 and float(aux.density) == aux.selection.density
    assert int(aux.capped) == 0 and aux.backend == "gather"
    _, static = fs.sparse_attention(q, k, v, LAYOUT, fs.Dense(), return_aux=True)
    assert static.coarse_out is None and float(static.density) == 1


def test_a_selection_in_the_builders_place_gives_the_same_output() -> None:
    q, k, v = qkv()
    for builder in (fs.VSA(top_k=2), fs.BSA(kv_density=0.4), fs.SlidingTile(window=(1, 1, 1))):
        expected = fs.sparse_attention(q, k, v, LAYOUT, builder)
        assert torch.equal(fs.sparse_attention(q, k, v, LAYOUT, builder.select(q, k, LAYOUT)), expected)


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_function_may_get_any_scale(dynamic: bool | None, fresh_dynamo: None) -> None:
    """The second one, and with symbolic sizes the first, is a symbolic float."""
    q, k, v = torch.randn(3, 1, 2, LAYOUT.seq_len, 16)

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=dynamic)
    def compiled(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return fs.sparse_attention(q, k, v, LAYOUT, fs.VSA(top_k=2), scale=scale)

    for scale in (0.3, 0.5, 0.7):
        expected = fs.sparse_attention(q, k, v, LAYOUT, fs.VSA(top_k=2), scale=scale)
        torch.testing.assert_close(compiled(q, k, v, scale), expected)


def test_keys_of_their_own_layout_are_other_tokens() -> None:
    """A KV layout that is the queries' object made its counts those of the queries; an equal one did not."""
    q, k, v = torch.randn(3, 1, 2, LAYOUT.seq_len, 16)
    counts = LAYOUT.tile_counts.clone()
    counts[1:] = torch.where(torch.arange(len(counts) - 1) % 2 == 0, 0, counts[1:])
    how = {"tile_counts": counts, "return_aux": True}
    one, aux = fs.sparse_attention(q, k, v, LAYOUT, fs.VSA(top_k=1), kv_layout=LAYOUT, **how)
    two, other = fs.sparse_attention(q, k, v, LAYOUT, fs.VSA(top_k=1), kv_layout=dataclasses.replace(LAYOUT), **how)
    assert (
        torch.equal(aux.selection.bits, other.selection.bits) and torch.equal(one, two) and aux.density == other.density
    )
    chosen = fs.VSA(top_k=1).select(q, k, LAYOUT, kv_layout=LAYOUT, tile_counts=counts)
    assert torch.equal(chosen.bits, aux.selection.bits)
    _, own = fs.sparse_attention(q, k, v, LAYOUT, fs.VSA(top_k=1), **how)
    hidden = counts[: LAYOUT.num_tiles] == 0
    assert bool((own.selection.keep()[:, :, hidden].int().argmax(-1) == 0).all()), "tiles without a token score alike"
    assert not bool((aux.selection.keep()[:, :, hidden].int().argmax(-1) == 0).all())


@pytest.mark.parametrize("scale", (0.1, 1.0))
def test_the_scale_is_that_of_both_stages(scale: float) -> None:
    q, k, v = qkv(dtype=torch.float64)
    gate = torch.randn(2, 2, LAYOUT.seq_len, 16, dtype=torch.float64)
    for backend in ("reference", "gather"):
        out = fs.sparse_attention(q, k, v, LAYOUT, fs.VSA(top_k=2), gate=gate, scale=scale, backend=backend)
        scaled = q * (scale * 16**0.5)
        expected = fs.sparse_attention(scaled, k, v, LAYOUT, fs.VSA(top_k=2), gate=gate, backend=backend)
        torch.testing.assert_close(out, expected)


def test_gates_of_another_dtype_do_not_change_the_outputs() -> None:
    q, k, v = qkv(dtype=torch.bfloat16)
    gate = torch.ones(2, 2, LAYOUT.seq_len, 16)
    assert fs.sparse_attention(q, k, v, LAYOUT, fs.VSA(top_k=1), gate=gate, fine_gate=gate).dtype == torch.bfloat16


def test_autocast_changes_nothing() -> None:
    q, k, v = qkv()
    expected = fs.sparse_attention(q, k, v, LAYOUT, fs.VSA(top_k=2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fs.sparse_attention(q, k, v, LAYOUT, fs.VSA(top_k=2)), expected)


@pytest.mark.parametrize("backend", ("reference", "gather"))
def test_training_under_autocast_is_training_without(backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = fs.sparse_attention(q, k, v, LAYOUT, fs.VSA(top_k=2), gate=q, backend=backend)
        grads.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for actual, expected in zip(*grads):
        assert torch.equal(actual, expected)


def test_the_gather_backward_ignores_an_autocast_around_it() -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    gate = torch.randn(q.shape, requires_grad=True)
    for inputs, gates in (((q, k, v), {}), ((q, k, v, gate), {"gate": gate})):
        out = fs.sparse_attention(q, k, v, LAYOUT, fs.VSA(top_k=2), backend="gather", **gates).square().sum()
        expected = torch.autograd.grad(out, inputs, retain_graph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            grads = torch.autograd.grad(out, inputs)
        for actual, wanted in zip(grads, expected):
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize("builder", (fs.VSA(top_k=2), fs.TopP(mass=0.5), fs.BSA(kv_density=0.5, statistics="head")))
def test_selecting_under_autocast_is_selecting_without(builder: fs.masks.MaskBuilder) -> None:
    q, k, _ = qkv()
    expected = builder.select(q, k, LAYOUT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = builder.select(q, k, LAYOUT)
    assert torch.equal(found.bits, expected.bits)


@pytest.mark.parametrize("backend", ("reference", "gather"))
@pytest.mark.parametrize("order", ("raster", "tiles"))
def test_a_layout_first_seen_in_inference_mode_can_be_trained_on(backend: str, order: str) -> None:
    layout = fs.TileLayout(grid=(1, 4, 24) if order == "tiles" else (1, 5, 23), tile=(1, 4, 4), order=order)
    q, k, v = qkv(layout)
    for builder in (fs.VSA(top_k=1, within=fs.SlidingTile(window=(1, 1, 2))), fs.BSA(), fs.Radial()):
        for cached in (token_tables, tables_in_order, window_table, _cached_mask):
            cached.cache_clear()
        with torch.inference_mode():
            fs.sparse_attention(q, k, v, layout, builder, backend=backend)
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        fs.sparse_attention(*inputs, layout, builder, backend=backend).sum().backward()
        assert all(x.grad is not None for x in inputs)


def test_selection_takes_no_gradient_but_the_coarse_branch_trains_q_k_and_v() -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    assert not fs.VSA(top_k=2).select(q, k, LAYOUT).bits.requires_grad
    builder = fs.VSA(top_k=2)
    fine = torch.zeros_like(q)  # only the coarse branch is left
    out = fs.sparse_attention(q, k, v, LAYOUT, builder, gate=torch.ones_like(q), fine_gate=fine)
    for grad in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert bool((grad[:, :, :84] != 0).any()) and bool((grad[:, :, 84:] == 0).all())


def test_a_builder_needs_no_more_than_select() -> None:
    class Own:
        def select(self, q, k, layout, kv_layout=None, scale=None):  # type: ignore[no-untyped-def]
            return fs.VSA(top_k=1).select(q, k, layout, kv_layout=kv_layout, scale=scale)

    q, k, v = qkv()
    out = fs.sparse_attention(q, k, v, LAYOUT, Own())
    assert torch.equal(out, fs.sparse_attention(q, k, v, LAYOUT, fs.VSA(top_k=1)))


@pytest.mark.parametrize("builder", (fs.VSA(top_k=1), fs.BSA(), fs.TopP(), fs.SlidingTile()))
def test_a_single_token_attends_to_itself(builder: fs.masks.MaskBuilder) -> None:
    layout = fs.TileLayout(grid=(1, 1, 1), tile=(1, 1, 1))
    q, k, v = torch.randn(3, 1, 1, 1, 8).unbind()
    for backend in ("reference", "gather"):
        torch.testing.assert_close(fs.sparse_attention(q, k, v, layout, builder, backend=backend), v)


def test_an_empty_batch_has_an_empty_output() -> None:
    q, k, v = (x[:0] for x in qkv())
    assert fs.sparse_attention(q, k, v, LAYOUT, fs.VSA(top_k=1)).shape == (0, 2, LAYOUT.seq_len, 16)


def case(**changes: object) -> Case:
    plain: dict[str, object] = {"device": "cpu", "dtype": torch.float32, "gradients": False, "lse": False}
    plain |= {"compiled": True, "dynamic": False, "rows": 64, "head_dim": 64}
    return Case(**(plain | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "flex"),
        ({"compiled": False}, "gather"),
        ({"gradients": True}, "gather"),
        ({"lse": True}, "gather"),
        ({"dynamic": True}, "gather"),
        ({"dtype": torch.float64}, "gather"),
        ({"device": "cuda", "capability": (9, 0), "gradients": True}, "triton"),
        ({"device": "cuda", "capability": (9, 0), "lse": True, "compiled": False}, "triton"),
        ({"device": "cuda", "capability": (9, 0), "gradients": True, "head_dim": 20}, "gather"),
        ({"device": "cuda", "capability": (9, 0), "gradients": True, "head_dim": 20, "rows": 128}, "flex"),
        ({"device": "cuda", "capability": (9, 0), "head_dim": 320}, "flex"),
        ({"device": "cuda", "capability": (9, 0), "dtype": torch.float64}, "gather"),
    ],
)
def test_auto_takes_what_can_do_the_case_and_says_why(changes: dict[str, object], expected: str) -> None:
    name, reason = choose("auto", case(**changes))
    assert name == expected and reason


def test_auto_does_without_the_templates_where_it_is_told_to() -> None:
    assert choose("auto", case(device="cuda", capability=(9, 0)), templates=False)[0] == "flex"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "run on CUDA; use 'gather', or 'auto'"),
        ({"device": "cuda", "head_dim": 20}, "multiples of 8 up to 256, not 20; use 'gather'"),
        ({"device": "cuda", "rows": 512}, "16 to 256 slots, not 512; use a smaller tile or 'gather'"),
        ({"device": "cuda", "dtype": torch.float64}, "compute no torch.float64; use 'gather' or 'reference'"),
    ],
)
def test_the_templates_say_what_they_cannot_do(
    changes: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_backend, "_interpreting", lambda: False)
    with pytest.raises(ValueError, match=f"backend is 'triton', which cannot do this case: .*{message}"):
        choose("triton", case(**changes))


def test_flex_says_that_it_has_no_backward_for_small_tiles_on_hopper() -> None:
    hopper = {"device": "cuda", "capability": (9, 0), "gradients": True, "dtype": torch.bfloat16}
    with pytest.raises(
        ValueError, match=r"backend is 'flex', .* below 128 slots on sm90; use 'auto', 'triton' or 'gather'"
    ):
        choose("flex", case(**hopper, compiled=False))
    for works in ({"rows": 128}, {"gradients": False}, {"capability": (8, 0)}, {"compiled": True}):
        assert choose("flex", case(**{**hopper, "compiled": False, **works}))[0] == "flex"


def test_the_choice_of_backend_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    _log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="flexsparse"):
        for _ in range(3):
            fs.sparse_attention(*qkv(), LAYOUT, fs.VSA(top_k=1))
    assert [record.getMessage() for record in caplog.records] == [
        "cpu torch.float32 grid (2, 6, 7): backend gather (uncompiled on CPU)"
    ]


BUILDERS = {
    "VSA": fs.VSA(top_k=2, within=fs.SlidingTile(window=(1, 2, 2))),
    "TopP": fs.TopP(mass=0.6),
    "BSA": fs.BSA(kv_density=0.4),
    "Union": fs.Union(fs.VSA(top_k=1), fs.Radial()),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_compiled_training_is_eager_training(name: str, fresh_dynamo: None) -> None:
    builder = BUILDERS[name]
    inputs = [x.requires_grad_() for x in [*qkv(), *qkv(G=2)[:2]]]
    gated = builder.has_coarse

    def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, fine_gate: Tensor) -> Tensor:
        return fs.sparse_attention(q, k, v, LAYOUT, builder, gate=gate if gated else None, fine_gate=fine_gate)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*inputs), attend(*inputs)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    used = [x for x in inputs if gated or x is not inputs[3]]
    for actual, wanted in zip(
        torch.autograd.grad(out.square().sum(), used), torch.autograd.grad(expected.square().sum(), used)
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4)


def test_a_compiled_graph_that_selects_and_runs_flex_is_the_eager_one(fresh_dynamo: None) -> None:
    q, k, v = qkv()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fs.sparse_attention(q, k, v, LAYOUT, fs.VSA(top_k=2), gate=q)

    with torch.no_grad():
        out = torch.compile(attend, fullgraph=True)(q, k, v)
        torch.testing.assert_close(out, attend(q, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_compiled_equals_eager_in_any_precision_with_the_selection_given(
    dtype: torch.dtype, training: bool, fresh_dynamo: None
) -> None:
    q, k, v = (x.requires_grad_(training) for x in qkv(dtype=dtype))
    selection = fs.BSA(kv_density=0.4).select(q, k, LAYOUT)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fs.sparse_attention(q, k, v, LAYOUT, selection)

    out, expected = torch.compile(attend, fullgraph=True)(q, k, v), attend(q, k, v)
    with torch.no_grad():
        gold = fs.sparse_attention(*(x.double() for x in (q, k, v)), LAYOUT, selection, backend="reference")
    assert_as_good(out, expected, gold, "compiled out")  # flex rounds otherwise than gather
    if training:
        grads = torch.autograd.grad(out.float().sum(), (q, k, v))
        for actual, wanted in zip(grads, torch.autograd.grad(expected.float().sum(), (q, k, v))):
            torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize(
    "builder",
    [
        fs.VSA(sparsity=0.5),
        fs.TopP(mass=0.5),
        fs.BSA(kv_density=0.4, threshold="probability"),
        fs.BSA(kv_density=0.3, statistics="head"),
        fs.SlidingTile(window=(1, 3, 3)),
    ],
    ids=lambda builder: type(builder).__name__,
)
@pytest.mark.parametrize("backend", ["gather", "triton"])
def test_torchs_default_device_is_for_others(builder: Any, backend: str) -> None:
    """Tables are made on the CPU, also where a script says that everything is to be made elsewhere."""
    q, k, v = qkv()
    expected = fs.sparse_attention(q, k, v, LAYOUT, builder, backend=backend)
    for cached in (token_tables, window_table, _cached_mask, _cached_bits):
        cached.cache_clear()
    with torch.device("meta"):
        out, aux = fs.sparse_attention(q, k, v, LAYOUT, builder, backend=backend, return_aux=True)
        assert torch.equal(builder.select(q, k, LAYOUT).bits, aux.selection.bits)
        assert 0 < builder.nominal_density(LAYOUT, LAYOUT) <= 1
    assert torch.equal(out, expected)
