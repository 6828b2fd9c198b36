"""A transformer as a stranger writes it, whose attention may be of a form that is not spread over ranks; runs on the ranks."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import flexsparse as fs
from flexsparse.compile_passes import RewriteError
from flexsparse.models import Part, Whole

GRID, TEXT, WIDTH = (2, 8, 8), 80, 32  # of two ranks each has 64 video tokens: fewer than there is text
PLAN = {"blocks.0": {"x": Part(1, 3)}, "out": Whole(1)}


class Attention(nn.Module):
    """Attention of two heads; how it is called is its kind's."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.more = nn.Parameter(torch.randn(1, 3, WIDTH))
        self.other = nn.LayerNorm(WIDTH)
        self.theirs = nn.MultiheadAttention(WIDTH, 2)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        tokens, source = x.shape[1], x
        if self.kind == "torch's cross":
            first = text.transpose(0, 1)
            return self.theirs(x.transpose(0, 1), first, first, need_weights=False)[0].transpose(0, 1)
        if self.kind == "joint":
            x = source = torch.cat([x, text], 1)
        if self.kind == "registers":
            source = torch.cat([x, self.more.expand(len(x), -1, -1)], 1)
        if self.kind == "pooled":
            source = F.avg_pool1d(x.transpose(1, 2), 4).transpose(1, 2)
        if self.kind == "norms":
            source = self.other(x)
        if self.kind == "mixed":
            source = x + F.gelu(x)
        if self.kind in ("cross", "own text"):
            source = text
        if self.kind == "own text":
            x = text
        q, k, v = (y.unflatten(2, (2, -1)).transpose(1, 2) for y in (self.q(x), self.k(source), self.v(source)))
        if self.kind == "flat":
            q, k, v = (y.flatten(0, 1) for y in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        if self.kind == "flat":
            out = out.unflatten(0, (-1, 2))
        return out.transpose(1, 2).flatten(2)[:, : tokens if self.kind != "own text" else None]


class Block(nn.Module):
    """Attention, added to the video."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.attention = Attention(kind)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return x + self.attention(x, text)


class Stranger(nn.Module):
    """Text that attends to itself before tokens are cut; a block of the video's tokens, then one of a kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.refiner = Attention("own text")
        self.blocks = nn.ModuleList([Block("plain"), Block(kind)])

    def forward(self, hidden_states: Tensor, text: Tensor) -> Tensor:
        text = text + self.refiner(text, text)
        x = self.embed(hidden_states.flatten(2).transpose(1, 2))
        for block in self.blocks:
            x = block(x, text)
        return self.out(x)


def grid_of(module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> tuple[int, ...]:
    """Of the first argument."""
    return tuple(args[0].shape[2:])


def inputs() -> tuple[Tensor, Tensor]:
    """Latents and text."""
    g = torch.Generator().manual_seed(3)
    return torch.randn(2, 4, *GRID, generator=g), torch.randn(2, TEXT, WIDTH, generator=g)


def pair(kind: str, compile: bool | str) -> tuple[nn.Module, nn.Module]:
    """The same model twice, wrapped: uncompiled, and as asked."""
    torch.manual_seed(0)
    alone = Stranger(kind)
    model = copy.deepcopy(alone)
    for one, how in ((alone, False), (model, compile)):
        inner = {"inner": "aot_eager"} if how else {}
        fs.wrap(one, fs.VSA(top_k=2), tile=(2, 4, 4), compile=how, grid=grid_of, **inner)
    return alone, model


def all_said(kinds: list[str], compile: bool | str) -> dict[str, str]:
    """What models of several kinds say."""
    return {kind: said(kind, compile) for kind in kinds}


def said(kind: str, compile: bool | str) -> str:
    """What a sequence parallel model of a kind raises; nothing where its output is that of one process."""
    torch._dynamo.reset()
    alone, model = pair(kind, compile)
    fs.distributed.ulysses(model, init_device_mesh("cpu", (dist.get_world_size(),)), PLAN)
    with torch.no_grad():
        wanted = alone(*inputs())
        try:
            got = model(*inputs())
        except RewriteError as error:
            return str(error)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    return ""
