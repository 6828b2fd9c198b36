"""Graph passes, one a file.

- `rewrite_sdpa`: scaled_dot_product_attention over video tokens => coarse stage + selection + sparse attention.
- `multi_head`, `sdpa_call`: what it looks for.
- `fusion_guard`: keeps Inductor from a fusion that it miscompiles on CPU.
- `marks`: identity ops by which a wrapped model tells its graph the grid and the gates.
"""

from flexsparse.compile_passes.rewrite_sdpa import RewriteError, RewriteSDPA

__all__ = ["RewriteError", "RewriteSDPA"]
