"""Process groups that live for a session: starting a process costs more than most tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distributed.processes import Processes

ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:
    sys.path.append(ROOT)  # `bench` is not installed


def _group(size: int) -> Iterator[Processes]:
    processes = Processes(size)
    yield processes
    processes.stop()


@pytest.fixture(scope="session")
def two() -> Iterator[Processes]:
    """Two ranks."""
    yield from _group(2)


@pytest.fixture(scope="session")
def three() -> Iterator[Processes]:
    """Three ranks."""
    yield from _group(3)


@pytest.fixture(scope="session")
def four() -> Iterator[Processes]:
    """Four ranks."""
    yield from _group(4)
