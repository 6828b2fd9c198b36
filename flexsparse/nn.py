"""Modules for models written from scratch.

Shape letters: B batch, S tokens in raster order, H query heads, G KV heads, D head dim, C channels.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn

from flexsparse.attention import sparse_attention
from flexsparse.backends import NAMES
from flexsparse.gates import NAME, Gate
from flexsparse.given import to_int
from flexsparse.layout import TileLayout
from flexsparse.masks.combine import name_of
from flexsparse.schedule import schedules_of
from flexsparse.tables import is_tracing, lasting, this_device

if TYPE_CHECKING:
    from flexsparse.distributed import SequenceParallel


def rope_frequencies(
    layout: TileLayout, head_dim: int, base: float = 10000.0, device: Any = "cpu"
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of a 3D rotary embedding, float32 ``[S, D / 2]`` each, in the order of the layout's tokens.

    The channel pairs are split among (t, h, w): a third each to h and w, the rest to t. Extra tokens are not rotated.
    """
    pairs = head_dim // 2
    share = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    first, total = layout.text_first, layout.num_tokens
    _, H, W = layout.grid
    if layout.order == "tiles":  # tiles are full: each slot holds a token
        slots = dataclasses.replace(layout, order="raster").index(device)[0]
        index = slots.narrow(0, first, total).long() - first
    else:
        index = torch.arange(total, device=device)
    places = [index // (H * W), index // W % H, index % W]
    angles = []
    for place, count in zip(places, share):
        rate = base ** (-torch.arange(count, device=device, dtype=torch.float32) / max(count, 1))
        angles.append(place[:, None].float() * rate)
    angle = nn.functional.pad(torch.cat(angles, dim=-1), (0, 0, first, layout.text_last))
    return angle.cos(), angle.sin()


@functools.lru_cache(4)  # as large as q: layers share them, and all calls of a resolution
@torch.inference_mode(False)
def _cached_frequencies(layout: TileLayout, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    cos, sin = lasting(rope_frequencies(layout, head_dim), device, torch.float32)
    return cos, sin


def _frequencies(layout: TileLayout, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`rope_frequencies`, made once for a layout and device; a compiler sees how they are made, once for all layers."""
    if is_tracing() or layout.symbolic:
        return rope_frequencies(layout, head_dim, device=device)
    return _cached_frequencies(layout, head_dim, this_device(device))


def _size(name: str, value: Any) -> int:
    size = to_int(value)
    if size is None or size < 1:
        raise ValueError(f"VideoSelfAttention {name} is {value!r}: give an int of at least 1")
    return size


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved channel pairs of ``[B, H, S, D]``, computed in at least float32."""
    pairs = rearrange(x.to(torch.promote_types(x.dtype, torch.float32)), "b h s (d two) -> b h s d two", two=2)
    a, b = pairs.unbind(-1)
    rotated = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return rearrange(rotated, "b h s d two -> b h s (d two)").to(x.dtype)


class VideoSelfAttention(nn.Module):
    """Self-attention over video tokens: q, k, v, QK-norm, 3D RoPE, sparse attention with a learned gate, output.

    >>> attention = fs.nn.VideoSelfAttention(64, 2, fs.VSA(sparsity=0.5))
    >>> layout = fs.TileLayout(grid=(5, 8, 8))
    >>> attention(torch.randn(1, layout.seq_len, 64), layout).shape
    torch.Size([1, 320, 64])

    Args:
        dim: channels C.
        num_heads: query heads H.
        builder: a mask builder.
        num_kv_heads: KV heads G, H by default; must divide H.
        head_dim: D, ``dim // num_heads`` by default; even, for RoPE.
        gate: a zero-initialised gate on the coarse output; None for one wherever the builder has a coarse output.
        qk_norm: RMSNorm over each head's queries and keys.
        rope: 3D rotary embedding.
        bias: of the linear maps.
        backend: see `sparse_attention`.

    Raises:
        ValueError: sizes below 1 or that do not divide, no such backend, or a gate with a builder that has no coarse output.
        TypeError: what is given is no builder.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        builder: Any,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        gate: bool | None = None,
        qk_norm: bool = True,
        rope: bool = True,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        dim, num_heads = _size("dim", dim), _size("num_heads", num_heads)
        kv_heads = num_heads if num_kv_heads is None else _size("num_kv_heads", num_kv_heads)
        if head_dim is None and dim % num_heads:
            raise ValueError(f"dim is {dim} and num_heads is {num_heads}: give a multiple, or head_dim")
        if num_heads % kv_heads:
            raise ValueError(f"num_kv_heads is {kv_heads}: give a divisor of num_heads={num_heads}")
        width = dim // num_heads if head_dim is None else _size("head_dim", head_dim)
        if rope and width % 2:
            raise ValueError(f"head_dim is {width}: rope=True needs an even one")
        if isinstance(builder, type) or not callable(getattr(builder, "select", None)):
            raise TypeError(f"builder is {builder!r}: give a mask builder (flexsparse.masks)")
        if backend not in NAMES:
            raise ValueError(f"backend is {backend!r}: give one of {', '.join(NAMES)}")
        has_coarse = bool(getattr(builder, "has_coarse", False))
        gate = has_coarse if gate is None else gate
        if gate and not has_coarse:
            raise ValueError(
                f"gate is True, but {name_of(builder)} has no coarse output: use VSA or TopP, or a combination with one of "
                "them, or gate=False"
            )
        self.builder, self.backend, self.rope = builder, backend, rope
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, kv_heads, width
        self.to_q = nn.Linear(dim, num_heads * width, bias=bias)
        self.to_k = nn.Linear(dim, kv_heads * width, bias=bias)
        self.to_v = nn.Linear(dim, kv_heads * width, bias=bias)
        self.to_out = nn.Linear(num_heads * width, dim, bias=bias)
        self.norm_q = nn.RMSNorm(width, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(width, eps=1e-6) if qk_norm else nn.Identity()
        if gate:
            beside = self.to_q.weight
            self.add_module(NAME, Gate(dim, num_heads * width, 0.0, beside.dtype, beside.device))

    def __deepcopy__(self, memo: dict[int, Any]) -> VideoSelfAttention:
        # an average of the weights follows the schedule of the model, as a wrapped one does
        memo |= {id(schedule): schedule for schedule in schedules_of(self.builder)}
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        # not what compile() made, which computes with these weights
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def forward(self, x: Tensor, layout: TileLayout, parallel: SequenceParallel | None = None) -> Tensor:
        """Attend.

        Args:
            x: ``[B, S, C]`` hidden states in raster order, extra tokens at the layout's ends.
            layout: the layout of the sequence.
            parallel: how tokens are spread over ranks; ``x`` is this rank's (`SequenceParallel.shard`).

        Returns:
            As ``x``.

        Raises:
            ValueError: x does not have the layout's tokens, or this rank's.
            TypeError: what is given is no layout.
        """
        if not isinstance(layout, TileLayout):
            raise TypeError(f"layout is {layout!r}: give a TileLayout(grid=(T, H, W), ...)")
        q = self.norm_q(rearrange(self.to_q(x), "b s (h d) -> b h s d", h=self.num_heads))
        k = self.norm_k(rearrange(self.to_k(x), "b s (g d) -> b g s d", g=self.num_kv_heads))
        v = rearrange(self.to_v(x), "b s (g d) -> b g s d", g=self.num_kv_heads)
        if self.rope and x.shape[1] == (layout.seq_len if parallel is None else parallel.length(layout)):
            cos, sin = _frequencies(layout, self.head_dim, x.device)
            if parallel is not None:
                cos, sin = (parallel.shard(table, layout, dim=0) for table in (cos, sin))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        gate = None
        if NAME in self._modules:
            gate = rearrange(self._modules[NAME](x), "b s (h d) -> b h s d", h=self.num_heads)  # type: ignore[misc]
        q, k = q.to(v.dtype), k.to(v.dtype)  # autocast keeps norms in float32
        attend = sparse_attention if parallel is None else parallel.attention
        out = attend(q, k, v, layout, self.builder, gate=gate, backend=self.backend)
        return self.to_out(rearrange(out, "b h s d -> b s (h d)"))
