"""Interleaved samples: all contenders in turn, so that a slow moment of the machine hits all of them."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from typing import Any

from bench.suite.device import Device

LEAST, MOST = 5, 30
"""Rounds of a case, however long or short it is."""


def samples(
    device: Device,
    functions: dict[str, Callable[[int], Any]],
    seconds: float,
    *,
    least: int = LEAST,
    most: int = MOST,
    alive: Callable[[str], None] = lambda name: None,
    apart: bool = False,
) -> dict[str, list[float]]:
    """Milliseconds of each function; samples of the same index were taken in the same round.

    Args:
        device: the machine.
        functions: each is told the number of the round, by which it may choose its inputs; all have run before.
        seconds: rounds are made until this long has passed, within bounds.
        least: fewest rounds.
        most: most rounds.
        alive: told what begins: "" for a round, a function's name where they are waited for one by one.
        apart: wait for each function before the next begins, so that one of which a process dies is known by name.
    """
    names = list(functions)
    order = list(names)
    shuffle = random.Random(
        0
    ).shuffle  # after a neighbour of heavy kernels the clocks are lower: none is always the same
    found: dict[str, list[float]] = {name: [] for name in names}
    if not names:
        return found
    start = None
    for turn in range(-1, most):  # round -1 is not timed: clocks and caches settle
        shuffle(order)
        calls = [functools.partial(functions[name], turn % most) for name in order]
        if apart:
            ms = []
            for name, call in zip(order, calls):
                alive(name)
                ms += device.round([call])
        else:
            alive("")
            ms = device.round(calls)
        if turn < 0:
            start = time.monotonic()
            continue
        for name, value in zip(order, ms):
            found[name].append(value)
        if turn + 1 >= least and time.monotonic() - (start or 0) > seconds:
            break
    return found
