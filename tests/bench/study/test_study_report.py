"""The study's page, from made-up rows: its numbers are the rows', and what no row says is not run."""

from __future__ import annotations

import re
import statistics as stdlib
from pathlib import Path
from typing import Any

import pytest
from study_rows import HEADER, Row, evaluation, everything, finished, probed, timed, training

from bench.study import plot_data, plots, report, tables, tables_parts, tables_probes, tables_schedule
from bench.study.evidence import Curve, Study
from bench.study.presets import cpu
from bench.study.rows import Results


class Folder:
    """Results and what is made from them."""

    def __init__(self, path: Path) -> None:
        self.results, self.page, self.plots = path / "results", path / "STUDY.md", path / "plots"

    def put(self, name: str, rows: list[Row], **header: Any) -> None:
        self.results.mkdir(exist_ok=True)
        Results(self.results / name, HEADER | header).put(*rows)

    def main(self, *more: str) -> int:
        where = [x for name in ("results", "page", "plots") for x in (f"--{name}", str(getattr(self, name)))]
        return report.main([*where, *more])

    @property
    def text(self) -> str:
        return self.page.read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def page(rows: list[Row], **header: Any) -> str:
    return report.page([report.File(name="a.json", header=HEADER | header, rows=rows)], [], "plots")


def cells(text: str, *start: str) -> list[str]:
    """The first table line that starts with these cells."""
    for line in text.splitlines():
        found = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and tuple(found[: len(start)]) == start:
            return found
    raise AssertionError(f"no line {start}")


def test_nothing_was_run(folder: Folder) -> None:
    assert folder.main() == 0 and folder.main("--check") == 0
    assert "Nothing was run" in folder.text and "nothing was shown" in folder.text
    assert "What was not shown" in folder.text and "VBench" in folder.text
    assert not re.search(r"\d %\)? \(|0\.00000|nan", folder.text)
    assert not folder.plots.exists()


def test_page_is_made_and_checked(folder: Folder) -> None:
    pytest.importorskip("matplotlib")
    folder.put("a.json", everything())
    assert folder.main() == 0 and folder.main("--check") == 0
    drawn = {path.stem for path in folder.plots.glob("*.png")}
    assert drawn == set(plots.PLOTS) and all((folder.plots / f"{name}.png").stat().st_size > 5000 for name in drawn)
    assert set(re.findall(r"\(plots/(\w+)\.png\)", folder.text)) == drawn
    (folder.plots / "curves.png").rename(folder.plots / "other.png")
    assert folder.main("--check") == 1
    (folder.plots / "other.png").rename(folder.plots / "curves.png")
    page = folder.text
    folder.page.write_text(page.replace("VBench", "Vbench", 1))
    assert folder.main("--check") == 1
    folder.page.write_text(page)
    assert folder.main("--check") == 0
    folder.put("b.json", training("base", "dense", (0,), low=0.2), date="2031-01-01")
    assert folder.main("--check") == 1


def test_a_figure_without_rows_goes(folder: Folder) -> None:
    pytest.importorskip("matplotlib")
    folder.put("a.json", training("base", "dense", (0,)))
    folder.plots.mkdir()
    (folder.plots / "overlap.png").write_bytes(b"of rows that are gone")
    assert folder.main() == 0
    assert {path.stem for path in folder.plots.glob("*.png")} == {"curves", "loss_flops"}


def test_a_file_that_is_none_is_an_error(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.results.mkdir()
    (folder.results / "x.json").write_text('{"header": {"suite": "gpu"}, "rows": []}')
    assert folder.main() == 1 and "x.json" in capsys.readouterr().err
    assert not folder.page.exists()


def test_gap_is_the_mean_of_the_seeds_own_ratios() -> None:
    losses = {"dense": (0.10, 0.20, 0.30), "vsa": (0.101, 0.204, 0.309)}
    rows = [evaluation("base", m, s, 60, loss, 1e9) for m, both in losses.items() for s, loss in enumerate(both)]
    text = page(rows)
    half = 4.302653 * stdlib.stdev([1, 2, 3]) / 3**0.5
    expected = f"+2.00 % ({2 - half:+.2f} to {2 + half:+.2f})"
    assert cells(text, "base", "vsa")[2:6] == ["3", "60", f"{(0.101 + 0.204 + 0.309) / 3:.5f}", expected]
    assert expected in text.split("## What was not shown")[0]  # in the summary too
    assert "too wide to tell" in cells(text, "base", "vsa")


def test_costs_come_from_rows() -> None:
    rows = (
        training("base", "dense", (0, 1)) + training("base", "vsa", (0, 1), share=0.25) + [timed("base", "vsa", 0.62)]
    )
    line = next(x for x in page(rows).splitlines() if x.startswith("| base | vsa |") and "x |" in x)
    attention, total = (6 * 0.25 + 0.06) / 6, (6 * 0.25 + 0.06 + 4) / 10
    assert line == f"| base | vsa | {attention:.3f}x | {total:.3f}x | 0.620x |"
    assert f"{100 * attention:.1f} % of dense's attention FLOPs" in page(rows)


def test_what_is_missing_is_not_run_and_never_zero() -> None:
    text = page(training("base", "dense", (0, 1)) + training("base", "vsa", (0, 1)))
    assert set(cells(text, "base", "bsa")[4:]) == {"not run"} and cells(text, "base", "bsa")[2:4] == ["0", ""]
    assert "bsa at size base: not run." in text
    assert cells(text, "vsa_tile128")[4:7] == ["not run"] * 3 and cells(text, "vsa_bias")[4:] == ["not run"] * 3
    assert cells(text, "bsa_medoid")[4:] == ["not run"] * 3
    assert "Annealing against an abrupt switch: not run." in text and "Overlap of neighbours' lists: not run." in text
    assert "nan" not in text and "None" not in text.replace("None found", "")


def test_one_seed_gets_no_verdict() -> None:
    text = page(training("base", "dense", (0,)) + training("base", "vsa", (0,), 0.2))
    assert "(one seed)" in cells(text, "base", "vsa")[5]
    assert cells(text, "base", "vsa")[6:8] == ["one seed: no verdict"] * 2
    assert "None found." in text.split("## Where a result contradicts a paper")[1].split("##")[0]


def test_a_gap_beyond_the_claim_comes_with_its_command() -> None:
    seeds = (0, 1, 2)
    text = page(training("base", "dense", seeds) + training("base", "vsa", seeds, 0.02), preset="gpu")
    block = text.split("## Where a result contradicts a paper")[1].split("\n## ")[0]
    assert "outside of 0.5 %" in block
    assert "python -m bench.study --preset gpu --out DIR --only base/dense/ base/vsa/\n" in block


def test_commands_name_items_of_the_preset() -> None:
    words = Study([], {"base": "cpu"}).command("base", "dense", "vsa").split("--only ")[1].split()
    names = [item.name for item in cpu().items]
    assert all(any(word in name for name in names) for word in words)


def test_every_name_of_the_tables_is_one_of_the_presets() -> None:
    runs = [item for item in cpu().items if hasattr(item, "steps")]
    names = {run.method.name for run in runs if run.size.name == tables_parts.PARTS_SIZE}
    expected = {*tables.MAIN, *tables.COMPARED, *tables_parts.PARTS, *tables_probes.TRAINED, *tables_schedule.SCHEDULES}
    assert names == expected | {"dense", "dense_more"}
    assert {run.method.name for run in runs if run.size.name == tables_parts.ODD_SIZE} == set(tables_parts.ODD)


def test_order_of_the_paper() -> None:
    seeds = (0, 1, 2)
    same = {"vsa": -0.05, "sliding_tile": -0.04, "spatial_full": -0.02, "compressed_kv": 0.1}
    rows = training("base", "dense", seeds)
    for method, gap in same.items():
        rows += training("base", method, seeds, gap)
    text = page(rows)
    assert "against 4.5e20 FLOPs, 5 attentions: same order, rank correlation +1.00." in text
    assert "against 4e21 FLOPs, 5 attentions: other order" in text
    assert "sliding_tile below dense" in text and "spatial_full below dense" in text
    assert [cells(text, m)[0] for m in ("vsa", "sliding_tile", "spatial_full", "dense", "compressed_kv")]
    order = re.findall(r"^\| (\w+) \|", text.split("ordered by loss")[1], re.M)[1:6]
    assert order == ["vsa", "sliding_tile", "spatial_full", "dense", "compressed_kv"]


def test_an_order_is_of_one_step() -> None:
    """What was trained on to a later step is taken where most were; what did not get so far is left out."""
    early, late = (10, 1e9), (20, 2e9)
    losses = {"dense": (0.5, 0.1), "vsa": (0.4, 0.3), "sliding_tile": (0.45, None), "spatial_full": (0.6, None)}
    rows = [
        evaluation("base", method, seed, step, loss, flops)
        for seed in (0, 1)
        for method, found in losses.items()
        for (step, flops), loss in zip((early, late), found)
        if loss is not None
    ]
    rows += [evaluation("base", "compressed_kv", seed, 5, 0.7, 5e8) for seed in (0, 1)]
    rows += [evaluation("base", "dense", seed, 5, 0.8, 5e8) for seed in (0, 1)]
    text = page(rows).split("ordered by loss at step ")[1].split("\n### ")[0]
    order = re.findall(r"^\| (\w+) \|", text, re.M)[1:]
    assert text.startswith("10\n") and order == ["vsa", "sliding_tile", "dense", "spatial_full"]
    assert cells(text, "vsa")[1].startswith("-20.00 %")
    assert "Not trained to step 10, and left out: compressed_kv." in text


def test_equal_flops_as_far_as_a_sparse_run_was_trained() -> None:
    """Where a sparse run ends before dense's FLOPs, dense is read at its own, and the share is said."""
    dense = [(10, 1e9, 0.8), (20, 2e9, 0.6), (40, 4e9, 0.4)]
    rows = [evaluation("base", "dense", 0, *_at(*point)) for point in dense] + [finished("base", "vsa", 0, 40, 0.5)]
    rows += [evaluation("base", "vsa", 0, *_at(*point)) for point in ((20, 1e9, 0.5), (40, 2e9, 0.3))]
    study = Study(rows)
    assert tables.at_equal_flops(study, "base", "vsa") == "-50.00 % (one seed) at 50 % of dense's"
    assert "-50.00 % (one seed) at 50 % of dense's |" in report.readme_block(study)
    assert "At equal FLOPs: -50.00 % (one seed) at 50 % of dense's." in page(rows)
    rows.append(evaluation("base", "vsa", 0, *_at(80, 4e9, 0.2)))
    assert tables.at_equal_flops(Study(rows), "base", "vsa") == "-50.00 % (one seed)"
    assert tables.at_equal_flops(Study(rows), "base", "bsa") == "not run"


def _at(step: int, flops: float, loss: float) -> tuple[int, float, float]:
    """As `evaluation` takes them."""
    return step, loss, flops


def test_parts_are_compared_with_vsa_at_the_same_step() -> None:
    seeds = (0, 1, 2)
    rows = training("base", "vsa", seeds, steps=960) + training("base", "vsa_max", seeds, -0.05, 0.0, question="parts")
    text = page(rows)
    assert cells(text, "vsa_max")[3] == "240" and cells(text, "vsa", tables_parts.PARTS["vsa"])[3] == "240"
    assert cells(text, "vsa_max")[6].startswith("better by") and "0.13929 (+5.83 %)" in cells(text, "vsa_max")
    assert "base/vsa_max: better by" in text and "--only base/vsa/ base/vsa_max/" in text


def test_rules_are_sorted_and_compared_with_the_default_model_by_model() -> None:
    def row(model: str, rule: str, error: float, pruned: float | None) -> Row:
        where = {"size": "base", "model": model, "layer": 0, "level": 0.5}
        more = {"keep_queries": 0.5, "kv_density": None, "density": 0.06, "error": error, "pruned_error": pruned}
        return {"kind": "bsa_rule", "rule": rule, **where, **more}

    rows = [row(f"base/dense/s{s}", "default", 0.1 * (s + 1), 0.3) for s in range(2)]
    rows += [row(f"base/dense/s{s}", "fill=zero", 0.2 * (s + 1) + 0.01 * s, None) for s in range(2)]
    found = tables_probes.rules(Study(rows))
    assert cells(found.parts[1], "fill=zero")[1:7] == [
        "2",
        "0.5",
        "not set",
        "0.060",
        "0.305 (0.200 to 0.410)",
        "none pruned",
    ]
    assert cells(found.parts[1], "fill=zero")[7].startswith("+102.50 %")
    assert found.parts[1].index("| default") < found.parts[1].index("| fill=zero")
    assert "`fill=zero` has the least" in found.answers[0]


def test_loss_without_training_is_against_dense_of_the_same_model() -> None:
    def row(model: str, method: str, loss: float) -> Row:
        more = {"option": 1.0 if method == "dense" else 0.125, "density": 0.1, "loss": loss, "levels": {}}
        return {"kind": "training_free_loss", "size": "base", "model": model, "method": method, **more}

    rows = [row("base/dense/s0", "dense", 0.1), row("base/dense/s1", "dense", 0.2)]
    rows += [row("base/dense/s0", "vsa", 0.11), row("base/dense/s1", "vsa", 0.22)]
    line = cells(tables_probes.training_free(Study(rows)).parts[1], "vsa", "0.125")
    assert line[2:] == ["2", "0.100", "not run", "not run", "+10.00 % (+10.00 to +10.00)"]


def test_schedules_are_compared_with_dense_continued_and_with_each_other() -> None:
    seeds, rows = (0, 1, 2), []
    for method, gap in (("dense_more", 0.0), ("vsa_abrupt", 0.01), ("vsa_annealed", 0.03)):
        rows += training("base", method, seeds, gap, 0.0, steps=96, question="schedule")
    found = tables_schedule.schedules(Study(rows))
    assert cells(found.parts[2], "vsa_annealed", "dense_more")[4].startswith("+3.00 %")
    assert cells(found.parts[2], "vsa_annealed", "vsa_abrupt")[4].startswith(f"{100 * (1.03 / 1.01 - 1):+.2f} %")
    assert cells(found.parts[2], "bsa_annealed", "bsa_abrupt")[4] == "not run"
    assert set(cells(found.parts[1], "bsa_abrupt")[2:]) == {"not run"}
    assert len(found.contradictions) == 1 and "base/vsa_annealed/" in found.contradictions[0][1]
    assert not tables.main_sizes(Study(rows))  # they start from a trained model: no part of question 1


@pytest.mark.parametrize(
    ("values", "says"),
    [((0.6, 0.61), "yes"), ((0.2, 0.21), "no"), ((0.3, 0.8), "too wide to tell"), ((0.6,), "yes, one model")],
)
def test_sharing(values: tuple[float, ...], says: str) -> None:
    rows = [
        {
            "kind": "overlap",
            "size": "base",
            "model": f"base/dense/s{seed}",
            "method": "vsa",
            "axis": "w",
            "layer": 0,
            "level": 0.5,
            "overlap": x,
            "random": 0.125,
        }
        for seed, x in enumerate(values)
    ]
    found = tables_probes.overlap(Study(rows))
    assert cells(found.parts[1], "dense", "vsa", "w")[-1] == says and f"({says})" in found.answers[0]


def test_gap_of_each_noise_level_is_its_own() -> None:
    rows = []
    for seed in range(3):
        for method, high in (("dense", 0.2), ("vsa", 0.3)):
            levels = {"0.4828": 0.1, "0.8198": high}
            rows.append(evaluation("base", method, seed, 60, 0.15, 1e9, levels=levels))
    text = tables.noise_levels(Study(rows)).parts[1]
    assert cells(text, "0.4828")[1:3] == ["0.10000", "+0.00 % (+0.00 to +0.00)"]
    assert cells(text, "0.8198")[2] == "+50.00 % (+50.00 to +50.00)"


def test_a_run_in_two_files_is_the_newer_ones_alone() -> None:
    old = report.File(name="a", header=HEADER, rows=training("base", "dense", (0, 1), steps=480))
    new = report.File(name="b", header=HEADER | {"torch": "8", "preset": "gpu"}, rows=training("base", "dense", (0,)))
    study = report.newest([old, new])
    assert [c.steps[-1] for c in study.curves("base", "dense").values()] == [240, 480]
    assert study.presets == {"base": "gpu"}
    assert "- size base: files differ in torch" in report.page([old, new], [], "plots")


def test_files_are_listed_and_a_study_under_way_is_said_to_be(folder: Folder) -> None:
    rows = training("base", "dense", (0,)) + training("base", "vsa", (0,))
    unfinished = [row for row in rows if row != finished("base", "vsa", 0, 240, 0.15)]
    text = page(unfinished, git_dirty=True, gpu="Made-up GPU")
    line = cells(text, "`a.json`")
    assert (
        line[1:3] == ["cpu", "2030-01-01"] and "abcdef with changes" in line and "Made-up GPU" in line and "9.9" in line
    )
    assert "2 trainings, 1 of them not finished" in text


def test_a_test_run_is_no_evidence() -> None:
    rows = training("smoke", "dense", (0,))
    assert "says nothing about quality" in page(rows, preset="smoke")
    assert "says nothing about quality" not in page(rows, preset="cpu")


def test_each_figure_is_wanted_for_its_own_rows() -> None:
    assert plots.wanted(Study([])) == []
    kinds = {
        "training_free": probed("base", ["base/dense/s0"]),
        "bsa_rules": probed("base", ["base/dense/s0"]),
        "overlap": probed("base", ["base/dense/s0"]),
        "schedule": [
            row for m in ("dense_more", "vsa_abrupt") for row in training("base", m, (0,), question="schedule")
        ],
        "loss_time": [*training("base", "dense", (0,)), timed("base", "vsa", 0.5)],
    }
    kind_of = {"training_free": "training_free", "bsa_rules": "bsa_rule", "overlap": "overlap"}
    for name, rows in kinds.items():
        own = [row for row in rows if row["kind"] == kind_of.get(name, row["kind"])]
        assert name in plots.wanted(Study(own))
        rest = [row for row in everything() if row["kind"] not in (kind_of.get(name), "timing")]
        assert (name in plots.wanted(Study(rest))) == (name == "schedule")


def test_a_plot_without_rows_draws_nothing() -> None:
    for plot in plots.PLOTS.values():
        assert plot(Study([]), None) is False


def test_times_of_figures_are_steps_times_the_median() -> None:
    rows = training("base", "dense", (0,)) + training("base", "vsa", (0,)) + [timed("base", "vsa", 0.5)]
    found = plots.data.against_time(Study(rows))["base"]
    assert found["vsa"][-1][0] == pytest.approx(240 * 0.55) and found["dense"][-1][0] == pytest.approx(240 * 1.1)


def test_the_readme_gets_the_short_table(folder: Folder, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    folder.put("a.json", everything())
    assert folder.main("--readme", str(readme), "--check") == 1
    assert folder.main("--readme", str(readme)) == 0 and folder.main("--readme", str(readme), "--check") == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    lines = [line for line in text.splitlines() if line.startswith("|") and " vsa " in line]
    study = report.newest(report.read(folder.results))
    assert lines and tables.gap_text(tables.against(study, "base", "vsa")) in lines[0]


def test_what_is_committed_is_up_to_date() -> None:
    pytest.importorskip("matplotlib")
    assert report.main(["--check", "--readme", str(report.ROOT / "README.md")]) == 0


def test_the_readme_without_rows() -> None:
    assert "Nothing was trained yet" in report.readme_block(Study([]))


def test_gaps_along_training_and_the_floor() -> None:
    """At each of dense's steps: the gap there, and at the FLOPs that dense took up to there."""
    points = {"dense": [(10, 4e9, 0.4), (20, 8e9, 0.2)], "vsa": [(10, 1e9, 0.44), (20, 2e9, 0.3), (40, 4e9, 0.1)]}
    points["own_tile"] = [(20, 1e9, 0.25)]
    rows = [evaluation("base", m, 0, step, loss, flops) for m, found in points.items() for step, flops, loss in found]
    text = page(rows).split("## Gap along training")[1].split("\n## ")[0]
    assert cells(text, "10")[2:4] == ["+10.00 % (one seed)", "-75.00 % (one seed)"]
    assert cells(text, "20")[2] == "+50.00 % (one seed)" and "not measured" in cells(text, "20")[3]
    assert [cells(text, step)[-1] for step in ("10", "20")] == ["no seed and step in common", "+25.00 % (one seed)"]
    assert "Attention within tiles alone (own_tile) at size base, step 20: loss +25.00 %" in page(rows)
    assert "Whether attention between tiles matters at size base at step 20: not run" in page(rows[:2])


def test_a_seed_that_was_just_started_hides_no_curve() -> None:
    def curve(*steps: int) -> Curve:
        none = (0.0,) * len(steps)
        losses = tuple(1.0 / (1 + step) for step in steps)
        found = {"steps": steps, "flops": none, "attention_flops": none, "losses": losses}
        return Curve(**found, levels={}, windows={}, density=None)

    seeds = {0: curve(0, 80, 160), 1: curve(0, 80, 160), 2: curve(0)}
    assert [point[0] for point in plot_data.band(seeds, lambda _, step: step, 40)] == [80, 160]
    assert [point[0] for point in plot_data.gaps(seeds, {**seeds, 2: curve(0, 80, 160)}, 40)] == [80, 160]
    assert plot_data.band({2: curve(0)}, lambda _, step: step, 40) == []


def test_what_a_file_says_of_itself_is_on_the_page() -> None:
    """Such as that its seeds were added after others had been seen."""
    plain = report.File(name="a", header=HEADER, rows=training("base", "dense", (0,)))
    noted = report.File(name="b", header=HEADER | {"note": "a later seed"}, rows=training("base", "dense", (1,)))
    text = report.page([plain, noted], [], "plots")
    assert "- `b`: a later seed." in text and "- `a`:" not in text
