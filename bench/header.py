"""Where a benchmark ran: machine, versions, revision. Numbers without these mean nothing."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import flexsparse

ROOT = Path(__file__).resolve().parents[1]


def cpu_model() -> str:
    """Name of the CPU."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def git(*arguments: str) -> str | None:
    """What a git command prints in the checkout; None where it fails or there is no git."""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def version(package: str) -> str | None:
    """Installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def header(threads: int, **more: Any) -> dict[str, Any]:
    """The header of a result file.

    Args:
        threads: threads of the cases that name no number of their own.
        more: further entries (repeats, arguments).
    """
    # results are left out: the run before this one may have written them, and they change no number
    status = git("status", "--porcelain", "--", ".", ":(exclude)bench/results")
    return {
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "threads": threads,
        "gpu": None,
        "driver": None,
        "cudnn": None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "flexsparse": flexsparse.__version__,
        "git_revision": git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **more,
    }
