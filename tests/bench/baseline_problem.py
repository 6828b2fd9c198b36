"""A problem for baselines, and the demand that one gives the reference's results.

Shape letters: B batch, H query heads, G KV heads, P padded tokens, D head dim, N query tiles, M KV tiles.
"""

from typing import Any

import torch
from torch import Tensor

import flexsparse as fs
from bench.baselines import (
    Problem,
)

WHOLE, PARTIAL = (4, 8, 12), (5, 8, 9)
TILES = {64: (4, 4, 4), 128: (4, 8, 4)}


def problem(
    grid: tuple[int, int, int] = PARTIAL, slots: int = 64, D: int = 64, G: int = 2, B: int = 2, **fields: Any
) -> Problem:
    """A problem of two heads at half of the tiles; ``fields`` replace what it would have, ``dtype`` and ``keep`` too."""
    layout = fs.TileLayout(grid=grid, tile=TILES[slots])
    dtype, keep = fields.pop("dtype", torch.bfloat16), fields.pop("keep", None)
    q, k, v = (torch.randn(B, heads, layout.seq_len, D).to(dtype) for heads in (2, G, G))
    selection = fs.VSA(sparsity=0.5).select(q, k, layout)
    if keep is not None:
        selection = fs.TileSelection.from_mask(keep.expand(B, 2, -1, -1), layout)
    tiles = [layout.to_tiles(x).contiguous() for x in (q, k, v)]
    names = ("q_BHPD", "k_BGPD", "v_BGPD")
    given = {**dict(zip(names, tiles)), "layout": layout, "selection": selection, "scale": D**-0.5}
    return Problem(**{**given, **fields})


def uneven(layout: fs.TileLayout) -> Tensor:
    """Rows that keep one tile, two, ... of them: ``[N, M]``."""
    M = layout.num_tiles
    return torch.arange(M) <= torch.arange(M)[:, None]


def results(attend: Any, p: Problem, training: bool) -> list[Tensor]:
    """Output and, for training, gradients of a baseline, in raster order."""
    inputs = [x.detach().requires_grad_(training) for x in (p.q_BHPD, p.k_BGPD, p.v_BGPD)]
    out = attend(*inputs)
    merged = out.transpose(1, 2).flatten(2) * 1.0  # as models do, so that the gradient comes in strides of its own
    out = p.layout.to_raster(merged.unflatten(2, (-1, out.shape[-1])).transpose(1, 2))
    if not training:
        return [out]
    grads = torch.autograd.grad(out, inputs, weights(out))
    return [out.detach(), *(p.layout.to_raster(grad) for grad in grads)]


def weights(out: Tensor) -> Tensor:
    return torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)


def expected(p: Problem, training: bool, selection: Any = None) -> list[Tensor]:
    """The same from the reference backend."""
    inputs = [p.layout.to_raster(x).detach().requires_grad_(training) for x in (p.q_BHPD, p.k_BGPD, p.v_BGPD)]
    out = fs.sparse_attention(*inputs, p.layout, selection or p.selection, scale=p.scale, backend="reference")
    return [out.detach(), *(torch.autograd.grad(out, inputs, weights(out)) if training else ())]


def assert_same(p: Problem, attend: Any, training: bool, selection: Any = None) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv"), results(attend, p, training), expected(p, training, selection)):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert a.dtype == b.dtype and error < 0.01, f"{name} is off by {float(error):.2e}"
