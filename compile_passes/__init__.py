"""Graph passes, one a file.

- `rewrite_sdpa`: scaled_dot_product_attention over video tokens => coarse stage + selection + sparse attention.
- `multi_head`, `sdpa_call`: what it looks for.
- `fusion_guard`: keeps Inductor from a fusion that it miscompiles on CPU.
- `marks`: identity ops by which a wrapped model tells its graph the grid and the gates.
"""

from flexsparse.compile_passes.fuse_selection import FuseSelection
from flexsparse.compile_passes.lower_flex import LowerFlex
from flexsparse.compile_passes.rewrite_sdpa import RewriteError, RewriteSDPA
from flexsparse.compile_passes.unfold import UnfoldAttention

__all__ = ["FuseSelection", "LowerFlex", "RewriteError", "RewriteSDPA", "UnfoldAttention"]
