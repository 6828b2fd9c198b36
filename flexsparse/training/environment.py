"""Where a run happens: versions, device, CPU, git revision."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from flexsparse.training.errors import RunError

PACKAGES = ("flexsparse", "torch", "triton", "einops", "numpy", "diffusers", "accelerate", "peft")
MAX_THREADS = 1024


def versions() -> dict[str, str]:
    """Installed versions of Python and of the packages that matter; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """The CPU's name and the number of cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def git_revision() -> str | None:
    """Revision of the checkout that flexsparse runs from, with `-dirty`; None outside of a checkout."""
    here = Path(__file__).resolve()
    if _git(here, "ls-files", "--error-unmatch", here.name) is None:
        return None  # installed: a repository around the environment would be somebody else's
    return _git(here, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _git(file: Path, *arguments: str) -> str | None:
    """What a git command prints; None if it fails or there is no git."""
    command = ["git", "-C", str(file.parent), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (result.stdout.strip() or None) if result.returncode == 0 else None


def check_seed(seed: int) -> None:
    """Raise a `RunError` for a seed that torch does not take."""
    if not 0 <= seed < 2**63:
        raise RunError(f"--seed {seed} is negative or too large: pass a number from 0 to 2**63 - 1")


def check_threads(threads: int | None) -> None:
    """Checks a number of CPU threads, None for as many as torch takes.

    Raises:
        RunError: there cannot be so many.
    """
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        wrong = "small: pass at least 1" if threads < 1 else f"large: pass at most {MAX_THREADS}; one a core is fastest"
        raise RunError(f"--threads {threads} is too {wrong}")


def check_device(device: str) -> None:
    """Checks that a device can be used.

    Raises:
        RunError: CUDA is asked for and this machine or this torch has none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RunError(
            f"--device cuda: torch {torch.__version__} sees no CUDA device: use --device cpu, or install a "
            "CUDA build of torch and a driver"
        )


def describe(device: str) -> dict[str, Any]:
    """Header of metrics.json, as far as the machine is concerned."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "git_revision": git_revision(),
        "versions": versions(),
    }
