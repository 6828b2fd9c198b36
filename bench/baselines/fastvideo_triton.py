"""FastVideo's block-sparse attention in Triton, from the `fastvideo-kernel` package.

Its one file that holds the kernels is loaded by itself: the package imports much else. Forward and backward are called
directly, with lists made beforehand (the package's own op transposes them in every backward).

Shape letters: B batch, H heads, P padded tokens in tile order, D head dim.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.baselines.lists import Lists, lists_of
from bench.baselines.protocol import Attend, Problem, Unavailable, first_call, need, need_cuda, one_line, remedy
from bench.header import version

FILE = "triton_kernels/block_sparse_attn_triton.py"


class BlockSparse(torch.autograd.Function):
    """Attention over lists; ``kernels`` is the package's module, or anything with its two functions."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernels: Any, lists: Lists) -> Tensor:
        """``[B, H, P, D]``."""
        out: Tensor
        out, lse = kernels.triton_block_sparse_attn_forward(q, k, v, lists.q2k, lists.q2k_counts, lists.sizes)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.kernels, ctx.lists = kernels, lists
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of q, k and v, in their dtype."""
        lists: Lists = ctx.lists
        rows, columns = (lists.q2k, lists.q2k_counts), (lists.k2q, lists.k2q_counts)
        found = ctx.kernels.triton_block_sparse_attn_backward(
            grads[0].contiguous(), *ctx.saved_tensors, *rows, *columns, lists.sizes
        )
        return (*found, None, None)


def prepare(problem: Problem, training: bool) -> Attend:
    """FastVideo's Triton kernels: bfloat16 (to which they round weights whatever the inputs), 64 slots, scale D ** -0.5."""
    name = "fastvideo_triton"
    need_cuda(problem, name)
    need_fastvideo(problem, name)
    kernels = load_kernels()
    lists = lists_of(problem, name, columns=training)
    note = f"fastvideo-kernel {version('fastvideo-kernel')}, {FILE}"
    return first_call(name, lambda q, k, v: BlockSparse.apply(q, k, v, kernels, lists), note, problem, training)


def need_fastvideo(problem: Problem, name: str) -> None:
    """What both of FastVideo's kernels take.

    Raises:
        Unavailable: the problem is something else.
    """
    D = problem.q_BHPD.shape[-1]
    need(problem, name, slots=(64,), D=(64, 128), dtype=(torch.bfloat16,), gqa=(False,), scale=(D**-0.5,))


def root_of(name: str) -> Path:
    """The folder that holds the package `fastvideo_kernel`, which is not imported.

    Raises:
        Unavailable: there is none on the import path.
    """
    spec = importlib.util.find_spec("fastvideo_kernel")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    if not places:
        raise Unavailable(f"{name} needs the package fastvideo-kernel: {remedy('fastvideo')}")
    return Path(places[0]).parent


def load_kernels() -> Any:
    """The module with FastVideo's Triton kernels.

    Raises:
        Unavailable: there is none, or it cannot be imported.
    """
    full = "bench_fastvideo_triton"
    if full in sys.modules:
        return sys.modules[full]
    path = root_of("fastvideo_triton") / "fastvideo_kernel" / FILE
    spec = importlib.util.spec_from_file_location(full, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[full] = module  # Triton finds a kernel's source through its module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[full]
        raise Unavailable(
            f"fastvideo_triton cannot import {path} ({one_line(error)}): {remedy('fastvideo')}"
        ) from error
    return module
