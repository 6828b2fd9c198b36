"""The suite's stage `tune`, and the table that it writes."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from suite_helpers import BASELINES, Recorder, case, of, run

import flexsparse as fs
from bench import gpu_suite, tune
from bench.suite import (
    attention,
    cases,
    checks,
    fine,
    measures,
    rows,
    tuning,
    warm,
)
from bench.suite.cases import OURS
from bench.suite.contender import Contender, Missing
from bench.suite.device import Host
from bench.suite.runner import Budget, Run


@dataclasses.dataclass(frozen=True)
class FakeChoice:
    number: int
    op: str = "forward"

    def config(self) -> dict[str, Any]:
        return {"op": self.op, "kernel": "triton", "number": self.number}


class FakeTable:
    """Stands in for `templates.tuned`."""

    OPS = ("forward", "dq", "dkdv")

    def __init__(self, *choices: FakeChoice) -> None:
        self.choices, self.forced, self.written, self.only = list(choices), [], [], []

    def candidates(self, arch: str, dtype: Any, D: int, rows: int, slots: int, op: str) -> list[FakeChoice]:
        return [choice for choice in self.choices if choice.op == op]

    def using(self, choice: FakeChoice, only: Any = None) -> Any:
        table = self
        table.only.append(only)

        class Forced:
            def __enter__(self) -> None:
                table.forced.append(choice)

            def __exit__(self, *_: Any) -> None:
                table.forced.pop()

        return Forced()

    @contextlib.contextmanager
    def unforced(self) -> Any:
        before, self.forced[:] = self.forced[:], []
        yield
        self.forced[:] = before

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
    assert of(result, "fine_forward")["config"] == FakeChoice(1).config() and seen[-1] == 1 and not table.forced
    monkeypatch.setattr(tuning, "table", lambda: table)
    assert tune.main([str(tmp_path / "tune.json")]) == 0
    (((entry,), source),) = table.written
    assert (entry["arch"], entry["dtype"], entry["D"], entry["slots"]) == ("host", "fp32", 16, 64)
    assert entry["number"] == 1 and source == "tune.json" and header["arch"] == "host"
    table.choices = [FakeChoice(5)]
    assert tune.main([str(tmp_path / "tune.json")]) == 1  # measured under other candidates


def test_a_candidate_whose_check_failed_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = FakeTable(FakeChoice(0), FakeChoice(1))
    monkeypatch.setattr(tuning, "table", lambda: table)
    about = {"guards": [], "D": 16, "dtype": "float32", "slots": 64, "choice": FakeChoice(1).config()}
    path = tmp_path / "check.json"
    failed = checks.check_row("test_a_candidate[1]", "failed", "it is wrong", **about)
    rows.write(path, {"sources": gpu_suite.sources(), "gpu": None}, [failed])
    tuned, after = case("tune-it", "fine_forward", baselines=()), case("after", "fine_forward")
    arguments = ("--only", "tune", "bench", "--checks", str(path))
    code, result = run(tmp_path / "out", after, tuned=[tuned], arguments=arguments)
    _, found = rows.load(tmp_path / "out" / "tune.json")
    assert [(row["config"]["number"], bool(row["ms"])) for row in found] == [(0, True), (1, False)] and code == 1
    assert "test_a_candidate[1] failed" in found[1]["reason"]
    assert of(result, "fine_forward")["ms"] and of(result, "fine_forward")["config"]["number"] == 0


@dataclasses.dataclass(frozen=True)
class Kind(FakeChoice):
    kernel: str = "triton"

    def config(self) -> dict[str, Any]:
        return {"op": self.op, "kernel": self.kernel, "number": self.number}


def of_file(path: Path, only: Any = lambda row: True) -> list[rows.Row]:
    return [row for row in rows.load(path)[1] if only(row)]


@pytest.mark.parametrize("how", ["check", "tune"])
def test_a_kernel_that_hangs_once_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Neither with other numbers; the op's default and other kernels are."""
    hopper = [Kind(number, kernel="hopper") for number in (2, 3)]
    table = FakeTable(Kind(0), Kind(1), *hopper, Kind(4, "dq"))
    monkeypatch.setattr(tuning, "table", lambda: table)
    run_ = Run(device=Recorder(), out=tmp_path, head={}, budget=Budget(until=1e18), baselines={})
    run_.say = lambda text: None
    one = case("tune-it", "fine_forward", baselines=())
    if how == "check":
        about = {"guards": [], "D": 16, "dtype": "float32", "slots": 64, "choice": hopper[0].config()}
        reason = "worker 'gw3' crashed while running 'test_it'"
        run_.checked = [checks.check_row("test_it", "failed", reason, **about)]
    else:
        name = f"flexsparse/fine_forward///{tuning.name_of(hopper[0])}"
        run_.skip = {("tune-it", name): "it hung: nothing for 30 s"}
    run_.run_tune([one], 1.0)
    found = {row["config"]["number"]: row for row in of_file(tmp_path / "tune.json")}
    assert all(found[number]["ms"] for number in (0, 1, 4)) and not any(found[n]["ms"] for n in (2, 3))
    assert "test_it" in found[3]["reason"] if how == "check" else "another of the same kernel" in found[3]["reason"]


def test_what_was_timed_before_tuning_is_timed_again_with_the_winner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = FakeTable(FakeChoice(0), FakeChoice(1))
    monkeypatch.setattr(tuning, "table", lambda: table)
    run_ = Run(device=Recorder(), out=tmp_path, head={}, budget=Budget(until=1e18), baselines=BASELINES)
    run_.say = lambda text: None
    first, other = case("first", "fine_forward", early=True), case("other", "fine_forward", D=32)
    gpu_suite.work(run_, ["tune", "bench"], [first, other], [], "early")
    (before,) = of_file(tmp_path / "bench.json", lambda row: row["impl"] == "flexsparse")
    assert before["case"] == "first" and before["ms"] and before["config"] is None
    run_.winners = {tuning.key_of(first): tuning.Winners(choices=(FakeChoice(0),))}
    run_.run_bench([first], last=False)
    assert of_file(tmp_path / "bench.json", lambda row: row["impl"] == "flexsparse") == [before], "the default won"
    run_.winners = {tuning.key_of(first): tuning.Winners(choices=(FakeChoice(1),))}
    gpu_suite.work(run_, ["bench"], [first, other], [], "rest")
    found = {row["case"]: row for row in of_file(tmp_path / "bench.json", lambda row: row["impl"] == "flexsparse")}
    assert found["first"]["tuned"] and found["first"]["config"] == FakeChoice(1).config() and found["first"]["ms"]
    assert found["other"]["ms"] and "tuned" not in found["other"]
    again = of_file(tmp_path / "bench.json")
    gpu_suite.work(run_, ["bench"], [first, other], [], "rest")
    assert of_file(tmp_path / "bench.json") == again, "once"


def test_rows_from_before_tuning_stay_where_the_winner_cannot_be_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, right = FakeTable(FakeChoice(0), FakeChoice(1)), fine.ours

    def ours(problem: Any, training: bool) -> Any:
        if table.forced:
            raise RuntimeError("no shared memory for this")
        return right(problem, training)

    monkeypatch.setattr(fine, "ours", ours)
    monkeypatch.setattr(tuning, "table", lambda: table)
    run_ = Run(device=Recorder(), out=tmp_path, head={}, budget=Budget(until=1e18), baselines=BASELINES)
    run_.say = lambda text: None
    first = case("first", "fine_forward", early=True)
    run_.run_bench([first], last=False)
    run_.winners = {tuning.key_of(first): tuning.Winners(choices=(FakeChoice(1),))}
    run_.run_bench([first])
    (row,) = of_file(tmp_path / "bench.json", lambda row: row["impl"] == "flexsparse")
    assert row["ms"] and row["checked"] and "no shared memory" in row["retried"]


def test_all_that_tune_runs_is_compiled_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each candidate once, under its own choice, with a backward where its op needs one; what raises stops no other."""
    table = FakeTable(FakeChoice(0), FakeChoice(1), FakeChoice(0, "dq"), FakeChoice(1, "dkdv"))
    right, seen = fine.ours, []

    def ours(problem: Any, training: bool) -> Any:
        (choice,) = table.forced
        seen.append((choice.op, choice.number, training, int(problem.selection.counts.max())))
        assert choice != FakeChoice(1)
        return right(problem, training)

    monkeypatch.setattr(fine, "ours", ours)
    monkeypatch.setattr(tuning, "table", lambda: table)
    some = [case("tune-it", "fine_forward"), case("tune-other", "fine_forward", D=32)]
    tasks = warm.tasks_of(some, Host(), {"tune-other": {str(FakeChoice(0).config()): "it is wrong"}})
    assert tasks == [("tune-it", n) for n in range(-1, 4)] + [("tune-other", n) for n in (-1, 1, 2, 3)]
    warm.work(tasks, some, Host())
    kept = some[0].builder.tiles_kept(some[0].layout.num_tiles)
    both = [("forward", 0, False, kept), ("forward", 1, False, kept), ("dq", 0, True, kept), ("dkdv", 1, True, kept)]
    assert seen == both + both[1:]


def test_compiling_ahead_takes_no_longer_than_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "cores", lambda: 5)
    done = f"from pathlib import Path; import json, sys, time; Path({str(tmp_path)!r}, sys.argv[2]).touch()"
    hang = (
        "; time.sleep(60 * (sys.argv[2] == '1')); assert sys.argv[3] == '3' and len(json.load(open(sys.argv[1]))) == 4"
    )
    started = time.monotonic()
    assert warm.run([("a", n) for n in range(4)], 5.0, (sys.executable, "-c", done + hang)) == 2
    assert time.monotonic() - started < 30 and sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]


def test_each_op_has_its_own_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = [FakeChoice(number, "dq") for number in (0, 1, 2)] + [FakeChoice(number, "dkdv") for number in (0, 1)]
    table = FakeTable(FakeChoice(0), *some)
    ticks, right = [0.0], fine.ours

    def ours(problem: Any, training: bool) -> Any:
        attend = right(problem, training)

        def hook(grad: Any) -> Any:
            wrong = FakeChoice(2, "dq") in table.forced
            ticks[0] += sum(
                {"dq": (3.0, 2.0, 1.0), "dkdv": (4.0, 5.0)}[x.op][x.number] for x in table.forced if x.op != "forward"
            )
            return grad * 1.1 if wrong else grad  # the fastest is wrong

        def run_(q: Any, k: Any, v: Any) -> Any:
            out = attend(q, k, v)
            ticks[0] += 1.0
            if training:
                out.register_hook(hook)
            return out

        return run_

    monkeypatch.setattr(fine, "ours", ours)
    monkeypatch.setattr(tuning, "table", lambda: table)
    tuned, after = (
        case(name, kind, baselines=()) for name, kind in (("tune-it", "fine_forward"), ("after", "fine_backward"))
    )
    monkeypatch.setattr(tune, "RESULTS", tmp_path)
    device = Host(clock=lambda: ticks[0])
    code, result = run(tmp_path, after, tuned=[tuned], device=device, arguments=("--only", "tune", "bench"))
    _, found = rows.load(tmp_path / "tune.json")
    assert [row["op"] for row in found] == ["fine_forward"] + 5 * ["fine_backward"]
    assert [bool(row["ms"]) for row in found] == [True, True, True, False, True, True] and code == 1
    config = of(result, "fine_backward")["config"]
    assert config["dq"] == FakeChoice(1, "dq").config() and config["dkdv"] == FakeChoice(0, "dkdv").config()
    assert (config["op"], config["number"]) == ("forward", 0) and not table.forced
    assert of(result, "fine_backward")["ms"][0] == pytest.approx(6000.0), "both winners were forced"
    assert tune.main([str(tmp_path / "tune.json")]) == 0
    ((entries, _),) = table.written
    assert [(entry["op"], entry["number"]) for entry in entries] == [("forward", 0), ("dq", 1), ("dkdv", 0)]


def test_a_winner_is_forced_only_on_the_tiles_that_it_was_tuned_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BSA packs half of the queries: 64 rows of a tile of 128, and 32 of one of 64, which blocks of 64 do not divide."""
    table = FakeTable(FakeChoice(3))
    monkeypatch.setattr(tuning, "table", lambda: table)
    tiles = {"tile": (4, 8, 4), "kv_tile": (4, 4, 4), "others": ((4, 4, 8), (4, 4, 4))}
    bsa = case("bsa", "attention_forward", method="bsa", **tiles)
    assert tuning.key_of(bsa) == ("float32", 16, 64, 64) and tuning.key_of(bsa, (4, 4, 4)) == ("float32", 16, 32, 64)
    code, result = run(tmp_path, bsa, tuned=[case("tune-it", "fine_forward")], arguments=("--only", "tune", "bench"))
    found = {tuple(row["tile"]): row for row in result["rows"] if row["impl"] == "flexsparse"}
    assert code == 0 and all(row["ms"] for row in found.values())
    kernels = {tile: row["config"].get("number") for tile, row in found.items()}
    assert kernels == {(4, 8, 4): 3, (4, 4, 8): 3, (4, 4, 4): None}
    assert table.only[-1] == (torch.float32, 16, 64, 64)


def test_blocks_that_do_not_divide_other_tiles_are_not_forced_on_them() -> None:
    tuned = pytest.importorskip("flexsparse.compile_passes.templates.tuned")
    (bsa,) = [one for one in cases.first_cases() if one.name == "bsa-forward"]
    best = tuned.Choice(kernel="triton", rows=64, keys=64, num_warps=4, num_stages=4)
    with tuning.forced(tuning.Winners(choices=(best,)), tuning.key_of(bsa)):
        for tile in (bsa.tile, *bsa.others):
            dtype, D, rows_, slots = tuning.key_of(bsa, tile)
            found = tuned.chosen(None, getattr(torch, dtype), D, rows_, slots)
            assert rows_ % found.rows == 0 and (found is best) == (tile != (4, 4, 4))


@pytest.mark.parametrize("kind", ["attention_forward", "attention_training"])
@pytest.mark.parametrize("faster", ["default", "tuned"])
def test_the_defaults_are_timed_where_a_winner_changes_the_order(
    kind: str, faster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A winner that takes tile order was tuned without the way there: the better whole is reported, and which it is."""
    table = FakeTable(FakeChoice(3))
    ticks, right, asked = [0.0], fs.sparse_attention, []

    def call(*args: Any, **options: Any) -> Any:
        ticks[0] += 1.0 if bool(table.forced) == (faster == "tuned") else 3.0
        return right(*args, **options)

    def reads_raster(*args: Any) -> bool:
        asked.append(args[-1])
        return not table.forced

    def pieces(case_: Any, device: Any, inputs: Any, layout: Any, selection: Any) -> Any:
        """One that takes a tenth, and where tokens stay in raster order no tiling."""
        if table.forced:
            yield Contender(impl=OURS, op=kind, part="tiling", tile=layout.sides, run=tick)
        else:
            yield Missing(impl=OURS, op=kind, part="tiling", reason=rows.NOT_RUN)

    def tick(turn: int) -> None:
        assert table.forced
        ticks[0] += 0.1

    def clock() -> float:
        ticks[0] += 1e-9
        return ticks[0]

    monkeypatch.setattr(tuning, "table", lambda: table)
    monkeypatch.setattr(attention.fs, "sparse_attention", call)
    monkeypatch.setattr(attention, "reads_raster", reads_raster)
    monkeypatch.setattr(attention.parts, "contenders", pieces)
    one = case("attention-32k", kind, parts=True, dtype="float32")
    tuned, device = case("tune-it", "fine_forward"), Host(clock=clock)
    code, result = run(tmp_path, one, tuned=[tuned], device=device, arguments=("--only", "tune", "bench"))
    mine = [row for row in result["rows"] if row["impl"] == OURS]
    whole, parts = ([row for row in mine if bool(row["part"]) == part] for part in (False, True))
    assert code == 0 and set(asked) == {kind == "attention_training"} and not table.forced
    assert [row["config"] for row in whole] == [
        {"mode": "eager", **FakeChoice(3).config()},
        {"mode": "eager", "kernels": "default"},
    ]
    times = [3000.0, 1000.0] if faster == "default" else [1000.0, 3000.0]
    assert [row["ms"][0] for row in whole] == pytest.approx(times)
    assert {row["config"].get("kernels"): bool(row["ms"]) for row in parts} == {None: True, "default": False}
    (group,) = measures.groups([measures.File(name="x", header={}, rows=result["rows"])])
    assert group.taken == faster and group.best(kind, OURS) is whole[faster == "default"]
    share = measures.share_of((kind, "tiling", 1))(group)
    if kind == "attention_forward":
        assert share == pytest.approx(0.0 if faster == "default" else 0.1)


def test_which_winners_change_the_order() -> None:
    """Any that is not plain Triton, of the ops that a call runs; of BSA those for its packed queries."""
    tuned = pytest.importorskip("flexsparse.compile_passes.templates.tuned")
    host = Host()
    host.backend = "triton"
    hopper = {op: tuned.Choice(op=op, kernel="hopper", rows=64, keys=64, num_warps=4, num_stages=1) for op in tuned.OPS}
    plain = tuned.Choice(kernel="triton", rows=64, keys=32, num_warps=4, num_stages=4)

    def changes(one: cases.Case, *choices: Any) -> bool:
        q = torch.zeros(1, one.H, one.S, one.D)
        with tuning.forced(tuning.Winners(choices=choices), tuning.key_of(one)):
            found = attention.changes_order(one, host, q, one.layout, one.kv_layout)
            assert tuned.forced(choices[0].op)
        return found

    forward, training = case("a", "attention_forward"), case("b", "attention_training")
    bsa = case("c", "attention_training", method="bsa", tile=(4, 8, 4), kv_tile=(4, 4, 4))
    assert changes(forward, hopper["forward"]) and changes(training, plain, hopper["dkdv"])
    assert not changes(forward, plain, hopper["dq"], hopper["dkdv"]) and not changes(training, plain)
    assert changes(bsa, *hopper.values()) and not changes(bsa, plain)


def test_one_way_where_a_winner_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = FakeTable(FakeChoice(3))
    monkeypatch.setattr(tuning, "table", lambda: table)
    monkeypatch.setattr(attention, "reads_raster", lambda *args: True)
    tuned = [case("tune-it", "fine_forward")]
    _, result = run(tmp_path, case("it", "attention_forward"), tuned=tuned, arguments=("--only", "tune", "bench"))
    assert of(result, "attention_forward")["config"] == {"mode": "eager", **FakeChoice(3).config()}


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
    dq = tuned.candidates("sm_90a", torch.bfloat16, 128, 64, 64, "dq")
    others = [{**row, "op": "fine_backward", "ms": [9.0 - i], "config": x.config()} for i, x in enumerate(dq)]
    rows.write(tmp_path / "run.json", {"arch": "sm_90a"}, [slower, row, {**slower, "ms": [2.0]}, wrong, *others])
    assert tune.main([str(tmp_path / "run.json")]) == 0
    found = tuned.chosen("sm_90a", torch.bfloat16, 128, 64, 64)
    backward = [tuned.chosen("sm_90a", torch.bfloat16, 128, 64, 64, op) for op in ("dq", "dkdv")]
    tuned._table.cache_clear()
    assert found.config() == best.config() and found.source == "run.json"
    assert backward[0].config() == dq[-1].config() and backward[1].kernel == "triton"
    assert tune.main([str(Path(__file__))]) == 1
