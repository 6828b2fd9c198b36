"""The study itself: rows, resuming to the same numbers, longer runs, starting from another run's weights, the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.study.__main__ as command
import flexsparse as fs
from bench.study import presets, report, study, train
from bench.study.batch import Batch
from bench.study.clips import Clips
from bench.study.presets import PRESETS, Maker, Preset, Probe, Timing, methods
from bench.study.rows import KEYS, Results, describe, load
from bench.study.settings import Method, Run, Size
from bench.study.study import Study
from flexsparse.training.checkpoint import load_checkpoint
from flexsparse.training.errors import RunError

TINY = Size(name="tiny", dim=16, depth=2, heads=1, patch=8, frames=4, height=64, width=64)
KNOWN = methods(1)
MAKE = Maker(size=TINY, steps=4, every=2, known=KNOWN)


def runs(*names: str, seeds: tuple[int, ...] = (0,), steps: int = 4, question: str = "main") -> list[Run]:
    return list(MAKE.runs(names, seeds, question, steps))


READ: dict[str, dict[str, Any]] = {"_clips": {}, "_held_out": {}}
"""The clips, read once for all tests."""


def make(out: Path, *items: Any, **how: Any) -> Study:
    lines: list[str] = []
    preset = Preset(name="test", items=tuple(items), windows=1)
    made = Study(preset=preset, out=out, say=lines.append, **READ, **how)
    made.lines = lines  # type: ignore[attr-defined]
    return made


def rows_of(out: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in load(out / "study.json")[1] if row["kind"] == kind]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_run_leaves_rows_weights_and_a_sample(tmp_path: Path) -> None:
    assert make(tmp_path, *runs("dense", "vsa", "bsa")).run()
    found = rows_of(tmp_path, "evaluation")
    assert [(row["method"], row["step"]) for row in found] == [
        (m, s) for m in ("dense", "vsa", "bsa") for s in (0, 2, 4)
    ]
    for row in found:
        assert set(row) == {
            *("kind", "run", "size", "method", "seed", "question", "step", "flops", "attention_flops"),
            *("loss", "levels", "windows", "density"),
        }
        assert row["loss"] == pytest.approx(sum(row["levels"].values()) / 5, rel=1e-5)
        assert len(row["levels"]) == 5 and len(row["windows"]) == 1
    by_method = {row["method"]: row for row in found if row["step"] == 4}
    assert by_method["dense"]["density"] == 1
    assert by_method["vsa"]["density"] == pytest.approx(1 / 4)  # one tile of 1 x 2 x 2
    assert by_method["vsa"]["attention_flops"] < 0.5 * by_method["dense"]["attention_flops"]
    assert len({row["loss"] for row in found if row["step"] == 0}) < 3  # the same weights; gates are zero
    ends = {row["method"]: row for row in rows_of(tmp_path, "run")}
    for name, row in ends.items():
        parts = row["flops_per_step"]
        assert sum(parts[part] for part in ("attention", "selection", "other")) == pytest.approx(parts["total"])
        assert parts["total"] * 4 == pytest.approx(by_method[name]["flops"], rel=1e-6)
        assert row["steps"] == 4 and len(row["train_loss"]) == 4
        assert row["dense_flops_per_step"] == pytest.approx(ends["dense"]["flops_per_step"]["total"])
        folder = tmp_path / "runs" / row["run"]
        assert (folder / "sample.png").read_bytes()[:4] == b"\x89PNG" and train.weights_of(folder, 4).is_file()


def test_methods_and_seeds_see_the_data_that_they_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    batch = Clips.batch

    def note(self: Clips, seed: int, step: int) -> Batch:
        asked.append((seed, step))
        return batch(self, seed, step)

    monkeypatch.setattr(Clips, "batch", note)
    made = make(tmp_path, *runs("dense", "vsa", seeds=(0, 1), steps=2))
    made.run()
    assert asked == [(seed, step) for seed in (0, 0, 1, 1) for step in (0, 1)]  # dense and vsa of each seed
    clips = made._clips_of(TINY)
    assert torch.equal(clips.batch(0, 3).noisy, clips.batch(0, 3).noisy)
    assert not torch.equal(clips.batch(0, 3).noisy, clips.batch(1, 3).noisy)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("method", [pytest.param("dense", marks=SLOW), pytest.param("vsa", marks=SLOW), "bsa_annealed"])
def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path: Path, method: str) -> None:
    item = dataclasses.replace(runs("dense", steps=6)[0], method=KNOWN[method])
    assert make(tmp_path / "whole", item).run()
    calls = iter(range(100))
    cut = make(tmp_path / "cut", item, interrupted=lambda: next(calls) >= 3)  # asked between items, and after each step
    assert not cut.run()
    assert "run the same command again" in cut.lines[-1]  # type: ignore[attr-defined]
    assert rows_of(tmp_path / "cut", "run") == []
    again = make(tmp_path / "cut", item)
    assert again.run()
    assert any("goes on after step 3" in line for line in again.lines)  # type: ignore[attr-defined]
    for kind in ("evaluation", "run"):
        assert rows_of(tmp_path / "cut", kind) == rows_of(tmp_path / "whole", kind)
    one, other = (
        load_checkpoint(train.weights_of(tmp_path / part / "runs" / item.name, 6)).tensors for part in ("whole", "cut")
    )
    assert all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()


@pytest.mark.parametrize("method", [pytest.param("dense", marks=SLOW), "vsa", pytest.param("bsa", marks=SLOW)])
def test_low_precision_trains_about_the_same(tmp_path: Path, method: str) -> None:
    for bf16 in (False, True):
        assert make(tmp_path / str(bf16), *runs(method), bf16=bf16).run()
    whole, low = ([row["loss"] for row in rows_of(tmp_path / str(bf16), "evaluation")] for bf16 in (False, True))
    assert whole != low and low == pytest.approx(whole, rel=0.02)
    with pytest.raises(RunError, match="bf16 True, and now it is False"):
        make(tmp_path / "True", *runs(method), bf16=False).run()


def test_the_learning_rate_warms_up_and_stays() -> None:
    training = train.start(runs("dense")[0], 3, device="cpu", compiled=False, weights=None)
    video = torch.zeros(1, 3, TINY.frames, TINY.height, TINY.width)
    batch = Batch(clean=video, noise=video + 1, t=torch.tensor([0.5]))
    rates = []
    for number in (0, 9, 19, 500):
        train.step(training, batch, number)
        rates.append(training.optimizer.param_groups[0]["lr"] / TINY.learning_rate)
    assert rates == pytest.approx([0.05, 0.5, 1, 1])


def test_flops_between_evaluations_are_the_mean_of_both(tmp_path: Path) -> None:
    item = dataclasses.replace(runs("dense", steps=2)[0], method=KNOWN["bsa_annealed"])
    assert make(tmp_path, item).run()
    state = load_checkpoint(tmp_path / "runs" / item.name / train.CHECKPOINT).state["progress"]
    (_, *_, first), (_, *_, last) = state["measured"]
    assert first > last  # all tiles, then few
    assert rows_of(tmp_path, "evaluation")[-1]["flops"] == pytest.approx(2 * (first + last) / 2)


def test_a_longer_run_continues_the_shorter_one(tmp_path: Path) -> None:
    short, longer = runs("vsa", steps=4)[0], runs("vsa", steps=6)[0]
    assert make(tmp_path / "both", short, longer).run()
    assert make(tmp_path / "one", longer).run()
    both, one = (rows_of(tmp_path / name, "evaluation") for name in ("both", "one"))
    assert both == one and [row["step"] for row in both] == [0, 2, 4, 6]
    assert rows_of(tmp_path / "both", "run") == rows_of(tmp_path / "one", "run")
    assert train.weights_of(tmp_path / "both" / "runs" / short.name, 4).is_file()


def test_what_is_on_file_is_not_done_again(tmp_path: Path) -> None:
    items = [*runs("dense"), Timing(size=TINY, methods=(KNOWN["vsa"],), repeats=2), Probe(run=runs("dense")[0])]
    assert make(tmp_path, *items).run()
    before = (tmp_path / "study.json").read_text()
    again = make(tmp_path, *items)
    assert again.run() and again.lines == []  # type: ignore[attr-defined]
    assert (tmp_path / "study.json").read_text().split('"rows"')[1] == before.split('"rows"')[1]


def test_finetunes_start_from_the_dense_weights(tmp_path: Path) -> None:
    parent = runs("dense")[0]
    children = [
        dataclasses.replace(
            runs("dense", steps=2)[0], method=KNOWN[name], start=f"{parent.name}@4", question="schedule"
        )
        for name in ("dense_more", "vsa_abrupt", "bsa_annealed")
    ]
    assert make(tmp_path, parent, *children).run()
    found = {(row["method"], row["step"]): row for row in rows_of(tmp_path, "evaluation")}
    assert found["dense_more", 0]["loss"] == pytest.approx(found["dense", 4]["loss"], rel=1e-6)
    assert found["bsa_annealed", 0]["loss"] == pytest.approx(found["dense", 4]["loss"], rel=1e-4)  # dense still
    assert found["bsa_annealed", 0]["density"] == 1 and found["bsa_annealed", 2]["density"] < 0.5
    assert found["vsa_abrupt", 0]["density"] == 0.25  # the least that 4 tiles allow
    assert found["vsa_abrupt", 0]["loss"] != found["dense", 4]["loss"]


def test_a_finetune_without_its_start_is_left_out(tmp_path: Path) -> None:
    child = dataclasses.replace(runs("dense", steps=2)[0], method=KNOWN["dense_more"], start="tiny/dense/s0@4")
    made = make(tmp_path, child)
    assert made.run()
    assert any("tiny/dense/s0 has not been trained to step 4" in line for line in made.lines)  # type: ignore[attr-defined]
    assert rows_of(tmp_path, "run") == []


def test_probes_and_timing_write_their_rows(tmp_path: Path) -> None:
    main = runs("dense", "vsa")
    items = [
        *main,
        *(Probe(run=run) for run in main),
        Timing(size=TINY, methods=(KNOWN["dense"], KNOWN["vsa"]), repeats=3),
    ]
    assert make(tmp_path, *items).run()
    for kind in KEYS:
        assert rows_of(tmp_path, kind), kind
    (row,) = rows_of(tmp_path, "timing")
    assert row["method"] == "vsa" and len(row["seconds"]) == len(row["dense_seconds"]) == 3
    assert {row["model"] for row in rows_of(tmp_path, "overlap")} == {"tiny/dense/s0", "tiny/vsa/s0"}


def test_results_of_other_conditions_are_refused(tmp_path: Path) -> None:
    assert make(tmp_path, *runs("dense", steps=2)).run()
    before = (tmp_path / "study.json").read_bytes()
    found = json.loads(before)
    found["header"]["threads"] = 64
    (tmp_path / "study.json").write_text(json.dumps(found))
    with pytest.raises(RunError, match=r"threads 64, and now it is 1: .* pass another --out"):
        make(tmp_path, *runs("dense", steps=2)).run()


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    assert make(tmp_path, *runs("vsa", steps=2)).run()
    other = dataclasses.replace(KNOWN["vsa"], builder=fs.VSA(top_k=2))
    with pytest.raises(RunError, match=r"checkpoint of tiny/vsa/s0 was made with other settings"):
        make(tmp_path, dataclasses.replace(runs("vsa", steps=4)[0], method=other)).run()


def test_no_result_file_of_a_study(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text('{"header": {"suite": "gpu"}, "rows": []}')
    with pytest.raises(RunError, match=r"no result file of a study .*'gpu'"):
        Results(tmp_path / "study.json", describe(preset="x", data="", device="cpu", threads=1, compiled=False))


def test_a_diverging_run_says_so(tmp_path: Path) -> None:
    """The study goes on with the next one, and does not try again."""
    size = dataclasses.replace(TINY, learning_rate=float("nan"))
    items = [dataclasses.replace(runs("dense")[0], size=size), *runs("vsa")]
    made = make(tmp_path, *items)
    assert made.run() and any("diverged at step 2" in line for line in made.lines)  # type: ignore[attr-defined]
    assert [(row["step"], row["loss"] is None) for row in rows_of(tmp_path, "evaluation")[:2]] == [
        (0, False),
        (2, True),
    ]
    bad, good = rows_of(tmp_path, "run")
    assert (bad["finished"], bad["diverged"], good["finished"]) == (False, 2, True)
    again = make(tmp_path, *items)
    assert again.run() and again.lines == []  # type: ignore[attr-defined]
    page = report.page([report.File(name="a.json", header={}, rows=load(tmp_path / "study.json")[1])], [], "plots")
    assert "1 of 1 seeds diverged" in page


def test_a_checkpoint_without_its_rows_starts_again(tmp_path: Path) -> None:
    assert make(tmp_path, *runs("dense", steps=4)).run()
    whole = rows_of(tmp_path, "evaluation")
    (tmp_path / "study.json").unlink()
    made = make(tmp_path, *runs("dense", steps=4))
    assert made.run() and any("its rows are gone: starts again" in line for line in made.lines)  # type: ignore[attr-defined]
    assert rows_of(tmp_path, "evaluation") == whole


def test_a_run_that_is_further_is_left_alone(tmp_path: Path) -> None:
    assert make(tmp_path, *runs("dense", steps=6)).run()
    rows = load(tmp_path / "study.json")[1]
    Results(tmp_path / "other.json", {}).put(*(row for row in rows if row["kind"] != "run"))
    (tmp_path / "study.json").unlink()
    (tmp_path / "other.json").rename(tmp_path / "study.json")
    found = json.loads((tmp_path / "study.json").read_text())
    made = make(tmp_path, *runs("dense", steps=4))
    found["header"] |= made._header(made._clips_of(TINY))
    (tmp_path / "study.json").write_text(json.dumps(found))
    assert made.run() and "left out: it has been trained further than that" in made.lines[-1]  # type: ignore[attr-defined]
    assert not train.weights_of(tmp_path / "runs" / "tiny/dense/s0", 4).exists()


def test_time_is_up(tmp_path: Path) -> None:
    made = make(tmp_path, *runs("dense"), seconds=0.0)
    assert not made.run()
    assert rows_of_or_none(tmp_path) == []


def rows_of_or_none(out: Path) -> list[Any]:
    return load(out / "study.json")[1] if (out / "study.json").exists() else []


def test_runs_that_are_on_file_can_be_continued() -> None:
    """A run goes on from its checkpoint where this is the same: those of bench/results/study were trained under it."""
    first = PRESETS["cpu"]().items[0]
    assert isinstance(first, Run) and first.name == "small/dense/s0"
    assert first.digest() == "c49e768b7e5186fb4941caf1a82e03e800d9f356c3ab43d44ff23a09d693b5f4"


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_fit_their_sizes(name: str) -> None:
    preset = PRESETS[name]()
    seen: dict[str, Run] = {}
    trained: set[tuple[str, int]] = set()
    for item in preset.items:
        if isinstance(item, Run):
            if item.parent is not None:  # what it starts from comes before it
                assert item.parent in trained
            if item.name in seen:  # longer, and otherwise the same
                assert item.steps > seen[item.name].steps and item.digest() == seen[item.name].digest()
            seen[item.name] = item
            trained.add((item.name, item.steps))
            study.models.check(item.size, item.method, 3)
            if item.method.attention == "sparse" and item.method.tile != "auto":
                layout = fs.TileLayout(grid=item.size.grid, tile=item.method.tile)
                item.method.builder.check(layout, layout)
        elif isinstance(item, Probe):
            assert (item.run.name, item.run.steps) in trained
    assert {"dense", "vsa", "bsa"} <= {run.method.name for run in seen.values()}


def test_the_presets_are_of_the_sizes_that_were_asked_for() -> None:
    cpu, gpu = PRESETS["cpu"](), PRESETS["gpu"]()
    assert presets.BASE.grid == (16, 16, 16) and {size.name for size in cpu.sizes} == {"base", "odd", "small"}
    assert all(size.grid == (16, 32, 32) for size in gpu.sizes)
    for size, low, high in ((presets.M60, 55e6, 65e6), (presets.M120, 115e6, 135e6)):
        with torch.device("meta"):
            model = study.models.make(size, Method(name="dense", attention="dense"), 0, 3)
        assert low < study.models.count_parameters(model) < high
    seeds = {(run.size.name, run.method.name, run.seed) for run in cpu.items if isinstance(run, Run)}
    for method in ("dense", "vsa", "bsa", "own_tile"):
        assert {seed for size, name, seed in seeds if (size, name) == ("small", method)} == {0, 1, 2, 3, 4, 5}
    for method in ("fine_only", "top_p", "sliding_tile", "spatial_temporal"):
        assert {seed for size, name, seed in seeds if (size, name) == ("small", method)} == {0, 1, 2}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--preset", "cpu", "--list", "--only", "small/vsa/s0"]) == 0
    assert capsys.readouterr().out.split() == [
        *("small/vsa/s0@960", "probe/small/vsa/s0@960", "small/vsa/s0@2880"),
    ]
    assert command.main(["--preset", "cpu", "--list", "--only", "base/vsa/s2@1040", "timing/base"]) == 0
    assert capsys.readouterr().out.split() == ["timing/base", "base/vsa/s2@1040"]  # of what stands twice, one
    assert command.main(["--out", str(tmp_path), "--only", "smoke/", "nothing"]) == 1
    assert "--only 'nothing' matches nothing in preset smoke: it has smoke/dense/s0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main([])
    assert "give --out DIR" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--out", str(tmp_path), "--minutes", "0"])
    assert "--minutes 0.0 is not positive" in capsys.readouterr().err
    before = torch.get_num_threads()
    assert (
        command.main(["--out", str(tmp_path), "--only", "smoke/dense/s0", "--minutes", "0.001", "--threads", "1"]) == 3
    )
    torch.set_num_threads(before)
    missing = ["--out", str(tmp_path / "x"), "--data", str(tmp_path / "absent"), "--only", "timing"]
    assert command.main(missing) == 1
    assert "absent" in capsys.readouterr().err


def test_the_smoke_preset_and_its_page(tmp_path: Path) -> None:
    """Every kind of item once, by the command; the page has every section's numbers."""
    assert command.main(["--preset", "smoke", "--out", str(tmp_path), "--threads", "1"]) == 0
    found = load(tmp_path / "study.json")[1]
    assert {row["kind"] for row in found} == set(KEYS)
    assert {row["question"] for row in found if row["kind"] == "run"} == {"main", "schedule"}
    text = report.page(report.read(tmp_path), [], "plots")
    assert "a test that says nothing about quality" in text
    assert text.split("## What was not shown")[0].count("\n- ") > 10
