"""Dense attention over some of the tokens: comparison points of VSA's Table 1a (arXiv 2505.13389).

They have the parameters of `SelfAttention`, so that a state dict of one fits all.
Shape letters: B batch, T H W token grid, S tokens in raster order, N heads, D head dim, E model width.
"""

import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from flexsparse.demo.model import SelfAttention

POOL = 2
"""Side of the cube of tokens whose keys, and whose values, `CompressedKV` averages."""


class _OnGrid(SelfAttention):
    """Self-attention that knows where its tokens lie.

    Args:
        dim: model width.
        heads: attention heads.
        grid: token grid (T, H, W).
    """

    def __init__(self, dim: int, heads: int, grid: tuple[int, int, int]) -> None:
        super().__init__(dim, heads)
        self.grid = grid

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each `[B, N, S, D]` -> `[B, N, S, D]`."""
        raise NotImplementedError(f"{type(self).__name__} must define attend()")

    def forward(self, x_BSE: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        """`[B, S, E]` -> `[B, S, E]`."""
        out = self.attend(*self.project(x_BSE, cos_SD, sin_SD))
        return self.to_out(rearrange(out, "b n s d -> b s (n d)"))


class SpatialAttention(_OnGrid):
    """The tokens of one frame attend to each other."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        frames = self.grid[0]
        q, k, v = (rearrange(x, "b n (t s) d -> (b t) n s d", t=frames) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return rearrange(out, "(b t) n s d -> b n (t s) d", t=frames)


class TemporalAttention(_OnGrid):
    """The tokens of one place attend to each other, over all frames."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        frames, places = self.grid[0], self.grid[1] * self.grid[2]
        q, k, v = (rearrange(x, "b n (t s) d -> (b s) n t d", t=frames) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return rearrange(out, "(b s) n t d -> b n (t s) d", s=places)


class CompressedKV(_OnGrid):
    """All tokens attend to means of keys and values over cubes of 2x2x2 tokens, after QK-norm and RoPE.

    A cube at a border has fewer tokens, and the mean of those.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, self.compress(k), self.compress(v))

    def compress(self, x_BNSD: Tensor) -> Tensor:
        """`[B, N, S, D]` -> `[B, N, cubes, D]`."""
        T, H, W = self.grid
        tokens = x_BNSD.new_ones(1, 1, T * H * W, 1)
        return self.cube_sums(x_BNSD) / self.cube_sums(tokens)

    def cube_sums(self, x_BNSD: Tensor) -> Tensor:
        """`[B, N, S, D]` -> `[B, N, cubes, D]`: not `F.avg_pool3d`, whose backward on CUDA is not deterministic."""
        T, H, W = self.grid
        x = rearrange(x_BNSD, "b n (t h w) d -> b n t h w d", t=T, h=H, w=W)
        x = F.pad(x, (0, 0, 0, W % POOL, 0, H % POOL, 0, T % POOL))
        cubes = "b n (t i) (h j) (w k) d -> b n (t h w) d"
        return reduce(x, cubes, "sum", i=POOL, j=POOL, k=POOL)
