"""Each wrong parameter of a mask builder or a schedule gets one clear error: what, its value, what to give."""

import copy
import dataclasses
import inspect
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
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
    "a density that mass does not read": (
        lambda: fs.BSA(kv_density=fs.SparsitySchedule(target=0.1, start=1.0), threshold="mass"),
        ValueError,
        r"BSA kv_density is SparsitySchedule\(.*threshold='mass' does not read it.*give threshold='normal'",
    ),
    "statistics that mass does not read": (
        lambda: fs.BSA(statistics="head", threshold="mass"),
        ValueError,
        "BSA statistics is 'head', but threshold='mass' has no mean and deviation: leave it out",
    ),
    "a mass that normal does not read": (
        lambda: fs.BSA(mass=fs.SparsitySchedule(target=0.9, start=1.0)),
        ValueError,
        r"BSA mass is SparsitySchedule\(.*threshold='normal' does not read it.*give threshold='mass'",
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
    "a window that is a number": (lambda: fs.BSA(window=2), ValueError, "BSA window is 2: give three ints"),
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
    "one builder for all heads": (
        lambda: fs.PerHead(builders=fs.Dense(), heads=(0,)),
        TypeError,
        r"PerHead builders is Dense\(\): give a tuple of mask builders",
    ),
    "no index of a builder": (
        lambda: fs.PerHead(builders=(fs.Dense(),), heads=2),
        ValueError,
        "PerHead heads is 2: give for each query head the index of one of the 1 builders",
    ),
    "a word for an index": (
        lambda: fs.PerHead(builders=(fs.Dense(),), heads=("a",)),
        ValueError,
        r"PerHead heads is \('a',\): give for each query head",
    ),
    "an index of no builder": (
        lambda: fs.PerHead(builders=(fs.Dense(),), heads=(0, 1)),
        ValueError,
        r"PerHead heads is \(0, 1\): give for each query head",
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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fs.VSA(0.9), "0.9 was given by position: write VSA(sparsity=0.9) or VSA(top_k=...)"),
        (lambda: fs.VSA(0.9, 2), "0.9 and 2 were given by position: write VSA(sparsity=0.9) or VSA(top_k=...)"),
        (lambda: fs.BSA(0.5), "0.5 was given by position: write BSA(keep_queries=0.5) or BSA(kv_density=...)"),
        (lambda: fs.TopP(0.9), "0.9 was given by position: write TopP(mass=0.9)"),
        (lambda: fs.FrameCausal(4), "4 was given by position: write FrameCausal(chunk=4)"),
        (lambda: fs.SlidingTile((3, 3, 3)), "(3, 3, 3) was given by position: write SlidingTile(window=(3, 3, 3))"),
        (lambda: fs.Radial(1), "1 was given by position: write Radial(first_frames=1)"),
        (lambda: fs.PerHead((fs.Dense(),), (0,)), "write PerHead(builders=(Dense(),), heads=(0,))"),
        (lambda: SparsitySchedule(0.9), "0.9 was given by position: write SparsitySchedule(target=0.9)"),
        (lambda: fs.TileLayout((4, 8, 8)), "(4, 8, 8) was given by position: write TileLayout(grid=(4, 8, 8))"),
        (
            lambda: fs.TileLayout((4, 8, 8), (2, 2, 2)),
            "(4, 8, 8) and (2, 2, 2) were given by position: write TileLayout(grid=(4, 8, 8), tile=(2, 2, 2))",
        ),
    ],
)
def test_an_argument_by_position_is_told_its_keyword(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)) as caught:
        call()
    assert " takes keywords only, and " in str(caught.value)


def test_builders_are_values() -> None:
    for builder in (
        fs.VSA(top_k=2),
        fs.BSA(within=fs.Radial()),
        fs.PerHead(builders=(fs.Dense(),), heads=(0,)),
        LAYOUT,
    ):
        same = (copy.deepcopy(builder), pickle.loads(pickle.dumps(builder)), dataclasses.replace(builder))
        assert {builder, *same} == {builder}
    assert [*inspect.signature(fs.VSA).parameters] == ["sparsity", "top_k", "count_bias", "within"]
    with pytest.raises(TypeError, match=r"VSA\.__init__\(\) got an unexpected keyword argument 'density'"):
        fs.VSA(density=0.1)  # type: ignore[call-arg]


def test_builders_and_layouts_are_made_in_a_graph(fresh_dynamo: None) -> None:
    builders: list[Callable[[], Any]] = [
        lambda: fs.VSA(sparsity=0.5, within=fs.SlidingTile(window=(3, 3, 3))),
        lambda: fs.BSA(kv_density=0.5, within=fs.FrameCausal(chunk=2)),
        lambda: fs.PerHead(builders=(fs.TopP(max_tiles=3), fs.Radial(first_frames=1)), heads=(0, 1)),
    ]
    x = torch.randn(1, 2, 64, 8)
    for build in builders:

        @torch.compile(backend="eager", fullgraph=True)
        def call(x: torch.Tensor) -> torch.Tensor:
            layout = fs.TileLayout(grid=(2, 4, 8), tile=(2, 2, 2))
            return fs.sparse_attention(x, x, x, layout, build(), backend="gather")  # noqa: B023

        torch.testing.assert_close(call(x), fs.sparse_attention(x, x, x, LAYOUT, build(), backend="gather"))


def test_numbers_of_numpy_are_taken_and_stored_as_plain_ones() -> None:
    two, half = np.int64(2), np.float32(0.5)
    builders: tuple[Any, ...] = (
        fs.VSA(top_k=two),
        fs.VSA(sparsity=half),
        fs.VSA(sparsity=np.int32(0)),
        fs.TopP(mass=half, min_tiles=two, max_tiles=np.int32(4)),
        fs.BSA(keep_queries=half, kv_density=half, window=(two, 2, two), min_tiles=two, max_tiles=two),
        fs.BSA(mass=half, threshold="mass"),
        fs.SlidingTile(window=(two, np.int32(3), 3)),
        fs.FrameCausal(chunk=two),
        fs.Radial(first_frames=two),
        fs.PerHead(builders=(fs.Dense(), fs.VSA(top_k=two)), heads=np.array([0, 1])),
    )
    for builder in builders:
        assert "np." not in repr(builder)
        assert attend(builder).isfinite().all()
    assert type(fs.VSA(sparsity=half).sparsity) is type(fs.VSA(sparsity=0).sparsity) is float
    assert type(fs.VSA(top_k=two).top_k) is type(fs.FrameCausal(chunk=two).chunk) is int
    layout = fs.TileLayout(grid=(two, 4, 8), tile=(two, two, two), text_last=np.int16(3))
    assert repr(layout) == repr(fs.TileLayout(grid=(2, 4, 8), tile=(2, 2, 2), text_last=3))
    assert repr(fs.TileLayout(grid=(4, 8, 8), tile="auto", slots=np.int64(32)).slots) == "32"
    schedule = SparsitySchedule(target=half, start=np.float64(0), step=np.float32(0.25), every=two)
    assert "np." not in repr(schedule.state_dict())
    schedule.advance(two)
    assert type(schedule.steps_done) is int and schedule.value == 0.25


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fs.VSA(top_k=True), "VSA top_k is True: give an int"),
        (lambda: fs.VSA(sparsity=True), "VSA sparsity is True: give a number"),
        (lambda: fs.TopP(mass=True), "TopP mass is True: give a number"),
        (lambda: fs.TopP(min_tiles=True), "TopP min_tiles is True: give an int"),
        (lambda: fs.BSA(max_tiles=True), "BSA max_tiles is True: give an int"),
        (lambda: fs.BSA(window=(True, 2, 2)), r"BSA window is \(True, 2, 2\): give three ints"),
        (lambda: fs.SlidingTile(window=(1, 1, True)), "SlidingTile window is .*: give three ints"),
        (lambda: fs.FrameCausal(chunk=True), "FrameCausal chunk is True: give an int"),
        (lambda: fs.Radial(first_frames=True), "Radial first_frames is True: give a number of tiles"),
        (lambda: fs.PerHead(builders=(fs.Dense(),) * 2, heads=(0, True)), r"PerHead heads is \(0, True\): give"),
        (lambda: SparsitySchedule(target=True), "target is True: give a ratio"),
        (lambda: SparsitySchedule(target=0.5, step=True), "step is True: give how much"),
        (lambda: SparsitySchedule(target=0.5, every=True), "every is True: give the training steps"),
        (lambda: fs.TileLayout(grid=(True, 4, 8)), r"grid is \(True, 4, 8\): give three ints"),
        (lambda: fs.TileLayout(grid=(2, 4, 8), text_first=True), "text_first is True: give the number"),
    ],
)
def test_a_bool_is_no_number(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


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
