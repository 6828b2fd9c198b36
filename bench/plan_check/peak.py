"""Peak memory of one step over a warm process that holds the model: each in a fresh process, as `bench.memory`.

What the plan calls activations and lists; temporaries, and what the allocator holds on to, come on top.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench.memory import LAUNCH, ROOT, peak_mib
from bench.plan_check.cases import Case, inputs_of, model_of, optimizer_of, step_of
from bench.plan_check.chosen import PEAKS

SMALL = (2, 8, 8)
"""Grid of the step before."""


def added(case: Case) -> float:
    """MiB that a step adds to the peak of a process that ran a small one.

    Raises:
        RuntimeError: the process failed.
    """
    child = [sys.executable, "-m", "bench.plan_check.peak", case.name]
    command = [sys.executable, "-I", "-S", "-c", LAUNCH, *child]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"measuring the peak memory of {case.name} failed:\n{result.stderr.strip()}")
    return float(result.stdout)


def main(name: str) -> None:
    """Run one step in this process and print what it added."""
    case = next(case for case in PEAKS if case.name == name)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = model_of(case, Path(folder))
    optimizer = optimizer_of(case, model)
    small, inputs = inputs_of(case, model, SMALL), inputs_of(case, model)
    for _ in range(2):
        step_of(case, model, small, optimizer)()
    warm = peak_mib()
    step_of(case, model, inputs, optimizer)()
    print(peak_mib() - warm)


if __name__ == "__main__":
    main(sys.argv[1])
