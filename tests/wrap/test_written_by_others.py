"""Models written in ways of their own: other checkpoints than torch's, scales that modules hold, outputs of any kind."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import flexsparse as fs
from flexsparse import one_graph
from flexsparse.compile_passes import RewriteError
from flexsparse.compiler import Backend

from .conftest import Stranger


def clip(T: int = 4) -> Tensor:
    return torch.randn(1, 3, T, 16, 16, generator=torch.Generator().manual_seed(T))


def test_torchs_own_layer_has_no_fast_path_in_evaluation() -> None:
    """One block of the model's own beside it was enough for it to stay dense unseen."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv3d(3, 32, (1, 2, 2), (1, 2, 2))
            self.own = Stranger().blocks[0]
            self.layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.own(self.patch(x).flatten(2).transpose(1, 2)))

    torch.manual_seed(0)
    model = Model().eval().requires_grad_(False)
    plain = fs.wrap(copy.deepcopy(model), fs.VSA(top_k=1), compile=False)
    backend = fs.backend(fs.VSA(top_k=1), grid=(4, 8, 8), inner="aot_eager")
    torch.compile(copy.deepcopy(model), backend=backend)(clip())
    assert [call.sparse for call in backend.report().calls] == [True, False]
    assert "torch.backends.mha.set_fastpath_enabled(False)" in str(backend.report())
    fs.wrap(model, fs.VSA(top_k=1), inner="aot_eager")
    torch.testing.assert_close(model(clip()), plain(clip()), atol=1e-5, rtol=0)
    assert fs.report(model).sparse_calls == 2
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_fast_path_is_back_when_the_last_thread_is_out() -> None:
    """A call that began within another's and ended after it left it off for the whole process."""
    assert torch.backends.mha.get_fastpath_enabled()
    first, second = one_graph.no_fast_path, one_graph.no_fast_path
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert not torch.backends.mha.get_fastpath_enabled()
    second.__exit__()
    assert torch.backends.mha.get_fastpath_enabled()


def test_replicas_of_data_parallel_are_refused(stranger: Stranger) -> None:
    """Their forward would be the original's, on its device, with its weights."""
    model = fs.wrap(stranger, fs.VSA(top_k=1), compile=False)
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        model._replicate_for_data_parallel()  # type: ignore[operator]
    assert type(fs.unwrap(model)._replicate_for_data_parallel()) is Stranger  # type: ignore[operator]


@torch.no_grad()
def test_a_scale_that_a_module_holds(stranger: Stranger) -> None:
    """Where sizes are symbolic, torch makes an input of it: the second resolution did not compile."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.scale = nn.Linear(32, 96), 0.3

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2)

    stranger.blocks = nn.ModuleList([Scaled()])
    plain = fs.wrap(copy.deepcopy(stranger), fs.VSA(top_k=2), compile=False)
    fs.wrap(stranger, fs.VSA(top_k=2), inner="aot_eager")
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for T in (4, 8, 12):
        torch.testing.assert_close(stranger(clip(T)), plain(clip(T)), atol=1e-5, rtol=0)
    assert graphs["unique_graphs"] == before + 2
    stranger.blocks[0].scale = plain.blocks[0].scale = 3.0
    torch.testing.assert_close(stranger(clip(12)), plain(clip(12)), atol=1e-5, rtol=0)


@torch.no_grad()
def test_numbers_that_modules_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Constants: as inputs of a graph of symbolic sizes they had all of it compiled twice. Inputs once they have changed."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = 0.5

        def forward(self, x: Tensor) -> Tensor:
            return x + self.shift

    graphs: list[int] = []
    compile_ = Backend.compile
    monkeypatch.setattr(Backend, "compile", lambda *args, **kwargs: graphs.append(1) or compile_(*args, **kwargs))
    monkeypatch.setattr(one_graph, "FEW", 1)
    model = Stranger(depth=1)
    model.patch = nn.Sequential(model.patch, Shifted())
    plain = fs.wrap(copy.deepcopy(model), fs.VSA(top_k=1), compile=False)
    fs.wrap(model, fs.VSA(top_k=1), inner="aot_eager")
    for T in (4, 8, 12):
        model(clip(T))
    assert len(graphs) == 2
    with torch._dynamo.config.patch(recompile_limit=2):
        for step in range(4):
            model.patch[1].shift = plain.patch[1].shift = step / 8
            torch.testing.assert_close(model(clip(12)), plain(clip(12)), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("warm", [False, True])
def test_a_dispatch_mode_is_said_to_be_the_reason(warm: bool) -> None:
    """And not another backend: torch runs the wrapped model's code uncompiled under one."""
    model = fs.wrap(Stranger(depth=1), fs.VSA(top_k=1), inner="aot_eager")
    if warm:
        model(clip())
    with FlopCounterMode(display=False), pytest.raises(RewriteError, match=r"FlopCounterMode is one.*compile=False"):
        model(clip())
    fs.wrap(fs.unwrap(model), fs.VSA(top_k=1), compile=False)
    with FlopCounterMode(display=False) as counter:
        model(clip())
    assert any("gather_attention" in str(op) for op in counter.get_flop_counts()["Global"])


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("few", [1, one_graph.FEW])
def test_numbers_that_a_call_gives(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A time of another value at each step, at one resolution and at others: no graph for each."""

    class Timed(Stranger):
        def forward(self, x: Tensor, time: float) -> Tensor:  # type: ignore[override]
            return super().forward(x * time)

    monkeypatch.setattr(one_graph, "FEW", few)
    torch.manual_seed(0)
    model = Timed(depth=1)
    plain = fs.wrap(copy.deepcopy(model), fs.VSA(top_k=1), compile=False)
    fs.wrap(model, fs.VSA(top_k=1), inner="aot_eager")
    for T in (4, 8):
        for step in range(4 * few):
            given = (clip(T), 1 - step / 16)
            torch.testing.assert_close(model(*given), plain(*given), atol=1e-5, rtol=0)
    assert len(fs.report(model).calls) == 1


def test_too_many_recompilations_are_one_error(stranger: Stranger) -> None:
    fs.wrap(stranger, fs.VSA(top_k=1), inner="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        stranger(clip())
        with (
            torch.no_grad(),
            pytest.raises(RewriteError, match=r"once more than torch\._dynamo\.config\.recompile_limit=1 allows"),
        ):
            stranger(clip())


def test_a_part_runs_by_itself_where_the_grid_is_given(stranger: Stranger) -> None:
    fs.wrap(stranger, fs.VSA(top_k=2), compile=False)
    tokens = torch.randn(1, 256, 32)
    with pytest.raises(
        RuntimeError, match=r"runs outside of the model's forward.*give wrap\(\.\.\., grid=\(T, H, W\)\)"
    ):
        stranger.blocks[0](tokens)
    dense = fs.unwrap(stranger).blocks[0](tokens)
    for top_k, same in ((4, True), (2, False)):
        model = copy.deepcopy(fs.wrap(stranger, fs.VSA(top_k=top_k), grid=(4, 8, 8), compile=False))
        assert torch.allclose(model.blocks[0](tokens), dense, atol=1e-5) == same
        fs.unwrap(stranger)


@dataclasses.dataclass(frozen=True)
class Out:
    samples: list[Tensor]


def test_blocks_are_redone_whatever_the_model_returns(stranger: Stranger) -> None:
    class Checkpointed(Stranger):
        again = True

        def forward(self, x: Tensor) -> Any:
            h = self.patch(x).flatten(2).transpose(1, 2)
            for block in self.blocks:
                h = torch.utils.checkpoint.checkpoint(block, h, use_reentrant=False) if self.again else block(h)
            return Out([self.head(h)])

    stranger.__class__ = Checkpointed
    fs.wrap(stranger, fs.VSA(top_k=2), compile=False)
    found = []
    for stranger.again in (True, False):
        loss = sum(stranger(clip(T)).samples[0].square().sum() for T in (4, 8))
        found.append(torch.autograd.grad(loss, list(stranger.parameters())))
    torch.testing.assert_close(*found)


class Halved(nn.Module):
    """Checkpoints a function of its own and not a module."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.qkv, self.reentrant = nn.Linear(16, 48), reentrant

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.attention, x, use_reentrant=self.reentrant)


class OwnCheckpoint(torch.autograd.Function):
    """As latent-diffusion's `CheckpointFunction`, which many video models carry a copy of."""

    @staticmethod
    def forward(ctx: Any, run: Any, x: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.run(x)
        return None, *torch.autograd.grad(out, x, grad)


class HalvedByItself(Halved):
    def forward(self, x: Tensor) -> Tensor:
        return OwnCheckpoint.apply(self.attention, x)


class Outside(nn.Module):
    """What is redone is a module here, whose forward is ours."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = Halved(False)
        self.inside.forward = self.inside.attention  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return OwnCheckpoint.apply(self.inside, x)


def test_a_module_checkpointed_by_a_function_of_its_own_is_redone_sparse() -> None:
    model = fs.wrap(nn.Sequential(Outside()), fs.VSA(top_k=1), grid=(4, 8, 8), compile=False)  # parts run by themselves
    x = torch.randn(1, 256, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (checkpointed,) = torch.autograd.grad(model(x).square().sum(), x)
    (plain,) = torch.autograd.grad(model[0].inside(x).square().sum(), x)
    torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize("kind", [Halved, HalvedByItself])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_function_would_be_redone_densely_and_is_refused(kind: type[Halved], reentrant: bool) -> None:
    model = fs.wrap(nn.Sequential(kind(reentrant)), fs.VSA(top_k=1), grid=(4, 8, 8), compile=False)
    x = torch.randn(1, 256, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"inside of a checkpointed function.*Checkpoint a module"):
        model(x)
    with torch.no_grad():  # nothing is redone
        assert model(x).shape == x.shape


class References(nn.Module):
    """Attention among the video's tokens, then to those of a reference of as many, by projections that are no `nn.Linear`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.patch = kind, nn.Conv3d(3, 32, (1, 2, 2), (1, 2, 2))
        self.maps = nn.ModuleList(nn.Conv1d(32, 32, 1) for _ in range(3))

    def project(self, number: int, x: Tensor) -> Tensor:
        weight = self.maps[number].weight[..., 0]
        if self.kind == "convolution":
            return self.maps[number](x.transpose(1, 2)).unflatten(1, (2, 16)).transpose(2, 3)
        if self.kind == "einsum":
            return torch.einsum("bsc,hdc->bhsd", x, weight.unflatten(0, (2, 16)))
        return torch.tensordot(x, weight, dims=([2], [1])).unflatten(2, (2, 16)).transpose(1, 2)

    def attend(self, x: Tensor, other: Tensor) -> Tensor:
        q, k, v = (self.project(number, tokens) for number, tokens in enumerate((x, other, other)))
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, video: Tensor, reference: Tensor) -> Tensor:
        x, other = (self.patch(each).flatten(2).transpose(1, 2) for each in (video, reference))
        x = self.attend(self.attend(x, x), other)
        return self.attend(x, other)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["convolution", "einsum", "tensordot"])
def test_attention_to_a_reference_of_as_many_tokens_stays_dense(kind: str) -> None:
    """It was sparse: a projection that was not known let the search go on to what both sequences are made of."""
    torch.manual_seed(0)
    model = fs.wrap(References(kind), fs.VSA(top_k=1), inner="aot_eager")
    model(clip(), clip(4).flip(0) * 2)
    assert [call.sparse for call in fs.report(model).calls] == [True, False, False]


@torch.no_grad()
def test_a_video_in_a_list() -> None:
    """As Wan's own code takes it, with times that are integers: no argument is a floating point tensor."""

    class Lists(Stranger):
        def forward(self, x: list[Tensor], time: Tensor, more: dict[str, Any]) -> list[Tensor]:  # type: ignore[override]
            return [super().forward(torch.stack(x) + time.view(-1, 1, 1, 1, 1) * more["scale"])]

    def grid(model: nn.Module, args: Any, kwargs: Any) -> tuple[int, int, int]:
        return args[0][0].shape[1], 8, 8

    torch.manual_seed(0)
    model = Lists(depth=1)
    plain = fs.wrap(copy.deepcopy(model), fs.VSA(top_k=2), grid=grid, compile=False)
    fs.wrap(model, fs.VSA(top_k=2), grid=grid, inner="aot_eager")
    for T in (4, 8):
        given = ([clip(T)[0]], torch.ones(1, dtype=torch.int64), {"name": "a", "scale": torch.full((), 0.5)})
        torch.testing.assert_close(model(*given)[0], plain(*given)[0], atol=1e-5, rtol=0)
    assert fs.report(model).sparse_calls == 1 == fs.report(plain).sparse_calls
