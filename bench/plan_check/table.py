"""The tables of docs/plan.md: what plans said, what was measured, and one over the other."""

from __future__ import annotations

import math
import statistics
from collections import Counter
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
    return (
        "not planned"
        if not row["planned"]
        else f"{row['ratio']:.3f}"
        if row["unit"] == "bytes"
        else f"{row['ratio']:.2f}"
    )


def _spread(rows: list[dict[str, Any]]) -> str:
    rows = [row for row in rows if row["planned"]]
    ratios = [row["ratio"] for row in rows]
    worst = max(rows, key=lambda row: abs(math.log(row["ratio"])))
    name = worst["case"] if worst["unit"] == "ms" else _title(worst)
    middle = statistics.median(ratios)
    span = f"{min(ratios):.2f} to {max(ratios):.2f}, median {middle:.2f}"
    return f'planned over measured is {span}; furthest off is "{name}"'


def _title(row: dict[str, Any]) -> str:
    return f"{row['quantity']}: {row['case']}"


def table(result: dict[str, Any]) -> str:
    """Both tables, and a paragraph over each."""
    head, rows = result["header"], result["rows"]
    times = [row for row in rows if row["unit"] == "ms"]
    sizes = [row for row in rows if row["unit"] == "bytes" and (row["planned"] or any(row["measured"]))]
    off = [row for row in sizes if any(one != row["planned"] for one in row["measured"])]
    equal = Counter(row["quantity"] for row in sizes if row not in off)
    exact = ", ".join(f"{name} ({count} of {_count(sizes, name)})" for name, count in equal.items())
    where = f"{head['cpu']} ({head['cpu_capability']}), one thread, torch {head['torch']}, {head['date'][:10]}"
    parts = [
        f"Times: {where}; medians of {head['repeats']} steps, in {head['clock']}. Of {len(times)} steps "
        f"{_spread(times)}. Below 1 the plan promised too much.",
        "",
        _lines(
            ["time of a step, ms", "planned", "measured", "planned / measured"],
            [
                [row["case"], f"{row['planned']:,.0f}", f"{statistics.median(row['measured']):,.0f}", _ratio(row)]
                for row in times
            ],
        ),
        "",
        f"Bytes: of {len(sizes)} comparisons {len(sizes) - len(off)} agree to the byte: {exact}. Of the others {_spread(off)}.",
        "",
        _lines(
            ["bytes that differ, MiB", "planned", "measured", "planned / measured"],
            [
                [
                    _title(row),
                    f"{row['planned'] / MIB:,.3f}",
                    f"{statistics.median(row['measured']) / MIB:,.3f}",
                    _ratio(row),
                ]
                for row in off
            ],
        ),
    ]
    return "\n".join(parts)


def _count(rows: list[dict[str, Any]], quantity: str) -> int:
    return sum(row["quantity"] == quantity for row in rows)


def publish(result: dict[str, Any]) -> None:
    """Put the tables between the marks of the page."""
    PAGE.write_text(replaced(PAGE.read_text(), table(result), BEGIN, END))
