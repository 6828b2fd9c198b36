"""Bugs in layouts, selections, backends and the combination of both stages."""

from tests.mutations.catalogue.mutation import Mutation

EMPTY = ("backends/test_empty_rows.py",)

ATTENTION = (
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
        "out = out + cast(Tensor, GatedCoarse.apply(gate, coarse_out, selection.layout, out.dtype))",
        "out = out * gate + gated_coarse(torch.ones_like(gate), coarse_out, selection.layout, out.dtype)",
        ("property/test_properties.py",),
    ),
    Mutation(
        "height and width swapped",
        "tables.py",
        "(t * grid[1] + h) * grid[2] + w + first",
        "(t * grid[2] + w) * grid[1] + h + first",
        ("test_layout.py",),
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
        "a bitmask row of one word",
        "selection.py",
        "torch.sym_max(2, ceil_div(tiles, WORD))",
        "ceil_div(tiles, WORD)",
        ("wrap/test_wan.py",),
    ),
    Mutation(
        "pairs of tiles next to each other instead of in time",
        "layout.py",
        "return h * w",
        "return 1",
        ("templates/test_pair_lists.py",),
    ),
    Mutation(
        "the coarse output of each token saved",
        "attention.py",
        'if backend == "reference" or is_tracing():\n            out = out + gated_coarse',
        "if True:\n            out = out + gated_coarse",
        ("bench/test_saved.py::test_the_coarse_stage_of_a_gated_call",),
    ),
    Mutation(
        "what the way back makes is copied by the model",
        "packing.py",
        "return x.is_cuda and bool(",
        "return False and bool(",
        ("compile_passes/test_bsa_launches.py",),
    ),
)
