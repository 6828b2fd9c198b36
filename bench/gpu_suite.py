"""The benchmark for a GPU at hand: `python -m bench.gpu_suite --out DIR`.

Checks what is measured first (tests in tests/gpu), times the most informative cases with the default kernels beside dense
attention and other people's, finds the best configurations of the fine stage, times those cases again with them and then the
others, and with what time is left runs the other checks and compute-sanitizer. `DIR/check.json`, `DIR/tune.json` and
`DIR/bench.json` are written as it goes. Exit code 1 where a check failed, 2 without CUDA.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import flexsparse
import flexsparse.compile_passes
from bench.header import header
from bench.suite import checks, measures, plots, rows, supervise, targets, tuning, warm
from bench.suite.cases import OURS, Case, all_cases, tuned_cases
from bench.suite.device import Cuda, Device
from bench.suite.runner import Budget, ContextLost, Run

STAGES = ("check", "tune", "bench")
CHECK_SHARE, EARLY_SHARE, TUNE_SHARE = 0.3, 0.4, 0.3
"""Of the time that is left when a part begins: the first checks, the first cases with the default kernels, and `tune`."""
REST_SECONDS = 40.0
"""Least time that the other checks are worth."""
WARM_SHARE, WARM_SECONDS = 0.2, 75.0
"""Of the time that is left before `tune`, and at most so long: to compile its kernels in many processes."""
RESERVE = 12.0
"""Seconds kept for figures and the table."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_suite", description=__doc__)
    parser.add_argument("--out", type=Path, help="directory of the files")
    parser.add_argument("--minutes", type=float, default=9.0, help="start nothing after this (default: 9)")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="WORD",
        help="stages (check, tune, bench), and cases whose name holds one",
    )
    parser.add_argument(
        "--baseline-dir", type=Path, help="where other people's packages were unpacked, see bench/baselines"
    )
    parser.add_argument("--checks", type=Path, metavar="FILE", help="check.json of an earlier run of the same revision")
    parser.add_argument("--revision", help="git revision, where the files are no git checkout")
    parser.add_argument("--list", action="store_true", help="print stages and cases, and stop")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=("early", "rest"), help=argparse.SUPPRESS)
    parser.add_argument("--tune-until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.out is None and not options.list:
        parser.error("give --out DIR")
    return options


def choose(only: Sequence[str], cases: list[Case], tuned: list[Case]) -> tuple[list[str], list[Case], list[Case]]:
    """Stages, cases of `bench`, cases of `tune`: words that are stages choose those, the others choose cases by name.

    Raises:
        ValueError: a word that matches nothing.
    """
    stages = [stage for stage in STAGES if stage in only]
    words = [word for word in only if word not in STAGES]
    for word in words:
        if not any(word in case.name for case in cases + tuned):
            names = ", ".join((*STAGES, *(case.name for case in cases + tuned)))
            raise ValueError(f"--only {word} matches nothing: give parts of {names}")
    if words:
        cases, tuned = ([case for case in some if any(word in case.name for word in words)] for some in (cases, tuned))
        if not stages:
            stages = ["check", *(["tune"] if tuned else []), *(["bench"] if cases else [])]
    return stages or list(STAGES), cases, tuned


def sources() -> str:
    """Hash of the code that is measured, as it is installed: it names a state of the files also where there is no git."""
    hashed = hashlib.sha256()
    for package in (flexsparse, flexsparse.masks, flexsparse.compile_passes):
        folder = Path(package.__path__[0])
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder).parts
            if inside[0] not in ("masks", "compile_passes"):  # of an installed package; they have their own turn
                hashed.update("/".join((package.__name__, *inside)).encode() + path.read_bytes())
    return hashed.hexdigest()[:16]


def header_of(device: Device, options: argparse.Namespace) -> dict[str, Any]:
    """`bench.header` with the GPU's part; ``git`` is the revision, with a ``+`` where files were changed since."""
    head = header(torch.get_num_threads(), suite="gpu", minutes=options.minutes, only=options.only) | device.header()
    revision = options.revision or head["git_revision"]
    head |= {"sources": sources(), "arch": device.arch}
    return head | {"git": None if revision is None else revision + ("+" if head["git_dirty"] else "")}


def baselines_of(directory: Path | None) -> dict[str, Any]:
    """`bench.baselines`, after the directory of their packages is on the path."""
    from bench import baselines

    if directory is not None:
        baselines.use_directory(directory)
    return dict(baselines.BASELINES)


def earlier_checks(options: argparse.Namespace, head: dict[str, Any], say: Any = print) -> list[rows.Row]:
    """Rows of an earlier stage `check`, of the file asked for or the one in the directory: of this code and GPU only."""
    path = options.checks or options.out / "check.json"
    if not path.is_file():
        if options.checks is not None:
            raise ValueError(f"--checks {path}: there is no such file")
        return []
    before, found = rows.load(path)
    if (before.get("sources"), before.get("gpu")) != (head["sources"], head["gpu"]):
        say(f"{path} is of other code or another GPU ({before.get('git')}, {before.get('gpu')}): not taken")
        return []
    return found


def work(run: Run, stages: Sequence[str], cases: list[Case], tuned: list[Case], part: str | None) -> None:
    """The stages `tune` and `bench`; ``early``: what can be timed before anything is tuned."""
    if part == "early":
        run.run_bench([case for case in cases if case.early], last=False)
        return
    if "tune" in stages:
        run.run_tune(tuned, TUNE_SHARE)
    if "bench" in stages:
        run.run_bench(cases)


def supervised(run: Run, stages: Sequence[str], cases: list[Case], tuned: list[Case], arguments: list[str]) -> int:
    """The stages `tune` and `bench` in processes of their own that may die; the exit code."""
    budget, codes = run.budget, [0]

    def process(part: str, until: float, *more: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.json"
            own = ["--worker", str(path), "--part", part, *more]
            command = [sys.executable, "-u", "-m", "bench.gpu_suite", *arguments, *own]
            codes.append(supervise.supervise(command, path, until, skip=[[*key, how] for key, how in run.skip.items()]))
            run.skip = supervise.State.read(path).skipped

    if {"tune", "bench"} <= {*stages} and any(case.early for case in cases):
        process("early", budget.clock() + EARLY_SHARE * budget.left())
    more = []
    if "tune" in stages and tuning.table() is not None:
        wrong = {}
        for case in tuned:
            with contextlib.suppress(Exception):  # `tune` says why
                wrong[case.name] = run.wrong_choices(case, tuning.candidates(case, run.device))
        tasks = warm.tasks_of(tuned, run.device, wrong)
        ended = warm.run(tasks, min(WARM_SECONDS, WARM_SHARE * budget.left()))
        print(f"compiled for tune: {len(tasks)} tasks, {ended} processes done, {budget.left():.0f} s left", flush=True)
        more = ["--tune-until", str(budget.clock() + TUNE_SHARE * budget.left())]  # the same after a restart
    process("rest", budget.until, *more)
    return max(codes)


def finish(out: Path, stages: Sequence[str], say: Any = print) -> int:
    """Figures, the table, the exit code: 1 where a check of the tests or of our own rows failed."""
    paths = [out / f"{stage}.json" for stage in stages]
    files = [
        measures.File(name=path.name, **dict(zip(("header", "rows"), rows.load(path))))
        for path in paths
        if path.is_file()
    ]
    found = [row for file in files for row in file.rows]
    try:
        plots.draw(files, out)
    except Exception:  # figures are made again from the files; the run must not fail for them
        say(f"figures failed: {traceback.format_exc(limit=3)}")
    say(rows.table(found))
    for line in targets.lines(files):
        if line.values:
            say(f"{line.target.text}: {line.measured}, {line.verdict}")
    say(f"checks: {checks.tally(found)}")
    failed = [row for row in found if row["op"] == "check" and row["outcome"] == "failed"]
    # a case that was out of time has no error; one whose check failed or that raised has
    failed += [row for row in found if row["op"] != "check" and row["impl"] == OURS and row["error"] and row["reason"]]
    return 1 if failed else 0


def main(
    argv: Sequence[str] | None = None,
    *,
    device: Device | None = None,
    baselines: dict[str, Any] | None = None,
    cases: list[Case] | None = None,
    tuned: list[Case] | None = None,
    tests: Path | None = None,
) -> int:
    """Run; the exit code. A given device runs in this process, without a supervisor."""
    options = parse(argv)
    try:
        stages, cases, tuned = choose(
            options.only, all_cases() if cases is None else cases, tuned_cases() if tuned is None else tuned
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.list:
        print("\n".join((*stages, *(case.name for case in tuned + cases))))
        return 0
    if device is None and not torch.cuda.is_available():
        print("bench.gpu_suite needs a CUDA device; without one: python -m bench.kernels --offline", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    tuning.exact_matmuls()
    in_processes = device is None
    device = Cuda() if device is None else device
    head = header_of(device, options)
    state = None if options.worker is None else supervise.State.read(options.worker)
    until = time.time() + options.minutes * 60 - RESERVE if state is None else state.until
    if state is None:
        for stage in stages:
            (options.out / f"{stage}.json").unlink(missing_ok=True)
        if "check" in stages:
            (options.out / "check.log").unlink(missing_ok=True)
    run = Run(device=device, out=options.out, head=head, budget=Budget(until=until), baselines={})
    alone = len(stages) == 1
    if state is None and "check" in stages:
        run.run_check(1.0 if alone else CHECK_SHARE, tests, first=not alone)
    if in_processes and state is None:
        arguments = sys.argv[1:] if argv is None else list(argv)
        code = 0 if stages == ["check"] else supervised(run, stages, cases, tuned, arguments)
        if "check" in stages and not alone and run.budget.left() > REST_SECONDS:
            run.run_check(1.0, tests)
            run.recheck(cases)
        return max(code, finish(options.out, stages))
    try:
        run.checked = run.checked or earlier_checks(options, head)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    run.baselines = baselines_of(options.baseline_dir) if baselines is None else baselines
    run.tune_until = options.tune_until
    if state is not None:
        run.skip, run.beat = state.skipped, supervise.beats(options.worker)
        for stage in set(stages) - {"check"}:
            if (options.out / f"{stage}.json").is_file():  # of a process that died
                run.rows[stage] = rows.load(options.out / f"{stage}.json")[1]
        run.winners = tuning.restored(run.rows.get("tune", []), tuned, device)
    try:
        work(run, stages, cases, tuned, options.part)
    except ContextLost as error:
        print(error, file=sys.stderr)
        return supervise.LOST
    return 0 if state is not None else finish(options.out, stages)


if __name__ == "__main__":
    sys.exit(main())
