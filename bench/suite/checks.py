"""The stage `check`: the tests in tests/gpu, compute-sanitizer over small cases. What failed stops the ops that it guards."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.header import ROOT, cores
from bench.suite.cases import Case
from bench.suite.pytest_rows import guards_path
from bench.suite.rows import Row
from bench.suite.supervise import kill

ALL_OPS = ("fine_forward", "fine_backward", "select", "attention_forward", "attention_training", "model_step")
SMALL = "bench.suite.small"
SANITIZER = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck")
WORKERS = 12
"""Processes of the tests: they spend their time compiling kernels, one core each."""
TEST_SECONDS = 240
"""Of one test. One that compiles a dozen kernels takes a minute; one that hangs holds a process and not the others."""
REFUSED = re.compile(r"not supported|LibraryNotLoaded|not permitted|Unable to|unknown error|error 999", re.IGNORECASE)


def check_row(name: str, outcome: str, why: str | None, **fields: Any) -> Row:
    """A row of the stage: ``outcome`` is passed, failed, skipped or not run."""
    empty = dict.fromkeys(("B", "H", "G", "S", "D", "tile", "density", "dtype", "ms", "tflops", "part"))
    failed = {"error": why or "failed"} if outcome == "failed" else {"error": {}}
    found: Row = {"case": name, "op": "check", "impl": "flexsparse", **empty, **failed, "reason": why}
    return {**found, "checked": outcome == "passed", "outcome": outcome, "guards": list(ALL_OPS), **fields}


def run_limited(command: Sequence[str], seconds: float, log: Path, **environment: str) -> int | None:
    """Exit code of a process whose output goes to a file; None where it was killed, with what it started, at the limit."""
    with log.open("w") as out:
        process = subprocess.Popen(
            list(command), cwd=ROOT, stdout=out, stderr=out, start_new_session=True, env={**os.environ, **environment}
        )
        try:
            return process.wait(timeout=max(seconds, 1))
        except subprocess.TimeoutExpired:
            return None
        finally:
            kill(process)


def pytest_command(outcomes: Path, tests: Path) -> list[str]:
    """The tests in several processes where pytest-xdist is there, each test under a limit where pytest-timeout is."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.suite.pytest_rows", "--outcomes", str(outcomes)]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(max(1, min(WORKERS, cores()))), "--max-worker-restart", "20"]
    if importlib.util.find_spec("pytest_timeout") is not None:  # a kernel that hangs blocks the thread: end the process
        command += ["--timeout", str(TEST_SECONDS), "--timeout-method", "thread"]
    return [*command, str(tests)]


def run_tests(directory: Path, seconds: float, tests: Path = ROOT / "tests" / "gpu") -> list[Row]:
    """A row for every test; the output stays in ``check.log``."""
    outcomes = directory / "check.outcomes"
    # by itself each process that compiles a graph starts another for every core
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
    code = run_limited(pytest_command(outcomes, tests), seconds, directory / "check.log", **threads)
    guards = guards_path(outcomes)
    told = json.loads(guards.read_text()) if guards.exists() else {}
    rows = outcome_rows(outcomes.read_text() if outcomes.exists() else "", told)
    for path in (outcomes, guards):
        path.unlink(missing_ok=True)
    if code not in (0, 1, 5, None) or (not rows and code is not None):
        tail = " ".join((directory / "check.log").read_text().split())[-400:]
        rows.append(check_row(str(tests.name), "failed", f"pytest ended with code {code}: {tail}"))
    elif code is None and not rows:
        rows.append(check_row(str(tests.name), "not run", f"no test finished in {seconds:.0f} s"))
    return rows


def outcome_rows(text: str, guards: dict[str, Any] | None = None) -> list[Row]:
    """Rows of what `pytest_rows` wrote; a test that was collected and not reported has not run.

    ``guards`` says by name what a test guards where its outcome does not: its process died of it.
    """
    collected: list[str] = []
    found: dict[str, Row] = {}
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the line that was being written when the run was cut
            continue
        collected += entry.get("collected", [])
        name = entry.get("id")
        if name is None or (name in found and found[name]["outcome"] == "failed"):
            continue
        said = entry.get("guards") or (guards or {}).get(name) or {}
        fields = {key: value for key, value in said.items() if value is not None}
        seconds = entry.get("seconds")
        found[name] = check_row(name, entry["outcome"], entry.get("why"), **fields, seconds=seconds)
    for name in collected:
        if name not in found:
            found[name] = check_row(name, "not run", "the time for checks was over before its turn")
    return list(found.values())


def run_sanitizer(tool: str, directory: Path, seconds: float) -> Row:
    """A row of one tool over the small cases."""
    name = f"{SANITIZER}-{tool}"
    if shutil.which(SANITIZER) is None:
        return check_row(name, "skipped", f"{SANITIZER} is not installed")
    log = directory / f"{tool}.log"
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "86", sys.executable, "-m", SMALL]
    code = run_limited(command, seconds, log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    text = log.read_text(errors="replace")
    log.unlink()
    return sanitizer_row(name, code, text, seconds)


def sanitizer_row(name: str, code: int | None, text: str, seconds: float) -> Row:
    """What a tool's output says.

    It guards no op: it ran every candidate, and does not understand all that copy engine and barriers do; what is timed is
    compared with an oracle anyway.
    """
    tail = " ".join(text.split())[-400:]
    if code is None:
        return check_row(name, "not run", f"not done in {seconds:.0f} s: {tail[-200:]}")
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    done = "small: done" in text
    if done and code == 0 and found and not any(map(int, found)):
        return check_row(name, "passed", None)
    if not done and REFUSED.search(text):
        return check_row(name, "skipped", f"{SANITIZER} refuses this machine: {tail}")
    return check_row(name, "failed", f"code {code}: {tail}", guards=[])


def run_checks(directory: Path, seconds: Callable[[], float], tests: Path = ROOT / "tests" / "gpu") -> list[Row]:
    """All rows of the stage; ``seconds`` says what is left for it."""
    rows = run_tests(directory, seconds(), tests)
    for tool in TOOLS:
        if seconds() < 15:
            rows.append(check_row(f"{SANITIZER}-{tool}", "not run", "the time for checks was over before its turn"))
        else:
            rows.append(run_sanitizer(tool, directory, min(seconds(), 90)))
    return rows


def refusal(rows: list[Row], case: Case) -> dict[str, str]:
    """For each op of a case that a failed check guards, which check: no time is reported for it then.

    A check that is about one head dim or dtype guards the cases of that one.
    """
    found: dict[str, str] = {}
    for row in rows:
        if row["op"] != "check" or row["outcome"] != "failed":
            continue
        if row["D"] not in (None, case.D) or row["dtype"] not in (None, case.dtype):
            continue
        for op in case.ops:
            if op in row["guards"]:
                found.setdefault(op, f"the check {row['case']} failed: {str(row['reason'])[:200]}")
    return found


def wrong_choices(rows: list[Row], case: Case) -> dict[str, str]:
    """Configurations of a tuned case that a failed check is about, as text, and which check: they are not tried.

    Such a check guards no op: other configurations may be right.
    """
    return {
        str(row["choice"]): f"the check {row['case']} failed: {str(row['reason'])[:200]}"
        for row in rows
        if row["op"] == "check"
        and row["outcome"] == "failed"
        and row.get("choice")
        and (row["D"], row["dtype"], row["slots"]) == (case.D, case.dtype, case.layout.slots)
    }


def tally(rows: list[Row]) -> dict[str, int]:
    """Checks by outcome, for a header."""
    outcomes = [row["outcome"] for row in rows if row["op"] == "check"]
    return {name: outcomes.count(name) for name in ("passed", "failed", "skipped", "not run")}
