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
        "backends/gather.py",
        "(columns < count[tiles, None])",
        "(columns < count[tiles, None] - 1)",
        AGREEMENT,
    ),
    Mutation(
        "shifted index",
        "backends/gather.py",
        "unpack_bits(bits, kv_video)",
        "unpack_bits(bits, kv_video).roll(1, -1)",
        AGREEMENT,
    ),
    Mutation(
        "wrong scale",
        "backends/gather.py",
        "alpha=scale, out=logits",
        "alpha=scale * 1.01, out=logits",
        AGREEMENT,
    ),
    Mutation(
        "scale missing in dq",
        "backends/gather.py",
        "torch.bmm(ds, k_c).mul_(scale)",
        "torch.bmm(ds, k_c)",
        AGREEMENT,
    ),
    Mutation(
        "missing padding mask",
        "backends/gather.py",
        "(slot < tokens[..., None])",
        "(slot >= 0)",
        AGREEMENT,
    ),
    Mutation(
        "another tile's count in the gradient",
        "backends/gather.py",
        "_logits(q_c, k_c, rows.bias, scale",
        "_logits(q_c, k_c, None if rows.bias is None else rows.bias.roll(p.s, -1), scale",
        AGREEMENT,
    ),
    Mutation(
        "keys scaled in low precision",
        "backends/gather.py",
        "k.transpose(1, 2), beta=0 if bias is None else 1, alpha=scale",
        "(k * scale).bfloat16().to(k.dtype).transpose(1, 2), beta=0 if bias is None else 1, alpha=1.0",
        (*AGREEMENT, "-k", "low_precision"),
    ),
    Mutation(
        "gradient from the rounded output",
        "backends/gather.py",
        "rounded = out.dtype != p.dtype",
        "rounded = False",
        AGREEMENT,
    ),
    Mutation(
        "log-sum-exp in base 2",
        "backends/gather.py",
        "weights.amax(-1).log_()",
        "weights.amax(-1).log2_()",
        AGREEMENT,
    ),
    Mutation(
        "gradient of the log-sum-exp dropped",
        "backends/gather.py",
        "delta = delta - grad_lse",
        "delta = delta + 0",
        ("backends/test_gather.py::test_the_gradient_of_the_log_sum_exp_alone_is_right",),
    ),
    Mutation(
        "half of the extra queries' gradient to keys",
        "backends/gather.py",
        "dk[b, g].addmm_(ds.T, q_c)",
        "dk[b, g].addmm_(ds.T, q_c, alpha=0.5)",
        AGREEMENT,
    ),
    Mutation(
        "KV heads of another group",
        "backends/gather.py",
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
        "masks/base.py",
        "total / counts.clamp_min(1).to(total.dtype)[..., None]",
        "total / x.shape[3]",
        ("masks/test_vsa.py",),
    ),
    Mutation(
        "top_k off by one",
        "masks/base.py",
        "torch.arange(scores.shape[-1], device=scores.device) < n",
        "torch.arange(scores.shape[-1], device=scores.device) <= n",
        ("masks/test_vsa.py",),
    ),
    Mutation(
        "ties to the highest index",
        "masks/base.py",
        "order = scores.argsort(",
        "order = scores.shape[-1] - 1 - scores.flip(-1).argsort(",
        ("masks/test_vsa.py",),
    ),
    Mutation(
        "selection on softmaxed scores",
        "masks/vsa.py",
        "ranked = scores.detach()",
        "ranked = scores.detach().to(coarse.q.dtype).softmax(-1)",
        ("masks/test_vsa.py",),
    ),
    Mutation(
        "restriction after the selection",
        "masks/vsa.py",
        "ranked = ranked.masked_fill(~allowed, -math.inf)",
        "pass",
        ("masks/test_within.py",),
    ),
    Mutation(
        "coarse softmax over all tiles",
        "masks/vsa.py",
        "masked_softmax(scores, allowed)",
        "masked_softmax(scores, None)",
        ("masks/test_within.py",),
    ),
    Mutation(
        "threshold counts tiles that are not allowed",
        "masks/bsa.py",
        "| every) & mask)",
        "| every))",
        ("masks/test_within.py",),
    ),
    Mutation(
        "sample standard deviation",
        "masks/bsa.py",
        ".square().masked_fill(~mask, 0).sum(over, keepdim=True) / total",
        ".square().masked_fill(~mask, 0).sum(over, keepdim=True) / (total - 1).clamp_min(1)",
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
)
