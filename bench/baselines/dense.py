"""Dense attention on the same tokens: cuDNN and FlashAttention 2 through torch, FlashAttention 4.

Shape letters: B batch, H query heads, G KV heads, P padded tokens in tile order, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.baselines.protocol import Attend, Problem, Unavailable, first_call, need, need_cuda, package
from bench.header import version

HALF = (torch.bfloat16, torch.float16)


def cudnn(problem: Problem, training: bool) -> Attend:
    """cuDNN's attention, through torch."""
    need_cuda(problem, "dense_cudnn")
    return sdpa(problem, training, "dense_cudnn", SDPBackend.CUDNN_ATTENTION)


def fa2(problem: Problem, training: bool) -> Attend:
    """FlashAttention 2, through torch."""
    need_cuda(problem, "dense_fa2")
    return sdpa(problem, training, "dense_fa2", SDPBackend.FLASH_ATTENTION)


def sdpa(problem: Problem, training: bool, name: str, backend: SDPBackend) -> Attend:
    """`scaled_dot_product_attention` by one of its backends, all tiles seen by all."""
    _need_whole(problem, name)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, scale=problem.scale, enable_gqa=problem.gqa)

    return first_call(name, attend, f"torch {torch.__version__} {backend.name}", problem, training)


def fa4(problem: Problem, training: bool) -> Attend:
    """FlashAttention 4 (CuTe DSL), which takes and gives ``[B, P, H, D]``: transposed views, nothing is copied."""
    name = "dense_fa4"
    need_cuda(problem, name, (9, 0), (10, 0), (10, 3))
    need(problem, name, dtype=HALF)
    _need_whole(problem, name)
    cute = package("flash_attn.cute", name, name)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = cute.flash_attn_func(q, k, v, softmax_scale=problem.scale)[0]
        return out.transpose(1, 2)

    return first_call(name, attend, f"flash-attn-4 {version('flash-attn-4')}", problem, training)


def _need_whole(problem: Problem, name: str) -> None:
    if not problem.layout.whole:
        raise Unavailable(f"{name} has no padding, and tiles {problem.layout.tile} do not divide {problem.layout.grid}")
