"""FLOPs of the attention ops for `torch.utils.flop_counter.FlopCounterMode`, which counts nothing of an op it does not know.

As in `planning.attention`: two FLOPs a multiply-add, whole tiles, padding included; a backward is 2.5 forwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from flexsparse.backends import gather  # noqa: F401  # registers its ops
from flexsparse.ops import coarse_select, tile_attention  # noqa: F401

FORWARD, BACKWARD = 2, 5
"""Matrix products of a pair of tiles."""


def _flops(
    products: int,
    q: Tensor,
    rows: int,
    counts: Tensor,
    kv_counts: Tensor,
    query_rows: int,
    kv_video: int,
    slots: int,
    capacity: int,
) -> int:
    """Of kept tiles, extra tiles, and extra rows, which see everything.

    Raises:
        RuntimeError: counts that have no values. (A compiler that weighs nodes by their FLOPs is told the most it can be.)
    """
    B, H, _, D = q.shape
    N, tiles = counts.shape[2], kv_counts.shape[-1]
    if not counts.is_meta and not isinstance(counts, FakeTensor):
        kept = int(counts.expand(B, H, N).sum())
    elif torch._guards.TracingContext.try_get() is not None:
        kept = B * H * N * capacity
    else:
        raise RuntimeError(
            "FLOPs are counted of a selection without values (meta or fake tensors), and how many tiles it keeps is not "
            "known: count a forward of real tensors, or use `flexsparse plan`"
        )
    pairs = query_rows * (kept + B * H * N * (tiles - kv_video)) + B * H * (rows - N * query_rows) * tiles
    return 2 * products * D * pairs * slots


@register_flop_formula(torch.ops.flexsparse.gather_attention, get_raw=True)
def _gather(q: Tensor, k: Tensor, v: Tensor, *args: Any, **_: Any) -> int:
    _bits, counts, kv_counts, query_rows, _first, _kv_first, kv_video, slots = args[:8]
    return _flops(FORWARD, q, q.shape[2], counts, kv_counts, query_rows, kv_video, slots, kv_video)


@register_flop_formula(torch.ops.flexsparse.gather_attention_backward, get_raw=True)
def _gather_backward(grad: Tensor, grad_lse: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **_: Any) -> int:
    _out, _lse, _bits, counts, kv_counts, query_rows, _first, _kv_first, kv_video, slots = args[:10]
    return _flops(BACKWARD, q, q.shape[2], counts, kv_counts, query_rows, kv_video, slots, kv_video)


@register_flop_formula(torch.ops.flexsparse.tile_attention, get_raw=True)
def _tiles(q: Tensor, k: Tensor, v: Tensor, *args: Any, **_: Any) -> int:
    _coarse, _gate, _bits, counts, kv_counts, query_rows, *_ends, _kv_first, kv_video, slots, capacity = args[:12]
    return _flops(FORWARD, q, _rows(q, args[16:]), counts, kv_counts, query_rows, kv_video, slots, capacity)


@register_flop_formula(torch.ops.flexsparse.tile_attention_backward, get_raw=True)
def _tiles_backward(grad: Tensor, grad_lse: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **_: Any) -> int:
    _out, _lse, _coarse, _gate, _bits, counts, kv_counts, query_rows, *_ends, _kv_first, kv_video, slots, capacity = (
        args[:14]
    )
    return _flops(BACKWARD, q, _rows(q, args[17:]), counts, kv_counts, query_rows, kv_video, slots, capacity)


@register_flop_formula(torch.ops.flexsparse.coarse_select, get_raw=True)
def _coarse(q: Tensor, k: Tensor, v: Tensor | None, *args: Any, **_: Any) -> int:
    """Scores of all pairs of tiles, and the coarse output where there are values; pooling is no product."""
    q_tokens, kv_tokens = (*args, None, None)[10:12]
    N, M = (x.shape[2] if table is None else table.shape[0] for x, table in ((q, q_tokens), (k, kv_tokens)))
    return 2 * (1 if v is None else FORWARD) * q.shape[0] * q.shape[1] * N * M * q.shape[-1]


@register_flop_formula(torch.ops.flexsparse.coarse_select_backward, get_raw=True)
def _coarse_backward(
    d_coarse: Tensor, coarse: Tensor, lse: Tensor, q_c: Tensor, k_c: Tensor, *_: Any, **__: Any
) -> int:
    """The scores again, and a product for each gradient of them, of q, k and v."""
    return 2 * BACKWARD * q_c.numel() * k_c.shape[2]


def _rows(q: Tensor, tables: tuple[Any, ...]) -> int:
    """Query rows as computed: of the table of tokens, where q comes in raster order."""
    return q.shape[2] if not tables or tables[0] is None else tables[0].shape[0]
