"""Bugs to plant into the Hopper kernels of the backward, and what the simulator or the comparison has to say to each."""

from .hopper_bugs import Bug

NOT_YET = "a product reads a buffer that a copy has not reached"
DQ, DK, DV = "dq has", "dk has|dk or dv past", "dv has|dk or dv past"

ROW_BUGS = (
    Bug(
        "half the bytes",
        "mbarrier.expect(barrier, array.block_type.nbytes)",
        "mbarrier.expect(barrier, 64)",
        "expected",
    ),
    Bug("rows of the first sample", "array, [b, h, row, 0], b", "array, [b * 0, h, row, 0], b", DQ),
    Bug("rows of the first head", "array, [b, h, row, 0], b", "array, [b, h * 0, row, 0], b", DQ),
    Bug("no mask", "gl.where(valid, eights, 0.0)", "eights", DQ),
    Bug("mask one too many", "(empty - column)", "(empty + 1 - column)", DQ),
    Bug("last step dropped", "steps = end * PIECES\n", "steps = end * PIECES - 1\n", DQ),
    Bug("end of the list forgotten", "end = U - absent", "end = U", DQ + "|outside"),
    Bug(
        "extra tiles forgotten", "absent = gl.where(video, M - listed, 0)\n    end", "absent = M - listed\n    end", DQ
    ),
    Bug("list of another tile", "tiles = lists + at * capacity", "tiles = lists + (at - tile) * capacity", DQ),
    Bug("counts of another sample", "kv_counts + b.to(gl.int64) * U", "kv_counts", DQ),
    Bug("heads of another group", "g = h // GROUP", "g = h", DQ),
    Bug("estimate of the first head", "gl.load(estimate + place)", "gl.load(estimate + place - bh * R)", DQ + "|" + DK),
    Bug("delta not written", "gl.store(delta + place, mean + missing)", "pass", DK),
    Bug("delta where the first head's is", "gl.store(delta + place, mean", "gl.store(delta + place - bh * R, mean", DK),
    Bug("the estimate taken for delta", "mean + missing)", "mean)", DK),
    Bug("dq not corrected", "acc -= missing[:, None] * mean_key", "pass", DQ),
    Bug("dq corrected the other way", "acc -= missing", "acc += missing", DQ),
    Bug("what is missing of the last step alone", "missing += gl.sum", "missing = gl.sum", DQ),
    Bug("what is missing of gradients not weighted", "gl.sum(d_logits, 1)", "gl.sum(d_weights, 1)", DQ),
    Bug("gradient of the log-sum-exp taken for missing", "missing -= gl.load(grad_lse + place)", "pass", DQ + "|" + DK),
    Bug(
        "gradient of the first head's", "gl.load(grad_lse + place)", "gl.load(grad_lse + place - bh * R)", DQ + "|" + DK
    ),
    Bug("mean key and dq exchanged", "mean_key, acc = w", "acc, mean_key = w", DQ),
    Bug(
        "mean key of gradients",
        "gl.convert_layout(weights.to(DTYPE), OPERAND)",
        "gl.convert_layout(d_logits.to(DTYPE), OPERAND)",
        DQ,
    ),
    Bug("log-sum-exp of the first head", "gl.load(lse_log2 + place)", "gl.load(lse_log2 + place - bh * R)", DQ),
    Bug(
        "queries not waited for",
        "mbarrier.wait(ready.index(i), 0)\n    q_op",
        "mbarrier.wait(ready.index(1), 0)\n    q_op",
        NOT_YET,
    ),
    Bug(
        "keys waited for in the wrong phase",
        "mbarrier.wait(k_ready.index(half), parity)\n",
        "mbarrier.wait(k_ready.index(half), 1 - parity)\n",
        NOT_YET,
    ),
    Bug("values not waited for", "mbarrier.wait(v_ready.index(half), parity)", "pass", NOT_YET),
    Bug(
        "values copied into keys",
        "v_ready.index(half), v_buffers.index(half))",
        "v_ready.index(half), k_buffers.index(half))",
        "a copy overwrites|a copy writes|a buffer that a copy|bytes are copied",
    ),
    Bug(
        "values copied while they are read",
        "d_weights = warpgroup_mma_wait(0, deps=[d_product])\n        if more:\n            _copy(values, b, g, ahead, "
        "shift_ahead, v_ready.index(half), v_buffers.index(half))",
        "if more:\n            _copy(values, b, g, ahead, shift_ahead, v_ready.index(half), v_buffers.index(half))\n"
        "        d_weights = warpgroup_mma_wait(0, deps=[d_product])",
        "a copy overwrites what is still being read",
    ),
    Bug(
        "keys copied while they are read",
        "mean_key, acc = warpgroup_mma_wait(0, deps=[mean_update, update])\n"
        "        if more:\n            _copy(keys, b, g, ahead, "
        "shift_ahead, k_ready.index(half), k_buffers.index(half))",
        "if more:\n            _copy(keys, b, g, ahead, shift_ahead, k_ready.index(half), k_buffers.index(half))\n"
        "        mean_key, acc = warpgroup_mma_wait(0, deps=[mean_update, update])",
        "a copy overwrites what is still being read",
    ),
    Bug(
        "copies past the end", "more = j + STAGES < steps\n        later", "more = j >= 0\n        later", "at the end"
    ),
    Bug(
        "gradients of weights in flight",
        "d_weights = warpgroup_mma_wait(0, deps=[d_product])\n        if",
        "d_weights = warpgroup_mma_wait(1, deps=[d_product])\n        if",
        "leaves in flight",
    ),
    Bug("queries for gradients", "g_operand = _matrix(g_box)", "g_operand = _matrix(q_box)", DQ),
    Bug(
        "dq in flight",
        "warpgroup_mma_wait(0, deps=[mean_update, update])",
        "warpgroup_mma_wait(1, deps=[mean_update, update])",
        "leaves in flight",
    ),
    Bug(
        "barriers not fenced",
        "mbarrier.init(v_ready.index(i), count=1)\n    fence_async_shared()",
        "mbarrier.init(v_ready.index(i), count=1)",
        "no fence between",
    ),
    Bug(
        "no fence", "(acc * scale).to(DTYPE))\n    fence_async_shared()", "(acc * scale).to(DTYPE))", "without a fence"
    ),
    Bug(
        "dq left behind", "row, 0], q_box)\n    tma.store_wait(0)", "row, 0], q_box)", "a store is in flight at the end"
    ),
    Bug("no scale", "(acc * scale).to", "acc.to", DQ),
    Bug("logits not scaled", "logits * scale_log2 - shift[:, None]", "logits - shift[:, None]", DQ),
    Bug("no delta", "(d_weights - mean[:, None])", "d_weights", DQ),
    Bug("never masked", "if PARTIAL and shift_now < 0:", "if PARTIAL and shift_now > 0:", DQ),
    Bug("mask of the next step", "weights, -shift_now)", "weights, -shift_soon)", DQ),
    Bug("boxes not shifted", "gl.load(tokens + ahead, mask=more, other=0) - SLOTS", "gl.load(tokens) * 0", DQ),
    Bug("the next but one tile", "ahead = later", "ahead = later + 1", DQ + "|outside"),
    Bug("dq where the first head's is", "outs, [b, h, row, 0]", "outs, [b, h * 0, row, 0]", DQ),
)

COLUMN_BUGS = (
    Bug("piece of the first head", "(bg * (U + most) + number) * 4", "number * 4", DK),
    Bug("one step too few", "steps = (last - first) * PIECES", "steps = (last - first) * PIECES - 1", DK),
    Bug("start of the piece forgotten", "_nth_tile(first, tiles,", "_nth_tile(0, tiles,", DK),
    Bug("start forgotten in the loop", "_nth_tile(first + (j + STAGES)", "_nth_tile((j + STAGES)", DK),
    Bug("piece not counted down", "            end -= entries\n", "", DK),
    Bug("a head's share to the end of all", "gl.minimum(end, entries)", "end", "dk has|dk or dv|outside"),
    Bug("columns of the first head", "gl.load(columns + bh * M + m", "gl.load(columns + m", DK),
    Bug("lists of the first head", "gl.load(offsets + bh * M + m", "gl.load(offsets + m", DK),
    Bug("rows of every tile absent", "absent = gl.where(video, N - listed, 0)", "absent = N - listed", DK),
    Bug("counts of the first sample", "gl.load(kv_counts + b * U + u)", "gl.load(kv_counts + u)", DK),
    Bug("heads of another group", "h = g * GROUP + member", "h = g + member * 0", DK),
    Bug("log-sum-exp of the first head", "head = bh * R", "head = bh * 0", DK),
    Bug(
        "log-sum-exp of this step again",
        "gl.load(lse_log2 + lines)\n            mean",
        "shift_soon\n            mean",
        DK,
    ),
    Bug("delta of this step again", "mean_soon = gl.load(delta + lines)\n            q_", "q_", DK),
    Bug("keys not waited for", "(ready.index(i), 0)\n\n    done", "(ready.index(1), 0)\n\n    done", NOT_YET),
    Bug(
        "queries not waited for", "mbarrier.wait(q_ready.index(half), parity)\n            product", "product", NOT_YET
    ),
    Bug("gradients not waited for", "mbarrier.wait(g_ready.index(half), parity)", "pass", NOT_YET),
    Bug("phases of a head alone", "parity = (done + j)", "parity = (0 * done + j)", NOT_YET + "|never ends"),
    Bug("buffers of a head alone", "done += gl.maximum(steps, 0)", "done += 0", NOT_YET + "|never ends"),
    Bug("steps of a head without any", "done += gl.maximum(steps, 0)", "done += steps", NOT_YET + "|never ends|buffer"),
    Bug(
        "queries copied while they are read",
        "dv, dk = warpgroup_mma_wait(0, deps=[dv_update, dk_update])\n            if more:\n                _copy_rows("
        "queries, b, h, ahead, q_ready.index(half), q_buffers.index(half))",
        "if more:\n                _copy_rows(queries, b, h, ahead, q_ready.index(half), q_buffers.index(half))\n"
        "            dv, dk = warpgroup_mma_wait(0, deps=[dv_update, dk_update])\n            if more:\n                pass",
        "a copy overwrites what is still being read",
    ),
    Bug("queries for both", "grads, b, h, ahead, g_ready", "queries, b, h, ahead, g_ready", DK),
    Bug(
        "copies past the end",
        "more = j + STAGES < steps\n            ahead",
        "more = j >= 0\n            ahead",
        "at the end|armed again",
    ),
    Bug(
        "dk in flight",
        "warpgroup_mma_wait(0, deps=[dv_update, dk_update])",
        "warpgroup_mma_wait(1, deps=[dv_update, dk_update])",
        "leaves in flight",
    ),
    Bug("no fence", "dv.to(DTYPE))\n        fence_async_shared()", "dv.to(DTYPE))", "without a fence"),
    Bug(
        "dv left behind",
        "v_box)\n        tma.store_wait(0)",
        "v_box)\n        tma.store_wait(1)",
        "in flight at the end",
    ),
    Bug("no scale", "(dk * scale).to", "dk.to", DK),
    Bug("scale twice", "dv.to(DTYPE)", "(dv * scale).to(DTYPE)", DV),
    Bug("logits not scaled", "logits * scale_log2 - shift[None, :]", "logits - shift[None, :]", DK),
    Bug("no delta", "(d_weights - mean[None, :])", "d_weights", DK),
    Bug("dk past the count", "dk = gl.where(kept[:, None], dk, 0.0)", "pass", DK),
    Bug("dv past the count", "dv = gl.where(kept[:, None], dv, 0.0)", "pass", DV),
    Bug("one slot too few", "SliceLayout(1, OUTPUT)) < valid", "SliceLayout(1, OUTPUT)) < valid - 1", DK),
    Bug("dk where the first head's is", "d_keys, [b, g, u, slot, 0]", "d_keys, [b, g * 0, u, slot, 0]", DK),
    Bug("dv where the first sample's is", "d_values, [b, g, u, slot, 0]", "d_values, [b * 0, g, u, slot, 0]", DV),
    Bug("pieces where the first head's are", "(bg * most + number) * SLOTS + slot", "number * SLOTS + slot", DK),
    Bug("pieces of dv where dk's are", "G * most * (SLOTS * D), dv)", "G * most * 0, dv)", DK),
    Bug("every column whole", "if SPLIT and parts > 0:", "if SPLIT and parts > 99:", DK),
    Bug("rows of nothing", "if SPLIT and u < 0:", "if SPLIT and u < -1:", "dk has|outside|starts before"),
)
