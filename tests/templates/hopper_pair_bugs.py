"""Bugs to plant into the Hopper kernel by pairs, and what the simulator or the comparison has to say to each."""

from .hopper_bugs import WRONG, Bug

RACE = "a copy writes|without a wait|has not reached|a copy over|overwrites"
HANGS = "every partition waits|never ends|in flight at the end|at the end"
DRAINED = "        mbarrier.arrive(drained.index(old % STAGES), count=1)\n"
UPDATED = "        acc, rounded = warpgroup_mma_wait(0, deps=[update, weights.to(DTYPE)])\n"
SHIFT = "                shift += gl.load(tokens + tile) - SLOTS\n"
LAST_VALUES = "    mbarrier.wait(v_filled.index(place % STAGES), place // STAGES % 2)\n"

BUGS = (
    Bug("last step dropped", "for j in range(1, steps):", "for j in range(1, steps - 1):", f"{HANGS}|{WRONG}"),
    Bug(
        "places of the other consumer",
        "2 * step - shared + CONSUMER)",
        "2 * step - shared + 1 - CONSUMER)",
        f"{HANGS}|{WRONG}",
    ),
    Bug("places without gaps", "2 * step - shared + CONSUMER)", "step)", f"{HANGS}|{WRONG}|{RACE}"),
    Bug(
        "places one off",
        "gl.where(step < shared, step, 2",
        "gl.where(step <= shared, step, 2",
        f"{HANGS}|{WRONG}|{RACE}",
    ),
    Bug(
        "keys not waited for",
        "    mbarrier.wait(k_filled.index(soon % STAGES), soon // STAGES % 2, pred=steps > 1)\n",
        "",
        RACE,
    ),
    Bug("keys not waited for in the loop", "pred=j + 1 < steps)", "pred=j > steps)", RACE),
    Bug(
        "values not waited for",
        "        mbarrier.wait(v_filled.index(old % STAGES), old // STAGES % 2)\n",
        "",
        RACE,
    ),
    Bug("last values not waited for", LAST_VALUES, "", RACE),
    Bug(
        "wrong parity of keys",
        "mbarrier.wait(k_filled.index(soon % STAGES), soon // STAGES % 2, pred=j + 1 < steps)",
        "mbarrier.wait(k_filled.index(soon % STAGES), soon // STAGES % 2 + 1, pred=j + 1 < steps)",
        f"{RACE}|{HANGS}",
    ),
    Bug("buffer given back too early", UPDATED + DRAINED, DRAINED + UPDATED, RACE),
    Bug("buffer never given back", DRAINED, "", HANGS),
    Bug(
        "last buffer never given back",
        "    mbarrier.arrive(drained.index(place % STAGES), count=1)\n\n",
        "\n",
        HANGS,
    ),
    Bug(
        "another buffer given back",
        "drained.index(old % STAGES)",
        "drained.index(place % STAGES)",
        f"{RACE}|{HANGS}|armed again",
    ),
    Bug(
        "copied before the buffer is free",
        "            mbarrier.wait(drained.index(buffer), (place // STAGES + 1) % 2)\n",
        "",
        f"{RACE}|{HANGS}|armed again",
    ),
    Bug(
        "one arrival is enough",
        "mbarrier.init(drained.index(i), count=2)",
        "mbarrier.init(drained.index(i), count=1)",
        f"{RACE}|{HANGS}|armed again",
    ),
    Bug("nobody in the other's place", "count=1, pred=place >= start)", "count=1, pred=place < 0)", HANGS),
    Bug(
        "always in the other's place",
        "count=1, pred=place >= start)",
        "count=1, pred=place >= 0)",
        f"{RACE}|{HANGS}|armed again",
    ),
    Bug(
        "values into the keys' buffer",
        "v_filled.index(buffer), v_ring.index(buffer))",
        "v_filled.index(buffer), k_ring.index(buffer))",
        f"{RACE}|{WRONG}",
    ),
    Bug("values of another tile", "_copy(values, b, g, tile, shift,", "_copy(values, b, g, 0, shift,", WRONG),
    Bug("keys of another head", "_copy(keys, b, g, tile", "_copy(keys, b, 0 * g, tile", WRONG),
    Bug("partial tiles copied whole", SHIFT, "                pass\n", WRONG),
    Bug("no piece but the first", "shift = step % PIECES * KEYS", "shift = 0", WRONG),
    Bug("second list where the first starts", "second_at = both + first_own", "second_at = both", WRONG),
    Bug("lists of another pair", "tiles = lists + place * length", "tiles = lists", WRONG),
    Bug(
        "sizes of another pair",
        "both = gl.load(sizes + 4 * place, mask",
        "both = gl.load(sizes, mask",
        f"{WRONG}|{HANGS}",
    ),
    Bug(
        "sizes of another tile", "both = gl.load(sizes + place, mask", "both = gl.load(sizes, mask", f"{WRONG}|{HANGS}"
    ),
    Bug(
        "what was bumped counts as seen",
        "first_seen = shared + first_own",
        "first_seen = shared + gl.maximum(first_own, 1)",
        "outside of an array|out has|lse is",
    ),
    Bug("blank rows are not dropped", "blank = (total == 0.0) | (seen == 0)", "blank = total == 0.0", WRONG),
    Bug(
        "a block that sees nothing takes no step",
        "second_own = gl.maximum(second_own, 1 - gl.minimum(shared, 1))",
        "pass",
        f"{HANGS}|{WRONG}",
    ),
    Bug("pairs next to each other", "first + frame_tiles, gl.minimum", "first + 1, gl.minimum", WRONG),
    Bug(
        "second of a pair beyond the last",
        "gl.minimum(2 * number + 1, N - 1))",
        "2 * number + 1)",
        f"{WRONG}|outside of an array",
    ),
    Bug("extra rows of the video", "gl.where(one < before, one, one + N) * ROWS", "one * ROWS", WRONG),
    Bug(
        "halves are the same rows",
        "return tile, tile, tile, row, row + ROWS,",
        "return tile, tile, tile, row, row,",
        WRONG,
    ),
    Bug(
        "halves of extra rows are video",
        "row + ROWS, (tile >= 0) & (tile < N)",
        "row + ROWS, tile < N",
        f"{WRONG}|outside of an array",
    ),
    Bug("coarse output of the other tile", "bh * N + second, video", "bh * N + first, video", WRONG),
    Bug("gates not waited for", "        mbarrier.wait(q_arrived, 1)\n", "", RACE),
    Bug("gates before the queries are read", "    mbarrier.wait(q_arrived, 0)\n", "", f"{RACE}|armed again"),
    Bug(
        "results without a fence",
        "        fence_async_shared()\n        copy_out",
        "        copy_out",
        "without a fence",
    ),
    Bug("results not waited for", "        tma.store_wait(0)\n", "", "a store is in flight"),
    Bug("values rounded late", "acc = acc * decay[:, None]\n        update", "update", WRONG),
    Bug("no decay at the end", "    acc = acc * decay[:, None]\n    update", "    update", WRONG),
)
