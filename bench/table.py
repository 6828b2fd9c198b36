"""Tables of the CPU result file: all in `bench/CPU.md`, a short one in the README: `python -m bench.table [--check]`."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.marks import replaced
from bench.rows import RESULTS

README = Path(__file__).resolve().parents[1] / "README.md"
PAGE = Path(__file__).resolve().parent / "CPU.md"
BEGIN, END = "<!-- bench:cpu -->", "<!-- /bench:cpu -->"

NAMES = {
    "dense_sdpa": "dense SDPA",
    "flexsparse_gather": "`gather`",
    "flexsparse_flex": "`flex`",
    "flexsparse_compiled": "`torch.compile`",
    "attention_forward": "forward",
    "attention_training": "forward + backward",
    "to_tiles": "`to_tiles`, one tensor",
    "to_raster": "`to_raster`, one tensor",
    "q_k_v_out": "all four of one call (q, k, v, out)",
    "select": "`builder.select`, tiling of q and k included",
    "select_without_tiling": "the same on tokens in tile order",
}

Result = dict[str, Any]
Line = list[str]


def load(path: Path) -> Result:
    """Read a result file."""
    return json.loads(path.read_text())


def x_by(values: Iterable[int]) -> str:
    """``4x4x4``."""
    return "x".join(str(value) for value in values)


def speedup(row: Result) -> float:
    """Dense time over own time, median of pairs."""
    return statistics.median(dense / own for own, dense in zip(row["ms"], row["dense_ms"]))


def added(row: Result) -> float:
    """MiB of peak memory over dense."""
    return statistics.median(row["mib"]) - statistics.median(row["dense_mib"])


def meets(row: Result) -> bool | None:
    """Whether a row meets its target; None where it has none or was not measured."""
    if row["target"] is None or not row["checked"]:
        return None
    if row["op"] == "peak_memory":
        return added(row) <= row["target"]
    if row["op"] == "layout":
        return row["ratio_to_dense"] < row["target"]
    return speedup(row) >= row["target"]


def goal(row: Result) -> str:
    """The target, and whether it is met."""
    if row["target"] is None:
        return ""
    texts = {"peak_memory": "at most {:.0f} MiB", "layout": "under {:.0%}"}
    text = texts.get(row["op"], "at least {:g}x").format(row["target"])
    verdict = {True: "met", False: "**not met**", None: "not measured"}[meets(row)]
    return f"{text}: {verdict}"


def attention_lines(rows: list[Result]) -> list[Line]:
    """Times of attention, speed-ups, errors."""
    lines = [["", "grid", "tile", "D", "dtype", "density", "threads", "implementation", "ms", "speed-up", "target"]]
    lines[0].append("error")
    for row in rows:
        if not row["op"].startswith("attention"):
            continue
        name = NAMES[row["op"]] + (f", {row['method'].upper()}" if row["method"] else "")
        is_dense = row["impl"] == "dense_sdpa"
        tile = "" if is_dense else x_by(row["tile"])
        line = [name, x_by(row["grid"]), tile, str(row["D"]), row["dtype"], f"{row['density']:.3f}"]
        line += [str(row["threads"]), NAMES[row["impl"]]]
        if row["checked"]:
            line += [f"{statistics.median(row['ms']):.1f}", "" if is_dense else f"{speedup(row):.2f}x"]
        else:
            line += ["check failed", ""]
        line += [goal(row), f"{max(row['error'].values()):.1e}" if row["error"] else ""]
        lines.append(line)
    return lines


def part_lines(rows: list[Result]) -> list[Line]:
    """Layout and selection as shares of the dense forward."""
    lines = [["share of the dense forward", "D", "ms", "share", "target"]]
    for row in rows:
        if row["op"] not in ("layout", "select"):
            continue
        line = [f"{row['op']}: {NAMES[row['part']]}", str(row["D"])]
        if row["checked"]:
            line += [f"{statistics.median(row['ms']):.2f}", f"{row['ratio_to_dense']:.2%}"]
        else:
            line += ["check failed", ""]
        lines.append([*line, goal(row)])
    return lines


def memory_lines(rows: list[Result]) -> list[Line]:
    """Peak memory of forward and backward."""
    lines = [["peak memory of forward + backward", "D", "MiB", "over dense", "target"]]
    for row in rows:
        if row["op"] != "peak_memory":
            continue
        line = [NAMES[row["impl"]], str(row["D"])]
        if row["checked"]:
            line += [f"{statistics.median(row['mib']):.0f}"]
            line += ["" if row["impl"] == "dense_sdpa" else f"{added(row):+.0f} MiB"]
        else:
            line += ["check failed", ""]
        lines.append([*line, goal(row)])
    return lines


def profile_lines(result: Result) -> list[Line]:
    """Where the gather forward spends its time, one column a case."""
    parts = result.get("profile") or []
    if not parts:
        return []
    lines = [["pieces of the `gather` forward, ms", *(f"D={part['D']}" for part in parts)]]
    for name in parts[0]["pieces_ms"]:
        lines.append([name.replace("_", " "), *(f"{part['pieces_ms'][name]:.1f}" for part in parts)])
    lines.append(["other", *(f"{part['other_ms']:.1f}" for part in parts)])
    lines.append(["whole forward", *(f"{part['forward_ms']:.1f}" for part in parts)])
    lines.append(["matmuls, GFLOP/s", *(f"{part['matmul_gflops']:.0f}" for part in parts)])
    lines.append(["dense SDPA, GFLOP/s", *(f"{part['dense_gflops']:.0f}" for part in parts)])
    return lines


def tables(result: Result) -> list[list[Line]]:
    """All tables that have rows, each with its heading line."""
    rows = result["rows"]
    found = [attention_lines(rows), part_lines(rows), memory_lines(rows), profile_lines(result)]
    return [lines for lines in found if len(lines) > 1]


def machine(head: Result) -> str:
    """Where and when, in a sentence."""
    revision = (head["git_revision"] or "an unknown revision")[:12]
    dirty = " with local changes" if head["git_dirty"] else ""
    triton = f", triton {head['triton']}" if head["triton"] else ""
    return (
        f"{head['cpu']} ({head['cpu_capability']}), torch {head['torch']}{triton}, Python {head['python']}, "
        f"flexsparse {head['flexsparse']} at {revision}{dirty}, {head['date'][:10]}. Not run on a GPU. "
        f"Medians of {head['repeats']} interleaved runs; selection, tiling and untiling included; error: RMS error / "
        "RMS of the float64 oracle given the same selection, the largest of out and gradients."
    )


def unmet(rows: list[Result]) -> list[str]:
    """One line for each target that is not met and each check that failed."""
    lines = []
    for row in rows:
        what = f"{row['case']}, {NAMES[row['impl']]}" + (f", {row['part']}" if row["part"] else "")
        if not row["checked"]:
            lines.append(f"Check failed, so not measured: {what}: {row['reason']}.")
        elif meets(row) is False:
            lines.append(f"Target not met: {what}: {measured(row)}, {goal(row).partition(':')[0]} wanted.")
    return lines


def measured(row: Result) -> str:
    """The figure that a target is about."""
    if row["op"] == "peak_memory":
        return f"{added(row):+.0f} MiB"
    return f"{row['ratio_to_dense']:.2%}" if row["op"] == "layout" else f"{speedup(row):.2f}x"


def markdown(result: Result) -> str:
    """The block between the marks, without them."""
    parts = [machine(result["header"])]
    for heading, *lines in tables(result):
        rule = ["---"] * len(heading)
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in (heading, rule, *lines)))
    failures = unmet(result["rows"])
    if failures:
        parts.append("\n".join(f"- {line}" for line in failures))
    return "\n\n".join(parts)


def page(result: Result) -> str:
    """`bench/CPU.md`."""
    return f"# Measured on a CPU\n\nMade by `python -m bench.table`; how: [README](README.md).\n\n{markdown(result)}\n"


def brief_lines(rows: list[Result]) -> list[Line]:
    """Of each case on one thread the fastest implementation; a check that failed is no time."""
    lines = [
        ["attention", "grid", "tile", "D", "dtype", "tiles kept", "fastest", "ms", "dense ms", "speed-up", "target"]
    ]
    attention = [x for x in rows if x["op"].startswith("attention") and x["threads"] == 1 and x["impl"] != "dense_sdpa"]
    for case in dict.fromkeys(row["case"] for row in attention):
        row, *_ = sorted((x for x in attention if x["case"] == case), key=lambda x: speedup(x) if x["checked"] else 0)[
            ::-1
        ]
        line = [f"{NAMES[row['op']]}, {row['method'].upper()}", x_by(row["grid"]), x_by(row["tile"]), str(row["D"])]
        line += [row["dtype"], f"{row['density']:.1%}"]
        if row["checked"]:
            times = (statistics.median(row[name]) for name in ("ms", "dense_ms"))
            line += [NAMES[row["impl"]], *(f"{ms:.0f}" for ms in times), f"{speedup(row):.2f}x", goal(row)]
        else:
            line += ["check failed", "", "", "", goal(row)]
        lines.append(line)
    return lines


def brief(result: Result) -> str:
    """The block between the README's marks, without them."""
    head, rows = result["header"], result["rows"]
    heading, *lines = brief_lines(rows)
    table = "\n".join("| " + " | ".join(line) + " |" for line in (heading, ["---"] * len(heading), *lines))
    met = [meets(row) for row in rows if row["target"] is not None]
    return (
        f"{head['cpu']}, one thread, torch {head['torch']}, {head['date'][:10]}: of each case the fastest backend. "
        "All backends, memory, selection's share, and where the time goes: [`bench/CPU.md`](bench/CPU.md). "
        f"Of {len(met)} targets {sum(x is True for x in met)} are met.\n\n{table}"
    )


def show(result: Result) -> None:
    """Print the tables for people: with rich where it is installed, else as Markdown."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(markdown(result))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    for heading, *lines in tables(result):
        grid = Table(*(name.replace("`", "") for name in heading))
        for line in lines:
            grid.add_row(*(cell.replace("`", "").replace("**", "") for cell in line))
        console.print(grid)
    for failure in unmet(result["rows"]):
        console.print(failure.replace("`", ""), markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, write the page and the README's short table; with ``--check`` only compare."""
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="result file (default: bench/results/cpu.json)")
    parser.add_argument("--readme", type=Path, default=README, help="file that holds the marks (default: README.md)")
    parser.add_argument("--page", type=Path, default=PAGE, help="file for all tables (default: bench/CPU.md)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the block is out of date")
    options = parser.parse_args(argv)
    try:
        result = load(options.results)
        new = {
            options.page: page(result),
            options.readme: replaced(options.readme.read_text(), brief(result), BEGIN, END),
        }
    except (OSError, ValueError) as error:
        print(f"{options.results.name}, {options.readme.name}: {error}", file=sys.stderr)
        return 1
    if options.check:
        stale = [path.name for path, text in new.items() if not path.exists() or path.read_text() != text]
        if stale:
            print(f"{' and '.join(stale)}: the tables differ from {options.results.name}; run `python -m bench.table`")
        return int(bool(stale))
    print(markdown(result))
    for path, text in new.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
