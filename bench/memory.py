"""Peak memory of one forward and backward: each measurement in a fresh process, over the same warm start."""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

from bench.cases import DENSE, Case
from bench.problem import make, training

ROOT = Path(__file__).resolve().parents[1]

# A process starts with the peak of the one that started it (Linux carries ru_maxrss over exec). A small one in
# between keeps the benchmark's own gigabytes out of the figure.
LAUNCH = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"


def peak_memory(case: Case, impl: str, threads: int, repeats: int = 3) -> list[float]:
    """MiB that forward and backward add to the peak of a warm process, one sample a process.

    Raises:
        RuntimeError: the process failed.
    """
    fields = dataclasses.asdict(dataclasses.replace(case, entries=()))
    child = [sys.executable, "-m", "bench.memory", json.dumps(fields), impl, str(threads)]
    samples = []
    for _ in range(repeats):
        command = [sys.executable, "-I", "-S", "-c", LAUNCH, *child]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"measuring the peak memory of {impl} failed:\n{result.stderr.strip()}")
        samples.append(float(result.stdout))
    return samples


def peak_mib() -> float:
    """The largest resident size this process had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def main(argv: list[str] | None = None) -> None:
    """Run one measurement in this process and print it."""
    parser = argparse.ArgumentParser(description="One measurement of peak memory; bench.cpu starts these processes.")
    parser.add_argument("case", help="fields of a bench.cases.Case, JSON")
    parser.add_argument("impl")
    parser.add_argument("threads", type=int)
    options = parser.parse_args(argv)
    fields = json.loads(options.case)
    tile = fields["tile"] if fields["tile"] == "auto" else tuple(fields["tile"])
    case = Case(**{**fields, "grid": tuple(fields["grid"]), "tile": tile, "entries": ()})
    torch.set_num_threads(options.threads)
    inputs = make(case, case.grid)
    small = make(case, case.small_grid)
    for impl in (DENSE, "flexsparse_gather"):  # libraries, kernels and caches are there before the count starts
        training(impl, small)
    warm = peak_mib()
    training(options.impl, inputs)
    print(peak_mib() - warm)


if __name__ == "__main__":
    main()
