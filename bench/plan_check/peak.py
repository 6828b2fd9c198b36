"""Peak memory of one step over a warm process that holds the model: each in a fresh process, as `bench.memory`.

What the plan calls activations, temporaries and lists; what kernels need in passing and the allocator holds on to comes on top.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench.memory import LAUNCH, ROOT, peak_mib
from bench.plan_check.cases import Case, inputs_of, model_of, optimizer_of, step_of
from bench.plan_check.chosen import PEAKS

AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
"""So that glibc gives memory back when it is freed: else the peak is that of its free lists too."""
SMALL = (2, 8, 8)
"""Grid of the step before."""


def added(case: Case) -> float:
    """MiB that a step needs at its worst moment, over what a process holds that ran a small one.

    Raises:
        RuntimeError: the process failed.
    """
    child = [sys.executable, "-m", "bench.plan_check.peak", case.name]
    command = [sys.executable, "-I", "-S", "-c", LAUNCH, *child]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | AT_ONCE, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"measuring the peak memory of {case.name} failed:\n{result.stderr.strip()}")
    return float(result.stdout)


def resident_mib() -> float:
    """The resident size of this process now; Linux only."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main(name: str) -> None:
    """Run one step in this process and print what it needed."""
    case = next(case for case in PEAKS if case.name == name)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = model_of(case, Path(folder))
    optimizer = optimizer_of(case, model)
    small, inputs = inputs_of(case, model, SMALL), inputs_of(case, model)
    for _ in range(2):
        step_of(case, model, small, optimizer)()
    before = resident_mib()
    step_of(case, model, inputs, optimizer)()
    print(peak_mib() - before)


if __name__ == "__main__":
    main(sys.argv[1])
