"""A small pixel-space video diffusion transformer, written as plain PyTorch: it knows nothing of flexsparse.

Letters: B batch, C channels, T frames, H and W pixel rows and columns (in the einops patterns: t h w patches
of p x q pixels), S tokens in raster order, N heads, D head dim, E model width.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

_SMALLEST_TIME = 0.05  # bounds the 1 / t with which the clean estimate becomes a velocity


def timestep_embedding(t_B: Tensor, width: int) -> Tensor:
    """Sines and cosines of the diffusion time: float `[B]` in [0, 1] -> float32 `[B, width]`."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=t_B.device) * (-math.log(10_000.0) / half))
    angles = 1000.0 * t_B.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rope_angles(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Tensor:
    """Rotation angles of 3D RoPE, float32 `[S, head_dim / 2]`: a quarter for time, the rest for the two
    sides."""
    pairs = head_dim // 2
    share_t = pairs // 4
    share_h = (pairs - share_t) // 2
    angles = []
    for axis, share in enumerate((share_t, share_h, pairs - share_t - share_h)):
        position = torch.arange(grid[axis], device=device, dtype=torch.float32)
        frequency = 100.0 ** (-torch.arange(share, device=device, dtype=torch.float32) / share)
        shape = [1, 1, 1, share]
        shape[axis] = grid[axis]
        angles.append((position[:, None] * frequency).view(shape).expand(*grid, share))
    return torch.cat(angles, dim=-1).flatten(0, 2)


def apply_rope(x_BNSD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """Rotates the two halves of each head vector: `[B, N, S, D]`, angles `[S, D / 2]` -> `[B, N, S, D]`."""
    first, second = x_BNSD.chunk(2, dim=-1)
    return torch.cat([first * cos_SD - second * sin_SD, first * sin_SD + second * cos_SD], dim=-1)


class SelfAttention(nn.Module):
    """Self-attention over all video tokens, with QK-norm and 3D RoPE."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.Linear(dim, dim)
        self.norm_q = nn.RMSNorm(dim // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(dim // heads, eps=1e-6)

    def project(self, x_BSE: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as attention sees them, after QK-norm and RoPE: each `[B, N, S, D]`."""
        q, k, v = (
            rearrange(linear(x_BSE), "b s (n d) -> b n s d", n=self.heads)
            for linear in (self.to_q, self.to_k, self.to_v)
        )
        q = apply_rope(self.norm_q(q), cos_SD, sin_SD)
        k = apply_rope(self.norm_k(k), cos_SD, sin_SD)
        return q, k, v

    def forward(self, x_BSE: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        """`[B, S, E]` -> `[B, S, E]`."""
        q, k, v = self.project(x_BSE, cos_SD, sin_SD)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(rearrange(out, "b n s d -> b s (n d)"))


class Block(nn.Module):
    """Attention and MLP, each modulated by the diffusion time (AdaLN, zero at the start)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.attn = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU("tanh"), nn.Linear(mlp_ratio * dim, dim))
        self.modulation = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x_BSE: Tensor, time_BE: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        """`[B, S, E]` and the embedded time `[B, E]` -> `[B, S, E]`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time_BE)[:, None].chunk(6, dim=-1)
        x_BSE = x_BSE + gate1 * self.attn(self.norm1(x_BSE) * (1 + scale1) + shift1, cos_SD, sin_SD)
        return x_BSE + gate2 * self.mlp(self.norm2(x_BSE) * (1 + scale2) + shift2)


class VideoDiT(nn.Module):
    """Noisy video and diffusion time in, flow-matching velocity out.

    The network estimates the clean video and turns the estimate into a velocity: with patches of more pixels
    than channels in the network that trains far faster than a velocity, which holds the noise, can be learned
    directly.
    """

    def __init__(
        self,
        *,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        patch: int = 8,
        mlp_ratio: int = 4,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.patch_size = (1, patch, patch)
        self.dim = dim
        self.head_dim = dim // heads
        self.patch_in = nn.Linear(channels * patch * patch, dim)
        self.time_in = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm_out = nn.LayerNorm(dim)
        self.patch_out = nn.Linear(dim, channels * patch * patch)
        nn.init.zeros_(self.patch_out.weight)
        nn.init.zeros_(self.patch_out.bias)

    def forward(self, video: Tensor, t: Tensor) -> Tensor:
        """Velocity of the flow at time `t`.

        Args:
            video: noisy video, float `[B, C, T, H, W]`; H and W multiples of the patch.
            t: diffusion time, float `[B]`, 0 for clean and 1 for noise.

        Returns:
            Float `[B, C, T, H, W]`: the estimate of noise - clean.
        """
        _, p, q = self.patch_size
        frames, rows, columns = video.shape[2], video.shape[3] // p, video.shape[4] // q
        patches = rearrange(video, "b c t (h p) (w q) -> b (t h w) (c p q)", p=p, q=q)
        x_BSE = self.patch_in(patches)
        time_BE = self.time_in(timestep_embedding(t, self.dim))
        angles = rope_angles((frames, rows, columns), self.head_dim, video.device)
        cos_SD, sin_SD = angles.cos(), angles.sin()
        for block in self.blocks:
            x_BSE = block(x_BSE, time_BE, cos_SD, sin_SD)
        patches = self.patch_out(self.norm_out(x_BSE))
        clean = rearrange(patches, "b (t h w) (c p q) -> b c t (h p) (w q)", t=frames, h=rows, w=columns, p=p, q=q)
        return (video - clean) / t.clamp(min=_SMALLEST_TIME).view(-1, 1, 1, 1, 1)
