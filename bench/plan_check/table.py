"""The tables of docs/plan.md: what plans said, what was measured, and one over the other."""

from __future__ import annotations

import statistics
from typing import Any

from bench.header import ROOT
from bench.marks import replaced

RESULTS, PAGE = ROOT / "bench" / "results" / "plan_cpu.json", ROOT / "docs" / "plan.md"
BEGIN, END = "<!-- bench:plan_check -->", "<!-- /bench:plan_check -->"
MIB = 2**20


def _lines(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))


def _ratio(row: dict[str, Any]) -> str:
    return "not planned" if not row["planned"] else f"{row['ratio']:.2f}"


def _spread(rows: list[dict[str, Any]]) -> str:
    ratios = [row["ratio"] for row in rows if row["planned"]]
    return f"{min(ratios):.2f} to {max(ratios):.2f}, median {statistics.median(ratios):.2f}"


def table(result: dict[str, Any]) -> str:
    """Both tables, and a sentence over each."""
    head, rows = result["header"], result["rows"]
    times = [row for row in rows if row["unit"] == "ms"]
    sizes = [row for row in rows if row["unit"] == "bytes"]
    where = f"{head['cpu']} ({head['cpu_capability']}), one thread, torch {head['torch']}, {head['date'][:10]}"
    clock = "by another clock" if head["clock"] != "CPU time" else "in CPU time"
    parts = [
        f"{where}. Medians of {head['repeats']} steps {clock}. Planned over measured: {_spread(times)}; below 1 the plan "
        "promised too much.",
        "",
        _lines(
            ["time of a step, ms", "planned", "measured", "planned / measured"],
            [
                [row["case"], f"{row['planned']:,.0f}", f"{statistics.median(row['measured']):,.0f}", _ratio(row)]
                for row in times
            ],
        ),
        "",
        f"Bytes, planned over measured: {_spread(sizes)}.",
        "",
        _lines(
            ["bytes, MiB", "planned", "measured", "planned / measured"],
            [
                [
                    f"{row['quantity']}: {row['case']}",
                    f"{row['planned'] / MIB:,.3f}",
                    f"{statistics.median(row['measured']) / MIB:,.3f}",
                    _ratio(row),
                ]
                for row in sizes
            ],
        ),
    ]
    return "\n".join(parts)


def publish(result: dict[str, Any]) -> None:
    """Put the tables between the marks of the page."""
    PAGE.write_text(replaced(PAGE.read_text(), table(result), BEGIN, END))
