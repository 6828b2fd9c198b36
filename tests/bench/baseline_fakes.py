"""Fakes of the baselines' packages, in the formats that the real ones document: attention over lists, in float32.

Shape letters: B batch, H query heads, G KV heads, P padded tokens, D head dim, N query tiles, M KV tiles.
"""

import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from bench.baselines import (
    attention_gym,
    cudnn_frontend,
    dense,
    fastvideo_tk,
    fastvideo_triton,
    flex,
)


def listed(index: Tensor, counts: Tensor, width: int) -> Tensor:
    """Bool ``[B, H, rows, width]`` of lists, entry by entry; entries past a count are not looked at."""
    assert index.dtype == counts.dtype == torch.int32 and index.is_contiguous() and counts.is_contiguous()
    assert index.shape[:3] == counts.shape
    keep = torch.zeros(*counts.shape, width, dtype=torch.bool)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
        for entry in index[tuple(place)][: int(counts[tuple(place)])]:
            assert not keep[(*place, int(entry))], "a tile is listed twice"
            keep[(*place, int(entry))] = True
    return keep


def naive(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, sizes: Tensor, slots: int, scale: float) -> Any:
    """Output in q's dtype and log-sum-exp ``[B, H, P]``."""
    assert sizes.dtype == torch.int32 and sizes.shape == (k.shape[2] // slots,)
    valid = (torch.arange(slots) < sizes[:, None]).flatten()
    seen = keep.repeat_interleave(slots, 2).repeat_interleave(slots, 3) & valid
    k, v = (x.float().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = (q.float() @ k.mT * scale).masked_fill(~seen, -math.inf)
    return (logits.softmax(-1) @ v).to(q.dtype), logits.logsumexp(-1)


def naive_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *what: Any) -> list[Tensor]:
    """Float32 gradients of `naive`, of which the last arguments are."""
    inputs = [x.float().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        return list(torch.autograd.grad(naive(*inputs, *what)[0], inputs, grad.float()))


class FakeThunderKittens:
    """`fastvideo_kernel_ops`, argument for argument: 6 tensors forward, 9 backward."""

    @staticmethod
    def block_sparse_fwd(q: Tensor, k: Tensor, v: Tensor, q2k: Tensor, counts: Tensor, sizes: Tensor) -> list[Tensor]:
        for x in (q, k, v):
            assert x.dtype == torch.bfloat16 and x.is_contiguous()
        out, lse = naive(q, k, v, listed(q2k, counts, len(sizes)), sizes, 64, q.shape[-1] ** -0.5)
        return [out, lse[..., None]]

    @staticmethod
    def block_sparse_bwd(
        q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, k2q: Tensor, counts: Tensor, sizes: Tensor
    ) -> list[Tensor]:
        assert lse.shape == (*q.shape[:3], 1) and lse.dtype == torch.float32 and do.is_contiguous()
        assert k2q.shape[2] == len(sizes)
        keep = listed(k2q, counts, q.shape[2] // 64).mT
        again, _ = naive(q, k, v, keep, sizes, 64, q.shape[-1] ** -0.5)
        assert torch.equal(again, o), "the columns are not the rows' transpose"
        return naive_backward(do, q, k, v, keep, sizes, 64, q.shape[-1] ** -0.5)


class FakeFastVideoTriton:
    """`block_sparse_attn_triton`: arguments of backward begin with the output's gradient; both sets of lists."""

    @staticmethod
    def triton_block_sparse_attn_forward(
        q: Tensor, k: Tensor, v: Tensor, q2k_index: Tensor, q2k_num: Tensor, variable_block_sizes: Tensor
    ) -> tuple[Tensor, Tensor]:
        keep = listed(q2k_index, q2k_num, len(variable_block_sizes))
        out, lse = naive(q, k, v, keep, variable_block_sizes, 64, q.shape[-1] ** -0.5)
        return out, lse / math.log(2)

    @staticmethod
    def triton_block_sparse_attn_backward(
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        M: Tensor,
        q2k_index: Tensor,
        q2k_num: Tensor,
        k2q_index: Tensor,
        k2q_num: Tensor,
        variable_block_sizes: Tensor,
    ) -> tuple[Tensor, ...]:
        assert do.is_contiguous() and M.shape == q.shape[:3]
        keep = listed(q2k_index, q2k_num, len(variable_block_sizes))
        assert torch.equal(keep.mT, listed(k2q_index, k2q_num, q2k_index.shape[2]))
        assert torch.equal(naive(q, k, v, keep, variable_block_sizes, 64, q.shape[-1] ** -0.5)[0], o)
        found = naive_backward(do, q, k, v, keep, variable_block_sizes, 64, q.shape[-1] ** -0.5)
        return tuple(x.to(q.dtype) for x in found)


def cudnn_keep(
    q: Tensor,
    k: Tensor,
    index: Tensor,
    block_sparse_num: int,
    block_sizes: Tensor | None,
    q2k_block_nums: Tensor | None,
    sparse_block_size: int,
) -> tuple[Tensor, Tensor, int]:
    M = k.shape[2] // sparse_block_size
    assert 1 <= block_sparse_num <= index.shape[-1] and index.shape[2] == q.shape[2] // sparse_block_size
    if q2k_block_nums is None:
        q2k_block_nums = torch.full(index.shape[:3], block_sparse_num, dtype=torch.int32)
    sizes = torch.full((M,), sparse_block_size, dtype=torch.int32) if block_sizes is None else block_sizes
    return listed(index, q2k_block_nums, M), sizes, sparse_block_size


def cudnn_forward(
    q_tensor: Tensor,
    k_tensor: Tensor,
    v_tensor: Tensor,
    q2k_block_index: Tensor,
    block_sparse_num: int | None = None,
    block_sizes: Tensor | None = None,
    q2k_block_nums: Tensor | None = None,
    *,
    sparse_block_size: int | None = None,
    softmax_scale: float | None = None,
    layout: str = "bhsd",
) -> dict[str, Tensor]:
    assert layout == "bhsd" and sparse_block_size and softmax_scale and block_sparse_num
    how = (q2k_block_index, block_sparse_num, block_sizes, q2k_block_nums, sparse_block_size)
    out, lse = naive(q_tensor, k_tensor, v_tensor, *cudnn_keep(q_tensor, k_tensor, *how), softmax_scale)
    return {"o_tensor": out, "lse_tensor": lse}


def cudnn_backward(
    do_tensor: Tensor,
    q_tensor: Tensor,
    k_tensor: Tensor,
    v_tensor: Tensor,
    o_tensor: Tensor,
    lse_tensor: Tensor,
    *lists: Any,
    softmax_scale: float | None = None,
    **how: Any,
) -> dict[str, Tensor]:
    again = cudnn_forward(q_tensor, k_tensor, v_tensor, *lists, softmax_scale=softmax_scale, **how)
    assert torch.equal(again["o_tensor"], o_tensor) and torch.equal(again["lse_tensor"], lse_tensor)
    assert softmax_scale and how.pop("layout") == "bhsd"
    keep = cudnn_keep(q_tensor, k_tensor, *lists, **how)
    found = naive_backward(do_tensor, q_tensor, k_tensor, v_tensor, *keep, softmax_scale)
    return {f"{name}_tensor": x.to(q_tensor.dtype) for name, x in zip(("dq", "dk", "dv"), found)}


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None) -> tuple[Tensor, None]:
    """`flash_attn.cute.flash_attn_func`: ``[B, P, H, D]``, the output and a log-sum-exp that may be None."""
    assert softmax_scale is not None and all(x.stride(-1) == 1 for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=softmax_scale, enable_gqa=gqa)
    return out.transpose(1, 2), None


def create_vsa_block_mask(
    topk_indices: Tensor, tile_numel: int, num_kv_tiles: int, variable_block_sizes: Tensor | None = None
) -> BlockMask:
    """`attn_gym.masks.vsa`'s: lists of whole tiles, or with sizes of partial ones and a mask function for their padding."""
    assert topk_indices.dim() == 4
    rows, K = topk_indices.shape[:3], topk_indices.shape[-1]
    lists = torch.zeros(*rows, num_kv_tiles, dtype=torch.int32)
    lists[..., :K] = topk_indices
    counts, none = torch.full(rows, K, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    shape = {"BLOCK_SIZE": tile_numel, "seq_lengths": (rows[2] * tile_numel, num_kv_tiles * tile_numel)}
    if variable_block_sizes is None:
        return BlockMask.from_kv_blocks(none, torch.zeros_like(lists), counts, lists, mask_mod=None, **shape)

    def padding(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return kv % tile_numel < variable_block_sizes[kv // tile_numel]

    return BlockMask.from_kv_blocks(counts, lists, none, torch.zeros_like(lists), mask_mod=padding, **shape)


FAKES: dict[str, dict[str, Any]] = {
    "flash_attn.cute": {"flash_attn_func": flash_attn_func},
    "cudnn.block_sparse_attention.api": {
        "block_sparse_attention_forward": cudnn_forward,
        "block_sparse_attention_backward": cudnn_backward,
    },
    "attn_gym.masks.vsa": {"create_vsa_block_mask": create_vsa_block_mask},
}


def take_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fakes in the packages' places, and no GPU asked for."""
    for full, contents in FAKES.items():
        for depth in range(1, full.count(".") + 2):
            monkeypatch.setitem(
                sys.modules, (name := ".".join(full.split(".")[:depth])), fake := types.ModuleType(name)
            )
            fake.__path__ = []
        fake.__dict__.update(contents)
    monkeypatch.setattr(fastvideo_tk, "root_of", Path)
    monkeypatch.setattr(fastvideo_tk, "load_ops", lambda root: FakeThunderKittens)
    monkeypatch.setattr(fastvideo_triton, "load_kernels", lambda: FakeFastVideoTriton)
    for module in (attention_gym, cudnn_frontend, dense, fastvideo_tk, fastvideo_triton, flex):
        monkeypatch.setattr(module, "need_cuda", lambda *_: None)
    flex._won.cache_clear()
