"""`fs.wrap` on diffusers' Wan: every way of running it gives what the oracle gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.exc import InductorError

import flexsparse as fs
from flexsparse.compile_passes import RewriteError
from flexsparse.compiler import Backend

from .conftest import assert_same_gradients, gradients, reference, run, video

WAYS: list[Any] = [True, "regional", False]
QUICK: list[Any] = [True, pytest.param("regional", marks=pytest.mark.slow), False]
GRIDS = [(4, 16, 16), (4, 8, 32), (4, 32, 8), (3, 16, 24)]  # landscape and portrait of equal token counts, and another
Make = Callable[[], nn.Module]


def options(way: Any, inner: str = "aot_eager") -> dict[str, Any]:
    """Everything compiled is compiled as one graph."""
    return {"compile": way, **({} if way is False else {"fullgraph": True, "inner": inner})}


@pytest.mark.parametrize("way", WAYS)
def test_all_tiles_kept_equals_dense(wan: Make, way: Any) -> None:
    with torch.no_grad():
        dense = run(wan(), video())
        kept = run(fs.wrap(wan(), fs.VSA(top_k=4), **options(way)), video())
        dropped = run(fs.wrap(wan(), fs.VSA(top_k=2), **options(way)), video())
    torch.testing.assert_close(kept, dense, atol=1e-5, rtol=0)
    assert (dropped - dense).abs().max() > 1e-2


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="torch 2.11 checks a masked index in C++ that does not compile (AVX-512)"
)
@pytest.mark.slow
@pytest.mark.parametrize("way", [True, "regional"])
def test_inductor_equals_eager_in_outputs_and_gradients(wan: Make, way: Any) -> None:
    """With gates: a fourth linear map of the same tokens. A quick one is in test_stranger.py: every block's kernels are C++."""
    model = wan()
    model.blocks = model.blocks[:1]  # type: ignore[index]  # Inductor compiles C++ for every block
    compiled = fs.wrap(copy.deepcopy(model), fs.VSA(top_k=2), gates=True, **options(way, "inductor"))
    eager = reference(model, fs.VSA(top_k=2), gates=True)
    for model in (compiled, eager):
        for parameter in fs.gate_parameters(model):
            nn.init.constant_(parameter, 0.1)
    assert_same_gradients(gradients(compiled, video()), gradients(eager, video()))
    if way is True:
        with torch.no_grad():  # such a graph takes FlexAttention
            torch.testing.assert_close(run(compiled, video()), run(eager, video()), atol=1e-5, rtol=0)
    assert {(call.backend, call.lowered) for call in fs.report(compiled).calls if call.sparse} == {("gather", True)}


@pytest.mark.parametrize("way", QUICK)
def test_resolutions_in_turn_cost_two_graphs(wan: Make, way: Any) -> None:
    model = fs.wrap(wan(), fs.VSA(top_k=2), **options(way))
    counters.clear()
    for grid in GRIDS:
        expected = gradients(reference(wan(), fs.VSA(top_k=2)), video(*grid))
        assert_same_gradients(gradients(model, video(*grid)), expected)
    if way is not False:
        assert counters["stats"]["unique_graphs"] == 2
        sparse = [call for call in fs.report(model).calls if call.sparse]
        assert sparse and all(call.fused and call.lowered for call in sparse)
        why = {call.reason for call in fs.report(model).calls if not call.sparse}
        assert why == {"256 queries and 8 keys are not the layout's 256 tokens"}  # numbers, where sizes are symbolic


@pytest.mark.slow
@pytest.mark.parametrize("way", [True, "regional"])
@pytest.mark.parametrize("builder", [fs.VSA(top_k=2), fs.BSA(keep_queries=0.5, kv_density=0.3)], ids=["vsa", "bsa"])
def test_any_number_of_tiles_costs_two_graphs(wan: Make, way: Any, builder: Any) -> None:
    """Above and below 32 KV tiles, which fill a word of the bitmask; a size of 1 would be a graph of its own to torch."""
    model = fs.wrap(wan(), builder, tile=(2, 2, 2), **options(way))
    counters.clear()
    for grid in [(4, 16, 16), (4, 8, 8), (4, 32, 16), (2, 4, 6), (5, 14, 10)]:
        gradients(model, video(*grid))
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("way", [*(pytest.param(way, marks=pytest.mark.slow) for way in (True, "regional")), False])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_redoes_each_block_on_its_own_grid(wan: Make, way: Any, reentrant: bool) -> None:
    """Two grids of equal token counts in one backward: a block redone densely, or on the other grid, shows."""
    if reentrant and way is not False and torch.__version__ < (2, 13):
        pytest.skip("compiled reentrant checkpoints are tested with torch 2.13")
    model = wan().train()
    model.enable_gradient_checkpointing(  # type: ignore[operator]
        lambda module, *args: torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=reentrant)
    )
    choice = options(way) if way is not True else {"compile": True, "inner": "aot_eager"}
    model = fs.wrap(model, fs.VSA(top_k=2), **choice)
    landscape, portrait = video(*GRIDS[1]), video(*GRIDS[2])
    if reentrant:
        for inputs in (landscape, portrait):
            inputs[0].requires_grad_()
    expected = gradients(reference(wan(), fs.VSA(top_k=2)), landscape, portrait)
    assert_same_gradients(gradients(model, landscape, portrait), expected)


@pytest.mark.parametrize("way", WAYS)
def test_gates_start_at_zero_train_and_leave_with_unwrap(wan: Make, way: Any) -> None:
    plain = wan()
    names = list(plain.state_dict())
    model = fs.wrap(wan(), fs.VSA(top_k=2), gates=True, **options(way))
    added = [name for name in model.state_dict() if name not in names]
    assert added == [f"blocks.{i}.attn1.to_gate_compress.{kind}" for i in (0, 1) for kind in ("weight", "bias")]
    with torch.no_grad():
        ungated = run(reference(wan(), fs.VSA(top_k=2)), video())
        torch.testing.assert_close(run(model, video()), ungated, atol=1e-5, rtol=0)
    found = gradients(model, video())
    assert all(found[name].abs().sum() > 0 for name in added)

    other = reference(wan(), fs.VSA(top_k=2), gates=True)
    with torch.no_grad():
        for parameter in fs.gate_parameters(model):
            parameter.normal_(std=0.1)
    other.load_state_dict(model.state_dict())
    assert_same_gradients(gradients(model, video()), gradients(other, video()))

    assert fs.unwrap(model) is model
    assert list(model.state_dict()) == names
    assert not any("flexsparse" in key or key == "forward" for m in model.modules() for key in vars(m))
    with torch.no_grad():
        torch.testing.assert_close(run(model, video()), run(plain, video()), atol=1e-6, rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_cross_attention_is_left_alone_even_at_equal_lengths(wan: Make, way: Any) -> None:
    inputs = video(text=256)  # as many text tokens as video tokens: lengths alone do not tell
    with torch.no_grad():
        model = fs.wrap(wan(), fs.VSA(top_k=4), **options(way))
        torch.testing.assert_close(run(model, inputs), run(wan(), inputs), atol=1e-5, rtol=0)
        calls = {call.name: call for call in fs.report(model).calls}
    assert {name: call.sparse for name, call in calls.items()} == {
        f"blocks.{i}.attn{j}": j == 1 for i in (0, 1) for j in (1, 2)
    }
    assert "cross-attention" in calls["blocks.0.attn2"].reason
    assert calls["blocks.0.attn1"].shape == (1, 2, 256, 256, 16)


@pytest.mark.parametrize("way", QUICK)
def test_autocast(wan: Make, way: Any) -> None:
    """SDPA casts q, k and v under autocast; so does what replaces it, forward and backward."""
    model = fs.wrap(wan(), fs.VSA(top_k=2), **options(way))
    with torch.autocast("cpu", torch.bfloat16):
        dense = run(wan(), video())
        out = run(model, video())
        out.float().square().mean().backward()
    assert out.dtype == dense.dtype
    exact = run(reference(wan(), fs.VSA(top_k=2)), video())
    assert (out.float() - exact).abs().max() < 0.06
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.blocks.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("way", QUICK)
def test_annealing_changes_no_graph_and_ends_at_the_target(wan: Make, way: Any) -> None:
    schedule = fs.SparsitySchedule(start=0.0, target=0.75, step=0.25, every=1)
    model = fs.wrap(wan(), fs.VSA(sparsity=schedule), **options(way))
    counters.clear()
    with torch.no_grad():
        for _ in range(5):
            expected = run(reference(wan(), fs.VSA(sparsity=schedule.value)), video())
            torch.testing.assert_close(run(model, video()), expected, atol=1e-5, rtol=0)
            schedule.advance()
    assert schedule.value == 0.75
    if way is not False:
        assert counters["stats"]["unique_graphs"] == 1


BSA, WITHIN = fs.BSA(kv_density=0.3), fs.VSA(top_k=2, within=fs.SlidingTile(window=(1, 2, 2)))
SLOW = [(way, builder) for way in (True, "regional") for builder in (BSA, WITHIN)]


@pytest.mark.parametrize(
    ("way", "builder"),
    [(False, BSA), (False, WITHIN), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_other_builders_train(wan: Make, way: Any, builder: Any) -> None:
    model = fs.wrap(wan(), builder, **options(way))
    for grid in GRIDS[:2]:
        assert_same_gradients(gradients(model, video(*grid)), gradients(reference(wan(), builder), video(*grid)))


@pytest.mark.parametrize("way", QUICK)
def test_a_copy_is_wrapped_and_independent(wan: Make, way: Any) -> None:
    """An EMA copy of a wrapped model."""
    model = fs.wrap(wan(), fs.VSA(top_k=2), **options(way))
    twin = copy.deepcopy(model)
    assert type(model) is type(wan())
    with torch.no_grad():
        before = run(model, video())
        for parameter in twin.parameters():
            parameter.add_(0.01)
        changed = wan()
        changed.load_state_dict(twin.state_dict())
        torch.testing.assert_close(
            run(twin, video()), run(reference(changed, fs.VSA(top_k=2)), video()), atol=1e-4, rtol=0
        )
        torch.testing.assert_close(run(model, video()), before, atol=0, rtol=0)


def test_torch_compile_with_the_backend(wan: Make) -> None:
    backend = fs.backend(fs.VSA(top_k=2), grid=(4, 8, 8), expect=2, inner="aot_eager")
    model = torch.compile(wan(), backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(
            run(model, video()), run(reference(wan(), fs.VSA(top_k=2)), video()), atol=1e-5, rtol=0
        )
    assert [call.sparse for call in backend.report().calls] == [True, False, True, False]
    assert "blocks.0.attn1" in str(backend.report())


def test_regional_compilation_with_the_backend(wan: Make) -> None:
    backend = fs.backend(fs.VSA(top_k=2), grid=(4, 8, 8), expect=1, inner="aot_eager")
    model = wan()
    model.compile_repeated_blocks(backend=backend, fullgraph=True)  # type: ignore[operator]
    counters.clear()
    with torch.no_grad():
        torch.testing.assert_close(
            run(model, video()), run(reference(wan(), fs.VSA(top_k=2)), video()), atol=1e-5, rtol=0
        )
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_compile_repeated_blocks_of_a_wrapped_model(wan: Make) -> None:
    """The user's own regional compilation of a model wrapped uncompiled takes flexsparse's backend."""
    model = fs.wrap(wan(), fs.VSA(top_k=2), compile=False, inner="aot_eager")
    model.compile_repeated_blocks(fullgraph=True)  # type: ignore[operator]
    for grid in GRIDS[:3]:
        assert_same_gradients(
            gradients(model, video(*grid)), gradients(reference(wan(), fs.VSA(top_k=2)), video(*grid))
        )
    assert [c.name for c in fs.report(model).calls if c.sparse] == ["blocks.0.attn1", "blocks.1.attn1"]


def test_backend_known_by_name(wan: Make) -> None:
    choice = {"builder": fs.VSA(top_k=2), "grid": (4, 8, 8), "inner": "aot_eager"}
    model = torch.compile(wan(), backend="flexsparse", options=choice, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(
            run(model, video()), run(reference(wan(), fs.VSA(top_k=2)), video()), atol=1e-5, rtol=0
        )


def test_symbolic_sizes_that_torch_cannot_compile(
    wan: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor fails at some models' second grid; each grid by itself is what helps, and the error says so."""
    inner = Backend._inner

    def fails(self: Backend, gm: Any, inputs: Any, *others: Any) -> Any:
        if any(isinstance(x, torch.SymInt) for x in inputs):
            raise InductorError(ValueError("Invalid ranges [0:-1]"), None)
        return inner(self, gm, inputs, *others)

    monkeypatch.setattr(Backend, "_inner", fails)
    model = fs.wrap(wan(), fs.VSA(sparsity=0.5), inner="aot_eager")
    with torch.no_grad():
        first = run(model, video())
        with pytest.raises(RewriteError, match=r"(?s)give wrap\(\.\.\., dynamic=False\).*Invalid ranges"):
            run(model, video(T=2))
        model = fs.wrap(fs.unwrap(model), fs.VSA(sparsity=0.5), inner="aot_eager", dynamic=False)
        assert torch.equal(run(model, video()), first)
        expected = run(reference(wan(), fs.VSA(sparsity=0.5)), video(T=2))
        torch.testing.assert_close(run(model, video(T=2)), expected, atol=1e-5, rtol=1e-4)
