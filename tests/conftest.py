"""Shared set-up: hypothesis profiles, seeds, threads, memory that is NaN until it is written."""

import fnmatch
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton decorates a kernel
    import quick_interpreter

    quick_interpreter.install()

from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("dev", settings.get_profile("ci"), derandomize=False, max_examples=100)
settings.register_profile("nightly", settings.get_profile("dev"), max_examples=1000, print_blob=True)
settings.register_profile("mutations", settings.get_profile("ci"), phases=(Phase.generate,))  # no shrinking
settings.load_profile("ci")  # `--hypothesis-profile` loads another one after this

torch.set_num_threads(1)  # the tensors of tests are tiny: a second thread costs more than it does


SLOW = Path(__file__).with_name("slow.txt")


def slow_patterns() -> list[str]:
    """Names of `slow.txt`, in which brackets are letters."""
    return [line.replace("[", "[[]") for line in SLOW.read_text().splitlines() if line and not line.startswith("#")]


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what `slow.txt` names; where everything was collected, a name that is no test's is an error."""
    names = {item.nodeid.removeprefix("tests/"): item for item in items}
    stale = []
    for pattern in slow_patterns():
        found = fnmatch.filter(names, pattern)
        for name in found:
            names[name].add_marker(pytest.mark.slow)
        if not found:
            stale.append(pattern.replace("[[]", "["))
    if stale and config.args == config.getini("testpaths"):
        raise pytest.UsageError(f"{SLOW.name} names what is no test: {', '.join(stale)}")


def pytest_collection_finish() -> None:
    """Torch's compiler and Triton are a million objects that never go: a collection need not look at them each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No compiled code from before, none left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _with_nan(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = allocate(*args, **kwargs)
        # nothing may be written into what requires a gradient, such as the empty tensor that checkpointing of torch 2.11 makes
        return out.fill_(float("nan")) if out.is_floating_point() and not out.requires_grad else out

    return poisoned


@pytest.fixture(scope="module")
def poisoned() -> Iterator[None]:
    """Uninitialised floating point memory is NaN; for uncompiled code only."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, _with_nan(getattr(owner, name)))
        yield
