"""Which cases are compared. None of their sizes is one that `bench.machine` measures: plans are not fitted to them."""

from __future__ import annotations

import flexsparse as fs
from bench.plan_check.cases import Case

SMALL, LARGE, ODD = (8, 16, 16), (8, 24, 24), (5, 18, 26)
_VSA, _BSA = fs.VSA(sparsity=0.875), fs.BSA(keep_queries=0.5, kv_density=0.15)
_HALF = fs.VSA(sparsity=0.5)

TIMED = (
    Case(),
    Case(builder=_VSA),
    Case(training=True),
    Case(builder=_VSA, training=True),
    Case(builder=_VSA, training=True, checkpointing=True),
    Case(builder=_VSA, training=True, checkpointing=True, gates=True),
    Case(builder=_BSA, training=True),
    Case(builder=_VSA, training=True, compile="regional"),
    Case(grid=LARGE),
    Case(grid=LARGE, builder=_VSA),
    Case(grid=LARGE, builder=_HALF),
    Case(grid=LARGE, builder=_VSA, dtype="bfloat16"),
    Case(grid=LARGE, builder=_VSA, training=True, checkpointing=True),
    Case(grid=ODD, builder=_VSA, training=True),
    Case(model="wan, heads of 128", builder=_VSA, training=True),
    Case(model="hunyuanvideo"),
    Case(model="hunyuanvideo", builder=_VSA),
    Case(model="hunyuanvideo", builder=_VSA, training=True, checkpointing=True),
)
"""Steps whose time is measured."""

TENSORS = (
    Case(builder=_VSA, training=True),
    Case(builder=_VSA, training=True, gates=True),
    Case(builder=_VSA, training=True, checkpointing=True),
    Case(grid=ODD, builder=_VSA, training=True),
    Case(builder=_BSA, training=True),
    Case(model="hunyuanvideo", builder=_VSA, training=True),
    Case(model="hunyuanvideo", builder=_VSA, training=True, checkpointing=True, gates=True),
)
"""Steps whose tensors are counted."""

PEAKS = (
    Case(grid=LARGE, builder=_VSA),
    Case(grid=LARGE, builder=_VSA, training=True),
    Case(grid=LARGE, builder=_VSA, training=True, checkpointing=True),
    Case(grid=LARGE, builder=_VSA, training=True, gates=True),
    Case(model="hunyuanvideo", grid=LARGE, builder=_VSA, training=True),
)
"""Steps whose peak of memory is measured, each in a fresh process."""

_TRAINED = Case(builder=_VSA, training=True)
_GATED = Case(builder=_VSA, training=True, gates=True, checkpointing=True)
_JOINT = Case(model="hunyuanvideo", builder=_VSA, training=True)
EXCHANGED = (
    ("ulysses", Case(builder=_VSA)),
    ("ulysses", _TRAINED),
    ("ulysses", _GATED),
    ("ulysses", _JOINT),
    ("fsdp", Case(builder=_VSA)),
    ("fsdp", _TRAINED),
    ("fsdp", _GATED),
    ("ddp", _TRAINED),
)
"""Steps of two processes, and what they share."""
