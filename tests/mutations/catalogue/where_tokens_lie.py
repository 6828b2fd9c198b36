"""Bugs of what reads tokens in raster order: BSA's packed queries, builders by head, gates that no op takes in, masked text."""

from tests.mutations.catalogue.mutation import Mutation

ALL = ("-m", "slow or not slow")

WHERE_TOKENS_LIE = (
    Mutation(
        "packed queries looked for by the slots of tiles",
        "compile_passes/fold_tiling.py",
        "pack.args = (q, *pack.args[1:5], None, *pack.args[6:8], inside)",
        "pack.args = (q, *pack.args[1:8], inside)",
        ("compile_passes/test_fold_tiling.py", "-k", "packed"),
    ),
    Mutation(
        "the gradient of packed queries in tile order",
        "compile_passes/fold_tiling.py",
        "user.args = (*user.args[:5], False, inside)",
        "user.args = (*user.args[:5], True, inside)",
        ("compile_passes/test_fold_tiling.py", "-k", "packed"),
    ),
    Mutation(
        "a symbolic size of packed queries taken for somebody who reads them",
        "compile_passes/fold_tiling.py",
        "if not (is_op(user, aten.sym_size.int) and plain(user.args[0]) is pack)",
        "if True",
        ("compile_passes/test_for_cuda.py", "-k", "training_reads and BSA", *ALL),
    ),
    Mutation(
        "pooled queries looked up in the table of tokens",
        "compile_passes/pool_tokens.py",
        "            items[0] = items[2] = None\n",
        "            pass\n",
        ("compile_passes/test_fold_tiling.py", "-k", "packed"),
    ),
    Mutation(
        "queries in raster order pruned by their slots",
        "compile_passes/templates/prune.py",
        "(token if RASTER else slot)",
        "slot",
        ("templates/test_prune.py",),
    ),
    Mutation(
        "rows of nobody in the gradient of a gate's coarse output",
        "compile_passes/gathers.py",
        "            found = _like(node, aten.where.self, none, zero, each)\n",
        "            found = each\n",
        ("compile_passes/test_fold_tiling.py", *ALL),
    ),
    Mutation(
        "the gradient of a gate's coarse output added atomically",
        "compile_passes/fold_tiling.py",
        "sum(gather_instead(gm.graph, slots, tokens) for slots, tokens in tables) > 0 or changed",
        "changed",
        ("compile_passes/test_for_cuda.py", "-k", "training_reads and fine", *ALL),
    ),
    Mutation(
        "what gates make copied to where a projection reads it",
        "compile_passes/share_operands.py",
        "        if is_op(user, *_SAME, *_SPREAD, aten.mul.Tensor):\n",
        "        if is_op(user, *_SAME):\n",
        ("compile_passes/test_for_cuda.py", "-k", "training_reads and fine", *ALL),
    ),
    Mutation(
        "coarse outputs of several builders added apart",
        "compile_passes/epilogue.py",
        "elif len(found) < 3 and is_op(",
        "elif is_op(",
        ("compile_passes/test_for_cuda.py", "-k", "training_reads and PerHead"),
    ),
    Mutation(
        "the first heads' rows for all builders",
        "masks/combine.py",
        "                places = heads\n",
        "                places = tuple(range(len(heads)))\n",
        ("masks/test_combine.py",),
    ),
    Mutation(
        "rows of other heads counted as cut",
        "masks/coarse.py",
        "(over if self.heads is None else take_heads(over, self.heads)).sum()",
        "over.sum()",
        ("masks/test_combine.py",),
    ),
    Mutation(
        "a builder of somebody's own planned for heads that are not its",
        "masks/base.py",
        """(("reads_tiles", True), ("heads_alike", False))""",
        """(("reads_tiles", True),)""",
        ("masks/test_combine.py",),
    ),
    Mutation(
        "the normal quantile by an op that Inductor lacks on a GPU",
        "ops/choice.py",
        "return torch.erfinv(2 * p - 1) * math.sqrt(2)",
        "return torch.special.ndtri(p)",
        ("ops/test_choice.py",),
    ),
    Mutation(
        "a graph more for a first block that is given a view",
        "wrapped.py",
        "x.detach() if x._base is not None else x",
        "x",
        ("wrap/test_two_graphs.py", "-k", "region"),
    ),
    Mutation(
        "hidden text shown to the coarse stage, and zeroed for the fine stage alone",
        "compile_passes/unfold.py",
        "            operands = [q, k, *parts",
        "            operands = [q, node.args[1], *parts",
        ("compile_passes/test_unfold.py",),
    ),
)
