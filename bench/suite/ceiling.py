"""What the machine can do at most, measured in the same run: a large matrix product, a large copy."""

from __future__ import annotations

import torch

from bench.suite.cases import Case
from bench.suite.contender import Contender, Found
from bench.suite.device import Device

LARGE, SMALL = (8192, 2**31), (256, 2**16)
"""Rows of the square matrices, bytes of the copy; on a GPU, and where there is none."""


def contenders(case: Case, device: Device) -> Found:
    """``matmul`` with its rate in TFLOPS, ``copy`` with the bytes read and written in ``bytes``."""
    rows, size = LARGE if device.torch.type == "cuda" else SMALL
    a, b = (torch.randn(rows, rows, device=device.torch, dtype=case.torch_dtype) for _ in range(2))
    source = torch.randint(0, 256, (size,), device=device.torch, dtype=torch.uint8)
    target = torch.empty_like(source)
    yield Contender(impl="torch", op="ceiling", part="matmul", run=lambda turn: a @ b, flops=2.0 * rows**3, alone=True)
    copied = {"bytes": 2 * size}
    yield Contender(
        impl="torch", op="ceiling", part="copy", run=lambda turn: target.copy_(source), fields=copied, alone=True
    )
