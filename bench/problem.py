"""Inputs of a case, and what each implementation does with them.

Shape letters: B batch, H query heads, G KV heads, S tokens, D head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import flexsparse as fs
from bench.cases import DENSE, Case


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Tensors of a case on one grid; q and g ``[B, H, S, D]``, k and v ``[B, G, S, D]``, g the output's gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    layout: fs.TileLayout
    builder: Any

    @functools.cached_property
    def selection(self) -> fs.TileSelection:
        """The critical tiles, as attention itself chooses them."""
        return self.builder.select(self.q, self.k, self.layout)

    @functools.cached_property
    def everything(self) -> fs.TileSelection:
        """All tiles: what dense attention computes."""
        return fs.Dense().select(self.q, self.k, self.layout)


def make(case: Case, grid: tuple[int, int, int]) -> Problem:
    """Normal inputs, the same ones for every run."""
    layout = fs.TileLayout(grid=grid, tile=case.layout.sides)
    generator = torch.Generator().manual_seed(0)

    def randn(heads: int) -> Tensor:
        return torch.randn(case.B, heads, layout.seq_len, case.D, generator=generator).to(case.torch_dtype)

    q, k, v, g = (randn(heads) for heads in (case.H, case.G, case.G, case.H))
    return Problem(q=q, k=k, v=v, g=g, layout=layout, builder=case.builder)


def dense(q: Tensor, k: Tensor, v: Tensor, layout: fs.TileLayout, builder: Any) -> Tensor:
    """Dense attention, what a model without flexsparse runs."""
    gqa = q.shape[1] != k.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)


def gather(q: Tensor, k: Tensor, v: Tensor, layout: fs.TileLayout, builder: Any) -> Tensor:
    """The gather backend, uncompiled."""
    return fs.sparse_attention(q, k, v, layout, builder, backend="gather")


def flex(q: Tensor, k: Tensor, v: Tensor, layout: fs.TileLayout, builder: Any) -> Tensor:
    """The flex backend from uncompiled code: FlexAttention is compiled at the first call, the rest is not."""
    return fs.sparse_attention(q, k, v, layout, builder, backend="flex")


def compiled(q: Tensor, k: Tensor, v: Tensor, layout: fs.TileLayout, builder: Any) -> Tensor:
    """All of `sparse_attention` in one compiled graph; the backend is chosen there."""
    return _compile()(q, k, v, layout, builder)


@functools.cache
def _compile() -> Any:
    # static, or the second grid would be compiled for any length, which FlexAttention on CPU cannot do
    return torch.compile(fs.sparse_attention, dynamic=False, fullgraph=True)


ATTENTION: dict[str, Callable[..., Tensor]] = {
    DENSE: dense,
    "flexsparse_gather": gather,
    "flexsparse_flex": flex,
    "flexsparse_compiled": compiled,
}


def forward(impl: str, problem: Problem) -> dict[str, Tensor]:
    """``out`` of one implementation."""
    p = problem
    with torch.no_grad():
        return {"out": ATTENTION[impl](p.q, p.k, p.v, p.layout, p.builder)}


def training(impl: str, problem: Problem) -> dict[str, Tensor]:
    """``out``, ``dq``, ``dk``, ``dv`` of one implementation."""
    p = problem
    inputs = [x.detach().requires_grad_() for x in (p.q, p.k, p.v)]
    out = ATTENTION[impl](*inputs, p.layout, p.builder)
    grads = torch.autograd.grad(out, inputs, p.g)
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), grads))}


RUN = {"forward": forward, "training": training, "memory": training}
