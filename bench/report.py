"""The published report of the GPU benchmark: `python -m bench.report [--check]`, or `make bench-report`.

Renders the result files of `bench.gpu_suite` below bench/results into bench/REPORT.md, bench/plots/ and the README's table.
Every number comes from a file; a target that no file measures says "not measured".
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.header import ROOT
from bench.marks import replaced
from bench.suite import plots
from bench.suite.measures import File
from bench.suite.rows import Row, load, median, worst_error
from bench.suite.targets import FORWARD, TRAINING, Line, lines

BEGIN, END = "<!-- gpu -->", "<!-- /gpu -->"
TITLES = {
    "ceiling": "Ceilings of the machine",
    "fine_forward": "Fine stage, forward",
    "fine_backward": "Fine stage, backward",
    "select": "Selection",
    "attention_forward": "Whole attention, forward",
    "attention_training": "Whole attention, forward and backward",
    "model_step": "Block stack",
    "memory": "Memory",
}
CAPTIONS = {
    "speedup_density": "Speed-up over dense cuDNN against density",
    "speedup_length": "Speed-up over dense cuDNN against sequence length",
    "roofline": "Fine forward under the measured ceilings",
    "time_split": "Time split of one attention call",
}


def read(folder: Path) -> list[File]:
    """Result files of the suite in a folder and below it, by name; other benchmarks' files are passed over."""
    found = []
    for path in sorted(folder.rglob("*.json")):
        header, rows = load(path)
        if header.get("suite") == "gpu":
            found.append(File(name=path.relative_to(folder).as_posix(), header=header, rows=rows))
    return found


def table(heading: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    cells = [heading, ["---"] * len(heading), *body]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in cells)


def target_table(found: Sequence[Line], which: str) -> str:
    """One of the two tables of targets."""
    heading = [f"{which}, bf16", "floor", "aim", "measured", "verdict"]
    body = []
    for line in found:
        if line.target.table == which:
            bounds = [line.target.bound(value) for value in (line.target.floor, line.target.aim)]
            body.append([line.target.text, *bounds, line.measured, line.verdict])
    return table(heading, body)


def machine(file: File) -> str:
    """Where a file was measured."""
    h = file.header
    git = str(h.get("git"))[:13]
    parts = [h.get("gpu"), f"driver {h.get('driver')}", f"torch {h.get('torch')}", f"triton {h.get('triton')}"]
    return ", ".join([*map(str, parts), f"cuDNN {h.get('cudnn')}", f"git {git}", str(h.get("date"))])


def summary(files: Sequence[File], found: Sequence[Line]) -> str:
    """What was measured at all, in a sentence."""
    done = sum(line.worst is not None for line in found)
    if not files:
        return f"No run on a GPU is on file: none of the {len(found)} targets is measured."
    newest = max(files, key=lambda file: str(file.header.get("date")))
    return (
        f"{done} of {len(found)} targets measured; the newest file: {machine(newest)}. Ratios are medians over samples of "
        "the same round; where several cases count for a target, the worst one decides."
    )


def readme_block(files: Sequence[File], found: Sequence[Line]) -> str:
    """What the README shows: nothing but a sentence before there is anything to show."""
    if not files:
        return f"{summary(files, found)} [`bench/REPORT.md`](bench/REPORT.md) lists them."
    return targets_block(files, found)


def targets_block(files: Sequence[File], found: Sequence[Line]) -> str:
    """Both tables of targets."""
    return "\n\n".join([summary(files, found), target_table(found, FORWARD), target_table(found, TRAINING)])


def files_table(files: Sequence[File]) -> str:
    """Each file, where it is from, and its checks."""
    body = []
    for file in files:
        tally = file.header.get("checks") or {}
        body.append([f"`{file.name}`", machine(file), ", ".join(f"{n} {name}" for name, n in tally.items() if n)])
    return table(["file", "machine", "checks"], body)


def failures(files: Sequence[File]) -> list[str]:
    """Checks that did not pass, and why."""
    found = []
    for file in files:
        for row in file.rows:
            if row["op"] == "check" and row["outcome"] != "passed":
                found.append(f"- {row['outcome']}: `{row['case']}` ({file.name}): {str(row['reason'])[:200]}")
    return found


def problem(row: Row) -> list[str]:
    """The columns that say what a row computes."""
    tile = "x".join(map(str, row["tile"])) if row.get("tile") else ""
    density = "" if row["density"] is None else f"{row['density']:.3f}"
    sizes = [f"{row['S']:,}", str(row["H"]), str(row["D"]), tile, density, row["dtype"]]
    return [row["case"], *sizes, row["impl"], " ".join(filter(None, [row["part"], details(row)]))]


def details(row: Row) -> str:
    """Configuration of a row, as text."""
    return " ".join(f"{key}={value}" for key, value in (row.get("config") or {}).items())


def measured_line(row: Row) -> list[str]:
    """A row of an op's table."""
    ms, error = median(row), worst_error(row)
    if ms is None and not row.get("mib"):
        return [*problem(row), "not measured", "", str(row.get("reason") or "")[:160]]
    if ms is None:
        return [*problem(row), f"{row['mib'][0]:.1f} MiB of {row['needed_mib']:.1f}", "", ""]
    spread = f"{ms:.3f} ({min(row['ms']):.3f} to {max(row['ms']):.3f})"
    rate = "" if row["tflops"] is None else f"{row['tflops']:.0f}"
    if row.get("bytes"):
        rate = f"{row['bytes'] / statistics.median(row['ms']) / 1e9:.2f} TB/s"
    return [*problem(row), spread, rate, "" if error is None else f"{error:.1e}"]


def op_tables(files: Sequence[File]) -> list[str]:
    """All rows, by op."""
    parts = []
    heading = [
        "case",
        "S",
        "H",
        "D",
        "tile",
        "density",
        "dtype",
        "implementation",
        "what",
        "ms (range)",
        "TFLOPS",
        "error",
    ]
    for op, title in TITLES.items():
        body = [measured_line(row) for file in files for row in file.rows if row["op"] == op]
        if body:
            parts.append(f"## {title}\n\n{table(heading, body)}")
    return parts


def overlap_table(files: Sequence[File]) -> list[str]:
    """What neighbouring query tiles share."""
    body = []
    for file in files:
        for row in file.rows:
            if row["op"] == "overlap" and row.get("overlap"):
                found, kind = row["overlap"], row["config"]
                cells = kind["field_tokens"]
                field = f"every {'x'.join(map(str, cells))} tokens" if cells else "none (independent)"
                numbers = [
                    f"{found[name]:.3f}" if name in found else "" for name in ("t", "h", "w", "pairs", "triples")
                ]
                body.append([row["case"], field, f"{kind['field_share']:g}", f"{row['density']:.3f}", *numbers])
    if not body:
        return []
    heading = ["case", "smooth field", "its share of variance", "density", "overlap along t", "h", "w"]
    heading += ["reads saved by pairs in tile order, x", "by triples, x"]
    note = "On synthetic tokens; the last kind is made like models trained on clips ([STUDY.md](STUDY.md), question 5)."
    return [f"## Overlap of neighbouring query tiles' lists\n\n{note}\n\n{table(heading, body)}"]


def page(files: Sequence[File], figures: Sequence[str]) -> str:
    """All of REPORT.md."""
    found = lines(files)
    parts = ["# GPU benchmark", "Made by `make bench-report` from `bench/results/`; do not edit."]
    parts += ["## Targets", targets_block(files, found)]
    reasons = [f"- {line.target.text}: {line.why}" for line in found if line.worst is None and line.why]
    if reasons:
        parts += ["Why a target was not measured, where the files say it:", "\n".join(reasons)]
    if files:
        parts += ["## Files", files_table(files)]
    if notes := failures(files):
        parts += ["## Checks that did not pass", "\n".join(notes)]
    parts += [f"## {CAPTIONS[name]}\n\n![{CAPTIONS[name]}](plots/{name}.png)" for name in figures]
    parts += op_tables(files) + overlap_table(files)
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Write, or with ``--check`` compare; exit code 1 where something is out of date or cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of the result files")
    parser.add_argument("--page", type=Path, default=ROOT / "bench" / "REPORT.md", help="the report")
    parser.add_argument("--plots", type=Path, default=ROOT / "bench" / "plots", help="folder of the figures")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file that holds the marks")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file is out of date")
    options = parser.parse_args(argv)
    try:
        files = read(options.results)
        readme = options.readme.read_text()
        block = replaced(readme, readme_block(files, lines(files)), BEGIN, END)
    except (OSError, ValueError, KeyError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if options.check:
        figures = sorted(plots.wanted(files))
        old = options.page.read_text() if options.page.is_file() else ""
        drawn = sorted(path.stem for path in options.plots.glob("*.png"))
        stale = [name for name, same in (
            (options.page.name, page(files, figures) == old),
            (options.readme.name, block == readme),
            (options.plots.name, drawn == figures),
        ) if not same]  # fmt: skip
        if stale:
            print(f"out of date: {', '.join(stale)}; run `make bench-report`")
        return int(bool(stale))
    figures = sorted(path.stem for path in plots.draw(files, options.plots))
    options.page.write_text(page(files, figures))
    options.readme.write_text(block)
    print(summary(files, lines(files)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
