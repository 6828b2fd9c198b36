"""What this CPU does, operation by operation: `python -m bench.machine --out FILE`, read by `flexsparse plan --machine cpu`.

Matrix products, a copy, what lies between the products of a transformer's block, dense attention, the sparse one (gather), and
the choice of tiles; one thread. No model runs: what `bench.plan_check` compares plans with is another thing at other sizes.
Shape letters: B batch, H heads, S tokens, N tiles, D head dim, C channels.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import flexsparse as fs
from bench.header import header
from bench.timing import Samples, both_clocks
from flexsparse.masks.coarse import pool
from flexsparse.ops.select_tiles import select_tiles
from flexsparse.planning.attention import BACKWARD, Call, dense_flops
from flexsparse.planning.counting import fake
from flexsparse.planning.modes import Products

REPEATS = 7
DTYPES = (torch.float32, torch.bfloat16)
HEAD_DIMS = (64, 128)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Problems to time.

    Attributes:
        tokens: rows of matrix products, and tokens of what lies between them.
        channels: of the block; products are to, from and between it and four times as many.
        heads: of attention.
        attended: tokens of dense attention.
        grid: of sparse attention.
        kept: tiles that a query tile keeps.
        copied: bytes of the tensor that is copied: larger than any cache.
    """

    tokens: int = 3072
    channels: int = 512
    heads: int = 3
    attended: int = 2304
    grid: tuple[int, int, int] = (12, 20, 24)
    kept: int = 12
    copied: int = 2**28


Rows = dict[str, tuple[Callable[[], Any], dict[str, Any]]]
"""By case: what is timed, and its row without samples."""


def problems(sizes: Sizes) -> Rows:
    """Everything that is timed."""
    source, target = torch.empty(sizes.copied // 4).fill_(1), torch.zeros(sizes.copied // 4)
    copy = {"op": "ceiling", "impl": "torch", "part": "copy", "dtype": None, "bytes": 2 * sizes.copied}
    found: Rows = {"copy": (lambda: target.copy_(source), copy)}
    for dtype in DTYPES:
        for name, rows in (("products", _products), ("between", _between), ("dense", _dense), ("sparse", _sparse)):
            found |= {f"{name}-{case}-{str(dtype)[6:]}": row for case, row in rows(sizes, dtype).items()}
    return found


def _row(dtype: torch.dtype, op: str, impl: str, part: str | None = None, **more: Any) -> dict[str, Any]:
    return {"op": op, "impl": impl, "part": part, "dtype": str(dtype)[6:], **more}


def _products(sizes: Sizes, dtype: torch.dtype) -> Rows:
    S, C = sizes.tokens, sizes.channels
    found: Rows = {}
    for rows, columns in ((C, C), (C, 4 * C), (4 * C, C)):
        x, weight, bias = (torch.randn(*shape, dtype=dtype) for shape in ((S, rows), (columns, rows), (columns,)))
        row = _row(dtype, "ceiling", "torch", "matmul", shape=[S, rows, columns], flops=2.0 * S * rows * columns)
        found[f"{rows}x{columns}"] = (lambda x=x, weight=weight, bias=bias: F.linear(x, weight, bias), row)
    return found


def between(x: Tensor, wide: Tensor, table: Tensor, heads: int) -> Tensor:
    """What a video transformer's block computes between its matrix products, on random tensors.

    Twice: a LayerNorm, scaled and shifted, and a gated sum; once: two RMS norms and rotations, and a GELU.

    Args:
        x: ``[B, S, C]``.
        wide: ``[B, S, 4 * C]``.
        table: ``[S, D]``.
        heads: H.

    Returns:
        ``[B, S, C]``.
    """
    one, two = x.mean(1, keepdim=True), x.amax(1, keepdim=True)
    for _ in range(2):
        normed = F.layer_norm(x.float(), x.shape[-1:]) * (1 + one) + two
        x = x + normed.to(x.dtype) * two
    rotated = []
    for _ in range(2):
        each = F.rms_norm(x, x.shape[-1:]).unflatten(-1, (heads, -1))
        even, odd = each[..., ::2], each[..., 1::2]
        cos, sin = table[:, None, ::2], table[:, None, 1::2]
        rotated.append(torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-3))
    activated = F.gelu(wide, approximate="tanh")
    return (rotated[0] + rotated[1] + activated[..., : x.shape[-1]]).to(x.dtype)


def _between(sizes: Sizes, dtype: torch.dtype) -> Rows:
    S, C, D = sizes.tokens, sizes.channels, 64
    shapes = ((1, S, C), (1, S, 4 * C), (S, D))
    arguments = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    arguments[2].requires_grad_(False)

    def forward(*tensors: Tensor) -> Tensor:
        with torch.no_grad():
            return between(*tensors, C // D)

    def training(*tensors: Tensor) -> Any:
        out = between(*tensors, C // D)
        return torch.autograd.grad(out, tensors[:2], torch.ones_like(out))

    found: Rows = {}
    for name, function in (("forward", forward), ("training", training)):
        with fake(), Products() as counter:  # bytes as a plan counts them
            function(*(torch.empty(shape, dtype=dtype, requires_grad=len(shape) > 2) for shape in shapes))
        row = _row(dtype, "elementwise", "torch", "block", shape=[S, C], bytes=sum(counter.moved.values()))
        found[name] = (lambda function=function: function(*arguments), row)
    return found


def _both(found: Rows, name: str, row: dict[str, Any], forward: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    """Rows of a forward without gradients, and of a backward alone; ``row`` holds the forward's FLOPs."""

    def alone() -> Tensor:
        with torch.no_grad():
            return forward(*leaves)

    out = forward(*leaves)
    grad = torch.randn_like(out)
    found[f"{name}-forward"] = (alone, {**row, "op": "fine_forward"})
    found[f"{name}-backward"] = (
        lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True),
        {**row, "op": "fine_backward", "flops": BACKWARD * row["flops"]},
    )


def _dense(sizes: Sizes, dtype: torch.dtype) -> Rows:
    H, S = sizes.heads, sizes.attended
    found: Rows = {}
    for D in HEAD_DIMS:
        leaves = [torch.randn(1, H, S, D, dtype=dtype, requires_grad=True) for _ in range(3)]
        row = _row(dtype, "", "dense_sdpa", H=H, S=S, D=D, flops=dense_flops(1, H, S, S, D))
        _both(found, f"d{D}", row, F.scaled_dot_product_attention, leaves)
    return found


def _sparse(sizes: Sizes, dtype: torch.dtype) -> Rows:
    H, layout, builder = sizes.heads, fs.TileLayout(grid=sizes.grid), fs.VSA(top_k=sizes.kept)
    counts, M = layout.tile_counts, layout.num_tiles
    found: Rows = {}
    for D in HEAD_DIMS:
        call = Call(batch=1, heads=H, head_dim=D, layout=layout, builder=builder, dtype=dtype)
        flops, scale = call.flops(), D**-0.5
        x = [torch.randn(1, H, layout.seq_len, D, dtype=dtype) for _ in range(3)]
        selection = builder.select(x[0], x[1], layout)
        leaves = [layout.to_tiles(one).requires_grad_() for one in x]
        rest = (selection.bits, selection.counts, counts, layout.slots, 0, 0, M, layout.slots, scale)

        def attend(q: Tensor, k: Tensor, v: Tensor, rest: Any = rest) -> Tensor:
            out: Tensor = torch.ops.flexsparse.gather_attention(q, k, v, *rest, torch.is_grad_enabled())[0]
            return out

        size = {"H": H, "S": layout.seq_len, "D": D, "grid": list(layout.grid), "kept": sizes.kept}
        _both(found, f"d{D}", _row(dtype, "", "flexsparse", **size, flops=flops.fine), attend, leaves)
        tiles = [one.detach().unflatten(2, (M, layout.slots)) for one in leaves[:2]]

        def coarse(tiles: list[Tensor] = tiles, scale: float = scale) -> Tensor:
            q, k = (pool(one, counts) for one in tiles)
            return q @ k.transpose(-1, -2) * scale

        scores = coarse()
        found[f"d{D}-coarse"] = (coarse, _row(dtype, "select", "flexsparse", "coarse", **size, flops=flops.coarse))
        found[f"d{D}-choice"] = (
            lambda scores=scores: select_tiles(scores, None, builder.rule(), builder.capacity(M)),
            _row(dtype, "select", "flexsparse", "choice", **size, flops=flops.selection),
        )
    return found


def result_of(rows: Rows, samples: dict[str, Samples], **more: Any) -> dict[str, Any]:
    """The result file's content."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = [
        {"case": case, **row, "ms": samples[case].cpu_ms, "wall_ms": samples[case].wall_ms}
        for case, (_, row) in rows.items()
    ]
    return {"header": header(1, suite="machine", memory_bytes=memory, clock="CPU time", **more), "rows": found}


def write(path: Path, result: dict[str, Any]) -> None:
    """A result file, one row a line."""
    rows = ",\n".join(json.dumps(row) for row in result["rows"])
    path.write_text('{"header": ' + json.dumps(result["header"], indent=1) + ',\n"rows": [\n' + rows + "\n]}\n")


def new_file(text: str) -> Path:
    """An argument that names a file to write: its folder must be there before anything is measured."""
    path = Path(text)
    if not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is in a folder that is not there: make it first")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.machine", description=__doc__)
    parser.add_argument("--out", type=new_file, required=True, help="result file")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"samples of each problem (default: {REPEATS})")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = problems(Sizes())
    samples = both_clocks({case: function for case, (function, _) in rows.items()}, options.repeats)
    write(options.out, result_of(rows, samples, repeats=options.repeats))
    return 0


if __name__ == "__main__":
    sys.exit(main())
