"""A tiny diffusers Wan (no download) and a transformer as a stranger writes it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models.zoo import WAN
from torch import Tensor, nn

import flexsparse as fs

Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(scope="session")
def wan_model() -> nn.Module:
    """Built once; tests take copies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import WanTransformer3DModel

        torch.manual_seed(0)
        return WanTransformer3DModel(**WAN).eval()


@pytest.fixture
def wan(wan_model: nn.Module) -> Callable[[], nn.Module]:
    """Makes copies of the tiny Wan."""
    return lambda: copy.deepcopy(wan_model)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def video(T: int = 4, H: int = 16, W: int = 16, text: int = 8, batch: int = 1) -> Inputs:
    """Latents, timestep and text of a size; the same for the same size."""
    g = torch.Generator().manual_seed(T * 10000 + H * 100 + W)
    return (
        torch.randn(batch, 4, T, H, W, generator=g),
        torch.full((batch,), 500),
        torch.randn(batch, text, 16, generator=g),
    )


def run(model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's sample."""
    return model(*inputs, return_dict=False)[0]


def gradients(model: nn.Module, *batches: Inputs) -> dict[str, Tensor]:
    """Gradients of every parameter after one backward through all batches."""
    model.zero_grad()
    sum(run(model, inputs).square().mean() for inputs in batches).backward()  # type: ignore[union-attr]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(mine: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """Every parameter's gradient is there in both, and equal."""
    assert mine.keys() == other.keys()
    for name, grad in mine.items():
        torch.testing.assert_close(
            grad, other[name], atol=tolerance, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def reference(model: nn.Module, builder: Any, **options: Any) -> nn.Module:
    """The model, uncompiled, its sparse attention computed by the oracle."""
    return fs.wrap(model, builder, compile=False, attention="reference", **options)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        B, S, C = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, S, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, S, C))
        return x + self.mlp(x)


class Stranger(nn.Module):
    """A video transformer of somebody who has never heard of flexsparse."""

    def __init__(self, dim: int = 32, heads: int = 2, depth: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv3d(3, dim, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.head = nn.Linear(dim, 12)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x)
        h = h.flatten(2).transpose(1, 2)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


@pytest.fixture
def stranger() -> Stranger:
    torch.manual_seed(1)
    return Stranger()
