"""NVIDIA's block-sparse attention in cudnn-frontend (CuTe DSL, compiled at the first call), on Hopper.

`cudnn.block_sparse_attention` 1.32.0: ``[B, H, P, D]`` as we have it, int32 lists ``[B, H, N, K]``, one block size for queries
and keys. Its backward makes the transposed lists anew in every call, and offers no way to bring them.

Shape letters: B batch, H query heads, P padded tokens in tile order, N query tiles, K list length, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.baselines.lists import Lists, lists_of
from bench.baselines.protocol import Attend, Problem, first_call, need, need_cuda, package
from bench.header import version

HALF = (torch.bfloat16, torch.float16)


class BlockSparse(torch.autograd.Function):
    """Attention over lists; ``api`` is the package's module, or anything with its two functions."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, api: Any, index: Tensor, how: dict[str, Any]) -> Tensor:
        """``[B, H, P, D]``."""
        found = api.block_sparse_attention_forward(q, k, v, index, **how)
        out: Tensor = found["o_tensor"]
        ctx.save_for_backward(q, k, v, out, found["lse_tensor"])
        ctx.api, ctx.index, ctx.how = api, index, how
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of q, k and v, in their dtype."""
        found = ctx.api.block_sparse_attention_backward(grads[0].contiguous(), *ctx.saved_tensors, ctx.index, **ctx.how)
        return (*(found[f"{name}_tensor"] for name in ("dq", "dk", "dv")), None, None, None)


def prepare(problem: Problem, training: bool) -> Attend:
    """cudnn-frontend's kernels for 64 and 128 slots; backward for bfloat16, D of 128 and as many KV heads as query heads."""
    name = "cudnn_frontend"
    need_cuda(problem, name, (9, 0))
    need(problem, name, slots=(64, 128), D=(64, 128), dtype=HALF)
    if training:
        need(problem, f"{name}'s backward", D=(128,), dtype=(torch.bfloat16,), gqa=(False,))
    api = package("cudnn.block_sparse_attention.api", name, name)
    lists = lists_of(problem, name, columns=False)
    how = arguments(problem, lists)
    return first_call(
        name,
        lambda q, k, v: BlockSparse.apply(q, k, v, api, lists.q2k, how),
        f"nvidia-cudnn-frontend {version('nvidia-cudnn-frontend')}, blocks of {problem.layout.slots}",
        problem,
        training,
    )


def arguments(problem: Problem, lists: Lists) -> dict[str, Any]:
    """Keyword arguments that forward and backward share.

    The 128 kernel has a faster form for equal counts, which it takes where no counts are given; the 64 kernel would fill a
    tensor with them in every call.
    """
    slots = problem.layout.slots
    counts = None if slots == 128 and lists.fixed is not None else lists.q2k_counts
    return {
        "block_sparse_num": lists.q2k.shape[-1],
        "block_sizes": None if problem.layout.whole else lists.sizes,
        "q2k_block_nums": counts,
        "sparse_block_size": slots,
        "softmax_scale": problem.scale,
        "layout": "bhsd",
    }
