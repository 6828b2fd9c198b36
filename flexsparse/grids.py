"""How a model's latent token grid is read from its input.

An attention call sees tokens only; that 1,560 of them are 30 x 52 and not 52 x 30 is known at the model's input.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

Grid = tuple[int, int, int]
GridFunction = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], Grid]


@dataclass(frozen=True)
class VideoInput:
    """Reads the grid off a ``[B, C, T, H, W]`` argument and the patch size. Sizes may be symbolic.

    Attributes:
        argument: name of the argument.
        position: its position.
        patch: latent pixels of a token along (t, h, w).
    """

    argument: str
    position: int
    patch: Grid

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Grid:
        video = kwargs[self.argument] if self.argument in kwargs else args[self.position]
        _, _, T, H, W = video.shape
        return T // self.patch[0], H // self.patch[1], W // self.patch[2]

    def check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise a `ValueError` where the argument is no 5-D tensor."""
        video = kwargs.get(self.argument, args[self.position] if len(args) > self.position else None)
        if not isinstance(video, Tensor) or video.dim() != 5:
            got = tuple(video.shape) if isinstance(video, Tensor) else type(video).__name__
            raise ValueError(
                f"{self.argument} is {got}: the grid is read from a video [B, C, T, H, W]; give wrap(..., grid=(T, H, W)) "
                "or grid=function(module, args, kwargs) for another kind of input"
            )


@dataclass(frozen=True)
class FixedGrid:
    """A grid that the user gave."""

    grid: Grid

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Grid:
        return self.grid


def _patch_size(model: nn.Module) -> Grid | None:
    """From the configuration, an attribute, or the patch convolution; None where there is none of them."""
    config = getattr(model, "config", None)
    for holder in (config, model):
        patch: Any = getattr(holder, "patch_size", None)
        if isinstance(patch, int) and not isinstance(patch, bool):
            temporal = getattr(holder, "patch_size_t", None)
            return (temporal if isinstance(temporal, int) else 1, patch, patch)
        if isinstance(patch, Sequence) and len(patch) == 3 and all(isinstance(p, int) for p in patch):
            return cast(Grid, tuple(patch))
    for module in model.modules():
        if isinstance(module, nn.Conv3d) and tuple(module.kernel_size) == tuple(module.stride):
            return cast(Grid, tuple(module.stride))
    return None


def grid_reader(model: nn.Module, grid: Sequence[int] | GridFunction | None) -> GridFunction:
    """What reads the grid at every call: the given grid or function, or the model's video input.

    Raises:
        ValueError: a grid that is no triple of positive ints; no grid given, and no way found to read one.
    """
    if callable(grid):
        return grid
    if grid is not None:
        if len(grid) != 3 or any(not isinstance(g, int) or g < 1 for g in grid):
            raise ValueError(f"grid is {tuple(grid)}: give three ints (T, H, W) of at least 1")
        return FixedGrid(cast(Grid, tuple(grid)))
    patch = _patch_size(model)
    names = [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if patch is None or not names:
        raise ValueError(
            f"grid is None, and {type(model).__name__} has no patch_size (configuration or attribute) and no patch "
            "convolution to read it from: give grid=(T, H, W), or grid=function(module, args, kwargs)"
        )
    position = names.index("hidden_states") if "hidden_states" in names else 0
    return VideoInput(names[position], position, patch)
