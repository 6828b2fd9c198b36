"""Models with one self-attention, ways of making it sparse, and what they compute compiled and by definition."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import flexsparse as fs
from flexsparse.compile_passes.lower_flex import BACKWARD, FORWARD

from .capture import Joint, ops

GRID, TILE = (4, 8, 8), (2, 4, 4)
TOKENS = 4 * 8 * 8
C, HEADS = 16, 2


class Tiny(nn.Module):
    """One self-attention; with KV heads fewer than heads the keys are repeated by SDPA."""

    def __init__(self, checkpointed: bool = False, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.kv_heads, self.checkpointed = kv_heads, checkpointed
        self.to_q, self.proj = nn.Linear(C, C), nn.Linear(C, C)
        self.to_k, self.to_v = nn.Linear(C, kv_heads * 8), nn.Linear(C, kv_heads * 8)

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (to(x).unflatten(-1, (-1, 8)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.kv_heads != HEADS)
        return x + self.proj(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.attention, x, use_reentrant=False) if self.checkpointed else self.attention(x)


class Video(nn.Module):
    """A model that says its grid by its input ``[B, 3, T, H, W]``."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.block, self.head = nn.Conv3d(3, C, (1, 2, 2), (1, 2, 2)), Tiny(), nn.Linear(C, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.patch(x).flatten(2).transpose(1, 2)))


@dataclass
class Case:
    """A builder, how it is used, and what the model is."""

    builder: Any
    options: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return TOKENS + self.options.get("text_first", 0) + self.options.get("text_last", 0)


CASES = {
    "VSA": Case(fs.VSA(top_k=3)),
    "grouped queries": Case(fs.VSA(top_k=3), model={"kv_heads": 1}),
    "partial tiles": Case(fs.VSA(top_k=2), {"tile": (3, 3, 3)}),
    "text on both sides": Case(fs.VSA(top_k=3), {"text_first": 3, "text_last": 40}),
    "packed queries": Case(fs.BSA(kv_density=0.4)),
    "packed queries and text": Case(fs.BSA(kv_density=0.4, fill="nearest"), {"text_first": 7}),
    "static": Case(fs.FrameCausal(chunk=2)),
    "checkpointed": Case(fs.VSA(top_k=3), model={"checkpointed": True}),
    "checkpointed, packed": Case(fs.BSA(kv_density=0.4), model={"checkpointed": True}),
}


def outcome(model: nn.Module, out: Tensor) -> list[Tensor]:
    """Output, and gradients where it has any."""
    if not out.requires_grad:
        return [out]
    grads = torch.autograd.grad(out.square().mean(), list(model.parameters()))
    return [out.detach(), *grads]


def run(case: Case, x: Tensor, **options: Any) -> tuple[list[Tensor], Any]:
    """Compiled: outcome and report of the one call."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Tiny(**case.model)
    given = {"tile": TILE, "inner": "aot_eager", **case.options, **options}
    backend = fs.backend(case.builder, grid=GRID, **given)
    found = outcome(model, torch.compile(model, backend=backend, fullgraph=True)(x))
    (call,) = backend.report().calls
    return found, call


def definition(case: Case, x: Tensor) -> list[Tensor]:
    """Uncompiled, by the oracle."""
    torch.manual_seed(0)
    model = Tiny(**{**case.model, "checkpointed": False})
    wrapped = fs.wrap(
        nn.Sequential(model),
        case.builder,
        grid=GRID,
        compile=False,
        attention="reference",
        **{"tile": TILE, **case.options},
    )
    return outcome(model, wrapped(x))


def assert_same(mine: list[Tensor], other: list[Tensor], tolerance: float = 1e-5) -> None:
    for one, two in zip(mine, other, strict=True):
        torch.testing.assert_close(one, two, atol=tolerance, rtol=1e-3)


def check_lowered(joint: Joint, training: bool, calls: int = 1) -> None:
    assert (joint.count(FORWARD, "before"), joint.count(BACKWARD, "before")) == (calls, calls * training)
    assert (joint.count(FORWARD), joint.count(BACKWARD)) == (0, 0)
    assert joint.count(ops.tile_attention) == calls
    assert joint.count(ops.tile_attention_backward) == calls * training
    assert joint.count(ops.block_lists) == 0, "the lists are made, though nothing reads them"
