"""Bugs in graph passes, and in what guards the compiler."""

from tests.mutations.catalogue.mutation import Mutation

PASSES = (
    Mutation(
        "outer loops fused on the CPU",
        "compile_passes/fusion_guard.py",
        "return False",
        "pass",
        ("compile_passes/test_fusion_guard.py",),
    ),
    Mutation(
        "fused although an intermediate is read elsewhere",
        "compile_passes/fuse_selection.py",
        "if user not in done:",
        "if user is None:",
        ("compile_passes/test_fuse_selection_left.py",),
    ),
    Mutation(
        "views of pooled vectors taken on trust",
        "compile_passes/coarse_chain.py",
        "laid.numel() == wanted.numel() and torch.equal(laid.reshape(wanted.shape), wanted)",
        "laid.numel() == wanted.numel()",
        ("compile_passes/test_fuse_selection_left.py",),
    ),
    Mutation(
        "log-sum-exp of another base in the lowered backward",
        "compile_passes/lower_flex.py",
        "natural = _natural(lse)",
        "natural = lse",
        ("compile_passes/test_lower_flex.py",),
    ),
    Mutation(
        "any mask_mod passes for that of the tiles",
        "compile_passes/lower_flex.py",
        "return isinstance(found, Tensor) and torch.equal(found, expected)",
        "return isinstance(found, Tensor)",
        ("compile_passes/test_lower_flex_left.py",),
    ),
    Mutation(
        "tokens written in place are read in two orders",
        "compile_passes/keep_tiles.py",
        "if storage_of(node) in written:",
        "if False:",
        ("compile_passes/test_keep_tiles.py",),
    ),
    Mutation(
        "the gate in raster order",
        "compile_passes/keep_tiles.py",
        "(2, 2, 2, 1, 1))  # q, k, v",
        "(2, 2, 2))  # q, k, v",
        ("compile_passes/test_keep_tiles.py",),
    ),
    Mutation(
        "keys of dense attention in tile order",
        "compile_passes/keep_tiles.py",
        "if x in region.inside and needs.get(x) is None and",
        "if False and",
        ("compile_passes/test_keep_tiles.py",),
    ),
    Mutation(
        "softmax over tokens treats them alike",
        "compile_passes/token_dims.py",
        "other % len(shape_of(node)) == dim",
        "False",
        ("compile_passes/test_token_dims.py", "compile_passes/test_keep_tiles.py"),
    ),
    Mutation(
        "a reshape that merges the grid keeps tokens apart",
        "compile_passes/token_dims.py",
        "if size == after[dim] and math.prod(before[:at]) == math.prod(after[:dim]):",
        "if size == after[dim]:",
        ("compile_passes/test_token_dims.py",),
    ),
    Mutation(
        "a backward that takes the sum for the fine stage's output",
        "compile_passes/epilogue.py",
        "each.args = (*each.args[:7], found.coarse, found.gate, *each.args[9:])",
        "each.args = (*each.args[:7], None, None, *each.args[9:])",
        ("compile_passes/test_epilogue.py",),
    ),
    Mutation(
        "any broadcast passes for the coarse output",
        "compile_passes/epilogue.py",
        "return node if alike else None",
        "return node",
        ("compile_passes/test_epilogue.py",),
    ),
    Mutation(
        "keys read by the queries' table",
        "compile_passes/fold_tiling.py",
        "return Call(node, inputs, (tables[0], tables[1]), backs[0], outputs, gradients)",
        "return Call(node, inputs, (tables[0], tables[0]), backs[0], outputs, gradients)",
        ("compile_passes/test_fold_tiling.py::test_nothing_is_brought_to_tile_order_and_the_bits_are_the_same",),
    ),
    Mutation(
        "tiles folded though something else reads the output in tile order",
        "compile_passes/fold_tiling.py",
        "            if found is None or plain(found) is not out:\n",
        "            if found is None and plain(user) is out:\n",
        ("compile_passes/test_fold_tiling.py::test_what_else_reads_tile_order_keeps_it",),
    ),
)
