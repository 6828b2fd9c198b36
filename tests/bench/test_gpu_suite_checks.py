"""The suite's stage `check`, what it refuses, and the supervisor of processes that crash or hang."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from suite_helpers import case, of, run

from bench import gpu_suite
from bench.header import ROOT
from bench.suite import (
    checks,
    rows,
    supervise,
)


@pytest.fixture(autouse=True)
def one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of these tests are few: a second process takes longer to start."""
    monkeypatch.setattr(checks, "WORKERS", 1)


def failed_check(op: str, **fields: Any) -> rows.Row:
    return checks.check_row("tests/gpu/test_x.py::test_it", "failed", "it is wrong", guards=[op], **fields)


@pytest.mark.parametrize(
    "fields, refused",
    [({}, True), ({"D": 16}, True), ({"D": 64}, False), ({"dtype": "bfloat16"}, False), ({"method": "bsa"}, False)],
)
def test_a_failed_check_of_an_op_leaves_no_time_of_it(tmp_path: Path, fields: dict[str, Any], refused: bool) -> None:
    head = {"sources": gpu_suite.sources(), "gpu": None}
    path = tmp_path / "earlier.json"
    rows.write(path, head, [failed_check("fine_forward", **fields), checks.check_row("other", "passed", None)])
    arguments = ("--only", "bench", "--checks", str(path))
    both = (case("forward", "fine_forward"), case("whole", "attention_forward"))
    code, result = run(tmp_path / "out", *both, arguments=arguments)
    own = of(result, "fine_forward")
    assert code == int(refused) and (own["ms"] is None) is refused and own["checked"] is not refused
    assert not refused or ("test_it failed" in own["error"] and "test_it failed" in own["reason"])
    assert of(result, "fine_forward", "dense_cudnn")["ms"] and of(result, "attention_forward")["ms"]
    assert result["header"]["checks"] == {"passed": 1, "failed": 1, "skipped": 0, "not run": 0}


def test_checks_of_other_code_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "earlier.json"
    rows.write(path, {"sources": "another", "gpu": None}, [failed_check("fine_forward")])
    code, result = run(tmp_path, case("forward", "fine_forward"), arguments=("--only", "bench", "--checks", str(path)))
    assert code == 0 and of(result, "fine_forward")["ms"] and result["header"]["checks"]["failed"] == 0
    assert run(tmp_path, arguments=("--only", "bench", "--checks", str(tmp_path / "none")))[0] == 2


OUTCOMES = """
import pytest

def test_good(): pass
@pytest.mark.parametrize("D", [64])
def test_bad(D): assert D == 1
@pytest.mark.skip(reason="no such thing here")
def test_left_out(): pass
@pytest.mark.parametrize("D", [])
def test_of_nothing(D): pass
"""


def test_the_tests_become_rows(tmp_path: Path) -> None:
    tests = tmp_path / "test_some.py"
    tests.write_text(OUTCOMES)
    found = {row["case"].split("::")[-1]: row for row in checks.run_tests(tmp_path, 100, tests)}
    assert {name: row["outcome"] for name, row in found.items()} == {
        "test_good": "passed",
        "test_bad[64]": "failed",
        "test_left_out": "skipped",
        "test_of_nothing[NOTSET]": "skipped",
    }
    assert "assert 64 == 1" in found["test_bad[64]"]["error"] and found["test_left_out"]["reason"].endswith(
        "no such thing here"
    )
    assert found["test_good"]["checked"] and not found["test_bad[64]"]["checked"]
    assert "1 failed" in (tmp_path / "check.log").read_text()
    one = case("forward", "fine_forward")
    assert "test_bad" in checks.refusal(list(found.values()), one)["fine_forward"]


CHOICES = """
import os
import pytest

class Choice:
    def __init__(self, number): self.number = number
    def config(self): return {"kernel": "triton", "number": self.number}

params = [pytest.param(64, Choice(n), id=str(n), marks=pytest.mark.guards() if n else ()) for n in (0, 1, 2)]
pytestmark = pytest.mark.guards("fine_forward")

@pytest.mark.parametrize("D", [16])
@pytest.mark.parametrize("slots, choice", params)
def test_it(D, slots, choice):
    if choice.number == 1:
        os._exit(1)
    assert choice.number == 0
"""


@pytest.mark.parametrize("several", [pytest.param(True, marks=pytest.mark.slow), False])
def test_what_only_a_candidate_gets_wrong_stops_that_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, several: bool
) -> None:
    """Also where it takes its process with it, as a kernel does that hangs: then only the collection told what it guards."""
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "gpu" / "conftest.py").read_text())
    tests = tmp_path / "test_some.py"
    tests.write_text(CHOICES if several else CHOICES.replace("os._exit(1)", "assert False"))
    if not several:
        monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    found = checks.run_tests(tmp_path, 100, tests)
    assert sorted((row["outcome"], row["guards"], row["choice"]["number"]) for row in found) == [
        ("failed", [], 1),
        ("failed", [], 2),
        ("passed", ["fine_forward"], 0),
    ]
    one = case("forward", "fine_forward", dtype="bfloat16")
    found = [{**row, "dtype": "bfloat16"} for row in found]
    assert not checks.refusal(found, one)
    assert set(checks.wrong_choices(found, one)) == {str({"kernel": "triton", "number": n}) for n in (1, 2)}
    assert not checks.wrong_choices(found, case("forward", "fine_forward", dtype="bfloat16", D=32))


def test_the_tests_on_a_gpu_begin_with_what_runs_by_default() -> None:
    command = [sys.executable, "-m", "pytest", "--co", "-p", "no:cacheprovider", "tests/gpu"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    files = [line.split("/")[-1].split(".")[0] for line in listed if line.startswith("tests/gpu/")]
    assert list(dict.fromkeys(files)) == ["test_templates", "test_candidates", "test_models", "test_bsa"]


@pytest.mark.slow
def test_tests_that_cannot_start_or_do_not_end_are_no_pass(tmp_path: Path) -> None:
    broken = tmp_path / "test_broken.py"
    broken.write_text("import no_such_module")
    (row,) = [row for row in checks.run_tests(tmp_path, 100, broken) if row["outcome"] == "failed"][:1]
    assert "no_such_module" in row["reason"] and not row["checked"]
    slow = tmp_path / "test_slow.py"
    slow.write_text("import time\ndef test_slow(): time.sleep(600)")
    started = time.monotonic()
    found = checks.run_tests(tmp_path, 6, slow)
    assert time.monotonic() - started < 30 and [row["outcome"] for row in found] == ["not run"]
    (row,) = checks.run_tests(tmp_path, 100, tmp_path / "nowhere")
    assert row["outcome"] == "failed" and "pytest ended with code" in row["reason"]


def test_a_line_that_was_being_written_is_passed_over() -> None:
    text = json.dumps({"collected": ["a", "b", "c"]}) + "\n"
    text += (
        json.dumps({"id": "a", "outcome": "passed", "guards": {"D": 64, "dtype": "float16", "guards": ["select"]}})
        + "\n"
    )
    text += json.dumps({"id": "b", "outcome": "failed", "why": "wrong"}) + "\n"
    text += json.dumps({"id": "b", "outcome": "passed"}) + '\n{"id": "c", "outc'
    a, b, c = sorted(checks.outcome_rows(text), key=lambda row: row["case"])
    assert (a["outcome"], a["D"], a["dtype"], a["guards"]) == ("passed", 64, "float16", ["select"])
    assert b["outcome"] == "failed" and b["guards"] == list(checks.ALL_OPS)  # a failure stays one
    assert c["outcome"] == "not run" and not c["checked"]


@pytest.mark.parametrize(
    "code, text, outcome",
    [
        (0, "small: done\n========= ERROR SUMMARY: 0 errors", "passed"),
        (86, "small: done\n========= ERROR SUMMARY: 2 errors", "failed"),
        (0, "small: done\n========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)", "failed"),
        (255, "========= Error: Device not supported. Please refer to the documentation", "skipped"),
        (1, "Traceback: something else", "failed"),
        (0, "small: done", "failed"),  # no summary: nothing was looked at
        (None, "========= COMPUTE-SANITIZER", "not run"),
        (None, "========= Invalid __global__ read of size 16 bytes\n=========     at _forward+0x2c0", "failed"),
        (None, "========= Error: Race reported between Write access at", "failed"),
    ],
)
def test_what_the_sanitizer_says(code: int | None, text: str, outcome: str) -> None:
    row = checks.sanitizer_row("compute-sanitizer-memcheck", code, text, 60)
    assert row["outcome"] == outcome and row["checked"] is (outcome == "passed")
    assert bool(row["reason"]) is (outcome != "passed")
    assert not checks.refusal([row], case("forward", "fine_forward")), "it ran every candidate, right and wrong"


def test_the_sanitizer_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "SANITIZER", "no-such-sanitizer")
    row = checks.run_sanitizer("memcheck", tmp_path, 5)
    assert row["outcome"] == "skipped" and "not installed" in row["reason"]
    monkeypatch.setattr(checks, "run_tests", lambda *_: [])
    found = checks.run_checks(tmp_path, lambda: 5.0)
    assert [row["outcome"] for row in found] == ["not run", "not run"]


def test_a_failed_test_stops_its_op_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "SANITIZER", "no-such-sanitizer")
    tests = tmp_path / "test_some.py"
    tests.write_text("def test_bad(): assert False")
    code, result = run(tmp_path / "out", case("a", "fine_forward"), arguments=("--minutes", "5"), tests=tests)
    assert code == 1 and of(result, "fine_forward")["ms"] is None and of(result, "fine_forward", "dense_cudnn")["ms"]
    header, found = rows.load(tmp_path / "out" / "check.json")
    assert header["checks"]["failed"] == 1 and {row["op"] for row in found} == {"check"}


WORKER = """
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from bench.suite import supervise
path = Path(sys.argv[1])
state = supervise.State.read(path)
beat = supervise.beats(path)
for case, what in (("good", ""), ("bad", {what!r})):
    if (case, "someone") in state.skipped:
        beat(case, "someone", 30.0)  # on a busy machine the end of a process takes a while
        print(case, "left out:", state.skipped[case, "someone"])
    elif what:
        beat(case, "someone", 1.0)
        exec(what)
    else:
        beat(case, "someone", 30.0)
        print(case, "done")
sys.exit(0)
"""


@pytest.mark.parametrize(
    "what, how",
    [
        ("time.sleep(60)", "it hung"),
        ("os.kill(os.getpid(), 11)", "signal 11"),
        ("sys.exit(75)", "answered no more"),
        ("raise RuntimeError('out of memory, outside of any case')", "ended with code 1"),
    ],
)
def test_a_process_that_dies_goes_on_without_what_it_died_of(tmp_path: Path, what: str, how: str) -> None:
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER).format(root=str(ROOT), what=what))
    log = tmp_path / "log"
    with log.open("w") as out:
        path = tmp_path / "state.json"
        code = supervise.supervise([sys.executable, str(script), str(path)], path, time.time() + 100, stdout=out)
    text = log.read_text()
    assert code == 0 and "bad left out" in text and how in text and text.count("good done") == 2


def test_a_process_that_is_slow_is_ended_and_nothing_is_left_out_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "MARGIN", 0.5)
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER).format(root=str(ROOT), what="time.sleep(60)").replace("1.0)", "99.0)"))
    path = tmp_path / "state.json"
    started = time.monotonic()
    assert supervise.supervise([sys.executable, str(script), str(path)], path, time.time() + 4) == 0
    assert time.monotonic() - started < 30 and supervise.State.read(path).skipped == {}


def test_a_process_that_cannot_be_ended_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does whose kernel the driver waits for."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    with monkeypatch.context() as patch:
        patch.setattr(supervise.os, "killpg", lambda *_: None)
        started = time.monotonic()
        supervise.kill(process, patience=0.2)
        assert time.monotonic() - started < 10 and process.poll() is None
    supervise.kill(process)
    assert process.poll() is not None


def test_a_process_that_dies_before_it_begins_is_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    assert (
        supervise.supervise([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], path, time.time() + 100) == 1
    )
    assert supervise.supervise([sys.executable, "-c", "raise SystemExit(3)"], path, time.time() + 100) == 3
    skip = [["a", "someone", "it hung"]]
    assert supervise.supervise([sys.executable, "-c", "pass"], path, time.time() + 100, skip=skip) == 0
    assert supervise.State.read(path).skipped == {("a", "someone"): "it hung"}


def test_a_test_that_was_still_running_at_the_end_is_no_innocent_one() -> None:
    about = {"D": 64, "dtype": "bfloat16", "slots": 64, "guards": [], "choice": {"op": "dq", "kernel": "hopper"}}
    lines: list[dict[str, Any]] = [{"collected": ["hangs", "began", "waits"]}]
    lines += [{"started": "hangs", "at": 100.0}, {"started": "began", "at": 140.0}]
    found = checks.outcome_rows("\n".join(map(json.dumps, lines)), {"hangs": about}, ended=200.0)
    assert {row["case"]: row["outcome"] for row in found} == {"hangs": "failed", "began": "not run", "waits": "not run"}
    assert found[0]["reason"] == "it was still running after 100 s" and found[0]["guards"] == []
    assert list(checks.dead_families(found)) == [("dq", "hopper")]
    wrong = checks.check_row("wrong", "failed", "it is wrong", **about | {"choice": {"op": "dq", "kernel": "other"}})
    assert list(checks.dead_families([wrong])) == [], "what is wrong says nothing about its kind"


def test_a_test_that_compiles_whole_graphs_may_be_slow() -> None:
    """Its time says nothing: it is not run, so that no op is refused for it."""
    lines: list[dict[str, Any]] = [{"collected": ["model", "crashed"]}, {"started": "model", "at": 10.0}]
    lines += [{"id": "crashed", "outcome": "failed", "why": "worker 'gw3' crashed while running 'crashed'"}]
    about = {"graphs": True, "guards": ["model_step"]}
    found = checks.outcome_rows("\n".join(map(json.dumps, lines)), {"model": about, "crashed": about}, ended=200.0)
    rows = {row["case"]: row for row in found}
    assert rows["model"]["outcome"] == "not run" and "still running after 190 s" in rows["model"]["reason"]
    assert rows["crashed"]["outcome"] == "failed" and rows["crashed"]["guards"] == ["model_step"]


def test_a_test_that_compiles_whole_graphs_has_no_limit_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("pytest_timeout")
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "gpu" / "conftest.py").read_text())
    sleeps = "import time\n\ndef test_it(): time.sleep(3)\n"
    for name in ("test_models", "test_candidates"):
        (tmp_path / f"{name}.py").write_text(sleeps)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.suite.pytest_rows", "--timeout", "1", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert "1 failed, 1 passed" in done.stdout and "test_candidates.py::test_it" in done.stdout, done.stdout


SOME = """
import pytest

@pytest.mark.parametrize("D", [64, 96])
def test_it(D): pass
def test_other(): pass
"""


def test_first_what_is_measured_first_and_then_the_rest(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "gpu" / "conftest.py").read_text())
    tests = tmp_path / "test_some.py"
    tests.write_text(SOME)
    first = [row["case"] for row in checks.run_tests(tmp_path, 100, tests, first=True)]
    assert sorted(name.split("::")[-1] for name in first) == ["test_it[64]", "test_other"]
    (other,) = checks.run_tests(tmp_path, 100, tests, done=first)
    assert other["case"].endswith("test_it[96]")
