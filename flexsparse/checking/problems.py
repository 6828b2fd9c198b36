"""What is checked: attention calls that differ in what decides which code runs.

Shape letters: B batch, H query heads, G KV heads, S tokens in raster order, N tiles, D head dim.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexsparse.attention import sparse_attention
from flexsparse.layout import TileLayout
from flexsparse.masks import BSA, VSA, TopP
from flexsparse.selection import KeptQueries, TileSelection


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One attention call.

    Attributes:
        name: for people.
        layout: of queries and keys.
        builder: a mask builder.
        D: head dim.
        H: query heads.
        G: KV heads.
        gated: whether the coarse output is added, by a random gate.
        scale: of queries and keys; the larger, the fewer tokens share a query's attention.
        text: valid tokens of each sample's text, after the video; None where all are. As many samples, else one.
    """

    name: str
    layout: TileLayout
    builder: Any
    D: int
    H: int = 2
    G: int = 2
    gated: bool = False
    scale: float = 1.0
    text: tuple[int, ...] | None = None

    @property
    def samples(self) -> int:
        """B."""
        return 1 if self.text is None else len(self.text)

    def tile_counts(self, device: str) -> Tensor | None:
        """Valid tokens of every tile of each sample; None where they are the layout's."""
        if self.text is None:
            return None
        tiles, slots = self.layout.tiles_last, self.layout.slots
        counts = self.layout.tile_counts.repeat(self.samples, 1)
        start = torch.arange(tiles, dtype=torch.int32) * slots
        counts[:, -tiles:] = (torch.tensor(self.text, dtype=torch.int32)[:, None] - start).clamp(0, slots)
        return counts.to(device)

    def inputs(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        """``q``, ``k``, ``v``, ``g`` (the output's gradient), perhaps ``gate``; heads lie inside of tokens."""
        make = torch.Generator().manual_seed(0)
        sizes = {"q": self.H, "k": self.G, "v": self.G, "g": self.H} | ({"gate": self.H} if self.gated else {})
        shape = (self.samples, self.layout.seq_len)
        found = {name: torch.randn(*shape, n, self.D, generator=make) for name, n in sizes.items()}
        found["q"], found["k"] = self.scale * found["q"], self.scale * found["k"]
        return {name: x.to(device, dtype).transpose(1, 2) for name, x in found.items()}


def problems() -> list[Problem]:
    """All problems, the most common first."""
    whole = TileLayout(grid=(4, 16, 16))
    return [
        Problem(name="VSA", layout=whole, builder=VSA(top_k=3), D=128, gated=True),
        Problem(name="VSA, head dim 64", layout=whole, builder=VSA(top_k=3), D=64, gated=True, scale=4.0),
        Problem(
            name="VSA, partial tiles, texts, grouped heads",
            layout=TileLayout(grid=(5, 9, 10), text_last=21),
            builder=VSA(top_k=4),
            D=128,
            H=4,
            gated=True,
            text=(21, 6),
        ),
        Problem(
            name="VSA, tiles of 128",
            layout=TileLayout(grid=(8, 9, 16), tile=(4, 4, 8)),
            builder=VSA(top_k=3),
            D=128,
            gated=True,
        ),
        Problem(name="BSA", layout=whole, builder=BSA(kv_density=0.25), D=128),
        Problem(
            name="BSA, partial tiles, head dim 64",
            layout=TileLayout(grid=(5, 9, 10)),
            builder=BSA(kv_density=0.25, keep_queries=0.4),
            D=64,
            scale=2.0,
        ),
        Problem(
            name="TopP, head dim 96, peaked",
            layout=TileLayout(grid=(5, 9, 10), text_first=5),
            builder=TopP(mass=0.6),
            D=96,
            scale=4.0,
        ),
    ]


def expected(
    problem: Problem, inputs: dict[str, Tensor], selection: TileSelection, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Output and gradients in ``dtype`` by their definitions, given what was selected; all of it on the CPU."""
    leaves = {name: x.detach().to(dtype).requires_grad_(name != "g") for name, x in inputs.items()}
    q, k, v = (leaves[name] for name in "qkv")
    out = sparse_attention(q, k, v, problem.layout, selection, backend="reference")
    if problem.gated:
        out = out + (leaves["gate"].to(wide(dtype)) * coarse(problem.layout, leaves)).to(dtype)
    return gradients(out, leaves)


def gradients(out: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output with what its gradient ``g`` gives to the others: ``out``, ``dq``, ..."""
    names = [name for name in leaves if name != "g"]
    grads = torch.autograd.grad(out, [leaves[name] for name in names], leaves["g"])
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(names, grads)}}


def wide(dtype: torch.dtype) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(dtype, torch.float32)


def coarse(layout: TileLayout, leaves: dict[str, Tensor]) -> Tensor:
    """VSA's coarse output of every token ``[B, H, S, D]`` (arXiv 2505.13389, section 2.2), 0 for text.

    Attention between the means of the tiles; which tile a token is in is read off its coordinates.
    """
    heads = leaves["q"].shape[1]
    member = membership(layout).to(wide(leaves["q"].dtype))
    means = member / member.sum(1, keepdim=True)
    q, k, v = (means @ leaves[name].to(means.dtype) for name in "qkv")
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    weights = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)
    return member.mT @ (weights @ v)


def membership(layout: TileLayout) -> Tensor:
    """``[N, S]``: 1 where a token is in a tile."""
    (_, H, W), (t, h, w) = layout.grid, layout.sides
    token = torch.arange(layout.num_tokens)
    place = (token // (H * W) // t, token // W % H // h, token % W // w)
    tile = (place[0] * -(-H // h) + place[1]) * -(-W // w) + place[2]
    member = torch.nn.functional.one_hot(tile, layout.num_tiles).T
    return torch.nn.functional.pad(member, (layout.text_first, layout.text_last))


def on_cpu(selection: TileSelection) -> TileSelection:
    """The same selection for tensors on the CPU."""
    queries = selection.queries
    if queries is not None:
        queries = KeptQueries(queries.kept.cpu(), queries.counts.cpu(), queries.source.cpu(), queries.position.cpu())
    valid = None if selection.tile_counts is None else selection.tile_counts.cpu()
    fields = {"bits": selection.bits.cpu(), "counts": selection.counts.cpu(), "queries": queries, "tile_counts": valid}
    return dataclasses.replace(selection, **fields)  # type: ignore[arg-type]
