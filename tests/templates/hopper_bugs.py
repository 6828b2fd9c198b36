"""Bugs to plant into the Hopper kernel, and what the simulator or the comparison has to say to each."""

from typing import NamedTuple


class Bug(NamedTuple):
    """A bug.

    Attributes:
        name: what is wrong.
        old: the right text; must occur exactly once.
        new: the wrong one.
        complaint: regular expression that the error's text holds.
    """

    name: str
    old: str
    new: str
    complaint: str


WRONG = "out has|lse is"
COPY_KEYS = """\
        if STAGES == 1 and j + 1 < steps:
            _copy(keys, b, g, soon, shift_soon, k_ready.index(0), k_buffers.index(0))
"""
WAIT_LOGITS = """\
        logits = warpgroup_mma_wait(1, deps=[product])
"""

BUGS = (
    Bug(
        "last step dropped",
        "for j in range(1, steps):",
        "for j in range(1, steps - 1):",
        "in flight at the end|never ends",
    ),
    Bug("first step twice", "now = soon", "now = now", WRONG),
    Bug(
        "wrong parity",
        "mbarrier.wait(v_ready.index(1 - half), (j - 1) // 2 % 2)",
        "mbarrier.wait(v_ready.index(1 - half), (j + 1) // 2 % 2)",
        "a product reads a buffer that a copy",
    ),
    Bug(
        "values not waited for",
        "mbarrier.wait(v_ready.index(1 - half), (j - 1) // 2 % 2)",
        "pass",
        "a product reads a buffer that a copy has not reached",
    ),
    Bug(
        "values overwritten",
        "_copy(values, b, g, now, shift_now, v_ready.index(half), v_buffers.index(half))",
        "_copy(values, b, g, now, shift_now, v_ready.index(half), v_buffers.index(1 - half))",
        "a copy writes|a copy over",
    ),
    Bug("keys overwritten", "if STAGES == 1 and j + 1 < steps:", "if STAGES == 1:", "in flight at the end"),
    Bug(
        "keys copied too early",
        WAIT_LOGITS + COPY_KEYS,
        COPY_KEYS + WAIT_LOGITS,
        "a copy overwrites what is still being read",
    ),
    Bug(
        "keys waited for at the end",
        "(j + 1) // STAGES % 2, pred=j + 1 < steps)",
        "(j + 1) // STAGES % 2)",
        "never ends",
    ),
    Bug(
        "logits in flight",
        "warpgroup_mma_wait(1, deps=[product])",
        "warpgroup_mma_wait(2, deps=[product])",
        "leaves in flight",
    ),
    Bug(
        "output in flight",
        "warpgroup_mma_wait(0, deps=[update, weights",
        "warpgroup_mma_wait(1, deps=[update, weights",
        "leaves in flight",
    ),
    Bug(
        "half the bytes",
        "mbarrier.expect(barrier, array.block_type.nbytes)",
        "mbarrier.expect(barrier, array.block_type.nbytes // 2)",
        "expected: the wait never ends",
    ),
    Bug(
        "no fence",
        "q_buffer.store(acc.to(DTYPE))\n    fence_async_shared()",
        "q_buffer.store(acc.to(DTYPE))",
        "without a fence",
    ),
    Bug(
        "barriers not fenced",
        "mbarrier.init(v_ready.index(i), count=1)\n    fence_async_shared()",
        "mbarrier.init(v_ready.index(i), count=1)",
        "no fence between",
    ),
    Bug("output left behind", "tma.store_wait(0)", "pass", "a store is in flight at the end"),
    Bug(
        "gates not waited for", "mbarrier.wait(q_ready, 1)", "pass", "a load reads a buffer that a copy has not reached"
    ),
    Bug("no scale", "gl.exp2(logits * scale_log2 -", "gl.exp2(logits -", WRONG),
    Bug("no mask", "gl.where(valid, eights, MINUS_INFINITY)", "eights", WRONG),
    Bug("mask one short", "(empty - column)", "(empty - 1 - column)", WRONG),
    Bug(
        "boxes not shifted",
        "gl.load(tokens + soon, mask=j + 1 < steps, other=0) - SLOTS",
        "gl.load(tokens + soon, mask=j + 1 < steps, other=0) * 0",
        "out has",
    ),
    Bug("counts of another sample", "b.to(gl.int64) * count_stride", "b.to(gl.int64) * 0", "out has"),
    Bug("heads of another group", "g = h // GROUP", "g = h", "out has"),
    Bug("tiles of the first sample", "[b, g, tile, slot, 0]", "[b * 0, g, tile, slot, 0]", "out has"),
    Bug("queries of the first sample", "queries, [b, h, row, 0]", "queries, [b * 0, h, row, 0]", WRONG),
    Bug("gates of the first head", "gates, [b, h, row, 0]", "gates, [b, h * 0, row, 0]", "out has"),
    Bug("output where the first head's is", "outs, [b, h, row, 0]", "outs, [b, h * 0, row, 0]", "out has"),
    Bug("log-sum-exp of the first sample", "lse + bh * R", "lse + bh * R * 0", "lse is"),
    Bug("output not rescaled", "acc = acc * decay[:, None]\n        update", "update", "out has"),
    Bug("sum not rescaled", "total = total * factor +", "total = total +", WRONG),
    Bug("coarse row of the head's first tile", "coarse + at * D", "coarse + (at - tile) * D", "out has"),
    Bug("extra tiles after the list forgotten", "gl.where(i < first, i, i + absent)", "i", WRONG),
    Bug("empty rows not blank", "(total == 0.0) | (steps == 0)", "total == 0.0", "out has|lse is|assert"),
)
