"""The template kernels as the compiler sees them, without a GPU: `python -m bench.kernels --offline`.

Exit code 1 where a configuration that `backend="auto"` may choose spills registers or has serialised wgmma instructions,
and where any configuration does not compile or takes more shared memory than there is.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence

from bench import kernel_results, offline
from bench.offline import ARCHS, Row

NUMBERS = ("registers", "spill_bytes", "shared_bytes", "programs", "wgmma")
COLUMNS = ("kernel", "config", "arch", *NUMBERS, "serialized", "auto")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--offline", action="store_true", help="compile without a GPU and report what ptxas says")
    parser.add_argument("--json", action="store_true", help="a JSON list instead of a table")
    parser.add_argument(
        "--arch", nargs="+", type=arch, default=["sm_90a"], metavar="ARCH", help=f"{', '.join(ARCHS)} (default: sm_90a)"
    )
    parser.add_argument("--long-tail", action="store_true", help="also what backend='auto' does not choose")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="kernels whose module, name or configuration holds one"
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="also write bench/results/kernels.json and the table of bench/README.md; of all that 'auto' may choose",
    )
    parser.add_argument("--jobs", type=positive, default=2, help="processes (default: 2)")
    options = parser.parse_args(argv)
    if options.keep and (options.only or options.long_tail or options.arch != ["sm_90a"]):
        parser.error("--keep keeps all that 'auto' may choose, for sm_90a: leave out --only, --long-tail and --arch")
    return options


def arch(text: str) -> str:
    """One of `ARCHS`; the letter at the end may be missing."""
    if text in ARCHS:
        return text
    if f"{text}a" in ARCHS:
        return f"{text}a"
    raise argparse.ArgumentTypeError(f"{text}: give {', '.join(ARCHS)}")


def positive(text: str) -> int:
    """An int of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: give an int of at least 1")
    return value


def table(rows: Sequence[Row]) -> str:
    """The rows for people: text to the left, numbers to the right."""
    lines = [list(COLUMNS)]
    for row in rows:
        config = " ".join(f"{key}={value}" for key, value in row["config"].items())
        flags = ["yes" if row[name] else "no" for name in ("serialized", "auto")]
        numbers = [str(row[name]) for name in NUMBERS]
        lines.append([row["kernel"], config, row["arch"], *numbers, *flags])
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    padded = [
        [cell.ljust(width) if i < 3 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))]
        for line in lines
    ]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print the rows on stdout and the findings on stderr; the exit code."""
    options = parse(argv)
    if not options.offline:
        print(
            "error: give --offline; on a GPU, kernels are checked and timed by `python -m bench.gpu_suite`",
            file=sys.stderr,
        )
        return 2
    if importlib.util.find_spec("triton") is None:
        print("error: the package 'triton' is missing: run `pip install 'flexsparse[triton]'`", file=sys.stderr)
        return 2

    def progress(line: str) -> None:
        if not options.json:
            print(line, file=sys.stderr, flush=True)

    archs = list(dict.fromkeys(options.arch))
    rows, findings = offline.report(
        offline.template_modules(), archs, options.long_tail, options.only, options.jobs, progress
    )
    if not rows and not findings:
        print(f"error: --only {' '.join(options.only)} matches no configuration", file=sys.stderr)
        return 2
    print(json.dumps(rows, indent=1) if options.json else table(rows))
    if options.keep and any("does not compile" in line for line in findings):
        print("error: nothing is kept of a version by which some do not compile", file=sys.stderr)
    elif options.keep:
        kernel_results.keep(rows)
    for line in findings:
        print(f"error: {line}", file=sys.stderr)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
