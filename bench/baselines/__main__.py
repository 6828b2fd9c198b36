"""Baselines' packages and whether they run: `python -m bench.baselines --check | --download DIR [NAME ...] | --unpack DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import flexsparse as fs
from bench.baselines import BASELINES, Problem, Unavailable, gather, use_directory

TILES = {64: (4, 4, 4), 128: (4, 8, 4)}


def small(slots: int, device: str) -> Problem:
    """A problem of a few tiles, bfloat16 and D of 128, at half of the tiles."""
    layout = fs.TileLayout(grid=(8, 16, 16), tile=TILES[slots])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, layout.seq_len, 128, generator=generator).bfloat16().to(device) for _ in range(3))
    selection = fs.VSA(sparsity=0.5).select(q, k, layout)
    tiles = [layout.to_tiles(x).contiguous() for x in (q, k, v)]
    return Problem(
        q_BHPD=tiles[0], k_BGPD=tiles[1], v_BGPD=tiles[2], layout=layout, selection=selection, scale=128**-0.5
    )


def check(training: bool) -> list[str]:
    """One line a baseline: what runs here on a small problem, or why nothing does."""
    problems = {slots: small(slots, "cuda" if torch.cuda.is_available() else "cpu") for slots in TILES}
    lines = []
    for name, prepare in BASELINES.items():
        found = []
        for slots in [128] if name == "flex_128" else [64] if name != "cudnn_frontend" else list(TILES):
            try:
                found.append(f"{slots} slots: available, {prepare(problems[slots], training).note}")
            except Unavailable as error:
                found.append(f"{slots} slots: {error}")
        lines.append(f"{name}: {'; '.join(found)}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for arguments that are off."""
    parser = argparse.ArgumentParser(prog="python -m bench.baselines", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="baselines to download (default: all that need it)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="one line a baseline: available here, or why not")
    what.add_argument("--download", type=Path, metavar="DIR", help="pack the baselines' packages into DIR")
    what.add_argument("--unpack", type=Path, metavar="DIR", help="unpack DIR's archives into --baseline-dir")
    parser.add_argument("--baseline-dir", type=Path, metavar="DIR", help="where packages are unpacked")
    parser.add_argument("--training", action="store_true", help="check backward as well")
    parser.add_argument("--python", default=gather.PYTHON, help=f"of the machine to run on (default {gather.PYTHON})")
    parser.add_argument("--limit", type=float, default=60, metavar="MIB", help="the largest load (default 60)")
    options = parser.parse_args(argv)
    try:
        if options.download is not None:
            sizes = gather.download(options.download, options.names, options.python)
            gather.report(sizes, int(options.limit * gather.MIB))
        elif options.unpack is not None:
            if options.baseline_dir is None:
                raise ValueError("--unpack needs --baseline-dir, the folder to unpack into")
            print(f"unpacked {' '.join(gather.unpack(options.unpack, options.baseline_dir))}")
        else:
            if options.baseline_dir is not None:
                use_directory(options.baseline_dir)
            print("\n".join(check(options.training)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
