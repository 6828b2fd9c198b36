"""A Wan-shaped block stack with random weights, written as plain PyTorch: a compiled step, dense against sparse.

Letters: B batch, C latent channels, T frames, H and W latent rows and columns, S tokens, N heads, D head dim, E width,
L text tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flexsparse as fs
from bench.suite import model_check
from bench.suite.cases import OURS, Case
from bench.suite.contender import Contender, Found, Results
from bench.suite.device import Device
from flexsparse.nn import rope_frequencies, rotate

DENSE_MODEL = "dense_compiled"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a stack; the defaults are those of Wan2.1-1.3B, less the number of its blocks (30)."""

    heads: int = 12
    head_dim: int = 128
    ffn: int = 8960
    layers: int = 10
    channels: int = 16
    text_dim: int = 4096
    text_tokens: int = 512

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


class SelfAttention(nn.Module):
    """QK-norm over all heads, 3D RoPE, attention."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(shape.width, shape.width) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(shape.width, eps=1e-6) for _ in range(2))

    def forward(self, x_BSE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.norm_q(self.to_q(x_BSE)), self.norm_k(self.to_k(x_BSE)), self.to_v(x_BSE)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.to_out(out.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention to the text; stays dense."""

    is_cross_attention = True

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(shape.width, shape.width) for _ in range(4))

    def forward(self, x_BSE: Tensor, text_BLE: Tensor) -> Tensor:
        q, k, v = self.to_q(x_BSE), self.to_k(text_BLE), self.to_v(text_BLE)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; the time modulates the first and the last."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        E = shape.width
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(E, elementwise_affine=False) for _ in range(3))
        self.attn1, self.attn2 = SelfAttention(shape), CrossAttention(shape)
        self.ffn = nn.Sequential(nn.Linear(E, shape.ffn), nn.GELU("tanh"), nn.Linear(shape.ffn, E))
        self.modulation = nn.Parameter(torch.randn(1, 6, E) / E**0.5)

    def forward(self, x: Tensor, text: Tensor, time_B6E: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + time_B6E).chunk(6, dim=1)
        x = x + gate1 * self.attn1(self.norm1(x) * (1 + scale1) + shift1, cos, sin)
        x = x + self.attn2(self.norm3(x), text)
        return x + gate2 * self.ffn(self.norm2(x) * (1 + scale2) + shift2)


class WanShaped(nn.Module):
    """Latents, time and text in, latents out. Patches of (1, 2, 2) latent pixels."""

    patch_size = (1, 2, 2)

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        E, patch = shape.width, 4 * shape.channels
        self.shape = shape
        self.patch_in, self.patch_out = nn.Linear(patch, E), nn.Linear(E, patch)
        self.text_in, self.time_in = nn.Linear(shape.text_dim, E), nn.Linear(1, 6 * E)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm_out = nn.LayerNorm(E)

    def forward(self, video_BCTHW: Tensor, time_B: Tensor, text_BLE: Tensor) -> Tensor:
        B, C, T, H, W = video_BCTHW.shape
        grid = (T, H // 2, W // 2)
        patches = video_BCTHW.view(B, C, T, H // 2, 2, W // 2, 2).permute(0, 2, 3, 5, 1, 4, 6).reshape(B, -1, 4 * C)
        x = self.patch_in(patches)
        text, time_B6E = self.text_in(text_BLE), self.time_in(time_B[:, None]).unflatten(-1, (6, -1))
        cos, sin = rope_frequencies(fs.TileLayout(grid=grid), self.shape.head_dim, device=x.device)
        for block in self.blocks:
            x = block(x, text, time_B6E, cos, sin)
        out = self.patch_out(self.norm_out(x)).view(B, T, H // 2, W // 2, C, 2, 2)
        return out.permute(0, 4, 1, 2, 5, 3, 6).reshape(B, C, T, H, W)


def make(shape: Shape, device: torch.device, dtype: torch.dtype) -> WanShaped:
    """The same random weights every time."""
    torch.manual_seed(0)
    with device:
        return WanShaped(shape).to(dtype)


def inputs(
    shape: Shape, grid: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of a token grid, time, text."""
    g = torch.Generator(device=device).manual_seed(2)
    T, H, W = grid
    latents = torch.randn(1, shape.channels, T, 2 * H, 2 * W, generator=g, device=device)
    text = torch.randn(1, shape.text_tokens, shape.text_dim, generator=g, device=device)
    return latents.to(dtype), torch.full((1,), 0.5, device=device, dtype=dtype), text.to(dtype)


def shape_of(case: Case) -> Shape:
    """The stack of a case."""
    return Shape(heads=case.H, head_dim=case.D, layers=case.layers)


def contenders(case: Case, device: Device, shape: Shape | None = None) -> Found:
    """A forward and a training step of the stack, gates on: dense compiled, sparse compiled; both by regions (blocks)."""
    shape = shape_of(case) if shape is None else shape
    dense = make(shape, device.torch, case.torch_dtype)
    sparse = copy.deepcopy(dense)
    given = inputs(shape, case.grid, device.torch, case.torch_dtype)
    by_region = "compiled" in device.modes
    if by_region:
        for block in dense.blocks:
            block.compile(dynamic=False, backend=device.compile_options.get("inner", "inductor"))
        sparse = gated(sparse, case, compile="regional", fullgraph=True, **device.compile_options)
    else:
        sparse = gated(sparse, case, compile=False, attention=device.backend)
    for impl, model in ((DENSE_MODEL, dense), (OURS, sparse)):
        expected = model_check.expected(twin_of(case, device, shape, impl), given, case.torch_dtype)
        for part in ("forward", "training"):
            density = 1.0 if impl == DENSE_MODEL else case.builder.nominal_density(case.layout, case.layout)
            yield Contender(
                impl=impl,
                op="model_step",
                part=part,
                run=steps(model, given, part),
                results=lambda impl=impl, model=model, part=part: results(device, impl, model, given, part),  # type: ignore[misc]
                expected=expected[part],
                density=density,
                config={"layers": shape.layers, "compile": by_region},
            )


def gated(model: WanShaped, case: Case, **options: Any) -> WanShaped:
    """The stack with the case's sparse attention, its gates open."""
    model = fs.wrap(model, case.builder, tile=case.layout.sides, gates=["blocks.*.attn1"], **options)
    model_check.open_gates(model)
    return model


def twin_of(case: Case, device: Device, shape: Shape, impl: str) -> Callable[[torch.dtype], nn.Module]:
    """The stack of the same weights, uncompiled, in a dtype; a sparse one by another backend than is timed."""

    def twin(dtype: torch.dtype) -> nn.Module:
        model = make(shape, device.torch, case.torch_dtype).to(dtype)
        if impl == DENSE_MODEL:
            return model
        return gated(model, case, compile=False, attention=model_check.OTHER[device.backend])

    return twin


def steps(model: nn.Module, given: tuple[Tensor, ...], part: str) -> Callable[[int], Any]:
    """What is timed: a forward without gradients, or a forward and a backward."""

    def forward(turn: int) -> Any:
        with torch.no_grad():
            return model(*given)

    def training(turn: int) -> Any:
        model.zero_grad(set_to_none=True)
        model_check.loss_of(model(*given)).backward()

    return forward if part == "forward" else training


def results(device: Device, impl: str, model: nn.Module, given: tuple[Tensor, ...], part: str) -> Results:
    """What the timed model gives on the timed inputs; every self-attention of ours must be sparse, fused and lowered."""
    found = model_check.output(model, given) if part == "forward" else model_check.step(model, given)
    if impl == OURS and "compiled" in device.modes:
        sparse = [call for call in fs.report(model).calls if call.sparse]
        if not sparse or not all(call.lowered and call.fused for call in sparse):
            raise RuntimeError(f"not every self-attention was fused and lowered:\n{fs.report(model)}")
    return found
