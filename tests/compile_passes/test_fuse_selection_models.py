"""`FuseSelection` in whole models: built-in builders and those of users, with training and checkpoints."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import flexsparse as fs
from flexsparse import TileSelection
from flexsparse.compile_passes import FuseSelection

from .coarse_stages import K


def test_the_identity_is_that_of_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    before, again = FuseSelection().uuid(), FuseSelection().uuid()
    source = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda module: source(module) + "# changed")
    assert before == again != FuseSelection().uuid()


GRID, TILE = (4, 8, 8), (2, 4, 4)
LAYOUT = fs.TileLayout(grid=GRID, tile=TILE)


class Tiny(nn.Module):
    """One self-attention over the tokens of a grid."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj, self.checkpointed = nn.Linear(16, 48), nn.Linear(16, 16), checkpointed

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.attention, x, use_reentrant=False) if self.checkpointed else self.attention(x)


def compiled_and_reported(model: nn.Module, builder: Any, x: Tensor, **options: Any) -> tuple[Tensor, Any]:
    backend = fs.backend(builder, grid=GRID, tile=TILE, inner="aot_eager", **options)
    out = torch.compile(model, backend=backend, fullgraph=True)(x)
    (call,) = backend.report().calls
    return out, call


BUILDERS: dict[str, Any] = {
    "VSA top_k": fs.VSA(top_k=3),
    "VSA sparsity": fs.VSA(sparsity=0.6),
    "VSA scheduled": fs.VSA(sparsity=fs.SparsitySchedule(target=0.7, start=0.5)),
    "VSA with counts": fs.VSA(top_k=3, count_bias=True),
    "VSA within": fs.VSA(top_k=3, within=fs.FrameCausal(chunk=2)),
    "VSA within, with counts": fs.VSA(sparsity=0.5, count_bias=True, within=fs.FrameCausal(chunk=2)),
    "TopP": fs.TopP(mass=0.7),
    "TopP within": fs.TopP(mass=0.7, max_tiles=3, within=fs.FrameCausal(chunk=2)),
    "Union with static tiles": fs.Union(fs.VSA(top_k=3), fs.SlidingTile(window=(1, 2, 2))),
    "BSA normal": fs.BSA(kv_density=0.4),
    "BSA probability": fs.BSA(kv_density=0.4, threshold="probability"),
    "BSA mass": fs.BSA(mass=0.7, threshold="mass"),
    "BSA of all queries": fs.BSA(kv_density=0.4, score_queries="all", within=fs.FrameCausal(chunk=2)),
    "BSA without pruning": fs.BSA(kv_density=0.4, keep_queries=1),
}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", BUILDERS)
def test_built_in_builders_fuse_in_a_model(name: str) -> None:
    model, x = Tiny(), torch.randn(1, 256, 16)
    with torch.no_grad():
        out, call = compiled_and_reported(model, BUILDERS[name], x)
        assert call.sparse and call.fused, call
        plain, call = compiled_and_reported(model, BUILDERS[name], x, fuse_selection=False)
        assert not call.fused
    torch.testing.assert_close(out, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("fresh_dynamo")
def test_statistics_of_a_head_are_not_fused_and_said_so() -> None:
    with torch.no_grad():
        _, call = compiled_and_reported(Tiny(), fs.BSA(kv_density=0.4, statistics="head"), torch.randn(1, 256, 16))
    assert not call.fused and "not fused: its counts are computed from the scores of other rows" in call.reason


class Written:
    """A builder as a user writes it, from the documentation alone."""

    def __init__(self, pack: str, share: float = 1.0) -> None:
        self.pack, self.share = pack, share

    def select(self, q: Tensor, k: Tensor, layout: Any, kv_layout: Any = None, scale: float | None = None) -> Any:
        x, y = (layout.to_tiles(z).unflatten(2, (-1, layout.slots)).float() for z in (q, k))
        scores = torch.einsum("bhid,bhjd->bhij", x.mean(3), y.mean(3))
        indices = scores.topk(K, dim=-1).indices
        if self.pack == "lists":
            return TileSelection.from_lists(indices, torch.full(indices.shape[:3], K), layout)
        keep = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, indices, True)
        return TileSelection.from_mask(keep, layout)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("checkpointed", (False, True), ids=("", "checkpointed"))
@pytest.mark.parametrize("pack", ("mask", "lists"))
def test_a_builder_of_a_users_own_fuses_in_a_model_that_trains(pack: str, checkpointed: bool) -> None:
    model, x = Tiny(checkpointed), torch.randn(1, 256, 16)
    out, call = compiled_and_reported(model, Written(pack), x)
    assert call.sparse and call.fused, call
    out.square().sum().backward()
    fused = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    wanted, call = compiled_and_reported(model, Written(pack), x, fuse_selection=False)
    assert not call.fused
    wanted.square().sum().backward()
    torch.testing.assert_close(out, wanted)
    assert len(fused) == 4
    for mine, p in zip(fused, model.parameters()):
        torch.testing.assert_close(mine, p.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("checkpointed", (False, True), ids=("", "checkpointed"))
@pytest.mark.parametrize("name", ("VSA scheduled", "VSA within, with counts", "TopP within"))
def test_the_gated_coarse_output_trains_fused(name: str, checkpointed: bool) -> None:
    gradients = []
    for compiled in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(Tiny(checkpointed and compiled))
        options: dict[str, Any] = {"fullgraph": True, "inner": "aot_eager"} if compiled else {"compile": False}
        fs.wrap(model, BUILDERS[name], tile=TILE, grid=GRID, gates=True, **options)
        for parameter in fs.gate_parameters(model):
            nn.init.normal_(parameter)
        model(torch.randn(1, 256, 16, generator=torch.Generator().manual_seed(2))).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
        if compiled:
            assert all(call.sparse and call.fused for call in fs.report(model).calls), fs.report(model)
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 6
    for key, mine in gradients[0].items():
        torch.testing.assert_close(mine, gradients[1][key], atol=1e-3, rtol=1e-3, msg=lambda t, k=key: f"{k}: {t}")
