"""Graph passes, one a file.

- `rewrite_sdpa`: scaled_dot_product_attention over video tokens => coarse stage + selection + sparse attention.
- `marks`: identity ops by which a wrapped model tells its graph the grid and the gates.
"""

from flexsparse.compile_passes.rewrite_sdpa import RewriteError, RewriteSDPA

__all__ = ["RewriteError", "RewriteSDPA"]
