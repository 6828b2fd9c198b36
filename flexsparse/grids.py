"""How a model's latent token grid, and the text tokens that join it, are read from its input.

An attention call sees tokens only; that 1,560 of them are 30 x 52 and not 52 x 30 is known at the model's input.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from flexsparse.layout import axes_of
from flexsparse.models import Known, known

Grid = tuple[int, int, int]
Geometry = tuple[int, int, int, int, int]
"""(T, H, W, text_first, text_last): a video's grid, and how many extra tokens come before and after it."""
GridFunction = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], Sequence[int]]

LENGTH_AXIS = 1
"""Where text ``[B, L, ...]`` has its tokens."""


@dataclass(frozen=True)
class Argument:
    """One argument of a model's forward."""

    name: str
    position: int

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Its value in a call; None where it is not given."""
        if self.name in kwargs:
            return kwargs[self.name]
        return args[self.position] if len(args) > self.position else None


@dataclass(frozen=True)
class Text:
    """Reads how many extra tokens, text and history, join the video's. Sizes may be symbolic.

    Attributes:
        arguments: those that are text ``[B, L, ...]``.
        first: whether the text comes before the video.
        trimmed: the mask ``[B, L]`` of text that a call with one sample leaves out, or None.
        history: those that are video latents ``[B, C, T, H, W]`` before the video, and their patch sizes.
        fixed: (text_first, text_last) where they are given.
    """

    arguments: tuple[Argument, ...] = ()
    first: bool = False
    trimmed: Argument | None = None
    history: tuple[tuple[Argument, Grid], ...] = ()
    fixed: tuple[int, int] | None = None

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int]:
        """(text_first, text_last) of a call."""
        if self.fixed is not None:
            return self.fixed
        length = 0
        for argument in self.arguments:
            value = argument.of(args, kwargs)
            length = length + (value.shape[LENGTH_AXIS] if isinstance(value, Tensor) else 0)
        mask = self.trimmed_by(args, kwargs)
        if mask is not None:
            length = length - mask.shape[LENGTH_AXIS] + int(mask.sum())
        before = 0
        for argument, patch in self.history:
            value = argument.of(args, kwargs)
            if isinstance(value, Tensor):
                t, h, w = ((size + side - 1) // side for size, side in zip(value.shape[-3:], patch))
                before = before + t * h * w
        return (before + length, 0) if self.first else (before, length)

    def trimmed_by(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The mask whose hidden text the call leaves out, so that how many tokens it has depends on data; else None."""
        mask = self.trimmed.of(args, kwargs) if self.trimmed is not None else None
        return mask if isinstance(mask, Tensor) and mask.shape[0] == 1 else None


@dataclass(frozen=True)
class VideoInput:
    """Reads the grid off a 5-D argument and the patch size. Sizes may be symbolic.

    Attributes:
        video: the argument.
        patch: latent pixels of a token along (t, h, w).
        axes: of the argument, "B C T H W" or another order.
    """

    video: Argument
    patch: Grid
    axes: str = "B C T H W"

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Grid:
        sizes = dict(zip(self.axes.split(), self.video.of(args, kwargs).shape))
        return sizes["T"] // self.patch[0], sizes["H"] // self.patch[1], sizes["W"] // self.patch[2]

    def check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise a `ValueError` where the argument is no 5-D tensor."""
        video = self.video.of(args, kwargs)
        if not isinstance(video, Tensor) or video.dim() != 5:
            got = tuple(video.shape) if isinstance(video, Tensor) else type(video).__name__
            raise ValueError(
                f"{self.video.name} is {got}: the grid is read from a video [{self.axes.replace(' ', ', ')}]; give "
                "wrap(..., grid=(T, H, W)) or grid=function(module, args, kwargs) for another kind of input"
            )


@dataclass(frozen=True)
class SizeArguments:
    """Reads the grid off arguments that say it, where the input is a sequence of tokens.

    Attributes:
        sizes: the arguments for T, H and W, in tokens.
    """

    sizes: tuple[Argument, ...]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Grid:
        return cast(Grid, tuple(size.of(args, kwargs) for size in self.sizes))

    def check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise a `ValueError` where a size is not given."""
        for size in self.sizes:
            if size.of(args, kwargs) is None:
                raise ValueError(
                    f"{size.name} is not given, and the grid is read from it: call the model with "
                    f"{', '.join(s.name for s in self.sizes)}, or give wrap(..., grid=(T, H, W))"
                )


@dataclass(frozen=True)
class FixedGrid:
    """A grid that the user gave."""

    grid: Grid

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Grid:
        return self.grid


@dataclass(frozen=True)
class GeometryReader:
    """What reads a call's geometry.

    Attributes:
        grid: reads the grid; a user's function may return the text's lengths after it.
        text: reads the text's lengths.
        ragged: whether calls may have fewer text tokens than the input (`models.Known`).
    """

    grid: GridFunction
    text: Text = field(default_factory=Text)
    ragged: bool = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Geometry:
        sizes = self.grid(module, args, kwargs)
        sizes = tuple(sizes) if isinstance(sizes, tuple | list) else sizes
        if isinstance(sizes, tuple) and len(sizes) == 5:
            return sizes  # type: ignore[return-value]
        if not isinstance(sizes, tuple) or len(sizes) != 3:
            raise ValueError(
                f"the grid function returned {sizes}: return (T, H, W), or (T, H, W, text_first, text_last)"
            )
        return (*sizes, *self.text(args, kwargs))

    def check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise a `ValueError` where the call's input does not say its grid."""
        if isinstance(self.grid, VideoInput | SizeArguments):
            self.grid.check(args, kwargs)

    @property
    def fixed(self) -> Geometry | None:
        """The geometry of every call, where none of it is read from the input; else None."""
        if not isinstance(self.grid, FixedGrid) or (self.text.fixed is None and self.text.arguments):
            return None
        return (*self.grid.grid, *(self.text.fixed or (0, 0)))

    @property
    def from_input(self) -> bool:
        """Whether the grid is read from the model's input, by a rule of ours."""
        return isinstance(self.grid, VideoInput | SizeArguments)


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


def _arguments(model: nn.Module) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]


def _from_input(model: nn.Module, names: list[str], about: Known) -> GridFunction:
    if about.sizes:
        return SizeArguments(tuple(Argument(name, names.index(name)) for name in about.sizes))
    patch, kind = _patch_size(model), type(model).__name__
    if not names and patch is not None:
        raise ValueError(
            f"grid is None, and {kind}.forward names no argument to read it from: wrap the model inside of it "
            "(get_base_model() of peft's), before DistributedDataParallel goes around it, or give grid=(T, H, W)"
        )
    if patch is None or not names:
        raise ValueError(
            f"grid is None, and {kind} has no patch_size (configuration or attribute) and no patch "
            "convolution to read it from: give grid=(T, H, W), or grid=function(module, args, kwargs)"
        )
    position = names.index("hidden_states") if "hidden_states" in names else 0
    return VideoInput(Argument(names[position], position), patch, about.axes)


def geometry_reader(
    model: nn.Module, grid: Sequence[int] | GridFunction | None, text: tuple[int, int] | None = None
) -> GeometryReader:
    """What reads the geometry at every call: the given grid or function, or the model's input.

    Args:
        model: its class is looked up in `models.KNOWN`.
        grid: None, (T, H, W), or a function to (T, H, W) or (T, H, W, text_first, text_last).
        text: (text_first, text_last) where the user gave them; None to read them as the table says.

    Raises:
        ValueError: a grid that is no triple of positive ints; no grid given, and no way found to read one.
    """
    about, names = known(model), _arguments(model)
    trimmed = (about.trimmed,) if about.trimmed else ()
    missing = [name for name in (*about.sizes, *about.text, *about.history, *trimmed) if name not in names]
    if missing:  # the table is of another version of the class
        about, trimmed = Known(), ()

    def argument(name: str) -> Argument:
        return Argument(name, names.index(name))

    reader = Text(
        arguments=tuple(argument(name) for name in about.text),
        first=about.text_at == "first",
        trimmed=argument(trimmed[0]) if trimmed else None,
        history=tuple((argument(name), patch) for name, patch in about.history.items()),
        fixed=text,
    )
    if callable(grid):
        found: GridFunction = grid
    elif grid is not None:
        found = FixedGrid(axes_of("grid", grid))
    else:
        found = _from_input(model, names, about)
    return GeometryReader(found, reader, about.ragged and text is None)
