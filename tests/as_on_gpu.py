"""Custom ops that run what they run on a GPU: the templates, in Triton's interpreter, on CPU tensors.

What an op's CPU code does not read, or reads otherwise, tests on a CPU do not see: arguments of the templates, the memory
format of results. Float64, which the templates do not take, stays plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flexsparse import ops
from flexsparse.ops import tile_tokens
from flexsparse.ops.tile_attention import run_backward, run_forward, tile_attention, tile_attention_backward


def run_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, to the end of a test."""

    def instead(op: Any, run: Callable[..., Any], at: int) -> None:
        own = op._backend_fns["cpu"]
        monkeypatch.setitem(
            op._backend_fns, "cpu", lambda *args: (own if args[at].dtype == torch.float64 else run)(*args)
        )

    monkeypatch.setattr(ops, "on_gpu", lambda x: x.dtype != torch.float64)
    monkeypatch.setattr(tile_tokens, "in_one_kernel", lambda device, dtype: dtype != torch.float64)
    instead(tile_attention, run_forward, 0)
    instead(tile_attention_backward, run_backward, 2)
