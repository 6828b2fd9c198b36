"""The published report, from made-up result files: its numbers are the files', and what no file measures is not measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.suite import cases, measures, overlap, plots, rows, targets
from bench.suite.model import DENSE_MODEL
from bench.suite.plots import pieces
from bench.suite.rows import NOT_RUN

HEAD = {
    "suite": "gpu",
    "gpu": "Made-up GPU",
    "driver": "1.2",
    "torch": "t",
    "triton": "t",
    "cudnn": 9,
    "git": "abc",
    "date": "2030-01-01",
}
README = "before\n<!-- gpu -->\nold\n<!-- /gpu -->\nafter\n"


class Folder:
    """A results folder and what is made from it."""

    def __init__(self, path: Path) -> None:
        self.results, self.page, self.plots, self.readme = (
            path / x for x in ("results", "REPORT.md", "plots", "README.md")
        )
        self.results.mkdir()
        self.readme.write_text(README)

    def put(self, name: str, found: list[dict[str, Any]], **header: Any) -> None:
        rows.write(self.results / name, HEAD | header, found)

    def main(self, *more: str) -> int:
        names = ("results", "page", "plots", "readme")
        return report.main([*(x for name in names for x in (f"--{name}", str(getattr(self, name)))), *more])


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def timed(case: cases.Case, op: str, impl: str, ms: float, flops: float | None = None, **fields: Any) -> dict[str, Any]:
    """A made-up row: three samples around a median."""
    samples = [0.9 * ms, ms, 1.1 * ms]
    rate = rows.tflops(flops, samples)
    found = {
        "ms": samples,
        "checked": True,
        "flops": flops,
        "tflops": rate,
        "density": case.density,
        "error": {"out": 0.0021},
    }
    return case.row(op, impl, **found | fields)


def every_row(case: cases.Case) -> list[dict[str, Any]]:
    """What a whole run writes of a case: ours twice as fast a tile as the others, for a tenth of the tiles."""
    work, density = 1e12, case.density
    found: list[dict[str, Any]] = []
    if case.kind == "overlap":
        shares = {"t": 0.7, "h": 0.3, "w": 0.2}
        numbers = {"rho": 0.3, "pairs": 1.2, "triples": 1.3} | shares
        config = {"field_tokens": [8, 8, 8], "field_share": 0.5}
        return [case.row("overlap", "flexsparse", overlap=numbers, checked=True, config=config, density=density)] * len(
            overlap.FIELDS
        )
    if case.kind == "memory":
        return [
            case.row("memory", "flexsparse", part=part, mib=[90.0], needed_mib=100.0, checked=True)
            for part in ("saved", "index")
        ]
    if case.kind == "ceiling":
        return [
            timed(case, "ceiling", "torch", 2.0, 1.6e12, part="matmul", density=None),
            timed(case, "ceiling", "torch", 1.0, part="copy", density=None, bytes=4_000_000_000),
        ]
    if case.kind == "model_step":
        return [
            timed(case, "model_step", impl, ms, part=part)
            for impl, ms in ((DENSE_MODEL, 30.0), ("flexsparse", 10.0))
            for part in ("forward", "training")
        ]
    ops = ("fine_forward", "fine_backward") if case.kind == "fine_backward" else (case.kind,)
    for op in ops:
        saving = {"training": True} if op != ops[-1] else None
        found.append(timed(case, op, "flexsparse", 1.0, density * work, config=saving))
        for tile in case.others:
            found.append(timed(case, op, "flexsparse", 1.3, density * work, tile=list(case.layout_of(tile).sides)))
        for name in case.baselines:
            dense = name in cases.DENSE
            sizes = (12.0, work) if dense else (2.2, density * work)
            found.append(timed(case, op, name, *sizes, density=1.0 if dense else density, config=saving))
    if case.parts:
        for part, ms in {"tiling": 0.05, "lists": 0.01, "fine": 0.8, "untile": 0.03, "combine": 0.07}.items():
            found.append(timed(case, case.kind, "flexsparse", ms, part=part))
        found.append(timed(case, "select", "flexsparse", 0.04))
    return found


def full_run() -> list[dict[str, Any]]:
    return [row for case in cases.all_cases() for row in every_row(case)]


def test_a_piece_that_no_call_has_takes_no_time() -> None:
    """Where kernels read and write raster order there is no tiling, and no way back."""
    rows = [row for row in full_run() if row["case"] == "attention-32k"]
    for row in rows:
        if row["part"] in ("tiling", "untile", "combine"):
            row |= {"ms": None, "checked": False, "reason": NOT_RUN}
    found = targets.lines([measures.File(name="x", header=HEAD, rows=rows)])
    by_text = {line.target.text: line for line in found}
    tiling = by_text["tiling, share of attention forward, 32k"]
    assert tiling.worst == 0.0 and tiling.verdict == "meets the aim"
    assert by_text["selection + combine, share of attention forward, 32k"].worst == pytest.approx(0.04)
    (group,) = measures.groups([measures.File(name="x", header=HEAD, rows=rows)])
    bars = pieces(group)
    assert bars is not None and bars["tiling"] == bars["way back, gate"] == 0.0


def test_the_faster_whole_counts_and_says_whose_kernels_it_has(folder: Folder) -> None:
    found = full_run()
    for row in [x for x in found if x["op"] == "attention_forward" and x["impl"] == "flexsparse" and not x["part"]]:
        if row["case"] == "attention-32k":
            found.append(row | {"ms": [0.5 * ms for ms in row["ms"]], "config": {"kernels": "default"}})
        if row["case"] == "attention-16k":
            found.append(row | {"ms": None, "config": {"kernels": "default"}})
    by_text = {line.target.text: line for line in targets.lines([measures.File(name="x", header=HEAD, rows=found)])}
    whole = by_text["whole attention forward, density 0.10, gate, against dense cuDNN"]
    assert whole.values["attention-32k"] == pytest.approx(24.0) and whole.taken == {"attention-32k": "default"}
    assert whole.measured.endswith("cases); default kernels: attention-32k")
    assert by_text["the same, 16k"].measured.endswith("; tuned kernels: attention-16k")
    share = by_text["selection + combine, share of attention forward, 32k"]
    assert share.worst is None, "the pieces are those of the other whole"
    folder.put("bench.json", found)
    assert folder.main() == 0 and "default kernels: attention-32k" in folder.readme.read_text()


def test_every_target_is_measured_by_a_full_run() -> None:
    found = targets.lines([measures.File(name="x", header=HEAD, rows=full_run())])
    assert len(found) == 23 and [line.target.text for line in found if line.worst is None] == []
    by_text = {(line.target.table, line.target.text): line for line in found}
    forward = by_text[targets.FORWARD, "fine forward TFLOPS / cuDNN dense TFLOPS, D=128"]
    assert "fine-d128-t64-32k" in forward.values and "training-fine-d128-t64-32k" not in forward.values
    assert forward.values["fine-d128-t64-32k"] == pytest.approx(12 * 0.1)  # 12 times faster on a tenth of the work
    assert forward.values["fine-d128-t64-32k-p50"] == pytest.approx(12 * 0.05)  # half the density in the same time
    assert "fine-d128-t64-16k" not in forward.values  # too short to count
    assert forward.worst == pytest.approx(0.6) and forward.verdict == "misses the floor"
    assert by_text[targets.FORWARD, "the same, D=64"].values.keys() == {"fine-d64-t64-32k"}
    share = by_text[targets.FORWARD, "selection + combine, share of attention forward, 32k"]
    assert share.values["attention-32k"] == pytest.approx(0.04 + 0.07 - 0.03)
    assert by_text[targets.FORWARD, "the same, 16k"].values.keys() == {"attention-16k"}
    ragged = by_text[targets.FORWARD, "the same on 21x30x52, against 4x4x4 padding"]
    assert list(ragged.values.values()) == [pytest.approx(1.3)] and ragged.verdict == "meets the floor"
    flex = by_text[targets.TRAINING, "forward+backward / stock FlexAttention, same selection"]
    assert flex.worst == pytest.approx(2.2) and flex.verdict == "meets the aim"
    assert by_text[targets.TRAINING, "BSA, 40x48x80, training, against dense"].worst == pytest.approx(12.0)


def one_target(**fields: Any) -> targets.Target:
    options: dict[str, Any] = {
        "table": "t",
        "text": "x",
        "floor": 0.8,
        "aim": 1.0,
        "wants": lambda row: True,
        "measure": lambda group: None,
    }
    return targets.Target(**options | fields)


@pytest.mark.parametrize(
    "fields, value, verdict",
    [
        ({}, 1.0, "meets the aim"),
        ({}, 0.99, "meets the floor"),
        ({}, 0.8, "meets the floor"),
        ({}, 0.79, "misses the floor"),
        ({"floor": None}, 0.5, "misses the aim"),
        ({"aim": None}, 2.0, "meets the floor"),
        ({"lower": True, "floor": 0.1, "aim": 0.05}, 0.05, "meets the aim"),
        ({"lower": True, "floor": 0.1, "aim": 0.05}, 0.07, "meets the floor"),
        ({"lower": True, "floor": 0.1, "aim": 0.05}, 0.11, "misses the floor"),
    ],
)
def test_verdicts(fields: dict[str, Any], value: float, verdict: str) -> None:
    assert one_target(**fields).verdict(value) == verdict


def test_the_worst_case_decides() -> None:
    line = targets.Line(target=one_target(), values={"a": 1.2, "b": 0.7})
    assert (line.worst, line.verdict, line.measured) == (0.7, "misses the floor", "0.7x to 1.2x (2 cases)")
    line = targets.Line(target=one_target(lower=True, share=True, floor=0.1, aim=0.05), values={"a": 0.04, "b": 0.2})
    assert (line.worst, line.verdict, line.measured) == (0.2, "misses the floor", "4.0% to 20.0% (2 cases)")
    assert targets.Line(target=one_target()).verdict == targets.Line(target=one_target()).measured == "not measured"


def test_without_files_nothing_is_measured(folder: Folder) -> None:
    (folder.results / "cpu.json").write_text(json.dumps({"header": {"gpu": None}, "rows": [{"op": "other"}]}))
    assert folder.main() == 0 and folder.main("--check") == 0
    page, readme = folder.page.read_text(), folder.readme.read_text()
    assert page.count("| not measured | not measured |") == len(targets.targets())
    assert "bench/REPORT.md" in readme and "|" not in readme
    assert (
        readme.startswith("before\n<!-- gpu -->") and readme.endswith("<!-- /gpu -->\nafter\n") and "old" not in readme
    )
    assert not folder.plots.exists() and "plots/" not in page and "No run on a GPU is on file" in readme


def test_a_full_run_fills_the_report(folder: Folder) -> None:
    folder.put("run/bench.json", full_run(), checks={"passed": 3, "failed": 0, "skipped": 1, "not run": 0})
    assert folder.main() == 0 and folder.main("--check") == 0
    page = folder.page.read_text()
    targets_part = page[page.index("## Targets") : page.index("## Files")]
    assert "not measured" not in targets_part and "23 of 23 targets measured" in targets_part
    assert sorted(path.name for path in folder.plots.iterdir()) == sorted(f"{name}.png" for name in plots.FIGURES)
    assert all(f"(plots/{name}.png)" in page for name in plots.FIGURES)
    assert "Made-up GPU" in page and "3 passed, 1 skipped" in page and "4.00 TB/s" in page and "2.1e-03" in page


def numbers(text: str) -> list[str]:
    return re.findall(r"\d+\.?\d*", text)


def test_every_number_comes_from_the_file(folder: Folder) -> None:
    """Twice the time of everything of ours: each number that it decides changes, in the table and in the figures' data."""
    found = full_run()
    folder.put("bench.json", found)
    assert folder.main() == 0
    page, figure = folder.page.read_text(), (folder.plots / "speedup_density.png").read_bytes()
    slower = [
        dict(row, ms=[2 * x for x in row["ms"]] if row["ms"] and row["impl"] == "flexsparse" else row["ms"])
        for row in found
    ]
    folder.put("bench.json", slower)
    assert folder.main("--check") == 1
    assert folder.main() == 0
    assert (folder.plots / "speedup_density.png").read_bytes() != figure
    before, after = (
        {
            (line.target.text, line.target.table, line.target.lower): line.worst
            for line in targets.lines([measures.File(name="x", header=HEAD, rows=some)])
        }
        for some in (found, slower)
    )
    for key, value in before.items():
        ours_alone = key[2] or "21x30x52, against" in key[0]  # both numbers of the ratio are ours: it stays
        assert after[key] == pytest.approx(value if ours_alone else value / 2), key
    old, new = (numbers(text[text.index("## Fine stage, forward") :]) for text in (page, folder.page.read_text()))
    assert len(old) == len(new) and sum(a != b for a, b in zip(old, new)) > 100


def test_figures_are_drawn_only_where_there_are_rows(folder: Folder) -> None:
    fine = [row for row in full_run() if row["op"].startswith("fine")]
    folder.put("bench.json", full_run())
    assert folder.main() == 0 and len(list(folder.plots.iterdir())) == 4
    (folder.plots / "roofline.png").unlink()
    assert folder.main("--check") == 1
    folder.put("bench.json", fine)  # no whole attention, no ceilings
    assert folder.main("--check") == 1 and folder.main() == 0
    assert list(folder.plots.iterdir()) == [] and "plots/" not in folder.page.read_text()
    folder.put("bench.json", fine + [row for row in full_run() if row["op"] == "ceiling"])
    assert folder.main() == 0 and [path.name for path in folder.plots.iterdir()] == ["roofline.png"]


def test_ratios_stay_within_a_file(folder: Folder) -> None:
    """Ours in one file and cuDNN in another are no pair."""
    case = cases.first_cases()[1]
    ours, dense = (
        timed(case, "fine_forward", "flexsparse", 1.0, 1e11),
        timed(case, "fine_forward", "dense_cudnn", 9.0, 1e12),
    )
    apart = [measures.File(name=name, header=HEAD, rows=[row]) for name, row in (("a", ours), ("b", dense))]
    assert targets.lines(apart)[0].worst is None
    together = measures.File(name="c", header=HEAD, rows=[ours, dense])
    assert targets.lines([*apart, together])[0].worst == pytest.approx(0.9)
    slower = [timed(case, "fine_forward", "flexsparse", 2.0, 1e11), dense]
    newer = measures.File(name="d", header=HEAD | {"date": "2031-01-01"}, rows=slower)
    assert targets.lines([newer, together])[0].worst == pytest.approx(0.45)  # the newest file speaks


def test_samples_are_compared_round_by_round() -> None:
    """A slow moment that hits both is no difference between them."""
    assert measures.ratio([10, 20, 10], [1, 2, 1]) == 10
    assert measures.ratio([10, 10, 10, 30], [1, 1, 1, 3]) == 10


def test_what_was_not_measured_says_why(folder: Folder) -> None:
    case = cases.first_cases()[1]
    refused = case.row("fine_forward", "flexsparse", reason="out has RMS error 1", error="out has RMS error 1")
    absent = case.row("fine_forward", "fastvideo_tk", reason="the package | is not here")
    failed = {"case": "test_it", "op": "check", "outcome": "failed", "reason": "wrong"}
    folder.put("bench.json", [refused, absent, failed])
    assert folder.main() == 0
    page = folder.page.read_text()
    assert page.count("| not measured | not measured |") == len(targets.targets())
    assert (
        "out has RMS error 1" in page
        and "the package / is not here" in page
        and "- failed: `test_it` (bench.json): wrong" in page
    )


def test_a_readme_without_marks_and_a_broken_file_are_errors(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.readme.write_text("no marks")
    assert folder.main() == 1 and "<!-- gpu -->" in capsys.readouterr().err
    folder.readme.write_text(README)
    (folder.results / "broken.json").write_text("[]")
    assert folder.main() == 1 and "broken.json" in capsys.readouterr().err
    assert not folder.page.exists()


def test_what_is_committed_is_up_to_date() -> None:
    assert report.main(["--check"]) == 0
