"""A wrapped model never computes all of its attention dense unseen: not at a later call, not in a copy, not after an unwrap."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flexsparse as fs
from flexsparse.compile_passes import RewriteError
from flexsparse.forms import Forms

from .conftest import run, video

SHORT = {"T": 2, "H": 4, "W": 8}  # 2 x 2 x 4 tokens of Wan's
WAYS: dict[str, dict[str, Any]] = {
    "uncompiled": {"compile": False},
    "regional": {"compile": "regional", "inner": "aot_eager"},
    "whole": {"inner": "aot_eager"},
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> dict[str, Any]:
    return WAYS[request.param]


class Masked(nn.Module):
    """Two blocks whose attention takes a mask, where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = x + block(x, mask)
        return x


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def masked() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Masked(), torch.randn(1, 256, 32), torch.rand(1, 1, 256, 256) < 0.9


def test_a_later_call_in_which_nothing_is_sparse_is_refused_and_those_after_it_are_not(way: dict[str, Any]) -> None:
    model, x, mask = masked()
    fs.wrap(model, fs.VSA(top_k=2), grid=(4, 8, 8), **way)
    with torch.no_grad():
        first = model(x)
        with pytest.raises(RewriteError, match=r"(?s)found no attention in .* to make sparse.*attention mask"):
            model(x, mask)
        assert torch.equal(model(x), first)
    assert any(call.sparse for call in fs.report(model).calls)
    with torch.no_grad(), pytest.raises(RewriteError):  # as often as it is tried
        model(x, mask)


@pytest.mark.parametrize("name", ["uncompiled", "regional", pytest.param("whole", marks=pytest.mark.slow)])
def test_attention_that_leaves_torch_is_refused_at_a_later_call(wan: Callable[[], nn.Module], name: str) -> None:
    """diffusers lets the kernels of all attention be changed at any time."""
    model = fs.wrap(wan(), fs.VSA(sparsity=0.5), **WAYS[name])
    with torch.no_grad():
        first = run(model, video())
        model.set_attention_backend("flex")  # type: ignore[operator]
        with pytest.raises(RewriteError, match=r"found no attention in .* to make sparse"):
            run(model, video())
        model.set_attention_backend("native")  # type: ignore[operator]
        assert torch.equal(run(model, video()), first)


def test_a_forward_without_any_attention_is_no_mistake_once_there_was_some() -> None:
    """Caches leave out blocks for some steps."""

    class Cached(Masked):
        skip = False

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return x if self.skip else super().forward(x, mask)

    model, x = Cached(), torch.randn(1, 256, 32)
    fs.wrap(model, fs.VSA(top_k=2), grid=(4, 8, 8), compile=False)
    model.skip = True
    with pytest.raises(RewriteError, match="no scaled_dot_product_attention call at all"):
        model(x)
    model.skip = False
    model(x)
    model.skip = True
    assert torch.equal(model(x), x)


def test_a_call_that_is_dense_for_some_inputs_has_a_row_of_its_own() -> None:
    class Mixed(Masked):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            x = x + self.blocks[0](x, mask)
            return x + self.blocks[1](x, None)

    for way in (WAYS["whole"], WAYS["uncompiled"]):
        model, x, mask = Mixed(), *masked()[1:]
        fs.wrap(model, fs.VSA(top_k=2), grid=(4, 8, 8), **way)
        with torch.no_grad():
            model(x)
            model(x, mask)
        rows = [(call.sparse, "mask" in call.reason) for call in fs.report(model).calls]
        assert sorted(rows) == [(False, True), (True, False), (True, False)]


def test_expect_holds_for_every_uncompiled_forward() -> None:
    model, x, mask = masked()
    fs.wrap(model, fs.VSA(top_k=2), grid=(4, 8, 8), compile=False, expect=2)
    model(x)
    with pytest.raises(RewriteError, match="expect is 2 sparse attention calls, but this forward had 0"):
        model(x, mask)
    with pytest.raises(ValueError, match="expect is '2': give how many sparse calls"):
        fs.wrap(Masked(), fs.VSA(top_k=2), grid=(4, 8, 8), expect="2")


@pytest.mark.parametrize("gates", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_video_below_min_tokens_runs_as_before_wrapping(
    wan: Callable[[], nn.Module], way: dict[str, Any], gates: bool
) -> None:
    plain, model = wan(), fs.wrap(wan(), fs.VSA(sparsity=0.5), min_tokens=100, gates=gates, **way)
    short, long = video(**SHORT), video()
    with torch.no_grad():
        for inputs in (short, long, short):
            out, dense = run(model, inputs), run(plain, inputs)
            if inputs is long:
                assert (out - dense).abs().max() > 1e-3
            else:
                torch.testing.assert_close(out, dense)
    rows = fs.report(model).calls
    assert any(call.sparse for call in rows) and any("below min_tokens=100" in call.reason for call in rows)


def test_gradients_below_min_tokens_are_those_before_wrapping(
    wan: Callable[[], nn.Module], way: dict[str, Any]
) -> None:
    """Activation checkpointing runs blocks again in backward, where the model's forward is over."""
    plain, model = wan().train(), fs.wrap(wan().train(), fs.VSA(sparsity=0.5), min_tokens=100, gates=True, **way)
    for one in (plain, model):
        one.enable_gradient_checkpointing()  # type: ignore[operator]
        run(one, video(**SHORT)).square().sum().backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if "gate" in name:
            assert parameter.grad is None or not parameter.grad.any()
        else:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", ["regional", pytest.param("whole", marks=pytest.mark.slow)])
def test_a_video_below_min_tokens_in_other_threads(
    wan: Callable[[], nn.Module], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads run images, the first to begin ends first; a video is sparse meanwhile, and after it."""
    model = fs.wrap(wan(), fs.VSA(sparsity=0.5), min_tokens=100, **WAYS[name])
    inside, leave = threading.Semaphore(0), [threading.Event(), threading.Event()]

    @torch.no_grad()
    def image(number: int) -> Tensor:
        local.number = number
        return run(model, video(**SHORT))

    def slow(self: Forms, *args: Any) -> Callable[..., Any]:
        compiled = dense_form(self, *args)

        def call(*args: Any) -> Any:
            inside.release()
            assert leave[local.number].wait(100)
            return compiled(*args)

        return call

    with torch.no_grad():
        sparse, dense = run(model, video()), run(model, video(**SHORT))
        local, form = threading.local(), "whole_dense" if name == "whole" else "region_dense"
        dense_form = getattr(Forms, form)
        monkeypatch.setattr(Forms, form, slow)
        with ThreadPoolExecutor(2) as pool:
            images = [pool.submit(image, number) for number in (0, 1)]
            assert inside.acquire(timeout=100) and inside.acquire(timeout=100)
            meanwhile = run(model, video())
            leave[0].set()
            assert torch.equal(images[0].result(), dense)
            leave[1].set()
            assert torch.equal(images[1].result(), dense)
        assert torch.equal(meanwhile, sparse) and torch.equal(run(model, video()), sparse)


def test_a_copy_made_during_dense_steps_is_sparse(wan: Callable[[], nn.Module]) -> None:
    model = fs.wrap(wan(), fs.VSA(sparsity=0.5), compile=False)
    with torch.no_grad():
        sparse = run(model, video())
        steps = fs.DenseSteps(model, 0.5, steps=4)
        assert (run(model, video()) - sparse).abs().max() > 1e-3
        assert torch.equal(run(copy.deepcopy(model), video()), sparse)
    assert str(fs.report(model)).startswith("the model runs dense for now (DenseSteps); sparse, it ran:")
    steps._set(False)
    assert "dense for now" not in str(fs.report(model))


def test_a_backend_and_what_it_compiles_can_be_copied() -> None:
    backend = fs.backend(fs.VSA(top_k=2), grid=(4, 8, 8), inner="aot_eager")
    model, x, _ = masked()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(compiled)(x), compiled(x))
    assert pickle.loads(pickle.dumps(backend)).report().sparse_calls == 2


@pytest.mark.parametrize("value", [1, 0, "yes", None])
def test_compile_is_true_false_or_regional(value: Any) -> None:
    with pytest.raises(ValueError, match=f"compile is {value!r}: give True, False or 'regional'"):
        fs.wrap(Masked(), fs.VSA(top_k=2), grid=(4, 8, 8), compile=value)


def test_an_offloading_hook_survives_unwrap(wan: Callable[[], nn.Module]) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counts(ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    hook, model = Counts(), fs.wrap(wan(), fs.VSA(sparsity=0.5), compile=False)
    add_hook_to_module(model, hook)
    with torch.no_grad():
        run(model, video())
        fs.unwrap(model)
        dense = run(wan(), video())
        assert torch.equal(run(model, video()), dense) and hook.calls == 2
        remove_hook_from_module(model)
        assert torch.equal(run(model, video()), dense) and hook.calls == 2


def test_a_cache_over_ours_is_called_diffusers(wan: Callable[[], nn.Module]) -> None:
    """Its forward is dressed as the one below it, which was ours."""
    model = fs.wrap(wan(), fs.VSA(sparsity=0.5), compile=False)
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.2))  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"got another forward after it was wrapped, by diffusers\.hooks\.hooks: "):
        fs.unwrap(model)


@pytest.mark.parametrize("least", [0, 200])
def test_a_compiled_call_that_turns_dense_is_refused(least: int, fresh_dynamo: None) -> None:
    """Of a model that a user compiles with the backend."""
    model, x, _ = masked()
    model = torch.compile(
        model, backend=fs.backend(fs.VSA(top_k=2), grid=(4, 8, 8), min_tokens=least, inner="aot_eager")
    )
    with torch.no_grad():
        model(x)
        with contextlib.nullcontext() if least else pytest.raises(RuntimeError, match="found no attention in"):
            model(x[:, :128])
        model(x)


def test_another_forward_put_over_ours_is_named_and_nothing_is_undone(wan: Callable[[], nn.Module]) -> None:
    model = fs.wrap(wan(), fs.VSA(sparsity=0.5), compile=False)
    ours = model.blocks[0].forward  # type: ignore[index,union-attr]
    model.blocks[0].forward = lambda *args, **kwargs: ours(*args, **kwargs)  # type: ignore[index,union-attr]
    with pytest.raises(
        ValueError, match=r"blocks\.0 got another forward after it was wrapped, by wrap\.test_dense_unseen"
    ):
        fs.unwrap(model)
    with torch.no_grad():
        run(model, video())
    model.blocks[0].forward = ours  # type: ignore[index,union-attr]
    with torch.no_grad():
        assert torch.equal(run(fs.unwrap(model), video()), run(wan(), video()))


@pytest.mark.parametrize("compile", [False, True])
def test_accelerates_autocast_is_taken_away_by_accelerate(compile: bool) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, x, _ = masked()
    dense = model(x)
    fs.wrap(model, fs.VSA(top_k=2), grid=(4, 8, 8), compile=compile, **({"inner": "aot_eager"} if compile else {}))
    prepared = accelerator.prepare(model)
    prepared(x)
    with pytest.raises(ValueError, match=r"by accelerate.*keep_fp32_wrapper=False"):
        fs.unwrap(accelerator.unwrap_model(prepared))
    unwrapped = fs.unwrap(accelerator.unwrap_model(prepared, keep_fp32_wrapper=False))
    assert torch.equal(unwrapped(x), dense)
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process: another test may want another precision


class Crossing(nn.Module):
    """Attention to itself, and to another sequence of as many tokens and another width; positions come along as a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = OwnAttention(), CrossAttention()

    def forward(self, x: Tensor, context: Tensor, positions: Tensor) -> Tensor:
        x = x + self.own(x, positions)
        return x + self.other(x, context)


class OwnAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = self.qkv(x + positions).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(32, 32), nn.Linear(48, 64)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (2, 16)).transpose(1, 2)
        k, v = self.kv(context).unflatten(-1, (2, 2, 16)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_cross_attention_is_known_whatever_the_width_and_positions_are_no_sequence(way: dict[str, Any]) -> None:
    if way.get("compile") == "regional":
        way = {"compile": False}  # there are no repeated blocks
    model = fs.wrap(Crossing(), fs.VSA(top_k=2), grid=(4, 8, 8), **way)
    with torch.no_grad():
        model(torch.randn(2, 256, 32), torch.randn(2, 256, 48), torch.randn(2, 256, 1))
    found = {call.name.split(" ")[0]: (call.sparse, "cross" in call.reason) for call in fs.report(model).calls}
    assert found == {"own": (True, False), "other": (False, True)}


def test_a_sequence_that_cross_attention_splits_itself() -> None:
    """Wan I2V: 256 text tokens and some of an image come as one sequence."""

    class Splits(CrossAttention):
        is_cross_attention = True

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return super().forward(x, context[:, 17:])

    model = Crossing()
    model.other = Splits()
    fs.wrap(model, fs.VSA(top_k=2), grid=(4, 8, 8), compile=False)
    with torch.no_grad():
        model(torch.randn(2, 256, 32), torch.randn(2, 273, 48), torch.randn(2, 256, 1))
    assert [(call.name, call.sparse) for call in fs.report(model).calls] == [("own", True), ("other", False)]
