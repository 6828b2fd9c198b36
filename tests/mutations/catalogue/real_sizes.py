"""Bugs that show at the sizes of real videos and batches alone."""

from tests.mutations.catalogue.mutation import Mutation

REAL_SIZES = (
    Mutation(
        "views followed element by element, whatever their size",
        "compile_passes/views.py",
        "found = self._lays(indices(sizes), wanted) if by_strides is None else by_strides",
        "found = self._lays(indices(sizes), wanted)",
        ("compile_passes/test_views.py",),
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
        "        drop_whole_slices(gm.graph)\n",
        "",
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
)
