"""A model of the zoo: how it is made and called, and which attention calls see the video."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

TEXT = 12
Size = tuple[int, int, int]


def kind_of(name: str) -> Any:
    """A class of diffusers; skips a test where the oldest diffusers that is supported has none."""
    import diffusers

    if not hasattr(diffusers, name) and diffusers.__version__.startswith("0.41."):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return getattr(diffusers, name)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model.

    Attributes:
        make: class name and configuration.
        inputs: keyword arguments of a call on a token grid, for a batch.
        text: (text_first, text_last) tokens of its joint attention.
        history: tokens of earlier frames before the video's, on a token grid; None for none.
        sparse: names of the attention calls that see the video, in the order of the model's modules.
        whole: whether the model can be compiled as one graph.
        regional: whether its blocks can.
        frozen: modules that are not trained.
    """

    make: tuple[str, dict[str, Any]]
    inputs: Callable[[Size, int], dict[str, Any]]
    sparse: tuple[str, ...]
    text: tuple[int, int] = (0, 0)
    history: Callable[[Size], int] | None = None
    whole: bool = True
    regional: bool = True
    frozen: tuple[str, ...] = ()

    def extra(self, grid: Size) -> tuple[int, int]:
        """Extra tokens before and after the video's."""
        first, last = self.text
        return first + (self.history(grid) if self.history is not None else 0), last

    def model(self) -> nn.Module:
        """A fresh one; its parameters are random, those that start at zero too."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            model = kind_of(self.make[0])(**self.make[1])
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.02)
        for name in self.frozen:
            model.get_submodule(name).requires_grad_(False)
        return model.eval()


def random(*shape: int, seed: int = 1) -> Tensor:
    """The same numbers for the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def lengths(batch: int, tokens: int) -> Tensor:
    """A mask ``[B, L]`` in which every sample has another number of valid tokens."""
    return (torch.arange(tokens) < tokens - 3 * torch.arange(batch)[:, None]).long()


def history(names: tuple[str, str, str], grid: Size, batch: int) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Latents of one, two and three earlier frames; numbers of these frames; and those of the video's own.

    Args:
        names: arguments of the latents, the latest first, in patches of (1, 2, 2), (2, 4, 4) and (4, 8, 8).
        grid: token grid of the video, in patches of (1, 2, 2).
        batch: samples.
    """
    T, H, W = grid
    latents = {name: random(batch, 4, t, 2 * H, 2 * W) for t, name in enumerate(names, 1)}
    frames = (torch.arange(5, 6), torch.arange(3, 5), torch.arange(3))
    return latents, {f"indices_{name}": one for name, one in zip(names, frames)}, torch.arange(6, 6 + T)


def history_tokens(grid: Size) -> int:
    """Tokens of `history`."""
    return sum(-(-grid[1] // side) * -(-grid[2] // side) for side in (1, 2, 4))
