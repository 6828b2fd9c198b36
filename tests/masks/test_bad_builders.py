"""Each wrong parameter of a mask builder or a schedule gets one clear error: what, its value, what to give."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import flexsparse as fs
from flexsparse import SparsitySchedule

LAYOUT = fs.TileLayout(grid=(2, 4, 8), tile=(2, 2, 2))
NAN = math.nan


def attend(builder: Any) -> Any:
    x = torch.zeros(2, 2, 64, 8)
    return fs.sparse_attention(x, x, x, LAYOUT, builder)


def select(builder: Any) -> Any:
    x = torch.zeros(2, 2, 64, 8)
    return builder.select(x, x, LAYOUT)


CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "top_k of zero": (lambda: fs.VSA(top_k=0), ValueError, "VSA top_k is 0: give an int of at least 1"),
    "top_k over the tiles": (
        lambda: attend(fs.VSA(top_k=9)),
        ValueError,
        "top_k is 9, but grid .* has 8 tiles.*at most 8, or a sparsity",
    ),
    "top_k over the tiles, selecting": (
        lambda: select(fs.VSA(top_k=9)),
        ValueError,
        "top_k is 9, but grid",
    ),
    "a fractional top_k": (lambda: fs.VSA(top_k=2.5), TypeError, r"top_k is 2\.5: give an int"),
    "NaN top_k": (lambda: fs.VSA(top_k=NAN), TypeError, "top_k is nan: give an int"),
    "neither sparsity nor top_k": (
        lambda: fs.VSA(),
        ValueError,
        "sparsity=None and top_k=None: give exactly one",
    ),
    "both sparsity and top_k": (
        lambda: fs.VSA(sparsity=0.5, top_k=2),
        ValueError,
        r"sparsity=0\.5 and top_k=2: give exactly one",
    ),
    "sparsity over one": (
        lambda: fs.VSA(sparsity=1.1),
        ValueError,
        r"sparsity is 1\.1: give a ratio in \[0, 1\]",
    ),
    "negative sparsity": (
        lambda: fs.VSA(sparsity=-0.1),
        ValueError,
        r"sparsity is -0\.1: give a ratio in \[0, 1\]",
    ),
    "NaN sparsity": (lambda: fs.VSA(sparsity=NAN), ValueError, r"sparsity is nan: give a ratio in \[0, 1\]"),
    "sparsity that is a word": (
        lambda: fs.VSA(sparsity="0.5"),
        TypeError,
        "sparsity is '0.5': give a number",
    ),
    "NaN kv_density": (
        lambda: fs.BSA(kv_density=NAN),
        ValueError,
        r"kv_density is nan: give a ratio in \(0, 1\]",
    ),
    "no kv_density": (
        lambda: fs.BSA(kv_density=0.0),
        ValueError,
        r"kv_density is 0\.0: give a ratio in \(0, 1\]",
    ),
    "NaN keep_queries": (lambda: fs.BSA(keep_queries=NAN), ValueError, "keep_queries is nan: give a ratio"),
    "NaN mass of BSA": (
        lambda: fs.BSA(mass=NAN, threshold="mass"),
        ValueError,
        "BSA mass is nan: give a ratio",
    ),
    "NaN mass": (lambda: fs.TopP(mass=NAN), ValueError, r"TopP mass is nan: give a ratio in \(0, 1\]"),
    "mass over one": (lambda: fs.TopP(mass=1.5), ValueError, r"TopP mass is 1\.5: give a ratio in \(0, 1\]"),
    "NaN min_tiles": (
        lambda: fs.BSA(min_tiles=NAN),
        ValueError,
        "BSA min_tiles is nan: give an int of at least 1",
    ),
    "no min_tiles": (
        lambda: fs.TopP(min_tiles=0),
        ValueError,
        "TopP min_tiles is 0: give an int of at least 1",
    ),
    "max_tiles below min_tiles": (
        lambda: fs.TopP(min_tiles=3, max_tiles=2),
        ValueError,
        "max_tiles is 2: give .* min_tiles=3",
    ),
    "NaN max_tiles": (lambda: fs.BSA(max_tiles=NAN), ValueError, "BSA max_tiles is nan: give an int"),
    "an unknown threshold": (
        lambda: fs.BSA(threshold="mean"),
        ValueError,
        "threshold is 'mean': give one of .*'normal'",
    ),
    "an unknown fill": (lambda: fs.BSA(fill="mean"), ValueError, "fill is 'mean': give one of .*'zero'"),
    "a window with a zero": (
        lambda: fs.BSA(window=(2, 0, 2)),
        ValueError,
        r"window is \(2, 0, 2\): give three ints",
    ),
    "a window that is a number": (lambda: fs.BSA(window=2), ValueError, r"window is \(2,\): give three ints"),
    "statistics that would leak": (
        lambda: fs.BSA(statistics="head", within=fs.FrameCausal(chunk=2)),
        ValueError,
        "statistics is 'head' and within is given.*use statistics='row'",
    ),
    "a sliding window with a zero": (
        lambda: fs.SlidingTile(window=(0, 1, 1)),
        ValueError,
        r"SlidingTile window is \(0, 1, 1\): give three ints",
    ),
    "a chunk of zero frames": (
        lambda: fs.FrameCausal(chunk=0),
        ValueError,
        "FrameCausal chunk is 0: give an int of at least 1",
    ),
    "a chunk that cuts tiles": (
        lambda: attend(fs.FrameCausal(chunk=3)),
        ValueError,
        "chunk is 3 frames.*give a multiple of 2",
    ),
    "the same inside of within": (
        lambda: attend(fs.VSA(top_k=1, within=fs.FrameCausal(chunk=3))),
        ValueError,
        "chunk is 3 frames",
    ),
    "negative first frames": (
        lambda: fs.Radial(first_frames=-1),
        ValueError,
        "first_frames is -1: give .* at least 0",
    ),
    "within a dynamic builder": (
        lambda: fs.TopP(within=fs.VSA(top_k=1)),
        TypeError,
        "TopP within is VSA.*give a static builder",
    ),
    "a schedule out of range": (
        lambda: SparsitySchedule(target=1.2),
        ValueError,
        r"target is 1\.2: give a ratio in \[0, 1\]",
    ),
    "a NaN schedule": (lambda: SparsitySchedule(target=NAN), ValueError, "target is nan: give a ratio"),
    "a NaN start": (
        lambda: SparsitySchedule(target=0.5, start=NAN),
        ValueError,
        "start is nan: give a ratio",
    ),
    "a NaN step": (
        lambda: SparsitySchedule(target=0.5, step=NAN),
        ValueError,
        "step is nan: give .* above 0",
    ),
    "every no steps": (
        lambda: SparsitySchedule(target=0.5, every=0),
        ValueError,
        "every is 0: give .* at least 1",
    ),
    "every half a step": (
        lambda: SparsitySchedule(target=0.5, every=2.5),
        ValueError,
        r"every is 2\.5: give .* int",
    ),
    "a negative step to seek": (
        lambda: SparsitySchedule(target=0.5).seek(-1),
        ValueError,
        "step is -1: give .* at least 0",
    ),
    "a schedule BSA cannot end at": (
        lambda: fs.BSA(kv_density=SparsitySchedule(start=1.0, target=0.0)),
        ValueError,
        r"kv_density is 0\.0: give a ratio in \(0, 1\]",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_with_argument_value_and_remedy(name: str) -> None:
    call, kind, message = CASES[name]
    with pytest.raises(kind, match=f"(?s){message}") as caught:
        call()
    assert type(caught.value) is kind
    assert caught.value.__cause__ is None and len(str(caught.value)) < 400


def test_the_builders_at_the_ends_of_their_ranges_are_right() -> None:
    for builder in (
        fs.VSA(sparsity=0),
        fs.VSA(sparsity=1),
        fs.VSA(top_k=8),
        fs.BSA(keep_queries=1, kv_density=1),
        fs.TopP(mass=1, min_tiles=9, max_tiles=9),
        fs.SlidingTile(window=(9, 9, 9)),
        fs.FrameCausal(chunk=4),
    ):
        assert int(select(builder).counts.min()) >= 1
        assert attend(builder).isfinite().all()
