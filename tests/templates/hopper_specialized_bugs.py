"""Bugs to plant into the Hopper kernels with a warp that only copies, and what the simulator or the comparison has to say."""

from .hopper_backward_bugs import DK, DQ
from .hopper_bugs import Bug

RACE = "a copy writes|without a wait|has not reached|a copy over|overwrites|armed again"
HANGS = "every partition waits|never ends|at the end"
ARRIVE = "        mbarrier.arrive(drained.index(at), count=1)\n"
UPDATED = "        mean_key, acc = warpgroup_mma_wait(0, deps=[mean_update, update])\n"
ADDED = "        dv, dk = warpgroup_mma_wait(0, deps=[dv_update, dk_update])\n"

ROW_BUGS = (
    Bug(
        "copied before the buffer is free",
        "        mbarrier.wait(drained.index(at), (j // STAGES + 1) % 2)\n",
        "",
        f"{RACE}|{HANGS}",
    ),
    Bug("buffer never given back", ARRIVE, "", HANGS),
    Bug("buffer given back too early", UPDATED + ARRIVE, ARRIVE + UPDATED, RACE),
    Bug("free in the wrong phase", "(j // STAGES + 1) % 2", "j // STAGES % 2", f"{HANGS}|{RACE}"),
    Bug("count of the first tile", "b * U + tile]", "b * U]", DQ),
    Bug("keys not waited for", "mbarrier.wait(k_filled.index(at), parity)", "pass", RACE),
    Bug("mask of the first piece", "SLOTS - j % PIECES * KEYS - _first", "SLOTS - _first", DQ),
    Bug("order never over", "mbarrier.wait(order, 1)", "mbarrier.wait(order, 0)", HANGS),
    Bug("bytes of counts forgotten", "keys.block_type.nbytes + token_counts.block_type.nbytes", "16384", HANGS),
    Bug("queries not waited for", "    mbarrier.wait(ready, 0)\n", "", RACE),
    Bug("one step less copied", "range(end * PIECES)", "range(end * PIECES - 1)", HANGS),
    Bug("heads of another group", "b, h, h // GROUP,", "b, h, h,", DQ),
)

COLUMN_BUGS = (
    Bug("lines of the first head", "[b, h, row], barrier", "[b, h * 0, row], barrier", DK),
    Bug("delta for log-sum-exp", "_copy_with_line(queries, shifts, b", "_copy_with_line(queries, means, b", DK),
    Bug(
        "copied before the buffer is free",
        "            mbarrier.wait(drained.index(at), (place // STAGES + 1) % 2)\n",
        "",
        f"{RACE}|{HANGS}",
    ),
    Bug("buffer never given back", ARRIVE, "", HANGS),
    Bug("buffer given back too early", ADDED + ARRIVE, ARRIVE + ADDED, RACE),
    Bug("gradients not waited for", "mbarrier.wait(g_filled.index(at), parity)", "pass", RACE),
    Bug(
        "bytes of a line forgotten", "rows.block_type.nbytes + line.block_type.nbytes", "rows.block_type.nbytes", HANGS
    ),
    Bug(
        "buffers of a head alone",
        "        h = g * GROUP + member\n",
        "        place = 0\n        h = g * GROUP + member\n",
        f"{RACE}|{HANGS}",
    ),
    Bug("piece not counted down", "            end -= entries\n", "", f"{DK}|{HANGS}|{RACE}|outside"),
    Bug(
        "lines in the first buffer",
        "g_ring.index(at), mean_ring.index(at))",
        "g_ring.index(at), mean_ring.index(0))",
        f"{RACE}|{DK}",
    ),
    Bug("steps of a tile's first rows", "(end - begin) * PIECES, parts", "end - begin, parts", f"{DK}|{HANGS}"),
    Bug("rows of nothing", "if SPLIT and u < 0:", "if SPLIT and u < -1:", f"{DK}|outside|starts before|{HANGS}"),
)
