"""A whole run of the GPU suite in its parts, with the CPU in the GPU's place and the processes in this one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from suite_helpers import BASELINES, Recorder, case
from test_gpu_suite_tuning import FakeChoice, FakeTable, of_file

from bench import gpu_suite
from bench.header import ROOT
from bench.suite import checks, supervise, tuning, warm
from bench.suite.runner import Budget, Run

TESTS = """
import pytest

@pytest.mark.parametrize("D", [64, 96])
def test_it(D): assert D == 64
"""


def test_first_checks_then_the_first_cases_then_tuning_then_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = tmp_path / "test_some.py"
    tests.write_text(TESTS)
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "gpu" / "conftest.py").read_text())
    first, other, wide = (
        case("first", "fine_forward", early=True),
        case("other", "fine_forward", D=32),
        case("wide", "fine_forward", D=96),
    )
    tuned = case("tune-it", "fine_forward", baselines=())
    parts: list[tuple[str, list[list[str]]]] = []
    out = tmp_path / "out"

    def process(command: Sequence[str], path: Path, until: float, skip: Any = None) -> int:
        arguments = list(command[command.index("bench.gpu_suite") + 1 :])
        part = arguments[arguments.index("--part") + 1]
        parts.append((part, skip))
        supervise.State(until=until, skip=[*skip, ["other", "somewhere", "it hung"]]).write(path)
        found = gpu_suite.main(arguments)
        if part == "early":
            assert [row["case"] for row in of_file(out / "bench.json")] == ["first"] * 3
            assert not (out / "tune.json").exists()
            names = {row["case"].split("::")[-1] for row in of_file(out / "check.json")}
            assert names == {"test_it[64]"}, "the rarer ones come last"
        return found

    monkeypatch.setattr(gpu_suite.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_suite, "Cuda", Recorder)
    monkeypatch.setattr(gpu_suite, "all_cases", lambda: [first, other, wide])
    monkeypatch.setattr(gpu_suite, "tuned_cases", lambda: [tuned])
    monkeypatch.setattr(gpu_suite, "baselines_of", lambda directory: BASELINES)
    monkeypatch.setattr(gpu_suite, "REST_SECONDS", 0.0)
    monkeypatch.setattr(gpu_suite.supervise, "supervise", process)
    monkeypatch.setattr(warm, "run", lambda tasks, seconds: len(tasks))
    monkeypatch.setattr(checks, "WORKERS", 1)
    monkeypatch.setattr(checks, "SANITIZER", "no-such-sanitizer")
    table = FakeTable(FakeChoice(0), FakeChoice(1))
    monkeypatch.setattr(tuning, "table", lambda: table)
    monkeypatch.setattr(tuning, "winner", lambda rows, choices: tuning.Winners(choices=(choices[-1],)))
    assert gpu_suite.main(["--out", str(out), "--minutes", "30"], tests=tests) == 1, "a check failed"
    assert [part for part, _ in parts] == ["early", "rest"]
    assert parts[0][1] == [] and parts[1][1] == [["other", "somewhere", "it hung"]], "what was died of is kept"
    found = {row["case"]: row for row in of_file(out / "bench.json", lambda row: row["impl"] == "flexsparse")}
    assert found["first"]["tuned"] and found["first"]["ms"] and found["other"]["ms"] and found["other"]["checked"]
    assert found["wide"]["ms"] is None and "test_it[96] failed" in found["wide"]["reason"], "taken back"
    outcomes = {row["case"].split("::")[-1]: row["outcome"] for row in of_file(out / "check.json")}
    assert outcomes["test_it[64]"] == "passed" and outcomes["test_it[96]"] == "failed" and len(outcomes) == 4


class Ended(BaseException):
    """Stands in for the end of the process."""


def test_a_compiler_of_others_that_takes_all_the_time_takes_no_numbers(tmp_path: Path) -> None:
    """Ours and dense attention are timed and written before it begins; the case is run again as a whole, once."""

    def slow(problem: Any, training: bool) -> Any:
        raise Ended

    def run(baselines: dict[str, Any]) -> Run:
        found = Run(device=Recorder(), out=tmp_path, head={}, budget=Budget(until=1e18), baselines=baselines)
        found.say = lambda text: None
        return found

    first = case("first", "fine_forward", early=True)
    with pytest.raises(Ended):
        run({**BASELINES, "fastvideo_tk": slow}).run_bench([first], last=False)
    found = {row["impl"]: row for row in of_file(tmp_path / "bench.json")}
    assert found["flexsparse"]["ms"] and found["dense_cudnn"]["ms"] and found["flexsparse"]["checked"]
    assert found["fastvideo_tk"]["reason"] == "the time was over before its turn"
    assert all(row["partial"] for row in found.values())

    rest = run(BASELINES)
    rest.rows["bench"] = list(found.values())
    rest.run_bench([first])
    again = {row["impl"]: row for row in of_file(tmp_path / "bench.json")}
    assert again.keys() == found.keys() and not any("partial" in row for row in again.values())
    assert "not installed" in again["fastvideo_tk"]["reason"] and again["flexsparse"]["ms"]
    rest.device.rounds.clear()
    rest.run_bench([first])
    assert rest.device.rounds == []


def test_what_was_kept_stays_where_there_is_no_time_for_the_whole(tmp_path: Path) -> None:
    first = case("first", "fine_forward", early=True)
    run = Run(device=Recorder(), out=tmp_path, head={}, budget=Budget(until=0.0), baselines=BASELINES)
    run.say = lambda text: None
    run.rows["bench"] = [first.row("fine_forward", "flexsparse", ms=[1.0], checked=True, partial=True)]
    run.run_bench([first])
    (row,) = of_file(tmp_path / "bench.json")
    assert row["ms"] == [1.0]
