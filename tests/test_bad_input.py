"""Each wrong argument gets one clear error: what it is, what it was, what to give instead."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flexsparse as fs
from flexsparse import TileLayout

LAYOUT = TileLayout(grid=(2, 4, 8), tile=(2, 2, 2))
TEXT = TileLayout(grid=(2, 4, 8), tile=(2, 2, 2), text_last=3)
S, M = 64, 8
NAN = math.nan


def x(B: int = 2, H: int = 2, tokens: int = S, D: int = 8, **options: Any) -> Tensor:
    return torch.zeros(B, H, tokens, D, **options)


class Answers:
    """A builder that returns what it is given."""

    def __init__(self, selection: Any) -> None:
        self.selection = selection

    def select(self, *args: Any, **options: Any) -> Any:
        return self.selection


def attend(q: Any = None, k: Any = None, v: Any = None, builder: Any = None, **options: Any) -> Any:
    """A call that is right but for what is given."""
    q = x() if q is None else q
    k = x() if k is None else k
    layout = options.pop("layout", LAYOUT)
    return fs.sparse_attention(q, k, k if v is None else v, layout, builder or fs.VSA(top_k=2), **options)


def counts(values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


LAYOUTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "zero in the tile": (
        lambda: TileLayout(grid=(2, 4, 8), tile=(2, 0, 2)),
        ValueError,
        r"tile is \(2, 0, 2\): give three ints of at least 1",
    ),
    "zero in the grid": (
        lambda: TileLayout(grid=(0, 4, 8)),
        ValueError,
        r"grid is \(0, 4, 8\): give three ints of at least 1",
    ),
    "a float in the grid": (
        lambda: TileLayout(grid=(2, 4.0, 8)),
        ValueError,
        r"grid is \(2, 4\.0, 8\): give three ints",
    ),
    "NaN in the tile": (
        lambda: TileLayout(grid=(2, 4, 8), tile=(NAN, 1, 1)),
        ValueError,
        r"tile is \(nan, 1, 1\): give three ints",
    ),
    "a grid of two": (lambda: TileLayout(grid=(4, 8)), ValueError, r"grid is \(4, 8\): give three ints"),
    "a grid that is a number": (lambda: TileLayout(grid=64), ValueError, "grid is 64: give three ints"),
    "a tile by another name": (
        lambda: TileLayout(grid=(2, 4, 8), tile="best"),
        ValueError,
        "tile is 'best': give three ints.* or 'auto'",
    ),
    "a tile of a million tokens": (
        lambda: TileLayout(grid=(2, 4, 8), tile=(100, 100, 100)),
        ValueError,
        r"tile is \(100, 100, 100\), 1000000 tokens: give one of at most 4096",
    ),
    "slots of a million": (
        lambda: TileLayout(grid=(2, 4, 8), tile="auto", slots=2**20),
        ValueError,
        "slots is 1048576: give a power of two from 16 to 4096",
    ),
    "a negative text length": (
        lambda: TileLayout(grid=(2, 4, 8), text_first=-1),
        ValueError,
        "text_first is -1: give .* at least 0",
    ),
    "a fractional text length": (
        lambda: TileLayout(grid=(2, 4, 8), text_last=1.5),
        ValueError,
        "text_last is 1.5: give .* int",
    ),
    "slots of no power of two": (
        lambda: TileLayout(grid=(2, 4, 8), tile="auto", slots=48),
        ValueError,
        "slots is 48: give a power of two",
    ),
    "tokens of another layout": (
        lambda: LAYOUT.to_tiles(x(tokens=65)),
        ValueError,
        r"\(2, 2, 65, 8\).*needs 64 tokens",
    ),
    "padded tokens of another": (
        lambda: LAYOUT.to_raster(x(tokens=S)),
        ValueError,
        r"\(2, 2, 64, 8\).*tile order.*needs 128 tokens",
    ),
}

TENSORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "wrong sequence length": (
        lambda: attend(q=x(tokens=63)),
        ValueError,
        r"q has 63 tokens, but grid \(2, 4, 8\).* has 64: give the layout",
    ),
    "wrong key length": (lambda: attend(k=x(tokens=67)), ValueError, "k has 67 tokens, but grid .* has 64"),
    "text that the layout lacks": (
        lambda: attend(layout=TEXT),
        ValueError,
        "q has 64 tokens.*text_last=3 has 67",
    ),
    "a grid for a layout": (
        lambda: attend(layout=(2, 4, 8)),
        TypeError,
        r"layout is \(2, 4, 8\): give a TileLayout\(grid=",
    ),
    "a builder's class": (lambda: attend(builder=fs.VSA), TypeError, r"builder is <class .*VSA'>: give a mask builder"),
    "three dimensions": (
        lambda: attend(q=x()[0]),
        ValueError,
        r"q has shape \(2, 64, 8\): give \[batch, heads, tokens, head dim\]",
    ),
    "another batch": (lambda: attend(k=x(B=1)), ValueError, "k has batch 1 and q has 2: give the same batch"),
    "another batch in v": (lambda: attend(v=x(B=3)), ValueError, "v has batch 3 and q has 2"),
    "heads that do not divide": (
        lambda: attend(q=x(H=3), k=x(H=2)),
        ValueError,
        "q has 3 heads and k has 2: .* multiple of k's",
    ),
    "more KV heads than heads": (
        lambda: attend(q=x(H=2), k=x(H=4)),
        ValueError,
        "q has 2 heads and k has 4: .* multiple",
    ),
    "no KV heads": (lambda: attend(k=x(H=0)), ValueError, "q has 2 heads and k has 0: .* multiple"),
    "other heads in v": (
        lambda: attend(v=x(H=1)),
        ValueError,
        r"v has shape \(2, 1, 64, 8\) and k has \(2, 2, 64, 8\)",
    ),
    "another head dim": (
        lambda: attend(k=x(D=16)),
        ValueError,
        "k has head dim 16 and q has 8: give the same",
    ),
    "another head dim in v": (lambda: attend(v=x(D=16)), ValueError, "v has head dim 16 and q has 8"),
    "another dtype": (
        lambda: attend(k=x(dtype=torch.bfloat16)),
        TypeError,
        r"k is torch\.bfloat16 and q is torch\.float32: cast",
    ),
    "another dtype in v": (
        lambda: attend(v=x(dtype=torch.float16)),
        TypeError,
        r"v is torch\.float16 and q is torch\.float32",
    ),
    "integers": (lambda: attend(q=x(dtype=torch.int64)), TypeError, r"q is torch\.int64: give float32"),
    "another device": (
        lambda: attend(k=x(device="meta")),
        ValueError,
        "k is on meta and q on cpu: move them",
    ),
    "another device of v": (
        lambda: attend(v=x(device="meta")),
        ValueError,
        "v is on meta and q on cpu: move them",
    ),
    "NaN scale": (
        lambda: attend(scale=NAN),
        ValueError,
        "scale is nan: give a positive finite number, or None",
    ),
    "infinite scale": (
        lambda: attend(scale=math.inf),
        ValueError,
        "scale is inf: give a positive finite number",
    ),
    "zero scale": (lambda: attend(scale=0.0), ValueError, r"scale is 0\.0: give a positive finite number"),
    "a learned scale": (
        lambda: attend(scale=torch.nn.Parameter(torch.tensor(0.5))),
        TypeError,
        "scale is a tensor, which would get no gradient: give a number, and multiply q by a learned scale",
    ),
    "a scale in words": (lambda: attend(scale="0.5"), ValueError, r"scale is '0\.5': give a positive finite number"),
    "a scale that is true": (lambda: attend(scale=True), ValueError, "scale is True: give a positive finite number"),
    "a complex scale": (lambda: attend(scale=1j), ValueError, "scale is 1j: give a positive finite number"),
    "heads without channels": (
        lambda: attend(q=x()[..., :0], k=x()[..., :0], v=x()[..., :0]),
        ValueError,
        r"q has shape \(2, 2, 64, 0\): give at least one head, and a head dim of at least 1",
    ),
    "heads without channels, selecting": (
        lambda: fs.VSA(top_k=1).select(x()[..., :0], x()[..., :0], LAYOUT),
        ValueError,
        r"q has shape \(2, 2, 64, 0\): give a head dim",
    ),
    "no query heads": (
        lambda: attend(q=x()[:, :0]),
        ValueError,
        r"q has shape \(2, 0, 64, 8\): give at least one head",
    ),
    "NaN scale, selecting": (
        lambda: fs.VSA(top_k=1).select(x(), x(), LAYOUT, scale=NAN),
        ValueError,
        "scale is nan",
    ),
    "heads, selecting": (
        lambda: fs.VSA(top_k=1).select(x(H=3), x(), LAYOUT),
        ValueError,
        "q has 3 heads and k has 2",
    ),
    "head dim, selecting": (
        lambda: fs.VSA(top_k=1).select(x(), x(D=4), LAYOUT),
        ValueError,
        r"k \(2, 2, 64, 4\)",
    ),
    "a gate of the wrong shape": (
        lambda: attend(gate=torch.zeros(2, 64, 16)),
        ValueError,
        r"gate has shape \(2, 64, 16\): give the shape of q, \(2, 2, 64, 8\)",
    ),
    "a fine gate of the wrong shape": (
        lambda: attend(fine_gate=x(D=1)),
        ValueError,
        r"fine_gate has shape \(2, 2, 64, 1\): give",
    ),
    "a gate with nothing to gate": (
        lambda: attend(builder=fs.BSA(), gate=x()),
        ValueError,
        "BSA has no coarse output.*use VSA or TopP, or .*, or no gate",
    ),
    "a gate with a static builder": (
        lambda: attend(builder=fs.Dense(), gate=x()),
        ValueError,
        "Dense has no coarse output",
    ),
    "a gate with given tiles": (
        lambda: attend(builder=fs.VSA(top_k=1).select(x(), x(), LAYOUT), gate=x()),
        ValueError,
        "TileSelection has no coarse output",
    ),
    "no builder": (
        lambda: attend(builder="vsa"),
        TypeError,
        "builder is 'vsa': give a mask builder .* or a TileSelection",
    ),
    "tiles of another layout": (
        lambda: attend(builder=fs.Dense().select(x(), x(), TileLayout(grid=(2, 8, 4), tile=(2, 2, 2)))),
        ValueError,
        r"selection is for grid \(2, 8, 4\).* the call has grid \(2, 4, 8\).*: give one that was made with the call's layouts",
    ),
    "tiles of another KV layout": (
        lambda: attend(builder=fs.Dense().select(x(), x(), LAYOUT), k=x(tokens=67), kv_layout=TEXT),
        ValueError,
        r"the call has grid \(2, 4, 8\).* and keys of .*text 0 \+ 3: give one that was made with the call's layouts",
    ),
    "tiles for other heads": (
        lambda: attend(builder=fs.Dense().select(x(H=4), x(), LAYOUT)),
        ValueError,
        r"selection has rows for \[B, H, tiles\] = \[2, 4, 8\], and the call has \[2, 2, 8\]: give a row for",
    ),
    "a builder that answers for another grid": (
        lambda: attend(builder=Answers(fs.Dense().select(x(), x(), TileLayout(grid=(2, 8, 4), tile=(2, 2, 2))))),
        ValueError,
        r"the selection that Answers\.select returned is for grid \(2, 8, 4\).*: give one that was made with",
    ),
    "a builder that forgets the heads": (
        lambda: attend(builder=Answers(fs.Dense().select(x()[:1, :1], x()[:1, :1], LAYOUT))),
        ValueError,
        r"Answers\.select returned has rows for \[B, H, tiles\] = \[1, 1, 8\], and the call has \[2, 2, 8\]",
    ),
    "q that is no tensor": (lambda: attend(q=x().numpy()), TypeError, "q is ndarray: give a tensor"),
    "a gate that is a number": (
        lambda: attend(gate=0.5),
        TypeError,
        r"gate is 0\.5: give a floating point tensor of the shape of q, \(2, 2, 64, 8\), or None",
    ),
    "nested": (
        lambda: fs.sparse_attention(torch.nested.nested_tensor(list(x())), x(), x(), LAYOUT, fs.VSA(top_k=1)),
        TypeError,
        "q is nested: give a dense tensor",
    ),
    "not strided": (
        lambda: fs.sparse_attention(x(), x().to_sparse(), x(), LAYOUT, fs.VSA(top_k=1)),
        TypeError,
        r"k is torch\.sparse_coo: give a dense tensor",
    ),
    "traced by torch.jit": (
        lambda: torch.jit.trace(lambda q: fs.sparse_attention(q, q, q, LAYOUT, fs.VSA(top_k=1)), (x(),)),
        NotImplementedError,
        "torch.jit.trace does not record sparse attention: use torch.compile or torch.export",
    ),
    "a gate of integers": (lambda: attend(gate=x().int()), TypeError, r"gate is torch\.int32: give a floating point"),
    "a gate elsewhere": (
        lambda: attend(gate=x(device="meta")),
        ValueError,
        "gate is on meta and q on cpu: move them",
    ),
    "tile counts in a list": (
        lambda: attend(tile_counts=[8] * 8),
        TypeError,
        "tile_counts is list: give an int32 tensor, or None",
    ),
    "tile counts, selecting": (
        lambda: fs.VSA(top_k=1).select(x(), x(), LAYOUT, tile_counts=counts([9] + [8] * 7)),
        ValueError,
        "holds 8 to 9: each must lie between 0",
    ),
    "too few tile counts": (
        lambda: attend(tile_counts=counts([8] * 7)),
        ValueError,
        r"\(7,\): give int32 \[8\] or \[2, 8\]",
    ),
    "tile counts for another batch": (
        lambda: attend(tile_counts=counts([[8] * 8] * 3)),
        ValueError,
        r"\(3, 8\): give int32",
    ),
    "tile counts of another dtype": (
        lambda: attend(tile_counts=counts([8] * 8, torch.int64)),
        ValueError,
        r"torch\.int64 .*give int32",
    ),
    "tile counts over the slots": (
        lambda: attend(tile_counts=counts([9] + [8] * 7)),
        ValueError,
        "holds 8 to 9: each must lie between 0",
    ),
    "negative tile counts": (
        lambda: attend(tile_counts=counts([8] * 7 + [-1])),
        ValueError,
        "holds -1 to 8: each must lie between 0",
    ),
}


def training(**options: Any) -> Any:
    return attend(q=x(requires_grad=True), **options)


BACKENDS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no such backend": (
        lambda: attend(backend="cuda"),
        ValueError,
        "backend is 'cuda': give one of auto, reference, gather, flex, triton",
    ),
    "triton": (
        lambda: attend(x().double(), x().double(), backend="triton"),
        ValueError,
        "'triton', which cannot do this case: the templates compute no torch.float64; use 'gather' or 'reference'",
    ),
    "flex with gradients on CPU": (
        lambda: training(backend="flex"),
        ValueError,
        "'flex', which cannot .*no backward on CPU; use 'gather'",
    ),
    "flex with lse on CPU": (
        lambda: attend(backend="flex", return_aux=True),
        ValueError,
        "no log-sum-exp on CPU .*use 'gather'",
    ),
    "flex in float64": (
        lambda: attend(x(dtype=torch.float64), x(dtype=torch.float64), backend="flex"),
        ValueError,
        "no float64; use 'gather' or 'reference'",
    ),
}

CASES = {**LAYOUTS, **TENSORS, **BACKENDS}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_with_argument_value_and_remedy(name: str) -> None:
    call, kind, message = CASES[name]
    with pytest.raises(kind, match=f"(?s){message}") as caught:
        call()
    assert type(caught.value) is kind
    assert caught.value.__cause__ is None and len(str(caught.value)) < 400


def test_the_call_that_the_wrong_ones_vary_is_right() -> None:
    assert attend().shape == (2, 2, S, 8)
    assert training(backend="gather").requires_grad
    assert attend(tile_counts=counts([8] * 7 + [0])).isfinite().all()
    assert LAYOUT.num_tiles == M


def test_counts_that_cut_a_tile_of_pruned_queries() -> None:
    layout = fs.TileLayout(grid=(4, 4, 8))
    x = torch.randn(1, 2, layout.seq_len, 8)
    counts = torch.tensor([64, 40], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"tile_counts cuts 1 video tiles short.*give keep_queries=1"):
        fs.sparse_attention(x, x, x, layout, fs.BSA(), tile_counts=counts)
    with pytest.raises(ValueError, match=r"tile_counts cuts 1 video tiles short.*give keep_queries=1"):
        fs.BSA().select(x, x, layout, tile_counts=counts)
    fs.sparse_attention(x, x, x, layout, fs.BSA(keep_queries=1), tile_counts=counts)
    fs.sparse_attention(x, x, x, layout, fs.BSA(), tile_counts=torch.tensor([64, 0], dtype=torch.int32))
