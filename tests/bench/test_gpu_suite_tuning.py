"""The suite's stage `tune`, and the table that it writes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from suite_helpers import case, of, run

from bench import tune
from bench.suite import (
    cases,
    fine,
    rows,
    tuning,
)
from bench.suite.device import Host


@dataclasses.dataclass(frozen=True)
class FakeChoice:
    number: int

    def config(self) -> dict[str, Any]:
        return {"kernel": "triton", "number": self.number}


class FakeTable:
    """Stands in for `templates.tuned`."""

    def __init__(self, *choices: FakeChoice) -> None:
        self.choices, self.forced, self.written = list(choices), [], []

    def candidates(self, *key: Any) -> list[FakeChoice]:
        return self.choices

    def using(self, choice: FakeChoice) -> Any:
        table = self

        class Forced:
            def __enter__(self) -> None:
                table.forced.append(choice)

            def __exit__(self, *_: Any) -> None:
                table.forced.pop()

        return Forced()

    def write_table(self, found: Any, source: str) -> None:
        self.written.append((found, source))


def test_the_fastest_right_candidate_wins_and_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = FakeTable(FakeChoice(0), FakeChoice(1), FakeChoice(2))
    ticks, right, seen = [0.0], fine.ours, []

    def ours(problem: Any, training: bool) -> Any:
        attend = right(problem, training)

        def run_(q: Any, k: Any, v: Any) -> Any:
            number = table.forced[-1].number if table.forced else 9
            seen.append(number)
            ticks[0] += {0: 3.0, 1: 2.0, 2: 1.0, 9: 7.0}[number]
            return attend(q, k, v) * (1.1 if number == 2 else 1.0)  # the fastest is wrong

        return run_

    monkeypatch.setattr(fine, "ours", ours)
    monkeypatch.setattr(tuning, "table", lambda: table)
    tuned, after = case("tune-it", "fine_forward", baselines=()), case("after", "fine_forward")
    device = Host(clock=lambda: ticks[0])
    monkeypatch.setattr(tune, "RESULTS", tmp_path)
    code, result = run(tmp_path, after, tuned=[tuned], device=device, arguments=("--only", "tune", "bench"))
    header, found = rows.load(tmp_path / "tune.json")
    assert [row["config"]["number"] for row in found] == [0, 1, 2]
    assert [bool(row["ms"]) for row in found] == [True, True, False] and code == 1
    assert (
        of(result, "fine_forward")["config"] == {"kernel": "triton", "number": 1} and seen[-1] == 1 and not table.forced
    )
    monkeypatch.setattr(tuning, "table", lambda: table)
    assert tune.main([str(tmp_path / "tune.json")]) == 0
    (((entry,), source),) = table.written
    assert (entry["arch"], entry["dtype"], entry["D"], entry["slots"]) == ("host", "fp32", 16, 64)
    assert entry["number"] == 1 and source == "tune.json" and header["arch"] == "host"
    table.choices = [FakeChoice(5)]
    assert tune.main([str(tmp_path / "tune.json")]) == 1  # measured under other candidates


def test_the_real_table_takes_what_tuning_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = pytest.importorskip("flexsparse.compile_passes.templates.tuned")
    monkeypatch.setattr(tuned, "TABLE", tmp_path / "tuned.json")
    (tmp_path / "tuned.json").write_text("[]")
    monkeypatch.setattr(tune, "RESULTS", tmp_path)
    best = tuned.candidates("sm_90a", torch.bfloat16, 128, 64, 64)[1]
    one = cases.tuned_cases()[0]
    row = one.row("fine_forward", "flexsparse", ms=[1.0, 2.0], checked=True, config=best.config())
    slower = {**row, "ms": [3.0], "config": tuned.candidates("sm_90a", torch.bfloat16, 128, 64, 64)[0].config()}
    wrong = {**row, "ms": [0.1], "checked": False, "config": slower["config"]}
    rows.write(tmp_path / "run.json", {"arch": "sm_90a"}, [slower, row, {**slower, "ms": [2.0]}, wrong])
    assert tune.main([str(tmp_path / "run.json")]) == 0
    found = tuned.chosen("sm_90a", torch.bfloat16, 128, 64, 64)
    tuned._table.cache_clear()
    assert found.config() == best.config() and found.source == "run.json"
    assert tune.main([str(Path(__file__))]) == 1
