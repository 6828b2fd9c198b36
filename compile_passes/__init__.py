"""Graph passes, one a file.

On Dynamo's graph, before autograd:

- `rewrite_sdpa`: scaled_dot_product_attention over video tokens => one sparse call (`multi_head`, `sdpa_call`: what it finds).
- `keep_tiles`: tokens stay in tile order from one sparse call to the next (`token_dims`: the ops that treat tokens alike).
- `unfold`: a sparse call => tiling, the nodes of its coarse stage, the fine stage.
- `fuse_selection`: pooling, scores, coarse output and choice of tiles => one op; `tile_choice`, `coarse_chain`, `views` match
  them.
- `pool_tokens`: that op pools tokens where they lie in raster order.

On the joint graph of forward and backward:

- `lower_flex`: FlexAttention under a tile list => tile attention (`epilogue`: with the gated coarse output that is added).
- `fold_tiling`: tile attention reads and writes raster order, and nothing is brought to tile order (`gathers`: what it finds).
- `lay_output`: tile attention writes its output where the projection reads it.
- `share_operands`: what ops of ours read is written once.

Besides:

- `templates/`: Triton kernels that the ops run on CUDA.
- `graphs`: what passes share; `nested`: graphs inside of graphs.
- `fusion_guard`: keeps Inductor from a fusion that it miscompiles on CPU.
- `plain_alpha`: keeps AOT autograd from forgetting the factor of a sum.
- `strides`: results lie as those that a graph's Triton kernels were made for.
- `marks`: identity ops by which a wrapped model tells its graph the grid and the gates.

Passes are imported when they are first asked for: torch's compiler comes with them, which takes as long as torch itself.
"""

import importlib
from typing import TYPE_CHECKING, Any

from flexsparse.errors import RewriteError

if TYPE_CHECKING:
    from flexsparse.compile_passes.fold_tiling import FoldTiling
    from flexsparse.compile_passes.fuse_selection import FuseSelection
    from flexsparse.compile_passes.fusion_guard import InOrder, compile_eagerly, compile_guarded
    from flexsparse.compile_passes.keep_tiles import KeepTiles
    from flexsparse.compile_passes.lay_output import LayOutput
    from flexsparse.compile_passes.lower_flex import LowerFlex
    from flexsparse.compile_passes.pool_tokens import PoolTokens
    from flexsparse.compile_passes.rewrite_sdpa import RewriteSDPA
    from flexsparse.compile_passes.share_operands import ShareOperands
    from flexsparse.compile_passes.unfold import UnfoldAttention

__all__ = [
    "FoldTiling",
    "FuseSelection",
    "InOrder",
    "KeepTiles",
    "LayOutput",
    "LowerFlex",
    "PoolTokens",
    "RewriteError",
    "RewriteSDPA",
    "ShareOperands",
    "UnfoldAttention",
    "compile_eagerly",
    "compile_guarded",
]

_MODULES = {
    "FoldTiling": "fold_tiling",
    "FuseSelection": "fuse_selection",
    "InOrder": "fusion_guard",
    "KeepTiles": "keep_tiles",
    "LayOutput": "lay_output",
    "LowerFlex": "lower_flex",
    "PoolTokens": "pool_tokens",
    "RewriteSDPA": "rewrite_sdpa",
    "ShareOperands": "share_operands",
    "UnfoldAttention": "unfold",
    "compile_eagerly": "fusion_guard",
    "compile_guarded": "fusion_guard",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
