"""What the tests on a GPU share: which ops a test guards, which tests come first, what happens when the GPU is lost."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:
    sys.path.append(ROOT)  # `bench` is not installed
import bench  # noqa: E402, F401  # puts an installed flexsparse before the checkout, which would hide it and is none

WIDTHS = (128, 64)
FILES = ("test_templates", "test_candidates", "test_models", "test_bsa")
"""The time may end before all have run: first what runs by default, then what may be chosen, whole models, BSA's kernels."""
GRAPHS = "test_models"
"""Its tests compile whole graphs, dozens of kernels each: how long they take says nothing, and kernels that hang have tests
of their own."""


def pytest_configure(config: Any) -> None:
    config.addinivalue_line("markers", "guards(*ops): no time is reported for these ops while the test fails")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """The configurations that are measured come first; each test says what it guards, for `bench.suite.pytest_rows`."""
    own = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in own:
        item.user_properties.append(("guards", guarded(item)))
        if item.path.stem == GRAPHS and config.pluginmanager.hasplugin("timeout"):
            item.add_marker(pytest.mark.timeout(0))
    items[:] = sorted(items, key=lambda item: rank(item) if item in own else (0, 0))
    if config.getoption("--first", False):  # of `bench.suite.pytest_rows`
        items[:] = [item for item in items if item not in own or not rank(item)[0]]


def guarded(item: Any) -> dict[str, Any]:
    """Ops, and the head dim, dtype, method, slots and choice of kernel that the test is about."""
    parameters = getattr(item, "callspec", None)
    values = {} if parameters is None else parameters.params
    found: dict[str, Any] = {}
    if isinstance(values.get("D"), int):  # what is parametrized with nothing has another value
        found["D"] = values["D"]
    if isinstance(values.get("dtype"), torch.dtype):
        found["dtype"] = str(values["dtype"]).removeprefix("torch.")
    if item.path.stem == "test_bsa":
        found["method"] = "bsa"
    if item.path.stem == GRAPHS:
        found["graphs"] = True
    if hasattr(values.get("choice"), "config"):
        found |= {"choice": values["choice"].config(), "slots": values["slots"]}
    mark = item.get_closest_marker("guards")
    return found if mark is None else {**found, "guards": list(mark.args)}


def rank(item: Any) -> tuple[int, int]:
    """bfloat16 at the head dims that are measured first, with what has neither; of these what runs by default (`FILES`)."""
    values = item.callspec.params if hasattr(item, "callspec") else {}
    rare = 2 * (values.get("dtype", torch.bfloat16) != torch.bfloat16) + (values.get("D", 128) not in WIDTHS)
    return rare, FILES.index(item.path.stem) if item.path.stem in FILES else 0


@pytest.fixture(autouse=True)
def gpu_still_answers() -> Iterator[None]:
    """After an illegal access nothing works in this process: end it, so that the other tests run in a new one."""
    yield
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(75)
        pytest.exit(f"the GPU is lost: {error}", returncode=75)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """No compiled code from before, none left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
