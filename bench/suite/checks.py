"""The stage `check`: the tests in tests/gpu, compute-sanitizer over small cases. What failed stops the ops that it guards."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
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
TEST_SECONDS, TEST_SHARE = 240.0, 0.7
"""Of one test, and of the stage at most: one that compiles a dozen kernels takes a minute, one that hangs holds a process."""
HANGS = 100.0
"""Seconds after which a test that was still running at the end counts as one that hangs, unless it compiles whole graphs."""
DIED = re.compile(r"crashed while running|Timeout|it was still running")
"""Reasons of a test that took its process with it, or would have."""
HAZARD = re.compile(r"Invalid __\w+__ (?:read|write)|Race reported|RACECHECK SUMMARY: [1-9]|ERROR SUMMARY: [1-9]")
LOG_END = 200_000
"""Characters of a tool's output that are kept."""
REFUSED = re.compile(r"not supported|LibraryNotLoaded|not permitted|Unable to|unknown error|error 999", re.IGNORECASE)


def check_row(name: str, outcome: str, why: str | None, **fields: Any) -> Row:
    """A row of the stage: ``outcome`` is passed, failed, skipped or not run."""
    empty = dict.fromkeys(("B", "H", "G", "S", "D", "tile", "density", "dtype", "ms", "tflops", "part"))
    failed = {"error": why or "failed"} if outcome == "failed" else {"error": {}}
    found: Row = {"case": name, "op": "check", "impl": "flexsparse", **empty, **failed, "reason": why}
    return {**found, "checked": outcome == "passed", "outcome": outcome, "guards": list(ALL_OPS), **fields}


def run_limited(command: Sequence[str], seconds: float, log: Path, **environment: str) -> int | None:
    """Exit code of a process whose output goes to a file; None where it was killed, with what it started, at the limit."""
    with log.open("a") as out:
        process = subprocess.Popen(
            list(command), cwd=ROOT, stdout=out, stderr=out, start_new_session=True, env={**os.environ, **environment}
        )
        try:
            return process.wait(timeout=max(seconds, 1))
        except subprocess.TimeoutExpired:
            return None
        finally:
            kill(process)


def pytest_command(outcomes: Path, tests: Path, seconds: float, first: bool) -> list[str]:
    """The tests in several processes where pytest-xdist is there, each test under a limit where pytest-timeout is.

    Args:
        outcomes: the file for `outcome_rows`.
        tests: a file or directory.
        seconds: for all of them.
        first: only those of what is measured first (`tests/gpu/conftest.py`).
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.suite.pytest_rows", "--outcomes", str(outcomes)]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(max(1, min(WORKERS, cores()))), "--max-worker-restart", "20"]
    if importlib.util.find_spec("pytest_timeout") is not None:  # a kernel that hangs blocks the thread: end the process
        command += [
            "--timeout",
            f"{max(10.0, min(TEST_SECONDS, TEST_SHARE * seconds)):.0f}",
            "--timeout-method",
            "thread",
        ]
    return [*command, *(["--first"] if first else []), str(tests)]


def run_tests(
    directory: Path,
    seconds: float,
    tests: Path = ROOT / "tests" / "gpu",
    first: bool = False,
    done: Sequence[str] = (),
) -> list[Row]:
    """A row for every test, or for the first ones, but for those that are ``done``; the output stays in ``check.log``."""
    outcomes, listed = directory / "check.outcomes", directory / "check.done"
    listed.write_text(json.dumps(list(done)))
    # by itself each process that compiles a graph starts another for every core
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
    command = [*pytest_command(outcomes, tests, seconds, first), "--done", str(listed)]
    code = run_limited(command, seconds, directory / "check.log", **threads)
    guards = guards_path(outcomes)
    told = json.loads(guards.read_text()) if guards.exists() else {}
    rows = outcome_rows(outcomes.read_text() if outcomes.exists() else "", told, time.time())
    for path in (outcomes, guards, listed):
        path.unlink(missing_ok=True)
    if code not in (0, 1, 5, None) or (not rows and code is not None):
        tail = " ".join((directory / "check.log").read_text().split())[-400:]
        rows.append(check_row(str(tests.name), "failed", f"pytest ended with code {code}: {tail}"))
    elif code is None and not rows:
        rows.append(check_row(str(tests.name), "not run", f"no test finished in {seconds:.0f} s"))
    return rows


def outcome_rows(text: str, guards: dict[str, Any] | None = None, ended: float = math.inf) -> list[Row]:
    """Rows of what `pytest_rows` wrote; a test that was collected and not reported has not run, or hangs.

    Args:
        text: the file.
        guards: says by name what a test guards where its outcome does not: its process died of it.
        ended: when the tests were ended, on the clock.
    """
    collected: list[str] = []
    started: dict[str, float] = {}
    found: dict[str, Row] = {}

    def row(name: str, outcome: str, why: str | None, said: Any, **fields: Any) -> Row:
        about = said or (guards or {}).get(name) or {}
        return check_row(name, outcome, why, **{key: x for key, x in about.items() if x is not None}, **fields)

    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the line that was being written when the run was cut
            continue
        collected += entry.get("collected", [])
        if "started" in entry:
            started[entry["started"]] = entry["at"]
        name = entry.get("id")
        if name is None or (name in found and found[name]["outcome"] == "failed"):
            continue
        found[name] = row(name, entry["outcome"], entry.get("why"), entry.get("guards"), seconds=entry.get("seconds"))
    for name in collected:
        if name in found:
            continue
        ran = ended - started[name] if name in started and math.isfinite(ended) else 0.0
        if ran and ((guards or {}).get(name) or {}).get("graphs"):
            why = f"it was still running after {ran:.0f} s, which compiling its graphs may take"
            found[name] = check_row(name, "not run", why)
        elif ran >= HANGS:
            found[name] = row(name, "failed", f"it was still running after {ran:.0f} s", None)
        else:
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
    row = sanitizer_row(name, code, text, seconds)
    if row["outcome"] == "failed":  # one file of logs: what a machine gives back may be limited in number
        with (directory / "check.log").open("a") as kept:
            kept.write(f"\n==== {name} ====\n{text[-LOG_END:]}\n")
    return row


def sanitizer_row(name: str, code: int | None, text: str, seconds: float) -> Row:
    """What a tool's output says.

    It guards no op: it ran every candidate, and does not understand all that copy engine and barriers do; what is timed is
    compared with an oracle anyway.
    """
    tail = " ".join(text.split())[-400:]
    if named := HAZARD.search(text):  # also in what was written before the time was over
        return check_row(name, "failed", f"code {code}: {' '.join(text[named.start() :].split())[:400]}", guards=[])
    if code is None:
        return check_row(name, "not run", f"not done in {seconds:.0f} s: {tail[-200:]}")
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    done = "small: done" in text
    if done and code == 0 and found and not any(map(int, found)):
        return check_row(name, "passed", None)
    if not done and REFUSED.search(text):
        return check_row(name, "skipped", f"{SANITIZER} refuses this machine: {tail}")
    return check_row(name, "failed", f"code {code}: {tail}", guards=[])


def run_checks(
    directory: Path,
    seconds: Callable[[], float],
    tests: Path = ROOT / "tests" / "gpu",
    first: bool = False,
    done: Sequence[str] = (),
) -> list[Row]:
    """Rows of the stage; ``seconds`` says what is left for it.

    ``first`` leaves the sanitizer and the rarer tests out, ``done`` names tests that have run.
    """
    rows = run_tests(directory, seconds(), tests, first, done)
    for tool in () if first else TOOLS:
        if seconds() < 15:
            rows.append(check_row(f"{SANITIZER}-{tool}", "not run", "the time for checks was over before its turn"))
        else:
            rows.append(run_sanitizer(tool, directory, min(seconds(), 90)))
    return rows


def refusal(rows: list[Row], case: Case) -> dict[str, str]:
    """For each op of a case that a failed check guards, which check: no time is reported for it then.

    A check that is about one head dim, dtype or method guards the cases of that one.
    """
    found: dict[str, str] = {}
    for row in rows:
        if row["op"] != "check" or row["outcome"] != "failed":
            continue
        if row["D"] not in (None, case.D) or row["dtype"] not in (None, case.dtype):
            continue
        if row.get("method") not in (None, case.method):
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


def family(config: Any) -> tuple[Any, Any]:
    """What configurations of one kernel have in common: where one hangs, the others are likely to."""
    return config.get("op"), config.get("kernel")


def dead_families(rows: list[Row]) -> dict[tuple[Any, Any], str]:
    """Kernels, by `family`, of which a check took its process with it, and which check."""
    return {
        family(row["choice"]): f"the check {row['case']} of the same kernel did not end: {str(row['reason'])[:200]}"
        for row in rows
        if row["op"] == "check" and row["outcome"] == "failed" and row.get("choice") and DIED.search(str(row["reason"]))
    }


def tally(rows: list[Row]) -> dict[str, int]:
    """Checks by outcome, for a header."""
    outcomes = [row["outcome"] for row in rows if row["op"] == "check"]
    return {name: outcomes.count(name) for name in ("passed", "failed", "skipped", "not run")}
