"""The CPU benchmark: `python -m bench.cpu`. Exit code 1 where a correctness check failed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import table
from bench.breakdown import breakdown
from bench.cases import Case, choose, standard
from bench.header import cores, header
from bench.measure import measure
from bench.rows import RESULTS, Row, write


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file (default: bench/results/cpu.json)")
    parser.add_argument("--threads", type=positive, default=1, help="threads of the cases that name none (default: 1)")
    parser.add_argument("--repeats", type=positive, default=7, help="samples of each row (default: 7)")
    parser.add_argument("--quick", action="store_true", help="the cases that have targets only")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="cases whose name holds one of these")
    parser.add_argument("--profile", action="store_true", help="also write where the gather forward spends its time")
    parser.add_argument("--list", action="store_true", help="print the cases' names and stop")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    """An int of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: give an int of at least 1")
    return value


def run(cases: list[Case], threads: int, repeats: int) -> list[Row]:
    """Rows of all cases; what happens goes to stderr as it happens."""
    rows: list[Row] = []
    for number, case in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}] {case.name}", file=sys.stderr, flush=True)
        if (case.threads or 0) > cores():
            print(f"  left out: it needs {case.threads} cores, there are {cores()}", file=sys.stderr)
            continue
        found = measure(case, threads, repeats)
        for row in found:
            if not row.checked:
                print(f"  {row.impl} {row.part or ''} FAILED its check: {row.reason}", file=sys.stderr)
        rows += found
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run, write the file, print the tables; the exit code."""
    options = parse(argv)
    try:
        cases = choose(options.quick, options.only)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    torch.set_num_threads(options.threads)
    # read before the run: a file that changes while it runs must not pass as the code that was measured
    head = header(options.threads, repeats=options.repeats, cases=[case.name for case in cases])
    rows = run(cases, options.threads, options.repeats)
    profile: list[dict[str, Any]] = []
    if options.profile:
        names = {case.name for case in cases}
        chosen = [case for case in standard() if case.kind == "forward" and case.name in names]
        profile = [breakdown(case, options.threads, options.repeats) for case in chosen]
    write(options.out, head, rows, profile)
    table.show(table.load(options.out))
    return 0 if all(row.checked for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
