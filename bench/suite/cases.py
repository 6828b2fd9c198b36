"""What is measured, most informative first. Shape letters: B batch, H query heads, G KV heads, S tokens, D head dim."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

import flexsparse as fs

Kind = Literal[
    "fine_forward",
    "fine_backward",
    "attention_forward",
    "attention_training",
    "model_step",
    "overlap",
    "memory",
    "ceiling",
]
Sides = tuple[int, int, int]
Tile = Sides | Literal["auto"]

DENSE = ("dense_cudnn", "dense_fa2", "dense_fa4")
SPARSE = ("fastvideo_tk", "fastvideo_triton", "cudnn_frontend", "attention_gym")
OURS = "flexsparse"
GRIDS: dict[str, Sides] = {"16k": (16, 32, 32), "32k": (32, 32, 32), "77k": (20, 48, 80)}
TILES: dict[int, Sides] = {64: (4, 4, 4), 128: (4, 8, 4)}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem, and who computes it.

    Attributes:
        name: unique; what ``--only`` matches.
        kind: which module makes the contenders.
        grid: latent tokens (T, H, W).
        tile: of queries, and of keys where ``kv_tile`` is None.
        others: further tiles that our own attention is timed with.
        baselines: names in `bench.baselines`.
        density: share of KV tiles kept.
        top_k: KV tiles kept, instead of a density.
        method: ``vsa`` with a gate, or ``bsa`` (half of the queries kept).
        data: ``random``, independent normal tokens; ``smooth``, neighbours alike; ``video``, as much alike as in trained models
            (`data.CELLS`).
        parts: whether a whole attention is also timed piece by piece.
        layers: blocks of a model.
        seconds: time for samples.
        early: whether it is worth its time with the default kernels, before anything is tuned.
    """

    name: str
    kind: Kind
    grid: Sides = GRIDS["32k"]
    tile: Tile = TILES[64]
    kv_tile: Sides | None = None
    others: tuple[Tile, ...] = ()
    baselines: tuple[str, ...] = ()
    B: int = 1
    H: int = 12
    D: int = 128
    density: float = 0.1
    top_k: int | None = None
    dtype: str = "bfloat16"
    method: Literal["vsa", "bsa"] = "vsa"
    data: Literal["random", "smooth", "video"] = "random"
    parts: bool = False
    layers: int = 0
    seconds: float = 4.0
    early: bool = False

    @property
    def S(self) -> int:
        return math.prod(self.grid)

    @property
    def G(self) -> int:
        return self.H

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def layout(self) -> fs.TileLayout:
        return self.layout_of(self.tile)

    @property
    def kv_layout(self) -> fs.TileLayout:
        return self.layout if self.kv_tile is None else self.layout_of(self.kv_tile)

    @property
    def builder(self) -> Any:
        if self.method == "bsa":
            return fs.BSA(keep_queries=0.5, kv_density=self.density)
        return fs.VSA(top_k=self.top_k) if self.top_k is not None else fs.VSA(sparsity=1 - self.density)

    def layout_of(self, tile: Tile) -> fs.TileLayout:
        """The grid in tiles of another shape."""
        return fs.TileLayout(grid=self.grid, tile=tile)

    def row(self, op: str, impl: str, **fields: Any) -> dict[str, Any]:
        """A row of this case without measurements."""
        found = {
            "case": self.name,
            "op": op,
            "impl": impl,
            "part": None,
            "B": self.B,
            "H": self.H,
            "G": self.G,
            "S": self.S,
            "D": self.D,
            "grid": list(self.grid),
            "tile": list(self.layout.sides),
            "kv_tile": list(self.kv_layout.sides),
            "density": None,
            "dtype": self.dtype,
            "method": self.method,
            "data": self.data,
            "ms": None,
            "tflops": None,
            "flops": None,
            "error": {},
            "checked": False,
            "reason": None,
            "config": None,
        }
        return found | fields

    @property
    def ops(self) -> tuple[str, ...]:
        """Ops of the case's rows: what a failed check of one of them stops."""
        if self.kind == "fine_backward":
            return ("fine_forward", "fine_backward")
        if self.kind == "attention_forward" and self.parts:
            return ("attention_forward", "select")
        return (self.kind,)

    def estimate(self) -> float:
        """Seconds that the case may take, compilation included: a guess, corrected by `runner` as it goes."""
        dense = 4.0 * self.S**2 * self.H * self.D * self.B * max(1, self.layers)
        if self.kind in ("fine_backward", "attention_training", "model_step"):
            dense *= 3.5
        share = 1.0 if any(name in DENSE for name in self.baselines) or self.layers else 2 * self.density
        runs = 8 + len(self.baselines) + len(self.others)
        compiling = 65.0 if self.layers else 4.0 + 5.0 * (len(self.baselines) + len(self.others) + 1)
        return compiling + self.seconds + runs * dense * share / 3e14


def fine_impls(slots: int, dense: bool = True) -> tuple[str, ...]:
    """Baselines of a fine-stage case."""
    return (*(DENSE if dense else ()), f"flex_{slots}", *SPARSE)


def first_cases() -> list[Case]:
    """One case for every line of the tables of targets, in the order of what they tell."""
    t64, t128 = fine_impls(64), fine_impls(128)
    ragged, bsa_grid = (21, 30, 52), (40, 48, 80)
    return [
        Case(name="ceilings", kind="ceiling", seconds=1.0),
        Case(name="fine-d128-t64-32k", kind="fine_forward", baselines=t64, early=True),
        Case(name="attention-32k", kind="attention_forward", baselines=DENSE, parts=True, early=True),
        Case(name="training-attention-32k", kind="attention_training", baselines=DENSE, early=True),
        Case(name="fine-d64-t64-32k", kind="fine_forward", D=64, H=24, baselines=t64),
        Case(name="fine-d128-t128-32k", kind="fine_forward", tile=TILES[128], baselines=t128),
        Case(name="training-fine-d128-t64-32k", kind="fine_backward", baselines=t64),
        Case(name="model-forward", kind="model_step", grid=(16, 28, 52), top_k=32, density=0.1, layers=10),
        Case(name="fine-d128-t64-32k-video", kind="fine_forward", data="video", baselines=t64),
        Case(name="attention-16k", kind="attention_forward", grid=GRIDS["16k"], baselines=DENSE, parts=True),
        Case(
            name="ragged-auto", kind="attention_forward", grid=ragged, tile="auto", others=((4, 4, 4),), baselines=DENSE
        ),
        Case(name="overlap-32k", kind="overlap", seconds=1.0),
        Case(name="training-fine-d64-t64-32k", kind="fine_backward", D=64, H=24, baselines=t64),
        Case(name="training-fine-d128-t128-32k", kind="fine_backward", tile=TILES[128], baselines=t128),
        Case(name="memory-77k", kind="memory", grid=GRIDS["77k"], H=40, seconds=1.0),
        bsa("bsa-training", "attention_training", bsa_grid),
        bsa("bsa-forward", "attention_forward", bsa_grid),
        Case(name="training-attention-14b", kind="attention_training", grid=GRIDS["77k"], H=40, baselines=DENSE),
    ]


def bsa(name: str, kind: Kind, grid: Sides) -> Case:
    """BSA with query tiles of 128 slots in two shapes, of which half are kept, and KV tiles of 64; the fastest tile counts.

    Query tiles of 64 slots are timed too: they share one layout with the keys, so that a wrapped model can have them.
    """
    few, tiles = ("dense_cudnn", "dense_fa4"), ((4, 4, 8), TILES[64])
    how = {"tile": TILES[128], "kv_tile": TILES[64], "others": tiles, "method": "bsa", "baselines": few}
    return Case(name=name, kind=kind, grid=grid, parts=True, **how)  # type: ignore[arg-type]


def further_cases() -> list[Case]:
    """Densities, lengths and head counts around the first cases."""
    few = ("dense_cudnn", "flex_64", "fastvideo_tk")
    cases = [
        Case(name=f"fine-d128-t64-32k-p{round(1000 * density)}", kind="fine_forward", density=density, baselines=few)
        for density in (0.05, 0.125)
    ]
    cases += [
        Case(name="fine-d128-t64-77k", kind="fine_forward", grid=GRIDS["77k"], H=24, baselines=few),
        Case(name="fine-d128-t64-16k", kind="fine_forward", grid=GRIDS["16k"], H=40, baselines=few),
        Case(name="fine-d128-t64-32k-smooth", kind="fine_forward", data="smooth", baselines=few),
        Case(name="fine-d128-t64-32k-h40", kind="fine_forward", H=40, baselines=few),
        Case(name="attention-77k", kind="attention_forward", grid=GRIDS["77k"], baselines=DENSE[:1], parts=True),
        Case(name="training-fine-d128-t64-77k", kind="fine_backward", grid=GRIDS["77k"], H=24, baselines=few),
        Case(name="training-attention-77k", kind="attention_training", grid=GRIDS["77k"], baselines=DENSE[:1]),
    ]
    cases += [
        Case(
            name=f"attention-32k-p{round(1000 * density)}",
            kind="attention_forward",
            density=density,
            baselines=DENSE[:1],
        )
        for density in (0.05, 0.125)
    ]
    cases += [
        Case(name="fine-d64-t128-32k", kind="fine_forward", D=64, H=24, tile=TILES[128], baselines=fine_impls(128)),
        Case(name="fine-d128-t64-32k-fp16", kind="fine_forward", dtype="float16", baselines=("dense_cudnn", "flex_64")),
        Case(name="fine-d128-t128-77k", kind="fine_forward", grid=GRIDS["77k"], tile=TILES[128], baselines=DENSE[:1]),
    ]
    return cases


def all_cases() -> list[Case]:
    """Everything, in order."""
    return first_cases() + further_cases()


def tuned_cases() -> list[Case]:
    """The representative problem of each configuration that is tuned.

    With lists as trained models' have them: a kernel that reads once for two tiles is worth what these have in common.
    """
    shapes: dict[str, dict[str, Any]] = {
        "tune-d128-t64": {},
        "tune-d64-t64": {"D": 64, "H": 24},
        "tune-d128-t128": {"tile": TILES[128]},
        "tune-d64-t128": {"D": 64, "H": 24, "tile": TILES[128]},
    }
    return [Case(name=name, kind="fine_forward", data="video", seconds=2.0, **shape) for name, shape in shapes.items()]
