"""What a rank would fetch if it fetched only the KV tiles that its query tiles keep: `python -m bench.tile_traffic`.

`SequenceParallel(tiles=...)` gathers all keys and values. This counts, on scores of three kinds, the distinct KV tiles that
the critical tiles of a rank's query tiles name: what fetching them would move instead. Nothing is sent; no GPU is used.
Shape letters: H heads, S tokens, N tiles, D head dim.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flexsparse as fs
from bench.header import header
from bench.marks import replaced
from flexsparse.distributed.tokens import parts

RESULTS = Path(__file__).parent / "results" / "tile_traffic.json"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "distributed.md"
BEGIN, END = "<!-- bench:tile_traffic -->", "<!-- /bench:tile_traffic -->"
KINDS = ("noise", "positions", "clip")
GRID, TILE = (21, 30, 52), (4, 4, 4)
HEADS, HEAD_DIM, WAN_HEADS = 8, 128, 12
SPARSITIES, SHOWN = (0.8, 0.9, 0.95), 0.9
RANKS = (2, 4, 8, 16, 32)
FRAMES, PIXELS = 4, 16
"""Frames and rows of pixels that one token stands for: Wan's latents and patches."""


def clip(grid: tuple[int, int, int]) -> Tensor:
    """The sample clip as one vector a token, ``[S, 96]``: small pixels of the cube that the token stands for, centred."""
    from flexsparse.training.video import decode, default_source

    T, H, W = grid
    video = decode(default_source(), height=H * PIXELS, width=W * PIXELS, min_frames=T * FRAMES)[:, : T * FRAMES]
    small = torch.nn.functional.avg_pool3d(video.float()[None], (FRAMES // 2, 4, 4))[0]  # [3, 2T, 4H, 4W]
    cubes = small.unfold(1, 2, 2).unfold(2, 4, 4).unfold(3, 4, 4)
    tokens = cubes.permute(1, 2, 3, 0, 4, 5, 6).reshape(T * H * W, -1)
    return (tokens - tokens.mean(0)) / tokens.std()


def queries_and_keys(kind: str, layout: fs.TileLayout) -> tuple[Tensor, Tensor]:
    """``[1, H, S, D]`` each.

    Args:
        kind: ``"noise"``, independent everywhere: the worst case; ``"positions"``, one vector rotated by place (3D RoPE):
            near tiles score high; ``"clip"``, random maps of the sample clip's pixels, rotated by place.
        layout: of the video.
    """
    from flexsparse.nn import rope_frequencies, rotate

    g = torch.Generator().manual_seed(0)
    shape = (1, HEADS, layout.seq_len, HEAD_DIM)
    if kind == "noise":
        return torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    if kind == "positions":
        q = k = torch.randn((1, HEADS, 1, HEAD_DIM), generator=g).expand(shape)
    else:
        x = clip(layout.grid)
        maps = torch.randn((2, HEADS, x.shape[1], HEAD_DIM), generator=g) / x.shape[1] ** 0.5
        maps[1] = (maps[0] + maps[1]) / 2**0.5  # queries and keys of trained models are alike, not equal
        q, k = (x @ one for one in maps)
        q, k = (torch.nn.functional.normalize(one, dim=-1)[None] * HEAD_DIM**0.5 for one in (q, k))
    cos, sin = rope_frequencies(layout, HEAD_DIM)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def morton(layout: fs.TileLayout) -> Tensor:
    """Tiles along a Z-order curve, int64 ``[N]``: runs of it are nearly cubes."""
    _, h, w = layout.tiles
    index = torch.arange(layout.num_tiles)
    axes = (index // (h * w), index // w % h, index % w)
    code = torch.zeros_like(index)
    for bit in range(8):
        for place, axis in enumerate(axes):
            code |= (axis >> bit & 1) << (3 * bit + 2 - place)
    return code.argsort()


def distinct(keep: Tensor, order: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """Of each head and rank: distinct KV tiles that its query tiles keep, and those of them that other ranks hold.

    Args:
        keep: bool ``[H, N, N]``.
        order: in which tiles are dealt out, in runs.
        ranks: how many.

    Returns:
        int64 ``[H, ranks]`` each.
    """
    kept, remote = [], []
    for own in order.split(list(parts(len(order), ranks))):
        named = keep[:, own].any(1)
        kept.append(named.sum(-1))
        theirs = torch.ones(len(order), dtype=torch.bool)
        theirs[own] = False
        remote.append((named & theirs).sum(-1))
    return torch.stack(kept, 1), torch.stack(remote, 1)


def rows(kinds: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each kind of scores, sparsity, order of tiles and number of ranks."""
    layout = fs.TileLayout(grid=GRID, tile=TILE)
    orders = {"runs": torch.arange(layout.num_tiles), "morton": morton(layout)}
    found = []
    for kind in kinds:
        q, k = queries_and_keys(kind, layout)
        for sparsity in SPARSITIES:
            keep = fs.VSA(sparsity=sparsity).select(q, k, layout).keep()[0]
            for name, order in orders.items():
                for ranks in RANKS:
                    kept, remote = distinct(keep, order, ranks)
                    found.append(_row(layout, kind, sparsity, name, ranks, kept, remote))
    return found


def _row(
    layout: fs.TileLayout, kind: str, sparsity: float, order: str, ranks: int, kept: Tensor, remote: Tensor
) -> dict[str, Any]:
    plain = fs.distributed.traffic(layout, heads=WAN_HEADS, head_dim=HEAD_DIM, tiles=ranks)
    tile_bytes = 2 * layout.slots * HEAD_DIM * 2  # keys and values of one tile and head, bfloat16
    fetched = WAN_HEADS * tile_bytes * remote.double()
    row: dict[str, Any] = {
        "scores": kind,
        "sparsity": sparsity,
        "order": order,
        "ranks": ranks,
        "tiles": layout.num_tiles,
        "kept_share_mean": float(kept.double().mean()) / layout.num_tiles,
        "kept_share_max": float(kept.max()) / layout.num_tiles,
        "all_gather_bytes": plain.gather,
        "fetch_bytes_mean": float(fetched.mean()),
        "fetch_bytes_max": float(fetched.mean(0).max()),  # of the busiest rank: heads add up, the mean stands for each
    }
    row["fetch_over_all_gather"] = row["fetch_bytes_max"] / plain.gather
    if ranks <= WAN_HEADS:
        exchanged = fs.distributed.traffic(layout, heads=WAN_HEADS, head_dim=HEAD_DIM, ulysses=ranks)
        row["ulysses_bytes"] = exchanged.total
    return row


def table(result: dict[str, Any]) -> str:
    """Bytes of the all-gather and of fetching, by number of ranks."""
    kinds = list(dict.fromkeys((row["scores"], row["order"]) for row in result["rows"]))
    sparsity = SHOWN
    names = [f"{scores}, {'along a Z-order curve' if order == 'morton' else 'in runs'}" for scores, order in kinds]
    lines = [["ranks", "all-gather, MiB", *names]]
    for ranks in dict.fromkeys(row["ranks"] for row in result["rows"]):
        own = [row for row in result["rows"] if row["ranks"] == ranks and row["sparsity"] == sparsity]
        shares = {(row["scores"], row["order"]): f"{row['fetch_over_all_gather']:.2f}" for row in own}
        lines.append([str(ranks), f"{own[0]['all_gather_bytes'] / 2**20:.0f}", *(shares[kind] for kind in kinds)])
    lines.insert(1, ["---:"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def publish(result: dict[str, Any]) -> None:
    """Put the table between the marks of `docs/distributed.md`."""
    PAGE.write_text(replaced(PAGE.read_text(), table(result), BEGIN, END))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the simulation, write its file and the table; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.tile_traffic", description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="scores (default: all)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="result file (default: bench/results/tile_traffic.json)"
    )
    parser.add_argument("--table", action="store_true", help="write the table from the result file, run nothing")
    options = parser.parse_args(argv)
    if options.table:
        publish(json.loads(options.out.read_text()))
        return 0
    torch.set_num_threads(1)
    settings = {
        "grid": GRID,
        "tile": TILE,
        "heads_simulated": HEADS,
        "heads": WAN_HEADS,
        "head_dim": HEAD_DIM,
        "itemsize": 2,
    }
    result = {"header": header(1, simulation=True, **settings), "rows": rows(options.kinds)}
    options.out.write_text(json.dumps(result).replace(', {"scores"', ',\n{"scores"') + "\n")
    if options.out == RESULTS:
        publish(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
