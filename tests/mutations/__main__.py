"""Plants each bug of the catalogue into a copy of the package and demands that a test fails.

    python -m tests.mutations                     # all of them
    python -m tests.mutations scale representative    # those whose name holds one of the words

The checkout is never changed. Exit code 1 if a bug survives, if its text is not found exactly once, or if the tests
do not pass on an unchanged copy.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.mutations.catalogue import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 600  # seconds for one run of tests
PASSED, FAILED = 0, 1  # pytest's exit codes; any other means that the tests did not run as they should

GUARD = """
import pathlib

import pytest


def pytest_collection_finish(session):
    import flexsparse
    import flexsparse.masks

    for module in (flexsparse, flexsparse.masks):
        if HERE not in pathlib.Path(module.__file__).resolve().parents:
            pytest.exit(f"{module.__file__} is not the copy under test", returncode=9)


HERE = pathlib.Path(__file__).resolve().parent
"""


def copy_package(folder: Path) -> Path:
    """The package as it is installed, with `masks` and `compile_passes` in their places."""
    ignored = shutil.ignore_patterns("__pycache__")
    package = folder / "flexsparse"
    shutil.copytree(ROOT / "flexsparse", package, ignore=ignored)
    for name in ("masks", "compile_passes"):
        shutil.copytree(ROOT / name, package / name, ignore=ignored)
    (folder / "mutation_guard.py").write_text(GUARD)
    return package


def plant(package: Path, mutation: Mutation) -> None:
    """Replace the text of a mutation.

    Raises:
        ValueError: the text does not occur exactly once.
    """
    path = package / mutation.file
    source = path.read_text()
    found = source.count(mutation.old)
    if found != 1:
        raise ValueError(f"{mutation.old!r} occurs {found} times in {mutation.file}, not once")
    path.write_text(source.replace(mutation.old, mutation.new))


def run_tests(folder: Path, tests: tuple[str, ...], limit: int = LIMIT) -> tuple[int, str]:
    """Run tests against the copy: pytest's exit code, and the first failure or the last line of the output."""
    targets = [str(ROOT / "tests" / test) if ".py" in test else test for test in tests]
    options = ["-x", "-m", "not slow", "-p", "no:cacheprovider", "-p", "mutation_guard", "--tb=no", "-rf"]
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    done = subprocess.run(
        [*command, *options, "--hypothesis-profile", "mutations", *targets],
        cwd=folder,  # not the checkout: Python puts the working folder first
        env=os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    failed = re.search(r"^FAILED \S*?::(\w+)", done.stdout, re.MULTILINE)
    lines = (done.stdout + done.stderr).strip().splitlines()
    return done.returncode, failed.group(1) if failed else lines[-1] if lines else "no output"


def try_mutation(mutation: Mutation) -> tuple[bool, str]:
    """Whether the bug was caught, and by what."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        package = copy_package(folder)
        try:
            plant(package, mutation)
            code, detail = run_tests(folder, mutation.tests)
        except (ValueError, subprocess.TimeoutExpired) as error:
            return False, f"NOT RUN: {error}"
    if code == FAILED:
        return True, detail
    return False, "SURVIVED" if code == PASSED else f"NOT RUN: pytest ended with {code}: {detail}"


def unchanged_copy_passes(mutations: list[Mutation]) -> bool:
    """Whether the tests pass without a bug; otherwise every bug would seem to be caught."""
    chosen = sorted({test for mutation in mutations for test in mutation.tests if ".py" in test})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copy_package(folder)
        code, detail = run_tests(folder, tuple(chosen), 3 * LIMIT)
    if code != PASSED:
        print(f"the tests do not pass on an unchanged copy (pytest ended with {code}): {detail}")
    return code == PASSED


def main(words: list[str]) -> int:
    """Run the catalogue, or the mutations whose name holds a word; returns the exit code."""
    chosen = [m for m in MUTATIONS if not words or any(word in m.name for word in words)]
    if not chosen:
        print(f"no mutation's name holds one of {words}; there are: {', '.join(m.name for m in MUTATIONS)}")
        return 1
    if not unchanged_copy_passes(chosen):
        return 1
    width = max(len(mutation.name) for mutation in chosen)
    caught = 0
    for mutation in chosen:
        start = time.monotonic()
        found, detail = try_mutation(mutation)
        caught += found
        mark = "caught" if found else "FAILED"
        print(f"{mark}  {mutation.name:<{width}}  {time.monotonic() - start:5.1f} s  {detail}", flush=True)
    print(f"{caught} of {len(chosen)} mutations caught")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
