"""`bench` is not installed: it is imported from the checkout."""

import sys
from pathlib import Path

import pytest

ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:
    sys.path.append(ROOT)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The places of the baselines' packages taken, and no GPU asked for."""
    from baseline_fakes import take_places

    take_places(monkeypatch)
