"""Bugs to plant, one at a time, and the tests that have to notice. Each replaces text that occurs exactly once."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """A bug.

    Attributes:
        name: what is wrong.
        file: path in the installed package.
        old: the right code; must occur exactly once in the file.
        new: the wrong code.
        tests: test files or tests, relative to ``tests/``, that are run.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


AGREEMENT = ("backends/test_agreement.py",)
EMPTY = ("backends/test_empty_rows.py",)
PRUNED = ("masks/test_bsa.py",)

MUTATIONS = (
    Mutation(
        "dropped block",
        "ops/gathered.py",
        "(columns < count[tiles, None])",
        "(columns < count[tiles, None] - 1)",
        AGREEMENT,
    ),
    Mutation(
        "shifted index",
        "ops/gathered.py",
        "unpack_bits(bits, kv_video)",
        "unpack_bits(bits, kv_video).roll(1, -1)",
        AGREEMENT,
    ),
    Mutation(
        "wrong scale",
        "ops/gathered.py",
        "alpha=scale, out=logits",
        "alpha=scale * 1.01, out=logits",
        AGREEMENT,
    ),
    Mutation(
        "scale missing in dq",
        "ops/gathered.py",
        "torch.bmm(ds, k_c).mul_(scale)",
        "torch.bmm(ds, k_c)",
        AGREEMENT,
    ),
    Mutation(
        "missing padding mask",
        "ops/gathered.py",
        "(slot < tokens[..., None])",
        "(slot >= 0)",
        AGREEMENT,
    ),
    Mutation(
        "another tile's count in the gradient",
        "ops/gathered.py",
        "_logits(q_c, k_c, rows.bias, scale",
        "_logits(q_c, k_c, None if rows.bias is None else rows.bias.roll(p.s, -1), scale",
        AGREEMENT,
    ),
    Mutation(
        "keys scaled in low precision",
        "ops/gathered.py",
        "k.transpose(1, 2), beta=0 if bias is None else 1, alpha=scale",
        "(k * scale).bfloat16().to(k.dtype).transpose(1, 2), beta=0 if bias is None else 1, alpha=1.0",
        (*AGREEMENT, "-k", "low_precision"),
    ),
    Mutation(
        "gradient from the rounded output",
        "ops/gathered.py",
        "rounded = out is None or out.dtype != p.dtype",
        "rounded = out is None",
        AGREEMENT,
    ),
    Mutation(
        "log-sum-exp in base 2",
        "ops/gathered.py",
        "weights.amax(-1).log_()",
        "weights.amax(-1).log2_()",
        AGREEMENT,
    ),
    Mutation(
        "gradient of the log-sum-exp dropped",
        "ops/gathered.py",
        "delta = delta - grad_lse",
        "delta = delta + 0",
        ("backends/test_gather.py::test_the_gradient_of_the_log_sum_exp_alone_is_right",),
    ),
    Mutation(
        "half of the extra queries' gradient to keys",
        "ops/gathered.py",
        "dk[b, g].addmm_(ds.T, q_c)",
        "dk[b, g].addmm_(ds.T, q_c, alpha=0.5)",
        AGREEMENT,
    ),
    Mutation(
        "KV heads of another group",
        "ops/gathered.py",
        "row // self.N % self.H // (self.H // self.G)",
        "row // self.N % self.G",
        AGREEMENT,
    ),
    Mutation(
        "the oracle reads past a count",
        "backends/reference.py",
        "[..., kv_tile] & valid",
        "[..., kv_tile]",
        EMPTY,
    ),
    Mutation(
        "keys past a count not cleared",
        "attention.py",
        "k_tiles.masked_fill(~valid, 0)",
        "k_tiles.masked_fill(~valid & False, 0)",
        EMPTY,
    ),
    Mutation(
        "gate applied to the fine output",
        "attention.py",
        "out = out + gate * broadcast_coarse",
        "out = out * gate + broadcast_coarse",
        ("property/test_properties.py",),
    ),
    Mutation(
        "copies of pruned queries send no gradient",
        "packing.py",
        "return out.masked_fill(position < 0, fill)",
        "own = selection.queries.source[..., None] == torch.arange(out.shape[2])[:, None]\n"
        "    return torch.where(own, out, out.detach()).masked_fill(position < 0, fill)",
        PRUNED,
    ),
    Mutation(
        "height and width swapped",
        "layout.py",
        "(t * grid[1] + h) * grid[2] + w + first",
        "(t * grid[2] + w) * grid[1] + h + first",
        ("test_layout.py",),
    ),
    Mutation(
        "partial tiles pooled over their slots",
        "ops/coarse_select.py",
        "total / counts.clamp_min(1).to(total.dtype).unsqueeze(-1)",
        "total / x.shape[3]",
        ("masks/test_vsa.py",),
    ),
    Mutation(
        "top_k off by one",
        "ops/choice.py",
        "np.clip(M - n, 0, M - 1)",
        "np.clip(M - n - 1, 0, M - 1)",
        ("masks/test_vsa.py",),
    ),
    Mutation(
        "ties to the highest index",
        "ops/choice.py",
        "at_threshold.cumsum(-1) <= room",
        "at_threshold[:, ::-1].cumsum(-1)[:, ::-1] <= room",
        ("masks/test_vsa.py",),
    ),
    Mutation(
        "NaN sinks out of sight",
        "ops/choice.py",
        "masked_fill_(scores.isnan(), torch.iinfo(integer).max)",
        "masked_fill_(scores.isnan(), torch.iinfo(integer).min)",
        ("ops/test_choice.py", "-k", "nan"),
    ),
    Mutation(
        "selection on softmaxed scores",
        "ops/coarse_select.py",
        "choose(scores[None], packed",
        "choose(scores[None].to(q.dtype).softmax(-1).to(scores.dtype), packed",
        ("masks/test_vsa.py",),
    ),
    Mutation(
        "restriction after the selection",
        "ops/choice.py",
        "keys = keys.masked_fill(~mask, torch.iinfo(keys.dtype).min)",
        "pass",
        ("masks/test_within.py",),
    ),
    Mutation(
        "coarse softmax over all tiles",
        "ops/coarse_select.py",
        "weights = _log_softmax(scores, mask)",
        "weights = _log_softmax(scores, None)",
        ("masks/test_within.py",),
    ),
    Mutation(
        "threshold counts tiles that are not allowed",
        "ops/choice.py",
        "above if mask is None else above & mask",
        "above",
        ("masks/test_within.py",),
    ),
    Mutation(
        "sample standard deviation",
        "ops/choice.py",
        "over, correction=0, keepdim=True",
        "over, correction=1, keepdim=True",
        PRUNED,
    ),
    Mutation(
        "most similar queries kept",
        "masks/bsa.py",
        "likeness = cosine(tokens, chosen)",
        "likeness = -cosine(tokens, chosen)",
        PRUNED,
    ),
    Mutation(
        "another representative",
        "masks/windows.py",
        "size[i] // 2 for i",
        "(size[i] - 1).clamp(min=0) // 2 for i",
        PRUNED,
    ),
    Mutation(
        "uncompiled FlexAttention dense",
        "selection.py",
        "return table[b, h, q >> q_shift, tile] &",
        "return (table[b, h, q >> q_shift, tile] | True) &",
        ("test_selection.py::test_flex_attention_is_sparse_with_the_block_mask_compiled_or_not[False]",),
    ),
    Mutation(
        "density counts slots",
        "selection.py",
        "q_counts = q.index(device)[2].double()",
        "q_counts = q.index(device)[2].double() * 0 + q.slots",
        ("test_selection.py", "-k", "density"),
    ),
    Mutation(
        "schedule stops short of its target",
        "schedule.py",
        "math.ceil(round(",
        "math.floor(round(",
        ("test_schedule.py", "-k", "target"),
    ),
    Mutation(
        "coarse gradient without its scale",
        "ops/coarse_select.py",
        ".mul_(weights)\n                .mul_(scale)",
        ".mul_(weights)",
        ("ops/test_coarse_select.py",),
    ),
    Mutation(
        "gradient of the gate without the coarse output",
        "ops/tile_attention.py",
        ".copy_(g * coarse[:, :, :, None])",
        ".copy_(g)",
        ("ops/test_tile_attention.py",),
    ),
    Mutation(
        "fused although an intermediate is read elsewhere",
        "compile_passes/fuse_selection.py",
        "if user not in done:",
        "if user is None:",
        ("compile_passes/test_fuse_selection.py",),
    ),
    Mutation(
        "views of pooled vectors taken on trust",
        "compile_passes/coarse_chain.py",
        "laid.numel() == wanted.numel() and torch.equal(laid.reshape(wanted.shape), wanted)",
        "laid.numel() == wanted.numel()",
        ("compile_passes/test_fuse_selection.py",),
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
        ("compile_passes/test_lower_flex.py",),
    ),
    Mutation(
        "template drops the last block",
        "compile_passes/templates/forward.py",
        "tl.range(0, (U - absent) * PIECES)",
        "tl.range(0, (U - absent) * PIECES - 1)",
        ("templates/test_forward.py",),
    ),
    Mutation(
        "template sees slots past the count",
        "compile_passes/templates/forward.py",
        'logits = tl.where(valid[None, :], logits, float("-inf"))',
        "logits = logits + 0.0",
        ("templates/test_forward.py",),
    ),
    Mutation(
        "template adds the coarse output of the next tile",
        "compile_passes/templates/forward.py",
        "(bh * N + tile) * D + column",
        "(bh * N + (tile + 1) % N) * D + column",
        ("templates/test_forward.py",),
    ),
    Mutation(
        "template's dq without the scale",
        "compile_passes/templates/backward_kernels.py",
        "start, acc * scale,",
        "start, acc,",
        ("templates/test_backward.py",),
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
        "(2, 2, 2, 1)))",
        "(2, 2, 2)))",
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
        "any broadcast passes for the coarse output",
        "compile_passes/epilogue.py",
        "return node if found == expected else None",
        "return node",
        ("compile_passes/test_epilogue.py",),
    ),
    Mutation(
        "a bitmask row of one word",
        "selection.py",
        "torch.sym_max(2, ceil_div(tiles, WORD))",
        "ceil_div(tiles, WORD)",
        ("wrap/test_wan.py",),
    ),
    Mutation(
        "a kernel that was never measured is chosen",
        "compile_passes/templates/tuned.py",
        "if not choice.source:",
        "if False:",
        ("templates/test_tuned.py",),
    ),
)
