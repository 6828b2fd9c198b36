"""Bugs that show at the sizes of real videos and batches alone."""

from tests.mutations.catalogue.mutation import Mutation

REAL_SIZES = (
    Mutation(
        "views followed element by element, whatever their size",
        "compile_passes/views.py",
        "self._lays(indices(self._few(sizes)), wanted) if by_strides is None else by_strides",
        "self._lays(indices(sizes), wanted)",
        ("compile_passes/test_real_sizes.py",),
    ),
    Mutation(
        "strides believed after a copy",
        "compile_passes/views.py",
        "return None  # a copy",
        "pass  # a copy",
        ("compile_passes/test_views.py",),
    ),
    Mutation(
        "views of a copy run without it",
        "compile_passes/views.py",
        "x = x.contiguous()  # which",
        "pass  # which",
        ("compile_passes/test_fuse_selection.py", "-k", "copied"),
    ),
    Mutation(
        "slices of a symbolic batch keep tokens in tile order",
        "compile_passes/fold_tiling.py",
        "            drop_whole_slices(gm.graph)\n",
        "            pass\n",
        ("compile_passes/test_fold_tiling.py", "-k", "whole"),
    ),
    Mutation(
        "lists of a union as long as there are tiles",
        "masks/combine.py",
        "    return smaller(bound, kv_layout.num_tiles)\n",
        "    return kv_layout.num_tiles\n",
        ("compile_passes/test_real_sizes.py",),
    ),
    Mutation(
        "a union's lists too short",
        "masks/combine.py",
        "operator.add if kind",
        "larger if kind",
        ("masks/test_combine.py",),
    ),
    Mutation(
        "the last bit of a word is not counted",
        "tile_bits.py",
        "(bits + (bits >> 16)) & 0x3F",
        "(bits + (bits >> 16)) & 0x1F",
        ("masks/test_combine.py",),
    ),
    Mutation(
        "a GPU is given the CPU's chunks of scores",
        "ops/coarse_select.py",
        'if q_c.device.type == "cpu" else GPU_CHUNK_SCORES',
        "",
        ("ops/test_coarse_select.py", "-k", "gpu"),
    ),
    Mutation(
        "the coarse stage's gradient written for each token",
        "ops/coarse_select.py",
        "return [d.expand(-1, -1, -1, slots, -1) for d in grads]",
        "return [d.repeat(1, 1, 1, slots, 1) for d in grads]",
        ("ops/test_coarse_select.py", "-k", "memory"),
    ),
    Mutation(
        "a density of all heads at once",
        "selection.py",
        "self.bits[:, h : h + 1]",
        "self.bits",
        ("compile_passes/test_real_sizes.py",),
    ),
    Mutation(
        "Radial's lists too short",
        "masks/radial.py",
        "min(s, 2 * (s // r) - 1)",
        "min(s, s // r)",
        ("masks/test_static.py",),
    ),
    Mutation(
        "reductions of two orders mixed where sizes are symbolic",
        "compile_passes/fusion_guard.py",
        "    if _symbolic(example_inputs):",
        "    if False:",
        ("compile_passes/test_fusion_guard.py", "-k", "mixed"),
    ),
    Mutation(
        "a static part of a union is said not to be fused",
        "compile_passes/fuse_selection.py",
        " and not _is_static(anchor):",
        ":",
        ("compile_passes/test_fuse_selection_models.py", "-k", "Union"),
    ),
    Mutation(
        "a graph of sliding tiles for each resolution",
        "masks/sliding_tile.py",
        "torch.full((), have - width, dtype=torch.int64, device=device)",
        "torch.as_tensor(have - width, device=device)",
        ("wrap/test_two_graphs.py", "-k", "SlidingTile"),
    ),
)
