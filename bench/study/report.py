"""The study's page: `python -m bench.study.report [--check]`, or `make study-report`.

Renders the result files of `bench.study` below bench/results/study into bench/STUDY.md and bench/plots/study/, and with
`--readme FILE` the table of question 1 into that file, between its two marks. Every number
comes from a row, but for the papers' (`bench.study.paper`); what no row says is "not run".
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.header import ROOT
from bench.marks import replaced
from bench.report import table
from bench.study import plots, tables, tables_along, tables_parts, tables_probes, tables_schedule
from bench.study.evidence import Row, Study
from bench.study.rows import key, load
from bench.study.statistics import CLAIM, LEVEL, Comparison, family, gap_text, verdict
from bench.study.tables import Section
from flexsparse.training.errors import RunError

BEGIN, END = "<!-- study -->", "<!-- /study -->"
QUESTIONS = (
    tables.quality,
    tables_along.along,
    tables.noise_levels,
    tables_parts.order,
    tables_parts.parts,
    tables_probes.rules,
    tables_probes.training_free,
    tables_schedule.schedules,
    tables_probes.overlap,
)
ASKED = (
    "VSA is said to train as well as dense attention at an eighth of the pairs (arXiv 2505.13389: gap of the loss "
    "at most 0.5 %), BSA (arXiv 2509.01085) at a density of 0.05 to 0.07; both at all sizes. Do they, which of "
    "their parts matter, and what does a model trained dense lose when its attention is swapped? Video diffusion "
    "transformers of several sizes are trained with each attention on the same clips in the same order from the "
    "same weights, by flow matching, and compared on clips kept aside."
)
NOT_SHOWN = (
    "No pretrained video model's weights were at hand: nothing here says what happens to Wan or Hunyuan when they are adapted.",
    "No VBench, no other score of finished videos, and no human preference: the measure is held-out flow-matching "
    "loss, which need not follow what people see.",
    "Models are small and train on pixels of a few clips (unless a file's header says otherwise), for a tiny part "
    "of the papers' budgets. A gap that is absent here may appear at their size, and the other way round.",
    "Held-out windows are later parts of the same clips: unseen, and not of another kind.",
    "Each file is of one machine; times hold for it alone.",
)
INTERVALS = (
    f"**What the intervals mean.** A method and its anchor share the seed: weights, order of data, noise, held-out "
    f"windows. Each seed gives one ratio of losses; the interval is Student's t at {100 * LEVEL:g} % over the seeds' "
    "ratios, with n - 1 degrees of freedom. It says where the mean over seeds would lie if more seeds were run "
    "with this data and these settings, if the ratios are near normal, which so few seeds cannot confirm.",
    "**What they do not mean.** They do not cover other clips, sizes, learning rates or longer training. An "
    'interval that includes zero shows no difference and no equality: "no difference shown" with a wide interval '
    f"is ignorance. Whether a gap lies within the claimed {100 * CLAIM:g} % is asked of the whole interval: within, "
    "outside, or too wide to tell. With one seed there is no interval and no verdict. The spread over held-out windows "
    "is no substitute for seeds, and is shown as what it is.",
    "**Equal FLOPs.** Sparse runs are read at the training FLOPs of dense's last evaluation, linear in log FLOPs "
    "between their evaluations; a run that does not reach so far is not measured there. Beside it, the gap at the most "
    "FLOPs that both reach.",
)


@dataclass(frozen=True, kw_only=True)
class File:
    """A result file of a study."""

    name: str
    header: dict[str, Any]
    rows: list[Row]


def read(folder: Path) -> list[File]:
    """Result files in a folder and below it, the oldest first.

    Raises:
        RunError: a file is none.
    """
    paths = sorted(folder.rglob("*.json")) if folder.is_dir() else []
    found = []
    for path in paths:
        header, rows = load(path)
        found.append(File(name=path.relative_to(folder).as_posix(), header=header, rows=rows))
    return sorted(found, key=lambda file: (str(file.header.get("date")), file.name))


def newest(files: Sequence[File]) -> Study:
    """All files as one study: of a run that several files hold, the newest file's rows alone; of other rows, the
    newest."""
    owner = {row["run"]: file.name for file in files for row in file.rows if "run" in row}
    rows: dict[tuple[Any, ...], Row] = {}
    presets: dict[str, str] = {}
    for file in files:
        for row in file.rows:
            if owner.get(row.get("run"), file.name) == file.name:
                rows[key(row)] = row
                presets[row["size"]] = str(file.header.get("preset", "cpu"))
    return Study(list(rows.values()), presets)


def machine(header: dict[str, Any]) -> str:
    """Where a file was made."""
    return str(header.get("gpu") or header.get("cpu") or "unknown")


def files_table(files: Sequence[File]) -> str:
    """Each file and its header."""
    heading = ["file", "preset", "date", "continued", "git", "torch", "machine", "threads", "compiled", "data", "rows"]
    body = []
    for file in files:
        h = file.header
        git = str(h.get("git_revision"))[:13] + (" with changes" if h.get("git_dirty") else "")
        again = h.get("continued") or []
        line = [f"`{file.name}`", h.get("preset"), h.get("date"), f"{len(again)} times" if again else "no", git]
        line += [
            h.get("torch"),
            machine(h),
            h.get("threads"),
            h.get("compiled"),
            str(h.get("data"))[:12],
            len(file.rows),
        ]
        body.append([str(cell) for cell in line])
    return table(heading, body)


def mixed(files: Sequence[File]) -> list[str]:
    """Sizes whose rows come from files that were made under different conditions."""
    found = []
    for size in dict.fromkeys(row["size"] for file in files for row in file.rows):
        own = [file for file in files if any(row["size"] == size for row in file.rows)]
        for name in ("data", "preset", "gpu", "cpu", "torch", "threads", "compiled"):
            if len({str(file.header.get(name)) for file in own}) > 1:
                found.append(f"- size {size}: files differ in {name}; pairs across them hold less.")
    return found


def counted(study: Study) -> str:
    """What is on file, in a sentence."""
    if not study.rows:
        return "Nothing was run: no result file holds a row."
    curves = {row["run"] for row in study.of("evaluation")}
    done = {row["run"] for row in study.of("run")} & curves
    models = {row["model"] for row in study.rows if "model" in row}
    sizes = ", ".join(study.sizes("evaluation")) or "none"
    left = f", {len(curves - done)} of them not finished" if curves - done else ""
    text = f"On file: {len(curves)} trainings{left}, at sizes {sizes}; probes of {len(models)} trained models."
    tests = [size for size in study.sizes("evaluation") if study.presets.get(size) == "smoke"]
    return text + (
        f" Size {', '.join(tests)}: of the preset smoke, a test that says nothing about quality." if tests else ""
    )


def page(files: Sequence[File], figures: Sequence[str], where: str) -> str:
    """All of STUDY.md.

    Args:
        files: oldest first.
        figures: names of those that are drawn.
        where: path of their folder, as the page sees it.
    """
    study = newest(files)
    sections = [question(study) for question in QUESTIONS]
    comparisons: list[Comparison] = [c for section in sections for c in section.comparisons]
    parts = ["# Does sparse attention keep quality?"]
    parts.append("Made by `python -m bench.study.report` from `bench/results/study/`; do not edit.")
    parts += ["## What was asked", ASKED, "## What was shown", counted(study)]
    answers = [f"- {answer}" for section in sections for answer in section.answers]
    parts.append(
        "\n".join([*answers, f"- {family(comparisons, names=False)}"]) if study.rows else "So nothing was shown."
    )
    parts += ["## What was not shown", "\n".join(f"- {line}" for line in NOT_SHOWN)]
    parts += ["## How to read the numbers", *INTERVALS]
    parts += ["## Where a result contradicts a paper", *contradictions(sections, study)]
    for section in sections:
        parts += [f"## {section.title}", *section.parts]
        if any(c.gap for c in section.comparisons):
            parts.append(family(section.comparisons))
    parts += [
        f"## {plots.PLOTS[name].caption}\n\n![{plots.PLOTS[name].caption}]({where}/{name}.png)" for name in figures
    ]
    parts += ["## Files", files_table(files) if files else "None."]
    if notes := [
        *(f"- `{file.name}`: {file.header['note']}." for file in files if file.header.get("note")),
        *mixed(files),
    ]:
        parts.append("\n".join(notes))
    return "\n\n".join(parts) + "\n"


def readme_block(study: Study) -> str:
    """What the README shows: dense, VSA and BSA at each size, with intervals, and where the rest is."""
    link = "[`bench/STUDY.md`](bench/STUDY.md)"
    body = []
    for size in tables.main_sizes(study):
        for method in (*tables.MAIN, tables.FLOOR):
            gap = tables.against(study, size, method)
            flops = study.flops_ratio(size, method)
            run = next(iter(study.of("run", size=size, method=method)), None)
            if run is not None and gap.gap is not None:
                tokens = "x".join(map(str, run["grid"]))
                shape = f"{tokens} tokens, {run['parameters'] / 1e6:.2f}M parameters, {gap.step} steps"
                cost = [tables.times(flops[i]) if flops else "" for i in (0, 1)]
                body.append([shape, method, tables.seeds(gap), gap_text(gap), verdict(gap)])
                body[-1] += [tables.at_equal_flops(study, size, method), *cost]
    if not body:
        return f"Nothing was trained yet; {link} says how the study works."
    heading = ["size", "method", "seeds", "loss against dense, equal steps", "", "the same, equal FLOPs"]
    heading += ["attention FLOPs", "all FLOPs"]
    what = (
        "Held-out flow-matching loss; in brackets the 95 % interval over seeds. Negative is better than dense. At equal "
        "FLOPs, a run that ends before dense's is compared with dense at its own, and the share is said. In "
        f"`{tables.FLOOR}` no tile sees another: where it is not worse than dense, the other rows say nothing about selection."
    )
    return f"{table(heading, body)}\n\n{what} Everything else that was asked, and what was not shown: {link}."


def contradictions(sections: Sequence[Section], study: Study) -> list[str]:
    """Each with the command that reproduces it."""
    found = [pair for section in sections for pair in section.contradictions]
    if not found:
        return ["None found." if study.rows else "Nothing was run."]
    return [f"{text}. To reproduce:\n\n```\n{command}\n```" for text, command in found]


def main(argv: Sequence[str] | None = None) -> int:
    """Write, or with ``--check`` compare; exit code 1 where something is out of date or cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m bench.study.report", description=__doc__)
    bench = ROOT / "bench"
    parser.add_argument("--results", type=Path, default=bench / "results" / "study", help="folder of the result files")
    parser.add_argument("--page", type=Path, default=bench / "STUDY.md", help="the page")
    parser.add_argument("--plots", type=Path, default=bench / "plots" / "study", help="folder of the figures")
    parser.add_argument("--readme", type=Path, help="a page that gets the short table, between its marks")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something is out of date")
    options = parser.parse_args(argv)
    try:
        files = read(options.results)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    study = newest(files)
    where = Path(os.path.relpath(options.plots.resolve(), options.page.resolve().parent)).as_posix()
    if options.check:
        figures = plots.wanted(study)
        old = options.page.read_text() if options.page.is_file() else ""
        drawn = {path.stem for path in options.plots.glob("*.png")}
        made = [
            (options.page, page(files, figures, where) == old),
            (options.plots, drawn == set(figures)),
        ]
        if options.readme is not None:
            text = options.readme.read_text()
            made.append((options.readme, replaced(text, readme_block(study), BEGIN, END) == text))
        stale = [path.name for path, same in made if not same]
        if stale:
            print(f"out of date: {', '.join(stale)}; run `python -m bench.study.report`")
        return int(bool(stale))
    try:
        figures = plots.draw(study, options.plots)
    except ImportError as error:
        print(f"error: {error}: the figures need matplotlib, `pip install flexsparse[demo]`", file=sys.stderr)
        return 1
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(page(files, figures, where))
    if options.readme is not None:
        text = options.readme.read_text()
        options.readme.write_text(replaced(text, readme_block(study), BEGIN, END))
    print(counted(study))
    return 0


if __name__ == "__main__":
    sys.exit(main())
