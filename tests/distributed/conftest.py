"""Process groups that live for a session: starting a process costs more than most tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from distributed.processes import Processes


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
