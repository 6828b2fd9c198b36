"""Nothing stays of a compiled model that is unwrapped or gone, and nothing piles up while it runs."""

from __future__ import annotations

import contextvars
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.eval_frame import cached_backends

import flexsparse as fs

from .conftest import run, video


def nodes() -> int:
    """Of all graphs that are in memory."""
    for _ in range(3):  # what is found gone takes others with it
        gc.collect()
    return sum(isinstance(one, torch.fx.Node) for one in gc.get_objects())


def backends() -> int:
    """That torch lists; None is one of its own."""
    return sum(one is not None for one in cached_backends.values())


@pytest.mark.parametrize(
    ("compile", "way"),
    [
        ("regional", "gone"),
        ("regional", "unwrapped"),
        pytest.param(True, "gone", marks=pytest.mark.slow),
        pytest.param(True, "unwrapped", marks=pytest.mark.slow),
    ],
)
def test_graphs_go_with_the_model(wan: Callable[[], nn.Module], compile: Any, way: str) -> None:
    """A sweep over settings, or a server that changes models, would fill memory."""
    before, known = nodes(), backends()
    model = fs.wrap(wan(), fs.VSA(sparsity=0.5), min_tokens=20, gates=True, compile=compile, inner="aot_eager")
    run(model, video()).square().mean().backward()
    with torch.no_grad():
        run(model, video(T=2, H=4, W=8))  # dense
    state = weakref.ref(model._flexsparse)  # type: ignore[arg-type]
    assert nodes() > before + 100 and backends() > known
    if way == "unwrapped":
        fs.unwrap(model)
    del model
    assert nodes() == before and backends() == known and state() is None


def test_a_backward_after_unwrap(wan: Callable[[], nn.Module]) -> None:
    """What was compiled for a forward still serves its backward."""
    plain, model = wan(), fs.wrap(wan(), fs.VSA(sparsity=0.0), compile="regional", inner="aot_eager")
    loss = run(model, video()).square().mean()
    fs.unwrap(model)
    loss.backward()
    run(plain, video()).square().mean().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)


def test_calls_leave_nothing_in_the_thread(wan: Callable[[], nn.Module]) -> None:
    """Torch's own patch of its settings makes a context variable at every use."""
    model = fs.wrap(wan(), fs.VSA(sparsity=0.5), compile="regional", inner="aot_eager")
    with torch.no_grad():
        run(model, video())
        before = len(contextvars.copy_context())
        for _ in range(3):
            run(model, video())
    assert len(contextvars.copy_context()) == before
