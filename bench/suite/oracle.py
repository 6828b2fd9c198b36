"""The fine stage of one head as its definition reads, in any precision: the kept tiles' tokens, softmax, by hand backward.

Shape letters: N query tiles, M KV tiles, K list length, s slots of a query tile, t of a KV tile, P padded tokens, D head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK_BYTES = 2**29


def fine(
    q_PD: Tensor,
    k_PD: Tensor,
    v_PD: Tensor,
    keep_NM: Tensor,
    kv_counts: Tensor,
    scale: float,
    grad_PD: Tensor | None,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Output, and with ``grad_PD`` the gradients, computed in ``dtype``.

    Args:
        q_PD: one head in tile order.
        k_PD: likewise.
        v_PD: likewise.
        keep_NM: bool, the tiles that each row keeps.
        kv_counts: valid tokens of each KV tile, ``[M]``.
        scale: softmax scale.
        grad_PD: gradient of the output, zero in padding slots.
        dtype: float32 or float64.

    Returns:
        ``out``, ``dq``, ``dk``, ``dv``, each as its input; 0 for a row that keeps nothing.
    """
    N, M = keep_NM.shape
    q, k, v = (x.to(dtype).unflatten(0, (n, -1)) for x, n in ((q_PD, N), (k_PD, M), (v_PD, M)))
    g = None if grad_PD is None else grad_PD.to(dtype).unflatten(0, (N, -1))
    s, t = q.shape[1], k.shape[1]
    lists, listed = _lists(keep_NM)
    K = lists.shape[1]
    valid = listed[:, :, None] & (torch.arange(t, device=q.device) < kv_counts[lists][:, :, None])
    out = torch.zeros_like(q)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    chunk = max(1, CHUNK_BYTES // (q.element_size() * K * t * (3 * s + 3 * q.shape[-1])))
    for start in range(0, N, chunk):
        rows = slice(start, start + chunk)
        keys, values = (x[lists[rows]].flatten(1, 2) for x in (k, v))
        mask = valid[rows].flatten(1)[:, None]
        logits = (q[rows] @ keys.mT * scale).masked_fill(~mask, -math.inf)
        top = logits.amax(-1, keepdim=True)
        weights = (logits - top.masked_fill(top == -math.inf, 0)).exp()
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-30)
        out[rows] = weights @ values
        if g is None:
            continue
        d_weights = g[rows] @ values.mT
        d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True)) * scale
        dq[rows] = d_logits @ keys
        index = lists[rows].flatten()
        dk.index_add_(0, index, (d_logits.mT @ q[rows]).unflatten(1, (K, t)).flatten(0, 1))
        dv.index_add_(0, index, (weights.mT @ g[rows]).unflatten(1, (K, t)).flatten(0, 1))
    found = {"out": out} if g is None else {"out": out, "dq": dq, "dk": dk, "dv": dv}
    return {name: x.flatten(0, 1) for name, x in found.items()}


def _lists(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Kept tiles first, ``[N, K]``, and which of them are kept."""
    order = (~keep).to(torch.int8).argsort(dim=-1, stable=True)
    counts = keep.sum(-1)
    K = max(1, int(counts.max()))
    return order[:, :K], torch.arange(K, device=keep.device) < counts[:, None]


def coarse(q_NsD: Tensor, k_MtD: Tensor, v_MtD: Tensor, q_counts: Tensor, kv_counts: Tensor, scale: float) -> Tensor:
    """Coarse output of one head ``[N, D]``: softmax attention between the means of the tiles."""
    q, k, v = (
        x.sum(1) / counts.clamp_min(1).to(x.dtype)[:, None]
        for x, counts in ((q_NsD, q_counts), (k_MtD, kv_counts), (v_MtD, kv_counts))
    )
    return torch.softmax(q @ k.mT * scale, -1) @ v
