"""What one training is: a size, a method, a seed, a number of steps; equal settings give equal curves on one machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

Attention = Literal["dense", "sparse", "spatial", "spatial_temporal", "spatial_full", "compressed_kv"]
ANCHOR = "dense"
"""The method that every other is compared with."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model and the windows that it is trained on.

    Attributes:
        name: in run names and tables.
        dim: model width.
        depth: transformer blocks.
        heads: attention heads.
        patch: side of a patch, in pixels (or latents); patches have no extent in time.
        frames: of a window.
        height: rows of a window, a multiple of the patch.
        width: columns of a window, a multiple of the patch.
        batch: windows in a step.
        learning_rate: peak, reached after the warm-up and kept.
    """

    name: str
    dim: int
    depth: int
    heads: int
    patch: int
    frames: int
    height: int
    width: int
    batch: int = 1
    learning_rate: float = 1e-3

    @property
    def grid(self) -> tuple[int, int, int]:
        """Token grid (T, H, W)."""
        return self.frames, self.height // self.patch, self.width // self.patch

    @property
    def tokens(self) -> int:
        """S."""
        T, H, W = self.grid
        return T * H * W

    @property
    def head_dim(self) -> int:
        """D."""
        return self.dim // self.heads


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a model attends.

    Attributes:
        name: in run names and tables.
        attention: "sparse" goes through `flexsparse.wrap`; the others are dense attention over some of the tokens.
        builder: for "sparse", a mask builder.
        tile: for "sparse".
        gates: for "sparse": a gate on the coarse output, zero at the start.
        anneal: share of the steps in which the density falls from 1 to the target; 0 is abrupt.
    """

    name: str
    attention: Attention = "sparse"
    builder: Any = None
    tile: tuple[int, int, int] | str = (4, 4, 4)
    gates: bool = False
    anneal: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training.

    Attributes:
        size: of the model.
        method: how it attends.
        seed: of weights, data order, crops and noise.
        steps: to train.
        question: the table that it is for: "main", "parts", "bsa", "grid", "schedule".
        start: the run whose averaged weights it starts from, and after how many steps ("base/dense/s0@240"); None for random
            ones.
        evaluate_every: steps between two measurements of the held-out loss.
        learning_rate: where it is not the size's.
    """

    size: Size
    method: Method
    seed: int
    steps: int
    question: str
    start: str | None = None
    evaluate_every: int = 60
    learning_rate: float | None = None

    @property
    def name(self) -> str:
        """Unique in a study, and a path below its folder."""
        return f"{self.size.name}/{self.method.name}/s{self.seed}"

    @property
    def parent(self) -> tuple[str, int] | None:
        """Name and steps of the run that it starts from."""
        name, _, steps = (self.start or "").partition("@")
        return (name, int(steps)) if self.start else None

    @property
    def rate(self) -> float:
        """Peak learning rate."""
        return self.size.learning_rate if self.learning_rate is None else self.learning_rate

    def as_dict(self) -> dict[str, Any]:
        """JSON values; a builder is its repr."""
        found = dataclasses.asdict(dataclasses.replace(self, method=dataclasses.replace(self.method, builder=None)))
        found["method"]["builder"] = repr(self.method.builder)
        return found

    def digest(self) -> str:
        """SHA-256 of what shapes the curve: not of the steps (a run can be made longer), unless they time an annealing."""
        found = self.as_dict()
        del found["question"]
        if not self.method.anneal:
            del found["steps"]
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
