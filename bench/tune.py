"""Write the table of tuned configurations from a result file: `python -m bench.tune bench/results/.../tune.json`.

The fastest configuration of each op of the fine stage that passed its check, for each (GPU architecture, dtype, D, tiles);
each entry names the file it came from. Exit code 1 where the file holds none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.header import ROOT
from bench.suite import tuning
from bench.suite.rows import Row, load, median

RESULTS = ROOT / "bench" / "results"
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
"""dtypes as the table names them."""


def winners(rows: Sequence[Row]) -> list[Row]:
    """The fastest row with a configuration of each problem and op that was tuned."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        ms = median(row)
        if not row["case"].startswith("tune-") or ms is None or not row["checked"] or not row["config"]:
            continue
        key = (row["case"], row["config"].get("op", "forward"))
        before = median(best[key]) if key in best else None
        if before is None or ms < before:
            best[key] = row
    return list(best.values())


def entries(rows: Sequence[Row], arch: str, tuned: Any) -> list[dict[str, Any]]:
    """What `tuned.write_table` takes: the key of each winner and its choice's fields.

    Raises:
        ValueError: a winner's configuration is none of today's candidates.
    """
    found = []
    for row in rows:
        slots = row["tile"][0] * row["tile"][1] * row["tile"][2]
        dtype = getattr(torch, row["dtype"])
        choices = tuned.candidates(arch, dtype, row["D"], slots, slots, row["config"].get("op", "forward"))
        if row["config"] not in [choice.config() for choice in choices]:
            raise ValueError(f"{row['case']}: {row['config']} is no candidate any more; measure again")
        key = {"arch": arch, "dtype": TYPES[dtype], "D": row["D"], "query_rows": slots, "slots": slots}
        found.append({**key, **row["config"]})
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Write the table; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("file", type=Path, help="tune.json of `python -m bench.gpu_suite`, kept in bench/results")
    options = parser.parse_args(argv)
    tuned = tuning.table()
    try:
        if RESULTS not in options.file.resolve().parents:
            raise ValueError(
                f"{options.file} is not below {RESULTS}: keep the result file there, as the table names it"
            )
        source = options.file.resolve().relative_to(RESULTS).as_posix()
        header, rows = load(options.file)
        if tuned is None:
            raise ValueError("the table of configurations needs Triton: pip install 'flexsparse[triton]'")
        if not header.get("arch"):
            raise ValueError(f"{options.file.name} does not say the GPU's architecture")
        found = entries(winners(rows), header["arch"], tuned)
        if not found:
            raise ValueError(f"{options.file.name} has no tuned row that passed its check")
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    tuned.write_table(found, source)
    for entry in found:
        print(" ".join(f"{name}={value}" for name, value in entry.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
