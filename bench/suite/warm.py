"""Compiles in many processes what the stage `tune` then runs in one: kernels land in Triton's cache on disk.

`tune` runs some hundred kernels for the first time, each seconds of one core. Nothing is looked at here: what is wrong, crashes
or hangs is found again where it counts.
Shape letters: B batch, H heads, N query tiles, M KV tiles, P padded tokens, D head dim.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import flexsparse as fs
from bench.baselines.protocol import Problem
from bench.header import ROOT, cores
from bench.suite import fine, tuning
from bench.suite.cases import Case, tuned_cases
from bench.suite.device import Cuda, Device
from bench.suite.supervise import kill

Task = tuple[str, int]
"""Name of a case, and number of a candidate of it; -1 for the choice of its tiles."""
WORKERS = 14


def tasks_of(cases: Sequence[Case], device: Device, wrong: dict[str, dict[str, str]]) -> list[Task]:
    """All tasks, but for candidates whose check failed (by case, as text); none of a case whose candidates cannot be told."""
    found: list[Task] = []
    for case in cases:
        with contextlib.suppress(Exception):  # `tune` says why
            choices = enumerate(tuning.candidates(case, device))
            left_out = wrong.get(case.name, {})
            numbers = [number for number, choice in choices if str(choice.config()) not in left_out]
            found += [(case.name, number) for number in (-1, *numbers)]
    return found


def problem_of(case: Case, device: Device) -> Problem:
    """The case's problem with tiles drawn blindly: nothing is compiled for them."""
    layout = case.layout
    shape = (case.B, case.H, layout.padded_len, case.D)
    q, k, v = (torch.randn(shape, device=device.torch, dtype=case.torch_dtype) for _ in range(3))
    M = layout.num_tiles
    capacity = case.builder.capacity(M)
    keep = torch.rand(case.B, case.H, M, M, device=device.torch).argsort(-1) < capacity
    selection = fs.TileSelection.from_mask(keep, layout, capacity=capacity)
    return Problem(q_BHPD=q, k_BGPD=k, v_BGPD=v, layout=layout, selection=selection, scale=case.D**-0.5)


def work(tasks: Sequence[Task], cases: Sequence[Case], device: Device) -> None:
    """Run each task once."""
    by_name = {case.name: case for case in cases}
    for name, number in tasks:
        case = by_name[name]
        with contextlib.suppress(Exception):  # found again where it counts
            if number < 0:
                fine.problem_of(case, device)
                continue
            choice, problem = tuning.candidates(case, device)[number], problem_of(case, device)
            leaves = [
                x.requires_grad_(choice.op != "forward") for x in (problem.q_BHPD, problem.k_BGPD, problem.v_BGPD)
            ]
            with tuning.forced(tuning.Winners(choices=(choice,))):
                out = fine.ours(problem, choice.op != "forward")(*leaves)
                if choice.op != "forward":
                    torch.autograd.grad(out, leaves, torch.randn_like(out))
            device.synchronize()


def run(
    tasks: Sequence[Task], seconds: float, command: Sequence[str] = (sys.executable, "-m", "bench.suite.warm")
) -> int:
    """Share tasks among processes; what is not done in time is killed. Returns how many processes ended by themselves."""
    until, count = time.monotonic() + seconds, max(1, min(WORKERS, cores() - 2, len(tasks)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tasks.json"
        path.write_text(json.dumps(list(tasks)))
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        processes = [
            subprocess.Popen([*command, str(path), str(share), str(count)], cwd=ROOT, **quiet) for share in range(count)
        ]
        ended = 0
        for process in processes:
            try:
                process.wait(timeout=max(0.1, until - time.monotonic()))
                ended += 1
            except subprocess.TimeoutExpired:
                kill(process, patience=1.0)
    return ended


def main() -> int:
    """A process of `run`: its share of the tasks."""
    path, share, count = sys.argv[1:]
    work(json.loads(Path(path).read_text())[int(share) :: int(count)], tuned_cases(), Cuda())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
